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
"""The backward pass of a matrix memory, `M(W; x) = x W`: one program goes back over its chunks.

The derivation is in README.md; `x_bar` is the adjoint of x. Channels of the output go by in tiles of `TN`, so that no
more than d x TN numbers of a state are held at a time, in the passes of `backward_mlp.py` as far as there is something
to do; `rows` and `STREAM` are as there.
"""

import triton
import triton.language as tl

from .chunks import (
    begun,
    chunk_of,
    load_gates,
    load_rows,
    place_of,
    residual_of,
    residual_vjp_of,
    store_delta_bar,
    store_gate_bars,
)
from .layers import (
    add_to_sums,
    along_dual,
    back_to_dual,
    image_back,
    load_dual,
    parts_of_read,
    rates_of,
    scale_of,
    slope_of_hidden,
    tile_of,
    weight_of,
)
from .links import start_of_sum
from .pieces import (
    KEY_CAP,
    KL,
    LARGEST_STATE_ADJOINT,
    LQ_MIRROR,
    SHARED_NUMBERS,
    VALUE_CAP,
    bounded,
    chunk_gates,
    inverse_of_mean,
    operand,
    product,
    slope_bars,
)
from .rows import get, get_tile, held, hold, put, put_tile


# places in `rows`
K = tl.constexpr(0)
QUERY_GATE = tl.constexpr(1)
KEY_GATE = tl.constexpr(2)
ERROR = tl.constexpr(3)
R = tl.constexpr(4)
R_BAR = tl.constexpr(5)
K_BAR = tl.constexpr(6)
QUERY_GATE_BAR = tl.constexpr(7)
KEY_GATE_BAR = tl.constexpr(8)
# operands of every tile, with STREAM
P = tl.constexpr(9)
X = tl.constexpr(10)
X_DECAYED = tl.constexpr(11)
K_FOLD = tl.constexpr(9)


def places(stream: bool) -> int:
    """How many tensors of C rows a program needs room for."""
    return 12 if stream else 9


@triton.jit(do_not_specialize=["H"])
def matrix_backward_kernel(
    tokens,
    y_bar,
    base,
    saved,
    bars,
    state_bar,
    base_bar,
    earlier,
    earlier_bar,
    final_bar,
    rows_of_call,
    scratch,
    H,
    loss,
    link,
    sizes,
    TN: tl.constexpr,
    STREAM: tl.constexpr,
    THREADS: tl.constexpr,
):
    C: tl.constexpr = sizes.C
    D: tl.constexpr = sizes.D
    BD: tl.constexpr = sizes.BD
    PRECISION: tl.constexpr = sizes.PRECISION
    tl.static_assert(C * TN >= THREADS, SHARED_NUMBERS)
    tl.static_assert(BD * TN >= THREADS, SHARED_NUMBERS)
    tl.static_assert(C * BD >= THREADS, SHARED_NUMBERS)
    place = place_of(rows_of_call, H, sizes)
    first_slot = tl.load(saved.of_row + place.row).to(tl.int64)
    o_c, o_d = tl.arange(0, C), tl.arange(0, BD)
    m_d = o_d < D
    m_causal = o_c[:, None] >= o_c[None, :]

    weights = place.program * D * D
    base = base[0] + place.head * D * D
    state_bar, base_bar, weight_bar = state_bar[0] + weights, base_bar[0] + weights, scratch.weight_bar[0] + weights
    rows = scratch.rows + place.program * (12 if STREAM else 9) * C * (C if C > BD else BD)
    mass = link.masses[0]
    # W = s A, whose reads are those of the dual state times s
    LINEAR: tl.constexpr = link.KIND != KL and link.KIND != LQ_MIRROR
    TILES: tl.constexpr = (D + TN - 1) // TN
    # what the initial memory's own link needs, and the adjoint of its image: through the link when all chunks are done
    base_sums = start_of_sum(BD, link.KIND)
    constant_bar, slope_bar = base_bar, rows
    if link.KIND == LQ_MIRROR:
        slope_bar = scratch.slope_bar[0] + place.program * D
        if link.TOWARD_INIT:
            constant_bar = scratch.link_bar[0] + weights
            for j in range(0, TILES):
                tile = tile_of(j, sizes, TN)
                b_base = tl.load(base + tile.o_1, mask=tile.m_w, other=0.0).to(tl.float32)
                base_sums = add_to_sums(base_sums, b_base, tile.m_w, link, 0)
    base_scale = scale_of(base_sums, link, sizes)
    # the largest entry of the state's adjoint, which bounds it
    largest = 0.0

    for i in range(0, place.chunks):
        i_c = place.chunks - 1 - i
        saved_state = saved.duals[0] + ((first_slot + i_c) * H + place.head).to(tl.int64) * D * D
        bound = LARGEST_STATE_ADJOINT / tl.maximum(largest, LARGEST_STATE_ADJOINT)

        # -- the chunk's tokens, gates and link -----------------------------------------------------------------------
        at = chunk_of(i_c, place, H, sizes)
        # slots that the final state has taken
        is_partial = (i_c == place.chunks - 1) & (place.taken > 0)
        m_f = o_c < tl.where(is_partial, place.taken, 0)
        m_fd = m_f[:, None] & m_d[None, :]
        b_k = bounded(load_rows(tokens.k, at), KEY_CAP)
        if earlier is not None:
            b_k = begun(b_k, earlier.inputs[0], at)
        b_eta, b_log_decay, total_log_decay = load_gates(tokens, earlier, at, place, link, sizes)
        b_decay, b_gq, b_gk, b_fold, b_total = chunk_gates(b_eta, b_log_decay, total_log_decay)
        # of the five, two are kept: the others are these times this
        half = tl.exp(0.5 * total_log_decay)
        put(rows, K, b_k, C, BD)
        put(rows, QUERY_GATE, b_gq, C, BD)
        put(rows, KEY_GATE, b_gk, C, BD)

        sums = start_of_sum(BD, link.KIND)
        for j in range(0, TILES):
            tile = tile_of(j, sizes, TN)
            _, _, b_dual = load_dual(saved_state, base, tile.o_1, tile.m_w, link)
            sums = add_to_sums(sums, b_dual, tile.m_w, link, 0)
        scale = scale_of(sums, link, sizes)
        # the mirror map's slope as row means times column means, the latter over their mean and times this gain
        mean_slope = tl.sum(sums[2]) / (1.0 * D * D)
        slope_gain, inverse_mean = (link.Q - 1.0) * scale, inverse_of_mean(mean_slope)
        tl.debug_barrier()

        # -- write ----------------------------------------------------------------------------------------------------
        k_operand = operand(b_k, PRECISION)
        for j in range(0, TILES):
            tile = tile_of(j, sizes, TN)
            _, _, b_dual = load_dual(saved_state, base, tile.o_1, tile.m_w, link)
            b_w = weight_of(b_dual, tile.m_w, sums, scale, mass, 0.0, link, 0)
            b_prediction = product(b_w, tl.trans(held(rows, K, k_operand, BD, C, BD, STREAM)), PRECISION)
            put_tile(rows, ERROR, b_prediction, tile, C, BD)
        tl.debug_barrier()
        b_v = bounded(load_rows(tokens.v, at), VALUE_CAP)
        b_error = tl.where(m_d[None, :], get(rows, ERROR, BD, C, BD) - b_v, 0.0)
        # a number may have been read by more than one thread: all have, before one writes
        tl.debug_barrier()
        put(rows, ERROR, b_error, C, BD)
        b_r = residual_of(b_error, tokens, at, loss, sizes)
        if earlier is not None:
            b_r = begun(b_r, earlier.gradients[0], at)
        put(rows, R, b_r, C, BD)

        # -- back through the read ------------------------------------------------------------------------------------
        b_x = bounded(load_rows(tokens.q, at), KEY_CAP)
        b_keys = get(rows, K, BD, C, BD) * get(rows, KEY_GATE, BD, C, BD)
        b_gq = get(rows, QUERY_GATE, BD, C, BD)
        if link.KIND == LQ_MIRROR:
            b_keys = b_keys * (sums[2] / D)[None, :]
        elif link.KIND != KL:
            b_x = b_x * scale
        b_p = product(b_x * b_gq, tl.trans(b_keys), PRECISION)
        b_p = tl.where(m_causal, -b_p, 0.0)
        p_operand = hold(rows, P, b_p, C, BD, PRECISION, STREAM)
        x_operand = hold(rows, X, b_x, C, BD, PRECISION, STREAM)
        decayed_operand = hold(rows, X_DECAYED, b_x * (b_gq * half[None, :]), C, BD, PRECISION, STREAM)
        # KL's writes are centred over the channels
        r_mean = tl.sum(b_r, 1) / D
        r_bar_mean = tl.sum(b_p * (tl.sum(load_rows(y_bar, at), 1) / D)[:, None], 0)
        tl.debug_barrier()
        b_p_bar = tl.zeros([C, C], dtype=tl.float32)
        b_x_bar = tl.zeros([C, BD], dtype=tl.float32)
        b_x_decayed_bar = tl.zeros([C, BD], dtype=tl.float32)
        slope_gain_bar = 0.0
        for j in range(0, TILES):
            tile = tile_of(j, sizes, TN)
            b_state, b_base, b_dual = load_dual(saved_state, base, tile.o_1, tile.m_w, link)
            b_w = weight_of(b_dual, tile.m_w, sums, scale, mass, 0.0, link, 0)
            b_decaying, b_fixed = parts_of_read(b_state, b_base, b_w, base_scale, link)
            m_tile = tile.m_h[:, None] & at.m_t[None, :]
            p_tile = at.o_t[None, :] * D + tile.o_h[:, None]
            y_bar_tile = tl.load(y_bar + p_tile, mask=m_tile, other=0.0).to(tl.float32)
            r_tile = get_tile(rows, R, tile, C, BD)
            b_written = r_tile
            slope = slope_of_hidden(b_dual, link, sizes, 0) * inverse_mean
            if link.KIND == KL:
                b_written = tl.where(tile.m_h[:, None], (r_tile - r_mean[None, :]) * (mass / D), 0.0)
            elif link.KIND == LQ_MIRROR:
                b_written = r_tile * (slope_gain * slope)[:, None]
            b_p_bar += product(tl.trans(y_bar_tile), b_written, PRECISION)
            if link.KIND == KL:
                b_x_bar += product(tl.trans(y_bar_tile), b_w, PRECISION)
                b_weight_bar = product(y_bar_tile, held(rows, X, x_operand, BD, C, BD, STREAM), PRECISION)
            else:
                b_x_decayed_bar += product(tl.trans(y_bar_tile), b_decaying, PRECISION)
                decayed_rows = held(rows, X_DECAYED, decayed_operand, BD, C, BD, STREAM)
                b_weight_bar = product(y_bar_tile, decayed_rows, PRECISION)
                if link.TOWARD_INIT:
                    b_x_bar += product(tl.trans(y_bar_tile), b_fixed, PRECISION)
                    b_fixed_bar = tl.load(constant_bar + tile.o_1, mask=tile.m_w, other=0.0)
                    b_fixed_bar += product(y_bar_tile, held(rows, X, x_operand, BD, C, BD, STREAM), PRECISION)
                    if link.KIND == LQ_MIRROR:
                        b_fixed_bar -= b_weight_bar
                    tl.store(constant_bar + tile.o_1, b_fixed_bar, mask=tile.m_w)
            # for now, the state's adjoint of links that are linear, the weight's of the others
            tl.store(weight_bar + tile.o_1, b_weight_bar, mask=tile.m_w)
            r_bar_tile = product(y_bar_tile, held(rows, P, p_operand, C, C, BD, STREAM), PRECISION)
            if link.KIND == KL:
                r_bar_tile = tl.where(tile.m_h[:, None], (r_bar_tile - r_bar_mean[None, :]) * (mass / D), 0.0)
            elif link.KIND == LQ_MIRROR:
                channel_slope_bar = tl.sum(r_bar_tile * r_tile, 1)
                slope_gain_bar += tl.sum(channel_slope_bar * slope)
                tl.store(slope_bar + tile.o_h, channel_slope_bar * inverse_mean * slope_gain, mask=tile.m_h)
                r_bar_tile = r_bar_tile * (slope_gain * slope)[:, None]
            put_tile(rows, R_BAR, r_bar_tile, tile, C, BD)
        tl.debug_barrier()

        # -- queries, and what of the keys the read has seen ----------------------------------------------------------
        scale_bar = 0.0
        b_raw = load_rows(tokens.q, at)
        b_q = bounded(b_raw, KEY_CAP)
        b_x = b_q
        b_k, b_gk = get(rows, K, BD, C, BD), get(rows, KEY_GATE, BD, C, BD)
        b_gq = get(rows, QUERY_GATE, BD, C, BD)
        if link.KIND == LQ_MIRROR:
            b_gk = b_gk * (sums[2] / D)[None, :]
        elif link.KIND != KL:
            b_x = b_q * scale
        b_p_bar = tl.where(m_causal, -b_p_bar, 0.0)
        b_of_query = product(b_p_bar, b_k * b_gk, PRECISION)
        b_of_key = product(tl.trans(b_p_bar), b_x * b_gq, PRECISION)
        b_x_bar += b_of_query * b_gq + b_x_decayed_bar * (b_gq * half[None, :])
        b_decay_bar = b_x_decayed_bar * b_x
        half_bar = tl.sum(b_decay_bar * b_gq, 0)
        put(rows, QUERY_GATE_BAR, b_of_query * b_x + b_decay_bar * half[None, :], C, BD)
        put(rows, K_BAR, b_of_key * b_gk, C, BD)
        b_gk_bar = b_of_key * b_k
        key_slope_bar = tl.zeros([BD], dtype=tl.float32)
        if link.KIND == LQ_MIRROR:
            key_slope_bar = tl.sum(b_gk_bar * get(rows, KEY_GATE, BD, C, BD), 0)
            b_gk_bar = b_gk_bar * (sums[2] / D)[None, :]
        put(rows, KEY_GATE_BAR, b_gk_bar, C, BD)
        b_q_bar = b_x_bar
        if LINEAR:
            scale_bar += tl.sum(b_x_bar * b_q)
            b_q_bar = b_x_bar * scale
        # what was cut has no gradient
        b_q_bar = tl.where(tl.abs(b_raw) > KEY_CAP, 0.0, b_q_bar)
        tl.store(bars.q + at.p_td, b_q_bar.to(bars.q.dtype.element_ty), mask=at.m_td)

        # -- back through the fold ------------------------------------------------------------------------------------
        b_fold = get(rows, KEY_GATE, BD, C, BD) * half[None, :]
        k_fold_operand = hold(rows, K_FOLD, b_k * b_fold, C, BD, PRECISION, STREAM)
        tl.debug_barrier()
        b_k_fold_bar = tl.zeros([C, BD], dtype=tl.float32)
        b_total_bar = tl.zeros([BD], dtype=tl.float32)
        # a chunk that the final state has begun is not folded: its dual state is handed on as it is
        folds = 1.0
        b_kept_total = half * half
        if final_bar is not None:
            folds = tl.where(is_partial, 0.0, 1.0)
            b_kept_total = tl.where(is_partial, 1.0, b_kept_total)
        for j in range(0, TILES):
            tile = tile_of(j, sizes, TN)
            b_state = tl.load(saved_state + tile.o_1, mask=tile.m_w, other=0.0)
            b_next = tl.load(state_bar + tile.o_1, mask=tile.m_w, other=0.0) * bound
            b_folded = b_next * folds
            b_total_bar += tl.sum(b_folded * b_state, 0)
            b_k_fold_bar -= product(tl.trans(get_tile(rows, R, tile, C, BD)), b_folded, PRECISION)
            r_bar_tile = get_tile(rows, R_BAR, tile, C, BD)
            fold_rows = held(rows, K_FOLD, k_fold_operand, BD, C, BD, STREAM)
            r_bar_tile -= product(b_folded, tl.trans(fold_rows), PRECISION)
            b_state_bar = b_next * b_kept_total[None, :]
            if LINEAR:
                b_state_bar += tl.load(weight_bar + tile.o_1, mask=tile.m_w, other=0.0)
            tl.debug_barrier()
            tl.store(state_bar + tile.o_1, b_state_bar, mask=tile.m_w)
            put_tile(rows, R_BAR, r_bar_tile, tile, C, BD)
        tl.debug_barrier()

        # -- gates ----------------------------------------------------------------------------------------------------
        b_k, b_gk = get(rows, K, BD, C, BD), get(rows, KEY_GATE, BD, C, BD)
        b_fold_bar = b_k_fold_bar * b_k
        half_bar += tl.sum(b_fold_bar * b_gk, 0) + 2.0 * half * b_total_bar
        put(rows, K_BAR, get(rows, K_BAR, BD, C, BD) + b_k_fold_bar * (b_gk * half[None, :]), C, BD)
        b_gq_bar = get(rows, QUERY_GATE_BAR, BD, C, BD)
        b_gk_bar = get(rows, KEY_GATE_BAR, BD, C, BD) + b_fold_bar * half[None, :]
        gates = (get(rows, QUERY_GATE, BD, C, BD), b_gk, half)
        store_gate_bars(
            b_gq_bar, b_gk_bar, half_bar, gates, tokens, bars, earlier_bar, final_bar, at, m_f, place, link, sizes
        )

        # -- back through the residual --------------------------------------------------------------------------------
        b_r_bar = tl.where(m_d[None, :], get(rows, R_BAR, BD, C, BD), 0.0)
        if final_bar is not None:
            b_r_bar += tl.load(final_bar.gradients[0] + at.p_e, mask=m_fd, other=0.0)
        if earlier is not None:
            tl.store(earlier_bar.gradients[0] + at.p_e, b_r_bar, mask=at.m_ed)
            b_r_bar = tl.where(at.m_e[:, None], 0.0, b_r_bar)
        b_error = get(rows, ERROR, BD, C, BD)
        b_error_bar, b_delta_bar = residual_vjp_of(b_error, b_r_bar, tokens, at, loss, sizes)
        # read as R_BAR by these threads, as tiles by others
        tl.debug_barrier()
        put(rows, R_BAR, b_error_bar, C, BD)
        b_v_bar = tl.where(tl.abs(load_rows(tokens.v, at)) > VALUE_CAP, 0.0, -b_error_bar)
        tl.store(bars.v + at.p_td, b_v_bar.to(bars.v.dtype.element_ty), mask=at.m_td)
        store_delta_bar(b_delta_bar, bars, at, loss, sizes)

        # -- write back -----------------------------------------------------------------------------------------------
        k_operand = operand(b_k, PRECISION)
        tl.debug_barrier()
        b_k_bar = tl.zeros([C, BD], dtype=tl.float32)
        inner = tl.zeros([BD], dtype=tl.float32)
        for j in range(0, TILES):
            tile = tile_of(j, sizes, TN)
            _, _, b_dual = load_dual(saved_state, base, tile.o_1, tile.m_w, link)
            b_w = weight_of(b_dual, tile.m_w, sums, scale, mass, 0.0, link, 0)
            error_bar_tile = get_tile(rows, R_BAR, tile, C, BD)
            b_k_bar += product(tl.trans(error_bar_tile), b_w, PRECISION)
            b_w_bar = product(error_bar_tile, held(rows, K, k_operand, BD, C, BD, STREAM), PRECISION)
            if not LINEAR:
                b_w_bar += tl.load(weight_bar + tile.o_1, mask=tile.m_w, other=0.0)
            if link.KIND == KL:
                inner += tl.sum(b_w_bar * b_w, 0) / mass
            else:
                scale_bar += along_dual(b_w_bar, b_dual, link)
            tl.debug_barrier()
            tl.store(weight_bar + tile.o_1, b_w_bar, mask=tile.m_w)
        tl.debug_barrier()
        b_k_bar += get(rows, K_BAR, BD, C, BD)
        if final_bar is not None:
            b_k_bar += tl.load(final_bar.inputs[0] + at.p_e, mask=m_fd, other=0.0)
        if earlier is not None:
            tl.store(earlier_bar.inputs[0] + at.p_e, b_k_bar, mask=at.m_ed)
        b_k_bar = tl.where(tl.abs(load_rows(tokens.k, at)) > KEY_CAP, 0.0, b_k_bar)
        tl.store(bars.k + at.p_td, b_k_bar.to(bars.k.dtype.element_ty), mask=at.m_td)

        # -- link -----------------------------------------------------------------------------------------------------
        slope_mean_bar = 0.0
        if link.KIND == LQ_MIRROR:
            of_scale, slope_mean_bar = slope_bars(slope_gain_bar, slope_gain, mean_slope, link.Q)
            scale_bar += of_scale
        rates = (0.0, 0.0)
        if link.KIND != KL:
            rates = rates_of(sums, scale_bar, link, sizes)
        largest = 0.0
        for j in range(0, TILES):
            tile = tile_of(j, sizes, TN)
            _, _, b_dual = load_dual(saved_state, base, tile.o_1, tile.m_w, link)
            b_w_bar = tl.load(weight_bar + tile.o_1, mask=tile.m_w, other=0.0)
            b_slope_bar = 0.0
            if link.KIND == LQ_MIRROR:
                of_channels = tl.load(slope_bar + tile.o_h, mask=tile.m_h, other=0.0) / D + slope_mean_bar / (D * D)
                b_slope_bar = (key_slope_bar / D)[None, :] + of_channels[:, None]
            b_dual_bar = back_to_dual(b_dual, b_w_bar, sums, scale, rates, inner, b_slope_bar, mass, tile, link)
            b_state_bar = tl.load(state_bar + tile.o_1, mask=tile.m_w, other=0.0) + b_dual_bar
            largest = tl.maximum(largest, tl.max(tl.abs(b_state_bar)))
            tl.debug_barrier()
            tl.store(state_bar + tile.o_1, b_state_bar, mask=tile.m_w)
            if link.TOWARD_INIT:
                b_base_bar = tl.load(base_bar + tile.o_1, mask=tile.m_w, other=0.0) + b_dual_bar
                tl.store(base_bar + tile.o_1, b_base_bar, mask=tile.m_w)
        tl.debug_barrier()

    if link.KIND == LQ_MIRROR:
        if link.TOWARD_INIT:
            # the initial memory's image, which stands in the reads of all chunks
            scale_bar = 0.0
            for j in range(0, TILES):
                tile = tile_of(j, sizes, TN)
                b_base = tl.load(base + tile.o_1, mask=tile.m_w, other=0.0).to(tl.float32)
                scale_bar += along_dual(tl.load(constant_bar + tile.o_1, mask=tile.m_w, other=0.0), b_base, link)
            rates = rates_of(base_sums, scale_bar, link, sizes)
            for j in range(0, TILES):
                tile = tile_of(j, sizes, TN)
                image_back(base, constant_bar, base_bar, tile.o_1, base_scale, rates, tile, link)
