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
    read        dZ1, Z1q, S, Z2q; then the adjoint of the output's norm
    read back   the read's adjoints: of its second layer, what reaches H, Z1q and the weights; of its first, what
                reaches dZ1 and the weights; summed over tiles, P and x
    fold back   the fold's adjoints, and through dZ1 = (dZ2 W2^T) o gelu'(Z1): summed over tiles, K F, dZ2 F and dZ2
    middle      the adjoint of the layer norm's backward and of the residual
    write back  Z1_bar, the adjoints of the weights
    link        the adjoint of W = phi(A), which needs a sum over the whole weight

A pass carries three sums of C x d at most, and what lies between two passes waits in `rows`: a chunk's tensors would
not fit into registers beside the tiles. With `STREAM` the tiles' operands of C rows wait there, too, and are read for
every tile: slower, and in a fraction of the shared memory.

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
    LQ_MIRROR,
    SHARED_NUMBERS,
    VALUE_CAP,
    bounded,
    chunk_gates,
    frozen_scale,
    frozen_scale_rates,
    gelu,
    gelu_and_slope,
    gelu_slope_curvature,
    inverse_of_mean,
    load_dual,
    load_gates,
    mirror_vjp,
    normalise,
    normalise_vjp,
    operand,
    parts_of_read,
    power,
    product,
    residual,
    residual_vjp,
    slope_bars,
    store_gate_bars,
)
from .rows import get, held, hold, put


# places in `rows`, of a tensor of C rows each
K = tl.constexpr(0)
QUERY_GATE = tl.constexpr(1)
KEY_GATE = tl.constexpr(2)
Z2 = tl.constexpr(3)
DZ2 = tl.constexpr(4)
DZ2_BAR = tl.constexpr(5)
K_BAR = tl.constexpr(6)
QUERY_GATE_BAR = tl.constexpr(7)
KEY_GATE_BAR = tl.constexpr(8)
# operands of every tile, with STREAM
P = tl.constexpr(9)
X = tl.constexpr(10)
X_DECAYED = tl.constexpr(11)
S_BAR = tl.constexpr(12)
U = tl.constexpr(13)
U_DECAYED = tl.constexpr(14)
K_FOLD = tl.constexpr(9)
DZ2_FOLD = tl.constexpr(10)
Z2_BAR = tl.constexpr(11)


def places(stream: bool) -> int:
    """How many tensors of C rows a program needs room for."""
    return 15 if stream else 9


@triton.jit
def tile_offsets(j, C: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, N: tl.constexpr, TN: tl.constexpr):
    # offsets and masks of tile j in W1 [BD, TN], in W2 [TN, BD] and in activations [C, TN]
    o_c, o_d, o_h = tl.arange(0, C), tl.arange(0, BD), j * TN + tl.arange(0, TN)
    m_d, m_h = o_d < D, o_h < N
    o_1, m_1 = o_d[:, None] * N + o_h[None, :], m_d[:, None] & m_h[None, :]
    o_2, m_2 = o_h[:, None] * D + o_d[None, :], m_h[:, None] & m_d[None, :]
    return o_1, m_1, o_2, m_2, o_c[:, None] * N + o_h[None, :], m_h[None, :] & (o_c >= 0)[:, None]


@triton.jit
def error_of_write(
    b_z2,
    b_k,
    b_gamma,
    b_beta,
    v,
    delta,
    o_t,
    m_t,
    p_td,
    m_td,
    m_d,
    D: tl.constexpr,
    DELTA_DIM: tl.constexpr,
    LOSS: tl.constexpr,
    POWER: tl.constexpr,
    SMOOTH_SIGN: tl.constexpr,
    SHARPNESS: tl.constexpr,
    ERROR_CAP: tl.constexpr,
    CLIP: tl.constexpr,
    NORM_EPS: tl.constexpr,
):
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
    return b_normed, inverse_std, b_error, b_delta, b_r


@triton.jit(do_not_specialize=["LONGEST", "H"])
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
    hidden_bar,
    weight_bar1,
    weight_bar2,
    read_bar2,
    link_bar1,
    link_bar2,
    slope_bar1,
    slope_bar2,
    rows,
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
    read_bar2 += program * D * N
    hidden += program * C * N
    read_hidden += program * C * N
    kept_hidden += program * C * N
    hidden_bar += program * C * N
    rows += program * (15 if STREAM else 9) * C * (C if C > BD else BD)
    # W = s A, whose reads are those of the dual state times s
    LINEAR: tl.constexpr = LINK != KL and LINK != LQ_MIRROR
    TILES: tl.constexpr = (N + TN - 1) // TN
    # what the initial memory's own link needs, and the adjoint of its image: through the link when all chunks are done
    base_sums = start_of_sums(BD, LINK)
    constant_bar1, constant_bar2 = base_bar1, base_bar2
    if LINK == LQ_MIRROR:
        slope_bar1 += program * N
        slope_bar2 += program * N
        if TOWARD_INIT:
            constant_bar1 = link_bar1 + program * D * N
            constant_bar2 = link_bar2 + program * D * N
            for j in range(0, TILES):
                o_1, m_1, o_2, m_2, o_ch, m_ch = tile_offsets(j, C, D, BD, N, TN)
                b_base1 = tl.load(base1 + o_1, mask=m_1, other=0.0).to(tl.float32)
                b_base2 = tl.load(base2 + o_2, mask=m_2, other=0.0).to(tl.float32)
                base_sums = sum_of_link(b_base1, b_base2, m_1, m_2, base_sums, LINK, Q)
    base_scale1 = frozen_scale(base_sums[0], base_sums[1], 1.0 * D * N, LINK, Q, FLOOR, CAP)
    base_scale2 = frozen_scale(base_sums[4], base_sums[5], 1.0 * D * N, LINK, Q, FLOOR, CAP)
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
        b_k = bounded(b_k, KEY_CAP)
        # slots that the state has filled, and those that the final state has taken: of chunks that calls share
        m_e = o_c < tl.where(i_c == 0, phase, 0)
        m_ed = m_e[:, None] & m_d[None, :]
        is_partial = (i_c == chunks - 1) & (taken > 0)
        m_f = o_c < tl.where(is_partial, taken, 0)
        m_fd = m_f[:, None] & m_d[None, :]
        p_e = program * C * D + o_c[:, None] * D + o_d[None, :]
        if HAS_EARLIER:
            b_k = tl.where(m_e[:, None], tl.load(earlier_inputs1 + p_e, mask=m_ed, other=0.0), b_k)
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

        sums = start_of_sums(BD, LINK)
        for j in range(0, TILES):
            o_1, m_1, o_2, m_2, o_ch, m_ch = tile_offsets(j, C, D, BD, N, TN)
            b_d1, b_base1, b_a1 = load_dual(saved1 + slot, base1, o_1, m_1, TOWARD_INIT)
            b_d2, b_base2, b_a2 = load_dual(saved2 + slot, base2, o_2, m_2, TOWARD_INIT)
            sums = sum_of_link(b_a1, b_a2, m_1, m_2, sums, LINK, Q)
        a1, p1, x1, y1, a2, p2, x2, y2 = sums
        scale1 = frozen_scale(a1, p1, 1.0 * D * N, LINK, Q, FLOOR, CAP)
        scale2 = frozen_scale(a2, p2, 1.0 * D * N, LINK, Q, FLOOR, CAP)
        # the mirror map's slope as row means times column means, the latter over their mean and times these gains
        mean_slope1, mean_slope2 = tl.sum(x1) / (1.0 * D * N), tl.sum(x2) / (1.0 * D * N)
        slope_gain1, inverse_mean1 = (Q - 1.0) * scale1, inverse_of_mean(mean_slope1)
        slope_gain2, inverse_mean2 = (Q - 1.0) * scale2, inverse_of_mean(mean_slope2)
        tl.debug_barrier()

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
            b_z1 = product(held(rows, K, k_operand, BD, C, BD, STREAM), b_w1, PRECISION)
            tl.store(hidden + o_ch, b_z1, mask=m_ch)
            b_h = gelu(b_z1)
            b_z2 += product(b_h, b_w2, PRECISION)
            if LINK == KL:
                if HAS_EARLIER:
                    p_eh = earlier_inputs2 + program * C * N + o_ch
                    b_h = tl.where(m_e[:, None], tl.load(p_eh, mask=m_ch & m_e[:, None], other=0.0), b_h)
                hidden_mean += tl.sum(b_h, 1) / N
        put(rows, Z2, b_z2, C, BD)
        b_normed, inverse_std, b_error, b_delta, b_r = error_of_write(
            b_z2,
            get(rows, K, BD, C, BD),
            b_gamma,
            b_beta,
            v,
            delta,
            o_t,
            m_t,
            p_td,
            m_td,
            m_d,
            D,
            DELTA_DIM,
            LOSS,
            POWER,
            SMOOTH_SIGN,
            SHARPNESS,
            ERROR_CAP,
            CLIP,
            NORM_EPS,
        )
        b_dz2 = normalise_vjp(b_r * b_gamma[None, :], b_normed, inverse_std, m_d, D)
        if HAS_EARLIER:
            b_dz2 = tl.where(m_e[:, None], tl.load(earlier_gradients2 + p_e, mask=m_ed, other=0.0), b_dz2)
        put(rows, DZ2, b_dz2, C, BD)

        # -- read -----------------------------------------------------------------------------------------------------
        b_x = tl.load(q + p_td, mask=m_td, other=0.0).to(tl.float32)
        b_x = bounded(b_x, KEY_CAP)
        b_keys = get(rows, K, BD, C, BD) * get(rows, KEY_GATE, BD, C, BD)
        b_gq = get(rows, QUERY_GATE, BD, C, BD)
        if LINK == LQ_MIRROR:
            b_keys = b_keys * (x1 / N)[None, :]
        elif LINK != KL:
            b_x = b_x * scale1
        b_p = product(b_x * b_gq, tl.trans(b_keys), PRECISION)
        b_p = tl.where(m_causal, -b_p, 0.0)
        p_operand = hold(rows, P, b_p, C, BD, PRECISION, STREAM)
        x_operand = hold(rows, X, b_x, C, BD, PRECISION, STREAM)
        decayed_operand = hold(rows, X_DECAYED, b_x * (b_gq * half[None, :]), C, BD, PRECISION, STREAM)
        dz2_operand = operand(b_dz2, PRECISION)
        tl.debug_barrier()
        gradient_mean = tl.zeros([C], dtype=tl.float32)
        if LINK == KL:
            for j in range(0, TILES):
                o_1, m_1, o_2, m_2, o_ch, m_ch = tile_offsets(j, C, D, BD, N, TN)
                b_d2, b_base2, b_a2 = load_dual(saved2 + slot, base2, o_2, m_2, TOWARD_INIT)
                b_w2 = tl.where(m_2, linked(b_a2, scale2, x2, y2, MASS2, MASS2 / N, 0, LINK, Q), 0.0)
                _, b_slope = gelu_and_slope(tl.load(hidden + o_ch, mask=m_ch, other=0.0))
                dz2_rows = held(rows, DZ2, dz2_operand, BD, C, BD, STREAM)
                b_dz1 = product(dz2_rows, tl.trans(b_w2), PRECISION) * b_slope
                if HAS_EARLIER:
                    p_eh = earlier_gradients1 + program * C * N + o_ch
                    b_dz1 = tl.where(m_e[:, None], tl.load(p_eh, mask=m_ch & m_e[:, None], other=0.0), b_dz1)
                gradient_mean += tl.sum(b_dz1, 1) / N
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
            b_decaying1, b_fixed1 = parts_of_read(b_d1, b_base1, b_w1, base_scale1, LINK, Q, TOWARD_INIT)
            b_decaying2, b_fixed2 = parts_of_read(b_d2, b_base2, b_w2, base_scale2, LINK, Q, TOWARD_INIT)
            b_h, b_slope = gelu_and_slope(tl.load(hidden + o_ch, mask=m_ch, other=0.0))
            dz2_rows = held(rows, DZ2, dz2_operand, BD, C, BD, STREAM)
            b_dz1 = product(dz2_rows, tl.trans(b_w2), PRECISION) * b_slope
            if HAS_EARLIER:
                m_eh, o_eh = m_ch & m_e[:, None], program * C * N + o_ch
                b_dz1 = tl.where(m_e[:, None], tl.load(earlier_gradients1 + o_eh, mask=m_eh, other=0.0), b_dz1)
                b_h = tl.where(m_e[:, None], tl.load(earlier_inputs2 + o_eh, mask=m_eh, other=0.0), b_h)
            tl.store(kept_hidden + o_ch, b_dz1, mask=m_ch)
            b_inputs, b_gradients = b_h, b_dz1
            if LINK == KL:
                b_gradients = tl.where(m_ch, (MASS1 / N) * (b_dz1 - gradient_mean[:, None]), 0.0)
            elif LINK == LQ_MIRROR:
                slope_of_hidden = tl.sum(power(tl.abs(b_a1), Q - 2.0), 0) / D * inverse_mean1
                b_gradients = b_dz1 * (slope_gain1 * slope_of_hidden)[None, :]
                b_inputs = b_h * (tl.sum(power(tl.abs(b_a2), Q - 2.0), 1) / D)[None, :]
            b_z1q = product(held(rows, P, p_operand, C, C, BD, STREAM), b_gradients, PRECISION)
            if LINK == KL:
                b_z1q += product(held(rows, X, x_operand, BD, C, BD, STREAM), b_w1, PRECISION)
            else:
                b_z1q += product(held(rows, X_DECAYED, decayed_operand, BD, C, BD, STREAM), b_decaying1, PRECISION)
                if TOWARD_INIT:
                    b_z1q += product(held(rows, X, x_operand, BD, C, BD, STREAM), b_fixed1, PRECISION)
            tl.store(read_hidden + o_ch, b_z1q, mask=m_ch)
            b_hq = gelu(b_z1q)
            b_s += product(b_hq, tl.trans(b_inputs), PRECISION)
            if LINK == KL:
                b_constant += product(b_hq, b_w2, PRECISION)
                read_mean += tl.sum(b_hq, 1) / N
            else:
                b_kept += product(b_hq, b_decaying2, PRECISION)
                if TOWARD_INIT:
                    b_constant += product(b_hq, b_fixed2, PRECISION)
        tl.debug_barrier()

        # -- back through the output's norm ---------------------------------------------------------------------------
        if LINK == KL:
            b_s = (MASS2 / N) * (b_s - N * read_mean[:, None] * hidden_mean[None, :])
        b_s = tl.where(m_causal, -b_s, 0.0)
        b_gq = get(rows, QUERY_GATE, BD, C, BD)
        b_dz2, b_gk = get(rows, DZ2, BD, C, BD), get(rows, KEY_GATE, BD, C, BD)
        slope_of_channels = slope_gain2 * (x2 / N * inverse_mean2)
        if LINK == LQ_MIRROR:
            b_gk = b_gk * slope_of_channels[None, :]
        b_written = product(b_s, b_dz2 * b_gk, PRECISION)
        b_decay = b_gq * half[None, :]
        b_z2q = b_written * b_gq + b_kept * b_decay + b_constant
        b_y_bar = tl.load(y_bar + p_td, mask=m_td, other=0.0).to(tl.float32)
        if not LINEAR:
            b_normed_q, inverse_std_q = normalise(b_z2q, m_d, D, NORM_EPS)
        else:
            b_normed_q, inverse_std_q = normalise(b_z2q * scale2, m_d, D, NORM_EPS)
        b_gamma_bar += tl.sum(b_y_bar * b_normed_q, 0)
        b_beta_bar += tl.sum(b_y_bar, 0)
        b_u = normalise_vjp(b_y_bar * b_gamma[None, :], b_normed_q, inverse_std_q, m_d, D)
        scale_bar1, scale_bar2 = 0.0, 0.0
        if LINEAR:
            scale_bar2 += tl.sum(b_u * b_z2q)
            b_u = b_u * scale2
        # the gates' adjoints: B is Gq times `half`
        b_decay_bar = b_u * b_kept
        half_bar = tl.sum(b_decay_bar * b_gq, 0)
        put(rows, QUERY_GATE_BAR, b_u * b_written + b_decay_bar * half[None, :], C, BD)
        b_written_bar = b_u * b_gq
        b_s_bar = tl.where(m_causal, -product(b_written_bar, tl.trans(b_dz2 * b_gk), PRECISION), 0.0)
        b_values_bar = product(tl.trans(b_s), b_written_bar, PRECISION)
        put(rows, DZ2_BAR, b_values_bar * b_gk, C, BD)
        b_gk_bar = b_values_bar * b_dz2
        slope_gain_bar1, slope_gain_bar2 = 0.0, 0.0
        channel_slope_bar = tl.zeros([BD], dtype=tl.float32)
        if LINK == LQ_MIRROR:
            channel_slope_bar = tl.sum(b_gk_bar * get(rows, KEY_GATE, BD, C, BD), 0)
            channel_slope_bar = channel_slope_bar * inverse_mean2
            slope_gain_bar2 += tl.sum(channel_slope_bar * x2) / N
            channel_slope_bar = channel_slope_bar * slope_gain2
            b_gk_bar = b_gk_bar * slope_of_channels[None, :]
        put(rows, KEY_GATE_BAR, b_gk_bar, C, BD)

        # -- back through the read's second layer ---------------------------------------------------------------------
        s_operand = hold(rows, S_BAR, b_s_bar, C, BD, PRECISION, STREAM)
        u_operand = hold(rows, U, b_u, C, BD, PRECISION, STREAM)
        kept_operand = hold(rows, U_DECAYED, b_u * b_decay, C, BD, PRECISION, STREAM)
        # what centring takes out of the adjoint of H
        hidden_bar_mean = tl.sum(b_s_bar * read_mean[:, None], 0)
        tl.debug_barrier()
        z1q_bar_mean = tl.zeros([C], dtype=tl.float32)
        for j in range(0, TILES):
            o_1, m_1, o_2, m_2, o_ch, m_ch = tile_offsets(j, C, D, BD, N, TN)
            b_d2, b_base2, b_a2 = load_dual(saved2 + slot, base2, o_2, m_2, TOWARD_INIT)
            b_w2 = tl.where(m_2, linked(b_a2, scale2, x2, y2, MASS2, MASS2 / N, 0, LINK, Q), 0.0)
            b_decaying2, b_fixed2 = parts_of_read(b_d2, b_base2, b_w2, base_scale2, LINK, Q, TOWARD_INIT)
            b_h = gelu(tl.load(hidden + o_ch, mask=m_ch, other=0.0))
            if HAS_EARLIER:
                m_eh, o_eh = m_ch & m_e[:, None], program * C * N + o_ch
                b_h = tl.where(m_e[:, None], tl.load(earlier_inputs2 + o_eh, mask=m_eh, other=0.0), b_h)
            b_hq, b_slope_q = gelu_and_slope(tl.load(read_hidden + o_ch, mask=m_ch, other=0.0))
            b_inputs = b_h
            slope_of_hidden = tl.sum(power(tl.abs(b_a2), Q - 2.0), 1) / D
            if LINK == KL:
                b_inputs = tl.where(m_ch, (MASS2 / N) * (b_h - hidden_mean[:, None]), 0.0)
            elif LINK == LQ_MIRROR:
                b_inputs = b_h * slope_of_hidden[None, :]
            b_hq_bar = product(held(rows, S_BAR, s_operand, C, C, BD, STREAM), b_inputs, PRECISION)
            if LINK == KL:
                u_rows = held(rows, U, u_operand, BD, C, BD, STREAM)
                b_hq_bar += product(u_rows, tl.trans(b_w2), PRECISION)
                b_weight_bar = product(tl.trans(b_hq), u_rows, PRECISION)
            else:
                decayed_rows = held(rows, U_DECAYED, kept_operand, BD, C, BD, STREAM)
                b_hq_bar += product(decayed_rows, tl.trans(b_decaying2), PRECISION)
                b_weight_bar = product(tl.trans(b_hq), decayed_rows, PRECISION)
                if TOWARD_INIT:
                    u_rows = held(rows, U, u_operand, BD, C, BD, STREAM)
                    b_hq_bar += product(u_rows, tl.trans(b_fixed2), PRECISION)
                    b_fixed_bar = tl.load(constant_bar2 + o_2, mask=m_2, other=0.0)
                    b_fixed_bar += product(tl.trans(b_hq), u_rows, PRECISION)
                    if LINK == LQ_MIRROR:
                        b_fixed_bar -= b_weight_bar
                    tl.store(constant_bar2 + o_2, b_fixed_bar, mask=m_2)
            # the state's adjoint of links that are linear, the weights' of the others
            if LINEAR:
                tl.store(read_bar2 + o_2, b_weight_bar, mask=m_2)
            else:
                tl.store(weight_bar2 + o_2, b_weight_bar, mask=m_2)
            b_h_bar = product(tl.trans(held(rows, S_BAR, s_operand, C, C, BD, STREAM)), b_hq, PRECISION)
            if LINK == KL:
                b_h_bar = tl.where(m_ch, (MASS2 / N) * (b_h_bar - hidden_bar_mean[:, None]), 0.0)
            elif LINK == LQ_MIRROR:
                o_h = j * TN + tl.arange(0, TN)
                tl.store(slope_bar2 + o_h, tl.sum(b_h_bar * b_h, 0), mask=o_h < N)
                b_h_bar = b_h_bar * slope_of_hidden[None, :]
            tl.store(hidden_bar + o_ch, b_h_bar, mask=m_ch)
            b_z1q_bar = b_hq_bar * b_slope_q
            if LINK == KL:
                z1q_bar_mean += tl.sum(b_z1q_bar, 1) / N
            tl.debug_barrier()
            tl.store(read_hidden + o_ch, b_z1q_bar, mask=m_ch)
        tl.debug_barrier()

        # -- back through the read's first layer ----------------------------------------------------------------------
        gradient_bar_mean = tl.zeros([C], dtype=tl.float32)
        if LINK == KL:
            b_p = held(rows, P, p_operand, C, C, BD, STREAM).to(tl.float32)
            gradient_bar_mean = tl.sum(b_p * z1q_bar_mean[:, None], 0)
        b_p_bar = tl.zeros([C, C], dtype=tl.float32)
        b_x_bar = tl.zeros([C, BD], dtype=tl.float32)
        b_x_decayed_bar = tl.zeros([C, BD], dtype=tl.float32)
        for j in range(0, TILES):
            o_1, m_1, o_2, m_2, o_ch, m_ch = tile_offsets(j, C, D, BD, N, TN)
            b_d1, b_base1, b_a1 = load_dual(saved1 + slot, base1, o_1, m_1, TOWARD_INIT)
            b_w1 = tl.where(m_1, linked(b_a1, scale1, x1, y1, MASS1, 0.0, 1, LINK, Q), 0.0)
            b_decaying1, b_fixed1 = parts_of_read(b_d1, b_base1, b_w1, base_scale1, LINK, Q, TOWARD_INIT)
            b_dz1 = tl.load(kept_hidden + o_ch, mask=m_ch, other=0.0)
            b_gradients = b_dz1
            slope_of_hidden = tl.sum(power(tl.abs(b_a1), Q - 2.0), 0) / D * inverse_mean1
            if LINK == KL:
                b_gradients = tl.where(m_ch, (MASS1 / N) * (b_dz1 - gradient_mean[:, None]), 0.0)
            elif LINK == LQ_MIRROR:
                b_gradients = b_dz1 * (slope_gain1 * slope_of_hidden)[None, :]
            b_z1q_bar = tl.load(read_hidden + o_ch, mask=m_ch, other=0.0)
            b_p_bar += product(b_z1q_bar, tl.trans(b_gradients), PRECISION)
            if LINK == KL:
                b_x_bar += product(b_z1q_bar, tl.trans(b_w1), PRECISION)
                x_rows = held(rows, X, x_operand, BD, C, BD, STREAM)
                b_weight_bar = product(tl.trans(x_rows), b_z1q_bar, PRECISION)
            else:
                b_x_decayed_bar += product(b_z1q_bar, tl.trans(b_decaying1), PRECISION)
                x_rows = held(rows, X_DECAYED, decayed_operand, BD, C, BD, STREAM)
                b_weight_bar = product(tl.trans(x_rows), b_z1q_bar, PRECISION)
                if TOWARD_INIT:
                    b_x_bar += product(b_z1q_bar, tl.trans(b_fixed1), PRECISION)
                    x_rows = held(rows, X, x_operand, BD, C, BD, STREAM)
                    b_fixed_bar = tl.load(constant_bar1 + o_1, mask=m_1, other=0.0)
                    b_fixed_bar += product(tl.trans(x_rows), b_z1q_bar, PRECISION)
                    if LINK == LQ_MIRROR:
                        b_fixed_bar -= b_weight_bar
                    tl.store(constant_bar1 + o_1, b_fixed_bar, mask=m_1)
            tl.store(weight_bar1 + o_1, b_weight_bar, mask=m_1)
            b_dz1_bar = product(tl.trans(held(rows, P, p_operand, C, C, BD, STREAM)), b_z1q_bar, PRECISION)
            if LINK == KL:
                b_dz1_bar = tl.where(m_ch, (MASS1 / N) * (b_dz1_bar - gradient_bar_mean[:, None]), 0.0)
            elif LINK == LQ_MIRROR:
                o_h = j * TN + tl.arange(0, TN)
                hidden_slope_bar = tl.sum(b_dz1_bar * b_dz1, 0)
                slope_gain_bar1 += tl.sum(hidden_slope_bar * slope_of_hidden)
                tl.store(slope_bar1 + o_h, hidden_slope_bar * inverse_mean1 * slope_gain1, mask=o_h < N)
                b_dz1_bar = b_dz1_bar * (slope_gain1 * slope_of_hidden)[None, :]
            tl.debug_barrier()
            tl.store(kept_hidden + o_ch, b_dz1_bar, mask=m_ch)
        tl.debug_barrier()

        # -- queries, and what of the keys the read has seen ----------------------------------------------------------
        b_raw = tl.load(q + p_td, mask=m_td, other=0.0).to(tl.float32)
        b_q = bounded(b_raw, KEY_CAP)
        b_x = b_q
        b_k, b_gk = get(rows, K, BD, C, BD), get(rows, KEY_GATE, BD, C, BD)
        b_gq = get(rows, QUERY_GATE, BD, C, BD)
        slope_of_keys = x1 / N
        if LINK == LQ_MIRROR:
            b_gk = b_gk * slope_of_keys[None, :]
        elif LINK != KL:
            b_x = b_q * scale1
        b_p_bar = tl.where(m_causal, -b_p_bar, 0.0)
        b_of_query = product(b_p_bar, b_k * b_gk, PRECISION)
        b_of_key = product(tl.trans(b_p_bar), b_x * b_gq, PRECISION)
        b_x_bar += b_of_query * b_gq + b_x_decayed_bar * (b_gq * half[None, :])
        b_decay_bar = b_x_decayed_bar * b_x
        half_bar += tl.sum(b_decay_bar * b_gq, 0)
        b_gq_bar = get(rows, QUERY_GATE_BAR, BD, C, BD) + b_of_query * b_x + b_decay_bar * half[None, :]
        put(rows, QUERY_GATE_BAR, b_gq_bar, C, BD)
        put(rows, K_BAR, b_of_key * b_gk, C, BD)
        b_gk_bar = b_of_key * b_k
        key_slope_bar = tl.zeros([BD], dtype=tl.float32)
        if LINK == LQ_MIRROR:
            key_slope_bar = tl.sum(b_gk_bar * get(rows, KEY_GATE, BD, C, BD), 0)
            b_gk_bar = b_gk_bar * slope_of_keys[None, :]
        put(rows, KEY_GATE_BAR, get(rows, KEY_GATE_BAR, BD, C, BD) + b_gk_bar, C, BD)
        b_q_bar = b_x_bar
        if LINEAR:
            scale_bar1 += tl.sum(b_x_bar * b_q)
            b_q_bar = b_x_bar * scale1
        b_q_bar += tl.load(y_bar + p_td, mask=m_td, other=0.0).to(tl.float32)
        # what was cut has no gradient
        b_q_bar = tl.where(tl.abs(b_raw) > KEY_CAP, 0.0, b_q_bar)
        tl.store(q_bar + p_td, b_q_bar.to(q_bar.dtype.element_ty), mask=m_td)

        # -- back through the fold, and through dZ1 = (dZ2 W2^T) o gelu'(Z1) -------------------------------------------
        b_dz2, b_fold = get(rows, DZ2, BD, C, BD), get(rows, KEY_GATE, BD, C, BD) * half[None, :]
        k_fold_operand = hold(rows, K_FOLD, get(rows, K, BD, C, BD) * b_fold, C, BD, PRECISION, STREAM)
        dz2_fold_operand = hold(rows, DZ2_FOLD, b_dz2 * b_fold, C, BD, PRECISION, STREAM)
        dz2_operand = operand(b_dz2, PRECISION)
        tl.debug_barrier()
        b_k_fold_bar = tl.zeros([C, BD], dtype=tl.float32)
        b_dz2_fold_bar = tl.zeros([C, BD], dtype=tl.float32)
        b_dz2_bar = tl.zeros([C, BD], dtype=tl.float32)
        b_total_bar = tl.zeros([BD], dtype=tl.float32)
        # a chunk that the final state has begun is not folded: its dual state is handed on as it is
        folds = 1.0
        if KEEP_FINAL:
            folds = tl.where(is_partial, 0.0, 1.0)
        for j in range(0, TILES):
            o_1, m_1, o_2, m_2, o_ch, m_ch = tile_offsets(j, C, D, BD, N, TN)
            b_d1 = tl.load(saved1 + slot + o_1, mask=m_1, other=0.0)
            b_d2, b_base2, b_a2 = load_dual(saved2 + slot, base2, o_2, m_2, TOWARD_INIT)
            b_w2 = tl.where(m_2, linked(b_a2, scale2, x2, y2, MASS2, MASS2 / N, 0, LINK, Q), 0.0)
            b_h, b_slope, b_curvature = gelu_slope_curvature(tl.load(hidden + o_ch, mask=m_ch, other=0.0))
            dz2_rows = held(rows, DZ2, dz2_operand, BD, C, BD, STREAM)
            b_dh = product(dz2_rows, tl.trans(b_w2), PRECISION)
            b_dz1 = b_dh * b_slope
            m_eh, o_eh = m_ch & m_e[:, None], program * C * N + o_ch
            if HAS_EARLIER:
                b_dz1 = tl.where(m_e[:, None], tl.load(earlier_gradients1 + o_eh, mask=m_eh, other=0.0), b_dz1)
                b_h = tl.where(m_e[:, None], tl.load(earlier_inputs2 + o_eh, mask=m_eh, other=0.0), b_h)

            b_next = tl.load(state_bar1 + o_1, mask=m_1, other=0.0) * (bound1 * folds)
            b_total_bar += tl.sum(b_next * b_d1, 1)
            b_k_fold_bar -= product(b_dz1, tl.trans(b_next), PRECISION)
            b_dz1_bar = tl.load(kept_hidden + o_ch, mask=m_ch, other=0.0)
            b_dz1_bar -= product(held(rows, K_FOLD, k_fold_operand, BD, C, BD, STREAM), b_next, PRECISION)

            b_next = tl.load(state_bar2 + o_2, mask=m_2, other=0.0) * (bound2 * folds)
            b_total_bar += tl.sum(b_next * b_d2, 0)
            b_dz2_fold_bar -= product(b_h, b_next, PRECISION)
            b_h_bar = tl.load(hidden_bar + o_ch, mask=m_ch, other=0.0)
            b_h_bar -= product(held(rows, DZ2_FOLD, dz2_fold_operand, BD, C, BD, STREAM), tl.trans(b_next), PRECISION)

            if KEEP_FINAL:
                m_fh = m_ch & m_f[:, None]
                b_h_bar += tl.load(inputs2_bar + o_eh, mask=m_fh, other=0.0)
                b_dz1_bar += tl.load(gradients1_bar + o_eh, mask=m_fh, other=0.0)
            if HAS_EARLIER:
                tl.store(earlier_inputs2_bar + o_eh, b_h_bar, mask=m_eh)
                tl.store(earlier_gradients1_bar + o_eh, b_dz1_bar, mask=m_eh)
                b_h_bar = tl.where(m_e[:, None], 0.0, b_h_bar)
                b_dz1_bar = tl.where(m_e[:, None], 0.0, b_dz1_bar)

            tl.store(hidden_bar + o_ch, b_h_bar * b_slope + b_dz1_bar * b_dh * b_curvature, mask=m_ch)
            b_dh_bar = b_dz1_bar * b_slope
            b_dz2_bar += product(b_dh_bar, b_w2, PRECISION)
            dz2_rows = held(rows, DZ2, dz2_operand, BD, C, BD, STREAM)
            b_w2_bar = product(tl.trans(b_dh_bar), dz2_rows, PRECISION)
            if not LINEAR:
                b_w2_bar += tl.load(weight_bar2 + o_2, mask=m_2, other=0.0)
            tl.store(weight_bar2 + o_2, b_w2_bar, mask=m_2)
        tl.debug_barrier()

        # -- gates ----------------------------------------------------------------------------------------------------
        b_k, b_gk = get(rows, K, BD, C, BD), get(rows, KEY_GATE, BD, C, BD)
        b_fold = b_gk * half[None, :]
        b_fold_bar = b_dz2_fold_bar * get(rows, DZ2, BD, C, BD) + b_k_fold_bar * b_k
        half_bar += tl.sum(b_fold_bar * b_gk, 0) + 2.0 * half * b_total_bar
        b_dz2_bar += get(rows, DZ2_BAR, BD, C, BD) + b_dz2_fold_bar * b_fold
        b_k_bar = get(rows, K_BAR, BD, C, BD) + b_k_fold_bar * b_fold
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

        # -- back through the layer norm's backward and the residual --------------------------------------------------
        if KEEP_FINAL:
            b_dz2_bar += tl.load(gradients2_bar + p_e, mask=m_fd, other=0.0)
        if HAS_EARLIER:
            tl.store(earlier_gradients2_bar + p_e, b_dz2_bar, mask=m_ed)
            b_dz2_bar = tl.where(m_e[:, None], 0.0, b_dz2_bar)
        b_normed, inverse_std, b_error, b_delta, b_r = error_of_write(
            get(rows, Z2, BD, C, BD),
            b_k,
            b_gamma,
            b_beta,
            v,
            delta,
            o_t,
            m_t,
            p_td,
            m_td,
            m_d,
            D,
            DELTA_DIM,
            LOSS,
            POWER,
            SMOOTH_SIGN,
            SHARPNESS,
            ERROR_CAP,
            CLIP,
            NORM_EPS,
        )
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
        # what was cut has no gradient
        b_raw = tl.load(v + p_td, mask=m_td, other=0.0).to(tl.float32)
        b_v_bar = tl.where(tl.abs(b_raw) > VALUE_CAP, 0.0, -b_prediction_bar)
        tl.store(v_bar + p_td, b_v_bar.to(v_bar.dtype.element_ty), mask=m_td)
        if DELTA_DIM == 1:
            b_bar = tl.sum(tl.where(m_d[None, :], b_delta_bar, 0.0), 1)
            if LOSS != HUBER_COORDINATE:
                b_bar = b_bar / D  # the loss has one threshold a head, and its adjoint stands in every channel
            tl.store(delta_bar + o_t, b_bar, mask=m_t)
        elif DELTA_DIM > 1:
            tl.store(delta_bar + p_td, b_delta_bar, mask=m_td)
        put(rows, K_BAR, b_k_bar + b_prediction_bar, C, BD)
        b_dz2 = normalise_vjp(b_g, b_normed, inverse_std, m_d, D)
        b_n_bar = b_prediction_bar * b_gamma[None, :]
        b_n_bar -= b_dz2_bar * ((tl.sum(b_g * b_normed, 1) / D)[:, None] * inverse_std)
        b_n_bar -= b_g * ((tl.sum(b_dz2_bar * b_normed, 1) / D)[:, None] * inverse_std)
        b_z2_bar = normalise_vjp(b_n_bar, b_normed, inverse_std, m_d, D)
        b_z2_bar -= b_normed * ((tl.sum(b_dz2_bar * b_dz2, 1) / D)[:, None] * inverse_std)

        # -- write back -----------------------------------------------------------------------------------------------
        k_operand = operand(b_k, PRECISION)
        z2_operand = hold(rows, Z2_BAR, b_z2_bar, C, BD, PRECISION, STREAM)
        tl.debug_barrier()
        b_kept_total = half * half
        if KEEP_FINAL:
            b_kept_total = tl.where(is_partial, 1.0, b_kept_total)
        b_k_bar = tl.zeros([C, BD], dtype=tl.float32)
        inner1 = tl.zeros([BD], dtype=tl.float32)
        inner2 = tl.zeros([BD], dtype=tl.float32)
        for j in range(0, TILES):
            o_1, m_1, o_2, m_2, o_ch, m_ch = tile_offsets(j, C, D, BD, N, TN)
            b_d1, b_base1, b_a1 = load_dual(saved1 + slot, base1, o_1, m_1, TOWARD_INIT)
            b_d2, b_base2, b_a2 = load_dual(saved2 + slot, base2, o_2, m_2, TOWARD_INIT)
            b_w1 = tl.where(m_1, linked(b_a1, scale1, x1, y1, MASS1, 0.0, 1, LINK, Q), 0.0)
            b_w2 = tl.where(m_2, linked(b_a2, scale2, x2, y2, MASS2, MASS2 / N, 0, LINK, Q), 0.0)
            b_h, b_slope = gelu_and_slope(tl.load(hidden + o_ch, mask=m_ch, other=0.0))
            z2_rows = held(rows, Z2_BAR, z2_operand, BD, C, BD, STREAM)
            b_z1_bar = tl.load(hidden_bar + o_ch, mask=m_ch, other=0.0)
            b_z1_bar += product(z2_rows, tl.trans(b_w2), PRECISION) * b_slope
            b_w2_bar = tl.load(weight_bar2 + o_2, mask=m_2, other=0.0)
            b_w2_bar += product(tl.trans(b_h), z2_rows, PRECISION)
            b_w1_bar = product(tl.trans(held(rows, K, k_operand, BD, C, BD, STREAM)), b_z1_bar, PRECISION)
            b_state1 = tl.load(state_bar1 + o_1, mask=m_1, other=0.0) * bound1 * b_kept_total[:, None]
            b_state2 = tl.load(state_bar2 + o_2, mask=m_2, other=0.0) * bound2 * b_kept_total[None, :]
            if LINEAR:
                b_state1 += tl.load(weight_bar1 + o_1, mask=m_1, other=0.0)
                b_state2 += tl.load(read_bar2 + o_2, mask=m_2, other=0.0)
            else:
                b_w1_bar += tl.load(weight_bar1 + o_1, mask=m_1, other=0.0)
            tl.store(state_bar1 + o_1, b_state1, mask=m_1)
            tl.store(state_bar2 + o_2, b_state2, mask=m_2)
            b_k_bar += product(b_z1_bar, tl.trans(b_w1), PRECISION)
            if LINK == KL:
                inner1 += tl.sum(b_w1_bar * b_w1, 1) / MASS1
                # the weights themselves, with their uniform part
                inner2 += tl.sum(tl.where(m_2, b_w2_bar * (b_w2 + MASS2 / N), 0.0), 0) / MASS2
            elif LINK == LQ_MIRROR:
                scale_bar1 += tl.sum(b_w1_bar * b_a1 * power(tl.abs(b_a1), Q - 2.0))
                scale_bar2 += tl.sum(b_w2_bar * b_a2 * power(tl.abs(b_a2), Q - 2.0))
            else:
                scale_bar1 += tl.sum(b_w1_bar * b_a1)
                scale_bar2 += tl.sum(b_w2_bar * b_a2)
            # a number may have been read by more than one thread: all have, before one writes
            tl.debug_barrier()
            tl.store(weight_bar1 + o_1, b_w1_bar, mask=m_1)
            tl.store(weight_bar2 + o_2, b_w2_bar, mask=m_2)
        tl.debug_barrier()
        b_k_bar += get(rows, K_BAR, BD, C, BD)
        if KEEP_FINAL:
            b_k_bar += tl.load(inputs1_bar + p_e, mask=m_fd, other=0.0)
        if HAS_EARLIER:
            tl.store(earlier_inputs1_bar + p_e, b_k_bar, mask=m_ed)
        b_raw = tl.load(k + p_td, mask=m_td, other=0.0).to(tl.float32)
        b_k_bar = tl.where(tl.abs(b_raw) > KEY_CAP, 0.0, b_k_bar)
        tl.store(k_bar + p_td, b_k_bar.to(k_bar.dtype.element_ty), mask=m_td)

        # -- link -----------------------------------------------------------------------------------------------------
        slope_mean_bar1, slope_mean_bar2 = 0.0, 0.0
        if LINK == LQ_MIRROR:
            of_scale1, slope_mean_bar1 = slope_bars(slope_gain_bar1, slope_gain1, mean_slope1, Q)
            of_scale2, slope_mean_bar2 = slope_bars(slope_gain_bar2, slope_gain2, mean_slope2, Q)
            scale_bar1 += of_scale1
            scale_bar2 += of_scale2
        if LINK != KL:
            first1, second1 = frozen_scale_rates(a1, p1, 1.0 * D * N, scale_bar1, LINK, Q, FLOOR, CAP)
            first2, second2 = frozen_scale_rates(a2, p2, 1.0 * D * N, scale_bar2, LINK, Q, FLOOR, CAP)
        largest1, largest2 = 0.0, 0.0
        for j in range(0, TILES):
            o_1, m_1, o_2, m_2, o_ch, m_ch = tile_offsets(j, C, D, BD, N, TN)
            b_d1, b_base1, b_a1 = load_dual(saved1 + slot, base1, o_1, m_1, TOWARD_INIT)
            b_d2, b_base2, b_a2 = load_dual(saved2 + slot, base2, o_2, m_2, TOWARD_INIT)
            b_w1_bar = tl.load(weight_bar1 + o_1, mask=m_1, other=0.0)
            b_w2_bar = tl.load(weight_bar2 + o_2, mask=m_2, other=0.0)
            if LINK == KL:
                b_w1 = tl.where(m_1, linked(b_a1, scale1, x1, y1, MASS1, 0.0, 1, LINK, Q), 0.0)
                b_w2 = tl.where(m_2, linked(b_a2, scale2, x2, y2, MASS2, 0.0, 0, LINK, Q), 0.0)
                b_a1_bar = (b_w1_bar - inner1[:, None]) * b_w1
                b_a2_bar = (b_w2_bar - inner2[None, :]) * b_w2
            elif LINK == LQ_MIRROR:
                o_h = j * TN + tl.arange(0, TN)
                of_hidden1 = tl.load(slope_bar1 + o_h, mask=o_h < N, other=0.0)
                of_hidden2 = tl.load(slope_bar2 + o_h, mask=o_h < N, other=0.0)
                b_slope1_bar = (key_slope_bar / N)[:, None] + (of_hidden1 / D + slope_mean_bar1 / (D * N))[None, :]
                b_slope2_bar = (of_hidden2 / D)[:, None]
                b_slope2_bar += (channel_slope_bar / N + slope_mean_bar2 / (D * N))[None, :]
                b_a1_bar = mirror_vjp(b_a1, b_w1_bar, b_slope1_bar, scale1, first1, second1, Q)
                b_a2_bar = mirror_vjp(b_a2, b_w2_bar, b_slope2_bar, scale2, first2, second2, Q)
            else:
                b_a1_bar = b_w1_bar * scale1 + first1 * b_a1
                b_a2_bar = b_w2_bar * scale2 + first2 * b_a2
                if LINK == LQ:
                    b_a1_bar += second1 * power(tl.abs(b_a1), Q - 2.0) * b_a1
                    b_a2_bar += second2 * power(tl.abs(b_a2), Q - 2.0) * b_a2
            b_state1 = tl.load(state_bar1 + o_1, mask=m_1, other=0.0) + b_a1_bar
            b_state2 = tl.load(state_bar2 + o_2, mask=m_2, other=0.0) + b_a2_bar
            largest1 = tl.maximum(largest1, tl.max(tl.abs(b_state1)))
            largest2 = tl.maximum(largest2, tl.max(tl.abs(b_state2)))
            tl.debug_barrier()
            tl.store(state_bar1 + o_1, b_state1, mask=m_1)
            tl.store(state_bar2 + o_2, b_state2, mask=m_2)
            if TOWARD_INIT:
                b_base1_bar = tl.load(base_bar1 + o_1, mask=m_1, other=0.0) + b_a1_bar
                b_base2_bar = tl.load(base_bar2 + o_2, mask=m_2, other=0.0) + b_a2_bar
                tl.store(base_bar1 + o_1, b_base1_bar, mask=m_1)
                tl.store(base_bar2 + o_2, b_base2_bar, mask=m_2)
        tl.debug_barrier()

    if LINK == LQ_MIRROR:
        if TOWARD_INIT:
            # the initial memory's image, which stands in the reads of all chunks
            scale_bar1, scale_bar2 = 0.0, 0.0
            for j in range(0, TILES):
                o_1, m_1, o_2, m_2, o_ch, m_ch = tile_offsets(j, C, D, BD, N, TN)
                b_a1 = tl.load(base1 + o_1, mask=m_1, other=0.0).to(tl.float32)
                b_a2 = tl.load(base2 + o_2, mask=m_2, other=0.0).to(tl.float32)
                b_w1_bar = tl.load(constant_bar1 + o_1, mask=m_1, other=0.0)
                b_w2_bar = tl.load(constant_bar2 + o_2, mask=m_2, other=0.0)
                scale_bar1 += tl.sum(b_w1_bar * b_a1 * power(tl.abs(b_a1), Q - 2.0))
                scale_bar2 += tl.sum(b_w2_bar * b_a2 * power(tl.abs(b_a2), Q - 2.0))
            a1, p1, x1, y1, a2, p2, x2, y2 = base_sums
            first1, second1 = frozen_scale_rates(a1, p1, 1.0 * D * N, scale_bar1, LINK, Q, FLOOR, CAP)
            first2, second2 = frozen_scale_rates(a2, p2, 1.0 * D * N, scale_bar2, LINK, Q, FLOOR, CAP)
            for j in range(0, TILES):
                o_1, m_1, o_2, m_2, o_ch, m_ch = tile_offsets(j, C, D, BD, N, TN)
                b_a1 = tl.load(base1 + o_1, mask=m_1, other=0.0).to(tl.float32)
                b_a2 = tl.load(base2 + o_2, mask=m_2, other=0.0).to(tl.float32)
                b_w1_bar = tl.load(constant_bar1 + o_1, mask=m_1, other=0.0)
                b_w2_bar = tl.load(constant_bar2 + o_2, mask=m_2, other=0.0)
                b_base1_bar = tl.load(base_bar1 + o_1, mask=m_1, other=0.0)
                b_base2_bar = tl.load(base_bar2 + o_2, mask=m_2, other=0.0)
                b_base1_bar += mirror_vjp(b_a1, b_w1_bar, 0.0, base_scale1, first1, second1, Q)
                b_base2_bar += mirror_vjp(b_a2, b_w2_bar, 0.0, base_scale2, first2, second2, Q)
                tl.store(base_bar1 + o_1, b_base1_bar, mask=m_1)
                tl.store(base_bar2 + o_2, b_base2_bar, mask=m_2)

    tl.store(norm_weight_bar + program * D + o_d, b_gamma_bar, mask=m_d)
    tl.store(norm_bias_bar + program * D + o_d, b_beta_bar, mask=m_d)
