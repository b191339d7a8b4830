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
"""What a memory does while it reads a text, in a few numbers: for people who watch it train, not for training."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .architecture import Factors
from .chunk import chunk_miras
from .layout import check_layout_arguments
from .rule import (
    MemoryInputs,
    MemoryParameters,
    MemoryState,
    MirasRule,
    bound_inputs,
    check_inputs,
    initial_memory_state,
    starting_dual,
    without_autocast,
)


class MemoryStatistics(NamedTuple):
    """Means over the real tokens of a call, for each head.

    Args:
        inner_loss (`torch.Tensor` of shape `[heads]`):
            The attentional bias of recalling a token's value by its key before the token's chunk is written: what
            equation (28) descends.
        inner_loss_initial (`torch.Tensor` of shape `[heads]`):
            The same at the learned initial memory. A memory that learns from the text stays below it.
        write_strength (`torch.Tensor` of shape `[heads]`): eta, the step of a token.
        retention (`torch.Tensor` of shape `[heads]`): alpha, what is left of the memory after a token.
        half_life (`torch.Tensor` of shape `[heads]`):
            Tokens after which half of a write is left; the geometric mean over channels, of whose rates the initial
            ones span orders of magnitude.
        memory_norm (`torch.Tensor` of shape `[heads]`):
            Root mean square of the memory's weights after the last token, over the weights of all its layers.
    """

    inner_loss: Tensor
    inner_loss_initial: Tensor
    write_strength: Tensor
    retention: Tensor
    half_life: Tensor
    memory_norm: Tensor


@without_autocast
def memory_statistics(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    log_alpha: Tensor,
    delta: Tensor | None = None,
    *,
    rule: MirasRule,
    parameters: MemoryParameters,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
) -> MemoryStatistics:
    """Reads tokens as [`chunk_miras`] does, chunk by chunk, and tells what their memories did. Arguments as there.

    Returns:
        [`MemoryStatistics`]

    Raises:
        `ValueError`: for arguments that do not fit, and if there is no real token.
    """
    x = bound_inputs(check_inputs(q, k, v, eta, log_alpha, delta, rule, parameters), rule)
    batch, tokens, heads, head_dim = q.shape
    check_layout_arguments(batch, tokens, cu_seqlens, mask)
    x, live = real_rows(x, cu_seqlens, mask)
    count = live.sum()
    if count == 0:
        raise ValueError(f"`q` must hold at least one real token, got shape {tuple(q.shape)}.")

    def mean(values: Tensor) -> Tensor:  # [rows, tokens, heads, c] to [heads]
        return torch.where(live[..., None, None], values, 0.0).mean(-1).sum((0, 1)) / count

    norm = [p.to(x.q.dtype).view(1, heads, 1, head_dim) for p in (parameters.norm_weight, parameters.norm_bias)]
    state = initial_memory_state(rule, parameters, live.shape[0], x.eta.shape[-1], x.q.dtype)
    initial = linked_weights(rule, parameters, starting_dual(rule, parameters, state))
    losses: tuple[list[Tensor], list[Tensor]] = ([], [])
    for start in range(0, live.shape[1], rule.chunk_size):
        chunk = x.map(lambda t, start=start: t[:, start : start + rule.chunk_size])
        weights = linked_weights(rule, parameters, starting_dual(rule, parameters, state))
        for found, at in zip(losses, (weights, initial), strict=True):
            found.append(_inner_loss(rule, at, chunk, norm))
        _, state = chunk_miras(
            *chunk,
            rule=rule,
            parameters=parameters,
            initial_state=state,
            output_final_state=True,
            mask=live[:, start : start + rule.chunk_size],
        )

    weights = linked_weights(rule, parameters, _folded(rule, parameters, state))
    squares = sum(w.square().sum((-2, -1)).mean(0) for w in weights)
    # a mean over tokens, then the rate's half-life, then over channels: the order in which they mean something
    rate = -torch.where(live[..., None, None], x.log_alpha, 0.0).sum((0, 1)) / count
    return MemoryStatistics(
        inner_loss=mean(torch.cat(losses[0], dim=1)),
        inner_loss_initial=mean(torch.cat(losses[1], dim=1)),
        write_strength=mean(x.eta),
        retention=mean(x.log_alpha.exp()),
        half_life=math.log(2.0) / rate.log().mean(-1).exp(),
        memory_norm=(squares / sum(w.shape[-2] * w.shape[-1] for w in weights)).sqrt(),
    )


def real_rows(x: MemoryInputs, cu_seqlens: Tensor | None, mask: Tensor | None) -> tuple[MemoryInputs, Tensor]:
    """One sequence a row, real tokens first, so that all rows share the chunk grid; and which tokens are real."""
    batch, tokens = x.q.shape[:2]
    device = x.q.device
    if cu_seqlens is not None:
        lengths = cu_seqlens.diff().to(device=device, dtype=torch.long)
        column = torch.arange(int(lengths.max()), device=device)
        live = column < lengths[:, None]
        source = torch.where(live, cu_seqlens[:-1, None].to(device=device, dtype=torch.long) + column, 0)
        return x.map(lambda t: t[0, source]), live
    if mask is None:
        return x, torch.ones(batch, tokens, dtype=torch.bool, device=device)
    order = torch.argsort(~mask, dim=-1, stable=True)
    live = torch.arange(tokens, device=device) < mask.sum(-1, keepdim=True)
    return x.map(lambda t: t.gather(1, order[..., None, None].expand_as(t))), live


def linked_weights(rule: MirasRule, parameters: MemoryParameters, dual: tuple[Tensor, ...]) -> list[Tensor]:
    """The weights `[rows, heads, in, out]` under the link, where a chunk's gradients are taken."""
    weights = []
    for layer, (of_state, initial) in enumerate(zip(dual, parameters.initial, strict=True)):
        base = initial.to(of_state.dtype).expand_as(of_state) if rule.decay_target == "init" else None
        weights.append(rule.retention.at_chunk_start(of_state, base, rule.hidden_axis(layer)).weight)
    return weights


def _inner_loss(rule: MirasRule, weights: list[Tensor], x: MemoryInputs, norm: list[Tensor]) -> Tensor:
    """`[rows, tokens, heads, 1]`."""
    k, v = x.k.transpose(1, 2), x.v.transpose(1, 2)
    delta = None if x.delta is None else x.delta.transpose(1, 2)
    recalled = rule.architecture.read(lambda layer, h: h @ weights[layer], k, *norm)
    return rule.attentional_bias.loss(recalled - v, delta).transpose(1, 2)


def _folded(rule: MirasRule, parameters: MemoryParameters, state: MemoryState) -> tuple[Tensor, ...]:
    """The dual state with the writes that wait in a chunk not yet full."""
    # slots not yet taken have no step, and the decay of the last one taken
    gates = rule.algorithm.chunk_gates(state.eta.flatten(0, 1), state.log_decay.cummin(-2).values.flatten(0, 1))
    rows_and_heads = state.eta.shape[:2]
    return tuple(
        rule.algorithm.fold(axis, dual.flatten(0, 1), Factors(i.flatten(0, 1), g.flatten(0, 1)), gates).unflatten(
            0, rows_and_heads
        )
        for axis, dual, i, g in zip(
            rule.architecture.gate_axes,
            starting_dual(rule, parameters, state),
            state.inputs,
            state.gradients,
            strict=True,
        )
    )
