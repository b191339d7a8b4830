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

All factors are expectations for the weights that a model starts from. The default of `eta_max` is `1 / G`, and a step
starts at a third of it.
"""

import math
from typing import Any


SMALLEST, LARGEST = 1e-9, 1e3
"""What a config takes as `eta_max`."""

FIRST_LAYER_SCALE = 2.0
"""A new MLP memory's first layer has weights of deviation `2 / sqrt(head_dim)`."""


def moment(power: float) -> float:
    """`E |z|^power` of a standard normal z."""
    return 2.0 ** (power / 2.0) * math.gamma((power + 1.0) / 2.0) / math.sqrt(math.pi)


def loss_gain(attentional_bias: str, head_dim: int, lp_power: float, residual_clip: float) -> float:
    """`<r, e> / <e, e>` for a normal error of root mean square 1."""
    if attentional_bias == "lp":
        size = lp_power * math.sqrt(moment(2.0 * lp_power - 2.0))
        return lp_power * moment(lp_power) * min(1.0, residual_clip / size)
    # thresholds of whole tokens start between a quarter and all of sqrt(head_dim), the size of such an error
    if attentional_bias == "huber_norm":
        return min(0.625, residual_clip)
    if attentional_bias == "huber_mixture":
        return moment(1.0) * min(0.625 * math.sqrt(head_dim), residual_clip)
    return min(1.0, residual_clip)


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
    norm = std * (weights * moment(q)) ** (1.0 / q)
    if q == 3.0:
        return std / norm, 1.0 / norm
    # around q = 3 the map takes its weights from states of any size, and no step suits them
    return std, math.exp(max(-80.0, min(80.0, math.log(norm) * (q - 2.0) / (q - 3.0))))


def unit_step(config: Any) -> float:
    """`1 / G`, the step whose write, alone and at a new memory, takes a token's own error away.

    Args:
        config: with the fields of a `MirasConfig`, those of its memory resolved.
    """
    head_dim, gate, mass = config.head_dim, config.retention_gate, config.simplex_mass
    gain = loss_gain(config.attentional_bias, head_dim, float(config.lp_power), float(config.residual_clip))
    is_matrix = config.memory_architecture == "matrix"
    hidden = head_dim if is_matrix else config.memory_expansion * head_dim
    std1 = FIRST_LAYER_SCALE / math.sqrt(head_dim)
    std2 = config.initial_memory_scale / math.sqrt(hidden)
    slope1 = slope2 = 1.0
    common = 0.0  # variance of what is the same for all hidden units
    if gate in ("lq", "lq_mirror"):
        weights, q, mirror = hidden * head_dim, float(config.lq_power), gate == "lq_mirror"
        (std1, slope1), (std2, slope2) = (lq_weights(weights, std, q, mirror) for std in (std1, std2))
    elif gate == "kl":
        # weights mass / sqrt(fan_in) exp(u), u normal; the deviations of softmax are its slope times those of A
        slope1, slope2 = mass / math.sqrt(head_dim), mass / math.sqrt(hidden)
        common = slope1**2
        # the variance of one entry that has the whole mass bounds it
        std1 = slope1 * math.sqrt(math.expm1(min((FIRST_LAYER_SCALE / mass) ** 2, math.log(hidden))))
        std2 = slope2 * math.sqrt(math.expm1(min((config.initial_memory_scale / mass) ** 2, math.log(hidden))))
    if is_matrix:  # its one layer reads keys
        return 1.0 / (gain * slope2)
    # of small z, gelu(z) is z / 2 + z^2 / sqrt(2 pi), and its slope 1/2 + 2 z / sqrt(2 pi)
    own, whole = std1**2, std1**2 + common
    squares = hidden * (whole / 4.0 + 3.0 * whole**2 / (2.0 * math.pi))
    # a simplex knows deviations from its mean alone
    written = hidden * (own / 4.0 + (2.0 * common + 3.0 * own) * own / (2.0 * math.pi))
    slope_squared = 0.25 + 2.0 * whole / math.pi
    variance = squares * std2**2 + config.memory_norm_eps
    return variance / (gain * (written * slope2 + slope_squared * hidden * std2**2 * slope1))


def largest_step(config: Any) -> float:
    """The default of `eta_max`: `unit_step`, or less where a chunk's writes along one key would overshoot.

    All gradients of a chunk are taken at its start. C equal tokens that write a share u each leave `|1 - C u|` of their
    error, which grows from `C u = 2` on. Steps start at a third of the largest: of a matrix memory, `C u = 2` at
    `eta_max = 6 / C` of `unit_step`. An MLP memory's layer norm meets a variance that grows with what is written, and
    its steps in units of the read shrink; chunks of up to 64 tokens need no less.
    """
    tokens = 6.0 if config.memory_architecture == "matrix" else 64.0
    step = unit_step(config) * min(1.0, tokens / config.chunk_size)
    return max(SMALLEST, min(LARGEST, step))
