# Copyright 2026 The miras-hf authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The generation cache of a memory layer: a cache layer that Transformers' own `DynamicCache` and `StaticCache` build and
`generate()` uses untouched. Its size does not grow with the text read."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    STATIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    LinearAttentionCacheLayerMixin,
)

from .configuration_miras import MEMORY_LAYER
from .inference_mode import is_abroad, leave_inference_mode
from .memory import MemoryState
from .rollback import Recording
from .weights_version import WeightsVersion


class MirasLayer(LinearAttentionCacheLayerMixin, CacheLayerMixin):
    """The memory of every row of a batch after the tokens read so far, beside the tails of its convolutions.

    Single tokens without gradients are written into the tensors where they lie, but only into those that the layer has
    made itself and has handed to nobody: what was read from `memory` or `conv_tail`, is shared with a copy, or may be
    needed by a graph is copied before.

    Attributes:
        memory (`MemoryState`, *optional*): state of the memory; `None` before the first token, which then starts
            from the model's learned initial memory.
        conv_tail (`torch.Tensor` of shape `[rows, conv_kernel_size - 1, channels]`, *optional*):
            Last inputs of the q, k and v convolutions.
        rows (`int`, *optional*): size of the batch; `None` before the first token.
        link_cache (*optional*):
            What the backend keeps beside the memory to spare single tokens a pass over it. Belongs to this very memory
            and to the parameters that it was made with, see `link_cache_of`.
        tokens_seen (`int`): length of the text read, pad tokens included (what `generate()` counts); the tokens that
            a row really read are in `memory.count`.
    """

    is_compileable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, **kwargs):
        CacheLayerMixin.__init__(self)
        LinearAttentionCacheLayerMixin.__init__(self)
        # a plain tuple: Transformers' exporters rebuild what they find in a cache as `type(x)(items)`, which a named
        # tuple does not take
        self._memory: tuple | None = None
        self._conv_tail: Tensor | None = None
        self.link_cache: Any = None
        self._made_with: WeightsVersion | None = None
        self._owned = False
        self.tokens_seen = 0
        self._recording = Recording()

    @property
    def recording(self) -> Recording | None:
        """What is kept for `crop`, `None` unless `activate_past_recording` was called."""
        return self._recording if self.record_past else None

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can take tokens back: a layer records only when it is asked to."""
        return self.record_past

    @property
    def memory(self) -> MemoryState | None:
        self._owned = False
        return self._live_memory

    @property
    def conv_tail(self) -> Tensor | None:
        self._owned = False
        return self._conv_tail

    @property
    def rows(self) -> int | None:
        return None if not self.is_initialized else self._conv_tail.shape[0]

    @property
    def _live_memory(self) -> MemoryState | None:
        return MemoryState(*self._memory) if self.is_initialized else None

    @property
    def made_with(self) -> WeightsVersion | None:
        """The version of the parameters that the link cache was made with; `None` in a compiled graph."""
        if torch.compiler.is_compiling():
            return None
        return self._made_with if isinstance(self.link_cache, tuple) else getattr(self.link_cache, "made_with", None)

    def link_cache_of(self, version: WeightsVersion | None) -> Any:
        """The link cache, if it was made with these parameters; `None` if those have changed since, as by a step of an
        optimizer.

        Args:
            version (`WeightsVersion`): of the parameters of the memory, asked for with `made_with`. In a compiled graph
                they stand still.
        """
        if torch.compiler.is_compiling() or self.link_cache is None:
            return self.link_cache
        return self.link_cache if version is not None and self.made_with is version else None

    def update_memory(
        self,
        memory: MemoryState,
        conv_tail: Tensor,
        tokens: int,
        link_cache: Any = None,
        version: WeightsVersion | None = None,
        *,
        handed_over: bool = False,
    ) -> None:
        """Takes the state after `tokens` more tokens per row, pads included, and what belongs to it.

        Args:
            link_cache, version (*optional*): only with a state that is handed over.
            handed_over (`bool`, *optional*, defaults to `False`):
                Whether nobody else keeps the tensors, which are the layer's from then on. Otherwise they are copied,
                differentiably in grad mode.
        """
        if not handed_over:
            memory, conv_tail, link_cache = memory.map(_contiguous_copy), _contiguous_copy(conv_tail), None
        self._keep(memory, conv_tail, link_cache)
        if not torch.compiler.is_compiling():
            # where a link cache shows its attributes, compiled graphs and exporters look at this one
            self._made_with = version if isinstance(link_cache, tuple) else None
            if self.link_cache is not None and not isinstance(self.link_cache, tuple):
                self.link_cache.made_with = version
        # with gradients, the graph of the call may have kept any of them for its backward pass
        self._owned = not torch.is_grad_enabled()
        self.tokens_seen += tokens
        self.device, self.dtype = conv_tail.device, conv_tail.dtype
        self.is_initialized = True
        self.has_previous_state = {0: True}

    def _keep(self, memory: MemoryState, conv_tail: Tensor, link_cache: Any) -> None:
        self._memory, self._conv_tail, self.link_cache = tuple(memory), conv_tail, link_cache

    def to_read(self) -> tuple[MemoryState | None, Tensor | None]:
        """State and convolution tail for the next call, which may write into them; both `None` before the first token.
        Tensors that are not the layer's own, and those made in inference mode where that is off, are replaced by copies,
        cut off from their graph as the keys and values of other caches are. In grad mode they stay in it, and nothing may
        be written."""
        if not self.is_initialized:
            return None, None
        if not (self._owned or torch.is_grad_enabled()) or self._is_abroad():
            self._map(lambda t: _contiguous_copy(t.detach()))
            self._owned = not torch.is_grad_enabled()
        return self._live_memory, self._conv_tail

    def detach(self) -> None:
        """Cuts the memory off from the graph of what was read, see [`~miras_hf.detach`]."""
        self._map(torch.Tensor.detach)

    def __deepcopy__(self, memo: dict) -> "MirasLayer":
        # PyTorch copies no tensor that has a graph; a clone is as good, and its gradient goes the same way
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        tensors = {id(t): t.clone() for t in self._all_tensors()}
        copied.__dict__ = copy.deepcopy(self._attributes(), memo | tensors)
        copied._owned = self._owned
        return copied

    def _all_tensors(self) -> list[Tensor]:
        recording = self._recording
        borders = [t for _, state in recording.borders for t in _tensors(state, recording.inputs, None)]
        inputs = [] if recording.inputs is None else [recording.inputs]
        return [*_tensors(self._memory, self._conv_tail, self.link_cache), *inputs, *borders]

    def _is_abroad(self) -> bool:
        return not torch.compiler.is_compiling() and is_abroad(self._all_tensors())

    def _attributes(self) -> dict[str, Any]:
        # for copies: of the link cache only tensors; anything else looks into this very memory, and is made again
        link_cache = self.link_cache if isinstance(self.link_cache, tuple) else None
        recording = self._recording
        recording = replace(recording, columns=list(recording.columns), borders=list(recording.borders))
        return {**vars(self), "link_cache": link_cache, "_recording": recording}

    def __getstate__(self) -> dict[str, Any]:
        # of `copy.copy` and pickle: whoever gets it shares the tensors, another process, too, through shared memory
        self._owned = False
        return self._attributes()

    # -- what Transformers asks of a cache layer ----------------------------------------------------------------------

    def get_seq_length(self) -> int:
        return self.tokens_seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.tokens_seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        """Back to the learned initial memory (which is not zero): the next token starts a new text."""
        self._memory = self._conv_tail = self.link_cache = None
        self._recording = Recording()
        self.tokens_seen = 0
        self.is_initialized = False
        self.has_previous_state = {0: False}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        # a slice with steps is not contiguous
        self._map(lambda t: t[indices.to(t.device) if isinstance(indices, Tensor) else indices].contiguous())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def offload(self) -> None:
        self._map(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized and self._conv_tail.device != self.device:
            self._map(lambda t: t.to(self.device, non_blocking=True))

    def activate_past_recording(self) -> None:
        """From now on what is read can be taken back by `crop`, see [`~miras_hf.rollback.Recording`].

        Raises:
            `ValueError`: if the rows have read different numbers of tokens.
        """
        if not self.record_past:
            self._recording = Recording.start(self._live_memory, self._conv_tail)
            self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last tokens of every row back: state and tail are exactly what they were before them.

        Args:
            tokens_to_remove (`int`): minus the number of tokens. What was read before cannot be taken back any more.

        Raises:
            `RuntimeError`: if the layer does not record.
            `ValueError`: for a positive number, or more tokens than were recorded.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"`tokens_to_remove` must be zero or negative, got {tokens_to_remove}.")
        if not self.is_initialized:
            return
        if not self.record_past:
            raise RuntimeError(
                "`crop` needs a memory that records: call `cache.activate_past_recording()` before reading what may "
                "be taken back, or go back to a `miras_hf.snapshot(cache)` with `miras_hf.restore`."
            )
        memory, conv_tail = self.to_read()  # all of it or nothing has the graph of what was read
        if tokens_to_remove:
            memory, conv_tail = self._recording.take_back(-tokens_to_remove, memory, conv_tail.shape[1])
            self._keep(memory, conv_tail, None)
            self.tokens_seen += tokens_to_remove
        self._recording = Recording.start(self._live_memory, self._conv_tail)

    def lazy_initialization(self, *args, **kwargs) -> None:
        raise ValueError("A memory layer keeps no keys and values: its state is set by `update_memory`.")

    def update(self, *args, **kwargs) -> None:
        raise ValueError(
            "A memory layer keeps no keys and values, so none can be put into it: prefix tuning is not possible with "
            "Miras models; prompt tuning and LoRA are."
        )

    def update_conv_state(self, *args, **kwargs) -> None:
        raise ValueError("The states of a memory layer are set together, by `update_memory`.")

    update_recurrent_state = update_conv_state

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            # tensors have the rows first; anything else is made again when it is needed
            link_cache = tuple(map(function, self.link_cache)) if isinstance(self.link_cache, tuple) else None
            self._keep(self._live_memory.map(function), function(self._conv_tail), link_cache)
            self._recording = self._recording.map(function)


class StaticMirasLayer(MirasLayer):
    """The memory layer of a `StaticCache`: its tensors keep their addresses, and nothing in it is a number that grows, so
    that a compiled step (`generate(cache_implementation="static")`, CUDA graphs) serves every token. They move in one case
    only: where they were made in inference mode, and that is off. A compiled step cannot move them: read on by a call that
    is not compiled first.

    Attributes:
        memory, conv_tail: as in [`MirasLayer`], but copies, since its own tensors are written into for good.
        tokens_seen (`torch.Tensor`): as in [`MirasLayer`], an integer on the cache's device.
    """

    is_compileable = True

    def __init__(self, max_cache_len: int, **kwargs):
        super().__init__()
        self.max_cache_len = max_cache_len
        self.tokens_seen = torch.tensor(0)

    def get_seq_length(self) -> Tensor | int:
        return self.tokens_seen if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # Transformers may ask this layer for the mask of layers of full attention, which keep so many slots
        return self.max_cache_len, 0

    @property
    def memory(self) -> MemoryState | None:
        return None if self._live_memory is None else self._live_memory.map(torch.clone)

    @property
    def conv_tail(self) -> Tensor | None:
        return None if self._conv_tail is None else self._conv_tail.clone()

    def to_read(self) -> tuple[MemoryState | None, Tensor | None]:
        """As in [`MirasLayer`]. Its tensors are its own always: what it takes is copied into them."""
        self._leave_inference_mode()
        return (self._live_memory, self._conv_tail) if self.is_initialized else (None, None)

    def _leave_inference_mode(self) -> None:
        if self._is_abroad():
            leave_inference_mode(self)

    def _all_tensors(self) -> list[Tensor]:
        return [*super()._all_tensors(), cast(Tensor, self.tokens_seen)]

    def __copy__(self) -> "StaticMirasLayer":
        return copy.deepcopy(self)

    def __getstate__(self) -> dict[str, Any]:
        return tree_map_only(Tensor, torch.clone, self._attributes())

    def activate_past_recording(self) -> None:
        raise ValueError(
            "A static cache cannot take tokens back: use `DynamicCache(config=model.config)`, or `miras_hf.snapshot` and "
            "`miras_hf.restore`."
        )

    def reset(self) -> None:
        self._leave_inference_mode()
        self.tokens_seen.zero_()
        self.is_initialized = False
        self.has_previous_state = {0: False}

    def _keep(self, memory: MemoryState, conv_tail: Tensor, link_cache: Any) -> None:
        if torch.is_grad_enabled() and any(t.requires_grad for t in _tensors(memory, conv_tail, link_cache)):
            raise ValueError(
                "A static cache keeps its tensors and cannot keep graphs: read under `torch.no_grad()`, or into a "
                "`DynamicCache(config=model.config)`, through which gradients go."
            )
        self._leave_inference_mode()
        new, old = _tensors(memory, conv_tail, link_cache), _tensors(self._memory, self._conv_tail, self.link_cache)
        if [(t.shape, t.dtype, t.device) for t in new] == [(t.shape, t.dtype, t.device) for t in old]:
            for mine, t in zip(old, new, strict=True):
                if t is not mine:
                    mine.copy_(t)
            if not isinstance(link_cache, tuple):
                self.link_cache = link_cache
            return
        if self._memory is not None and torch.compiler.is_compiling():
            raise ValueError("A static cache cannot change its shapes in a compiled step: read the prompt before.")
        super()._keep(MemoryState(*memory).map(_contiguous_copy), _contiguous_copy(conv_tail), link_cache)
        self.tokens_seen = self.tokens_seen.to(conv_tail.device)
        if not torch.compiler.is_compiling():
            for t in self._all_tensors():
                torch._dynamo.mark_static_address(t)


def _tensors(memory: tuple | None, conv_tail: Tensor | None, link_cache: Any) -> list[Tensor]:
    if memory is None or conv_tail is None:
        return []
    link_cache = link_cache if isinstance(link_cache, tuple) else ()
    return [*MemoryState(*memory).leaves(), conv_tail, *link_cache]


def _contiguous_copy(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.contiguous_format)


DYNAMIC_LAYER_TYPE_MAPPING[MEMORY_LAYER] = MirasLayer
STATIC_LAYER_TYPE_MAPPING[MEMORY_LAYER] = StaticMirasLayer


def memory_layer(cache: Cache | None, layer_idx: int) -> MirasLayer | None:
    """The cache layer of a memory layer.

    Raises:
        `ValueError`: if the cache was made for another model.
    """
    if cache is None:
        return None
    layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    if not isinstance(layer, MirasLayer):
        found = "no such layer" if layer is None else f"a {type(layer).__name__}"
        raise ValueError(
            f"`cache` must be made for this model, `DynamicCache(config=model.config)`: layer {layer_idx} is "
            f"a memory, and the cache has {found} there. (If PEFT made it: prefix tuning is not possible with Miras "
            "models; prompt tuning and LoRA are.)"
        )
    return layer


def tokens_read(cache: Cache | None) -> Tensor | int:
    """Real tokens read so far, per row where a memory has counted them (`[rows]`), else one number, pads included."""
    if cache is None:
        return 0
    for layer in cache.layers:
        if isinstance(layer, MirasLayer):
            memory = layer._live_memory
            return 0 if memory is None else memory.count
    return int(cache.get_seq_length())
