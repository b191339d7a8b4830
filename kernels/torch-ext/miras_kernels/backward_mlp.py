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

from .backward_pieces import (
    K_BAR,
    K_FOLD,
    KEY_GATE,
    KEY_GATE_BAR,
    QUERY_GATE,
    QUERY_GATE_BAR,
    X_DECAYED,
    K,
    P,
    Weight,
    X,
    back_through_base,
    back_through_first,
    back_through_link,
    back_to_gates,
    back_to_queries,
    begin_chunk,
    handed_on,
    hold_read,
    store_state_bar,
    sums_of_base,
)
from .chunks import behind, error_of_write, load_rows, place_of, residual_vjp_of, slot_of, store_delta_bar
from .layers import (
    add_to_sums,
    along_dual,
    hidden_behind,
    load_dual,
    load_first,
    parts_of_read,
    rates_of,
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
    LARGEST_STATE_ADJOINT,
    LQ_MIRROR,
    SHARED_NUMBERS,
    VALUE_CAP,
    bounded,
    gelu,
    gelu_and_slope,
    gelu_slope_curvature,
    inverse_of_mean,
    normalise,
    normalise_vjp,
    operand,
    product,
    slope_bars,
)
from .rows import get, held, hold, put


# the places in `rows` that are an MLP memory's own
Z2, DZ2, DZ2_BAR = (tl.constexpr(place) for place in (3, 4, 5))
S_BAR, U, U_DECAYED = (tl.constexpr(place) for place in (12, 13, 14))
DZ2_FOLD, Z2_BAR = (tl.constexpr(place) for place in (10, 11))


def places(stream: bool) -> int:
    """How many tensors of C rows a program needs room for."""
    return 15 if stream else 9


@triton.jit(do_not_specialize=["H"])
def mlp_backward_kernel(
    tokens,
    y_bar,
    base,
    norm,
    saved,
    bars,
    state_bar,
    base_bar,
    partial_in,
    partial_in_bar,
    partial_out_bar,
    norm_bar,
    rows_of_call,
    scratch,
    H,
    loss,
    link,
    sizes,
    TN: tl.constexpr,
    STREAM: tl.constexpr,
    THREADS: tl.constexpr,
):
    C: tl.constexpr = sizes.C
    N: tl.constexpr = sizes.N
    D: tl.constexpr = sizes.D
    BD: tl.constexpr = sizes.BD
    PRECISION: tl.constexpr = sizes.PRECISION
    tl.static_assert(sizes.C * TN >= THREADS, SHARED_NUMBERS)
    tl.static_assert(sizes.BD * TN >= THREADS, SHARED_NUMBERS)
    tl.static_assert(C * BD >= THREADS, SHARED_NUMBERS)
    place = place_of(rows_of_call, H, sizes)
    o_c, o_d = tl.arange(0, C), tl.arange(0, BD)
    m_d = within(o_d, D, D == BD)
    m_causal = o_c[:, None] >= o_c[None, :]
    b_gamma = tl.load(norm.weight + place.head * D + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_beta = tl.load(norm.bias + place.head * D + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_gamma_bar = tl.zeros([BD], dtype=tl.float32)
    b_beta_bar = tl.zeros([BD], dtype=tl.float32)

    weights, activations = place.program * D * N, place.program * C * N
    # whether texts write the first weight, too; else `base_bar1` is the sum of its adjoints, which the link waits for
    BOTH: tl.constexpr = sizes.FIXED == 0
    base1, base2 = base[0] + place.head * D * N, base[1] + place.head * D * N
    state_bar1, state_bar2 = state_bar[0] + weights, state_bar[-1] + weights
    base_bar1, base_bar2 = base_bar[0] + weights, base_bar[1] + weights
    weight_bar1, weight_bar2 = scratch.weight_bar[0] + weights, scratch.weight_bar[-1] + weights
    read_bar2 = scratch.read_bar + weights
    hidden, read_hidden = scratch.hidden[0] + activations, scratch.hidden[1] + activations
    kept_hidden, hidden_bar = scratch.hidden[2] + activations, scratch.hidden[3] + activations
    rows = scratch.rows + place.program * (15 if STREAM else 9) * C * (C if C > BD else BD)
    mass1, mass2 = link.masses[0], link.masses[1]
    # W = s A, whose reads are those of the dual state times s
    LINEAR: tl.constexpr = link.KIND != KL and link.KIND != LQ_MIRROR
    TILES: tl.constexpr = (N + TN - 1) // TN
    # what the initial memory's own link needs, and the adjoint of its image: through the link when all chunks are done
    IMAGE: tl.constexpr = link.KIND == LQ_MIRROR and link.TOWARD_INIT
    base_sums1 = sums_of_base(base1, IMAGE or not BOTH, link, sizes, True, TN)
    base_sums2 = sums_of_base(base2, IMAGE, link, sizes, False, TN)
    base_scale1, base_scale2 = scale_of(base_sums1, link, sizes), scale_of(base_sums2, link, sizes)
    constant_bar1, constant_bar2 = base_bar1, base_bar2
    slope_bar1, slope_bar2 = rows, rows
    if link.KIND == LQ_MIRROR:
        slope_bar1 = scratch.slope_bar[0] + place.program * N
        slope_bar2 = scratch.slope_bar[-1] + place.program * N
        if link.TOWARD_INIT:
            constant_bar1, constant_bar2 = scratch.link_bar[0] + weights, scratch.link_bar[-1] + weights
    # the largest entries of the state's adjoint, which bound it
    largest1, largest2 = 0.0, 0.0

    for i in range(0, place.chunks):
        i_c = place.chunks - 1 - i
        slot = slot_of(saved, i_c, place, H, sizes)
        saved1, saved2 = saved.duals[0] + slot, saved.duals[-1] + slot
        bound1 = LARGEST_STATE_ADJOINT / tl.maximum(largest1, LARGEST_STATE_ADJOINT)
        bound2 = LARGEST_STATE_ADJOINT / tl.maximum(largest2, LARGEST_STATE_ADJOINT)

        # -- the chunk's tokens, gates and links ----------------------------------------------------------------------
        at, is_partial, m_f, b_k, half = begin_chunk(i_c, place, rows, tokens, partial_in, H, link, sizes)
        sums1, sums2 = start_of_sum(BD, link.KIND), start_of_sum(BD, link.KIND)
        for j in range(0, TILES):
            tile = tile_of(j, sizes, TN)
            _, _, b_a2 = load_dual(saved2, base2, tile.o_2, tile.m_w, link)
            sums2 = add_to_sums(sums2, b_a2, tile.m_w, link, 0)
            if BOTH:
                _, _, b_a1 = load_first(saved1, base1, tile, link, sizes)
                sums1 = add_to_sums(sums1, b_a1, tile.m_w, link, 0)
        if not BOTH:
            sums1 = base_sums1
        scale1, scale2 = scale_of(sums1, link, sizes), scale_of(sums2, link, sizes)
        mean_slope1, mean_slope2 = tl.sum(sums1[2]) / (1.0 * D * N), tl.sum(sums2[2]) / (1.0 * D * N)
        slope_gain1, inverse_mean1 = (link.Q - 1.0) * scale1, inverse_of_mean(mean_slope1)
        slope_gain2, inverse_mean2 = (link.Q - 1.0) * scale2, inverse_of_mean(mean_slope2)
        layer1 = Weight(
            saved1, base1, state_bar1, base_bar1, weight_bar1, constant_bar1, slope_bar1, mass1, sums1, scale1,
            base_scale1, slope_gain1, inverse_mean1,
        )  # fmt: skip
        layer2 = Weight(
            saved2, base2, state_bar2, base_bar2, weight_bar2, constant_bar2, slope_bar2, mass2, sums2, scale2,
            base_scale2, slope_gain2, inverse_mean2,
        )  # fmt: skip
        tl.debug_barrier()

        # -- write ----------------------------------------------------------------------------------------------------
        b_z2 = tl.zeros([C, BD], dtype=tl.float32)
        k_operand = operand(b_k, PRECISION)
        hidden_mean = tl.zeros([C], dtype=tl.float32)
        for j in range(0, TILES):
            tile = tile_of(j, sizes, TN)
            _, _, b_a1 = load_first(saved1, base1, tile, link, sizes)
            _, _, b_a2 = load_dual(saved2, base2, tile.o_2, tile.m_w, link)
            b_w1 = weight_of(b_a1, tile.m_w, sums1, scale1, mass1, 0.0, link, 0)
            b_w2 = weight_of(b_a2, tile.m_w, sums2, scale2, mass2, mass2 / N, link, 0)
            b_z1 = product(b_w1, tl.trans(held(rows, K, k_operand, BD, C, BD, STREAM)), PRECISION)
            tl.store(hidden + tile.o_hc, b_z1, mask=tile.m_hc)
            b_h = gelu(b_z1, PRECISION)
            b_z2 += product(tl.trans(b_h), b_w2, PRECISION)
            if link.KIND == KL:
                if partial_in is not None:
                    b_h = hidden_behind(b_h, partial_in.inputs[-1] + activations, at, tile)
                hidden_mean += tl.sum(b_h, 0) / N
        put(rows, Z2, b_z2, C, BD)
        b_normed, inverse_std, b_error, b_r = error_of_write(
            b_z2, get(rows, K, BD, C, BD), b_gamma, b_beta, tokens, at, norm, loss, sizes
        )
        b_dz2 = normalise_vjp(b_r * b_gamma[None, :], b_normed, inverse_std, m_d, D)
        if partial_in is not None:
            b_dz2 = behind(b_dz2, partial_in.gradients[-1], at)
        put(rows, DZ2, b_dz2, C, BD)

        # -- read -----------------------------------------------------------------------------------------------------
        if BOTH:
            b_p, operands = hold_read(rows, tokens, at, half, layer1, link, sizes, STREAM)
            p_operand, x_operand, decayed_operand = operands
        else:
            b_x = bounded(load_rows(tokens.q, at), KEY_CAP)
            x_operand = hold(rows, X, b_x, C, BD, PRECISION, STREAM)
        dz2_operand = operand(b_dz2, PRECISION)
        tl.debug_barrier()
        gradient_mean = tl.zeros([C], dtype=tl.float32)
        if link.KIND == KL and BOTH:
            for j in range(0, TILES):
                tile = tile_of(j, sizes, TN)
                _, _, b_a2 = load_dual(saved2, base2, tile.o_2, tile.m_w, link)
                b_w2 = weight_of(b_a2, tile.m_w, sums2, scale2, mass2, mass2 / N, link, 0)
                _, b_slope = gelu_and_slope(tl.load(hidden + tile.o_hc, mask=tile.m_hc, other=0.0), PRECISION)
                dz2_rows = held(rows, DZ2, dz2_operand, BD, C, BD, STREAM)
                b_dz1 = product(b_w2, tl.trans(dz2_rows), PRECISION) * b_slope
                if partial_in is not None:
                    b_dz1 = hidden_behind(b_dz1, partial_in.gradients[0] + activations, at, tile)
                gradient_mean += tl.sum(b_dz1, 0) / N
        b_s = tl.zeros([C, C], dtype=tl.float32)
        b_kept = tl.zeros([C, BD], dtype=tl.float32)
        b_constant = tl.zeros([C, BD], dtype=tl.float32)
        read_mean = tl.zeros([C], dtype=tl.float32)
        for j in range(0, TILES):
            tile = tile_of(j, sizes, TN)
            b_d1, b_base1, b_a1 = load_first(saved1, base1, tile, link, sizes)
            b_d2, b_base2, b_a2 = load_dual(saved2, base2, tile.o_2, tile.m_w, link)
            b_w1 = weight_of(b_a1, tile.m_w, sums1, scale1, mass1, 0.0, link, 0)
            b_w2 = weight_of(b_a2, tile.m_w, sums2, scale2, mass2, mass2 / N, link, 0)
            b_decaying2, b_fixed2 = parts_of_read(b_d2, b_base2, b_w2, base_scale2, link)
            b_h, b_slope = gelu_and_slope(tl.load(hidden + tile.o_hc, mask=tile.m_hc, other=0.0), PRECISION)
            if partial_in is not None:
                b_h = hidden_behind(b_h, partial_in.inputs[-1] + activations, at, tile)
            b_inputs = b_h
            if link.KIND == LQ_MIRROR:
                b_inputs = b_h * slope_of_hidden(b_a2, link, sizes, 0)[:, None]
            if BOTH:
                b_decaying1, b_fixed1 = parts_of_read(b_d1, b_base1, b_w1, base_scale1, link)
                dz2_rows = held(rows, DZ2, dz2_operand, BD, C, BD, STREAM)
                b_dz1 = product(b_w2, tl.trans(dz2_rows), PRECISION) * b_slope
                if partial_in is not None:
                    b_dz1 = hidden_behind(b_dz1, partial_in.gradients[0] + activations, at, tile)
                tl.store(kept_hidden + tile.o_hc, b_dz1, mask=tile.m_hc)
                b_gradients = b_dz1
                if link.KIND == KL:
                    b_gradients = tl.where(tile.m_hc, (b_dz1 - gradient_mean[None, :]) * (mass1 / N), 0.0)
                elif link.KIND == LQ_MIRROR:
                    slope1 = slope_of_hidden(b_a1, link, sizes, 0) * inverse_mean1
                    b_gradients = b_dz1 * (slope_gain1 * slope1)[:, None]
                b_z1q = product(b_gradients, tl.trans(held(rows, P, p_operand, C, C, BD, STREAM)), PRECISION)
                if link.KIND == KL:
                    b_z1q += product(b_w1, tl.trans(held(rows, X, x_operand, BD, C, BD, STREAM)), PRECISION)
                else:
                    decayed_rows = held(rows, X_DECAYED, decayed_operand, BD, C, BD, STREAM)
                    b_z1q += product(b_decaying1, tl.trans(decayed_rows), PRECISION)
                    if link.TOWARD_INIT:
                        b_z1q += product(b_fixed1, tl.trans(held(rows, X, x_operand, BD, C, BD, STREAM)), PRECISION)
            else:
                b_z1q = product(b_w1, tl.trans(held(rows, X, x_operand, BD, C, BD, STREAM)), PRECISION)
            tl.store(read_hidden + tile.o_hc, b_z1q, mask=tile.m_hc)
            b_hq = gelu(b_z1q, PRECISION)
            b_s += product(tl.trans(b_hq), b_inputs, PRECISION)
            if link.KIND == KL:
                b_constant += product(tl.trans(b_hq), b_w2, PRECISION)
                read_mean += tl.sum(b_hq, 0) / N
            else:
                b_kept += product(tl.trans(b_hq), b_decaying2, PRECISION)
                if link.TOWARD_INIT:
                    b_constant += product(tl.trans(b_hq), b_fixed2, PRECISION)
        tl.debug_barrier()

        # -- back through the output's norm ---------------------------------------------------------------------------
        if link.KIND == KL:
            b_s = (b_s - read_mean[:, None] * N * hidden_mean[None, :]) * (mass2 / N)
        b_s = tl.where(m_causal, -b_s, 0.0)
        b_gq = get(rows, QUERY_GATE, BD, C, BD)
        b_dz2, b_gk = get(rows, DZ2, BD, C, BD), get(rows, KEY_GATE, BD, C, BD)
        slope_of_channels = slope_gain2 * (sums2[2] / N * inverse_mean2)
        if link.KIND == LQ_MIRROR:
            b_gk = b_gk * slope_of_channels[None, :]
        b_written = product(b_s, b_dz2 * b_gk, PRECISION)
        b_decay = b_gq * half[None, :]
        b_z2q = b_written * b_gq + b_kept * b_decay + b_constant
        b_y_bar = load_rows(y_bar, at)
        if LINEAR:
            b_normed_q, inverse_std_q = normalise(b_z2q * scale2, m_d, D, norm.EPS)
        else:
            b_normed_q, inverse_std_q = normalise(b_z2q, m_d, D, norm.EPS)
        b_gamma_bar += tl.sum(b_y_bar * b_normed_q, 0)
        b_beta_bar += tl.sum(b_y_bar, 0)
        b_u = normalise_vjp(b_y_bar * b_gamma[None, :], b_normed_q, inverse_std_q, m_d, D)
        scale_bar2 = 0.0
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
        slope_gain_bar2 = 0.0
        channel_slope_bar = tl.zeros([BD], dtype=tl.float32)
        if link.KIND == LQ_MIRROR:
            channel_slope_bar = tl.sum(b_gk_bar * get(rows, KEY_GATE, BD, C, BD), 0)
            channel_slope_bar = channel_slope_bar * inverse_mean2
            slope_gain_bar2 += tl.sum(channel_slope_bar * sums2[2]) / N
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
            tile = tile_of(j, sizes, TN)
            b_d2, b_base2, b_a2 = load_dual(saved2, base2, tile.o_2, tile.m_w, link)
            b_w2 = weight_of(b_a2, tile.m_w, sums2, scale2, mass2, mass2 / N, link, 0)
            b_decaying2, b_fixed2 = parts_of_read(b_d2, b_base2, b_w2, base_scale2, link)
            b_h = gelu(tl.load(hidden + tile.o_hc, mask=tile.m_hc, other=0.0), PRECISION)
            if partial_in is not None:
                b_h = hidden_behind(b_h, partial_in.inputs[-1] + activations, at, tile)
            b_hq, b_slope_q = gelu_and_slope(tl.load(read_hidden + tile.o_hc, mask=tile.m_hc, other=0.0), PRECISION)
            b_inputs = b_h
            slope2 = slope_of_hidden(b_a2, link, sizes, 0)
            if link.KIND == KL:
                b_inputs = tl.where(tile.m_hc, (b_h - hidden_mean[None, :]) * (mass2 / N), 0.0)
            elif link.KIND == LQ_MIRROR:
                b_inputs = b_h * slope2[:, None]
            b_hq_bar = product(b_inputs, tl.trans(held(rows, S_BAR, s_operand, C, C, BD, STREAM)), PRECISION)
            if link.KIND == KL:
                u_rows = held(rows, U, u_operand, BD, C, BD, STREAM)
                b_hq_bar += product(b_w2, tl.trans(u_rows), PRECISION)
                b_weight_bar = product(b_hq, u_rows, PRECISION)
            else:
                decayed_rows = held(rows, U_DECAYED, kept_operand, BD, C, BD, STREAM)
                b_hq_bar += product(b_decaying2, tl.trans(decayed_rows), PRECISION)
                b_weight_bar = product(b_hq, decayed_rows, PRECISION)
                if link.TOWARD_INIT:
                    u_rows = held(rows, U, u_operand, BD, C, BD, STREAM)
                    b_hq_bar += product(b_fixed2, tl.trans(u_rows), PRECISION)
                    b_fixed_bar = tl.load(constant_bar2 + tile.o_2, mask=tile.m_w, other=0.0)
                    b_fixed_bar += product(b_hq, u_rows, PRECISION)
                    if link.KIND == LQ_MIRROR:
                        b_fixed_bar -= b_weight_bar
                    tl.store(constant_bar2 + tile.o_2, b_fixed_bar, mask=tile.m_w)
            # the state's adjoint of links that are linear, the weights' of the others
            if LINEAR:
                tl.store(read_bar2 + tile.o_2, b_weight_bar, mask=tile.m_w)
            else:
                tl.store(weight_bar2 + tile.o_2, b_weight_bar, mask=tile.m_w)
            b_h_bar = product(b_hq, held(rows, S_BAR, s_operand, C, C, BD, STREAM), PRECISION)
            if link.KIND == KL:
                b_h_bar = tl.where(tile.m_hc, (b_h_bar - hidden_bar_mean[None, :]) * (mass2 / N), 0.0)
            elif link.KIND == LQ_MIRROR:
                tl.store(slope_bar2 + tile.o_h, tl.sum(b_h_bar * b_h, 1), mask=tile.m_h)
                b_h_bar = b_h_bar * slope2[:, None]
            tl.store(hidden_bar + tile.o_hc, b_h_bar, mask=tile.m_hc)
            b_z1q_bar = b_hq_bar * b_slope_q
            if link.KIND == KL:
                z1q_bar_mean += tl.sum(b_z1q_bar, 0) / N
            tl.debug_barrier()
            tl.store(read_hidden + tile.o_hc, b_z1q_bar, mask=tile.m_hc)
        tl.debug_barrier()

        # -- back through the read's first layer ----------------------------------------------------------------------
        if BOTH:
            gradient_bar_mean = tl.zeros([C], dtype=tl.float32)
            if link.KIND == KL:
                b_p = held(rows, P, p_operand, C, C, BD, STREAM).to(tl.float32)
                gradient_bar_mean = tl.sum(b_p * z1q_bar_mean[:, None], 0)
            means = gradient_mean, gradient_bar_mean
            carried = tl.zeros([C, C], tl.float32), tl.zeros([C, BD], tl.float32), tl.zeros([C, BD], tl.float32), 0.0
            for j in range(0, TILES):
                tile = tile_of(j, sizes, TN)
                b_dz1 = tl.load(kept_hidden + tile.o_hc, mask=tile.m_hc, other=0.0)
                b_z1q_bar = tl.load(read_hidden + tile.o_hc, mask=tile.m_hc, other=0.0)
                b_dz1_bar, carried = back_through_first(
                    b_z1q_bar, b_dz1, means, carried, operands, layer1, tile, rows, link, sizes, STREAM
                )
                tl.debug_barrier()
                tl.store(kept_hidden + tile.o_hc, b_dz1_bar, mask=tile.m_hc)
            tl.debug_barrier()
            of_half, scale_bar1, key_slope_bar = back_to_queries(
                carried, load_rows(y_bar, at), rows, tokens, bars, at, half, layer1, link, sizes, True
            )
            half_bar += of_half
        else:
            b_x_bar = tl.zeros([C, BD], dtype=tl.float32)
            for j in range(0, TILES):
                tile = tile_of(j, sizes, TN)
                _, _, b_a1 = load_first(saved1, base1, tile, link, sizes)
                b_w1 = weight_of(b_a1, tile.m_w, sums1, scale1, mass1, 0.0, link, 0)
                b_z1q_bar = tl.load(read_hidden + tile.o_hc, mask=tile.m_hc, other=0.0)
                b_x_bar += product(tl.trans(b_z1q_bar), b_w1, PRECISION)
                b_w1_bar = tl.load(base_bar1 + tile.o_1, mask=tile.m_w, other=0.0)
                b_w1_bar += product(b_z1q_bar, held(rows, X, x_operand, BD, C, BD, STREAM), PRECISION)
                tl.store(base_bar1 + tile.o_1, b_w1_bar, mask=tile.m_w)
            if STREAM:
                tl.debug_barrier()  # the fold's operand takes X's place
            b_q_bar = tl.where(tl.abs(load_rows(tokens.q, at)) > KEY_CAP, 0.0, b_x_bar + load_rows(y_bar, at))
            tl.store(bars.q + at.p_td, b_q_bar.to(bars.q.dtype.element_ty), mask=at.m_td)
            put(rows, K_BAR, tl.zeros([C, BD], tl.float32), C, BD)

        # -- back through the fold, and through dZ1 = (dZ2 W2^T) o gelu'(Z1) -------------------------------------------
        b_dz2, b_fold = get(rows, DZ2, BD, C, BD), get(rows, KEY_GATE, BD, C, BD) * half[None, :]
        if BOTH:
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
        if partial_out_bar is not None:
            folds = tl.where(is_partial, 0.0, 1.0)
        for j in range(0, TILES):
            tile = tile_of(j, sizes, TN)
            b_d2, _, b_a2 = load_dual(saved2, base2, tile.o_2, tile.m_w, link)
            b_z1 = tl.load(hidden + tile.o_hc, mask=tile.m_hc, other=0.0)
            b_h, b_slope, b_curvature = gelu_slope_curvature(b_z1, PRECISION)
            if partial_in is not None:
                b_h = hidden_behind(b_h, partial_in.inputs[-1] + activations, at, tile)
            if BOTH:
                b_d1 = tl.load(saved1 + tile.o_1, mask=tile.m_w, other=0.0)
                b_w2 = weight_of(b_a2, tile.m_w, sums2, scale2, mass2, mass2 / N, link, 0)
                b_dh = product(b_w2, tl.trans(held(rows, DZ2, dz2_operand, BD, C, BD, STREAM)), PRECISION)
                b_dz1 = b_dh * b_slope
                if partial_in is not None:
                    b_dz1 = hidden_behind(b_dz1, partial_in.gradients[0] + activations, at, tile)
                b_next = tl.load(state_bar1 + tile.o_1, mask=tile.m_w, other=0.0) * (bound1 * folds)
                b_total_bar += tl.sum(b_next * b_d1, 0)
                b_k_fold_bar -= product(tl.trans(b_dz1), b_next, PRECISION)
                b_dz1_bar = tl.load(kept_hidden + tile.o_hc, mask=tile.m_hc, other=0.0)
                fold_rows = held(rows, K_FOLD, k_fold_operand, BD, C, BD, STREAM)
                b_dz1_bar -= product(b_next, tl.trans(fold_rows), PRECISION)
                if partial_out_bar is not None:
                    m_fh = tile.m_hc & m_f[None, :]
                    b_dz1_bar += tl.load(partial_out_bar.gradients[0] + activations + tile.o_ch, mask=m_fh, other=0.0)
                if partial_in is not None:
                    m_eh = tile.m_hc & at.m_e[None, :]
                    tl.store(partial_in_bar.gradients[0] + activations + tile.o_ch, b_dz1_bar, mask=m_eh)
                    b_dz1_bar = tl.where(at.m_e[None, :], 0.0, b_dz1_bar)

            b_next = tl.load(state_bar2 + tile.o_2, mask=tile.m_w, other=0.0) * (bound2 * folds)
            b_total_bar += tl.sum(b_next * b_d2, 0)
            b_dz2_fold_bar -= product(tl.trans(b_h), b_next, PRECISION)
            b_h_bar = tl.load(hidden_bar + tile.o_hc, mask=tile.m_hc, other=0.0)
            fold_rows = held(rows, DZ2_FOLD, dz2_fold_operand, BD, C, BD, STREAM)
            b_h_bar -= product(b_next, tl.trans(fold_rows), PRECISION)
            if partial_out_bar is not None:
                m_fh = tile.m_hc & m_f[None, :]
                b_h_bar += tl.load(partial_out_bar.inputs[-1] + activations + tile.o_ch, mask=m_fh, other=0.0)
            if partial_in is not None:
                m_eh = tile.m_hc & at.m_e[None, :]
                tl.store(partial_in_bar.inputs[-1] + activations + tile.o_ch, b_h_bar, mask=m_eh)
                b_h_bar = tl.where(at.m_e[None, :], 0.0, b_h_bar)

            b_z1_bar = b_h_bar * b_slope
            if BOTH:
                b_z1_bar += b_dz1_bar * b_dh * b_curvature
                b_dh_bar = b_dz1_bar * b_slope
                b_dz2_bar += product(tl.trans(b_dh_bar), b_w2, PRECISION)
                b_w2_bar = product(b_dh_bar, held(rows, DZ2, dz2_operand, BD, C, BD, STREAM), PRECISION)
                if not LINEAR:
                    b_w2_bar += tl.load(weight_bar2 + tile.o_2, mask=tile.m_w, other=0.0)
                tl.store(weight_bar2 + tile.o_2, b_w2_bar, mask=tile.m_w)
            tl.store(hidden_bar + tile.o_hc, b_z1_bar, mask=tile.m_hc)
        tl.debug_barrier()

        # -- gates ----------------------------------------------------------------------------------------------------
        b_k, b_fold = get(rows, K, BD, C, BD), get(rows, KEY_GATE, BD, C, BD) * half[None, :]
        b_fold_bar = b_dz2_fold_bar * get(rows, DZ2, BD, C, BD) + b_k_fold_bar * b_k
        b_dz2_bar += get(rows, DZ2_BAR, BD, C, BD) + b_dz2_fold_bar * b_fold
        b_k_bar = get(rows, K_BAR, BD, C, BD) + b_k_fold_bar * b_fold
        back_to_gates(
            b_fold_bar, b_total_bar, half_bar, half, rows, tokens, bars, partial_in_bar, partial_out_bar, at, m_f, place, link,
            sizes,
        )  # fmt: skip

        # -- back through the layer norm's backward and the residual --------------------------------------------------
        b_dz2_bar = handed_on(b_dz2_bar, partial_in_bar, partial_out_bar, at, m_f, sizes, False)
        if partial_in is not None:
            b_dz2_bar = tl.where(at.m_e[:, None], 0.0, b_dz2_bar)
        b_normed, inverse_std, b_error, b_r = error_of_write(
            get(rows, Z2, BD, C, BD), b_k, b_gamma, b_beta, tokens, at, norm, loss, sizes
        )
        b_g = b_r * b_gamma[None, :]
        b_g_bar = normalise_vjp(b_dz2_bar, b_normed, inverse_std, m_d, D)
        b_prediction_bar, b_delta_bar = residual_vjp_of(b_error, b_g_bar * b_gamma[None, :], tokens, at, loss, sizes)
        b_gamma_bar += tl.sum(b_g_bar * b_r + b_prediction_bar * b_normed, 0)
        b_beta_bar += tl.sum(b_prediction_bar, 0)
        # what was cut has no gradient
        b_v_bar = tl.where(tl.abs(load_rows(tokens.v, at)) > VALUE_CAP, 0.0, -b_prediction_bar)
        tl.store(bars.v + at.p_td, b_v_bar.to(bars.v.dtype.element_ty), mask=at.m_td)
        store_delta_bar(b_delta_bar, bars, at, loss, sizes)
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
        if partial_out_bar is not None:
            b_kept_total = tl.where(is_partial, 1.0, b_kept_total)
        b_k_bar = tl.zeros([C, BD], dtype=tl.float32)
        inner1 = tl.zeros([BD], dtype=tl.float32)
        inner2 = tl.zeros([BD], dtype=tl.float32)
        for j in range(0, TILES):
            tile = tile_of(j, sizes, TN)
            _, _, b_a1 = load_first(saved1, base1, tile, link, sizes)
            _, _, b_a2 = load_dual(saved2, base2, tile.o_2, tile.m_w, link)
            b_w1 = weight_of(b_a1, tile.m_w, sums1, scale1, mass1, 0.0, link, 0)
            b_w2 = weight_of(b_a2, tile.m_w, sums2, scale2, mass2, mass2 / N, link, 0)
            b_h, b_slope = gelu_and_slope(tl.load(hidden + tile.o_hc, mask=tile.m_hc, other=0.0), PRECISION)
            z2_rows = held(rows, Z2_BAR, z2_operand, BD, C, BD, STREAM)
            b_z1_bar = tl.load(hidden_bar + tile.o_hc, mask=tile.m_hc, other=0.0)
            b_z1_bar += product(b_w2, tl.trans(z2_rows), PRECISION) * b_slope
            b_w2_bar = product(b_h, z2_rows, PRECISION)
            if BOTH or not LINEAR:
                b_w2_bar += tl.load(weight_bar2 + tile.o_2, mask=tile.m_w, other=0.0)
            b_w1_bar = product(b_z1_bar, held(rows, K, k_operand, BD, C, BD, STREAM), PRECISION)
            b_k_bar += product(tl.trans(b_z1_bar), b_w1, PRECISION)
            b_state2 = tl.load(state_bar2 + tile.o_2, mask=tile.m_w, other=0.0) * bound2 * b_kept_total[None, :]
            if LINEAR:
                b_state2 += tl.load(read_bar2 + tile.o_2, mask=tile.m_w, other=0.0)
            tl.store(state_bar2 + tile.o_2, b_state2, mask=tile.m_w)
            if BOTH:
                b_state1 = tl.load(state_bar1 + tile.o_1, mask=tile.m_w, other=0.0) * bound1 * b_kept_total[None, :]
                b_read_bar = tl.load(weight_bar1 + tile.o_1, mask=tile.m_w, other=0.0)
                if LINEAR:
                    b_state1 += b_read_bar
                else:
                    b_w1_bar += b_read_bar
                tl.store(state_bar1 + tile.o_1, b_state1, mask=tile.m_w)
                if link.KIND == KL:
                    inner1 += tl.sum(b_w1_bar * b_w1, 0) / mass1
                else:
                    scale_bar1 += along_dual(b_w1_bar, b_a1, link)
            else:
                b_w1_bar += tl.load(base_bar1 + tile.o_1, mask=tile.m_w, other=0.0)
            if link.KIND == KL:
                # the weights themselves, with their uniform part
                inner2 += tl.sum(tl.where(tile.m_w, b_w2_bar * (b_w2 + mass2 / N), 0.0), 0) / mass2
            else:
                scale_bar2 += along_dual(b_w2_bar, b_a2, link)
            # a number may have been read by more than one thread: all have, before one writes
            tl.debug_barrier()
            if BOTH:
                tl.store(weight_bar1 + tile.o_1, b_w1_bar, mask=tile.m_w)
            else:
                tl.store(base_bar1 + tile.o_1, b_w1_bar, mask=tile.m_w)
            tl.store(weight_bar2 + tile.o_2, b_w2_bar, mask=tile.m_w)
        tl.debug_barrier()
        b_k_bar += get(rows, K_BAR, BD, C, BD)
        if BOTH:
            b_k_bar = handed_on(b_k_bar, partial_in_bar, partial_out_bar, at, m_f, sizes, True)
        b_k_bar = tl.where(tl.abs(load_rows(tokens.k, at)) > KEY_CAP, 0.0, b_k_bar)
        tl.store(bars.k + at.p_td, b_k_bar.to(bars.k.dtype.element_ty), mask=at.m_td)

        # -- link -----------------------------------------------------------------------------------------------------
        slope_mean_bar1, slope_mean_bar2 = 0.0, 0.0
        if link.KIND == LQ_MIRROR:
            of_scale2, slope_mean_bar2 = slope_bars(slope_gain_bar2, slope_gain2, mean_slope2, link.Q)
            scale_bar2 += of_scale2
            if BOTH:
                of_scale1, slope_mean_bar1 = slope_bars(carried[3], slope_gain1, mean_slope1, link.Q)
                scale_bar1 += of_scale1
        rates1, rates2 = (0.0, 0.0), (0.0, 0.0)
        if link.KIND != KL:
            rates2 = rates_of(sums2, scale_bar2, link, sizes)
            if BOTH:
                rates1 = rates_of(sums1, scale_bar1, link, sizes)
        b_largest1, b_largest2 = tl.zeros([TN, BD], dtype=tl.float32), tl.zeros([TN, BD], dtype=tl.float32)
        for j in range(0, TILES):
            tile = tile_of(j, sizes, TN)
            b_slope1_bar, b_slope2_bar = 0.0, 0.0
            if link.KIND == LQ_MIRROR:
                of_hidden2 = tl.load(slope_bar2 + tile.o_h, mask=tile.m_h, other=0.0)
                b_slope2_bar = (of_hidden2 / D)[:, None]
                b_slope2_bar += (channel_slope_bar / N + slope_mean_bar2 / (D * N))[None, :]
                if BOTH:
                    of_hidden1 = tl.load(slope_bar1 + tile.o_h, mask=tile.m_h, other=0.0)
                    b_slope1_bar = (of_hidden1 / D + slope_mean_bar1 / (D * N))[:, None]
                    b_slope1_bar += (key_slope_bar / N)[None, :]
            b_a2_bar, b_state2 = back_through_link(rates2, inner2, b_slope2_bar, layer2, tile.o_2, tile, link)
            b_largest2 = tl.maximum(b_largest2, tl.abs(b_state2))
            if BOTH:
                b_a1_bar, b_state1 = back_through_link(rates1, inner1, b_slope1_bar, layer1, tile.o_1, tile, link)
                b_largest1 = tl.maximum(b_largest1, tl.abs(b_state1))
            tl.debug_barrier()
            store_state_bar(b_state2, b_a2_bar, layer2, tile.o_2, tile, link)
            if BOTH:
                store_state_bar(b_state1, b_a1_bar, layer1, tile.o_1, tile, link)
        largest1, largest2 = tl.max(b_largest1), tl.max(b_largest2)
        tl.debug_barrier()

    if not BOTH:
        back_through_base(base1, base_bar1, base_bar1, base_sums1, base_scale1, mass1, link, sizes, True, False, TN)
    elif IMAGE:
        back_through_base(base1, constant_bar1, base_bar1, base_sums1, base_scale1, mass1, link, sizes, True, True, TN)
    if IMAGE:
        back_through_base(
            base2, constant_bar2, base_bar2, base_sums2, base_scale2, mass2, link, sizes, False, True, TN
        )
    tl.store(norm_bar[0] + place.program * D + o_d, b_gamma_bar, mask=m_d)
    tl.store(norm_bar[1] + place.program * D + o_d, b_beta_bar, mask=m_d)
