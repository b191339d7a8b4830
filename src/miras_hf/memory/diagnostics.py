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
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .chunk import chunk_miras
from .inputs import MemoryInputs, bound_inputs, check_inputs, tokens_first, without_autocast
from .layout import check_layout_arguments, is_token
from .retention import ChunkWeights
from .rule import MirasRule
from .state import MemoryParameters, MemoryState, initial_memory_state


class MemoryStatistics(NamedTuple):
    """Means over the real tokens of a call, for each head.

    Args:
        inner_loss (`torch.Tensor` of shape `[heads]`):
            The attentional bias of recalling a token's value by its key before the token's chunk is written, or with the
            delta rule the token: what equation (28) descends.
        inner_loss_initial (`torch.Tensor` of shape `[heads]`):
            The same at the learned initial memory. A memory that learns from the text stays below it.
        write_strength (`torch.Tensor` of shape `[heads]`): eta, the step size of a token.
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
    log_momentum: Tensor | None = None,
    erase: Tensor | None = None,
    *,
    rule: MirasRule,
    parameters: MemoryParameters,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
) -> MemoryStatistics:
    """Reads tokens as [`chunk_miras`] does, chunk by chunk, and tells what their memories did. Arguments as there.

    Returns:
        [`MemoryStatistics`]

    Raises:
        `ValueError`: for arguments that do not fit, and if there is no real token.
    """
    given = check_inputs(q, k, v, eta, log_alpha, delta, log_momentum, erase, rule, parameters)
    batch, tokens, heads, _ = q.shape
    check_layout_arguments(batch, tokens, cu_seqlens, lengths)
    given, lengths = real_rows(given, cu_seqlens, lengths)
    x = bound_inputs(given, rule)
    valid = is_token(lengths, x.q.shape[1])
    count = valid.sum()
    if count == 0:
        raise ValueError(f"`q` must hold at least one real token, got shape {tuple(q.shape)}.")

    def mean(values: Tensor) -> Tensor:  # [rows, tokens, heads, c] to [heads]
        return torch.where(valid[..., None, None], values, 0.0).mean(-1).sum((0, 1)) / count

    norm = parameters.norm(rule, valid.shape[0], x.q.dtype)
    initial, losses, initial_losses = None, [], []
    for chunk, weights, state in chunks(given, lengths, rule, parameters):
        initial = weights if initial is None else initial
        gates = rule.algorithm.chunk_gradient_gates(chunk.eta, *(log.cumsum(-2) for log in chunk.logs))
        before_write = rule.recall_to_write(weights, chunk.k, chunk.v, chunk.delta, norm, gates, chunk.erase)
        for found, prediction in ((losses, before_write), (initial_losses, rule.recall(initial, chunk.asked, norm))):
            found.append(tokens_first(rule.attentional_bias.loss_at(prediction, chunk.v, chunk.delta), heads))

    # the writes that wait in a chunk not yet full: slots not taken have no step, and the decay of the last one taken
    momentum = state.log_momentum_until(state.count % rule.chunk_size)
    gates = rule.chunk_gates(state.eta, state.log_decay.cummin(-2).values, *momentum)
    folded = rule.fold(state.matrices, state.factors, gates, chunk_ends=False)
    weights = [w.weight for w in rule.weights(folded, parameters.base(rule, valid.shape[0], x.q.dtype))]
    squares = sum(w.square().sum((-2, -1)).view(-1, heads).mean(0) for w in weights)
    # a mean over tokens, then the rate's half-life, then over channels: the order in which they mean something
    rate = -torch.where(valid[..., None, None], x.log_alpha, 0.0).sum((0, 1)) / count
    return MemoryStatistics(
        inner_loss=mean(torch.cat(losses, dim=1)),
        inner_loss_initial=mean(torch.cat(initial_losses, dim=1)),
        write_strength=mean(x.eta),
        retention=mean(x.log_alpha.exp()),
        half_life=math.log(2.0) / rate.log().mean(-1).exp(),
        memory_norm=(squares / sum(w.shape[-2] * w.shape[-1] for w in weights)).sqrt(),
    )


def real_rows(x: MemoryInputs, cu_seqlens: Tensor | None, lengths: Tensor | None) -> tuple[MemoryInputs, Tensor]:
    """One sequence a row, so that all rows share the chunk grid; and how many tokens each has."""
    batch, tokens = x.q.shape[:2]
    device = x.q.device
    if cu_seqlens is not None:
        borders = cu_seqlens.to(device=device, dtype=torch.long)
        lengths = borders.diff()
        longest = int(lengths.max())
        source = borders[:-1, None] + torch.arange(longest, device=device)
        source = torch.where(is_token(lengths, longest), source, 0)
        return x.map(lambda t: t[0, source]), lengths
    if lengths is None:
        return x, torch.full((batch,), tokens, device=device)
    # what a pad holds may be no number, which products with zeros would hand to others
    valid = is_token(lengths, tokens)[..., None, None]
    return x.map(lambda t: torch.where(valid, t, 0.0)), lengths


def chunks(
    x: MemoryInputs, lengths: Tensor, rule: MirasRule, parameters: MemoryParameters
) -> Iterator[tuple[MemoryInputs, tuple[ChunkWeights, ...], MemoryState]]:
    """Reads `real_rows` chunk by chunk: its tokens within the rule's bounds, the weights at its start and the state after it,
    all with rows and heads in one axis."""
    rows, size, dtype = lengths.shape[0], rule.chunk_size, x.q.dtype
    base = parameters.base(rule, rows, dtype)
    state = initial_memory_state(rule, parameters, rows, x.eta.shape[-1], dtype)
    for start in range(0, x.q.shape[1], size):
        chunk = x.map(lambda t, start=start: t[:, start : start + size])
        weights = rule.weights(state.merged(dtype).matrices, base)
        state = state_after(chunk, (lengths - start).clamp(0, chunk.q.shape[1]), state, rule, parameters)
        yield bound_inputs(chunk, rule).merged(), weights, state.merged(dtype)


def as_passed(x: MemoryInputs, rule: MirasRule) -> MemoryInputs:
    """Checked inputs as they may be checked again: steps that are one number a head were widened to retention."""
    return x if "channel" in rule.algorithm.step_granularities else x._replace(eta=x.eta[..., :1])


def state_after(
    x: MemoryInputs, lengths: Tensor, state: MemoryState, rule: MirasRule, parameters: MemoryParameters
) -> MemoryState:
    """The state that reading makes of another, of inputs that are checked and not bounded: some bounds are no bounds of what
    is within them."""
    after = chunk_miras(
        *as_passed(x, rule),
        rule=rule,
        parameters=parameters,
        initial_state=state,
        output_final_state=True,
        lengths=lengths,
    )[1]
    assert after is not None
    return after
