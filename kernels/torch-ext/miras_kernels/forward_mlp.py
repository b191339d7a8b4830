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
"""The forward pass of an MLP memory, `M(W; x) = x + LN(gelu(x W1) W2)`: one program per sequence and head.

A program reads its sequence chunk by chunk. The dual state does not fit into registers, so the hidden units go by in
tiles of `TN` whose part of the state streams from global memory (it stays in L2), twice in a chunk:

    first pass    Z1_j = K W1_j,  Z2 += gelu(Z1_j) W2_j
    between       residual, layer norm's backward: dZ2;  P = mask(Q~ K~^T)
    second pass   dZ1_j, Z1q_j, the read's hidden units, S += Hq_j H_j^T, the tile's fold into the state
    after         Z2q from S and the tiles' sums;  y = q + LN(Z2q)

Only Z2, S and sums of the read cross tiles. What a link needs of a whole weight (a norm, a log-sum-exp) is summed while
the tiles are folded, for the next chunk.
"""

import triton
import triton.language as tl

from .pieces import (
    DECAY,
    KEY_CAP,
    KL,
    LQ_MIRROR,
    SHARED_NUMBERS,
    VALUE_CAP,
    bounded,
    chunk_gates,
    first_broken,
    frozen_scale,
    gelu,
    gelu_and_slope,
    inverse_of_mean,
    load_gates,
    normalise,
    normalise_vjp,
    operand,
    power,
    product,
    residual,
)


@triton.jit
def sum_of_dual(dual, mask, sums, AXIS: tl.constexpr, LINK: tl.constexpr, Q: tl.constexpr):
    # adds a tile of a dual state, AXIS its hidden one, to what the link needs of the whole weight
    squares, powers, first, second = sums
    if LINK == KL:
        # running maximum and sum of exponentials along the hidden axis
        top = tl.maximum(first, tl.max(tl.where(mask, dual, -1.0e30), AXIS))
        exponentials = tl.exp(dual - (top[:, None] if AXIS == 1 else top[None, :]))
        second = second * tl.exp(first - top) + tl.sum(tl.where(mask, exponentials, 0.0), AXIS)
        first = top
    elif LINK == DECAY:
        squares += tl.sum(dual * dual)
    else:
        powered = power(tl.abs(dual), Q - 2.0)
        powers += tl.sum(powered * dual * dual)
        if LINK == LQ_MIRROR:
            # of the mirror map itself, whose cap it is; and the slope's sums over the hidden axis
            dual = dual * powered
            first += tl.sum(tl.where(mask, powered, 0.0), AXIS)
        squares += tl.sum(dual * dual)
    return squares, powers, first, second


@triton.jit
def sum_of_link(dual1, dual2, m1, m2, sums, LINK: tl.constexpr, Q: tl.constexpr):
    # of a tile of both duals, [BD, TN] and [TN, BD]
    a1, p1, x1, y1, a2, p2, x2, y2 = sums
    a1, p1, x1, y1 = sum_of_dual(dual1, m1, (a1, p1, x1, y1), 1, LINK, Q)
    a2, p2, x2, y2 = sum_of_dual(dual2, m2, (a2, p2, x2, y2), 0, LINK, Q)
    return a1, p1, x1, y1, a2, p2, x2, y2


@triton.jit
def start_of_sums(BD: tl.constexpr, LINK: tl.constexpr):
    zeros = tl.zeros([BD], dtype=tl.float32)
    first = zeros
    if LINK == KL:
        first = zeros - 1.0e30
    return 0.0, 0.0, first, zeros, 0.0, 0.0, first, zeros


@triton.jit
def linked(dual, scale, top, total, mass, uniform, AXIS: tl.constexpr, LINK: tl.constexpr, Q: tl.constexpr):
    # a tile of W = phi(A); `top` and `total` lie along the axis that is not AXIS, the hidden one
    if LINK == KL:
        log_sum = top + tl.log(total)
        if AXIS == 1:
            return mass * tl.exp(dual - log_sum[:, None])
        else:
            # Less the uniform part, which adds the same to all channels: the layer norm takes that out, in the forward
            # and in the backward, but rounding would leave a trace of it.
            return mass * tl.exp(dual - log_sum[None, :]) - uniform
    elif LINK == LQ_MIRROR:
        return scale * dual * power(tl.abs(dual), Q - 2.0)
    else:
        return scale * dual


@triton.jit(do_not_specialize=["LONGEST", "H"])
def mlp_forward_kernel(
    q,
    k,
    v,
    eta,
    log_alpha,
    delta,
    y,
    base1,
    base2,
    norm_weight,
    norm_bias,
    dual1,
    dual2,
    earlier_inputs1,
    earlier_inputs2,
    earlier_gradients1,
    earlier_gradients2,
    earlier_eta,
    earlier_log_decay,
    phases,
    inputs1,
    inputs2,
    gradients1,
    gradients2,
    final_eta,
    final_log_decay,
    starts,
    lengths,
    order,
    hidden,
    saved1,
    saved2,
    saved_of_row,
    LONGEST,
    H,
    MIN_LOG_ALPHA,
    MASS1,
    MASS2,
    C: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    N: tl.constexpr,
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
    NORM_EPS: tl.constexpr,
    TOWARD_INIT: tl.constexpr,
    HAS_EARLIER: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    KEEP_FINAL: tl.constexpr,
    SAVE_EVERY: tl.constexpr,
    PRECISION: tl.constexpr,
    THREADS: tl.constexpr,
):
    tl.static_assert(C * TN >= THREADS, SHARED_NUMBERS)
    tl.static_assert(BD * TN >= THREADS, SHARED_NUMBERS)
    program = tl.program_id(0).to(tl.int64)
    row, head = program // H, program % H
    start = tl.load(starts + row).to(tl.int64)
    length = tl.load(lengths + row).to(tl.int32)
    phase = 0
    if HAS_EARLIER:
        phase = tl.load(phases + row).to(tl.int32)
    chunks = tl.cdiv(phase + length, C)
    taken = (phase + length) % C

    o_c, o_d, o_n = tl.arange(0, C), tl.arange(0, BD), tl.arange(0, TN)
    m_d = o_d < D
    # [C, C]: token t of the rows sees the writes of the columns i <= t
    m_causal = o_c[:, None] >= o_c[None, :]
    b_gamma = tl.load(norm_weight + head * D + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_beta = tl.load(norm_bias + head * D + o_d, mask=m_d, other=0.0).to(tl.float32)

    base1 += head * D * N
    base2 += head * D * N
    dual1 += program * D * N
    dual2 += program * D * N
    hidden += program * C * N
    TILES: tl.constexpr = (N + TN - 1) // TN

    # what the link needs of the whole weights at the first chunk's start, and of the base's
    sums = start_of_sums(BD, LINK)
    base_sums = start_of_sums(BD, LINK)
    for j in range(0, TILES):
        o_h = j * TN + o_n
        o_1, m_1 = o_d[:, None] * N + o_h[None, :], m_d[:, None] & (o_h < N)[None, :]
        o_2, m_2 = o_h[:, None] * D + o_d[None, :], (o_h < N)[:, None] & m_d[None, :]
        b_dual1 = tl.load(dual1 + o_1, mask=m_1, other=0.0)
        b_dual2 = tl.load(dual2 + o_2, mask=m_2, other=0.0)
        if TOWARD_INIT:
            b_base1 = tl.load(base1 + o_1, mask=m_1, other=0.0).to(tl.float32)
            b_base2 = tl.load(base2 + o_2, mask=m_2, other=0.0).to(tl.float32)
            if LINK == LQ_MIRROR:
                base_sums = sum_of_link(b_base1, b_base2, m_1, m_2, base_sums, LINK, Q)
            b_dual1 += b_base1
            b_dual2 += b_base2
        sums = sum_of_link(b_dual1, b_dual2, m_1, m_2, sums, LINK, Q)
    base_scale1 = frozen_scale(base_sums[0], base_sums[1], 1.0 * D * N, LINK, Q, FLOOR, CAP)
    base_scale2 = frozen_scale(base_sums[4], base_sums[5], 1.0 * D * N, LINK, Q, FLOOR, CAP)

    for i_c in range(0, chunks):
        # -- the chunk's tokens ---------------------------------------------------------------------------------------
        o_t = i_c * C + o_c - phase
        m_t = (o_t >= 0) & (o_t < length)
        if HAS_ORDER:
            o_t = tl.load(order + row * LONGEST + o_t, mask=m_t, other=0)
        o_t = ((start + o_t) * H + head).to(tl.int64)
        m_td = m_t[:, None] & m_d[None, :]
        p_td = o_t[:, None] * D + o_d[None, :]
        b_k = tl.load(k + p_td, mask=m_td, other=0.0).to(tl.float32)
        broken = first_broken(b_k, v, eta, log_alpha, delta, o_t, m_t, C, D, BD, GATE_DIM, DELTA_DIM)
        if broken < C:
            b_nan = tl.full([C, BD], float("nan"), tl.float32)
            tl.store(y + p_td, b_nan.to(y.dtype.element_ty), mask=m_td & (o_c >= broken)[:, None])
        m_t = m_t & (o_c < broken)
        m_td = m_t[:, None] & m_d[None, :]
        b_k = bounded(tl.where(m_td, b_k, 0.0), KEY_CAP)

        # slots that the state has filled, of a chunk that was begun before this call
        m_e = (o_c < phase) & (i_c == 0)
        m_ed = m_e[:, None] & m_d[None, :]
        p_e = program * C * D + o_c[:, None] * D + o_d[None, :]
        if HAS_EARLIER:
            b_k = tl.where(m_e[:, None], tl.load(earlier_inputs1 + p_e, mask=m_ed, other=0.0), b_k)
        b_k_operand = operand(b_k, PRECISION)

        # -- the links at the chunk's start -----------------------------------------------------------------------------
        a1, p1, x1, y1, a2, p2, x2, y2 = sums
        scale1 = frozen_scale(a1, p1, 1.0 * D * N, LINK, Q, FLOOR, CAP)
        scale2 = frozen_scale(a2, p2, 1.0 * D * N, LINK, Q, FLOOR, CAP)

        # -- first pass: the write's forward ----------------------------------------------------------------------------
        b_z2 = tl.zeros([C, BD], dtype=tl.float32)
        hidden_sum = tl.zeros([C], dtype=tl.float32)
        for j in range(0, TILES):
            o_h = j * TN + o_n
            o_1, m_1 = o_d[:, None] * N + o_h[None, :], m_d[:, None] & (o_h < N)[None, :]
            o_2, m_2 = o_h[:, None] * D + o_d[None, :], (o_h < N)[:, None] & m_d[None, :]
            b_w1 = tl.load(dual1 + o_1, mask=m_1, other=0.0)
            b_w2 = tl.load(dual2 + o_2, mask=m_2, other=0.0)
            if SAVE_EVERY > 0:
                if i_c % SAVE_EVERY == 0:
                    slot = ((tl.load(saved_of_row + row) + i_c // SAVE_EVERY) * H + head).to(tl.int64) * D * N
                    tl.store(saved1 + slot + o_1, b_w1, mask=m_1)
                    tl.store(saved2 + slot + o_2, b_w2, mask=m_2)
            if TOWARD_INIT:
                b_w1 += tl.load(base1 + o_1, mask=m_1, other=0.0).to(tl.float32)
                b_w2 += tl.load(base2 + o_2, mask=m_2, other=0.0).to(tl.float32)
            b_w1 = tl.where(m_1, linked(b_w1, scale1, x1, y1, MASS1, 0.0, 1, LINK, Q), 0.0)
            b_w2 = tl.where(m_2, linked(b_w2, scale2, x2, y2, MASS2, MASS2 / N, 0, LINK, Q), 0.0)
            b_z1 = product(b_k_operand, b_w1, PRECISION)
            o_ch, m_ch = o_c[:, None] * N + o_h[None, :], (o_h < N)[None, :] & (o_c >= 0)[:, None]
            tl.store(hidden + o_ch, b_z1, mask=m_ch)
            b_h = gelu(b_z1)
            b_z2 += product(b_h, b_w2, PRECISION)
            if LINK == KL:
                if HAS_EARLIER:
                    p_eh = earlier_inputs2 + program * C * N + o_ch
                    b_h = tl.where(m_e[:, None], tl.load(p_eh, mask=m_ch & m_e[:, None], other=0.0), b_h)
                hidden_sum += tl.sum(b_h, 1)
        # threads read what others of this program have written
        tl.debug_barrier()

        # -- the residual and its way back through the layer norm ---------------------------------------------------------
        b_normed, inverse_std = normalise(b_z2, m_d, D, NORM_EPS)
        b_v = tl.load(v + p_td, mask=m_td, other=0.0).to(tl.float32)
        b_v = bounded(b_v, VALUE_CAP)
        b_error = b_k + (b_beta[None, :] + b_normed * b_gamma[None, :]) - b_v
        b_delta = b_error
        if DELTA_DIM == 1:
            b_delta = tl.load(delta + o_t, mask=m_t, other=0.0).to(tl.float32)[:, None]
        elif DELTA_DIM > 1:
            b_delta = tl.load(delta + p_td, mask=m_td, other=0.0).to(tl.float32)
        b_r = residual(b_error, b_delta, m_d, LOSS, POWER, SMOOTH_SIGN, SHARPNESS, ERROR_CAP, CLIP)
        b_dz2 = normalise_vjp(b_r * b_gamma[None, :], b_normed, inverse_std, m_d, D)
        if HAS_EARLIER:
            b_dz2 = tl.where(m_e[:, None], tl.load(earlier_gradients2 + p_e, mask=m_ed, other=0.0), b_dz2)

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
        b_total = tl.where(broken < C, float("nan"), b_total)

        # -- what the read sees of the writes, on the input axis -----------------------------------------------------------
        b_q = tl.load(q + p_td, mask=m_td, other=0.0).to(tl.float32)
        b_q = bounded(b_q, KEY_CAP)
        b_x = b_q
        b_keys = b_k * b_gk
        if LINK != KL and LINK != LQ_MIRROR:
            b_x = b_q * scale1
        if LINK == LQ_MIRROR:
            # the slope's best rank-one factorisation: row means times column means over the mean
            b_keys = b_keys * (x1 / N)[None, :]
        b_p = product(b_x * b_gq, tl.trans(b_keys), PRECISION)
        b_p = operand(tl.where(m_causal, -b_p, 0.0), PRECISION)
        b_dz2_operand = operand(b_dz2, PRECISION)
        b_dz2_fold = operand(b_dz2 * b_fold, PRECISION)
        b_values = operand(b_dz2 * b_gk, PRECISION)
        b_into = operand(tl.trans(b_k * b_fold), PRECISION)
        b_x_decayed = operand(b_x * b_decay, PRECISION)
        b_x = operand(b_x, PRECISION)
        if KEEP_FINAL:
            if (i_c == chunks - 1) & (taken > 0):
                m_f = (o_c < taken)[:, None] & m_d[None, :]
                tl.store(inputs1 + p_e, b_k, mask=m_f)
                tl.store(gradients2 + p_e, b_dz2, mask=m_f)
                p_g = program * C * GATE_DIM + o_c[:, None] * GATE_DIM + o_d[None, :]
                if GATE_DIM == 1:
                    m_f = m_f & (o_d == 0)[None, :]
                tl.store(final_eta + p_g, b_eta, mask=m_f)
                # the decay up to now stands in everything that is read from here on
                b_log_decay = tl.where((o_c >= broken)[:, None], float("nan"), b_log_decay)
                tl.store(final_log_decay + p_g, b_log_decay, mask=m_f)

        gradient_mean = tl.zeros([C], dtype=tl.float32)
        if LINK == KL:
            # the softmax's slope centres gradients over the hidden axis: their mean is needed before the tiles' reads
            for j in range(0, TILES):
                o_h = j * TN + o_n
                o_2, m_2 = o_h[:, None] * D + o_d[None, :], (o_h < N)[:, None] & m_d[None, :]
                o_ch, m_ch = o_c[:, None] * N + o_h[None, :], (o_h < N)[None, :] & (o_c >= 0)[:, None]
                b_w2 = tl.load(dual2 + o_2, mask=m_2, other=0.0)
                if TOWARD_INIT:
                    b_w2 += tl.load(base2 + o_2, mask=m_2, other=0.0).to(tl.float32)
                b_w2 = tl.where(m_2, linked(b_w2, scale2, x2, y2, MASS2, MASS2 / N, 0, LINK, Q), 0.0)
                b_h, b_slope = gelu_and_slope(tl.load(hidden + o_ch, mask=m_ch, other=0.0))
                b_dz1 = product(b_dz2_operand, tl.trans(b_w2), PRECISION) * b_slope
                if HAS_EARLIER:
                    p_eh = earlier_gradients1 + program * C * N + o_ch
                    b_dz1 = tl.where(m_e[:, None], tl.load(p_eh, mask=m_ch & m_e[:, None], other=0.0), b_dz1)
                gradient_mean += tl.sum(b_dz1, 1) / N

        # -- second pass: the write's backward, the read, the fold --------------------------------------------------------
        is_partial = (i_c == chunks - 1) & (taken > 0)
        b_s = tl.zeros([C, C], dtype=tl.float32)
        b_kept = tl.zeros([C, BD], dtype=tl.float32)  # decays with B_t
        b_constant = tl.zeros([C, BD], dtype=tl.float32)
        read_sum = tl.zeros([C], dtype=tl.float32)
        sums = start_of_sums(BD, LINK)
        mean_slope1, mean_slope2 = tl.sum(x1) / (1.0 * D * N), tl.sum(x2) / (1.0 * D * N)
        for j in range(0, TILES):
            o_h = j * TN + o_n
            o_1, m_1 = o_d[:, None] * N + o_h[None, :], m_d[:, None] & (o_h < N)[None, :]
            o_2, m_2 = o_h[:, None] * D + o_d[None, :], (o_h < N)[:, None] & m_d[None, :]
            o_ch, m_ch = o_c[:, None] * N + o_h[None, :], (o_h < N)[None, :] & (o_c >= 0)[:, None]
            b_d1 = tl.load(dual1 + o_1, mask=m_1, other=0.0)
            b_d2 = tl.load(dual2 + o_2, mask=m_2, other=0.0)
            b_a1, b_a2 = b_d1, b_d2
            b_base1, b_base2 = b_d1, b_d2
            if TOWARD_INIT:
                b_base1 = tl.load(base1 + o_1, mask=m_1, other=0.0).to(tl.float32)
                b_base2 = tl.load(base2 + o_2, mask=m_2, other=0.0).to(tl.float32)
                b_a1 = b_base1 + b_d1
                b_a2 = b_base2 + b_d2
            b_w2 = tl.where(m_2, linked(b_a2, scale2, x2, y2, MASS2, MASS2 / N, 0, LINK, Q), 0.0)

            b_h, b_slope = gelu_and_slope(tl.load(hidden + o_ch, mask=m_ch, other=0.0))
            b_dz1 = product(b_dz2_operand, tl.trans(b_w2), PRECISION) * b_slope
            if HAS_EARLIER:
                m_eh, o_eh = m_ch & m_e[:, None], program * C * N + o_ch
                b_dz1 = tl.where(m_e[:, None], tl.load(earlier_gradients1 + o_eh, mask=m_eh, other=0.0), b_dz1)
                b_h = tl.where(m_e[:, None], tl.load(earlier_inputs2 + o_eh, mask=m_eh, other=0.0), b_h)

            # the first layer's read
            b_written = b_dz1
            if LINK == KL:
                b_written = tl.where(m_ch, (MASS1 / N) * (b_dz1 - gradient_mean[:, None]), 0.0)
            if LINK == LQ_MIRROR:
                slope_of_columns = tl.sum(power(tl.abs(b_a1), Q - 2.0), 0) / D
                slope_of_columns = slope_of_columns * inverse_of_mean(mean_slope1)
                b_written = b_dz1 * ((Q - 1.0) * scale1 * slope_of_columns)[None, :]
            b_z1 = product(b_p, b_written, PRECISION)
            if LINK == KL:
                b_w1 = tl.where(m_1, linked(b_a1, scale1, x1, y1, MASS1, 0.0, 1, LINK, Q), 0.0)
                b_z1 += product(b_x, b_w1, PRECISION)
            elif LINK == LQ_MIRROR:
                b_w1 = linked(b_a1, scale1, x1, y1, MASS1, 0.0, 1, LINK, Q)
                if TOWARD_INIT:
                    b_b1 = linked(b_base1, base_scale1, x1, y1, MASS1, 0.0, 1, LINK, Q)
                    b_z1 += product(b_x_decayed, b_w1 - b_b1, PRECISION) + product(b_x, b_b1, PRECISION)
                else:
                    b_z1 += product(b_x_decayed, b_w1, PRECISION)
            else:
                b_z1 += product(b_x_decayed, b_d1, PRECISION)
                if TOWARD_INIT:
                    b_z1 += product(b_x, b_base1, PRECISION)
            b_hq = gelu(b_z1)

            # the second layer's
            b_inputs = b_h
            if LINK == LQ_MIRROR:
                b_inputs = b_h * (tl.sum(power(tl.abs(b_a2), Q - 2.0), 1) / D)[None, :]
            b_s += product(b_hq, tl.trans(b_inputs), PRECISION)
            if LINK == KL:
                read_sum += tl.sum(b_hq, 1)
                b_constant += product(b_hq, b_w2, PRECISION)
            elif LINK == LQ_MIRROR:
                if TOWARD_INIT:
                    b_b2 = linked(b_base2, base_scale2, x2, y2, MASS2, MASS2 / N, 0, LINK, Q)
                    b_kept += product(b_hq, b_w2 - b_b2, PRECISION)
                    b_constant += product(b_hq, b_b2, PRECISION)
                else:
                    b_kept += product(b_hq, b_w2, PRECISION)
            else:
                b_kept += product(b_hq, b_d2, PRECISION)
                if TOWARD_INIT:
                    b_constant += product(b_hq, b_base2, PRECISION)

            # the fold, or the begun chunk's factors
            if is_partial:
                if KEEP_FINAL:
                    m_f = m_ch & (o_c < taken)[:, None]
                    tl.store(inputs2 + program * C * N + o_ch, b_h, mask=m_f)
                    tl.store(gradients1 + program * C * N + o_ch, b_dz1, mask=m_f)
            else:
                b_d1 = b_d1 * b_total[:, None] - product(b_into, b_dz1, PRECISION)
                b_d2 = b_d2 * b_total[None, :] - product(tl.trans(b_h), b_dz2_fold, PRECISION)
                tl.store(dual1 + o_1, b_d1, mask=m_1)
                tl.store(dual2 + o_2, b_d2, mask=m_2)
                b_a1, b_a2 = b_d1, b_d2
                if TOWARD_INIT:
                    b_a1 = b_base1 + b_d1
                    b_a2 = b_base2 + b_d2
                sums = sum_of_link(b_a1, b_a2, m_1, m_2, sums, LINK, Q)
        tl.debug_barrier()

        # -- the read's second layer, its norm, the output ----------------------------------------------------------------
        # gates and queries are read again: keeping them through the tiles would cost registers
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
        b_decay, b_gq, b_gk, b_fold, b_end = chunk_gates(b_eta, b_log_decay, total_log_decay)
        if PRECISION == "ieee":
            # the same again: in float32 and through the tiles it would not fit into shared memory beside the others
            b_values = b_dz2 * b_gk
        if LINK == KL:
            b_s = (MASS2 / N) * (b_s - read_sum[:, None] * (hidden_sum / N)[None, :])
        b_s = tl.where(m_causal, -b_s, 0.0)
        b_z2 = product(b_s, b_values, PRECISION) * b_gq
        if LINK == LQ_MIRROR:
            b_z2 = b_z2 * ((Q - 1.0) * scale2 * (x2 / N * inverse_of_mean(mean_slope2)))[None, :]
        b_z2 += b_kept * b_decay + b_constant
        if LINK != KL and LINK != LQ_MIRROR:
            b_z2 = b_z2 * scale2
        b_normed, inverse_std = normalise(b_z2, m_d, D, NORM_EPS)
        b_q = tl.load(q + p_td, mask=m_td, other=0.0).to(tl.float32)
        b_q = bounded(b_q, KEY_CAP)
        b_y = b_q + (b_beta[None, :] + b_normed * b_gamma[None, :])
        tl.store(y + p_td, b_y.to(y.dtype.element_ty), mask=m_td)
