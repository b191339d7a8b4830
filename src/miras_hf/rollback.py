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
"""Taking tokens back: what a memory layer records for speculative decoding, and snapshots of whole caches."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers.cache_utils import Cache, StaticCache

from .inference_mode import leave_inference_mode
from .memory import MemoryState
from .weights_version import WeightsVersion


MAX_TOKENS_BACK = 256
"""How many of the last tokens a recording cache gives back at most; speculative decoding drafts far fewer at a time."""


@dataclass(frozen=True)
class Snapshot:
    """What a cache held at a moment; made by [`snapshot`], put back by [`restore`] as often as one likes."""

    kinds: list[type]
    layers: list[dict[str, Any]]


def snapshot(cache: Cache) -> Snapshot:
    """
    A copy of all that a cache holds, to go back to: a conversation before its last turn, a text read once and continued
    in several ways. Exact for any batch, and of constant size like the cache itself. Restored into another cache it is a
    copy that gradients go through, which `copy.deepcopy` cannot make of a hybrid: PyTorch refuses attention's keys and
    values that have a graph.

    Args:
        cache (`Cache`): Of any Miras model, dynamic or static, hybrid or not.

    Raises:
        `ValueError`: if a layer of the cache keeps something that cannot be copied.

    ```python
    >>> cache = DynamicCache(config=model.config)
    >>> with torch.no_grad():
    ...     model(**tokenizer(text, return_tensors="pt"), cache=cache, logits_to_keep=1)
    >>> before = miras_hf.snapshot(cache)
    >>> for question in questions:
    ...     model.generate(**inputs(text + question), cache=cache)
    ...     miras_hf.restore(cache, before)
    ```"""
    return Snapshot([type(layer) for layer in cache.layers], [_copy(layer.__getstate__()) for layer in cache.layers])


def restore(cache: Cache, snapshot: Snapshot) -> None:
    """
    Brings a cache back to where it was, tensors equal bit by bit. Those of a static cache stay where they are, so that
    compiled decoding goes on.

    Args:
        cache (`Cache`): The cache, or another of the same model.
        snapshot (`Snapshot`): Where to go back to. It is copied, and can be used again.

    Raises:
        `ValueError`: if the snapshot is of a cache with other layers.
    """
    kinds = [type(layer) for layer in cache.layers]
    if kinds != snapshot.kinds:
        raise ValueError(
            f"`snapshot` must be of a cache with layers {[kind.__name__ for kind in kinds]}, got one with "
            f"{[kind.__name__ for kind in snapshot.kinds]}."
        )
    for layer, attributes in zip(cache.layers, snapshot.layers, strict=True):
        leave_inference_mode(layer)
        now = vars(layer) if isinstance(cache, StaticCache) else {}
        layer.__dict__ = {name: _copy(value, into=now.get(name)) for name, value in attributes.items()}


def detach(cache: Cache) -> None:
    """
    Cuts a cache off from the graph of what was read into it, in place: truncated backpropagation through time. A loss on
    what is read next has no gradient with respect to what was read before.

    Args:
        cache (`Cache`): Of any Miras model, hybrid or not.

    ```python
    >>> cache = DynamicCache(config=model.config)
    >>> for segment in segments:
    ...     model(segment, labels=segment, cache=cache).loss.backward()
    ...     miras_hf.detach(cache)
    ```"""
    for layer in cache.layers:
        if hasattr(layer, "detach"):
            layer.detach()
        else:
            layer.__dict__ = tree_map_only(Tensor, Tensor.detach, vars(layer))


def _copy(value: Any, into: Any = None) -> Any:
    """A copy of what a cache layer keeps, written into the tensors of `into` wherever those have its shape."""
    if isinstance(value, Tensor):
        alike = isinstance(into, Tensor) and all(
            getattr(into, name) == getattr(value, name) for name in ("shape", "dtype", "device")
        )
        return into.copy_(value) if alike else value.clone()
    if isinstance(value, dict):
        into = into if isinstance(into, dict) else {}
        return {key: _copy(part, into.get(key)) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        into = into if isinstance(into, (tuple, list)) and len(into) == len(value) else [None] * len(value)
        parts = [_copy(part, target) for part, target in zip(value, into, strict=True)]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, Recording):
        return value.map(torch.clone)
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device, WeightsVersion)):
        return value
    raise ValueError(f"`cache` must keep tensors and numbers only, got a {type(value).__name__} in one of its layers.")


@dataclass
class Recording:
    """What a memory layer keeps besides its state, so that the last tokens can be taken back exactly.

    Inside a chunk the weights stand still and every token has a slot of its own, so an earlier state is the present one
    with the later slots emptied. The token that ends a chunk folds its slots into the weights: the state before it is
    kept. Of the convolutions the inputs are kept. All rows have the same pads, if any.

    Args:
        count (`int`): real tokens that every row has read.
        columns (`list` of `bool`): the last columns read, true at real tokens; so many can be taken back.
        inputs (`torch.Tensor` of shape `[rows, conv_kernel_size - 1 + sum(columns), channels]`, *optional*):
            Last inputs of the convolutions; `None` before the first token.
        borders (`list` of `(int, MemoryState)`): states before the tokens that ended a chunk, and their counts.
        writes (`int`): slots of a chunk that a token takes.
    """

    count: int = 0
    columns: list[bool] = field(default_factory=list)
    inputs: Tensor | None = None
    borders: list[tuple[int, MemoryState]] = field(default_factory=list)
    writes: int = 1

    @staticmethod
    def start(memory: MemoryState | None, conv_tail: Tensor | None) -> "Recording":
        """Of a layer in that state, from here on.

        Raises:
            `ValueError`: if the rows have read different numbers of tokens.
        """
        return Recording() if memory is None else Recording(count=_common(memory.count), inputs=conv_tail)

    def columns_of(self, mask: Tensor | None, columns: int) -> list[bool]:
        """Which columns of a call hold real tokens; `mask` as of `Sequences`.

        Raises:
            `ValueError`: if the rows have different pads.
        """
        return [True] * columns if mask is None else _common(mask)

    def ends(self, tokens: int, chunk_size: int, writes: int = 1) -> list[int]:
        """Those of the next real tokens, of so many slots each, that end a chunk, and can be taken back when all are read."""
        self.writes = writes
        last = range(max(0, tokens - MAX_TOKENS_BACK), tokens)
        # the first token of all needs no border: before it is nothing
        before = self.count
        return [i for i in last if before + i > 0 and (before + i + 1) * writes % chunk_size < writes]

    def add(
        self, columns: list[bool], conv_inputs: Tensor, conv_before: int, borders: list[tuple[int, MemoryState]]
    ) -> None:
        """Takes what a call has read.

        Args:
            columns (`list` of `bool`): its columns, true at real tokens.
            conv_inputs (`torch.Tensor`): `inputs`, and behind them those of the call's real tokens.
            conv_before (`int`): how many earlier ones the convolutions look at.
            borders (`list` of `(int, MemoryState)`): the states before the tokens that `ends` has named.
        """
        self.columns = (self.columns + columns)[-MAX_TOKENS_BACK:]
        self.count += sum(columns)
        reach = sum(self.columns)
        # a copy: a slice would keep the inputs of a whole prompt alive
        self.inputs = conv_inputs[:, conv_inputs.shape[1] - conv_before - reach :].clone()
        self.borders = [(n, border) for n, border in [*self.borders, *borders] if n >= self.count - reach]

    def take_back(self, columns: int, memory: MemoryState, conv_before: int) -> tuple[MemoryState, Tensor]:
        """State and convolution tail before the last columns; `memory` is the state after them.

        Raises:
            `ValueError`: if they are more than were recorded.
        """
        if columns > len(self.columns):
            raise ValueError(
                f"`tokens_to_remove` must be at least {-len(self.columns)} here, got {-columns}: what was read before "
                "`activate_past_recording`, before the last `crop`, or more than "
                f"{MAX_TOKENS_BACK} tokens ago cannot be taken back."
            )
        tokens = sum(self.columns[len(self.columns) - columns :])
        stop = self.inputs.shape[1] - tokens
        conv_tail = self.inputs[:, stop - conv_before : stop].clone()
        target = self.count - tokens
        if target == 0:
            return memory.map(torch.zeros_like), conv_tail
        state = next(border for count, border in [*self.borders, (self.count, memory)] if count >= target)
        size = state.eta.shape[-2]
        kept = (torch.arange(size, device=state.eta.device) < target * self.writes % size).unsqueeze(-1)

        def emptied(slots: Tensor) -> Tensor:
            return torch.where(kept, slots, 0.0)

        return state.map_slots(emptied)._replace(count=torch.full_like(state.count, target)), conv_tail

    def map(self, function: Callable[[Tensor], Tensor]) -> "Recording":
        """The recording with `function` applied to every tensor; all have the rows first."""
        inputs = None if self.inputs is None else function(self.inputs)
        borders = [(count, border.map(function)) for count, border in self.borders]
        return replace(self, columns=list(self.columns), inputs=inputs, borders=borders)


def _common(rows: Tensor) -> Any:
    """What all rows of a tensor have in common, as Python numbers."""
    first, *others = rows.tolist()
    if any(other != first for other in others):
        raise ValueError(
            "Tokens can be taken back (`crop`, assisted decoding, prompt lookup) only where all rows have the same "
            "pads, which is not so in this batch: use `miras_hf.snapshot` and `miras_hf.restore`."
        )
    return first
