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
"""The decode kernel of an MLP memory: a few tokens for every row, each row at its own phase of its chunk.

One program serves one row and head. Weights are read-only inside a chunk: a token reads the chunk-start state once
(the second layer's weights twice, the second time from the nearest cache), and the chunk's rank-one factors. It leaves
its own factors in the row's next slot, and the token that fills the chunk folds them into the state. Everything is
updated where it lies. A program reads its tokens one after the other, so that several at once give the bits of one by one.

    first pass    z1 = k W1_j;  the read's first layer without the chunk's writes;  z2 += gelu(z1_j) W2_j
    between       residual, layer norm's backward: dz2
    second pass   dz1_j;  the read's hidden units;  s += hq_j H_j^T;  z2q += hq_j W2_j
    after         y = q + LN(z2q + s o (eta B_t / B) dZ2)

Products with one token are sums of elements: the kernel waits for memory, not for arithmetic.
"""

import triton
import triton.language as tl

from .decode_pieces import (
    empty_slots,
    join_chunk,
    load_chunk_gates,
    load_token,
    load_token_gates,
)
from .links import linked, start_of_sums, sum_of_link
from .pieces import (
    KL,
    LQ_MIRROR,
    SHARED_NUMBERS,
    chunk_gates,
    frozen_scale,
    gelu,
    gelu_and_slope,
    inverse_of_mean,
    normalise,
    normalise_vjp,
    power,
    product,
    residual,
)


# a single token, the usual call, has a binary of its own: without the loop over tokens nothing is spilled. All others share
# one
@triton.jit(do_not_specialize=["H", "ROTARY_TOKENS"], do_not_specialize_on_alignment=["T"])
def mlp_decode_kernel(
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
    inputs1,
    inputs2,
    gradients1,
    gradients2,
    etas,
    log_decays,
    count,
    phases,
    links,
    tail,
    weight_q,
    weight_k,
    weight_v,
    cos,
    sin,
    a_log,
    lengths,
    scratch,
    T,
    H,
    ROTARY_TOKENS,
    ETA_MAX,
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
    HAS_LENGTHS: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    ROTARY: tl.constexpr,
    VALUE_SCALE: tl.constexpr,
    RAW: tl.constexpr,
    PRECISION: tl.constexpr,
    THREADS: tl.constexpr,
):
    tl.static_assert(C * TN >= THREADS, SHARED_NUMBERS)
    tl.static_assert(BD * TN >= THREADS, SHARED_NUMBERS)
    program = tl.program_id(0).to(tl.int64)
    row, head = program // H, program % H
    o_c, o_d, o_n = tl.arange(0, C), tl.arange(0, BD), tl.arange(0, TN)
    m_d = o_d < D
    m_cd = (o_c >= 0)[:, None] & m_d[None, :]
    o_cd = o_c[:, None] * D + o_d[None, :]
    b_gamma = tl.load(norm_weight + head * D + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    b_beta = tl.load(norm_bias + head * D + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]

    base1 += head * D * N
    base2 += head * D * N
    dual1 += program * D * N
    dual2 += program * D * N
    inputs1 += program * C * D
    inputs2 += program * C * N
    gradients1 += program * C * N
    gradients2 += program * C * D
    scratch += program * 3 * N
    TILES: tl.constexpr = (N + TN - 1) // TN
    # what the link needs of the whole weights at the chunk's start: 4 scales, 4 vectors of channels, then the means of
    # the chunk's first-layer gradients
    links += program * (4 + 4 * D + C)
    means = links + 4 + 4 * D

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
            m_e = (o_c < phase)[:, None]

            scale1, scale2 = tl.load(links), tl.load(links + 1)
            base_scale1, base_scale2 = tl.load(links + 2), tl.load(links + 3)
            x1 = tl.load(links + 4 + o_d, mask=m_d, other=0.0)
            y1 = tl.load(links + 4 + D + o_d, mask=m_d, other=0.0)
            x2 = tl.load(links + 4 + 2 * D + o_d, mask=m_d, other=0.0)
            y2 = tl.load(links + 4 + 3 * D + o_d, mask=m_d, other=0.0)

            # -- first pass: the write's forward, and what the read's first layer has before the chunk's writes ---------
            b_x = b_q
            if LINK != KL and LINK != LQ_MIRROR:
                b_x = b_q * scale1
            b_x_decayed = b_x * b_decay
            b_sum = tl.zeros([TN, BD], dtype=tl.float32)
            for j in range(0, TILES):
                o_h = j * TN + o_n
                m_h = o_h < N
                o_1, m_1 = o_d[:, None] * N + o_h[None, :], m_d[:, None] & m_h[None, :]
                o_2, m_2 = o_h[:, None] * D + o_d[None, :], m_h[:, None] & m_d[None, :]
                b_d1 = tl.load(dual1 + o_1, mask=m_1, other=0.0)
                b_a2 = tl.load(dual2 + o_2, mask=m_2, other=0.0)
                b_a1, b_base1 = b_d1, b_d1
                if TOWARD_INIT:
                    b_base1 = tl.load(base1 + o_1, mask=m_1, other=0.0).to(tl.float32)
                    b_a1 = b_base1 + b_d1
                    b_a2 += tl.load(base2 + o_2, mask=m_2, other=0.0).to(tl.float32)
                b_w1 = tl.where(m_1, linked(b_a1, scale1, x1, y1, MASS1, 0.0, 1, LINK, Q), 0.0)
                b_w2 = tl.where(m_2, linked(b_a2, scale2, x2, y2, MASS2, MASS2 / N, 0, LINK, Q), 0.0)
                b_z1 = tl.sum(b_k[:, None] * b_w1, 0)
                if LINK == KL:
                    b_zq = tl.sum(b_x[:, None] * b_w1, 0)
                elif LINK == LQ_MIRROR:
                    b_zq = tl.sum(b_x_decayed[:, None] * b_w1, 0)
                    if TOWARD_INIT:
                        b_b1 = linked(b_base1, base_scale1, x1, y1, MASS1, 0.0, 1, LINK, Q)
                        b_zq += tl.sum((b_x - b_x_decayed)[:, None] * b_b1, 0)
                    b_slope = tl.sum(power(tl.abs(b_a1), Q - 2.0), 0) / D
                    tl.store(scratch + 2 * N + o_h, b_slope, mask=m_h)
                else:
                    b_zq = tl.sum(b_x_decayed[:, None] * b_d1, 0)
                    if TOWARD_INIT:
                        b_zq += tl.sum(b_x[:, None] * b_base1, 0)
                tl.store(scratch + o_h, b_z1, mask=m_h)
                tl.store(scratch + N + o_h, b_zq, mask=m_h)
                b_sum += gelu(b_z1, "ieee")[:, None] * b_w2
            b_z2 = tl.sum(b_sum, 0)[None, :]
            # threads read what others of this program have written
            tl.debug_barrier()

            # -- the residual and its way back through the layer norm ---------------------------------------------------
            b_normed, inverse_std = normalise(b_z2, m_d, D, NORM_EPS)
            b_error = b_k[None, :] + (b_beta + b_normed * b_gamma) - b_v[None, :]
            b_r = residual(b_error, b_delta[None, :], m_d, LOSS, POWER, SMOOTH_SIGN, SHARPNESS, ERROR_CAP, CLIP)
            b_dz2 = normalise_vjp(b_r * b_gamma, b_normed, inverse_std, m_d, D)
            tl.store(inputs1 + phase * D + o_d, b_k, mask=m_d)
            tl.store(gradients2 + phase * D + o_d, tl.sum(b_dz2, 0), mask=m_d)

            # -- what the read sees of the chunk's writes, on the input axis ---------------------------------------------
            b_inputs1 = tl.load(inputs1 + o_cd, mask=m_e & m_cd, other=0.0)
            b_inputs1 = tl.where(m_own, b_k[None, :], b_inputs1) * b_keys
            if LINK == LQ_MIRROR:
                b_inputs1 = b_inputs1 * (x1 / N)[None, :]
            b_p = -tl.sum(b_inputs1 * b_x[None, :], 1)
            shift = 0.0
            if LINK == KL:
                # the softmax's slope centres gradients over the hidden axis: the token's mean before the tiles' reads
                total = tl.zeros([TN], dtype=tl.float32)
                for j in range(0, TILES):
                    o_h = j * TN + o_n
                    m_h = o_h < N
                    o_2, m_2 = o_h[:, None] * D + o_d[None, :], m_h[:, None] & m_d[None, :]
                    b_a2 = tl.load(dual2 + o_2, mask=m_2, other=0.0)
                    if TOWARD_INIT:
                        b_a2 += tl.load(base2 + o_2, mask=m_2, other=0.0).to(tl.float32)
                    b_w2 = tl.where(m_2, linked(b_a2, scale2, x2, y2, MASS2, MASS2 / N, 0, LINK, Q), 0.0)
                    _, b_slope = gelu_and_slope(tl.load(scratch + o_h, mask=m_h, other=0.0), "ieee")
                    total += tl.sum(b_w2 * b_dz2, 1) * b_slope
                mean = tl.sum(total) / N
                tl.store(means + phase, mean)
                b_means = tl.load(means + o_c, mask=o_c < phase, other=0.0)
                shift = tl.sum(b_p * tl.where(o_c == phase, mean, b_means))

            # -- second pass: the write's backward, the read -------------------------------------------------------------
            mean_slope1, mean_slope2 = tl.sum(x1) / (1.0 * D * N), tl.sum(x2) / (1.0 * D * N)
            own = tl.sum(tl.where(o_c == phase, b_p, 0.0))
            b_s = tl.zeros([C, TN], dtype=tl.float32)
            b_hidden = tl.zeros([C, TN], dtype=tl.float32)
            b_read = tl.zeros([TN], dtype=tl.float32)
            b_kept = tl.zeros([TN, BD], dtype=tl.float32)
            b_constant = tl.zeros([TN, BD], dtype=tl.float32)
            for j in range(0, TILES):
                o_h = j * TN + o_n
                m_h = o_h < N
                o_2, m_2 = o_h[:, None] * D + o_d[None, :], m_h[:, None] & m_d[None, :]
                o_ch, m_ch = o_c[:, None] * N + o_h[None, :], m_e & m_h[None, :]
                b_d2 = tl.load(dual2 + o_2, mask=m_2, other=0.0)
                b_a2, b_base2 = b_d2, b_d2
                if TOWARD_INIT:
                    b_base2 = tl.load(base2 + o_2, mask=m_2, other=0.0).to(tl.float32)
                    b_a2 = b_base2 + b_d2
                b_w2 = tl.where(m_2, linked(b_a2, scale2, x2, y2, MASS2, MASS2 / N, 0, LINK, Q), 0.0)
                b_h, b_slope = gelu_and_slope(tl.load(scratch + o_h, mask=m_h, other=0.0), "ieee")
                b_dz1 = tl.sum(b_w2 * b_dz2, 1) * b_slope

                # the first layer's read
                b_written = tl.load(gradients1 + o_ch, mask=m_ch, other=0.0)
                b_written = tl.sum(b_written * b_p[:, None], 0) + own * b_dz1
                if LINK == KL:
                    b_written = (MASS1 / N) * (b_written - shift)
                elif LINK == LQ_MIRROR:
                    b_columns = tl.load(scratch + 2 * N + o_h, mask=m_h, other=0.0)
                    b_written = b_written * ((Q - 1.0) * scale1 * (b_columns * inverse_of_mean(mean_slope1)))
                b_zq = tl.load(scratch + N + o_h, mask=m_h, other=0.0) + b_written
                b_hq = tl.where(m_h, gelu(b_zq, "ieee"), 0.0)

                # the second layer's
                b_inputs2 = tl.load(inputs2 + o_ch, mask=m_ch, other=0.0)
                b_inputs2 = tl.where(m_own, b_h[None, :], b_inputs2)
                if LINK == KL:
                    b_hidden += b_inputs2
                    b_read += b_hq
                    b_constant += b_hq[:, None] * b_w2
                elif LINK == LQ_MIRROR:
                    b_inputs2 = b_inputs2 * (tl.sum(power(tl.abs(b_a2), Q - 2.0), 1) / D)[None, :]
                    if TOWARD_INIT:
                        b_b2 = linked(b_base2, base_scale2, x2, y2, MASS2, MASS2 / N, 0, LINK, Q)
                        b_kept += b_hq[:, None] * (b_w2 - b_b2)
                        b_constant += b_hq[:, None] * b_b2
                    else:
                        b_kept += b_hq[:, None] * b_w2
                else:
                    b_kept += b_hq[:, None] * b_d2
                    if TOWARD_INIT:
                        b_constant += b_hq[:, None] * b_base2
                b_s += b_inputs2 * b_hq[None, :]
                tl.store(inputs2 + phase * N + o_h, b_h, mask=m_h)
                tl.store(gradients1 + phase * N + o_h, b_dz1, mask=m_h)

            # -- the read's second layer, its norm, the output -----------------------------------------------------------
            b_scores = tl.sum(b_s, 1)
            if LINK == KL:
                b_scores = (MASS2 / N) * (b_scores - tl.sum(b_read) * tl.sum(b_hidden, 1) / N)
            b_gradients2 = tl.load(gradients2 + o_cd, mask=m_e & m_cd, other=0.0)
            b_gradients2 = tl.where(m_own, b_dz2, b_gradients2) * b_keys
            b_z2 = -tl.sum(b_gradients2 * b_scores[:, None], 0)
            if LINK == LQ_MIRROR:
                b_z2 = b_z2 * ((Q - 1.0) * scale2 * (x2 / N * inverse_of_mean(mean_slope2)))
            b_z2 += tl.sum(b_kept, 0) * b_decay + tl.sum(b_constant, 0)
            if LINK != KL and LINK != LQ_MIRROR:
                b_z2 = b_z2 * scale2
            b_normed, inverse_std = normalise(b_z2[None, :], m_d, D, NORM_EPS)
            b_y = b_q[None, :] + (b_beta + b_normed * b_gamma)
            p_y = y + (token * H + head) * D + o_d[None, :]
            tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_d[None, :])
            tl.debug_barrier()

            # -- the end of the row's chunk: its factors are folded into the state ---------------------------------------
            phase += 1
            read += 1
            if phase == C:
                b_etas, b_log_decays = load_chunk_gates(etas, log_decays, program, C, D, BD, GATE_DIM)
                _, _, _, b_fold, b_total = chunk_gates(b_etas, b_log_decays, b_now)
                b_into = tl.trans(tl.load(inputs1 + o_cd, mask=m_cd, other=0.0) * b_fold)
                b_out = tl.load(gradients2 + o_cd, mask=m_cd, other=0.0) * b_fold
                sums = start_of_sums(BD, LINK)
                for j in range(0, TILES):
                    o_h = j * TN + o_n
                    m_h = o_h < N
                    o_1, m_1 = o_d[:, None] * N + o_h[None, :], m_d[:, None] & m_h[None, :]
                    o_2, m_2 = o_h[:, None] * D + o_d[None, :], m_h[:, None] & m_d[None, :]
                    o_ch, m_ch = o_c[:, None] * N + o_h[None, :], (o_c >= 0)[:, None] & m_h[None, :]
                    b_dz1s = tl.load(gradients1 + o_ch, mask=m_ch, other=0.0)
                    b_hs = tl.load(inputs2 + o_ch, mask=m_ch, other=0.0)
                    b_d1 = tl.load(dual1 + o_1, mask=m_1, other=0.0) * b_total[:, None]
                    b_d2 = tl.load(dual2 + o_2, mask=m_2, other=0.0) * b_total[None, :]
                    b_d1 -= product(b_into, b_dz1s, PRECISION)
                    b_d2 -= product(tl.trans(b_hs), b_out, PRECISION)
                    tl.store(dual1 + o_1, b_d1, mask=m_1)
                    tl.store(dual2 + o_2, b_d2, mask=m_2)
                    if TOWARD_INIT:
                        b_d1 += tl.load(base1 + o_1, mask=m_1, other=0.0).to(tl.float32)
                        b_d2 += tl.load(base2 + o_2, mask=m_2, other=0.0).to(tl.float32)
                    sums = sum_of_link(b_d1, b_d2, m_1, m_2, sums, LINK, Q)
                a1, p1, x1, y1, a2, p2, x2, y2 = sums
                tl.debug_barrier()
                if LINK == KL:
                    tl.store(means + o_c, tl.zeros([C], dtype=tl.float32))
                else:
                    tl.store(links, frozen_scale(a1, p1, 1.0 * D * N, LINK, Q, FLOOR, CAP))
                    tl.store(links + 1, frozen_scale(a2, p2, 1.0 * D * N, LINK, Q, FLOOR, CAP))
                tl.store(links + 4 + o_d, x1, mask=m_d)
                tl.store(links + 4 + D + o_d, y1, mask=m_d)
                tl.store(links + 4 + 2 * D + o_d, x2, mask=m_d)
                tl.store(links + 4 + 3 * D + o_d, y2, mask=m_d)
                empty_slots(inputs1, 0, C, D, BD)
                empty_slots(gradients2, 0, C, D, BD)
                empty_slots(etas, program, C, GATE_DIM, BD if GATE_DIM > 1 else 1)
                empty_slots(log_decays, program, C, GATE_DIM, BD if GATE_DIM > 1 else 1)
                b_zeros = tl.zeros([C, TN], dtype=tl.float32)
                for j in range(0, TILES):
                    o_h = j * TN + o_n
                    o_ch, m_ch = o_c[:, None] * N + o_h[None, :], (o_c >= 0)[:, None] & (o_h < N)[None, :]
                    tl.store(inputs2 + o_ch, b_zeros, mask=m_ch)
                    tl.store(gradients1 + o_ch, b_zeros, mask=m_ch)
                phase = 0
                tl.debug_barrier()
    tl.store(phases + program, phase)
    if head == 0:
        tl.store(count + row, tl.load(count + row) + read)
