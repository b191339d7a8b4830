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
"""What a memory is made of: the parameters that the outer model learns, and the state that reading changes."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .architecture import Factors
from .learning import NONE
from .rule import MirasRule


class MemoryParameters(NamedTuple):
    """What the outer model learns about a memory; nothing here changes while it reads.

    Args:
        initial (`tuple` of `torch.Tensor` of shape `[heads, in, out]`): the initial dual state A_0, layer by layer.
        norm_weight (`torch.Tensor` of shape `[heads, head_dim]`):
            gamma of the memory's own layer norm; of `Exact`, whose memory has none, the logits of its ridge.
        norm_bias (`torch.Tensor` of shape `[heads, head_dim]`): beta.
    """

    initial: tuple[Tensor, ...]
    norm_weight: Tensor
    norm_bias: Tensor

    def base(self, rule: MirasRule, rows: int, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        """What the states `[rows * heads, in, out]` are deviations from, `None` for nothing."""
        return tuple(per_row(a, rows, dtype) if rule.decay_target == "init" else None for a in self.written(rule))

    def written(self, rule: MirasRule) -> tuple[Tensor, ...]:
        """The initial dual state of the weights that a text writes."""
        return self.initial[rule.architecture.fixed :]

    def norm(self, rule: MirasRule, rows: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """What no text changes, for rows and heads in one axis: the layer norm's weight and bias `[rows * heads, 1,
        head_dim]`, and behind them the weights that are not written."""
        affine = (per_row(p, rows, dtype).unsqueeze(1) for p in (self.norm_weight, self.norm_bias))
        fixed = self.initial[: rule.architecture.fixed]
        linked = (rule.retention.link(a.to(dtype), rule.hidden_axis(layer)) for layer, a in enumerate(fixed))
        return *affine, *(per_row(weight, rows, dtype) for weight in linked)


def per_row(p: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """A parameter `[heads, ...]` for rows and heads in one axis, `[rows * heads, ...]`."""
    return p.to(dtype).expand(rows, *p.shape).reshape(rows * p.shape[0], *p.shape[1:])


class MemoryState(NamedTuple):
    """The memory of `rows` sequences between two calls, of constant size, also in the middle of a chunk.

    Inside a chunk the weights do not move: the chunk's writes wait as rank-one factors (slots at or past the phase
    `count % chunk_size` have `eta = 0`) and are folded in when the row's chunk ends.

    Args:
        dual (`tuple` of `torch.Tensor` of shape `[rows, heads, in, out]`, one for each weight that is written):
            The dual state at the start of the row's chunk, as the deviation from the initial memory if
            `decay_target="init"`. A row of zeros, `count` included, is at the learned initial memory.
        inputs (`tuple` of `torch.Tensor` of shape `[rows, heads, chunk_size, in]`): what each layer read.
        gradients (`tuple` of `torch.Tensor` of shape `[rows, heads, chunk_size, out]`): gradients at its output.
        eta (`torch.Tensor` of shape `[rows, heads, chunk_size, head_dim or 1]`): steps.
        log_decay (`torch.Tensor` of the same shape): log retention since the chunk's start, cumulative.
        count (`torch.Tensor` of shape `[rows]`, int64): real tokens read so far.
        momentum (`tuple` of `torch.Tensor`, as `dual`):
            At the start of the row's chunk, of `Momentum` only; of `Exact`, H in its place.
        log_momentum (`tuple` of one `torch.Tensor`, as `log_decay`):
            Log momentum since the chunk's start, cumulative, of `Momentum` only.
    """

    dual: tuple[Tensor, ...]
    inputs: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]
    eta: Tensor
    log_decay: Tensor
    count: Tensor
    momentum: tuple[Tensor, ...] = ()
    log_momentum: tuple[Tensor, ...] = ()

    @property
    def matrices(self) -> tuple[Tensor, ...]:
        """What a rule folds chunks into."""
        return (*self.dual, *self.momentum)

    @property
    def logs(self) -> tuple[Tensor, ...]:
        """Of what is left of them since the chunk's start, of `dual` and of `momentum`."""
        return (self.log_decay, *self.log_momentum)

    def with_matrices(self, matrices: Sequence[Tensor]) -> "MemoryState":
        """The state with others in their place."""
        layers = len(self.inputs)
        return self._replace(dual=tuple(matrices[:layers]), momentum=tuple(matrices[layers:]))

    @property
    def slots(self) -> list[Tensor]:
        """What holds the tokens of a chunk that has begun: inputs, gradients, steps, logs."""
        return [*self.inputs, *self.gradients, self.eta, *self.logs]

    @property
    def factors(self) -> tuple[Factors, ...]:
        """What waits in the slots, layer by layer."""
        return tuple(map(Factors, self.inputs, self.gradients))

    def map(self, function: Callable[..., Tensor], *others: "MemoryState") -> "MemoryState":
        """The state with `function` applied to every tensor, and to those of other states in its place."""
        return MemoryState(
            *[
                tuple(map(function, *values)) if isinstance(values[0], tuple) else function(*values)
                for values in zip(self, *others, strict=True)
            ]
        )

    def map_slots(self, function: Callable[..., Tensor], *others: "MemoryState") -> "MemoryState":
        """The state with `function` applied to what waits in the slots of a chunk that has begun."""
        slots = (state._replace(dual=(), momentum=(), count=()) for state in (self, *others))
        mapped = MemoryState.map(next(slots), function, *slots)
        return mapped._replace(dual=self.dual, momentum=self.momentum, count=self.count)

    def leaves(self) -> list[Tensor]:
        """All tensors, in the order of their names."""
        return [t for field in self for t in (field if isinstance(field, tuple) else (field,))]

    @staticmethod
    def of_leaves(tensors: Sequence[Tensor]) -> "MemoryState":
        """The inverse of `leaves`, for a state without momentum."""
        layers = (len(tensors) - 3) // 3
        layered = (tuple(tensors[i * layers : (i + 1) * layers]) for i in range(3))
        return MemoryState(*layered, *tensors[3 * layers :])

    def merged(self, dtype: torch.dtype, row_order: Tensor | None = None) -> "MemoryState":
        """Rows, in another order where one is given, and heads in one axis, `count` but by rows; in a dtype."""

        def merge(t: Tensor) -> Tensor:
            t = t if row_order is None else t.index_select(0, row_order)
            if t.dim() == 1:
                return t
            return (t if t.dtype == dtype else t.to(dtype)).flatten(0, 1)

        return self.map(merge)

    def log_momentum_until(self, taken: Tensor) -> tuple[Tensor, ...]:
        """`log_momentum` of a merged state, nothing in the slots past so many `[rows]`."""
        if not self.log_momentum:
            return ()
        (log,) = self.log_momentum
        taken = taken.repeat_interleave(log.shape[0] // len(taken)).view(-1, 1, 1)
        return (torch.where(torch.arange(log.shape[-2], device=log.device).view(1, -1, 1) < taken, log, NONE),)

    def parted(self, heads: int, row_order: Tensor | None = None) -> "MemoryState":
        """The inverse of `merged`, but for the dtype."""
        inverse = None if row_order is None else torch.argsort(row_order)

        def part(t: Tensor) -> Tensor:
            t = t.unflatten(0, (-1, heads)) if t.is_floating_point() else t
            return t if inverse is None else t.index_select(0, inverse)

        return self.map(part)


def initial_memory_state(
    rule: MirasRule, parameters: MemoryParameters, rows: int, gate_dim: int, dtype: torch.dtype | None = None
) -> MemoryState:
    """The state before the first token.

    Args:
        rows (`int`): number of sequences.
        gate_dim (`int`): last axis of the gates, `head_dim` for channel gates or 1 for head gates.
        dtype (`torch.dtype`, *optional*, defaults to float32, or float64 if the parameters are).
    """
    reference = parameters.initial[0]
    dtype = compute_dtype(reference) if dtype is None else dtype
    shapes = _shapes(rule, rows, *parameters.norm_weight.shape, gate_dim)

    def zeros(shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(shape, dtype=dtype if len(shape) > 1 else torch.int64, device=reference.device)

    fields = (tuple(map(zeros, shape)) if isinstance(shape, list) else zeros(shape) for shape in shapes.values())
    state = MemoryState(*fields)
    if rule.decay_target == "init":
        return state
    return state._replace(dual=tuple(a.to(dtype).expand(rows, -1, -1, -1).clone() for a in parameters.written(rule)))


def _shapes(rule: MirasRule, rows: int, heads: int, head_dim: int, gate_dim: int) -> dict[str, list | tuple[int, ...]]:
    """Of the tensors of a state's fields, lists of shapes for fields that are tuples."""
    weights, slots = rule.architecture.weight_shapes(head_dim), (rows, heads, rule.chunk_size)
    weights = weights[rule.architecture.fixed :]
    return {
        "dual": [(rows, heads, *shape) for shape in weights],
        "inputs": [(*slots, fan_in) for fan_in, _ in weights],
        "gradients": [(*slots, fan_out) for _, fan_out in weights],
        "eta": (*slots, gate_dim),
        "log_decay": (*slots, gate_dim),
        "count": (rows,),
        "momentum": [(rows, heads, *shape) for shape in weights if rule.algorithm.has_second_matrix],
        "log_momentum": [(*slots, 1)] if rule.algorithm.has_momentum else [],
    }


def starting_dual(rule: MirasRule, parameters: MemoryParameters, state: MemoryState) -> tuple[Tensor, ...]:
    """The state's dual, with rows that have not read anything put at the learned initial memory."""
    if rule.decay_target == "init":  # the deviation from the initial memory: a new row's is zero already
        return state.dual
    fresh = (state.count == 0).view(-1, 1, 1, 1)
    initial = parameters.written(rule)
    return tuple(torch.where(fresh, a.to(d.dtype), d) for a, d in zip(initial, state.dual, strict=True))


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_state(state: MemoryState, rule: MirasRule, heads: int, head_dim: int, rows: int, gate_dim: int) -> None:
    """Raises a `ValueError` if the state was not made by this rule for that many rows and gates."""
    for name, shapes in _shapes(rule, rows, heads, head_dim, gate_dim).items():
        value = getattr(state, name)
        got = [tuple(x.shape) for x in value] if isinstance(value, tuple) else tuple(value.shape)
        if got != shapes:
            raise ValueError(f"`initial_state.{name}` must have shape {shapes}, got {got}: another model's state?")
