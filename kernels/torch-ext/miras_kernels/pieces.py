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
"""The pieces that all kernels share: products, gelu, layer norm, residuals of the attentional biases, gates, links.

Everything works on tiles in float32. `C` is the chunk size, `D` the head width, `BD` the next power of two (channels
beyond `D` hold zeros), `N` the hidden units, `TN` those of one tile. Equations are those of arXiv 2504.13173; the
derivations are in README.md.
"""

import torch
import triton
import triton.language as tl


# choices, as the kernels see them
L2 = tl.constexpr(0)
LP = tl.constexpr(1)
HUBER_COORDINATE = tl.constexpr(2)
HUBER_NORM = tl.constexpr(3)
HUBER_MIXTURE = tl.constexpr(4)

DECAY = tl.constexpr(0)
LQ = tl.constexpr(1)
LQ_MIRROR = tl.constexpr(2)
KL = tl.constexpr(3)

GELU_B = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
GELU_A = tl.constexpr(0.023784938757533416)  # 0.044715 / 3 of it
# an instruction of NVIDIA's since Turing
HAS_TANH = tl.constexpr(torch.version.hip is None)
KEY_CAP = tl.constexpr(1e3)
VALUE_CAP = tl.constexpr(1e15)
LARGEST_STATE_ADJOINT = tl.constexpr(1e12)
# Where a tile has fewer numbers than a program has threads, several hold the same one. One of them could read what another
# has already written back: a tile is read, changed and written without a barrier in between.
SHARED_NUMBERS = tl.constexpr(
    "A program has more threads than one of its tiles has numbers, and tiles are read and written back without a barrier: "
    "launch it with fewer warps or wider tiles."
)


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    # bfloat16 keeps float32's range, which float16 would not
    if PRECISION == "bf16":
        return x.to(tl.bfloat16)
    elif PRECISION == "bf16_rounded":
        return x.to(tl.bfloat16).to(tl.float32)
    else:
        return x


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    if PRECISION == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    elif PRECISION == "bf16_rounded":
        # the same for Triton's interpreter, whose dot takes bfloat16 for integers
        return tl.dot(a.to(tl.bfloat16).to(tl.float32), b.to(tl.bfloat16).to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision=PRECISION)


# `tl.maximum` and `tl.minimum` would take the number where the other is none, and a broken memory would look healthy
@triton.jit
def at_least(x, bound):
    return tl.maximum(x, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def at_most(x, bound):
    return tl.minimum(x, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def bounded(x, cap):
    return at_most(at_least(x, -cap), cap)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def power(x, exponent: tl.constexpr):
    # |x|^exponent for x >= 0
    if exponent == 1.0:
        return x
    elif exponent == 2.0:
        return x * x
    elif exponent == 4.0:
        return x * x * x * x
    else:
        return tl.where(x == 0.0, 0.0, tl.exp(exponent * tl.log(at_least(x, 1e-30))))


@triton.jit
def gelu_gate(z, PRECISION: tl.constexpr):
    # the tanh form of gelu is z s, s = (1 + tanh(z (b + 3 a z^2) / 2)) / 2. One instruction is right to 2^-11, which
    # rounding a product's operands to bfloat16 is not; an exponential and a division take ten. A pure instruction, and what
    # comes before it, would be done again by every warp whose product it is an operand of, instead of handed over: eight
    # times in a tile of 32 rows
    if PRECISION == "bf16" and HAS_TANH:
        half = z * (0.5 * GELU_B + 1.5 * GELU_A * z * z)
        t = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=r,r", [half], dtype=tl.float32, is_pure=False, pack=1
        )
        return 0.5 + 0.5 * t
    else:
        return sigmoid(z * (GELU_B + 3.0 * GELU_A * z * z))


@triton.jit
def gelu(z, PRECISION: tl.constexpr):
    return z * gelu_gate(z, PRECISION)


@triton.jit
def gelu_and_slope(z, PRECISION: tl.constexpr):
    # the slope of z s is s (1 + z (1 - s) (b + 9 a z^2))
    gate = gelu_gate(z, PRECISION)
    return z * gate, gate * (1.0 + z * (1.0 - gate) * (GELU_B + 9.0 * GELU_A * z * z))


@triton.jit
def normalise(z, m_d, D: tl.constexpr, NORM_EPS: tl.constexpr):
    # layer norm over the channels without its affine: [C, BD], and 1/std [C, 1]
    centred = tl.where(m_d[None, :], z - (tl.sum(z, 1) / D)[:, None], 0.0)
    inverse_std = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / D + NORM_EPS)
    return centred * inverse_std[:, None], inverse_std[:, None]


@triton.jit
def normalise_vjp(bar, normed, inverse_std, m_d, D: tl.constexpr):
    mean = (tl.sum(bar, 1) / D)[:, None]
    along = (tl.sum(bar * normed, 1) / D)[:, None]
    return tl.where(m_d[None, :], inverse_std * (bar - mean - normed * along), 0.0)


@triton.jit
def shortened(x, limit):
    # x min(1, limit / ||x||), `limit` [C, 1] or a number
    norm = tl.sqrt(tl.sum(x * x, 1) + 1e-24)[:, None]
    return x * at_most(limit / norm, 1.0)


@triton.jit
def sign(x):
    # zero and NaN are their own
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, x))


@triton.jit
def loss_slope(error, b_delta, m_d, loss):
    # dloss / derror of the attentional bias
    if loss.KIND == L2:
        r = error
    elif loss.KIND == LP:
        cut = bounded(error, loss.ERROR_CAP)
        squared = cut * cut + 1e-6
        if loss.SMOOTH_SIGN:
            direction = 2.0 * sigmoid(2.0 * loss.SHARPNESS * cut) - 1.0
        else:
            direction = sign(cut)
        if loss.POWER == 3.0:
            r = loss.POWER * direction * squared
        else:
            r = loss.POWER * direction * tl.exp(0.5 * (loss.POWER - 1.0) * tl.log(squared))
        r = tl.where(m_d[None, :], r, 0.0)
    elif loss.KIND == HUBER_COORDINATE:
        r = bounded(error, b_delta)
    elif loss.KIND == HUBER_NORM:
        r = shortened(error, b_delta)
    else:
        norm = tl.sqrt(tl.sum(error * error, 1) + 1e-24)[:, None]
        r = tl.where(norm <= b_delta, error, b_delta * sign(error))
    return r


@triton.jit
def residual(error, b_delta, m_d, loss):
    # the same, its norm cut at CLIP = residual_clip sqrt(D)
    return shortened(loss_slope(error, b_delta, m_d, loss), loss.CLIP)


@triton.jit
def frozen_scale(squares, powers, size, LINK: tl.constexpr, Q: tl.constexpr, FLOOR: tl.constexpr, CAP: tl.constexpr):
    # the scalar of links phi(A) = s(A) A from sum A^2 and sum |A|^q of a weight of `size` entries; CAP 0 is no cap
    if LINK == DECAY:
        scale = squares * 0.0 + 1.0
    else:
        total = at_least(powers, power(FLOOR, Q))
        scale = tl.exp(-(Q - 2.0) / Q * tl.log(total))
    if CAP > 0.0:
        rms = at_least(tl.sqrt(squares), 1e-12) / size**0.5
        scale = at_most(scale, CAP / rms)
    return scale


@triton.jit
def gate_channels(sizes):
    # where a gate of each of a token's channels is: all in one place if it has one number for them
    o_d = tl.arange(0, sizes.BD)
    return o_d if sizes.GATE_DIM > 1 else 0 * o_d


@triton.jit
def chunk_gates(eta, log_decay, total_log_decay):
    # B_t, B_t over a reference in the middle of the chunk's decay, eta_i times that over B_i, eta_i B_C / B_i, and B_C:
    # exponents relative to the middle keep 1 / B_i finite for every log alpha that is allowed
    reference = 0.5 * total_log_decay[None, :]
    half = tl.exp(reference)
    query = tl.exp(log_decay - reference)
    key = eta * tl.exp(reference - log_decay)
    return query * half, query, key, key * half, tl.exp(total_log_decay)


# -- adjoints ---------------------------------------------------------------------------------------------------------


@triton.jit
def gelu_slope_curvature(z, PRECISION: tl.constexpr):
    gate = gelu_gate(z, PRECISION)
    rate = GELU_B + 9.0 * GELU_A * z * z
    spread = gate * (1.0 - gate)
    slope = gate + z * spread * rate
    curvature = spread * (2.0 * rate + 18.0 * GELU_A * z * z + z * rate * rate * (1.0 - 2.0 * gate))
    return z * gate, slope, curvature


@triton.jit
def shortened_vjp(x, limit, bar):
    # adjoints of x and of the limit of `shortened`
    norm = tl.sqrt(tl.sum(x * x, 1) + 1e-24)[:, None]
    factor = at_most(limit / norm, 1.0)
    along = tl.where(factor == 1.0, 0.0, tl.sum(bar * x, 1)[:, None] / norm)
    return bar * factor - x * (along * factor / norm), along


@triton.jit
def residual_vjp(error, b_delta, bar, m_d, loss):
    # from the adjoint of `residual` to those of the error and of delta, [C, BD] each, a head's delta in every channel
    bar, _ = shortened_vjp(loss_slope(error, b_delta, m_d, loss), loss.CLIP, bar)
    if loss.KIND == L2:
        return bar, bar
    elif loss.KIND == LP:
        cut = bounded(error, loss.ERROR_CAP)
        squared = cut * cut + 1e-6
        if loss.SMOOTH_SIGN:
            direction = 2.0 * sigmoid(2.0 * loss.SHARPNESS * cut) - 1.0
        else:
            direction = sign(cut)
        signed = loss.POWER * direction
        if loss.POWER != 3.0:
            signed = signed * tl.exp(0.5 * (loss.POWER - 3.0) * tl.log(squared))
        slope = signed * cut * (loss.POWER - 1.0)
        if loss.SMOOTH_SIGN:
            bent = loss.POWER * loss.SHARPNESS * (1.0 - direction * direction)
            slope += bent * tl.exp(0.5 * (loss.POWER - 1.0) * tl.log(squared))
        bar = tl.where((tl.abs(error) > loss.ERROR_CAP) | ~m_d[None, :], 0.0, bar * slope)
        return bar, bar
    elif loss.KIND == HUBER_COORDINATE:
        inside = tl.where(tl.abs(error) > b_delta, 0.0, bar)
        return inside, (bar - inside) * sign(error)
    elif loss.KIND == HUBER_NORM:
        bar, of_delta = shortened_vjp(error, b_delta, bar)
        return bar, of_delta + 0.0 * bar
    else:
        norm = tl.sqrt(tl.sum(error * error, 1) + 1e-24)[:, None]
        of_delta = tl.sum(bar * sign(error), 1)[:, None]
        return tl.where(norm > b_delta, 0.0, bar), tl.where(norm <= b_delta, 0.0, of_delta + 0.0 * bar)


@triton.jit
def frozen_scale_rates(
    squares, powers, size, scale_bar, LINK: tl.constexpr, Q: tl.constexpr, FLOOR: tl.constexpr, CAP: tl.constexpr
):
    # the dual's adjoint through `frozen_scale` is (first + second |A|^(q-2)) A
    first, second = scale_bar * 0.0, scale_bar * 0.0
    capped = scale_bar * 0.0 + 3.0e38
    if CAP > 0.0:
        capped = (scale_bar * 0.0 + CAP * size**0.5) / at_least(tl.sqrt(squares), 1e-12)
    if LINK == DECAY:
        free = scale_bar * 0.0 + 1.0
    else:
        total = at_least(powers, power(FLOOR, Q))
        free = tl.exp(-(Q - 2.0) / Q * tl.log(total))
        moves = (powers > power(FLOOR, Q)) & (free <= capped)
        second = tl.where(moves, scale_bar * free / total, 0.0) * (2.0 - Q)
    if CAP > 0.0:
        first = tl.where(capped < free, scale_bar * capped * capped * capped, 0.0) * (-1.0 / (CAP * CAP * size))
    return first, second


@triton.jit
def inverse_of_mean(mean):
    # the slope's columns over their mean, times this before anything else: with the scalar s, which is as large as the
    # floor under its norm is small, it would not be finite where a weight has decayed to zero
    return 1.0 / at_least(mean, 1e-30)


@triton.jit
def slope_bars(gain_bar, gain, mean, Q: tl.constexpr):
    # adjoints of the scalar s and of the slope's mean, from that of the gain (q - 1) s of columns over their mean
    mean_bar = tl.where(mean <= 1e-30, 0.0, -gain_bar * inverse_of_mean(mean) * gain)
    return gain_bar * (Q - 1.0), mean_bar


@triton.jit
def mirror_vjp(dual, weight_bar, slope_bar, scale, first, second, Q: tl.constexpr):
    # the dual's adjoint from those of s A |A|^(q-2) and of the slope |A|^(q-2); the rates are those of the scalar, the
    # first on what it scales
    magnitude = tl.abs(dual)
    powered = power(magnitude, Q - 2.0)
    along = (Q - 1.0) * (scale * weight_bar + first * dual * powered) + second * dual
    return powered * along + (Q - 2.0) * sign(dual) * power(magnitude, Q - 3.0) * slope_bar
