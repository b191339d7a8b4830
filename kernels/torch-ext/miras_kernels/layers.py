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
"""Tiles of a memory's weights and of its activations.

The hidden units of a tile are its rows, [TN, BD] of a weight and [TN, C] of activations. A warp has rows of its own: what
a product leaves in its registers is an operand of the next one, and no two compute the same element. `AXIS` is the hidden
axis of what is not a tile but the whole of a matrix memory.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .links import linked, sum_of_dual
from .pieces import KL, LQ, LQ_MIRROR, frozen_scale, frozen_scale_rates, mirror_vjp, power


class Tile(NamedTuple):
    """Offsets and masks of a tile: of its hidden units, h; in both weights, W1 [D, N] and W2 [N, D]; in activations of a
    chunk, [C, N] of a state and [N, C] of what a program keeps for itself."""

    o_h: Any
    m_h: Any
    o_1: Any
    o_2: Any
    m_w: Any
    o_ch: Any
    o_hc: Any
    m_hc: Any


@triton.jit
def within(offsets, SIZE: tl.constexpr, EVEN: tl.constexpr):
    # where everything is, no mask is computed
    if EVEN:
        return tl.full(offsets.shape, 1, tl.int1)
    else:
        return offsets < SIZE


@triton.jit
def tile_of(j, sizes, TN: tl.constexpr):
    o_c, o_d, o_h = tl.arange(0, sizes.C), tl.arange(0, sizes.BD), tl.arange(0, TN) + j * TN
    m_h = within(o_h, sizes.N, sizes.N % TN == 0)
    m_d = within(o_d, sizes.D, sizes.D == sizes.BD)
    return Tile(
        o_h,
        m_h,
        o_d[None, :] * sizes.N + o_h[:, None],
        o_h[:, None] * sizes.D + o_d[None, :],
        m_h[:, None] & m_d[None, :],
        o_c[None, :] * sizes.N + o_h[:, None],
        o_h[:, None] * sizes.C + o_c[None, :],
        m_h[:, None] & (o_c >= 0)[None, :],
    )


@triton.jit
def load_dual(dual, base, offsets, mask, link):
    # the decaying state, what it deviates from, and the dual state itself
    b_state = tl.load(dual + offsets, mask=mask, other=0.0)
    if link.TOWARD_INIT:
        b_base = tl.load(base + offsets, mask=mask, other=0.0).to(tl.float32)
        return b_state, b_base, b_base + b_state
    else:
        return b_state, b_state, b_state


@triton.jit
def load_first(dual, base, tile, link, sizes):
    # the same of the first weight, which is the initial one where no text writes it
    if sizes.FIXED == 0:
        return load_dual(dual, base, tile.o_1, tile.m_w, link)
    else:
        b_base = tl.load(base + tile.o_1, mask=tile.m_w, other=0.0).to(tl.float32)
        return b_base, b_base, b_base


@triton.jit
def scale_of(sums, link, sizes):
    return frozen_scale(sums[0], sums[1], 1.0 * sizes.D * sizes.N, link.KIND, link.Q, link.FLOOR, link.CAP)


@triton.jit
def add_to_sums(sums, dual, mask, link, AXIS: tl.constexpr):
    return sum_of_dual(dual, mask, sums, AXIS, link.KIND, link.Q)


@triton.jit
def weight_of(dual, mask, sums, scale, mass, uniform, link, AXIS: tl.constexpr):
    _, _, first, second = sums
    weight = linked(dual, scale, first, second, mass, uniform, AXIS, link.KIND, link.Q)
    if link.KIND == KL:  # whose image of zero is not zero
        weight = tl.where(mask, weight, 0.0)
    return weight


@triton.jit
def parts_of_read(b_state, b_base, b_weight, base_scale, link):
    # what decays of a tile's read, and what does not
    if link.KIND == LQ_MIRROR:
        if link.TOWARD_INIT:
            b_constant = base_scale * b_base * power(tl.abs(b_base), link.Q - 2.0)
            return b_weight - b_constant, b_constant
        else:
            return b_weight, b_weight
    else:
        return b_state, b_base


@triton.jit
def slope_of_hidden(dual, link, sizes, AXIS: tl.constexpr):
    # the mirror map's slope |A|^(q-2), its means over the channels of each hidden unit
    return tl.sum(power(tl.abs(dual), link.Q - 2.0), 1 - AXIS) / sizes.D


@triton.jit
def hidden_behind(x, partial_in, at, tile):
    # with the columns of slots that an earlier call has filled
    mask = tile.m_hc & at.m_e[None, :]
    return tl.where(at.m_e[None, :], tl.load(partial_in + tile.o_ch, mask=mask, other=0.0), x)


# -- adjoints ---------------------------------------------------------------------------------------------------------


@triton.jit
def back_to_dual(dual, weight_bar, sums, scale, rates, inner, slope_bar, mass, tile, link):
    # the adjoint of a tile's dual state from the weight's; of KL `inner` is the sum of W o W_bar over c
    first, second = rates
    if link.KIND == KL:
        return (weight_bar - inner[None, :]) * weight_of(dual, tile.m_w, sums, scale, mass, 0.0, link, 0)
    elif link.KIND == LQ_MIRROR:
        return mirror_vjp(dual, weight_bar, slope_bar, scale, first, second, link.Q)
    else:
        bar = weight_bar * scale + first * dual
        if link.KIND == LQ:
            bar += second * power(tl.abs(dual), link.Q - 2.0) * dual
        return bar


@triton.jit
def along_dual(weight_bar, dual, link):
    # what the link's scalar gets of a tile
    if link.KIND == LQ_MIRROR:
        return tl.sum(weight_bar * dual * power(tl.abs(dual), link.Q - 2.0))
    else:
        return tl.sum(weight_bar * dual)


@triton.jit
def rates_of(sums, scale_bar, link, sizes):
    return frozen_scale_rates(
        sums[0], sums[1], 1.0 * sizes.D * sizes.N, scale_bar, link.KIND, link.Q, link.FLOOR, link.CAP
    )
