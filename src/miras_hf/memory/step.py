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

from collections.abc import Sequence

import torch
from torch import Tensor

from .inputs import MemoryInputs, bound_inputs, check_inputs, tokens_first, without_autocast, without_gradients
from .layout import check_layout_arguments, is_token
from .retention import ChunkWeights
from .rule import MirasRule
from .state import MemoryParameters, MemoryState, check_state, initial_memory_state, starting_dual
from .vjp import by_formulas, can_look_at, check_not_transformed


@without_autocast
def step_miras(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    log_alpha: Tensor,
    delta: Tensor | None = None,
    log_momentum: Tensor | None = None,
    erase: Tensor | None = None,
    *,
    rule: MirasRule,
    parameters: MemoryParameters,
    initial_state: MemoryState | None = None,
    output_final_state: bool = True,
    lengths: Tensor | None = None,
) -> tuple[Tensor, MemoryState | None]:
    """Reads one token per row. Arguments as in [`chunk_miras`], with `tokens == 1`.

    Args:
        lengths (`torch.Tensor` of shape `[batch]`, int32 or int64, *optional*):
            0 for rows that have no token in this call, 1 for the others: the state of the former stays, their output is
            zero.

    Returns:
        `y` of shape `[batch, 1, heads, head_dim]`, and the new `MemoryState`.
    """
    x = check_inputs(q, k, v, eta, log_alpha, delta, log_momentum, erase, rule, parameters)
    rows, _, heads, head_dim = q.shape
    mask = _check_step(q, lengths)
    gate_dim = x.eta.shape[-1]
    if initial_state is None:
        state = initial_memory_state(rule, parameters, rows, gate_dim, x.q.dtype)
    else:
        check_state(initial_state, rule, heads, head_dim, rows, gate_dim)
        state = initial_state
    x, norm = bound_inputs(x, rule).merged(), parameters.norm(rule, rows, x.q.dtype)

    # the token takes the next slot of its row's chunk
    phase = (state.count % rule.chunk_size).view(-1, 1)
    slots = torch.arange(rule.chunk_size, device=phase.device)
    here = slots == phase if mask is None else (slots == phase) & mask
    here, last = (where.repeat_interleave(heads, dim=0).unsqueeze(-1) for where in (here, slots == phase - 1))
    state = state._replace(dual=starting_dual(rule, parameters, state)).merged(x.q.dtype)
    weights = rule.weights(state.matrices, parameters.base(rule, rows, x.q.dtype))
    before = [torch.where(last, t, 0.0).sum(-2, keepdim=True) for t in state.logs]
    logs = [since + new for since, new in zip(before, x.logs, strict=True)]
    inputs, gradients = zip(*_write(rule, weights, state, x, before[0], logs[0], norm), strict=True)
    token = MemoryState((), inputs, gradients, x.eta, logs[0], state.count, (), tuple(logs[1:]))
    state = state.map_slots(lambda old, new: torch.where(here, new, old), token)
    y = _read(rule, weights, state, x.q, logs[0], norm, mask).to(q.dtype)
    if not output_final_state:
        return y, None

    state = state._replace(count=state.count + (1 if mask is None else mask[:, 0].long()))
    ended = state.count % rule.chunk_size == 0
    if mask is not None:
        ended = ended & mask[:, 0]
    # the fold costs a pass over the whole state; a traced graph takes it always, since it cannot branch on the phase
    if by_formulas() or ended.is_meta or bool(ended.any()):
        ended = ended.repeat_interleave(heads).view(-1, 1, 1)
        folded = zip(_folded(rule, state), state.matrices, strict=True)
        state = state.with_matrices([torch.where(ended, new, old) for new, old in folded])
        state = state.map_slots(lambda t: torch.where(ended, 0.0, t))
    else:
        # nobody's memory: whoever goes on in place must not write into the state that was given
        state = state.with_matrices([t.clone() for t in state.matrices])
    return y, state.parted(heads)


@without_autocast
@without_gradients
def step_miras_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    log_alpha: Tensor,
    delta: Tensor | None = None,
    log_momentum: Tensor | None = None,
    erase: Tensor | None = None,
    *,
    rule: MirasRule,
    parameters: MemoryParameters,
    state: MemoryState,
    weights: Sequence[ChunkWeights] | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Sequence[ChunkWeights] | None]:
    """`step_miras` in place: the tensors of `state` are the new state afterwards.

    Args:
        state (`MemoryState`): contiguous, in the dtype of computation, as `chunk_miras` and `step_miras` return it.
        weights (sequence of `ChunkWeights`, *optional*):
            What the last call for this state returned; `None` if anything else has changed the state since.

    Returns:
        `y`, and the weights for the next call, which spare it a pass over the whole state. In a traced graph `None`.

    Raises:
        `RuntimeError`: inside a transform of `torch.func` and under forward-mode differentiation.
    """
    check_not_transformed("step_miras_")
    x = check_inputs(q, k, v, eta, log_alpha, delta, log_momentum, erase, rule, parameters)
    rows, _, heads, head_dim = q.shape
    mask = _check_step(q, lengths)
    check_state(state, rule, heads, head_dim, rows, x.eta.shape[-1])
    dtype = x.q.dtype
    if any(t.dtype != dtype or not t.is_contiguous() for t in (*state.matrices, *state.slots)):
        raise ValueError(f"`state` must be contiguous and in {dtype} to be updated in place.")
    x, norm = bound_inputs(x, rule).merged(), parameters.norm(rule, rows, dtype)
    # views, through which what is written below is seen; what is folded once a chunk is left out
    merged = state._replace(dual=(), momentum=()).merged(dtype)
    compiling = by_formulas()
    if weights is None:
        if rule.decay_target != "init":  # rows that have not read anything
            for d, new in zip(state.dual, starting_dual(rule, parameters, state), strict=True):
                d.copy_(new)
        weights = rule.weights(state.merged(dtype).matrices, parameters.base(rule, rows, dtype))

    row, phase = _next_slot(state.count, rule.chunk_size, mask)
    before = [_since_start(log, row, phase).flatten(0, 1).unsqueeze(1) for log in state.logs]
    logs = [since + new for since, new in zip(before, x.logs, strict=True)]
    inputs, gradients = zip(*_write(rule, weights, merged, x, before[0], logs[0], norm), strict=True)

    for slots, token in zip(state.slots, (*inputs, *gradients, x.eta, *logs), strict=True):
        token = token.view(rows, heads, -1)
        slots[row, :, phase] = token if mask is None else torch.where(mask.unsqueeze(-1), token, slots[row, :, phase])
    y = _read(rule, weights, merged, x.q, logs[0], norm, mask).to(q.dtype)

    state.count.add_(1 if mask is None else mask[:, 0].long())
    if isinstance(phase, int) and phase + 1 < rule.chunk_size:
        return y, weights
    ended = state.count % rule.chunk_size == 0
    if mask is not None:
        ended = ended & mask[:, 0]
    if compiling or ended.is_meta or bool(ended.any()):
        ended = ended.view(-1, 1, 1, 1)
        for old, new in zip(state.matrices, _folded(rule, state.merged(dtype)), strict=True):
            old.copy_(torch.where(ended, new.view_as(old), old))
        for slots in state.slots:
            slots.masked_fill_(ended, 0.0)
        weights = None
    return y, None if compiling else weights


def _check_step(q: Tensor, lengths: Tensor | None) -> Tensor | None:
    """Which rows have a token, `[rows, 1]`; `None` if all have."""
    if q.shape[1] != 1:
        raise ValueError(f"`q` must hold one token per row, got {q.shape[1]}; longer calls go through `chunk_miras`.")
    check_layout_arguments(q.shape[0], 1, None, lengths)
    return None if lengths is None else is_token(lengths, 1)


def _next_slot(count: Tensor, chunk_size: int, mask: Tensor | None) -> tuple[Tensor | slice, Tensor | int]:
    """Indices of the rows and of the slot that each row's token takes: of rows that all stand at one phase, at hand and
    with a token each, a slice and a number, with which a slot is a view."""
    if mask is None and can_look_at(count):
        phases = {n % chunk_size for n in count.tolist()}
        if len(phases) == 1:
            return slice(None), phases.pop()
    return torch.arange(len(count), device=count.device), count % chunk_size


def _since_start(log: Tensor, row: Tensor | slice, phase: Tensor | int) -> Tensor:
    """What is in the slots before those of `_next_slot`, `[rows, heads, f]`; zero where a chunk begins."""
    if isinstance(phase, int):
        return log[:, :, phase - 1] if phase > 0 else torch.zeros_like(log[:, :, 0])
    return torch.where((phase > 0).view(-1, 1, 1), log[row, :, phase - 1], 0.0)


def _write(rule: MirasRule, weights, state: MemoryState, x: MemoryInputs, before: Tensor, now: Tensor, norm):
    """The gradients of tokens that have not yet taken their slots of a merged state; the log decay before and after."""
    gates = rule.algorithm.step_gradient_gates(state.eta, state.log_decay, before, now)
    return rule.write_token(weights, state.factors, x.k, x.v, x.delta, norm, gates, x.erase)


def _read(rule: MirasRule, weights, state: MemoryState, q: Tensor, log_decay: Tensor, norm, mask) -> Tensor:
    """What the tokens read that have taken their slots of a merged state, `[rows, 1, heads, head_dim]`."""
    heads = q.shape[0] // state.count.shape[0]
    momentum = state.log_momentum_until(state.count % rule.chunk_size + 1) if state.log_momentum else ()
    gates = rule.step_gates(state.eta, state.log_decay, log_decay, *momentum)
    y = tokens_first(rule.read(weights, state.factors, q, gates, norm), heads)
    return y if mask is None else torch.where(mask[..., None, None], y, 0.0)


def _folded(rule: MirasRule, state: MemoryState) -> tuple[Tensor, ...]:
    """The matrices of a merged state with what waits in its slots, as if its rows' chunks had ended."""
    # in rows whose chunks have not, slots that are not taken hold the decay of the last one that is: with none of their own
    # a strong decay would overflow there, and gradients of what nobody takes would not be numbers
    phase = state.count % rule.chunk_size
    momentum = state.log_momentum_until(torch.where(phase == 0, rule.chunk_size, phase))
    gates = rule.chunk_gates(state.eta, state.log_decay.cummin(-2).values, *momentum)
    return rule.fold(state.matrices, state.factors, gates)
