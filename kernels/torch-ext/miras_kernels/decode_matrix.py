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
"""The decode kernel of a matrix memory, `M(W; x) = x W`: as `decode_mlp.py`, with the state in registers."""

import triton
import triton.language as tl

from .decode_pieces import (
    empty_slots,
    join_chunk,
    load_chunk_gates,
    load_token,
    load_token_gates,
)
from .links import linked, start_of_sum, sum_of_dual
from .pieces import (
    KL,
    LQ_MIRROR,
    chunk_gates,
    frozen_scale,
    inverse_of_mean,
    power,
    product,
    residual,
)


# a single token, the usual call, has a binary of its own: without the loop over tokens nothing is spilled. All others share
# one
@triton.jit(do_not_specialize=["H", "ROTARY_TOKENS"], do_not_specialize_on_alignment=["T"])
def matrix_decode_kernel(
    q,
    k,
    v,
    eta,
    log_alpha,
    delta,
    y,
    base,
    dual,
    inputs,
    gradients,
    etas,
    log_decays,
    count,
    phases,
    tail,
    weight_q,
    weight_k,
    weight_v,
    cos,
    sin,
    a_log,
    lengths,
    T,
    H,
    ROTARY_TOKENS,
    ETA_MAX,
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
    HAS_LENGTHS: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    ROTARY: tl.constexpr,
    VALUE_SCALE: tl.constexpr,
    RAW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row, head = program // H, program % H
    o_c, o_d = tl.arange(0, C), tl.arange(0, BD)
    m_d = o_d < D
    m_dd = m_d[:, None] & m_d[None, :]
    o_dd = o_d[:, None] * D + o_d[None, :]
    m_cd = (o_c >= 0)[:, None] & m_d[None, :]
    o_cd = o_c[:, None] * D + o_d[None, :]
    dual += program * D * D
    inputs += program * C * D
    gradients += program * C * D
    b_state = tl.load(dual + o_dd, mask=m_dd, other=0.0)
    b_base = b_state
    if TOWARD_INIT:
        b_base = tl.load(base + head * D * D + o_dd, mask=m_dd, other=0.0).to(tl.float32)

    # whatever stands there, no slot beyond the chunk is written to
    phase = tl.load(phases + program) & (C - 1)
    read = 0
    length = T
    if HAS_LENGTHS:
        length = tl.load(lengths + row).to(tl.int32)
    for t in range(0, T):
        token = row * T + t
        live = 1
        if HAS_LENGTHS:
            live = t < length
        if live == 0:
            tl.store(y + (token * H + head) * D + o_d, tl.zeros([BD], tl.float32).to(y.dtype.element_ty), mask=m_d)
        else:
            b_q, b_k, b_v = load_token(
                q,
                k,
                v,
                tail,
                weight_q,
                weight_k,
                weight_v,
                cos,
                sin,
                token,
                row,
                head,
                (row * ROTARY_TOKENS + t) * D,
                H * D,
                D,
                BD,
                K,
                KP,
                ROTARY,
                VALUE_SCALE,
            )
            b_eta, b_log_alpha, b_delta = load_token_gates(
                eta,
                log_alpha,
                delta,
                a_log,
                token * H + head,
                head,
                ETA_MAX,
                MIN_LOG_ALPHA,
                D,
                BD,
                GATE_DIM,
                DELTA_DIM,
                RAW,
            )
            b_now, b_keys = join_chunk(etas, log_decays, b_eta, b_log_alpha, program, phase, C, D, BD, GATE_DIM)
            b_decay = tl.exp(b_now)
            m_own = (o_c == phase)[:, None]
            m_e = (o_c < phase)[:, None] & m_cd

            # -- the link at the chunk's start, the write -----------------------------------------------------------------
            b_dual = b_state
            if TOWARD_INIT:
                b_dual = b_base + b_state
            squares, powers, top, total = sum_of_dual(b_dual, m_dd, start_of_sum(BD, LINK), 1, LINK, Q)
            scale = frozen_scale(squares, powers, 1.0 * D * D, LINK, Q, FLOOR, CAP)
            b_w = tl.where(m_dd, linked(b_dual, scale, top, total, MASS, 0.0, 1, LINK, Q), 0.0)
            b_error = tl.sum(b_k[:, None] * b_w, 0) - b_v
            b_r = residual(
                b_error[None, :], b_delta[None, :], m_d, LOSS, POWER, SMOOTH_SIGN, SHARPNESS, ERROR_CAP, CLIP
            )
            tl.store(inputs + phase * D + o_d, b_k, mask=m_d)
            tl.store(gradients + phase * D + o_d, tl.sum(b_r, 0), mask=m_d)

            # -- the read -------------------------------------------------------------------------------------------------
            b_x = b_q
            b_keyed = tl.where(m_own, b_k[None, :], tl.load(inputs + o_cd, mask=m_e, other=0.0)) * b_keys
            b_written = tl.where(m_own, b_r, tl.load(gradients + o_cd, mask=m_e, other=0.0))
            if LINK == KL:
                mean = (tl.sum(b_written, 1) / D)[:, None]
                b_written = tl.where(m_d[None, :], (MASS / D) * (b_written - mean), 0.0)
            elif LINK == LQ_MIRROR:
                # the slope's best rank-one factorisation: row means times column means over the mean
                b_slope = tl.sum(power(tl.abs(b_dual), Q - 2.0), 0) / D
                inverse_mean = inverse_of_mean(tl.sum(top) / (1.0 * D * D))
                b_keyed = b_keyed * (top / D)[None, :]
                b_written = b_written * ((Q - 1.0) * scale * (b_slope * inverse_mean))[None, :]
            else:
                b_x = b_q * scale
            b_p = tl.sum(b_keyed * b_x[None, :], 1)
            b_y = -tl.sum(b_written * b_p[:, None], 0)
            if LINK == KL:
                b_y += tl.sum(b_x[:, None] * b_w, 0)
            else:
                b_decaying, b_constant = b_state, b_base
                if LINK == LQ_MIRROR:
                    b_decaying = b_w
                    if TOWARD_INIT:
                        base_sums = sum_of_dual(b_base, m_dd, start_of_sum(BD, LINK), 1, LINK, Q)
                        base_scale = frozen_scale(base_sums[0], base_sums[1], 1.0 * D * D, LINK, Q, FLOOR, CAP)
                        b_constant = linked(b_base, base_scale, top, total, MASS, 0.0, 1, LINK, Q)
                        b_decaying = b_w - b_constant
                b_y += tl.sum((b_x * b_decay)[:, None] * b_decaying, 0)
                if TOWARD_INIT:
                    b_y += tl.sum(b_x[:, None] * b_constant, 0)
            tl.store(y + (token * H + head) * D + o_d, b_y.to(y.dtype.element_ty), mask=m_d)
            tl.debug_barrier()

            # -- the end of the row's chunk: its factors are folded into the state ----------------------------------------
            phase += 1
            read += 1
            if phase == C:
                b_etas, b_log_decays = load_chunk_gates(etas, log_decays, program, C, D, BD, GATE_DIM)
                _, _, _, b_fold, b_total = chunk_gates(b_etas, b_log_decays, b_now)
                b_into = tl.trans(tl.load(inputs + o_cd, mask=m_cd, other=0.0) * b_fold)
                b_out = tl.load(gradients + o_cd, mask=m_cd, other=0.0)
                b_state = b_state * b_total[:, None] - product(b_into, b_out, PRECISION)
                tl.store(dual + o_dd, b_state, mask=m_dd)
                tl.debug_barrier()
                empty_slots(inputs, 0, C, D, BD)
                empty_slots(gradients, 0, C, D, BD)
                empty_slots(etas, program, C, GATE_DIM, BD if GATE_DIM > 1 else 1)
                empty_slots(log_decays, program, C, GATE_DIM, BD if GATE_DIM > 1 else 1)
                phase = 0
                tl.debug_barrier()
    tl.store(phases + program, phase)
    if head == 0:
        tl.store(count + row, tl.load(count + row) + read)
