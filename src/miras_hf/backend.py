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
"""Which path reads: Triton kernels where they serve the call, PyTorch everywhere else. Decided before tracing.

`MIRAS_BACKEND` in the environment wins over `memory_backend` in the config. `"auto"` takes a kernel where one serves the
call, and says once if a GPU is left to the slow path; `"triton"` raises where none does; `"pytorch"` takes none.
"""

import itertools
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import logging

from miras_kernels import LARGEST_CALL, Choices, decode, forward, refusal, resident_state
from miras_kernels.choices import ATTENTIONAL_BIASES, MEMORIES, RETENTION_GATES

from .memory import (
    MemoryParameters,
    MemoryState,
    MirasRule,
    chunk_miras,
    fold_step_,
    folds_at_once,
    step_miras,
    step_miras_,
)
from .memory.delta_rule import DeltaRule, Implicit
from .memory.learning import GradientDescent
from .memory.registry import CHOICES
from .memory.retention import ChunkWeights
from .memory.vjp import by_formulas
from .sequences import Sequences


if TYPE_CHECKING:
    from .modeling_miras import ProjectedTokens
    from .rollback import Recording


logger = logging.get_logger(__name__)

BACKENDS = ("auto", "triton", "pytorch")

# the choices that kernels know, by the config's names, and what they call otherwise than configs do
_KERNELS_KNOW = {"memory_architecture": MEMORIES, "attentional_bias": ATTENTIONAL_BIASES, "retention": RETENTION_GATES}
# what they take for granted
_KERNELS_ASSUME = {
    "memory_depth": 2,
    "memory_norm": True,
    "memory_residual": True,
    "gradient_at": "decayed",
    "erase_key": "write",
}
_KERNELS_LEARN = {GradientDescent: "gradient_descent", DeltaRule: "delta_rule", Implicit: "implicit"}
_KERNELS_CALL = {"none": "decay"}  # of a log retention of zero
_KERNEL_WORDS = {"memory_architecture": "memory", "memory_expansion": "expansion", "memory_norm_eps": "norm_eps"}


class Carry(NamedTuple):
    """What a layer carries from one call of a text to the next; all `None` before the first token.

    Args:
        state (`MemoryState`): of the memory.
        conv_tail (`torch.Tensor` of shape `[rows, conv_kernel_size - 1, channels]`): last inputs of the convolutions.
        link_cache: what the backend keeps beside the state; `None` if that comes from elsewhere.
    """

    state: MemoryState | None = None
    conv_tail: Tensor | None = None
    link_cache: Any = None


class MemoryBackend:
    """Reads tokens with the memory of a rule, from a layer's projections on.

    Args:
        rule (`MirasRule`): the four choices.
        backend (`str`, *optional*, defaults to `"auto"`): one of `BACKENDS`.
        writes (`int`, *optional*, defaults to 1):
            How often a token writes. The memory reads so many tokens for each, of which the last one's read is the token's;
            states that are handed in and out count tokens of the text.

    Raises:
        `ValueError`: for an unknown backend; at a call, if `"triton"` is asked for and no kernel serves it.
    """

    def __init__(self, rule: MirasRule, backend: str = "auto", writes: int = 1):
        name = "MIRAS_BACKEND" if "MIRAS_BACKEND" in os.environ else "memory_backend"
        backend = os.environ.get("MIRAS_BACKEND", backend)
        if backend not in BACKENDS:
            raise ValueError(f"`{name}` must be one of {BACKENDS}, got {backend!r}.")
        self.rule, self.backend, self.writes = rule, backend, writes
        self.folds_at_once = folds_at_once(rule)
        self.choices, self.reason = kernel_choices(rule, writes)

    def _takes_kernel(self, v: Tensor, needs_grad: bool, in_place: bool = False) -> bool:
        if self.backend == "pytorch":
            return False
        reason = self.reason
        if self.choices is not None:
            reason = refusal(v.device, v.dtype, v.shape[-1], self.choices, needs_grad, decode=in_place)
        if reason is None:
            return True
        if self.backend == "triton":
            raise ValueError(f"No kernel serves this call, and the backend is 'triton': {reason}.")
        if v.device.type == "cuda":
            _say_once(f"Miras memories run on the slow PyTorch path on a GPU: {reason}.")
        return False

    def __call__(
        self,
        tokens: "ProjectedTokens",
        sequences: Sequences,
        parameters: MemoryParameters,
        carry: Carry | None = None,
        recording: "Recording | None" = None,
        keeps_slots: bool = False,
    ) -> tuple[Tensor, Carry | None]:
        """
        Args:
            tokens (`ProjectedTokens`): a layer's projections; what stands between them and the memory is done here.
            sequences (`Sequences`): their pads and packs.
            parameters (`MemoryParameters`): initial memory and layer norm.
            carry (`Carry`, *optional*):
                What is between the calls of a text, where it goes on; its tensors may be written into. `None` for a text
                that ends with the call.
            recording (`Recording`, *optional*): takes what is needed to take the tokens back.
            keeps_slots (`bool`, *optional*, defaults to `False`): whether tokens wait in slots even where they need not.

        Returns:
            What the tokens read, `[batch, tokens, heads, head_dim]`, and the `carry` after them, `None` if none was given.
        """
        if recording is not None:
            return self._recorded(tokens, sequences, parameters, carry, recording)
        state, tail, known = Carry() if carry is None else carry
        v, link_cache, projections = tokens.v, None, None
        in_place = state is not None and sequences.cu_seqlens is None and self.reads_in_place(v)
        decodes = in_place and self._takes_kernel(v, False, in_place=True)
        if decodes and tokens.is_plain():
            tail = tail.contiguous()
            x, projections = tokens.for_kernel(tail)
        else:
            # before, because it takes as much again for a moment
            next_tail = None if carry is None else tokens.next_tail(tail, sequences.lengths)
            x, tail = tokens.finished(tail, sequences.position), next_tail
            v = x[2]
            tokens.release()
        if state is not None and self.writes > 1:
            state = state._replace(count=state.count * self.writes)
        of_writes = sequences.of_writes(self.writes)
        arguments = {"parameters": parameters, "lengths": sequences.lengths}
        after = {"initial_state": state, "output_final_state": carry is not None}
        if decodes:
            y, state, link_cache = self._decode(*x[:6], state, known, projections=projections, **arguments)
        elif in_place:
            # a traced graph serves states that may have something in their slots
            folds = self.folds_at_once and not keeps_slots and not by_formulas()
            step = fold_step_ if folds else step_miras_
            weights = known.weights if isinstance(known, _ChunkStart) and known.folds == folds else None
            for write in self._one_by_one(x):
                y, weights = step(*write, rule=self.rule, state=state, weights=weights, **arguments)
            link_cache = None if weights is None else _ChunkStart(weights)
        elif self._takes_kernel(v, _needs_grad(*x, *parameters.initial, *parameters[1:], *_flat(state))):
            y, state, link_cache = self._by_kernel(*x[:6], cu_seqlens=sequences.cu_seqlens, **arguments, **after)
        elif state is not None and v.shape[1] == 1:
            y, state = step_miras(*x, rule=self.rule, **arguments, **after)
        else:
            y, state = chunk_miras(*x, rule=self.rule, parameters=parameters, **of_writes, **after)
            y = y[:, self.writes - 1 :: self.writes]
        if state is not None and self.writes > 1:
            state = state._replace(count=state.count // self.writes)
        if tokens.skipped is not None:
            y = y + tokens.skipped.to(y.dtype)
        return y, None if carry is None else Carry(state, tail, link_cache)

    def _one_by_one(self, x: tuple[Tensor | None, ...]) -> list[tuple[Tensor | None, ...]]:
        """The writes of a token."""
        if self.writes == 1:
            return [x]
        return [tuple(None if t is None else t[:, i : i + 1] for t in x) for i in range(self.writes)]

    def _recorded(self, tokens, sequences, parameters, carry, recording) -> tuple[Tensor, Carry | None]:
        """Reads in pieces that begin with the tokens that end a chunk: the state before each holds its chunk's start and
        factors, whichever form has read them."""
        padded = tokens.v.shape[1]
        columns = recording.columns_of(sequences.mask, padded)
        real = sum(columns)
        ends = recording.ends(real, self.rule.chunk_size, self.writes)
        # before decoding writes into the tail
        conv_inputs = tokens.part(0, real).conv_inputs(recording.inputs)
        outputs, borders = [], []
        for first, last in itertools.pairwise([*sorted({0, *ends}), real]):
            if first in ends:
                # a copy: decoding may write into the state it goes on from
                borders.append((recording.count + first, carry.state.map(torch.clone)))
            y, carry = self(tokens.part(first, last), Sequences(), parameters, carry, keeps_slots=True)
            outputs.append(y)
        recording.add(columns, conv_inputs, carry.conv_tail.shape[1], borders)
        return F.pad(torch.cat(outputs, dim=1), (0, 0, 0, 0, 0, padded - real)), carry

    def reads_in_place(self, v: Tensor) -> bool:
        """Whether a state is updated where it lies by values like `v`: few tokens, and nothing to differentiate."""
        if torch.is_grad_enabled():
            return False
        return v.shape[1] == 1 or (v.shape[1] <= LARGEST_CALL and self._takes_kernel(v, False, in_place=True))

    def _decode(self, q, k, v, eta, log_alpha, delta, state, link_cache, *, parameters, lengths, projections):
        if not isinstance(link_cache, tuple):
            state, link_cache = self._resident(state, parameters)
        y = decode(
            *(q.to(v.dtype), k.to(v.dtype), v, eta, log_alpha, delta),
            **self._memory(parameters),
            state=_flat(state),
            link_cache=link_cache,
            projections=projections,
            lengths=lengths,
        )
        return y, state, link_cache

    def _by_kernel(
        self, q, k, v, eta, log_alpha, delta, *, parameters, initial_state, output_final_state, cu_seqlens, lengths
    ):
        # queries and keys come from their norm in float32: the values' dtype is the one that the model computes in
        y, final, _ = forward(
            *(q.to(v.dtype), k.to(v.dtype), v, eta, log_alpha, delta),
            **self._memory(parameters),
            state=_flat(initial_state) or None,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
            lengths=lengths,
        )
        state = MemoryState.of_leaves(final) if output_final_state else None
        if state is None or torch.is_grad_enabled():
            return y, state, None
        return y, *self._resident(state, parameters)

    def _memory(self, parameters: MemoryParameters) -> dict[str, Any]:
        initial, norm_weight, norm_bias = parameters
        return {"choices": self.choices, "initial": initial, "norm_weight": norm_weight, "norm_bias": norm_bias}

    def _resident(self, state: MemoryState, parameters: MemoryParameters) -> tuple[MemoryState, tuple[Tensor, ...]]:
        flat, link_cache = resident_state(_flat(state), choices=self.choices, initial=parameters.initial)
        return MemoryState.of_leaves(flat), link_cache


class _ChunkStart:
    """The weights of the present chunk, which the next step needs again; none where nothing waits in slots.

    Shows no attributes: Transformers' exporters walk through all that a cache holds, and compare it with what a traced
    step leaves, which keeps none.
    """

    __slots__ = ("weights", "made_with")
    __dict__ = property(lambda self: {})

    def __init__(self, weights: Sequence[ChunkWeights]):
        self.weights, self.made_with = weights, None

    @property
    def folds(self) -> bool:
        """Whether `fold_step_` has made it."""
        return not self.weights


def _flat(state: MemoryState | None) -> tuple[Tensor, ...]:
    return () if state is None else tuple(state.leaves())


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


# in a compiled model too: said while the graph is traced
@torch.compiler.assume_constant_result
def _say_once(message: str) -> bool:
    logger.warning_once(message)
    return True


def kernel_choices(rule: MirasRule, writes: int = 1) -> tuple[Choices | None, str | None]:
    """The rule as the kernels see it, or the reason for which they do not know it, or tokens that write so often."""
    algorithm = _KERNELS_LEARN.get(type(rule.algorithm))
    if algorithm is None:
        return None, f"kernels do not know {type(rule.algorithm).__name__}"
    for key, value in rule.algorithm.keys().items():
        if value != _KERNELS_ASSUME[key]:
            return None, f"kernels do not know `{key}={value!r}`"
    if writes > 1:
        return None, f"kernels do not know tokens with {writes} writes"
    parts = {
        "memory_architecture": rule.architecture,
        "attentional_bias": rule.attentional_bias,
        "retention": rule.retention,
    }
    found = {}
    for field, part in parts.items():
        # the classes themselves: a subclass may compute something else
        name = next((name for name, cls in CHOICES[field].items() if cls is type(part)), None)
        name = _KERNELS_CALL.get(name, name)
        if name not in _KERNELS_KNOW[field]:
            return None, f"kernels do not know {type(part).__name__}"
        found |= {field: name, **part.keys()}
    for key, value in _KERNELS_ASSUME.items():
        if found.pop(key, value) != value:
            return None, f"kernels do not know `{key}={parts['memory_architecture'].keys()[key]!r}`"
    if algorithm != "gradient_descent" and found["residual_clip"] is None:
        del found["residual_clip"]  # which all rules with such an algorithm are without
    if "lp_sign" in found:
        found["lp_smooth_sign"] = found.pop("lp_sign") == "tanh"
    found = {_KERNEL_WORDS.get(name, name): value for name, value in found.items()}
    try:
        choices = Choices(
            **found,
            learning_algorithm=algorithm,
            chunk_size=rule.chunk_size,
            decay_target=rule.decay_target,
            min_log_alpha=rule.least_log_alpha,
        )
    except ValueError as error:
        return None, str(error).removesuffix(".")
    return choices, None
