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
"""The forward pass of a matrix memory, `M(W; x) = x W`: one program per sequence and head, the state in registers."""

import triton
import triton.language as tl

from .pieces import (
    KEY_CAP,
    KL,
    LQ_MIRROR,
    VALUE_CAP,
    at_least,
    bounded,
    chunk_gates,
    first_broken,
    frozen_scale,
    inverse_of_mean,
    load_gates,
    power,
    product,
    residual,
)


@triton.jit
def scale_of_dual(dual, D: tl.constexpr, LINK: tl.constexpr, Q: tl.constexpr, FLOOR: tl.constexpr, CAP: tl.constexpr):
    powered = power(tl.abs(dual), Q - 2.0)
    mapped = dual
    if LINK == LQ_MIRROR:
        mapped = dual * powered
    return frozen_scale(tl.sum(mapped * mapped), tl.sum(powered * dual * dual), 1.0 * D * D, LINK, Q, FLOOR, CAP)


@triton.jit
def linked(
    dual, m_dd, MASS, D: tl.constexpr, LINK: tl.constexpr, Q: tl.constexpr, FLOOR: tl.constexpr, CAP: tl.constexpr
):
    # W = phi(A); the matrix's outputs are its hidden axis
    if LINK == KL:
        masked = tl.where(m_dd, dual, -1.0e30)
        exponentials = tl.where(m_dd, tl.exp(masked - tl.max(masked, 1)[:, None]), 0.0)
        return MASS * exponentials / at_least(tl.sum(exponentials, 1), 1e-30)[:, None]
    else:
        scale = scale_of_dual(dual, D, LINK, Q, FLOOR, CAP)
        if LINK == LQ_MIRROR:
            return scale * dual * power(tl.abs(dual), Q - 2.0)
        else:
            return scale * dual


@triton.jit(do_not_specialize=["LONGEST", "H"])
def matrix_forward_kernel(
    q,
    k,
    v,
    eta,
    log_alpha,
    delta,
    y,
    base,
    dual,
    earlier_inputs,
    earlier_gradients,
    earlier_eta,
    earlier_log_decay,
    phases,
    inputs,
    gradients,
    final_eta,
    final_log_decay,
    starts,
    lengths,
    order,
    saved,
    saved_of_row,
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
    SAVE_EVERY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row, head = program // H, program % H
    start = tl.load(starts + row).to(tl.int64)
    length = tl.load(lengths + row).to(tl.int32)
    phase = 0
    if HAS_EARLIER:
        phase = tl.load(phases + row).to(tl.int32)
    chunks = tl.cdiv(phase + length, C)
    taken = (phase + length) % C

    o_c, o_d = tl.arange(0, C), tl.arange(0, BD)
    m_d = o_d < D
    m_dd = m_d[:, None] & m_d[None, :]
    o_dd = o_d[:, None] * D + o_d[None, :]
    # [C, C]: token t of the rows sees the writes of the columns i <= t
    m_causal = o_c[:, None] >= o_c[None, :]
    b_state = tl.load(dual + program * D * D + o_dd, mask=m_dd, other=0.0)

    for i_c in range(0, chunks):
        # -- the chunk's tokens ---------------------------------------------------------------------------------------
        o_t = i_c * C + o_c - phase
        m_t = (o_t >= 0) & (o_t < length)
        if HAS_ORDER:
            o_t = tl.load(order + row * LONGEST + o_t, mask=m_t, other=0)
        o_t = ((start + o_t) * H + head).to(tl.int64)
        m_td = m_t[:, None] & m_d[None, :]
        p_td = o_t[:, None] * D + o_d[None, :]
        # slots that the state has filled, of a chunk that was begun before this call
        m_e = (o_c < phase) & (i_c == 0)
        m_ed = m_e[:, None] & m_d[None, :]
        p_e = program * C * D + o_c[:, None] * D + o_d[None, :]
        b_k = tl.load(k + p_td, mask=m_td, other=0.0).to(tl.float32)
        broken = first_broken(b_k, v, eta, log_alpha, delta, o_t, m_t, C, D, BD, GATE_DIM, DELTA_DIM)
        if broken < C:
            b_nan = tl.full([C, BD], float("nan"), tl.float32)
            tl.store(y + p_td, b_nan.to(y.dtype.element_ty), mask=m_td & (o_c >= broken)[:, None])
        m_t = m_t & (o_c < broken)
        m_td = m_t[:, None] & m_d[None, :]
        b_k = bounded(tl.where(m_td, b_k, 0.0), KEY_CAP)
        if HAS_EARLIER:
            b_k = tl.where(m_e[:, None], tl.load(earlier_inputs + p_e, mask=m_ed, other=0.0), b_k)

        # -- the link at the chunk's start, the write -----------------------------------------------------------------
        if SAVE_EVERY > 0:
            if i_c % SAVE_EVERY == 0:
                slot = ((tl.load(saved_of_row + row) + i_c // SAVE_EVERY) * H + head).to(tl.int64) * D * D
                tl.store(saved + slot + o_dd, b_state, mask=m_dd)
        b_dual, b_base = b_state, b_state
        if TOWARD_INIT:
            b_base = tl.load(base + head * D * D + o_dd, mask=m_dd, other=0.0).to(tl.float32)
            b_dual = b_base + b_state
        b_w = linked(b_dual, m_dd, MASS, D, LINK, Q, FLOOR, CAP)
        b_v = tl.load(v + p_td, mask=m_td, other=0.0).to(tl.float32)
        b_v = bounded(b_v, VALUE_CAP)
        b_error = product(b_k, b_w, PRECISION) - b_v
        b_delta = b_error
        if DELTA_DIM == 1:
            b_delta = tl.load(delta + o_t, mask=m_t, other=0.0).to(tl.float32)[:, None]
        elif DELTA_DIM > 1:
            b_delta = tl.load(delta + p_td, mask=m_td, other=0.0).to(tl.float32)
        b_r = residual(b_error, b_delta, m_d, LOSS, POWER, SMOOTH_SIGN, SHARPNESS, ERROR_CAP, CLIP)
        if HAS_EARLIER:
            b_r = tl.where(m_e[:, None], tl.load(earlier_gradients + p_e, mask=m_ed, other=0.0), b_r)

        # -- the read -------------------------------------------------------------------------------------------------
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
        b_q = tl.load(q + p_td, mask=m_td, other=0.0).to(tl.float32)
        b_q = bounded(b_q, KEY_CAP)
        b_keys, b_written = b_k * b_gk, b_r
        if LINK == KL:
            mean = (tl.sum(b_r, 1) / D)[:, None]
            b_written = tl.where(m_d[None, :], (MASS / D) * (b_r - mean), 0.0)
        elif LINK == LQ_MIRROR:
            # the slope's best rank-one factorisation: row means times column means over the mean
            b_slope = tl.where(m_dd, power(tl.abs(b_dual), Q - 2.0), 0.0)
            inverse_mean = inverse_of_mean(tl.sum(b_slope) / (1.0 * D * D))
            scale = scale_of_dual(b_dual, D, LINK, Q, FLOOR, CAP)
            b_keys = b_keys * (tl.sum(b_slope, 1) / D)[None, :]
            b_written = b_r * ((Q - 1.0) * scale * (tl.sum(b_slope, 0) / D * inverse_mean))[None, :]
        else:
            b_q = b_q * scale_of_dual(b_dual, D, LINK, Q, FLOOR, CAP)
        b_p = product(b_q * b_gq, tl.trans(b_keys), PRECISION)
        b_y = product(tl.where(m_causal, -b_p, 0.0), b_written, PRECISION)
        if LINK == KL:
            b_y += product(b_q, b_w, PRECISION)
        else:
            b_decaying, b_constant = b_state, b_base
            if LINK == LQ_MIRROR:
                b_decaying = b_w
                if TOWARD_INIT:
                    b_constant = linked(b_base, m_dd, MASS, D, LINK, Q, FLOOR, CAP)
                    b_decaying = b_w - b_constant
            b_y += product(b_q * b_decay, b_decaying, PRECISION)
            if TOWARD_INIT:
                b_y += product(b_q, b_constant, PRECISION)
        tl.store(y + p_td, b_y.to(y.dtype.element_ty), mask=m_td)

        # -- the fold, or the begun chunk's factors -------------------------------------------------------------------
        if (i_c == chunks - 1) & (taken > 0):
            if KEEP_FINAL:
                m_f = (o_c < taken)[:, None] & m_d[None, :]
                tl.store(inputs + p_e, b_k, mask=m_f)
                tl.store(gradients + p_e, b_r, mask=m_f)
                p_g = program * C * GATE_DIM + o_c[:, None] * GATE_DIM + o_d[None, :]
                if GATE_DIM == 1:
                    m_f = m_f & (o_d == 0)[None, :]
                tl.store(final_eta + p_g, b_eta, mask=m_f)
                # the decay up to now stands in everything that is read from here on
                b_log_decay = tl.where((o_c >= broken)[:, None], float("nan"), b_log_decay)
                tl.store(final_log_decay + p_g, b_log_decay, mask=m_f)
        else:
            b_state = b_state * b_total[:, None] - product(tl.trans(b_k * b_fold), b_r, PRECISION)

    if KEEP_FINAL:
        tl.store(dual + program * D * D + o_dd, b_state, mask=m_dd)
