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
"""The decode step: one token for every row, each row at its own phase of its chunk.

Weights are read-only inside a chunk: the token's write joins the chunk's rank-one factors, which are folded into the
dual state when the row's chunk ends. Equal to the chunk-parallel form to rounding.

`step_miras` returns a new state. `step_miras_` writes the token into the state it is given, which is what a generation
cache wants; without gradients.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .architecture import Factors
from .learning import Gates
from .retention import ChunkWeights
from .rule import (
    MemoryInputs,
    MemoryParameters,
    MemoryState,
    MirasRule,
    bound_inputs,
    check_inputs,
    check_state,
    initial_memory_state,
    starting_dual,
    without_autocast,
)
from .vjp import by_formulas, in_transform


@without_autocast
def step_miras(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    log_alpha: Tensor,
    delta: Tensor | None = None,
    *,
    rule: MirasRule,
    parameters: MemoryParameters,
    initial_state: MemoryState | None = None,
    output_final_state: bool = True,
    mask: Tensor | None = None,
) -> tuple[Tensor, MemoryState | None]:
    """Reads one token per row. Arguments as in [`chunk_miras`], with `tokens == 1`.

    Args:
        mask (`torch.Tensor` of shape `[batch, 1]`, bool, *optional*):
            False for rows that have no token in this call: their state stays, their output is zero.

    Returns:
        `y` of shape `[batch, 1, heads, head_dim]`, and the new `MemoryState`.
    """
    x = check_inputs(q, k, v, eta, log_alpha, delta, rule, parameters)
    rows, _, heads, head_dim = q.shape
    _check_step(q, mask)
    gate_dim = x.eta.shape[-1]
    if initial_state is None:
        state = initial_memory_state(rule, parameters, rows, gate_dim, x.q.dtype)
    else:
        check_state(initial_state, rule, heads, head_dim, rows, gate_dim)
        state = initial_state
    call = _Step.build(rule, parameters, x)

    # the token takes the next slot of its row's chunk
    phase = state.count % rule.chunk_size
    slots = torch.arange(rule.chunk_size, device=phase.device)
    here = slots.view(1, -1) == phase.view(-1, 1)
    if mask is not None:
        here = here & mask
    here = here.repeat_interleave(heads, dim=0).unsqueeze(-1)  # [rows * heads, chunk_size, 1]
    dual = tuple(call.merged(d) for d in starting_dual(rule, parameters, state))
    weights = call.weights(dual)
    factors = tuple(
        Factors(torch.where(here, f.inputs, call.merged(i)), torch.where(here, f.gradients, call.merged(g)))
        for f, i, g in zip(call.write(weights), state.inputs, state.gradients, strict=True)
    )
    before = call.merged(state.log_decay)
    last = (slots.view(1, -1) == phase.view(-1, 1) - 1).repeat_interleave(heads, dim=0).unsqueeze(-1)
    now = torch.where(last, before, 0.0).sum(-2, keepdim=True) + call.x.log_alpha
    log_decay = torch.where(here, now, before)
    eta_slots = torch.where(here, call.x.eta, call.merged(state.eta))
    y = call.read(weights, factors, eta_slots, log_decay, now, mask).to(q.dtype)
    if not output_final_state:
        return y, None

    count = state.count + (1 if mask is None else mask[:, 0].long())
    ended = count % rule.chunk_size == 0
    if mask is not None:
        ended = ended & mask[:, 0]
    # the fold costs a pass over the whole state; a traced graph takes it always, since it cannot branch on the phase
    if by_formulas() or bool(ended.any()):
        ended = ended.repeat_interleave(heads).view(-1, 1, 1)
        folded = call.fold(dual, factors, eta_slots, log_decay)
        dual = tuple(torch.where(ended, new_d, d) for new_d, d in zip(folded, dual, strict=True))
        factors = tuple(Factors(*(torch.where(ended, 0.0, t) for t in f)) for f in factors)
        eta_slots, log_decay = (torch.where(ended, 0.0, t) for t in (eta_slots, log_decay))

    def rows_first(t: Tensor) -> Tensor:
        return t.unflatten(0, (rows, heads))

    return y, MemoryState(
        dual=tuple(rows_first(d) for d in dual),
        inputs=tuple(rows_first(f.inputs) for f in factors),
        gradients=tuple(rows_first(f.gradients) for f in factors),
        eta=rows_first(eta_slots),
        log_decay=rows_first(log_decay),
        count=count,
    )


@without_autocast
@torch.no_grad()
def step_miras_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    log_alpha: Tensor,
    delta: Tensor | None = None,
    *,
    rule: MirasRule,
    parameters: MemoryParameters,
    state: MemoryState,
    weights: list[ChunkWeights] | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, list[ChunkWeights] | None]:
    """`step_miras` in place: the tensors of `state` are the new state afterwards.

    Args:
        state (`MemoryState`): contiguous, in the dtype of computation, as `chunk_miras` and `step_miras` return it.
        weights (`list` of `ChunkWeights`, *optional*):
            What the last call for this state returned; `None` if anything else has changed the state since.

    Returns:
        `y`, and the weights for the next call, which spare it a pass over the whole state. In a traced graph `None`.

    Raises:
        `RuntimeError`: inside a transform of `torch.func` and under forward-mode differentiation.
    """
    if in_transform() and not torch.jit.is_tracing():
        raise RuntimeError(
            "`step_miras_` writes into its `state` and cannot be transformed by `torch.func` or differentiated in forward "
            "mode; `step_miras` can."
        )
    x = check_inputs(q, k, v, eta, log_alpha, delta, rule, parameters)
    rows, _, heads, head_dim = q.shape
    _check_step(q, mask)
    check_state(state, rule, heads, head_dim, rows, x.eta.shape[-1])
    tensors = [*state.dual, *state.inputs, *state.gradients, state.eta, state.log_decay]
    if any(t.dtype != x.q.dtype or not t.is_contiguous() for t in tensors):
        raise ValueError(f"`state` must be contiguous and in {x.q.dtype} to be updated in place.")
    call = _Step.build(rule, parameters, x)
    compiling = by_formulas()
    if weights is None:
        if rule.decay_target != "init":  # rows that have not read anything
            for d, new in zip(state.dual, starting_dual(rule, parameters, state), strict=True):
                d.copy_(new)
        weights = call.weights(tuple(d.flatten(0, 1) for d in state.dual))

    phase = state.count % rule.chunk_size
    row = torch.arange(rows, device=phase.device)
    since = torch.where((phase > 0).view(-1, 1, 1), state.log_decay[row, :, phase - 1], 0.0)
    now = since.flatten(0, 1).unsqueeze(1) + call.x.log_alpha
    written = [t for f in call.write(weights) for t in f] + [call.x.eta, now]
    slots = [t for pair in zip(state.inputs, state.gradients, strict=True) for t in pair]
    for slot, token in zip([*slots, state.eta, state.log_decay], written, strict=True):
        token = token.view(rows, heads, -1)
        slot[row, :, phase] = token if mask is None else torch.where(mask.unsqueeze(-1), token, slot[row, :, phase])
    factors = tuple(
        Factors(i.flatten(0, 1), g.flatten(0, 1)) for i, g in zip(state.inputs, state.gradients, strict=True)
    )
    eta_slots, log_decay = state.eta.flatten(0, 1), state.log_decay.flatten(0, 1)
    y = call.read(weights, factors, eta_slots, log_decay, now, mask).to(q.dtype)

    state.count.add_(1 if mask is None else mask[:, 0].long())
    ended = state.count % rule.chunk_size == 0
    if mask is not None:
        ended = ended & mask[:, 0]
    if compiling or bool(ended.any()):
        ended = ended.view(-1, 1, 1, 1)
        folded = call.fold(tuple(d.flatten(0, 1) for d in state.dual), factors, eta_slots, log_decay)
        for d, new in zip(state.dual, folded, strict=True):
            d.copy_(torch.where(ended, new.view_as(d), d))
        for t in tensors[len(state.dual) :]:
            t.masked_fill_(ended, 0.0)
        weights = None
    return y, None if compiling else weights


def _check_step(q: Tensor, mask: Tensor | None) -> None:
    if q.shape[1] != 1:
        raise ValueError(f"`q` must hold one token per row, got {q.shape[1]}; longer calls go through `chunk_miras`.")
    if mask is not None and (mask.shape != (q.shape[0], 1) or mask.dtype != torch.bool):
        raise ValueError(
            f"`mask` must be a bool tensor of shape {(q.shape[0], 1)}, got {mask.dtype} {tuple(mask.shape)}."
        )


@dataclass(frozen=True)
class _Step:
    """The parts of a step, rows and heads merged into one axis."""

    rule: MirasRule
    x: MemoryInputs
    rows: int
    initial: tuple[Tensor, ...]
    norm: tuple[Tensor, Tensor]  # [rows * heads, 1, head_dim]

    @staticmethod
    def build(rule: MirasRule, parameters: MemoryParameters, x: MemoryInputs) -> "_Step":
        x, rows = bound_inputs(x, rule), x.q.shape[0]
        return _Step(
            rule=rule,
            x=x.map(lambda t: t.transpose(1, 2).flatten(0, 1)),
            rows=rows,
            initial=parameters.initial,
            norm=tuple(
                _per_row(p, rows, x.q.dtype).unsqueeze(1) for p in (parameters.norm_weight, parameters.norm_bias)
            ),
        )

    def merged(self, t: Tensor) -> Tensor:
        return t.to(self.x.q.dtype).flatten(0, 1)

    def weights(self, dual: tuple[Tensor, ...]) -> list[ChunkWeights]:
        rule, dtype = self.rule, self.x.q.dtype
        bases = [_per_row(a, self.rows, dtype) if rule.decay_target == "init" else None for a in self.initial]
        return [
            rule.retention.at_chunk_start(d, b, rule.hidden_axis(i))
            for i, (d, b) in enumerate(zip(dual, bases, strict=True))
        ]

    def write(self, weights: list[ChunkWeights]) -> tuple[Factors, ...]:
        v, delta, bias = self.x.v, self.x.delta, self.rule.attentional_bias
        used = tuple(w.weight for w in weights)
        return self.rule.architecture.write(used, self.x.k, lambda m: bias.residual(m - v, delta), *self.norm)

    def read(self, weights, factors, eta_slots, log_decay, now, mask: Tensor | None) -> Tensor:
        architecture, algorithm = self.rule.architecture, self.rule.algorithm
        gates: Gates = algorithm.step_gates(eta_slots, log_decay, now)
        axes = architecture.gate_axes
        y = architecture.read(
            lambda layer, h: algorithm.read(axes[layer], weights[layer], factors[layer], h, gates),
            self.x.q,
            *self.norm,
        )
        y = y.unflatten(0, (self.rows, -1)).transpose(1, 2)
        return y if mask is None else torch.where(mask[..., None, None], y, 0.0)

    def fold(self, dual, factors, eta_slots, log_decay) -> list[Tensor]:
        algorithm, axes = self.rule.algorithm, self.rule.architecture.gate_axes
        whole = algorithm.chunk_gates(eta_slots, log_decay)
        return [algorithm.fold(axes[i], d, f, whole) for i, (d, f) in enumerate(zip(dual, factors, strict=True))]


def _per_row(p: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """`[heads, ...]` to `[rows * heads, ...]`."""
    return p.to(dtype).expand(rows, *p.shape).reshape(rows * p.shape[0], *p.shape[1:])
