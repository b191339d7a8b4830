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
"""Whether a memory stores what it reads: what its writes do, what is recalled later, what is forgotten, what grows.

Slower than `diagnostics.py`, by a read of the text for every lag and one in float64 beside a perturbed memory.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .chunk import chunk_miras
from .diagnostics import as_passed, chunks, real_rows, state_after
from .inputs import MemoryInputs, bound_inputs, check_inputs, tokens_first, without_autocast
from .layout import check_layout_arguments, is_token
from .rule import MirasRule
from .state import MemoryParameters, initial_memory_state


LAGS = (0, 8, 60, 200, 1000)
"""Tokens after which a value is asked for."""

LENGTH_BOUND = frozenset(
    {f"{name}_{lag}" for name in ("recall", "chance") for lag in LAGS} | {"lyapunov", "largest_growth"}
)
"""Numbers of `summary` that are NaN for texts that are too short for them."""

WRITES_FROM = 0.05
"""A head counts as one that writes if its writes have at least this share of its values' root mean square."""

PERTURBATION = 1e-7
"""Root mean square of the difference whose growth is followed, far above the rounding of float64."""

SMALLEST_GROWTH = -20.0
"""Log growth of one chunk below which rounding hides what is left of the difference."""


class MemoryProbe(NamedTuple):
    """Means over the real tokens of a call, for each head.

    A *write* is here what one token's write alone does, from its chunk's start, to the read at its own key; decay and
    the chunk's other writes have no part in it.

    Args:
        value_rms (`torch.Tensor` of shape `[heads]`): root mean square of the values.
        initial_rms (`torch.Tensor` of shape `[heads]`): that of what the initial memory returns for the keys.
        read_rms (`torch.Tensor` of shape `[heads]`): that of what the memory returns for the queries.
        write_rms (`torch.Tensor` of shape `[heads]`): that of the writes.
        write_cosine (`torch.Tensor` of shape `[heads]`): cosine of a write and the token's value.
        write_share (`torch.Tensor` of shape `[heads]`):
            The part of the error at its own key that a write takes away, `sum(write . error) / sum(|error|^2)` with
            `error = value - read`: the step size in units of the read. Above 2 a write leaves a larger error than it found.
        key_alignment (`torch.Tensor` of shape `[heads]`):
            How alike the keys of a chunk are: the largest eigenvalue of their Gram matrix over their number, for keys of norm
            1 the mean square of their cosine with what they have most in common. 1 where all are the same.
        recall (`torch.Tensor` of shape `[lags, heads]`):
            Cosine of a token's value and what its key gives some tokens later, less what it gave at the start; at lag
            0, right after the token. NaN for lags that no row is long enough for.
        chance (`torch.Tensor` of shape `[lags, heads]`):
            The same cosine with the value of another token of the row, half of it away: what values have in common.
        half_lives (`torch.Tensor` of shape `[heads, head_dim or 1]`):
            Tokens after which half of a write is left, of every gate at its mean rate.
        log_growth (`torch.Tensor` of shape `[chunks, heads]`):
            Logarithm of the factor by which a small difference between two memories grew in every whole chunk after
            the first while both read the same, not below -20. No chunks if a row has fewer than two whole ones.
        chunk_size (`int`): tokens of a chunk.
    """

    value_rms: Tensor
    initial_rms: Tensor
    read_rms: Tensor
    write_rms: Tensor
    write_cosine: Tensor
    write_share: Tensor
    key_alignment: Tensor
    recall: Tensor
    chance: Tensor
    half_lives: Tensor
    log_growth: Tensor
    chunk_size: int

    @property
    def lyapunov(self) -> Tensor:
        """Mean log growth a token, `[heads]`: above zero, two memories that differ by rounding part for good."""
        return self.log_growth.mean(0) / self.chunk_size

    @property
    def largest_growth(self) -> Tensor:
        """Logarithm of the factor by which a difference grew over the stretch of chunks where it grew most, `[heads]`; 0 if it
        never grew. The gradients of a training go back over the same stretch, and grow as much."""
        if len(self.log_growth) == 0:
            return torch.full_like(self.value_rms, math.nan)
        since_start = F.pad(self.log_growth.cumsum(0), (0, 0, 1, 0))
        return (since_start - since_start.cummin(0).values).amax(0)

    @property
    def chunk_share(self) -> Tensor:
        """The part of an error along what a chunk's keys have in common that all its writes take away together, `[heads]`. Where
        gradients are taken at the chunk's start and nothing is forgotten, they leave a larger error than they found from 2 on.
        Forgetting moves that bound up: whether a difference grew is what `log_growth` says."""
        return self.write_share * self.key_alignment * self.chunk_size

    @property
    def writing_heads(self) -> float:
        """Share of heads that write, see `WRITES_FROM`."""
        return (self.write_rms >= WRITES_FROM * self.value_rms).double().mean().item()


@without_autocast
@torch.no_grad()
def probe_memory(
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
    lags: Sequence[int] = LAGS,
) -> MemoryProbe:
    """Reads tokens as [`chunk_miras`] does, and asks the memory for what it has read. Arguments as there, without
    gradients, and:

    Args:
        lags (`Sequence[int]`, *optional*): tokens after which values are asked for, not negative.

    Raises:
        `ValueError`: for arguments that do not fit, negative lags, and if there is no real token.
    """
    if any(lag < 0 for lag in lags):
        raise ValueError(f"`lags` must not be negative, got {tuple(lags)}.")
    given = check_inputs(q, k, v, eta, log_alpha, delta, log_momentum, erase, rule, parameters)
    check_layout_arguments(*q.shape[:2], cu_seqlens, lengths)
    given, lengths = real_rows(given, cu_seqlens, lengths)
    x = bound_inputs(given, rule)
    live = is_token(lengths, x.q.shape[1])
    if not live.any():
        raise ValueError(f"`q` must hold at least one real token, got shape {tuple(q.shape)}.")

    def mean(values: Tensor, where: Tensor = live) -> Tensor:  # [rows, tokens, heads] to [heads]
        return torch.where(where[..., None], values, 0.0).sum((0, 1)) / where.sum()

    def rms(values: Tensor) -> Tensor:
        return mean(values.square().mean(-1)).sqrt()

    def read(queries: Tensor) -> Tensor:
        return chunk_miras(queries, *as_passed(given, rule)[1:], rule=rule, parameters=parameters, lengths=lengths)[0]

    at_start, errors, writes = _recalled_and_written(given, lengths, rule, parameters)
    # the token half a row away, for what values have in common
    token = torch.arange(live.shape[1], device=live.device)
    elsewhere = (token + (lengths // 2)[:, None]) % lengths.clamp(min=1)[:, None]
    others = x.v.gather(1, elsewhere[..., None, None].expand_as(x.v))
    recall, chance = [], []
    for lag in lags:
        pairs = live[:, lag:]
        # token s asks by the key of token s - lag; the first ones, which have none, ask for nothing that counts
        queries = torch.cat((x.k[:, :lag], x.k[:, : live.shape[1] - lag]), dim=1)[:, : live.shape[1]]
        earlier = live.shape[1] - lag
        recalled = read(queries)[:, lag:] - at_start[:, : max(earlier, 0)]
        for found, values in ((recall, x.v), (chance, others)):
            found.append(mean(F.cosine_similarity(recalled, values[:, : max(earlier, 0)], dim=-1), pairs))

    whole = -live.shape[1] % rule.chunk_size
    keys = F.pad(torch.where(live[..., None, None], x.k, 0.0).double(), (0, 0, 0, 0, 0, whole))
    keys = keys.unflatten(1, (-1, rule.chunk_size)).transpose(2, 3)  # [rows, chunks, heads, tokens, head_dim]
    together = torch.linalg.matrix_norm(keys, ord=2).square().sum((0, 1)) / live.sum()

    rate = -torch.where(live[..., None, None], x.log_alpha, 0.0).sum((0, 1)) / live.sum()
    return MemoryProbe(
        value_rms=rms(x.v),
        initial_rms=rms(at_start),
        read_rms=rms(read(x.q)),
        write_rms=rms(writes),
        write_cosine=mean(F.cosine_similarity(writes, x.v, dim=-1)),
        write_share=mean((writes * errors).sum(-1)) / mean(errors.square().sum(-1)),
        key_alignment=together,
        recall=torch.stack(recall),
        chance=torch.stack(chance),
        half_lives=math.log(2.0) / rate,
        log_growth=_log_growth(given, lengths, rule, parameters),
        chunk_size=rule.chunk_size,
    )


def summary(probe: MemoryProbe, lags: Sequence[int] = LAGS) -> dict[str, float]:
    """The probe in single numbers: means over heads, of `chunk_share` and `largest_growth` the largest, the share of heads that
    write, and quantiles of half-lives.

    Args:
        lags (`Sequence[int]`, *optional*): those that the probe was made with.
    """
    means = (
        "value_rms",
        "initial_rms",
        "read_rms",
        "write_rms",
        "write_cosine",
        "write_share",
        "key_alignment",
        "lyapunov",
    )
    numbers = {name: getattr(probe, name).mean().item() for name in means}
    # one head that overshoots is enough for gradients that grow
    numbers |= {name: getattr(probe, name).amax().item() for name in ("chunk_share", "largest_growth")}
    numbers["writing_heads"] = probe.writing_heads
    for name in ("recall", "chance"):
        of_lags = getattr(probe, name).mean(-1).tolist()
        numbers |= {f"{name}_{lag}": value for lag, value in zip(lags, of_lags, strict=True)}
    spectrum = probe.half_lives.flatten().double()
    for percent in (10, 50, 90):
        numbers[f"half_life_{percent}"] = spectrum.quantile(percent / 100).item()
    return numbers


def _recalled_and_written(
    x: MemoryInputs, lengths: Tensor, rule: MirasRule, parameters: MemoryParameters
) -> tuple[Tensor, Tensor, Tensor]:
    """What the initial memory returns for the keys, errors `v - M(k)` where gradients are taken, and each token's write,
    all `[rows, tokens, heads, head_dim]`."""
    norm, initial, found = parameters.norm(rule, lengths.shape[0], x.k.dtype), None, []
    for chunk, weights, _ in chunks(x, lengths, rule, parameters):
        initial = weights if initial is None else initial
        gates = rule.algorithm.chunk_gradient_gates(chunk.eta, *(log.cumsum(-2) for log in chunk.logs))
        factors = rule.write(weights, chunk.k, chunk.v, chunk.delta, norm, gates, erase=chunk.erase)
        asked = rule.recall_to_write(weights, chunk.k, chunk.v, chunk.delta, norm, gates, chunk.erase)
        # with and without the step size in one way: what does not come from the write is the same to the last bit
        before, after = (
            rule.read(weights, factors, chunk.k, rule.own_gates(eta), norm)
            for eta in (torch.zeros_like(chunk.eta), chunk.eta)
        )
        error = chunk.v - (before if gates is None else asked)
        found.append((rule.recall(initial, chunk.k, norm), error, after - before))
    at_start, errors, writes = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    heads = x.k.shape[2]
    return tokens_first(at_start, heads), tokens_first(errors, heads), tokens_first(writes, heads)


def _log_growth(x: MemoryInputs, lengths: Tensor, rule: MirasRule, parameters: MemoryParameters) -> Tensor:
    """Log growth, chunk by chunk, of a difference that is brought back to its size after each: in float64, `[chunks,
    heads]`."""
    size, rows, heads = rule.chunk_size, lengths.shape[0], x.k.shape[2]
    chunks = int(lengths.min()) // size
    if chunks < 2:
        return x.k.new_zeros(0, heads)
    x = x.map(lambda t: t[:, : chunks * size].double())
    parameters = MemoryParameters(
        tuple(a.double() for a in parameters.initial), parameters.norm_weight.double(), parameters.norm_bias.double()
    )
    state = initial_memory_state(rule, parameters, rows, x.eta.shape[-1], torch.float64)
    generator = torch.Generator().manual_seed(0)
    full = lengths.new_full((rows,), size)
    difference, growth = None, []
    for start in range(0, chunks * size, size):
        chunk = x.map(lambda t, start=start: t[:, start : start + size])
        if difference is None:
            state = state_after(chunk, full, state, rule, parameters)
            difference = [torch.randn(d.shape, generator=generator, dtype=d.dtype).to(d.device) for d in state.dual]
            difference = _resized(difference)[0]
            continue
        # both memories in one call, the one with the difference behind the other
        both = state.map(lambda t: torch.cat((t, t)))
        both = both._replace(
            dual=tuple(torch.cat((d, d + e)) for d, e in zip(state.dual, difference, strict=True)),
        )
        both = state_after(chunk.map(lambda t: torch.cat((t, t))), full.repeat(2), both, rule, parameters)
        state = both.map(lambda t: t[:rows])
        difference, factor = _resized([d[rows:] - d[:rows] for d in both.dual])
        growth.append(factor.log().clamp(min=SMALLEST_GROWTH).mean(0))
    return torch.stack(growth)


def _resized(difference: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Differences `[rows, heads, in, out]` of all layers, of rms `PERTURBATION` together, and what their rms was over
    it, `[rows, heads]`."""
    entries = sum(e[0, 0].numel() for e in difference)
    norm = (sum(e.square().sum((-2, -1)) for e in difference) / entries).sqrt()
    factor = norm / PERTURBATION
    scale = torch.where(factor > 0.0, factor, 1.0)[..., None, None]
    return [e / scale for e in difference], factor


__all__ = ["LAGS", "MemoryProbe", "probe_memory", "summary"]
