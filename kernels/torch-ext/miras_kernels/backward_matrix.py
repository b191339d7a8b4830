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
"""The backward pass of a matrix memory, `M(W; x) = x W`: one program goes back over its chunks, all in registers.

The derivation is in README.md; `x_bar` is the adjoint of x.
"""

import triton
import triton.language as tl

from .forward_matrix import linked, scale_of_dual
from .pieces import (
    HUBER_COORDINATE,
    KEY_CAP,
    KL,
    LARGEST_STATE_ADJOINT,
    LQ,
    VALUE_CAP,
    chunk_gates,
    frozen_scale_rates,
    load_gates,
    power,
    product,
    residual,
    residual_vjp,
    store_gate_bars,
)


@triton.jit(do_not_specialize=["LONGEST"])
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
    LONGEST,
    H,
    MIN_LOG_ALPHA,
    MASS,
    C: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
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
    m_dd = m_d[:, None] & m_d[None, :]
    o_dd = o_d[:, None] * D + o_d[None, :]
    m_causal = o_c[:, None] >= o_c[None, :]
    b_base = tl.zeros([BD, BD], dtype=tl.float32)
    b_base_bar = tl.zeros([BD, BD], dtype=tl.float32)
    if TOWARD_INIT:
        b_base = tl.load(base + head * D * D + o_dd, mask=m_dd, other=0.0).to(tl.float32)
        # later groups of chunks have been here before
        b_base_bar = tl.load(base_bar + program * D * D + o_dd, mask=m_dd, other=0.0)
    b_next = tl.load(state_bar + program * D * D + o_dd, mask=m_dd, other=0.0)

    for i in range(0, chunks):
        i_c = chunks - 1 - i
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
        b_k = tl.minimum(tl.maximum(b_k, -KEY_CAP), KEY_CAP)
        if HAS_EARLIER:
            b_k = tl.where(m_e[:, None], tl.load(earlier_inputs + p_e, mask=m_ed, other=0.0), b_k)
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
        slot = ((first_slot + i_c) * H + head).to(tl.int64) * D * D
        b_state = tl.load(saved + slot + o_dd, mask=m_dd, other=0.0)
        b_dual = b_state + b_base
        b_w = tl.where(m_dd, linked(b_dual, m_dd, MASS, D, LINK, Q, FLOOR, CAP), 0.0)
        scale = 1.0
        if LINK != KL:
            scale = scale_of_dual(b_dual, D, LINK, Q, FLOOR, CAP)

        # -- write, and the read's scores -----------------------------------------------------------------------------
        b_error = product(b_k, b_w, PRECISION) - b_v
        b_delta = b_error
        if DELTA_DIM == 1:
            b_delta = tl.load(delta + o_t, mask=m_t, other=0.0).to(tl.float32)[:, None]
        elif DELTA_DIM > 1:
            b_delta = tl.load(delta + p_td, mask=m_td, other=0.0).to(tl.float32)
        b_r = residual(b_error, b_delta, m_d, LOSS, POWER, SMOOTH_SIGN, SHARPNESS, ERROR_CAP, CLIP)
        if HAS_EARLIER:
            b_r = tl.where(m_e[:, None], tl.load(earlier_gradients + p_e, mask=m_ed, other=0.0), b_r)
        b_x = b_q * scale
        b_p = product(b_x * b_gq, tl.trans(b_k * b_gk), PRECISION)
        b_p = tl.where(m_causal, -b_p, 0.0)

        # -- back through the read ------------------------------------------------------------------------------------
        b_y_bar = tl.load(y_bar + p_td, mask=m_td, other=0.0).to(tl.float32)
        b_r_bar = product(tl.trans(b_p), b_y_bar, PRECISION)
        b_written = b_r
        if LINK == KL:
            b_written = tl.where(m_d[None, :], (MASS / D) * (b_r - (tl.sum(b_r, 1) / D)[:, None]), 0.0)
            b_r_bar = tl.where(m_d[None, :], (MASS / D) * (b_r_bar - (tl.sum(b_r_bar, 1) / D)[:, None]), 0.0)
        b_p_bar = tl.where(m_causal, -product(b_y_bar, tl.trans(b_written), PRECISION), 0.0)
        b_x_bar = tl.zeros([C, BD], dtype=tl.float32)
        b_decay_bar = tl.zeros([C, BD], dtype=tl.float32)
        b_w_bar = tl.zeros([BD, BD], dtype=tl.float32)
        folds = 1.0
        b_kept_total = b_total
        if KEEP_FINAL:
            # a chunk that the final state has begun is not folded: its dual state is handed on as it is
            folds = tl.where(is_partial, 0.0, 1.0)
            b_kept_total = tl.where(is_partial, 1.0, b_total)
        b_state_bar = b_next * b_kept_total[:, None]
        b_next = b_next * folds
        if LINK == KL:
            b_x_bar += product(b_y_bar, tl.trans(b_w), PRECISION)
            b_w_bar += product(tl.trans(b_q), b_y_bar, PRECISION)
        else:
            b_x_decayed_bar = product(b_y_bar, tl.trans(b_state), PRECISION)
            b_x_bar += b_x_decayed_bar * b_decay
            b_decay_bar += b_x_decayed_bar * b_x
            b_state_bar += product(tl.trans(b_x * b_decay), b_y_bar, PRECISION)
            if TOWARD_INIT:
                b_x_bar += product(b_y_bar, tl.trans(b_base), PRECISION)
                b_base_bar += product(tl.trans(b_x), b_y_bar, PRECISION)

        # -- back through the fold and the residual -------------------------------------------------------------------
        b_total_bar = tl.sum(b_next * b_state, 1)
        b_k_fold_bar = -product(b_r, tl.trans(b_next), PRECISION)
        b_r_bar -= product(b_k * b_fold, b_next, PRECISION)
        if KEEP_FINAL:
            b_r_bar += tl.load(gradients_bar + p_e, mask=m_fd, other=0.0)
        if HAS_EARLIER:
            tl.store(earlier_gradients_bar + p_e, b_r_bar, mask=m_ed)
            b_r_bar = tl.where(m_e[:, None], 0.0, b_r_bar)
        b_error_bar, b_delta_bar = residual_vjp(
            b_error, b_delta, b_r_bar, m_d, LOSS, POWER, SMOOTH_SIGN, SHARPNESS, ERROR_CAP, CLIP
        )
        b_k_bar = product(b_error_bar, tl.trans(b_w), PRECISION)
        b_w_bar += product(tl.trans(b_k), b_error_bar, PRECISION)

        # -- queries, keys, gates -------------------------------------------------------------------------------------
        b_of_query = product(b_p_bar, b_k * b_gk, PRECISION)
        b_of_key = product(tl.trans(b_p_bar), b_x * b_gq, PRECISION)
        b_x_bar += b_of_query * b_gq
        b_k_bar += b_of_key * b_gk + b_k_fold_bar * b_fold
        if KEEP_FINAL:
            b_k_bar += tl.load(inputs_bar + p_e, mask=m_fd, other=0.0)
        if HAS_EARLIER:
            tl.store(earlier_inputs_bar + p_e, b_k_bar, mask=m_ed)
        # what was cut has no gradient
        b_raw = tl.load(q + p_td, mask=m_td, other=0.0).to(tl.float32)
        b_q_bar = tl.where(tl.abs(b_raw) <= KEY_CAP, b_x_bar * scale, 0.0)
        tl.store(q_bar + p_td, b_q_bar.to(q_bar.dtype.element_ty), mask=m_td)
        b_raw = tl.load(k + p_td, mask=m_td, other=0.0).to(tl.float32)
        b_k_bar = tl.where(tl.abs(b_raw) <= KEY_CAP, b_k_bar, 0.0)
        tl.store(k_bar + p_td, b_k_bar.to(k_bar.dtype.element_ty), mask=m_td)
        b_raw = tl.load(v + p_td, mask=m_td, other=0.0).to(tl.float32)
        b_v_bar = tl.where(tl.abs(b_raw) <= VALUE_CAP, -b_error_bar, 0.0)
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
            b_of_query * b_x,
            b_of_key * b_k,
            b_k_fold_bar * b_k,
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
        if LINK == KL:
            inner = tl.sum(b_w_bar * b_w, 1) / MASS
            b_dual_bar = tl.where(m_dd, (b_w_bar - inner[:, None]) * b_w, 0.0)
        else:
            scale_bar = tl.sum(b_x_bar * b_q) + tl.sum(b_w_bar * b_dual)
            powered = power(tl.abs(b_dual), Q - 2.0)
            squares, powers = tl.sum(b_dual * b_dual), tl.sum(powered * b_dual * b_dual)
            first, second = frozen_scale_rates(squares, powers, 1.0 * D * D, scale_bar, LINK, Q, FLOOR, CAP)
            b_dual_bar = b_w_bar * scale + first * b_dual
            if LINK == LQ:
                b_dual_bar += second * powered * b_dual
        b_state_bar += b_dual_bar
        b_base_bar += b_dual_bar
        b_next = b_state_bar
        if i_c > 0:
            largest = tl.max(tl.abs(b_state_bar))
            b_next = b_state_bar * (LARGEST_STATE_ADJOINT / tl.maximum(largest, LARGEST_STATE_ADJOINT))

    tl.store(state_bar + program * D * D + o_dd, b_next, mask=m_dd)
    if TOWARD_INIT:
        tl.store(base_bar + program * D * D + o_dd, b_base_bar, mask=m_dd)
