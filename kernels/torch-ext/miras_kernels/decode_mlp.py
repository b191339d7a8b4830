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

from .decode_pieces import empty_chunk, empty_slots, load_chunk_gates, next_token, row_of, taken_slots
from .layers import (
    add_to_sums,
    load_dual,
    load_first,
    parts_of_read,
    scale_of,
    slope_of_hidden,
    tile_of,
    weight_of,
)
from .links import start_of_sum
from .pieces import (
    KL,
    LQ_MIRROR,
    SHARED_NUMBERS,
    gelu,
    gelu_and_slope,
    inverse_of_mean,
    normalise,
    normalise_vjp,
    product,
    residual,
)


# a single token, the usual call, has a binary of its own: without the loop over tokens nothing is spilled. All others share
# one
@triton.jit(do_not_specialize=["H", "ROTARY_TOKENS"], do_not_specialize_on_alignment=["T"])
def mlp_decode_kernel(
    tokens,
    y,
    base,
    norm,
    dual,
    slots,
    count,
    phases,
    links,
    raw,
    lengths,
    scratch,
    T,
    H,
    ROTARY_TOKENS,
    loss,
    link,
    sizes,
    TN: tl.constexpr,
    THREADS: tl.constexpr,
):
    C: tl.constexpr = sizes.C
    D: tl.constexpr = sizes.D
    BD: tl.constexpr = sizes.BD
    N: tl.constexpr = sizes.N
    tl.static_assert(sizes.C * TN >= THREADS, SHARED_NUMBERS)
    tl.static_assert(sizes.BD * TN >= THREADS, SHARED_NUMBERS)
    # whether texts write the first weight, too
    BOTH: tl.constexpr = sizes.FIXED == 0
    # W = s A, whose reads are those of the dual state times s
    LINEAR: tl.constexpr = link.KIND != KL and link.KIND != LQ_MIRROR
    TILES: tl.constexpr = (N + TN - 1) // TN
    row = row_of(lengths, T, H)
    o_c, o_d = tl.arange(0, C), tl.arange(0, BD)
    m_d = o_d < D
    o_cd, m_cd = o_c[:, None] * D + o_d[None, :], (o_c >= 0)[:, None] & m_d[None, :]
    b_gamma = tl.load(norm.weight + row.head * D + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    b_beta = tl.load(norm.bias + row.head * D + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]

    base1, base2 = base[0] + row.head * D * N, base[1] + row.head * D * N
    dual1, dual2 = dual[0] + row.program * D * N, dual[-1] + row.program * D * N
    inputs1, inputs2 = slots.inputs[0] + row.program * C * D, slots.inputs[-1] + row.program * C * N
    gradients1, gradients2 = slots.gradients[0] + row.program * C * N, slots.gradients[-1] + row.program * C * D
    scratch += row.program * 3 * N
    mass1, mass2 = link.masses[0], link.masses[1]
    # what the link needs of the whole weights at the chunk's start: 4 scales, 4 vectors of channels, then the means of
    # the chunk's first-layer gradients
    links += row.program * (4 + 4 * D + C)
    vectors, means = links + 4 + o_d, links + 4 + 4 * D

    # whatever stands there, no slot beyond the chunk is written to
    phase = tl.load(phases + row.program) & (C - 1)
    read = 0
    for t in range(0, T):
        p_y = y + ((row.index * T + t) * H + row.head) * D + o_d
        if t >= row.length:
            tl.store(p_y, tl.zeros([BD], tl.float32).to(y.dtype.element_ty), mask=m_d)
        else:
            token = next_token(t, row, phase, tokens, raw, slots, T, H, ROTARY_TOKENS, link, sizes, loss.STEP)
            b_decay = tl.exp(token.log_decay)
            scale1, scale2 = tl.load(links), tl.load(links + 1)
            base_scale1, base_scale2 = tl.load(links + 2), tl.load(links + 3)
            x1, y1 = tl.load(vectors, mask=m_d, other=0.0), tl.load(vectors + D, mask=m_d, other=0.0)
            x2, y2 = tl.load(vectors + 2 * D, mask=m_d, other=0.0), tl.load(vectors + 3 * D, mask=m_d, other=0.0)
            sums1, sums2 = (0.0, 0.0, x1, y1), (0.0, 0.0, x2, y2)

            # -- first pass: the write's forward, and what the read's first layer has before the chunk's writes ---------
            b_x = token.q
            if LINEAR and BOTH:
                b_x = b_x * scale1
            b_x_decayed = b_x * b_decay
            b_sum = tl.zeros([TN, BD], dtype=tl.float32)
            for j in range(0, TILES):
                tile = tile_of(j, sizes, TN)
                b_d1, b_base1, b_a1 = load_first(dual1, base1, tile, link, sizes)
                _, _, b_a2 = load_dual(dual2, base2, tile.o_2, tile.m_w, link)
                b_w1 = weight_of(b_a1, tile.m_w, sums1, scale1, mass1, 0.0, link, 0)
                b_w2 = weight_of(b_a2, tile.m_w, sums2, scale2, mass2, mass2 / N, link, 0)
                b_z1 = tl.sum(b_w1 * token.k[None, :], 1)
                if link.KIND == KL or not BOTH:
                    b_zq = tl.sum(b_w1 * b_x[None, :], 1)
                else:
                    b_decaying, b_constant = parts_of_read(b_d1, b_base1, b_w1, base_scale1, link)
                    b_zq = tl.sum(b_decaying * b_x_decayed[None, :], 1)
                    if link.TOWARD_INIT:
                        b_zq += tl.sum(b_constant * b_x[None, :], 1)
                if link.KIND == LQ_MIRROR and BOTH:
                    tl.store(scratch + 2 * N + tile.o_h, slope_of_hidden(b_a1, link, sizes, 0), mask=tile.m_h)
                tl.store(scratch + tile.o_h, b_z1, mask=tile.m_h)
                tl.store(scratch + N + tile.o_h, b_zq, mask=tile.m_h)
                b_sum += gelu(b_z1, "ieee")[:, None] * b_w2
            b_z2 = tl.sum(b_sum, 0)[None, :]
            # threads read what others of this program have written
            tl.debug_barrier()

            # -- the residual and its way back through the layer norm ---------------------------------------------------
            b_normed, inverse_std = normalise(b_z2, m_d, D, norm.EPS)
            b_error = token.k[None, :] + (b_beta + b_normed * b_gamma) - token.v[None, :]
            b_r = residual(b_error, token.delta[None, :], m_d, loss)
            b_dz2 = normalise_vjp(b_r * b_gamma, b_normed, inverse_std, m_d, D)

            # -- what the read sees of the chunk's writes, on the input axis ---------------------------------------------
            b_p = tl.zeros([C], dtype=tl.float32)
            if BOTH:
                b_inputs1 = taken_slots(inputs1, token.k, phase, sizes) * token.keys
                if link.KIND == LQ_MIRROR:
                    b_inputs1 = b_inputs1 * (x1 / N)[None, :]
                b_p = -tl.sum(b_inputs1 * b_x[None, :], 1)
            shift = 0.0
            if link.KIND == KL and BOTH:
                # the softmax's slope centres gradients over the hidden axis: the token's mean before the tiles' reads
                total = tl.zeros([TN], dtype=tl.float32)
                for j in range(0, TILES):
                    tile = tile_of(j, sizes, TN)
                    _, _, b_a2 = load_dual(dual2, base2, tile.o_2, tile.m_w, link)
                    b_w2 = weight_of(b_a2, tile.m_w, sums2, scale2, mass2, mass2 / N, link, 0)
                    _, b_slope = gelu_and_slope(tl.load(scratch + tile.o_h, mask=tile.m_h, other=0.0), "ieee")
                    total += tl.sum(b_w2 * b_dz2, 1) * b_slope
                mean = tl.sum(total) / N
                tl.store(means + phase, mean)
                b_means = tl.load(means + o_c, mask=o_c < phase, other=0.0)
                shift = tl.sum(b_p * tl.where(o_c == phase, mean, b_means))

            # -- second pass: the write's backward, the read -------------------------------------------------------------
            inverse_mean1 = inverse_of_mean(tl.sum(x1) / (1.0 * D * N))
            inverse_mean2 = inverse_of_mean(tl.sum(x2) / (1.0 * D * N))
            own = tl.sum(tl.where(o_c == phase, b_p, 0.0))
            b_s = tl.zeros([TN, C], dtype=tl.float32)
            b_hidden = tl.zeros([TN, C], dtype=tl.float32)
            b_read = tl.zeros([TN], dtype=tl.float32)
            b_kept = tl.zeros([TN, BD], dtype=tl.float32)
            b_fixed = tl.zeros([TN, BD], dtype=tl.float32)
            for j in range(0, TILES):
                tile = tile_of(j, sizes, TN)
                m_ch = tile.m_h[:, None] & (o_c < phase)[None, :]
                b_d2, b_base2, b_a2 = load_dual(dual2, base2, tile.o_2, tile.m_w, link)
                b_w2 = weight_of(b_a2, tile.m_w, sums2, scale2, mass2, mass2 / N, link, 0)
                b_h, b_slope = gelu_and_slope(tl.load(scratch + tile.o_h, mask=tile.m_h, other=0.0), "ieee")
                b_zq = tl.load(scratch + N + tile.o_h, mask=tile.m_h, other=0.0)
                tl.store(inputs2 + phase * N + tile.o_h, b_h, mask=tile.m_h)
                if BOTH:  # the first layer's read sees what has been written of it
                    b_dz1 = tl.sum(b_w2 * b_dz2, 1) * b_slope
                    tl.store(gradients1 + phase * N + tile.o_h, b_dz1, mask=tile.m_h)
                    b_written = tl.load(gradients1 + tile.o_ch, mask=m_ch, other=0.0)
                    b_written = tl.sum(b_written * b_p[None, :], 1) + own * b_dz1
                    if link.KIND == KL:
                        b_written = (mass1 / N) * (b_written - shift)
                    elif link.KIND == LQ_MIRROR:
                        b_columns = tl.load(scratch + 2 * N + tile.o_h, mask=tile.m_h, other=0.0)
                        b_written = b_written * ((link.Q - 1.0) * scale1 * (b_columns * inverse_mean1))
                    b_zq += b_written
                b_hq = tl.where(tile.m_h, gelu(b_zq, "ieee"), 0.0)

                # the second layer's
                b_inputs2 = tl.load(inputs2 + tile.o_ch, mask=m_ch, other=0.0)
                b_inputs2 = tl.where((o_c == phase)[None, :], b_h[:, None], b_inputs2)
                if link.KIND == KL:
                    b_hidden += b_inputs2
                    b_read += b_hq
                    b_fixed += b_hq[:, None] * b_w2
                else:
                    b_decaying, b_constant = parts_of_read(b_d2, b_base2, b_w2, base_scale2, link)
                    b_kept += b_hq[:, None] * b_decaying
                    if link.TOWARD_INIT:
                        b_fixed += b_hq[:, None] * b_constant
                if link.KIND == LQ_MIRROR:
                    b_inputs2 = b_inputs2 * slope_of_hidden(b_a2, link, sizes, 0)[:, None]
                b_s += b_inputs2 * b_hq[:, None]

            # -- the read's second layer, its norm, the output -----------------------------------------------------------
            b_scores = tl.sum(b_s, 0)
            if link.KIND == KL:
                b_scores = (mass2 / N) * (b_scores - tl.sum(b_read) * tl.sum(b_hidden, 0) / N)
            b_gradients2 = taken_slots(gradients2, tl.sum(b_dz2, 0), phase, sizes) * token.keys
            b_z2 = -tl.sum(b_gradients2 * b_scores[:, None], 0)
            if link.KIND == LQ_MIRROR:
                b_z2 = b_z2 * ((link.Q - 1.0) * scale2 * (x2 / N * inverse_mean2))
            b_z2 += tl.sum(b_kept, 0) * b_decay + tl.sum(b_fixed, 0)
            if LINEAR:
                b_z2 = b_z2 * scale2
            b_normed, inverse_std = normalise(b_z2[None, :], m_d, D, norm.EPS)
            b_y = token.q[None, :] + (b_beta + b_normed * b_gamma)
            tl.store(p_y[None, :], b_y.to(y.dtype.element_ty), mask=m_d[None, :])
            tl.debug_barrier()

            # -- the end of the row's chunk: its factors are folded into the state ---------------------------------------
            phase += 1
            read += 1
            if phase == C:
                b_fold, b_total = load_chunk_gates(slots, row, token.log_decay, sizes)
                b_out = tl.load(gradients2 + o_cd, mask=m_cd, other=0.0) * b_fold
                sums2 = start_of_sum(BD, link.KIND)
                if BOTH:
                    b_into = tl.trans(tl.load(inputs1 + o_cd, mask=m_cd, other=0.0) * b_fold)
                    sums1 = start_of_sum(BD, link.KIND)
                for j in range(0, TILES):
                    tile = tile_of(j, sizes, TN)
                    b_h = tl.load(inputs2 + tile.o_ch, mask=tile.m_hc, other=0.0)
                    b_d2 = tl.load(dual2 + tile.o_2, mask=tile.m_w, other=0.0) * b_total[None, :]
                    b_d2 -= product(b_h, b_out, sizes.PRECISION)
                    tl.store(dual2 + tile.o_2, b_d2, mask=tile.m_w)
                    if link.TOWARD_INIT:
                        b_d2 += tl.load(base2 + tile.o_2, mask=tile.m_w, other=0.0).to(tl.float32)
                    sums2 = add_to_sums(sums2, b_d2, tile.m_w, link, 0)
                    if BOTH:
                        b_dz1 = tl.load(gradients1 + tile.o_ch, mask=tile.m_hc, other=0.0)
                        b_d1 = tl.load(dual1 + tile.o_1, mask=tile.m_w, other=0.0) * b_total[None, :]
                        # channels as rows: there are enough of them for the matrix units of a whole warp group
                        b_d1 -= tl.trans(product(b_into, tl.trans(b_dz1), sizes.PRECISION))
                        tl.store(dual1 + tile.o_1, b_d1, mask=tile.m_w)
                        if link.TOWARD_INIT:
                            b_d1 += tl.load(base1 + tile.o_1, mask=tile.m_w, other=0.0).to(tl.float32)
                        sums1 = add_to_sums(sums1, b_d1, tile.m_w, link, 0)
                tl.debug_barrier()
                if link.KIND != KL:
                    tl.store(links + 1, scale_of(sums2, link, sizes))
                tl.store(vectors + 2 * D, sums2[2], mask=m_d)
                tl.store(vectors + 3 * D, sums2[3], mask=m_d)
                if BOTH:
                    if link.KIND == KL:
                        tl.store(means + o_c, tl.zeros([C], dtype=tl.float32))
                    else:
                        tl.store(links, scale_of(sums1, link, sizes))
                    tl.store(vectors, sums1[2], mask=m_d)
                    tl.store(vectors + D, sums1[3], mask=m_d)
                    empty_slots(inputs1, C, D, BD)
                empty_chunk(gradients2, slots, row, sizes)
                for j in range(0, TILES):
                    tile = tile_of(j, sizes, TN)
                    b_zeros = tl.zeros([TN, C], dtype=tl.float32)
                    tl.store(inputs2 + tile.o_ch, b_zeros, mask=tile.m_hc)
                    if BOTH:
                        tl.store(gradients1 + tile.o_ch, b_zeros, mask=tile.m_hc)
                phase = 0
                tl.debug_barrier()
    tl.store(phases + row.program, phase)
    if row.head == 0:
        tl.store(count + row.index, tl.load(count + row.index) + read)
