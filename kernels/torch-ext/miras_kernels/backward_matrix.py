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

from .forward_mlp import linked, sum_of_dual
from .pieces import (
    HUBER_COORDINATE,
    KEY_CAP,
    KL,
    LARGEST_STATE_ADJOINT,
    LQ,
    LQ_MIRROR,
    SHARED_NUMBERS,
    VALUE_CAP,
    bounded,
    chunk_gates,
    frozen_scale,
    frozen_scale_rates,
    inverse_of_mean,
    load_dual,
    load_gates,
    mirror_vjp,
    operand,
    parts_of_read,
    power,
    product,
    residual,
    residual_vjp,
    slope_bars,
    store_gate_bars,
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


@triton.jit
def tile_of_state(j, D: tl.constexpr, BD: tl.constexpr, TN: tl.constexpr):
    # offsets and mask of tile j of a state [BD, TN], its channels and their mask
    o_d, o_n = tl.arange(0, BD), j * TN + tl.arange(0, TN)
    return o_d[:, None] * D + o_n[None, :], (o_d < D)[:, None] & (o_n < D)[None, :], o_n, o_n < D


@triton.jit(do_not_specialize=["LONGEST", "H"])
def matrix_backward_kernel(
    q,
    k,
    v,
    eta,
    log_alpha,
    delta,
    y_bar,
    base,
    saved,
    saved_of_row,
    q_bar,
    k_bar,
    v_bar,
    eta_bar,
    log_alpha_bar,
    delta_bar,
    state_bar,
    base_bar,
    earlier_inputs,
    earlier_gradients,
    earlier_eta,
    earlier_log_decay,
    phases,
    earlier_inputs_bar,
    earlier_gradients_bar,
    earlier_eta_bar,
    earlier_log_decay_bar,
    inputs_bar,
    gradients_bar,
    final_eta_bar,
    final_log_decay_bar,
    starts,
    lengths,
    order,
    weight_bar,
    link_bar,
    slope_bar,
    rows,
    LONGEST,
    H,
    MIN_LOG_ALPHA,
    MASS,
    C: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    TN: tl.constexpr,
    GATE_DIM: tl.constexpr,
    DELTA_DIM: tl.constexpr,
    LOSS: tl.constexpr,
    POWER: tl.constexpr,
    SMOOTH_SIGN: tl.constexpr,
    SHARPNESS: tl.constexpr,
    ERROR_CAP: tl.constexpr,
    CLIP: tl.constexpr,
    LINK: tl.constexpr,
    Q: tl.constexpr,
    FLOOR: tl.constexpr,
    CAP: tl.constexpr,
    TOWARD_INIT: tl.constexpr,
    HAS_EARLIER: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    KEEP_FINAL: tl.constexpr,
    PRECISION: tl.constexpr,
    STREAM: tl.constexpr,
    THREADS: tl.constexpr,
):
    tl.static_assert(C * TN >= THREADS, SHARED_NUMBERS)
    tl.static_assert(BD * TN >= THREADS, SHARED_NUMBERS)
    tl.static_assert(C * BD >= THREADS, SHARED_NUMBERS)
    program = tl.program_id(0).to(tl.int64)
    row, head = program // H, program % H
    start = tl.load(starts + row).to(tl.int64)
    length = tl.load(lengths + row).to(tl.int32)
    first_slot = tl.load(saved_of_row + row).to(tl.int64)
    phase = 0
    if HAS_EARLIER:
        phase = tl.load(phases + row).to(tl.int32)
    chunks = tl.cdiv(phase + length, C)
    taken = (phase + length) % C

    o_c, o_d = tl.arange(0, C), tl.arange(0, BD)
    m_d = o_d < D
    m_causal = o_c[:, None] >= o_c[None, :]
    zeros = tl.zeros([BD], dtype=tl.float32)
    start_of_sum = (0.0, 0.0, zeros - 1.0e30 if LINK == KL else zeros, zeros)

    base += head * D * D
    state_bar += program * D * D
    base_bar += program * D * D
    weight_bar += program * D * D
    rows += program * (12 if STREAM else 9) * C * (C if C > BD else BD)
    # W = s A, whose reads are those of the dual state times s
    LINEAR: tl.constexpr = LINK != KL and LINK != LQ_MIRROR
    TILES: tl.constexpr = (D + TN - 1) // TN
    # what the initial memory's own link needs, and the adjoint of its image: through the link when all chunks are done
    base_sums = start_of_sum
    constant_bar = base_bar
    if LINK == LQ_MIRROR:
        slope_bar += program * D
        if TOWARD_INIT:
            constant_bar = link_bar + program * D * D
            for j in range(0, TILES):
                o_n, m_n, _, _ = tile_of_state(j, D, BD, TN)
                b_base = tl.load(base + o_n, mask=m_n, other=0.0).to(tl.float32)
                base_sums = sum_of_dual(b_base, m_n, base_sums, 1, LINK, Q)
    base_scale = frozen_scale(base_sums[0], base_sums[1], 1.0 * D * D, LINK, Q, FLOOR, CAP)
    # the largest entry of the state's adjoint, which bounds it
    largest = 0.0

    for i in range(0, chunks):
        i_c = chunks - 1 - i
        slot = ((first_slot + i_c) * H + head).to(tl.int64) * D * D
        bound = LARGEST_STATE_ADJOINT / tl.maximum(largest, LARGEST_STATE_ADJOINT)

        # -- the chunk's tokens, gates and link -----------------------------------------------------------------------
        o_t = i_c * C + o_c - phase
        m_t = (o_t >= 0) & (o_t < length)
        if HAS_ORDER:
            o_t = tl.load(order + row * LONGEST + o_t, mask=m_t, other=0)
        o_t = ((start + o_t) * H + head).to(tl.int64)
        m_td = m_t[:, None] & m_d[None, :]
        p_td = o_t[:, None] * D + o_d[None, :]
        # slots that the state has filled, and those that the final state has taken: of chunks that calls share
        m_e = o_c < tl.where(i_c == 0, phase, 0)
        m_ed = m_e[:, None] & m_d[None, :]
        is_partial = (i_c == chunks - 1) & (taken > 0)
        m_f = o_c < tl.where(is_partial, taken, 0)
        m_fd = m_f[:, None] & m_d[None, :]
        p_e = program * C * D + o_c[:, None] * D + o_d[None, :]
        b_k = tl.load(k + p_td, mask=m_td, other=0.0).to(tl.float32)
        b_k = bounded(b_k, KEY_CAP)
        if HAS_EARLIER:
            b_k = tl.where(m_e[:, None], tl.load(earlier_inputs + p_e, mask=m_ed, other=0.0), b_k)
        b_eta, b_log_decay, total_log_decay = load_gates(
            eta,
            log_alpha,
            earlier_eta,
            earlier_log_decay,
            o_t,
            m_t,
            program * C * GATE_DIM,
            m_e,
            phase,
            MIN_LOG_ALPHA,
            C,
            D,
            BD,
            GATE_DIM,
            HAS_EARLIER,
        )
        b_decay, b_gq, b_gk, b_fold, b_total = chunk_gates(b_eta, b_log_decay, total_log_decay)
        # of the five, two are kept: the others are these times this
        half = tl.exp(0.5 * total_log_decay)
        put(rows, K, b_k, C, BD)
        put(rows, QUERY_GATE, b_gq, C, BD)
        put(rows, KEY_GATE, b_gk, C, BD)

        sums = start_of_sum
        for j in range(0, TILES):
            o_n, m_n, _, _ = tile_of_state(j, D, BD, TN)
            b_state, b_base, b_dual = load_dual(saved + slot, base, o_n, m_n, TOWARD_INIT)
            sums = sum_of_dual(b_dual, m_n, sums, 1, LINK, Q)
        squares, powers, top, total = sums
        scale = frozen_scale(squares, powers, 1.0 * D * D, LINK, Q, FLOOR, CAP)
        # the mirror map's slope as row means times column means, the latter over their mean and times this gain
        mean_slope = tl.sum(top) / (1.0 * D * D)
        slope_gain, inverse_mean = (Q - 1.0) * scale, inverse_of_mean(mean_slope)
        tl.debug_barrier()

        # -- write ----------------------------------------------------------------------------------------------------
        k_operand = operand(b_k, PRECISION)
        for j in range(0, TILES):
            o_n, m_n, _, _ = tile_of_state(j, D, BD, TN)
            b_state, b_base, b_dual = load_dual(saved + slot, base, o_n, m_n, TOWARD_INIT)
            b_w = tl.where(m_n, linked(b_dual, scale, top, total, MASS, 0.0, 1, LINK, Q), 0.0)
            b_prediction = product(held(rows, K, k_operand, BD, C, BD, STREAM), b_w, PRECISION)
            put_tile(rows, ERROR, b_prediction, j, D, C, BD, TN)
        tl.debug_barrier()
        b_v = tl.load(v + p_td, mask=m_td, other=0.0).to(tl.float32)
        b_v = bounded(b_v, VALUE_CAP)
        b_error = tl.where(m_d[None, :], get(rows, ERROR, BD, C, BD) - b_v, 0.0)
        # a number may have been read by more than one thread: all have, before one writes
        tl.debug_barrier()
        put(rows, ERROR, b_error, C, BD)
        b_delta = b_error
        if DELTA_DIM == 1:
            b_delta = tl.load(delta + o_t, mask=m_t, other=0.0).to(tl.float32)[:, None]
        elif DELTA_DIM > 1:
            b_delta = tl.load(delta + p_td, mask=m_td, other=0.0).to(tl.float32)
        b_r = residual(b_error, b_delta, m_d, LOSS, POWER, SMOOTH_SIGN, SHARPNESS, ERROR_CAP, CLIP)
        if HAS_EARLIER:
            b_r = tl.where(m_e[:, None], tl.load(earlier_gradients + p_e, mask=m_ed, other=0.0), b_r)
        put(rows, R, b_r, C, BD)

        # -- back through the read ------------------------------------------------------------------------------------
        b_x = tl.load(q + p_td, mask=m_td, other=0.0).to(tl.float32)
        b_x = bounded(b_x, KEY_CAP)
        b_keys = get(rows, K, BD, C, BD) * get(rows, KEY_GATE, BD, C, BD)
        b_gq = get(rows, QUERY_GATE, BD, C, BD)
        if LINK == LQ_MIRROR:
            b_keys = b_keys * (top / D)[None, :]
        elif LINK != KL:
            b_x = b_x * scale
        b_p = product(b_x * b_gq, tl.trans(b_keys), PRECISION)
        b_p = tl.where(m_causal, -b_p, 0.0)
        p_operand = hold(rows, P, b_p, C, BD, PRECISION, STREAM)
        x_operand = hold(rows, X, b_x, C, BD, PRECISION, STREAM)
        decayed_operand = hold(rows, X_DECAYED, b_x * (b_gq * half[None, :]), C, BD, PRECISION, STREAM)
        # KL's writes are centred over the channels
        r_mean = tl.sum(b_r, 1) / D
        b_y_bar = tl.load(y_bar + p_td, mask=m_td, other=0.0).to(tl.float32)
        r_bar_mean = tl.sum(b_p * (tl.sum(b_y_bar, 1) / D)[:, None], 0)
        tl.debug_barrier()
        b_p_bar = tl.zeros([C, C], dtype=tl.float32)
        b_x_bar = tl.zeros([C, BD], dtype=tl.float32)
        b_x_decayed_bar = tl.zeros([C, BD], dtype=tl.float32)
        slope_gain_bar = 0.0
        for j in range(0, TILES):
            o_n, m_n, channels, m_channels = tile_of_state(j, D, BD, TN)
            b_state, b_base, b_dual = load_dual(saved + slot, base, o_n, m_n, TOWARD_INIT)
            b_w = tl.where(m_n, linked(b_dual, scale, top, total, MASS, 0.0, 1, LINK, Q), 0.0)
            b_decaying, b_fixed = parts_of_read(b_state, b_base, b_w, base_scale, LINK, Q, TOWARD_INIT)
            m_tn = m_t[:, None] & m_channels[None, :]
            y_bar_tile = tl.load(y_bar + o_t[:, None] * D + channels[None, :], mask=m_tn, other=0.0).to(tl.float32)
            r_tile = get_tile(rows, R, j, D, C, BD, TN)
            b_written = r_tile
            slope_of_channels = tl.sum(power(tl.abs(b_dual), Q - 2.0), 0) / D * inverse_mean
            if LINK == KL:
                b_written = tl.where(m_channels[None, :], (MASS / D) * (r_tile - r_mean[:, None]), 0.0)
            elif LINK == LQ_MIRROR:
                b_written = r_tile * (slope_gain * slope_of_channels)[None, :]
            b_p_bar += product(y_bar_tile, tl.trans(b_written), PRECISION)
            if LINK == KL:
                b_x_bar += product(y_bar_tile, tl.trans(b_w), PRECISION)
                x_rows = held(rows, X, x_operand, BD, C, BD, STREAM)
                b_weight_bar = product(tl.trans(x_rows), y_bar_tile, PRECISION)
            else:
                b_x_decayed_bar += product(y_bar_tile, tl.trans(b_decaying), PRECISION)
                x_rows = held(rows, X_DECAYED, decayed_operand, BD, C, BD, STREAM)
                b_weight_bar = product(tl.trans(x_rows), y_bar_tile, PRECISION)
                if TOWARD_INIT:
                    b_x_bar += product(y_bar_tile, tl.trans(b_fixed), PRECISION)
                    x_rows = held(rows, X, x_operand, BD, C, BD, STREAM)
                    b_fixed_bar = tl.load(constant_bar + o_n, mask=m_n, other=0.0)
                    b_fixed_bar += product(tl.trans(x_rows), y_bar_tile, PRECISION)
                    if LINK == LQ_MIRROR:
                        b_fixed_bar -= b_weight_bar
                    tl.store(constant_bar + o_n, b_fixed_bar, mask=m_n)
            # for now, the state's adjoint of links that are linear, the weight's of the others
            tl.store(weight_bar + o_n, b_weight_bar, mask=m_n)
            r_bar_tile = product(tl.trans(held(rows, P, p_operand, C, C, BD, STREAM)), y_bar_tile, PRECISION)
            if LINK == KL:
                r_bar_tile = tl.where(m_channels[None, :], (MASS / D) * (r_bar_tile - r_bar_mean[:, None]), 0.0)
            elif LINK == LQ_MIRROR:
                channel_slope_bar = tl.sum(r_bar_tile * r_tile, 0)
                slope_gain_bar += tl.sum(channel_slope_bar * slope_of_channels)
                tl.store(slope_bar + channels, channel_slope_bar * inverse_mean * slope_gain, mask=m_channels)
                r_bar_tile = r_bar_tile * (slope_gain * slope_of_channels)[None, :]
            put_tile(rows, R_BAR, r_bar_tile, j, D, C, BD, TN)
        tl.debug_barrier()

        # -- queries, and what of the keys the read has seen ----------------------------------------------------------
        scale_bar = 0.0
        b_raw = tl.load(q + p_td, mask=m_td, other=0.0).to(tl.float32)
        b_q = bounded(b_raw, KEY_CAP)
        b_x = b_q
        b_k, b_gk = get(rows, K, BD, C, BD), get(rows, KEY_GATE, BD, C, BD)
        b_gq = get(rows, QUERY_GATE, BD, C, BD)
        if LINK == LQ_MIRROR:
            b_gk = b_gk * (top / D)[None, :]
        elif LINK != KL:
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
        if LINK == LQ_MIRROR:
            key_slope_bar = tl.sum(b_gk_bar * get(rows, KEY_GATE, BD, C, BD), 0)
            b_gk_bar = b_gk_bar * (top / D)[None, :]
        put(rows, KEY_GATE_BAR, b_gk_bar, C, BD)
        b_q_bar = b_x_bar
        if LINEAR:
            scale_bar += tl.sum(b_x_bar * b_q)
            b_q_bar = b_x_bar * scale
        # what was cut has no gradient
        b_q_bar = tl.where(tl.abs(b_raw) > KEY_CAP, 0.0, b_q_bar)
        tl.store(q_bar + p_td, b_q_bar.to(q_bar.dtype.element_ty), mask=m_td)

        # -- back through the fold ------------------------------------------------------------------------------------
        b_fold = get(rows, KEY_GATE, BD, C, BD) * half[None, :]
        k_fold_operand = hold(rows, K_FOLD, b_k * b_fold, C, BD, PRECISION, STREAM)
        tl.debug_barrier()
        b_k_fold_bar = tl.zeros([C, BD], dtype=tl.float32)
        b_total_bar = tl.zeros([BD], dtype=tl.float32)
        # a chunk that the final state has begun is not folded: its dual state is handed on as it is
        folds = 1.0
        b_kept_total = half * half
        if KEEP_FINAL:
            folds = tl.where(is_partial, 0.0, 1.0)
            b_kept_total = tl.where(is_partial, 1.0, b_kept_total)
        for j in range(0, TILES):
            o_n, m_n, channels, m_channels = tile_of_state(j, D, BD, TN)
            b_state = tl.load(saved + slot + o_n, mask=m_n, other=0.0)
            b_next = tl.load(state_bar + o_n, mask=m_n, other=0.0) * bound
            b_folded = b_next * folds
            b_total_bar += tl.sum(b_folded * b_state, 1)
            b_k_fold_bar -= product(get_tile(rows, R, j, D, C, BD, TN), tl.trans(b_folded), PRECISION)
            r_bar_tile = get_tile(rows, R_BAR, j, D, C, BD, TN)
            r_bar_tile -= product(held(rows, K_FOLD, k_fold_operand, BD, C, BD, STREAM), b_folded, PRECISION)
            b_state_bar = b_next * b_kept_total[:, None]
            if LINEAR:
                b_state_bar += tl.load(weight_bar + o_n, mask=m_n, other=0.0)
            tl.debug_barrier()
            tl.store(state_bar + o_n, b_state_bar, mask=m_n)
            put_tile(rows, R_BAR, r_bar_tile, j, D, C, BD, TN)
        tl.debug_barrier()

        # -- gates ----------------------------------------------------------------------------------------------------
        b_k, b_gk = get(rows, K, BD, C, BD), get(rows, KEY_GATE, BD, C, BD)
        b_fold_bar = b_k_fold_bar * b_k
        half_bar += tl.sum(b_fold_bar * b_gk, 0) + 2.0 * half * b_total_bar
        put(rows, K_BAR, get(rows, K_BAR, BD, C, BD) + b_k_fold_bar * (b_gk * half[None, :]), C, BD)
        store_gate_bars(
            get(rows, QUERY_GATE_BAR, BD, C, BD),
            get(rows, KEY_GATE_BAR, BD, C, BD) + b_fold_bar * half[None, :],
            half_bar,
            get(rows, QUERY_GATE, BD, C, BD),
            b_gk,
            half,
            log_alpha,
            eta_bar,
            log_alpha_bar,
            earlier_eta_bar,
            earlier_log_decay_bar,
            final_eta_bar,
            final_log_decay_bar,
            o_t,
            m_t,
            program * C * GATE_DIM,
            m_e,
            m_f,
            phase,
            MIN_LOG_ALPHA,
            C,
            D,
            BD,
            GATE_DIM,
            HAS_EARLIER,
            KEEP_FINAL,
        )

        # -- back through the residual --------------------------------------------------------------------------------
        b_r_bar = tl.where(m_d[None, :], get(rows, R_BAR, BD, C, BD), 0.0)
        if KEEP_FINAL:
            b_r_bar += tl.load(gradients_bar + p_e, mask=m_fd, other=0.0)
        if HAS_EARLIER:
            tl.store(earlier_gradients_bar + p_e, b_r_bar, mask=m_ed)
            b_r_bar = tl.where(m_e[:, None], 0.0, b_r_bar)
        b_error = get(rows, ERROR, BD, C, BD)
        b_delta = b_error
        if DELTA_DIM == 1:
            b_delta = tl.load(delta + o_t, mask=m_t, other=0.0).to(tl.float32)[:, None]
        elif DELTA_DIM > 1:
            b_delta = tl.load(delta + p_td, mask=m_td, other=0.0).to(tl.float32)
        b_error_bar, b_delta_bar = residual_vjp(
            b_error, b_delta, b_r_bar, m_d, LOSS, POWER, SMOOTH_SIGN, SHARPNESS, ERROR_CAP, CLIP
        )
        # read as R_BAR by these threads, as tiles by others
        tl.debug_barrier()
        put(rows, R_BAR, b_error_bar, C, BD)
        b_raw = tl.load(v + p_td, mask=m_td, other=0.0).to(tl.float32)
        b_v_bar = tl.where(tl.abs(b_raw) > VALUE_CAP, 0.0, -b_error_bar)
        tl.store(v_bar + p_td, b_v_bar.to(v_bar.dtype.element_ty), mask=m_td)
        if DELTA_DIM == 1:
            b_bar = tl.sum(tl.where(m_d[None, :], b_delta_bar, 0.0), 1)
            if LOSS != HUBER_COORDINATE:
                b_bar = b_bar / D  # the loss has one threshold a head, and its adjoint stands in every channel
            tl.store(delta_bar + o_t, b_bar, mask=m_t)
        elif DELTA_DIM > 1:
            tl.store(delta_bar + p_td, b_delta_bar, mask=m_td)

        # -- write back -----------------------------------------------------------------------------------------------
        k_operand = operand(b_k, PRECISION)
        tl.debug_barrier()
        b_k_bar = tl.zeros([C, BD], dtype=tl.float32)
        inner = tl.zeros([BD], dtype=tl.float32)
        for j in range(0, TILES):
            o_n, m_n, _, _ = tile_of_state(j, D, BD, TN)
            b_state, b_base, b_dual = load_dual(saved + slot, base, o_n, m_n, TOWARD_INIT)
            b_w = tl.where(m_n, linked(b_dual, scale, top, total, MASS, 0.0, 1, LINK, Q), 0.0)
            error_bar_tile = get_tile(rows, R_BAR, j, D, C, BD, TN)
            b_k_bar += product(error_bar_tile, tl.trans(b_w), PRECISION)
            b_w_bar = product(tl.trans(held(rows, K, k_operand, BD, C, BD, STREAM)), error_bar_tile, PRECISION)
            if not LINEAR:
                b_w_bar += tl.load(weight_bar + o_n, mask=m_n, other=0.0)
            if LINK == KL:
                inner += tl.sum(b_w_bar * b_w, 1) / MASS
            elif LINK == LQ_MIRROR:
                scale_bar += tl.sum(b_w_bar * b_dual * power(tl.abs(b_dual), Q - 2.0))
            else:
                scale_bar += tl.sum(b_w_bar * b_dual)
            tl.debug_barrier()
            tl.store(weight_bar + o_n, b_w_bar, mask=m_n)
        tl.debug_barrier()
        b_k_bar += get(rows, K_BAR, BD, C, BD)
        if KEEP_FINAL:
            b_k_bar += tl.load(inputs_bar + p_e, mask=m_fd, other=0.0)
        if HAS_EARLIER:
            tl.store(earlier_inputs_bar + p_e, b_k_bar, mask=m_ed)
        b_raw = tl.load(k + p_td, mask=m_td, other=0.0).to(tl.float32)
        b_k_bar = tl.where(tl.abs(b_raw) > KEY_CAP, 0.0, b_k_bar)
        tl.store(k_bar + p_td, b_k_bar.to(k_bar.dtype.element_ty), mask=m_td)

        # -- link -----------------------------------------------------------------------------------------------------
        slope_mean_bar = 0.0
        if LINK == LQ_MIRROR:
            of_scale, slope_mean_bar = slope_bars(slope_gain_bar, slope_gain, mean_slope, Q)
            scale_bar += of_scale
        if LINK != KL:
            first, second = frozen_scale_rates(squares, powers, 1.0 * D * D, scale_bar, LINK, Q, FLOOR, CAP)
        largest = 0.0
        for j in range(0, TILES):
            o_n, m_n, channels, m_channels = tile_of_state(j, D, BD, TN)
            b_state, b_base, b_dual = load_dual(saved + slot, base, o_n, m_n, TOWARD_INIT)
            b_w_bar = tl.load(weight_bar + o_n, mask=m_n, other=0.0)
            if LINK == KL:
                b_w = tl.where(m_n, linked(b_dual, scale, top, total, MASS, 0.0, 1, LINK, Q), 0.0)
                b_dual_bar = (b_w_bar - inner[:, None]) * b_w
            elif LINK == LQ_MIRROR:
                of_channels = tl.load(slope_bar + channels, mask=m_channels, other=0.0) / D + slope_mean_bar / (D * D)
                b_slope_bar = (key_slope_bar / D)[:, None] + of_channels[None, :]
                b_dual_bar = mirror_vjp(b_dual, b_w_bar, b_slope_bar, scale, first, second, Q)
            else:
                b_dual_bar = b_w_bar * scale + first * b_dual
                if LINK == LQ:
                    b_dual_bar += second * power(tl.abs(b_dual), Q - 2.0) * b_dual
            b_state_bar = tl.load(state_bar + o_n, mask=m_n, other=0.0) + b_dual_bar
            largest = tl.maximum(largest, tl.max(tl.abs(b_state_bar)))
            tl.debug_barrier()
            tl.store(state_bar + o_n, b_state_bar, mask=m_n)
            if TOWARD_INIT:
                b_base_bar = tl.load(base_bar + o_n, mask=m_n, other=0.0) + b_dual_bar
                tl.store(base_bar + o_n, b_base_bar, mask=m_n)
        tl.debug_barrier()

    if LINK == LQ_MIRROR:
        if TOWARD_INIT:
            # the initial memory's image, which stands in the reads of all chunks
            scale_bar = 0.0
            for j in range(0, TILES):
                o_n, m_n, _, _ = tile_of_state(j, D, BD, TN)
                b_base = tl.load(base + o_n, mask=m_n, other=0.0).to(tl.float32)
                b_w_bar = tl.load(constant_bar + o_n, mask=m_n, other=0.0)
                scale_bar += tl.sum(b_w_bar * b_base * power(tl.abs(b_base), Q - 2.0))
            first, second = frozen_scale_rates(base_sums[0], base_sums[1], 1.0 * D * D, scale_bar, LINK, Q, FLOOR, CAP)
            for j in range(0, TILES):
                o_n, m_n, _, _ = tile_of_state(j, D, BD, TN)
                b_base = tl.load(base + o_n, mask=m_n, other=0.0).to(tl.float32)
                b_w_bar = tl.load(constant_bar + o_n, mask=m_n, other=0.0)
                b_base_bar = tl.load(base_bar + o_n, mask=m_n, other=0.0)
                b_base_bar += mirror_vjp(b_base, b_w_bar, 0.0, base_scale, first, second, Q)
                tl.store(base_bar + o_n, b_base_bar, mask=m_n)
