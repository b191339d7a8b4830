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
"""What the backward kernels of both memories share: a matrix memory is to it what an MLP memory's first layer is.

`x_bar` is the adjoint of x. A pass carries three sums of C x d at most, and what lies between two passes waits in `rows`.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .chunks import behind, chunk_of, load_gates, load_rows, store_gate_bars
from .layers import (
    add_to_sums,
    along_dual,
    back_to_dual,
    load_dual,
    parts_of_read,
    rates_of,
    slope_of_hidden,
    tile_of,
    weight_of,
)
from .links import start_of_sum
from .pieces import KEY_CAP, KL, LQ_MIRROR, bounded, chunk_gates, product
from .rows import get, held, hold, put


# places in `rows`, of a tensor of C rows each; those from 3 to 5 are a memory's own
K, QUERY_GATE, KEY_GATE = (tl.constexpr(place) for place in (0, 1, 2))
K_BAR, QUERY_GATE_BAR, KEY_GATE_BAR = (tl.constexpr(place) for place in (6, 7, 8))
# operands of every tile, with STREAM: of the read, and of what comes after it
P, X, X_DECAYED = (tl.constexpr(place) for place in (9, 10, 11))
K_FOLD = tl.constexpr(9)


class Weight(NamedTuple):
    """Where a weight's tiles are in a chunk, and what its link needs of the whole of them."""

    saved: Any  # the dual state at the chunk's start
    base: Any
    state_bar: Any
    base_bar: Any
    weight_bar: Any
    constant_bar: Any  # of what does not decay in a read
    slope_bar: Any
    mass: Any
    sums: Any
    scale: Any
    base_scale: Any
    # the mirror map's slope as row means times column means, the latter over their mean and times this gain
    slope_gain: Any
    inverse_mean: Any


@triton.jit
def begin_chunk(i_c, place, rows, tokens, partial_in, H, link, sizes):
    # The chunk's tokens, which of its slots the final state has taken, keys, and the root of its whole decay. Of the gates
    # two are put aside: the others are these times that root
    at = chunk_of(i_c, place, H, sizes)
    is_partial = (i_c == place.chunks - 1) & (place.taken > 0)
    m_f = tl.arange(0, sizes.C) < tl.where(is_partial, place.taken, 0)
    b_k = bounded(load_rows(tokens.k, at), KEY_CAP)
    if partial_in is not None and sizes.FIXED == 0:
        b_k = behind(b_k, partial_in.inputs[0], at)
    b_eta, b_log_decay, total_log_decay = load_gates(tokens, partial_in, at, place, link, sizes)
    _, b_gq, b_gk, _, _ = chunk_gates(b_eta, b_log_decay, total_log_decay)
    put(rows, K, b_k, sizes.C, sizes.BD)
    put(rows, QUERY_GATE, b_gq, sizes.C, sizes.BD)
    put(rows, KEY_GATE, b_gk, sizes.C, sizes.BD)
    return at, is_partial, m_f, b_k, tl.exp(0.5 * total_log_decay)


@triton.jit
def sums_of_base(base, WANTED: tl.constexpr, link, sizes, FIRST: tl.constexpr, TN: tl.constexpr):
    # what the link needs of the initial memory, where its image is asked for
    sums = start_of_sum(sizes.BD, link.KIND)
    if WANTED:
        for j in range(0, (sizes.N + TN - 1) // TN):
            tile = tile_of(j, sizes, TN)
            b_base = tl.load(base + (tile.o_1 if FIRST else tile.o_2), mask=tile.m_w, other=0.0).to(tl.float32)
            sums = add_to_sums(sums, b_base, tile.m_w, link, 0)
    return sums


@triton.jit
def hold_read(rows, tokens, at, half, weight, link, sizes, STREAM: tl.constexpr):
    # the operands of the read's first layer: what queries see of the chunk's keys, P, the queries, and these decayed
    C: tl.constexpr = sizes.C
    BD: tl.constexpr = sizes.BD
    o_c = tl.arange(0, C)
    b_x = bounded(load_rows(tokens.q, at), KEY_CAP)
    b_keys = get(rows, K, BD, C, BD) * get(rows, KEY_GATE, BD, C, BD)
    b_gq = get(rows, QUERY_GATE, BD, C, BD)
    if link.KIND == LQ_MIRROR:
        b_keys = b_keys * (weight.sums[2] / sizes.N)[None, :]
    elif link.KIND != KL:
        b_x = b_x * weight.scale
    b_p = product(b_x * b_gq, tl.trans(b_keys), sizes.PRECISION)
    b_p = tl.where(o_c[:, None] >= o_c[None, :], -b_p, 0.0)
    p_operand = hold(rows, P, b_p, C, BD, sizes.PRECISION, STREAM)
    x_operand = hold(rows, X, b_x, C, BD, sizes.PRECISION, STREAM)
    decayed_operand = hold(rows, X_DECAYED, b_x * (b_gq * half[None, :]), C, BD, sizes.PRECISION, STREAM)
    return b_p, (p_operand, x_operand, decayed_operand)


@triton.jit
def back_through_first(
    b_read_bar, b_gradients, means, carried, operands, weight, tile, rows, link, sizes, STREAM: tl.constexpr
):
    # Of a tile, [TN, C], from the adjoint of what queries read and the gradients that the chunk has written, to the
    # adjoint of these; adds to those of P, of the queries, of these decayed, and of the slope's gain. Leaves the adjoint
    # of the state, for links that are linear, or else of the weight
    C: tl.constexpr = sizes.C
    BD: tl.constexpr = sizes.BD
    PRECISION: tl.constexpr = sizes.PRECISION
    p_operand, x_operand, decayed_operand = operands
    b_p_bar, b_x_bar, b_x_decayed_bar, slope_gain_bar = carried
    gradient_mean, gradient_bar_mean = means
    b_state, b_base, b_dual = load_dual(weight.saved, weight.base, tile.o_1, tile.m_w, link)
    b_w = weight_of(b_dual, tile.m_w, weight.sums, weight.scale, weight.mass, 0.0, link, 0)
    b_decaying, b_fixed = parts_of_read(b_state, b_base, b_w, weight.base_scale, link)
    b_written = b_gradients
    slope = slope_of_hidden(b_dual, link, sizes, 0) * weight.inverse_mean
    if link.KIND == KL:
        b_written = tl.where(tile.m_hc, (b_gradients - gradient_mean[None, :]) * (weight.mass / sizes.N), 0.0)
    elif link.KIND == LQ_MIRROR:
        b_written = b_gradients * (weight.slope_gain * slope)[:, None]
    b_p_bar += product(tl.trans(b_read_bar), b_written, PRECISION)
    if link.KIND == KL:
        b_x_bar += product(tl.trans(b_read_bar), b_w, PRECISION)
        b_weight_bar = product(b_read_bar, held(rows, X, x_operand, BD, C, BD, STREAM), PRECISION)
    else:
        b_x_decayed_bar += product(tl.trans(b_read_bar), b_decaying, PRECISION)
        decayed_rows = held(rows, X_DECAYED, decayed_operand, BD, C, BD, STREAM)
        b_weight_bar = product(b_read_bar, decayed_rows, PRECISION)
        if link.TOWARD_INIT:
            b_x_bar += product(tl.trans(b_read_bar), b_fixed, PRECISION)
            b_fixed_bar = tl.load(weight.constant_bar + tile.o_1, mask=tile.m_w, other=0.0)
            b_fixed_bar += product(b_read_bar, held(rows, X, x_operand, BD, C, BD, STREAM), PRECISION)
            if link.KIND == LQ_MIRROR:
                b_fixed_bar -= b_weight_bar
            tl.store(weight.constant_bar + tile.o_1, b_fixed_bar, mask=tile.m_w)
    tl.store(weight.weight_bar + tile.o_1, b_weight_bar, mask=tile.m_w)
    b_bar = product(b_read_bar, held(rows, P, p_operand, C, C, BD, STREAM), PRECISION)
    if link.KIND == KL:
        b_bar = tl.where(tile.m_hc, (b_bar - gradient_bar_mean[None, :]) * (weight.mass / sizes.N), 0.0)
    elif link.KIND == LQ_MIRROR:
        of_hidden = tl.sum(b_bar * b_gradients, 1)
        slope_gain_bar += tl.sum(of_hidden * slope)
        tl.store(weight.slope_bar + tile.o_h, of_hidden * weight.inverse_mean * weight.slope_gain, mask=tile.m_h)
        b_bar = b_bar * (weight.slope_gain * slope)[:, None]
    return b_bar, (b_p_bar, b_x_bar, b_x_decayed_bar, slope_gain_bar)


@triton.jit
def back_to_queries(carried, b_residual_bar, rows, tokens, bars, at, half, weight, link, sizes, ADDS: tl.constexpr):
    # Stores the adjoint of the queries, and puts those of the gates and of what the read has seen of the keys into `rows`,
    # where ADDS says that something stands there already. Returns those of `half`, of the link's scalar and of its slopes
    C: tl.constexpr = sizes.C
    BD: tl.constexpr = sizes.BD
    o_c = tl.arange(0, C)
    b_p_bar, b_x_bar, b_x_decayed_bar, _ = carried
    b_raw = load_rows(tokens.q, at)
    b_q = bounded(b_raw, KEY_CAP)
    b_x = b_q
    b_k, b_gk = get(rows, K, BD, C, BD), get(rows, KEY_GATE, BD, C, BD)
    b_gq = get(rows, QUERY_GATE, BD, C, BD)
    slope_of_keys = weight.sums[2] / sizes.N
    if link.KIND == LQ_MIRROR:
        b_gk = b_gk * slope_of_keys[None, :]
    elif link.KIND != KL:
        b_x = b_q * weight.scale
    b_p_bar = tl.where(o_c[:, None] >= o_c[None, :], -b_p_bar, 0.0)
    b_of_query = product(b_p_bar, b_k * b_gk, sizes.PRECISION)
    b_of_key = product(tl.trans(b_p_bar), b_x * b_gq, sizes.PRECISION)
    b_x_bar += b_of_query * b_gq + b_x_decayed_bar * (b_gq * half[None, :])
    b_decay_bar = b_x_decayed_bar * b_x
    b_gq_bar = b_of_query * b_x + b_decay_bar * half[None, :]
    b_gk_bar = b_of_key * b_k
    key_slope_bar = tl.zeros([BD], dtype=tl.float32)
    if link.KIND == LQ_MIRROR:
        key_slope_bar = tl.sum(b_gk_bar * get(rows, KEY_GATE, BD, C, BD), 0)
        b_gk_bar = b_gk_bar * slope_of_keys[None, :]
    if ADDS:
        b_gq_bar += get(rows, QUERY_GATE_BAR, BD, C, BD)
        b_gk_bar += get(rows, KEY_GATE_BAR, BD, C, BD)
    put(rows, QUERY_GATE_BAR, b_gq_bar, C, BD)
    put(rows, KEY_GATE_BAR, b_gk_bar, C, BD)
    put(rows, K_BAR, b_of_key * b_gk, C, BD)
    scale_bar = 0.0
    b_q_bar = b_x_bar
    if link.KIND != KL and link.KIND != LQ_MIRROR:
        scale_bar = tl.sum(b_x_bar * b_q)
        b_q_bar = b_x_bar * weight.scale
    # what was cut has no gradient
    b_q_bar = tl.where(tl.abs(b_raw) > KEY_CAP, 0.0, b_q_bar + b_residual_bar)
    tl.store(bars.q + at.p_td, b_q_bar.to(bars.q.dtype.element_ty), mask=at.m_td)
    return tl.sum(b_decay_bar * b_gq, 0), scale_bar, key_slope_bar


@triton.jit
def back_to_gates(
    b_fold_bar,
    total_bar,
    half_bar,
    half,
    rows,
    tokens,
    bars,
    partial_in_bar,
    partial_out_bar,
    at,
    m_f,
    place,
    link,
    sizes,
):
    # from the adjoints of what a fold multiplies keys with and of the chunk's whole decay
    b_gk = get(rows, KEY_GATE, sizes.BD, sizes.C, sizes.BD)
    half_bar += tl.sum(b_fold_bar * b_gk, 0) + 2.0 * half * total_bar
    b_gq_bar = get(rows, QUERY_GATE_BAR, sizes.BD, sizes.C, sizes.BD)
    b_gk_bar = get(rows, KEY_GATE_BAR, sizes.BD, sizes.C, sizes.BD) + b_fold_bar * half[None, :]
    gates = (get(rows, QUERY_GATE, sizes.BD, sizes.C, sizes.BD), b_gk, half)
    store_gate_bars(
        b_gq_bar, b_gk_bar, half_bar, gates, tokens, bars, partial_in_bar, partial_out_bar, at, m_f, place, link, sizes
    )


@triton.jit
def handed_on(b_bar, partial_in_bar, partial_out_bar, at, m_f, sizes, KEYS: tl.constexpr):
    # the adjoint of the first weight's inputs or the last one's gradients: of a begun chunk's slots, from the state that
    # has taken them, and to the state that they came from
    if partial_out_bar is not None:
        m_fd = m_f[:, None] & (tl.arange(0, sizes.BD) < sizes.D)[None, :]
        p_final = partial_out_bar.inputs[0] if KEYS else partial_out_bar.gradients[-1]
        b_bar += tl.load(p_final + at.p_e, mask=m_fd, other=0.0)
    if partial_in_bar is not None:
        tl.store((partial_in_bar.inputs[0] if KEYS else partial_in_bar.gradients[-1]) + at.p_e, b_bar, mask=at.m_ed)
    return b_bar


@triton.jit
def back_through_link(rates, inner, b_slope_bar, weight, offsets, tile, link):
    # of a tile, the adjoint of the dual state and of the state at the chunk's start
    _, _, b_dual = load_dual(weight.saved, weight.base, offsets, tile.m_w, link)
    b_w_bar = tl.load(weight.weight_bar + offsets, mask=tile.m_w, other=0.0)
    b_dual_bar = back_to_dual(
        b_dual, b_w_bar, weight.sums, weight.scale, rates, inner, b_slope_bar, weight.mass, tile, link
    )
    return b_dual_bar, tl.load(weight.state_bar + offsets, mask=tile.m_w, other=0.0) + b_dual_bar


@triton.jit
def store_state_bar(b_state_bar, b_dual_bar, weight, offsets, tile, link):
    tl.store(weight.state_bar + offsets, b_state_bar, mask=tile.m_w)
    if link.TOWARD_INIT:
        b_base_bar = tl.load(weight.base_bar + offsets, mask=tile.m_w, other=0.0) + b_dual_bar
        tl.store(weight.base_bar + offsets, b_base_bar, mask=tile.m_w)


@triton.jit
def back_through_base(
    base, bar, base_bar, sums, scale, mass, link, sizes, FIRST: tl.constexpr, ADDS: tl.constexpr, TN: tl.constexpr
):
    # What is the same in all chunks, the image of the initial memory: the sum of its adjoints goes through the link in the
    # end, and ADDS says that something stands in `base_bar` already
    TILES: tl.constexpr = (sizes.N + TN - 1) // TN
    scale_bar = 0.0
    inner = tl.zeros([sizes.BD], dtype=tl.float32)
    for j in range(0, TILES):
        tile = tile_of(j, sizes, TN)
        offsets = tile.o_1 if FIRST else tile.o_2
        b_dual = tl.load(base + offsets, mask=tile.m_w, other=0.0).to(tl.float32)
        b_bar = tl.load(bar + offsets, mask=tile.m_w, other=0.0)
        if link.KIND == KL:
            inner += tl.sum(b_bar * weight_of(b_dual, tile.m_w, sums, scale, mass, 0.0, link, 0), 0) / mass
        else:
            scale_bar += along_dual(b_bar, b_dual, link)
    rates = (0.0, 0.0)
    if link.KIND != KL:
        rates = rates_of(sums, scale_bar, link, sizes)
    for j in range(0, TILES):
        tile = tile_of(j, sizes, TN)
        offsets = tile.o_1 if FIRST else tile.o_2
        b_dual = tl.load(base + offsets, mask=tile.m_w, other=0.0).to(tl.float32)
        b_bar = tl.load(bar + offsets, mask=tile.m_w, other=0.0)
        b_bar = back_to_dual(b_dual, b_bar, sums, scale, rates, inner, 0.0, mass, tile, link)
        if ADDS:
            b_bar += tl.load(base_bar + offsets, mask=tile.m_w, other=0.0)
        tl.store(base_bar + offsets, b_bar, mask=tile.m_w)
