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

from .backward_pieces import (
    K_BAR,
    K_FOLD,
    KEY_GATE,
    K,
    Weight,
    back_through_base,
    back_through_first,
    back_through_link,
    back_to_gates,
    back_to_queries,
    begin_chunk,
    handed_on,
    hold_read,
    store_state_bar,
    sums_of_base,
)
from .chunks import behind, load_rows, place_of, residual_of, residual_vjp_of, slot_of, store_delta_bar
from .layers import add_to_sums, along_dual, load_dual, rates_of, scale_of, tile_of, weight_of, within
from .links import start_of_sum
from .pieces import (
    KEY_CAP,
    KL,
    LARGEST_STATE_ADJOINT,
    LQ_MIRROR,
    SHARED_NUMBERS,
    VALUE_CAP,
    bounded,
    inverse_of_mean,
    operand,
    product,
    slope_bars,
)
from .rows import get, get_tile, held, hold, put, put_tile


# the places in `rows` that are a matrix memory's own
ERROR, R, R_BAR = (tl.constexpr(place) for place in (3, 4, 5))


def places(stream: bool) -> int:
    """How many tensors of C rows a program needs room for."""
    return 12 if stream else 9


@triton.jit(do_not_specialize=["H"])
def matrix_backward_kernel(
    tokens, y_bar, base, saved, bars, state_bar, base_bar, partial_in, partial_in_bar, partial_out_bar, rows_of_call, scratch, H,
    loss, link, sizes, TN: tl.constexpr, STREAM: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = sizes.C
    D: tl.constexpr = sizes.D
    BD: tl.constexpr = sizes.BD
    PRECISION: tl.constexpr = sizes.PRECISION
    tl.static_assert(sizes.C * TN >= THREADS, SHARED_NUMBERS)
    tl.static_assert(sizes.BD * TN >= THREADS, SHARED_NUMBERS)
    tl.static_assert(C * BD >= THREADS, SHARED_NUMBERS)
    place = place_of(rows_of_call, H, sizes)
    m_d = within(tl.arange(0, BD), D, D == BD)

    weights = place.program * D * D
    base = base[0] + place.head * D * D
    state_bar, base_bar, weight_bar = state_bar[0] + weights, base_bar[0] + weights, scratch.weight_bar[0] + weights
    rows = scratch.rows + place.program * (12 if STREAM else 9) * C * (C if C > BD else BD)
    mass = link.masses[0]
    # W = s A, whose reads are those of the dual state times s
    LINEAR: tl.constexpr = link.KIND != KL and link.KIND != LQ_MIRROR
    TILES: tl.constexpr = (D + TN - 1) // TN
    # what the initial memory's own link needs, and the adjoint of its image: through the link when all chunks are done
    IMAGE: tl.constexpr = link.KIND == LQ_MIRROR and link.TOWARD_INIT
    base_sums = sums_of_base(base, IMAGE, link, sizes, True, TN)
    base_scale = scale_of(base_sums, link, sizes)
    constant_bar, slope_bar = base_bar, rows
    if link.KIND == LQ_MIRROR:
        slope_bar = scratch.slope_bar[0] + place.program * D
        if link.TOWARD_INIT:
            constant_bar = scratch.link_bar[0] + weights
    # the largest entry of the state's adjoint, which bounds it
    largest = 0.0

    for i in range(0, place.chunks):
        i_c = place.chunks - 1 - i
        saved_state = saved.duals[0] + slot_of(saved, i_c, place, H, sizes)
        bound = LARGEST_STATE_ADJOINT / tl.maximum(largest, LARGEST_STATE_ADJOINT)

        # -- the chunk's tokens, gates and link -----------------------------------------------------------------------
        at, is_partial, m_f, b_k, half = begin_chunk(i_c, place, rows, tokens, partial_in, H, link, sizes)
        sums = start_of_sum(BD, link.KIND)
        for j in range(0, TILES):
            tile = tile_of(j, sizes, TN)
            _, _, b_dual = load_dual(saved_state, base, tile.o_1, tile.m_w, link)
            sums = add_to_sums(sums, b_dual, tile.m_w, link, 0)
        scale = scale_of(sums, link, sizes)
        mean_slope = tl.sum(sums[2]) / (1.0 * D * D)
        slope_gain, inverse_mean = (link.Q - 1.0) * scale, inverse_of_mean(mean_slope)
        weight = Weight(
            saved_state, base, state_bar, base_bar, weight_bar, constant_bar, slope_bar, mass, sums, scale, base_scale,
            slope_gain, inverse_mean,
        )  # fmt: skip
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
        if partial_in is not None:
            b_r = behind(b_r, partial_in.gradients[0], at)
        put(rows, R, b_r, C, BD)

        # -- back through the read ------------------------------------------------------------------------------------
        b_p, operands = hold_read(rows, tokens, at, half, weight, link, sizes, STREAM)
        # KL's writes are centred over the channels
        means = tl.sum(b_r, 1) / D, tl.sum(b_p * (tl.sum(load_rows(y_bar, at), 1) / D)[:, None], 0)
        tl.debug_barrier()
        carried = tl.zeros([C, C], tl.float32), tl.zeros([C, BD], tl.float32), tl.zeros([C, BD], tl.float32), 0.0
        for j in range(0, TILES):
            tile = tile_of(j, sizes, TN)
            m_tile = tile.m_h[:, None] & at.m_t[None, :]
            p_tile = at.o_t[None, :] * D + tile.o_h[:, None]
            y_bar_tile = tl.load(y_bar + p_tile, mask=m_tile, other=0.0).to(tl.float32)
            r_tile = get_tile(rows, R, tile, C, BD)
            r_bar_tile, carried = back_through_first(
                y_bar_tile, r_tile, means, carried, operands, weight, tile, rows, link, sizes, STREAM
            )
            put_tile(rows, R_BAR, r_bar_tile, tile, C, BD)
        tl.debug_barrier()
        half_bar, scale_bar, key_slope_bar = back_to_queries(
            carried, 0.0, rows, tokens, bars, at, half, weight, link, sizes, False
        )

        # -- back through the fold ------------------------------------------------------------------------------------
        b_fold = get(rows, KEY_GATE, BD, C, BD) * half[None, :]
        k_fold_operand = hold(rows, K_FOLD, get(rows, K, BD, C, BD) * b_fold, C, BD, PRECISION, STREAM)
        tl.debug_barrier()
        b_k_fold_bar = tl.zeros([C, BD], dtype=tl.float32)
        b_total_bar = tl.zeros([BD], dtype=tl.float32)
        # a chunk that the final state has begun is not folded: its dual state is handed on as it is
        folds = 1.0
        b_kept_total = half * half
        if partial_out_bar is not None:
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
        b_k = get(rows, K, BD, C, BD)
        b_fold = get(rows, KEY_GATE, BD, C, BD) * half[None, :]
        put(rows, K_BAR, get(rows, K_BAR, BD, C, BD) + b_k_fold_bar * b_fold, C, BD)
        back_to_gates(
            b_k_fold_bar * b_k, b_total_bar, half_bar, half, rows, tokens, bars, partial_in_bar, partial_out_bar, at, m_f, place,
            link, sizes,
        )  # fmt: skip

        # -- back through the residual --------------------------------------------------------------------------------
        b_r_bar = tl.where(m_d[None, :], get(rows, R_BAR, BD, C, BD), 0.0)
        b_r_bar = handed_on(b_r_bar, partial_in_bar, partial_out_bar, at, m_f, sizes, False)
        if partial_in is not None:
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
        b_k_bar = handed_on(b_k_bar, partial_in_bar, partial_out_bar, at, m_f, sizes, True)
        b_k_bar = tl.where(tl.abs(load_rows(tokens.k, at)) > KEY_CAP, 0.0, b_k_bar)
        tl.store(bars.k + at.p_td, b_k_bar.to(bars.k.dtype.element_ty), mask=at.m_td)

        # -- link -----------------------------------------------------------------------------------------------------
        slope_mean_bar = 0.0
        if link.KIND == LQ_MIRROR:
            of_scale, slope_mean_bar = slope_bars(carried[3], slope_gain, mean_slope, link.Q)
            scale_bar += of_scale
        rates = (0.0, 0.0)
        if link.KIND != KL:
            rates = rates_of(sums, scale_bar, link, sizes)
        largest = 0.0
        for j in range(0, TILES):
            tile = tile_of(j, sizes, TN)
            b_slope_bar = 0.0
            if link.KIND == LQ_MIRROR:
                of_channels = tl.load(slope_bar + tile.o_h, mask=tile.m_h, other=0.0) / D + slope_mean_bar / (D * D)
                b_slope_bar = (key_slope_bar / D)[None, :] + of_channels[:, None]
            b_dual_bar, b_state_bar = back_through_link(rates, inner, b_slope_bar, weight, tile.o_1, tile, link)
            largest = tl.maximum(largest, tl.max(tl.abs(b_state_bar)))
            tl.debug_barrier()
            store_state_bar(b_state_bar, b_dual_bar, weight, tile.o_1, tile, link)
        tl.debug_barrier()

    if IMAGE:
        back_through_base(base, constant_bar, base_bar, base_sums, base_scale, mass, link, sizes, True, True, TN)
