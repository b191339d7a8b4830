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
"""

import torch
from torch import Tensor

from .architecture import Factors
from .learning import Gates
from .rule import (
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
    x = bound_inputs(check_inputs(q, k, v, eta, log_alpha, delta, rule, parameters), rule)
    rows, tokens, heads, head_dim = q.shape
    if tokens != 1:
        raise ValueError(f"`q` must hold one token per row, got {tokens}; longer calls go through `chunk_miras`.")
    if mask is not None and (mask.shape != (rows, 1) or mask.dtype != torch.bool):
        raise ValueError(f"`mask` must be a bool tensor of shape {(rows, 1)}, got {mask.dtype} {tuple(mask.shape)}.")
    gate_dim = x.eta.shape[-1]
    if initial_state is None:
        state = initial_memory_state(rule, parameters, rows, gate_dim, x.q.dtype)
    else:
        check_state(initial_state, rule, heads, head_dim, rows, gate_dim)
        state = initial_state
    architecture, algorithm, axes = rule.architecture, rule.algorithm, rule.architecture.gate_axes

    def merged(t: Tensor) -> Tensor:  # [rows, heads, ...] to [rows * heads, ...]
        return t.to(x.q.dtype).flatten(0, 1)

    def per_row(p: Tensor) -> Tensor:  # [heads, ...] to [rows * heads, ...]
        return p.to(x.q.dtype).expand(rows, *p.shape).reshape(rows * heads, *p.shape[1:])

    dual = tuple(merged(d) for d in starting_dual(rule, parameters, state))
    base = [per_row(a) if rule.decay_target == "init" else None for a in parameters.initial]
    norm = tuple(per_row(p).unsqueeze(1) for p in (parameters.norm_weight, parameters.norm_bias))
    q1, k1, v1, eta1, log_alpha1, delta1 = x.map(lambda t: t.transpose(1, 2).flatten(0, 1))

    weights = [rule.retention.at_chunk_start(d, b, rule.hidden_axis(i)) for i, (d, b) in enumerate(zip(dual, base))]
    new = architecture.write(
        tuple(w.weight for w in weights), k1, lambda m: rule.attentional_bias.residual(m - v1, delta1), *norm
    )

    # the token takes the next slot of its row's chunk
    phase = state.count % rule.chunk_size
    slots = torch.arange(rule.chunk_size, device=phase.device)
    here = slots.view(1, -1) == phase.view(-1, 1)
    if mask is not None:
        here = here & mask
    here = here.repeat_interleave(heads, dim=0).unsqueeze(-1)  # [rows * heads, chunk_size, 1]
    factors = tuple(
        Factors(torch.where(here, f.inputs, merged(i)), torch.where(here, f.gradients, merged(g)))
        for f, i, g in zip(new, state.inputs, state.gradients, strict=True)
    )
    before = merged(state.log_decay)
    last = (slots.view(1, -1) == phase.view(-1, 1) - 1).repeat_interleave(heads, dim=0).unsqueeze(-1)
    now = torch.where(last, before, 0.0).sum(-2, keepdim=True) + log_alpha1
    log_decay = torch.where(here, now, before)
    eta_slots = torch.where(here, eta1, merged(state.eta))

    gates: Gates = algorithm.step_gates(eta_slots, log_decay, now)
    y = architecture.read(
        lambda layer, h: algorithm.read(axes[layer], weights[layer], factors[layer], h, gates), q1, *norm
    )
    if mask is not None:
        y = torch.where(mask.repeat_interleave(heads, dim=0).unsqueeze(-1), y, 0.0)
    y = y.unflatten(0, (rows, heads)).transpose(1, 2).to(q.dtype)
    if not output_final_state:
        return y, None

    count = state.count + (1 if mask is None else mask[:, 0].long())
    ended = count % rule.chunk_size == 0
    if mask is not None:
        ended = ended & mask[:, 0]
    # the fold costs a pass over the whole state; a traced graph takes it always, since it cannot branch on the phase
    if torch.compiler.is_compiling() or bool(ended.any()):
        ended = ended.repeat_interleave(heads).view(-1, 1, 1)
        whole = algorithm.chunk_gates(eta_slots, log_decay)
        folded = [algorithm.fold(axes[i], d, f, whole) for i, (d, f) in enumerate(zip(dual, factors, strict=True))]
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
