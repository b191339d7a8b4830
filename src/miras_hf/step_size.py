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
"""Steps in units of what they do: the step with which one token's write takes its own error away.

A token whose key k has norm 1, and whose error e at a new memory has a root mean square of 1, as values of that size bring
along, writes `-eta g` into the dual state. For the last of an MLP memory's layers the gradient is `g = h^T r / s`, with h
the hidden units, r the residual that the attentional bias makes of e, and `s^2` the variance that the layer norm meets,
and its epsilon; for the first one, in the same approximation, `g = k^T ((r / s) W2^T * gelu'(z))`. The retention gate's
link takes both into the weights, with a slope each, and the read at the token's own key moves by `eta G e`,

    G = (|h|^2 slope_2 + E[gelu'^2] |W2|^2 slope_1) gain / s^2,     gain = <r, e> / <e, e>.

All factors are expectations for the weights that a model starts from. Of a memory of another form (`is_derived`) G is
measured instead, on weights, keys and errors that are drawn. The default of `eta_max` is `1 / G`, and a step starts at a
third of it.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .memory import (
    KL,
    L2,
    Decay,
    Dot,
    ElasticNetDecay,
    GatedMLPMemory,
    HuberCoordinate,
    HuberMixture,
    HuberNorm,
    Lp,
    Lq,
    LqMirror,
    MatrixMemory,
    MirasRule,
    MLPMemory,
    NoRetention,
    VectorMemory,
)
from .memory.architecture import MemoryArchitecture
from .memory.attentional_bias import AttentionalBias
from .memory.registry import choice_of
from .memory.retention import Elementwise, RetentionGate


SMALLEST, LARGEST = 1e-9, 1e3
"""What a config takes as `eta_max`."""

MOST_DRAWN = 2**24
"""Largest number of weights that are drawn to find out what a link makes of them."""

SMALL_HIDDEN_SCALE = 2.0
"""Largest `initial_hidden_scale` at which what hidden units meet is small enough for the closed form of G."""


def moment(power: float) -> float:
    """`E |z|^power` of a standard normal z."""
    return 2.0 ** (power / 2.0) * math.gamma((power + 1.0) / 2.0) / math.sqrt(math.pi)


def loss_gain(bias: AttentionalBias, head_dim: int) -> float:
    """`<r, e> / <e, e>` for a normal error of root mean square 1."""
    clip = math.inf if bias.residual_clip is None else bias.residual_clip
    threshold = 0.0 if bias.delta_granularity is None else sum(bias.initial_delta(head_dim)) / 2.0
    if type(bias) is Lp:
        size = bias.power * math.sqrt(moment(2.0 * bias.power - 2.0))
        return bias.power * moment(bias.power) * min(1.0, clip / size)
    if type(bias) is HuberNorm:
        return min(threshold / math.sqrt(head_dim), clip)
    if type(bias) is HuberMixture:
        return moment(1.0) * min(threshold, clip)
    if type(bias) in (L2, Dot, HuberCoordinate):
        return min(1.0, clip)
    # of a loss that nobody has derived it for, by what it makes of some errors
    generator = torch.Generator().manual_seed(0)
    error = torch.randn(256, head_dim, generator=generator, dtype=torch.float64, device="cpu")
    delta = None if bias.delta_granularity is None else torch.full_like(error[:, :1], threshold)
    with torch.no_grad():
        residual = bias.residual(error, delta)
    return float((residual * error).sum() / error.square().sum())


class Start(NamedTuple):
    """A weight that a model starts from.

    Args:
        std (`float`): deviation of its entries.
        slope (`float`): of the link, what a write is multiplied with.
        mean (`float`): of its entries.
    """

    std: float
    slope: float
    mean: float = 0.0


def start_of(gate: RetentionGate, shape: tuple[int, int], std: float, hidden_axis: int) -> Start:
    """What a gate makes of a weight `[in, out]` that was drawn with a deviation."""
    if isinstance(gate, Lq) and type(gate) in (Lq, LqMirror):
        return Start(*lq_weights(shape[0] * shape[1], std, gate.power, type(gate) is LqMirror))
    if type(gate) is KL:
        slope = gate.mass / math.sqrt(shape[0])
        # the variance of one entry that has the whole mass bounds it
        spread = math.expm1(min((std / slope) ** 2, math.log(shape[hidden_axis])))
        return Start(slope * math.sqrt(spread), slope, mean=slope if hidden_axis == -1 else 0.0)
    if type(gate) in (Decay, NoRetention, ElasticNetDecay):
        return Start(std, 1.0)
    # of a link that nobody has derived it for, by what it makes of some weights
    if isinstance(gate, Elementwise):  # of every entry by itself
        shape = (256, 256)
    elif shape[0] * shape[1] > MOST_DRAWN:
        raise _underived(f"`{type(gate).__name__}` and weights of shape {shape}")
    generator = torch.Generator().manual_seed(0)
    drawn, write = torch.randn(2, *shape, generator=generator, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        weights = gate.at_chunk_start(gate.inverse(std * drawn, hidden_axis), None, hidden_axis)
        written = gate.writes_matrix(weights, write, hidden_axis)
    if weights.scale is not None:
        written = written * weights.scale
    slope = float((written * write).sum() / write.square().sum())
    return Start(float(weights.weight.std()), slope, float(weights.weight.mean()))


def lq_weights(weights: int, std: float, q: float, mirror: bool) -> tuple[float, float]:
    """Deviation of weights under lq retention that were drawn with deviation `std`, and the slope of their link.

    Args:
        weights (`int`): how many there are.
    """
    if mirror:
        # W = sign(A) |A|^(q-1) / ||A||^(q-2): the slope (q-1) |A|^(q-2) / ||A||^(q-2) knows no scale of A
        p = q - 1.0
        norm = (weights * moment(q / p)) ** (1.0 / q)
        return std, p * moment((q - 2.0) / p) / norm ** (q - 2.0)
    # W = A / ||A||^(q-2), so ||W|| = ||A||^(3-q); at q = 3 A keeps no scale and is what was drawn
    norm = max(std * (weights * moment(q)) ** (1.0 / q), 1e-300)
    if q == 3.0:
        return std / norm, 1.0 / norm
    # around q = 3 the map takes its weights from states of any size, and no step suits them
    return std, math.exp(max(-80.0, min(80.0, math.log(norm) * (q - 2.0) / (q - 3.0))))


def is_derived(memory: MemoryArchitecture, hidden_scale: float) -> bool:
    """Whether G is known in closed form: of a matrix, a vector, and an MLP memory that writes two layers under a layer norm,
    and whose hidden units meet little at the start."""
    if type(memory) is MLPMemory:
        written = memory.depth == 2 and memory.update_layers == "all"
        return written and memory.norm and hidden_scale <= SMALL_HIDDEN_SCALE
    return type(memory) in (MatrixMemory, VectorMemory)


def start_deviations(memory: MemoryArchitecture, head_dim: int, hidden_scale: float, last_scale: float) -> list[float]:
    """Deviations of the weights that a model starts from, layer by layer."""
    shapes = memory.weight_shapes(head_dim)
    scales = [hidden_scale] * (len(shapes) - 1) + [last_scale]
    return [scale / math.sqrt(fan_in) for (fan_in, _), scale in zip(shapes, scales, strict=True)]


@functools.lru_cache(maxsize=256)
def measured_gain(
    memory: MemoryArchitecture,
    bias: AttentionalBias,
    gate: RetentionGate,
    head_dim: int,
    hidden_scale: float,
    last_scale: float,
) -> float:
    """G as it is met by 32 keys and values, each alone, at the new memories of 8 heads."""
    rule = MirasRule(memory, bias, gate)
    shapes, generator = memory.weight_shapes(head_dim), torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    with torch.no_grad():
        deviations = start_deviations(memory, head_dim, hidden_scale, last_scale)
        states = [
            gate.inverse(std * normal(8, *shape), rule.hidden_axis(layer))
            for layer, (shape, std) in enumerate(zip(shapes, deviations, strict=True))
        ]
        fixed = [gate.link(state, rule.hidden_axis(i)) for i, state in enumerate(states[: memory.fixed])]
        states = states[memory.fixed :]
        weights = rule.weights(states, [None] * len(states))
        k, v = F.normalize(normal(8, 32, head_dim), dim=-1), normal(8, 32, head_dim)
        delta = None
        if bias.delta_granularity is not None:
            delta = torch.full_like(v[..., :1], sum(bias.initial_delta(head_dim)) / 2.0)
        norm = [torch.ones_like(v[:, :1]), torch.zeros_like(v[:, :1]), *fixed]
        factors = rule.write(weights, k, v, delta, norm)
        small = 1e-6
        before, after = (
            rule.read(weights, factors, k, rule.own_gates(torch.full_like(v[..., :1], eta)), norm)
            for eta in (0.0, small)
        )
        error = v - before
        return float(((after - before) * error).sum() / error.square().sum()) / small


def unit_step(config: Any) -> float:
    """`1 / G`, the step whose write, alone and at a new memory, takes a token's own error away.

    Args:
        config: with the fields of a `MirasConfig`, those of its memory resolved.

    Raises:
        `ValueError`: where it neither has been derived nor can be measured.
    """
    memory, gate = choice_of(config, "memory_architecture"), choice_of(config, "retention")
    if type(memory) not in (MLPMemory, GatedMLPMemory, MatrixMemory, VectorMemory):
        raise _underived(f"`memory_architecture={config.memory_architecture!r}`")
    gain = loss_gain(choice_of(config, "attentional_bias"), config.head_dim)
    if not gain > 0.0:
        raise _underived(f"`attentional_bias={config.attentional_bias!r}`, which writes nothing at a new memory")
    shapes = memory.weight_shapes(config.head_dim)
    scales = config.initial_hidden_scale, config.initial_memory_scale
    if not is_derived(memory, config.initial_hidden_scale):
        if 8 * sum(fan_in * fan_out for fan_in, fan_out in shapes) > MOST_DRAWN:
            choice = f"memory_architecture={config.memory_architecture!r}"
            if is_derived(memory, SMALL_HIDDEN_SCALE):
                choice = f"initial_hidden_scale={config.initial_hidden_scale:g}"
            raise _underived(f"`{choice}` and weights of shapes {shapes}")
        bias = choice_of(config, "attentional_bias")
        measured = measured_gain(memory, bias, gate, config.head_dim, *scales)
        if not 0.0 < measured < math.inf:
            raise _underived(f"`retention={config.retention!r}`, which lets nothing into a new memory")
        return 1.0 / measured
    deviations = start_deviations(memory, config.head_dim, *scales)
    starts = [
        start_of(gate, shape, std, -1 if axis == "input" else -2)
        for shape, std, axis in zip(shapes, deviations, memory.gate_axes, strict=True)
    ]
    if not all(start.slope > 0.0 for start in starts):
        raise _underived(f"`retention={config.retention!r}`, which lets nothing into a new memory")
    if type(memory) is MatrixMemory:  # its one layer reads keys
        return 1.0 / (gain * starts[0].slope)
    if type(memory) is VectorMemory:  # a channel's share is the square of the key's entry, which is 1 / d in the mean
        return config.head_dim / (gain * starts[0].slope)
    (first, last), hidden = starts, shapes[0][1]
    # of small z, gelu(z) is z / 2 + z^2 / sqrt(2 pi), and its slope 1/2 + 2 z / sqrt(2 pi); what weights have in common
    # is the same for all hidden units
    own, common = first.std**2, first.mean**2
    whole = own + common
    squares = hidden * (whole / 4.0 + 3.0 * whole**2 / (2.0 * math.pi))
    # a simplex knows deviations from its mean alone
    written = hidden * (own / 4.0 + (2.0 * common + 3.0 * own) * own / (2.0 * math.pi))
    slope_squared = 0.25 + 2.0 * whole / math.pi
    variance = squares * last.std**2 + memory.norm_eps
    return variance / (gain * (written * last.slope + slope_squared * hidden * last.std**2 * first.slope))


def _underived(choice: str) -> ValueError:
    return ValueError(f"`eta_max` must be given with {choice}, got None.")


def largest_step(config: Any) -> float:
    """The default of `eta_max`: `unit_step` over what the learning algorithm makes of a step in the end, or less where a
    chunk's writes along one key would overshoot.

    All gradients of a chunk are taken at its start. C equal tokens that write a share u each leave `|1 - C u|` of their
    error, which grows from `C u = 2` on. Steps start at a third of the largest: of a matrix memory, `C u = 2` at
    `eta_max = 6 / C` of `unit_step`. An MLP memory's layer norm meets a variance that grows with what is written, and its
    steps in units of the read shrink: a new one needs no less for chunks of up to 32 tokens. But with those its chunks take 1.6
    to 1.8 of an error along what their keys have in common, `C a u` with a the share of the first eigenvalue of their Gram matrix
    (`chunk_share` of [`~miras_hf.memory.probe.MemoryProbe`]), and trained ones up to 2.3; in texts of 2,048 tokens gradients met
    norms of 240. With half of those steps
    they stay below 10, and models are as good (`docs/does_it_learn.md`); so no less for chunks of up to 16. What a retention
    gate bears of that it says itself (`full_step_tokens`). With a simplex, whose writes do more to a weight the larger it has become, Memora
    met norms of 8,764 with 16, and with 8 differences of rounding alone grew to 0.027 nats in a training of 1,000 steps; with 4
    they stay at 0.009. A vector memory's channels differ in their shares, as the squares z^2 of normal numbers do, and the mean
    of `(1 - C u z^2)^2`, of which E z^4 = 3 makes `1 - 2 C u + 3 (C u)^2`, grows from `C u = 2/3` on. With the delta rule,
    and where a regression is solved, nothing overshoots.
    """
    algorithm = choice_of(config, "learning_algorithm")
    memory = choice_of(config, "memory_architecture")
    of_norm = choice_of(config, "retention").full_step_tokens
    tokens = of_norm if memory.has_norm else 2.0 if type(memory) is VectorMemory else 6.0
    overshoots = algorithm.gradient_at == "chunk" and not algorithm.has_covariance
    share = 1.0 if not overshoots else min(1.0, tokens / config.chunk_size)
    step = unit_step(config) / algorithm.moves * share
    return max(SMALLEST, min(LARGEST, step))
