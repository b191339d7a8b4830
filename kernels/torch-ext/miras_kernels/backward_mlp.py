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
"""The backward pass of an MLP memory: one program per sequence and head goes back over its chunks.

Chunk starts come from the forward pass; everything else of a chunk is computed again. The derivation is in README.md;
`x_bar` is the adjoint of x. Tiles of hidden units go by as in the forward pass, and what crosses them decides the passes:

    sums        what the link needs of the whole weights
    write       Z1, Z2; the residual, dZ2
    read        Z1q, S, Z2q; then the adjoint of the output's norm
    back        the read's and the fold's adjoints, tile by tile: those of dZ1, H, P, x and, summed over tiles, dZ2
    middle      the adjoint of the layer norm's backward and of the residual
    write back  Z1_bar, the adjoints of the weights
    link        the adjoint of W = phi(A), which needs a sum over the whole weight

Nothing is added atomically: sums over sequences are left to the caller, in fixed order.
"""

import triton
import triton.language as tl

from .forward_mlp import linked, start_of_sums, sum_of_link
from .pieces import (
    HUBER_COORDINATE,
    KEY_CAP,
    KL,
    LARGEST_STATE_ADJOINT,
    LQ,
    VALUE_CAP,
    chunk_gates,
    frozen_scale,
    frozen_scale_rates,
    gelu,
    gelu_and_slope,
    gelu_slope_curvature,
    load_gates,
    normalise,
    normalise_vjp,
    operand,
    power,
    product,
    residual,
    residual_vjp,
    store_gate_bars,
)


@triton.jit
def tile_offsets(j, C: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, N: tl.constexpr, TN: tl.constexpr):
    # offsets and masks of tile j in W1 [BD, TN], in W2 [TN, BD] and in activations [C, TN]
    o_c, o_d, o_h = tl.arange(0, C), tl.arange(0, BD), j * TN + tl.arange(0, TN)
    m_d, m_h = o_d < D, o_h < N
    o_1, m_1 = o_d[:, None] * N + o_h[None, :], m_d[:, None] & m_h[None, :]
    o_2, m_2 = o_h[:, None] * D + o_d[None, :], m_h[:, None] & m_d[None, :]
    return o_1, m_1, o_2, m_2, o_c[:, None] * N + o_h[None, :], m_h[None, :] & (o_c >= 0)[:, None]


@triton.jit
def load_dual(state, base, offsets, mask, TOWARD_INIT: tl.constexpr):
    # the decaying state, what it deviates from, and the dual state itself
    b_state = tl.load(state + offsets, mask=mask, other=0.0)
    b_base, b_dual = b_state, b_state
    if TOWARD_INIT:
        b_base = tl.load(base + offsets, mask=mask, other=0.0).to(tl.float32)
        b_dual = b_base + b_state
    return b_state, b_base, b_dual


@triton.jit(do_not_specialize=["LONGEST"])
def mlp_backward_kernel(
    q,
    k,
    v,
    eta,
    log_alpha,
    delta,
    y_bar,
    base1,
    base2,
    norm_weight,
    norm_bias,
    saved1,
    saved2,
    saved_of_row,
    q_bar,
    k_bar,
    v_bar,
    eta_bar,
    log_alpha_bar,
    delta_bar,
    state_bar1,
    state_bar2,
    base_bar1,
    base_bar2,
    norm_weight_bar,
    norm_bias_bar,
    earlier_inputs1,
    earlier_inputs2,
    earlier_gradients1,
    earlier_gradients2,
    earlier_eta,
    earlier_log_decay,
    phases,
    earlier_inputs1_bar,
    earlier_inputs2_bar,
    earlier_gradients1_bar,
    earlier_gradients2_bar,
    earlier_eta_bar,
    earlier_log_decay_bar,
    inputs1_bar,
    inputs2_bar,
    gradients1_bar,
    gradients2_bar,
    final_eta_bar,
    final_log_decay_bar,
    starts,
    lengths,
    order,
    hidden,
    read_hidden,
    kept_hidden,
    weight_bar1,
    weight_bar2,
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
    PRECISION: tl.constexpr,
):
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
    b_gamma = tl.load(norm_weight + head * D + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_beta = tl.load(norm_bias + head * D + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_gamma_bar = tl.zeros([BD], dtype=tl.float32)
    b_beta_bar = tl.zeros([BD], dtype=tl.float32)

    base1 += head * D * N
    base2 += head * D * N
    state_bar1 += program * D * N
    state_bar2 += program * D * N
    base_bar1 += program * D * N
    base_bar2 += program * D * N
    weight_bar1 += program * D * N
    weight_bar2 += program * D * N
    hidden += program * C * N
    read_hidden += program * C * N
    kept_hidden += program * C * N
    TILES: tl.constexpr = (N + TN - 1) // TN
    # the largest entries of the state's adjoint, which bound it
    largest1, largest2 = 0.0, 0.0

    for i in range(0, chunks):
        i_c = chunks - 1 - i
        slot = ((first_slot + i_c) * H + head).to(tl.int64) * D * N
        bound1 = LARGEST_STATE_ADJOINT / tl.maximum(largest1, LARGEST_STATE_ADJOINT)
        bound2 = LARGEST_STATE_ADJOINT / tl.maximum(largest2, LARGEST_STATE_ADJOINT)

        # -- the chunk's tokens, gates and links ----------------------------------------------------------------------
        o_t = i_c * C + o_c - phase
        m_t = (o_t >= 0) & (o_t < length)
        if HAS_ORDER:
            o_t = tl.load(order + row * LONGEST + o_t, mask=m_t, other=0)
        o_t = ((start + o_t) * H + head).to(tl.int64)
        m_td = m_t[:, None] & m_d[None, :]
        p_td = o_t[:, None] * D + o_d[None, :]
        b_k = tl.load(k + p_td, mask=m_td, other=0.0).to(tl.float32)
        b_k = tl.minimum(tl.maximum(b_k, -KEY_CAP), KEY_CAP)
        # slots that the state has filled, and those that the final state has taken: of chunks that calls share
        m_e = o_c < tl.where(i_c == 0, phase, 0)
        m_ed = m_e[:, None] & m_d[None, :]
        is_partial = (i_c == chunks - 1) & (taken > 0)
        m_f = o_c < tl.where(is_partial, taken, 0)
        m_fd = m_f[:, None] & m_d[None, :]
        p_e = program * C * D + o_c[:, None] * D + o_d[None, :]
        if HAS_EARLIER:
            b_k = tl.where(m_e[:, None], tl.load(earlier_inputs1 + p_e, mask=m_ed, other=0.0), b_k)
        b_q = tl.load(q + p_td, mask=m_td, other=0.0).to(tl.float32)
        b_q = tl.minimum(tl.maximum(b_q, -KEY_CAP), KEY_CAP)
        b_v = tl.load(v + p_td, mask=m_td, other=0.0).to(tl.float32)
        b_v = tl.minimum(tl.maximum(b_v, -VALUE_CAP), VALUE_CAP)
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

        sums = start_of_sums(BD, LINK)
        for j in range(0, TILES):
            o_1, m_1, o_2, m_2, o_ch, m_ch = tile_offsets(j, C, D, BD, N, TN)
            b_d1, b_base1, b_a1 = load_dual(saved1 + slot, base1, o_1, m_1, TOWARD_INIT)
            b_d2, b_base2, b_a2 = load_dual(saved2 + slot, base2, o_2, m_2, TOWARD_INIT)
            sums = sum_of_link(b_a1, b_a2, m_1, m_2, sums, LINK, Q)
        a1, p1, x1, y1, a2, p2, x2, y2 = sums
        scale1 = frozen_scale(a1, p1, 1.0 * D * N, LINK, Q, FLOOR, CAP)
        scale2 = frozen_scale(a2, p2, 1.0 * D * N, LINK, Q, FLOOR, CAP)

        # -- write ----------------------------------------------------------------------------------------------------
        b_z2 = tl.zeros([C, BD], dtype=tl.float32)
        k_operand = operand(b_k, PRECISION)
        hidden_mean = tl.zeros([C], dtype=tl.float32)
        for j in range(0, TILES):
            o_1, m_1, o_2, m_2, o_ch, m_ch = tile_offsets(j, C, D, BD, N, TN)
            b_d1, b_base1, b_a1 = load_dual(saved1 + slot, base1, o_1, m_1, TOWARD_INIT)
            b_d2, b_base2, b_a2 = load_dual(saved2 + slot, base2, o_2, m_2, TOWARD_INIT)
            b_w1 = tl.where(m_1, linked(b_a1, scale1, x1, y1, MASS1, 0.0, 1, LINK, Q), 0.0)
            b_w2 = tl.where(m_2, linked(b_a2, scale2, x2, y2, MASS2, MASS2 / N, 0, LINK, Q), 0.0)
            b_z1 = product(k_operand, b_w1, PRECISION)
            tl.store(hidden + o_ch, b_z1, mask=m_ch)
            b_h = gelu(b_z1)
            b_z2 += product(b_h, b_w2, PRECISION)
            if HAS_EARLIER:
                p_eh = earlier_inputs2 + program * C * N + o_ch
                b_h = tl.where(m_e[:, None], tl.load(p_eh, mask=m_ch & m_e[:, None], other=0.0), b_h)
            hidden_mean += tl.sum(b_h, 1) / N
        tl.debug_barrier()
        b_normed, inverse_std = normalise(b_z2, m_d, D, NORM_EPS)
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

        # -- read -----------------------------------------------------------------------------------------------------
        b_x = b_q
        if LINK != KL:
            b_x = b_q * scale1
        b_p = product(b_x * b_gq, tl.trans(b_k * b_gk), PRECISION)
        b_p = tl.where(m_causal, -b_p, 0.0)
        gradient_mean = tl.zeros([C], dtype=tl.float32)
        if LINK == KL:
            for j in range(0, TILES):
                o_1, m_1, o_2, m_2, o_ch, m_ch = tile_offsets(j, C, D, BD, N, TN)
                b_d1, b_base1, b_a1 = load_dual(saved1 + slot, base1, o_1, m_1, TOWARD_INIT)
                b_d2, b_base2, b_a2 = load_dual(saved2 + slot, base2, o_2, m_2, TOWARD_INIT)
                b_w2 = tl.where(m_2, linked(b_a2, scale2, x2, y2, MASS2, MASS2 / N, 0, LINK, Q), 0.0)
                _, b_slope = gelu_and_slope(tl.load(hidden + o_ch, mask=m_ch, other=0.0))
                b_dz1 = product(b_dz2, tl.trans(b_w2), PRECISION) * b_slope
                if HAS_EARLIER:
                    p_eh = earlier_gradients1 + program * C * N + o_ch
                    b_dz1 = tl.where(m_e[:, None], tl.load(p_eh, mask=m_ch & m_e[:, None], other=0.0), b_dz1)
                gradient_mean += tl.sum(b_dz1, 1) / N
        p_operand, dz2_operand = operand(b_p, PRECISION), operand(b_dz2, PRECISION)
        x_operand, decayed_operand = operand(b_x, PRECISION), operand(b_x * b_decay, PRECISION)
        b_s = tl.zeros([C, C], dtype=tl.float32)
        b_kept = tl.zeros([C, BD], dtype=tl.float32)
        b_constant = tl.zeros([C, BD], dtype=tl.float32)
        read_mean = tl.zeros([C], dtype=tl.float32)
        for j in range(0, TILES):
            o_1, m_1, o_2, m_2, o_ch, m_ch = tile_offsets(j, C, D, BD, N, TN)
            b_d1, b_base1, b_a1 = load_dual(saved1 + slot, base1, o_1, m_1, TOWARD_INIT)
            b_d2, b_base2, b_a2 = load_dual(saved2 + slot, base2, o_2, m_2, TOWARD_INIT)
            b_w1 = tl.where(m_1, linked(b_a1, scale1, x1, y1, MASS1, 0.0, 1, LINK, Q), 0.0)
            b_w2 = tl.where(m_2, linked(b_a2, scale2, x2, y2, MASS2, MASS2 / N, 0, LINK, Q), 0.0)
            b_h, b_slope = gelu_and_slope(tl.load(hidden + o_ch, mask=m_ch, other=0.0))
            b_dz1 = product(dz2_operand, tl.trans(b_w2), PRECISION) * b_slope
            if HAS_EARLIER:
                m_eh, o_eh = m_ch & m_e[:, None], program * C * N + o_ch
                b_dz1 = tl.where(m_e[:, None], tl.load(earlier_gradients1 + o_eh, mask=m_eh, other=0.0), b_dz1)
                b_h = tl.where(m_e[:, None], tl.load(earlier_inputs2 + o_eh, mask=m_eh, other=0.0), b_h)
            if LINK == KL:
                b_written = tl.where(m_ch, (MASS1 / N) * (b_dz1 - gradient_mean[:, None]), 0.0)
                b_z1q = product(p_operand, b_written, PRECISION) + product(x_operand, b_w1, PRECISION)
            else:
                b_z1q = product(p_operand, b_dz1, PRECISION) + product(decayed_operand, b_d1, PRECISION)
                if TOWARD_INIT:
                    b_z1q += product(x_operand, b_base1, PRECISION)
            tl.store(read_hidden + o_ch, b_z1q, mask=m_ch)
            b_hq = gelu(b_z1q)
            b_s += product(b_hq, tl.trans(b_h), PRECISION)
            if LINK == KL:
                b_constant += product(b_hq, b_w2, PRECISION)
                read_mean += tl.sum(b_hq, 1) / N
            else:
                b_kept += product(b_hq, b_d2, PRECISION)
                if TOWARD_INIT:
                    b_constant += product(b_hq, b_base2, PRECISION)
        tl.debug_barrier()
        if LINK == KL:
            b_s = (MASS2 / N) * (b_s - N * read_mean[:, None] * hidden_mean[None, :])
        b_s = tl.where(m_causal, -b_s, 0.0)
        b_values = b_dz2 * b_gk
        b_written = product(b_s, b_values, PRECISION)
        b_z2q = b_written * b_gq + b_kept * b_decay + b_constant

        # -- back through the output's norm ---------------------------------------------------------------------------
        b_y_bar = tl.load(y_bar + p_td, mask=m_td, other=0.0).to(tl.float32)
        if LINK == KL:
            b_normed_q, inverse_std_q = normalise(b_z2q, m_d, D, NORM_EPS)
        else:
            b_normed_q, inverse_std_q = normalise(b_z2q * scale2, m_d, D, NORM_EPS)
        b_gamma_bar += tl.sum(b_y_bar * b_normed_q, 0)
        b_beta_bar += tl.sum(b_y_bar, 0)
        b_u = normalise_vjp(b_y_bar * b_gamma[None, :], b_normed_q, inverse_std_q, m_d, D)
        scale_bar1, scale_bar2 = 0.0, 0.0
        if LINK != KL:
            scale_bar2 += tl.sum(b_u * b_z2q)
            b_u = b_u * scale2
        b_kept_bar = b_u * b_decay
        b_decay_bar = b_u * b_kept
        b_gq_bar = b_u * b_written
        b_written_bar = b_u * b_gq
        b_s_bar = tl.where(m_causal, -product(b_written_bar, tl.trans(b_values), PRECISION), 0.0)
        b_values_bar = product(tl.trans(b_s), b_written_bar, PRECISION)
        b_dz2_bar = b_values_bar * b_gk
        b_gk_bar = b_values_bar * b_dz2

        # -- back through the read and the fold -----------------------------------------------------------------------
        z1q_bar_mean = tl.zeros([C], dtype=tl.float32)
        if LINK == KL:
            for j in range(0, TILES):
                o_1, m_1, o_2, m_2, o_ch, m_ch = tile_offsets(j, C, D, BD, N, TN)
                b_d1, b_base1, b_a1 = load_dual(saved1 + slot, base1, o_1, m_1, TOWARD_INIT)
                b_d2, b_base2, b_a2 = load_dual(saved2 + slot, base2, o_2, m_2, TOWARD_INIT)
                b_w2 = tl.where(m_2, linked(b_a2, scale2, x2, y2, MASS2, MASS2 / N, 0, LINK, Q), 0.0)
                b_h = gelu(tl.load(hidden + o_ch, mask=m_ch, other=0.0))
                if HAS_EARLIER:
                    p_eh = earlier_inputs2 + program * C * N + o_ch
                    b_h = tl.where(m_e[:, None], tl.load(p_eh, mask=m_ch & m_e[:, None], other=0.0), b_h)
                _, b_slope = gelu_and_slope(tl.load(read_hidden + o_ch, mask=m_ch, other=0.0))
                b_inputs = tl.where(m_ch, (MASS2 / N) * (b_h - hidden_mean[:, None]), 0.0)
                b_hq_bar = product(b_s_bar, b_inputs, PRECISION) + product(b_u, tl.trans(b_w2), PRECISION)
                z1q_bar_mean += tl.sum(b_hq_bar * b_slope, 1) / N
        # what centring takes out of the adjoints of H and of dZ1
        hidden_bar_mean = tl.sum(b_s_bar * read_mean[:, None], 0)
        gradient_bar_mean = tl.sum(b_p * z1q_bar_mean[:, None], 0)
        # operands of the products below, rounded once: half the registers where they are bfloat16
        s_operand, p_operand = operand(b_s_bar, PRECISION), operand(b_p, PRECISION)
        u_operand, kept_operand = operand(b_u, PRECISION), operand(b_kept_bar, PRECISION)
        x_operand, decayed_operand = operand(b_x, PRECISION), operand(b_x * b_decay, PRECISION)
        k_fold_operand, dz2_fold_operand = operand(b_k * b_fold, PRECISION), operand(b_dz2 * b_fold, PRECISION)
        dz2_operand = operand(b_dz2, PRECISION)
        b_p_bar = tl.zeros([C, C], dtype=tl.float32)
        b_x_bar = tl.zeros([C, BD], dtype=tl.float32)
        b_x_decayed_bar = tl.zeros([C, BD], dtype=tl.float32)
        b_k_fold_bar = tl.zeros([C, BD], dtype=tl.float32)
        b_dz2_fold_bar = tl.zeros([C, BD], dtype=tl.float32)
        b_total_bar = tl.zeros([BD], dtype=tl.float32)
        # a chunk that the final state has begun is not folded: its dual state is handed on as it is
        folds = 1.0
        b_kept_total = b_total
        if KEEP_FINAL:
            folds = tl.where(is_partial, 0.0, 1.0)
            b_kept_total = tl.where(is_partial, 1.0, b_total)
        for j in range(0, TILES):
            o_1, m_1, o_2, m_2, o_ch, m_ch = tile_offsets(j, C, D, BD, N, TN)
            b_d1, b_base1, b_a1 = load_dual(saved1 + slot, base1, o_1, m_1, TOWARD_INIT)
            b_d2, b_base2, b_a2 = load_dual(saved2 + slot, base2, o_2, m_2, TOWARD_INIT)
            b_w1 = tl.where(m_1, linked(b_a1, scale1, x1, y1, MASS1, 0.0, 1, LINK, Q), 0.0)
            b_w2 = tl.where(m_2, linked(b_a2, scale2, x2, y2, MASS2, MASS2 / N, 0, LINK, Q), 0.0)
            b_h, b_slope, b_curvature = gelu_slope_curvature(tl.load(hidden + o_ch, mask=m_ch, other=0.0))
            b_dh = product(dz2_operand, tl.trans(b_w2), PRECISION)
            b_dz1 = b_dh * b_slope
            m_eh, o_eh = m_ch & m_e[:, None], program * C * N + o_ch
            if HAS_EARLIER:
                b_dz1 = tl.where(m_e[:, None], tl.load(earlier_gradients1 + o_eh, mask=m_eh, other=0.0), b_dz1)
                b_h = tl.where(m_e[:, None], tl.load(earlier_inputs2 + o_eh, mask=m_eh, other=0.0), b_h)
            b_hq, b_slope_q = gelu_and_slope(tl.load(read_hidden + o_ch, mask=m_ch, other=0.0))
            b_next1 = tl.load(state_bar1 + o_1, mask=m_1, other=0.0) * bound1
            b_next2 = tl.load(state_bar2 + o_2, mask=m_2, other=0.0) * bound2

            b_inputs, b_gradients = b_h, b_dz1
            if LINK == KL:
                b_inputs = tl.where(m_ch, (MASS2 / N) * (b_h - hidden_mean[:, None]), 0.0)
                b_gradients = tl.where(m_ch, (MASS1 / N) * (b_dz1 - gradient_mean[:, None]), 0.0)
            b_hq_bar = product(s_operand, b_inputs, PRECISION)
            b_h_bar = product(tl.trans(s_operand), b_hq, PRECISION)
            b_state2 = b_next2 * b_kept_total[None, :]
            if LINK == KL:
                b_hq_bar += product(u_operand, tl.trans(b_w2), PRECISION)
                b_h_bar = tl.where(m_ch, (MASS2 / N) * (b_h_bar - hidden_bar_mean[:, None]), 0.0)
                b_w2_bar = product(tl.trans(b_hq), u_operand, PRECISION)
            else:
                b_hq_bar += product(kept_operand, tl.trans(b_d2), PRECISION)
                b_state2 += product(tl.trans(b_hq), kept_operand, PRECISION)
                b_w2_bar = tl.zeros([TN, BD], dtype=tl.float32)
                if TOWARD_INIT:
                    b_hq_bar += product(u_operand, tl.trans(b_base2), PRECISION)
                    b_base2_bar = tl.load(base_bar2 + o_2, mask=m_2, other=0.0)
                    b_base2_bar += product(tl.trans(b_hq), u_operand, PRECISION)
                    tl.store(base_bar2 + o_2, b_base2_bar, mask=m_2)

            b_z1q_bar = b_hq_bar * b_slope_q
            b_p_bar += product(b_z1q_bar, tl.trans(b_gradients), PRECISION)
            b_dz1_bar = product(tl.trans(p_operand), b_z1q_bar, PRECISION)
            b_state1 = b_next1 * b_kept_total[:, None]
            b_next1 = b_next1 * folds
            b_next2 = b_next2 * folds
            if LINK == KL:
                b_dz1_bar = tl.where(m_ch, (MASS1 / N) * (b_dz1_bar - gradient_bar_mean[:, None]), 0.0)
                b_x_bar += product(b_z1q_bar, tl.trans(b_w1), PRECISION)
                b_w1_bar = product(tl.trans(x_operand), b_z1q_bar, PRECISION)
                tl.store(weight_bar1 + o_1, b_w1_bar, mask=m_1)
            else:
                b_x_decayed_bar += product(b_z1q_bar, tl.trans(b_d1), PRECISION)
                b_state1 += product(tl.trans(decayed_operand), b_z1q_bar, PRECISION)
                if TOWARD_INIT:
                    b_x_bar += product(b_z1q_bar, tl.trans(b_base1), PRECISION)
                    b_base1_bar = tl.load(base_bar1 + o_1, mask=m_1, other=0.0)
                    b_base1_bar += product(tl.trans(x_operand), b_z1q_bar, PRECISION)
                    tl.store(base_bar1 + o_1, b_base1_bar, mask=m_1)

            # the fold
            b_total_bar += tl.sum(b_next1 * b_d1, 1) + tl.sum(b_next2 * b_d2, 0)
            b_k_fold_bar -= product(b_dz1, tl.trans(b_next1), PRECISION)
            b_dz1_bar -= product(k_fold_operand, b_next1, PRECISION)
            b_h_bar -= product(dz2_fold_operand, tl.trans(b_next2), PRECISION)
            b_dz2_fold_bar -= product(b_h, b_next2, PRECISION)
            if KEEP_FINAL:
                m_fh = m_ch & m_f[:, None]
                b_h_bar += tl.load(inputs2_bar + o_eh, mask=m_fh, other=0.0)
                b_dz1_bar += tl.load(gradients1_bar + o_eh, mask=m_fh, other=0.0)
            if HAS_EARLIER:
                tl.store(earlier_inputs2_bar + o_eh, b_h_bar, mask=m_eh)
                tl.store(earlier_gradients1_bar + o_eh, b_dz1_bar, mask=m_eh)
                b_h_bar = tl.where(m_e[:, None], 0.0, b_h_bar)
                b_dz1_bar = tl.where(m_e[:, None], 0.0, b_dz1_bar)
            tl.store(state_bar1 + o_1, b_state1, mask=m_1)
            tl.store(state_bar2 + o_2, b_state2, mask=m_2)

            # dZ1 = (dZ2 W2^T) gelu'(Z1)
            b_dh_bar = b_dz1_bar * b_slope
            b_dz2_bar += product(b_dh_bar, b_w2, PRECISION)
            b_w2_bar += product(tl.trans(b_dh_bar), dz2_operand, PRECISION)
            tl.store(weight_bar2 + o_2, b_w2_bar, mask=m_2)
            tl.store(kept_hidden + o_ch, b_h_bar * b_slope + b_dz1_bar * b_dh * b_curvature, mask=m_ch)
        tl.debug_barrier()

        # -- back through the layer norm's backward and the residual --------------------------------------------------
        b_dz2_bar += b_dz2_fold_bar * b_fold
        b_fold_bar = b_dz2_fold_bar * b_dz2 + b_k_fold_bar * b_k
        if KEEP_FINAL:
            b_dz2_bar += tl.load(gradients2_bar + p_e, mask=m_fd, other=0.0)
        if HAS_EARLIER:
            tl.store(earlier_gradients2_bar + p_e, b_dz2_bar, mask=m_ed)
            b_dz2_bar = tl.where(m_e[:, None], 0.0, b_dz2_bar)
        b_g = b_r * b_gamma[None, :]
        b_g_bar = normalise_vjp(b_dz2_bar, b_normed, inverse_std, m_d, D)
        b_prediction_bar, b_delta_bar = residual_vjp(
            b_error,
            b_delta,
            b_g_bar * b_gamma[None, :],
            m_d,
            LOSS,
            POWER,
            SMOOTH_SIGN,
            SHARPNESS,
            ERROR_CAP,
            CLIP,
        )
        b_gamma_bar += tl.sum(b_g_bar * b_r + b_prediction_bar * b_normed, 0)
        b_beta_bar += tl.sum(b_prediction_bar, 0)
        b_n_bar = b_prediction_bar * b_gamma[None, :]
        b_n_bar -= b_dz2_bar * ((tl.sum(b_g * b_normed, 1) / D)[:, None] * inverse_std)
        b_n_bar -= b_g * ((tl.sum(b_dz2_bar * b_normed, 1) / D)[:, None] * inverse_std)
        b_z2_bar = normalise_vjp(b_n_bar, b_normed, inverse_std, m_d, D)
        b_z2_bar -= b_normed * ((tl.sum(b_dz2_bar * b_dz2, 1) / D)[:, None] * inverse_std)

        # -- write back -----------------------------------------------------------------------------------------------
        b_k_bar = b_prediction_bar
        k_operand, z2_operand = operand(b_k, PRECISION), operand(b_z2_bar, PRECISION)
        inner1 = tl.zeros([BD], dtype=tl.float32)
        inner2 = tl.zeros([BD], dtype=tl.float32)
        for j in range(0, TILES):
            o_1, m_1, o_2, m_2, o_ch, m_ch = tile_offsets(j, C, D, BD, N, TN)
            b_d1, b_base1, b_a1 = load_dual(saved1 + slot, base1, o_1, m_1, TOWARD_INIT)
            b_d2, b_base2, b_a2 = load_dual(saved2 + slot, base2, o_2, m_2, TOWARD_INIT)
            b_w1 = tl.where(m_1, linked(b_a1, scale1, x1, y1, MASS1, 0.0, 1, LINK, Q), 0.0)
            b_w2 = tl.where(m_2, linked(b_a2, scale2, x2, y2, MASS2, MASS2 / N, 0, LINK, Q), 0.0)
            b_h, b_slope = gelu_and_slope(tl.load(hidden + o_ch, mask=m_ch, other=0.0))
            b_z1_bar = tl.load(kept_hidden + o_ch, mask=m_ch, other=0.0)
            b_z1_bar += product(z2_operand, tl.trans(b_w2), PRECISION) * b_slope
            b_w1_bar = product(tl.trans(k_operand), b_z1_bar, PRECISION)
            if LINK == KL:
                b_w1_bar += tl.load(weight_bar1 + o_1, mask=m_1, other=0.0)
            b_w2_bar = tl.load(weight_bar2 + o_2, mask=m_2, other=0.0)
            b_w2_bar += product(tl.trans(b_h), z2_operand, PRECISION)
            tl.store(weight_bar1 + o_1, b_w1_bar, mask=m_1)
            tl.store(weight_bar2 + o_2, b_w2_bar, mask=m_2)
            b_k_bar += product(b_z1_bar, tl.trans(b_w1), PRECISION)
            if LINK == KL:
                inner1 += tl.sum(b_w1_bar * b_w1, 1) / MASS1
                # the weights themselves, with their uniform part
                inner2 += tl.sum(tl.where(m_2, b_w2_bar * (b_w2 + MASS2 / N), 0.0), 0) / MASS2
            else:
                scale_bar1 += tl.sum(b_w1_bar * b_a1)
                scale_bar2 += tl.sum(b_w2_bar * b_a2)
        tl.debug_barrier()

        # -- queries, keys, gates -------------------------------------------------------------------------------------
        b_p_bar = tl.where(m_causal, -b_p_bar, 0.0)
        b_of_query = product(b_p_bar, b_k * b_gk, PRECISION)
        b_of_key = product(tl.trans(b_p_bar), b_x * b_gq, PRECISION)
        b_x_bar += b_of_query * b_gq + b_x_decayed_bar * b_decay
        b_gq_bar += b_of_query * b_x
        b_decay_bar += b_x_decayed_bar * b_x
        b_k_bar += b_of_key * b_gk + b_k_fold_bar * b_fold
        b_gk_bar += b_of_key * b_k
        if KEEP_FINAL:
            b_k_bar += tl.load(inputs1_bar + p_e, mask=m_fd, other=0.0)
        if HAS_EARLIER:
            tl.store(earlier_inputs1_bar + p_e, b_k_bar, mask=m_ed)
        if LINK == KL:
            b_q_bar = b_x_bar + b_y_bar
        else:
            scale_bar1 += tl.sum(b_x_bar * b_q)
            b_q_bar = b_x_bar * scale1 + b_y_bar
        # what was cut has no gradient
        b_raw = tl.load(q + p_td, mask=m_td, other=0.0).to(tl.float32)
        b_q_bar = tl.where(tl.abs(b_raw) <= KEY_CAP, b_q_bar, 0.0)
        tl.store(q_bar + p_td, b_q_bar.to(q_bar.dtype.element_ty), mask=m_td)
        b_raw = tl.load(k + p_td, mask=m_td, other=0.0).to(tl.float32)
        b_k_bar = tl.where(tl.abs(b_raw) <= KEY_CAP, b_k_bar, 0.0)
        tl.store(k_bar + p_td, b_k_bar.to(k_bar.dtype.element_ty), mask=m_td)
        b_raw = tl.load(v + p_td, mask=m_td, other=0.0).to(tl.float32)
        b_v_bar = tl.where(tl.abs(b_raw) <= VALUE_CAP, -b_prediction_bar, 0.0)
        tl.store(v_bar + p_td, b_v_bar.to(v_bar.dtype.element_ty), mask=m_td)
        if DELTA_DIM == 1:
            b_bar = tl.sum(tl.where(m_d[None, :], b_delta_bar, 0.0), 1)
            if LOSS != HUBER_COORDINATE:
                b_bar = b_bar / D  # the loss has one threshold a head, and its adjoint stands in every channel
            tl.store(delta_bar + o_t, b_bar, mask=m_t)
        elif DELTA_DIM > 1:
            tl.store(delta_bar + p_td, b_delta_bar, mask=m_td)

        store_gate_bars(
            b_decay_bar,
            b_gq_bar,
            b_gk_bar,
            b_fold_bar,
            b_total_bar,
            b_gq,
            b_gk,
            total_log_decay,
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

        # -- link -----------------------------------------------------------------------------------------------------
        if LINK != KL:
            first1, second1 = frozen_scale_rates(a1, p1, 1.0 * D * N, scale_bar1, LINK, Q, FLOOR, CAP)
            first2, second2 = frozen_scale_rates(a2, p2, 1.0 * D * N, scale_bar2, LINK, Q, FLOOR, CAP)
        largest1, largest2 = 0.0, 0.0
        for j in range(0, TILES):
            o_1, m_1, o_2, m_2, o_ch, m_ch = tile_offsets(j, C, D, BD, N, TN)
            b_d1, b_base1, b_a1 = load_dual(saved1 + slot, base1, o_1, m_1, TOWARD_INIT)
            b_d2, b_base2, b_a2 = load_dual(saved2 + slot, base2, o_2, m_2, TOWARD_INIT)
            b_w1 = tl.where(m_1, linked(b_a1, scale1, x1, y1, MASS1, 0.0, 1, LINK, Q), 0.0)
            b_w2 = tl.where(m_2, linked(b_a2, scale2, x2, y2, MASS2, MASS2 / N, 0, LINK, Q), 0.0)
            b_w1_bar = tl.load(weight_bar1 + o_1, mask=m_1, other=0.0)
            b_w2_bar = tl.load(weight_bar2 + o_2, mask=m_2, other=0.0)
            if LINK == KL:
                b_a1_bar = (b_w1_bar - inner1[:, None]) * b_w1
                b_a2_bar = tl.where(m_2, (b_w2_bar - inner2[None, :]) * (b_w2 + MASS2 / N), 0.0)
            else:
                b_a1_bar = b_w1_bar * scale1 + first1 * b_a1
                b_a2_bar = b_w2_bar * scale2 + first2 * b_a2
                if LINK == LQ:
                    b_a1_bar += second1 * power(tl.abs(b_a1), Q - 2.0) * b_a1
                    b_a2_bar += second2 * power(tl.abs(b_a2), Q - 2.0) * b_a2
            b_state1 = tl.load(state_bar1 + o_1, mask=m_1, other=0.0) + b_a1_bar
            b_state2 = tl.load(state_bar2 + o_2, mask=m_2, other=0.0) + b_a2_bar
            tl.store(state_bar1 + o_1, b_state1, mask=m_1)
            tl.store(state_bar2 + o_2, b_state2, mask=m_2)
            largest1 = tl.maximum(largest1, tl.max(tl.abs(b_state1)))
            largest2 = tl.maximum(largest2, tl.max(tl.abs(b_state2)))
            if TOWARD_INIT:
                b_base1_bar = tl.load(base_bar1 + o_1, mask=m_1, other=0.0) + b_a1_bar
                b_base2_bar = tl.load(base_bar2 + o_2, mask=m_2, other=0.0) + b_a2_bar
                tl.store(base_bar1 + o_1, b_base1_bar, mask=m_1)
                tl.store(base_bar2 + o_2, b_base2_bar, mask=m_2)
        tl.debug_barrier()

    tl.store(norm_weight_bar + program * D + o_d, b_gamma_bar, mask=m_d)
    tl.store(norm_bias_bar + program * D + o_d, b_beta_bar, mask=m_d)
