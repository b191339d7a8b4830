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
"""The forward pass: one program per sequence and head, which reads its sequence chunk by chunk.

A matrix memory's state stays in registers. An MLP memory's does not fit, so the hidden units go by in tiles of `TN` whose
part of the state streams from global memory (it stays in L2), twice in a chunk:

    first pass    Z1_j = K W1_j,  Z2 += gelu(Z1_j) W2_j
    between       residual, layer norm's backward: dZ2;  P = mask(Q~ K~^T)
    second pass   dZ1_j, Z1q_j, the read's hidden units, S += Hq_j H_j^T, the tile's fold into the state
    after         Z2q from S and the tiles' sums;  y = q + LN(Z2q)

Only Z2, S and sums of the read cross tiles. What a link needs of a whole weight (a norm, a log-sum-exp) is summed while
the tiles are folded, for the next chunk.
"""

import triton
import triton.language as tl

from .chunks import (
    behind,
    chunk_of,
    ends_before,
    error_of_write,
    first_broken,
    keep_slots,
    load_gates,
    load_rows,
    place_of,
    residual_of,
    slot_of,
    store_broken,
)
from .layers import (
    add_to_sums,
    hidden_behind,
    load_dual,
    load_first,
    parts_of_read,
    scale_of,
    slope_of_hidden,
    tile_of,
    weight_of,
    within,
)
from .links import start_of_sum
from .pieces import (
    KEY_CAP,
    KL,
    LQ_MIRROR,
    SHARED_NUMBERS,
    VALUE_CAP,
    bounded,
    chunk_gates,
    gelu,
    gelu_and_slope,
    inverse_of_mean,
    normalise,
    normalise_vjp,
    operand,
    product,
)


# what a launch does: everything, or, where no text writes the first weight, one of three parts. Features, the hidden units
# of keys, are those of all chunks at once; writes are a chain, and leave the state at every chunk's start; reads need nothing
# else, and are made of all chunks at once
EVERYTHING, FEATURES, WRITES, READS = (tl.constexpr(part) for part in range(4))


@triton.jit
def keys_of(i_c, tokens, y, partial_in, place, H, sizes):
    # where a chunk's tokens are up to the first that is broken, their keys behind those of slots filled before, and that slot
    at = chunk_of(i_c, place, H, sizes)
    b_k = load_rows(tokens.k, at)
    broken = first_broken(b_k, tokens, at, sizes)
    store_broken(y, broken, at, sizes)
    at = ends_before(broken, at, sizes)
    b_k = bounded(tl.where(at.m_td, b_k, 0.0), KEY_CAP)
    if partial_in is not None and sizes.FIXED == 0:
        b_k = behind(b_k, partial_in.inputs[0], at)
    return at, b_k, broken


@triton.jit
def after_chunk(b_state, b_k, b_r, gates, i_c, broken, partial_out, at, place, sizes):
    # a matrix memory's state with the chunk folded in; of the last one, if it is not full, the slots are kept instead
    b_eta, b_log_decay, b_fold, b_total = gates
    if (i_c == place.chunks - 1) & (place.taken > 0):
        if partial_out is not None:
            keep_slots(partial_out, b_k, b_r, b_eta, b_log_decay, broken, at, place, sizes)
    else:
        b_state = b_state * b_total[:, None] - product(tl.trans(b_k * b_fold), b_r, sizes.PRECISION)
    return b_state


@triton.jit(do_not_specialize=["H"])
def matrix_forward_kernel(
    tokens, y, base, dual, partial_in, partial_out, rows, saved, H, loss, link, sizes, SAVE_EVERY: tl.constexpr
):
    place = place_of(rows, H, sizes)
    o_c, o_d = tl.arange(0, sizes.C), tl.arange(0, sizes.BD)
    m_d = o_d < sizes.D
    # [C, C]: token t of the rows sees the writes of the columns i <= t
    m_causal = o_c[:, None] >= o_c[None, :]
    # the hidden axis, the outputs, is the second
    HIDDEN: tl.constexpr = 1
    o_w, m_w = o_d[:, None] * sizes.D + o_d[None, :], m_d[:, None] & m_d[None, :]
    dual = dual[0] + place.program * sizes.D * sizes.D
    base = base[0] + place.head * sizes.D * sizes.D
    b_state = tl.load(dual + o_w, mask=m_w, other=0.0)

    for i_c in range(0, place.chunks):
        at, b_k, broken = keys_of(i_c, tokens, y, partial_in, place, H, sizes)

        # -- the link at the chunk's start, the write -----------------------------------------------------------------
        if SAVE_EVERY > 0:
            if i_c % SAVE_EVERY == 0:
                tl.store(
                    saved.duals[0] + slot_of(saved, i_c // SAVE_EVERY, place, H, sizes) + o_w,
                    b_state,
                    mask=m_w,
                )
        b_base, b_dual = b_state, b_state
        if link.TOWARD_INIT:
            b_base = tl.load(base + o_w, mask=m_w, other=0.0).to(tl.float32)
            b_dual = b_base + b_state
        sums = add_to_sums(start_of_sum(sizes.BD, link.KIND), b_dual, m_w, link, HIDDEN)
        scale = scale_of(sums, link, sizes)
        b_w = weight_of(b_dual, m_w, sums, scale, link.masses[0], 0.0, link, HIDDEN)
        b_v = bounded(load_rows(tokens.v, at), VALUE_CAP)
        b_error = product(b_k, b_w, sizes.PRECISION) - b_v
        b_r = residual_of(b_error, tokens, at, loss, sizes)
        if partial_in is not None:
            b_r = behind(b_r, partial_in.gradients[0], at)

        # -- the read -------------------------------------------------------------------------------------------------
        b_eta, b_log_decay, total_log_decay = load_gates(tokens, partial_in, at, place, link, sizes)
        b_decay, b_gq, b_gk, b_fold, b_total = chunk_gates(b_eta, b_log_decay, total_log_decay)
        b_total = tl.where(broken < sizes.C, float("nan"), b_total)
        b_q = bounded(load_rows(tokens.q, at), KEY_CAP)
        b_keys, b_written = b_k * b_gk, b_r
        if link.KIND == KL:
            mean = (tl.sum(b_r, 1) / sizes.D)[:, None]
            b_written = tl.where(m_d[None, :], (b_r - mean) * (link.masses[0] / sizes.D), 0.0)
        elif link.KIND == LQ_MIRROR:
            # the slope's best rank-one factorisation: row means times column means over the mean
            gain = (link.Q - 1.0) * scale
            inverse_mean = inverse_of_mean(tl.sum(sums[2]) / (1.0 * sizes.D * sizes.D))
            b_keys = b_keys * (sums[2] / sizes.D)[None, :]
            b_written = b_r * (gain * (slope_of_hidden(b_dual, link, sizes, HIDDEN) * inverse_mean))[None, :]
        else:
            b_q = b_q * scale
        b_p = product(b_q * b_gq, tl.trans(b_keys), sizes.PRECISION)
        b_y = product(tl.where(m_causal, -b_p, 0.0), b_written, sizes.PRECISION)
        if link.KIND == KL:
            b_y += product(b_q, b_w, sizes.PRECISION)
        else:
            base_scale = 0.0
            if link.KIND == LQ_MIRROR:
                base_sums = add_to_sums(start_of_sum(sizes.BD, link.KIND), b_base, m_w, link, HIDDEN)
                base_scale = scale_of(base_sums, link, sizes)
            b_decaying, b_constant = parts_of_read(b_state, b_base, b_w, base_scale, link)
            b_y += product(b_q * b_decay, b_decaying, sizes.PRECISION)
            if link.TOWARD_INIT:
                b_y += product(b_q, b_constant, sizes.PRECISION)
        tl.store(y + at.p_td, b_y.to(y.dtype.element_ty), mask=at.m_td)

        # -- the fold, or the begun chunk's factors -------------------------------------------------------------------
        gates = b_eta, b_log_decay, b_fold, b_total
        b_state = after_chunk(b_state, b_k, b_r, gates, i_c, broken, partial_out, at, place, sizes)

    if partial_out is not None:
        tl.store(dual + o_w, b_state, mask=m_w)


@triton.jit
def store_features(tokens, y, base1, partial_in, hidden, place, H, link, sizes, TN: tl.constexpr):
    # H = gelu(K W1), zero where there is no token, behind that of slots that an earlier call has filled
    sums = start_of_sum(sizes.BD, link.KIND)
    for j in range(0, tl.cdiv(sizes.N, TN)):
        tile = tile_of(j, sizes, TN)
        _, _, b_a1 = load_first(base1, base1, tile, link, sizes)
        sums = add_to_sums(sums, b_a1, tile.m_w, link, 0)
    scale = scale_of(sums, link, sizes)
    for i_c in range(0, place.chunks):
        at, b_k, broken = keys_of(i_c, tokens, y, partial_in, place, H, sizes)
        b_columns = tl.trans(operand(b_k, sizes.PRECISION))
        for j in range(0, tl.cdiv(sizes.N, TN)):
            tile = tile_of(j, sizes, TN)
            _, _, b_a1 = load_first(base1, base1, tile, link, sizes)
            b_w1 = weight_of(b_a1, tile.m_w, sums, scale, link.masses[0], 0.0, link, 0)
            b_h = gelu(product(b_w1, b_columns, sizes.PRECISION), sizes.PRECISION)
            if partial_in is not None:
                b_h = hidden_behind(b_h, partial_in.inputs[-1] + place.program * sizes.C * sizes.N, at, tile)
            tl.store(hidden + tile.o_hc, b_h, mask=tile.m_hc)


@triton.jit
def zeros_of_outputs(sizes, TURNED: tl.constexpr):
    # the sum over tiles of H^T W, [C, BD], or, turned, its transpose
    return tl.zeros([sizes.BD, sizes.C] if TURNED else [sizes.C, sizes.BD], dtype=tl.float32)


@triton.jit
def product_of_outputs(b_h, b_w, sizes, TURNED: tl.constexpr):
    if TURNED:
        return product(tl.trans(b_w), b_h, sizes.PRECISION)
    else:
        return product(tl.trans(b_h), b_w, sizes.PRECISION)


@triton.jit
def tokens_first(b_sum, TURNED: tl.constexpr):
    if TURNED:
        return tl.trans(b_sum)
    else:
        return b_sum


@triton.jit(do_not_specialize=["H"])
def mlp_forward_kernel(
    tokens,
    y,
    base,
    norm,
    dual,
    partial_in,
    partial_out,
    rows,
    saved,
    hidden,
    H,
    loss,
    link,
    sizes,
    SAVE_EVERY: tl.constexpr,
    PART: tl.constexpr,
    TN: tl.constexpr,
    THREADS: tl.constexpr,
):
    tl.static_assert(sizes.C * TN >= THREADS, SHARED_NUMBERS)
    tl.static_assert(sizes.BD * TN >= THREADS, SHARED_NUMBERS)
    C: tl.constexpr = sizes.C
    D: tl.constexpr = sizes.D
    BD: tl.constexpr = sizes.BD
    N: tl.constexpr = sizes.N
    PRECISION: tl.constexpr = sizes.PRECISION
    TILES: tl.constexpr = (N + TN - 1) // TN
    # whether texts write the first weight, too
    BOTH: tl.constexpr = sizes.FIXED == 0
    # W = s A, whose reads are those of the dual state times s
    LINEAR: tl.constexpr = link.KIND != KL and link.KIND != LQ_MIRROR
    # Of a product whose result is an operand of another, each warp takes rows, and all of the right operand. A chunk of few
    # tokens has no rows for eight warps: they would all hold the whole tile of W, and compute the same
    TURNED: tl.constexpr = C < BD and C < 64
    place = place_of(rows, H, sizes)
    o_c, o_d = tl.arange(0, C), tl.arange(0, BD)
    m_d = within(o_d, D, D == BD)
    # [C, C]: token t of the columns sees the writes of the rows i <= t
    m_seen = o_c[:, None] <= o_c[None, :]
    b_gamma = tl.load(norm.weight + place.head * D + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_beta = tl.load(norm.bias + place.head * D + o_d, mask=m_d, other=0.0).to(tl.float32)

    base1, base2 = base[0] + place.head * D * N, base[1] + place.head * D * N
    dual1, dual2 = dual[0] + place.program * D * N, dual[-1] + place.program * D * N
    hidden += place.program * C * N
    mass1, mass2 = link.masses[0], link.masses[1]
    if PART == FEATURES:
        store_features(tokens, y, base1, partial_in, hidden, place, H, link, sizes, TN)
        return
    if PART == READS:
        dual2 = saved.duals[-1] + slot_of(saved, 0, place, H, sizes)

    # what the link needs of the whole weights at the first chunk's start, and of the base's
    sums1, sums2 = start_of_sum(BD, link.KIND), start_of_sum(BD, link.KIND)
    base_sums1, base_sums2 = start_of_sum(BD, link.KIND), start_of_sum(BD, link.KIND)
    for j in range(0, TILES):
        tile = tile_of(j, sizes, TN)
        _, b_base1, b_a1 = load_first(dual1, base1, tile, link, sizes)
        _, b_base2, b_a2 = load_dual(dual2, base2, tile.o_2, tile.m_w, link)
        sums1, sums2 = add_to_sums(sums1, b_a1, tile.m_w, link, 0), add_to_sums(sums2, b_a2, tile.m_w, link, 0)
        if link.KIND == LQ_MIRROR:
            base_sums1 = add_to_sums(base_sums1, b_base1, tile.m_w, link, 0)
            base_sums2 = add_to_sums(base_sums2, b_base2, tile.m_w, link, 0)
    base_scale1, base_scale2 = scale_of(base_sums1, link, sizes), scale_of(base_sums2, link, sizes)

    for i_c in range(0, place.chunks):
        at, b_k, broken = keys_of(i_c, tokens, y, partial_in, place, H, sizes)
        of_chunk = place.program * C * N
        scale1, scale2 = scale_of(sums1, link, sizes), scale_of(sums2, link, sizes)

        # -- first pass: the write's forward --------------------------------------------------------------------------
        b_z2 = zeros_of_outputs(sizes, TURNED)
        hidden_sum = tl.zeros([C], dtype=tl.float32)
        b_columns = tl.trans(operand(b_k, PRECISION))
        for j in range(0, TILES):
            tile = tile_of(j, sizes, TN)
            b_d1, _, b_a1 = load_first(dual1, base1, tile, link, sizes)
            b_d2, _, b_a2 = load_dual(dual2, base2, tile.o_2, tile.m_w, link)
            if SAVE_EVERY > 0:
                if i_c % SAVE_EVERY == 0:
                    slot = slot_of(saved, i_c // SAVE_EVERY, place, H, sizes)
                    if BOTH:
                        tl.store(saved.duals[0] + slot + tile.o_1, b_d1, mask=tile.m_w)
                    tl.store(saved.duals[-1] + slot + tile.o_2, b_d2, mask=tile.m_w)
            b_w1 = weight_of(b_a1, tile.m_w, sums1, scale1, mass1, 0.0, link, 0)
            b_w2 = weight_of(b_a2, tile.m_w, sums2, scale2, mass2, mass2 / N, link, 0)
            if BOTH:
                b_z1 = product(b_w1, b_columns, PRECISION)
                b_h = gelu(b_z1, PRECISION)
                tl.store(hidden + tile.o_hc, b_z1, mask=tile.m_hc)
            else:
                b_h = tl.load(hidden + tile.o_hc, mask=tile.m_hc, other=0.0).to(tl.float32)
            b_z2 += product_of_outputs(b_h, b_w2, sizes, TURNED)
            if link.KIND == KL:
                if partial_in is not None and BOTH:
                    b_h = hidden_behind(b_h, partial_in.inputs[-1] + of_chunk, at, tile)
                hidden_sum += tl.sum(b_h, 0)
        # threads read what others of this program have written
        tl.debug_barrier()

        # -- the residual and its way back through the layer norm -----------------------------------------------------
        b_z2 = tokens_first(b_z2, TURNED)
        b_normed, inverse_std, b_error, b_r = error_of_write(b_z2, b_k, b_gamma, b_beta, tokens, at, norm, loss, sizes)
        b_dz2 = normalise_vjp(b_r * b_gamma[None, :], b_normed, inverse_std, m_d, D)
        if partial_in is not None:
            b_dz2 = behind(b_dz2, partial_in.gradients[-1], at)
        b_eta, b_log_decay, total_log_decay = load_gates(tokens, partial_in, at, place, link, sizes)
        b_decay, b_gq, b_gk, b_fold, b_total = chunk_gates(b_eta, b_log_decay, total_log_decay)
        b_total = tl.where(broken < C, float("nan"), b_total)

        # -- what the read sees of the writes, on the input axis ------------------------------------------------------
        b_x = bounded(load_rows(tokens.q, at), KEY_CAP)
        if BOTH:
            b_keys = b_k * b_gk
            if LINEAR:
                b_x = b_x * scale1
            if link.KIND == LQ_MIRROR:
                # the slope's best rank-one factorisation: row means times column means over the mean
                b_keys = b_keys * (sums1[2] / N)[None, :]
            b_p = product(b_keys, tl.trans(b_x * b_gq), PRECISION)
            b_p = operand(tl.where(m_seen, -b_p, 0.0), PRECISION)
        b_dz2_columns = tl.trans(operand(b_dz2, PRECISION))
        b_dz2_fold = operand(b_dz2 * b_fold, PRECISION)
        b_values = operand(b_dz2 * b_gk, PRECISION)
        b_into = operand(b_k * b_fold, PRECISION)
        b_x_decayed = tl.trans(operand(b_x * b_decay, PRECISION))
        b_x = tl.trans(operand(b_x, PRECISION))
        is_partial = (i_c == place.chunks - 1) & (place.taken > 0)
        if partial_out is not None and PART != READS:
            if is_partial:
                keep_slots(partial_out, b_k, b_dz2, b_eta, b_log_decay, broken, at, place, sizes)

        gradient_mean = tl.zeros([C], dtype=tl.float32)
        if link.KIND == KL and BOTH:
            # the softmax's slope centres gradients over the hidden axis: their mean is needed before the tiles' reads
            for j in range(0, TILES):
                tile = tile_of(j, sizes, TN)
                _, _, b_a2 = load_dual(dual2, base2, tile.o_2, tile.m_w, link)
                b_w2 = weight_of(b_a2, tile.m_w, sums2, scale2, mass2, mass2 / N, link, 0)
                _, b_slope = gelu_and_slope(tl.load(hidden + tile.o_hc, mask=tile.m_hc, other=0.0), PRECISION)
                b_dz1 = product(b_w2, b_dz2_columns, PRECISION) * b_slope
                if partial_in is not None:
                    b_dz1 = hidden_behind(b_dz1, partial_in.gradients[0] + of_chunk, at, tile)
                gradient_mean += tl.sum(b_dz1, 0) / N

        # -- second pass: the write's backward, the read, the fold ----------------------------------------------------
        b_s = tl.zeros([C, C], dtype=tl.float32)
        b_kept = zeros_of_outputs(sizes, TURNED)  # decays with B_t
        b_constant = zeros_of_outputs(sizes, TURNED)
        read_sum = tl.zeros([C], dtype=tl.float32)
        read1, read2 = sums1, sums2
        sums2 = start_of_sum(BD, link.KIND)
        if BOTH:
            sums1 = start_of_sum(BD, link.KIND)
        gain1 = (link.Q - 1.0) * scale1
        inverse_mean1 = inverse_of_mean(tl.sum(read1[2]) / (1.0 * D * N))
        inverse_mean2 = inverse_of_mean(tl.sum(read2[2]) / (1.0 * D * N))
        for j in range(0, TILES):
            tile = tile_of(j, sizes, TN)
            b_d1, b_base1, b_a1 = load_first(dual1, base1, tile, link, sizes)
            b_d2, b_base2, b_a2 = load_dual(dual2, base2, tile.o_2, tile.m_w, link)
            b_w2 = weight_of(b_a2, tile.m_w, read2, scale2, mass2, mass2 / N, link, 0)
            b_h = tl.load(hidden + tile.o_hc, mask=tile.m_hc, other=0.0).to(tl.float32)
            if BOTH:
                b_h, b_slope = gelu_and_slope(b_h, PRECISION)
                b_dz1 = product(b_w2, b_dz2_columns, PRECISION) * b_slope
                if partial_in is not None:
                    b_dz1 = hidden_behind(b_dz1, partial_in.gradients[0] + of_chunk, at, tile)
                    b_h = hidden_behind(b_h, partial_in.inputs[-1] + of_chunk, at, tile)

            # the first layer's read, and the second's
            if PART != WRITES:
                # what a begun chunk keeps is not rounded
                b_inputs = b_h
                if link.KIND == LQ_MIRROR:
                    b_inputs = b_h * slope_of_hidden(b_a2, link, sizes, 0)[:, None]
                b_w1 = weight_of(b_a1, tile.m_w, read1, scale1, mass1, 0.0, link, 0)
                if BOTH:
                    b_written = b_dz1
                    if link.KIND == KL:
                        b_written = tl.where(tile.m_hc, (b_dz1 - gradient_mean[None, :]) * (mass1 / N), 0.0)
                    elif link.KIND == LQ_MIRROR:
                        b_written = b_dz1 * (gain1 * (slope_of_hidden(b_a1, link, sizes, 0) * inverse_mean1))[:, None]
                    b_z1 = product(b_written, b_p, PRECISION)
                    if link.KIND == KL:
                        b_z1 += product(b_w1, b_x, PRECISION)
                    else:
                        b_decaying, b_fixed = parts_of_read(b_d1, b_base1, b_w1, base_scale1, link)
                        b_z1 += product(b_decaying, b_x_decayed, PRECISION)
                        if link.TOWARD_INIT:
                            b_z1 += product(b_fixed, b_x, PRECISION)
                else:
                    b_z1 = product(b_w1, b_x, PRECISION)
                b_hq = gelu(b_z1, PRECISION)
                if link.KIND == KL:
                    read_sum += tl.sum(b_hq, 0)
                    b_constant += product_of_outputs(b_hq, b_w2, sizes, TURNED)
                else:
                    b_decaying, b_fixed = parts_of_read(b_d2, b_base2, b_w2, base_scale2, link)
                    b_kept += product_of_outputs(b_hq, b_decaying, sizes, TURNED)
                    if link.TOWARD_INIT:
                        b_constant += product_of_outputs(b_hq, b_fixed, sizes, TURNED)
                b_s += product(tl.trans(b_hq), b_inputs, PRECISION)

            # the fold, or the begun chunk's factors
            if PART != READS:
                if is_partial:
                    if partial_out is not None:
                        m_f = tile.m_hc & (o_c < place.taken)[None, :]
                        tl.store(partial_out.inputs[-1] + of_chunk + tile.o_ch, b_h, mask=m_f)
                        if BOTH:
                            tl.store(partial_out.gradients[0] + of_chunk + tile.o_ch, b_dz1, mask=m_f)
                else:
                    b_d2 = b_d2 * b_total[None, :] - product(b_h, b_dz2_fold, PRECISION)
                    tl.store(dual2 + tile.o_2, b_d2, mask=tile.m_w)
                    if BOTH:
                        b_d1 = b_d1 * b_total[None, :] - product(b_dz1, b_into, PRECISION)
                        tl.store(dual1 + tile.o_1, b_d1, mask=tile.m_w)
                        b_a1 = b_d1
                        if link.TOWARD_INIT:
                            b_a1 = b_base1 + b_d1
                        sums1 = add_to_sums(sums1, b_a1, tile.m_w, link, 0)
                    b_a2 = b_d2
                    if link.TOWARD_INIT:
                        b_a2 = b_base2 + b_d2
                    sums2 = add_to_sums(sums2, b_a2, tile.m_w, link, 0)
        tl.debug_barrier()

        # -- the read's second layer, its norm, the output ------------------------------------------------------------
        if PART != WRITES:
            # gates and queries are read again: keeping them through the tiles would cost registers
            b_eta, b_log_decay, total_log_decay = load_gates(tokens, partial_in, at, place, link, sizes)
            b_decay, b_gq, b_gk, b_fold, b_end = chunk_gates(b_eta, b_log_decay, total_log_decay)
            if PRECISION == "ieee":
                # the same again: in float32 and through the tiles it would not fit into shared memory beside the others
                b_values = b_dz2 * b_gk
            if link.KIND == KL:
                b_s = (b_s - read_sum[:, None] * (hidden_sum / N)[None, :]) * (mass2 / N)
            b_s = tl.where(tl.trans(m_seen), -b_s, 0.0)
            b_z2 = product(b_s, b_values, PRECISION) * b_gq
            if link.KIND == LQ_MIRROR:
                b_z2 = b_z2 * ((link.Q - 1.0) * scale2 * (read2[2] / N * inverse_mean2))[None, :]
            b_z2 += tokens_first(b_kept, TURNED) * b_decay + tokens_first(b_constant, TURNED)
            if LINEAR:
                b_z2 = b_z2 * scale2
            b_normed, inverse_std = normalise(b_z2, m_d, D, norm.EPS)
            b_q = bounded(load_rows(tokens.q, at), KEY_CAP)
            b_y = b_q + (b_beta[None, :] + b_normed * b_gamma[None, :])
            tl.store(y + at.p_td, b_y.to(y.dtype.element_ty), mask=at.m_td)
        if PART == WRITES:
            hidden += tl.num_programs(0).to(tl.int64) * (C * N)  # features lie chunk after chunk
