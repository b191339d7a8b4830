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
"""The backward pass of the delta rule: chunk after chunk, the last one first, each computed again from its start.

The derivation is in README.md; `x_bar` is the adjoint of x. Columns of R are solved for by themselves, so channels of the
value go by in tiles of `TN`: of a state no more than d x TN numbers are held at a time.
"""

import triton
import triton.language as tl

from .backward_pieces import handed_on
from .chunks import behind, chunk_of, load_rows, place_of, slot_of, store_gate_bars
from .forward_delta import depends_on, load_bounded_gates
from .layers import add_to_sums, load_dual, rates_of, scale_of
from .links import start_of_sum
from .pieces import (
    KEY_CAP,
    LARGEST_STATE_ADJOINT,
    SHARED_NUMBERS,
    VALUE_CAP,
    bounded,
    chunk_gates,
    product,
)
from .triangular import bounded_steps_vjp, factors_of, solved, solved_transposed


@triton.jit
def back_to_steps(b_k_bar, b_k, tokens, bars, at, loss, sizes):
    # from the adjoint of bounded steps, which `store_gate_bars` has left in global memory, to that of the given ones and of
    # the keys, whose norm is in the bound
    o_d = tl.arange(0, sizes.BD)
    o_g, m_g = o_d, o_d < sizes.D
    if sizes.GATE_DIM == 1:
        o_g, m_g = 0 * o_d, o_d == 0
    p_g = at.o_t[:, None] * sizes.GATE_DIM + o_g[None, :]
    m_tg = at.m_t[:, None] & m_g[None, :]
    tl.debug_barrier()
    b_bar = tl.load(bars.eta + p_g, mask=m_tg, other=0.0)
    b_eta = tl.load(tokens.eta + p_g, mask=m_tg, other=0.0)
    b_eta_bar, b_of_key = bounded_steps_vjp(b_eta, b_k, b_bar, loss.STEP)
    tl.store(bars.eta + p_g, b_eta_bar, mask=m_tg)
    return b_k_bar + b_of_key


@triton.jit(do_not_specialize=["H"])
def delta_backward_kernel(
    tokens, y_bar, base, saved, bars, state_bar, base_bar, partial_in, partial_in_bar, partial_out_bar, rows_of_call, H,
    loss, link, sizes, TN: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = sizes.C
    D: tl.constexpr = sizes.D
    BD: tl.constexpr = sizes.BD
    PRECISION: tl.constexpr = sizes.PRECISION
    TILES: tl.constexpr = (D + TN - 1) // TN
    tl.static_assert(C * BD >= THREADS, SHARED_NUMBERS)
    tl.static_assert(BD * TN >= THREADS, SHARED_NUMBERS)
    place = place_of(rows_of_call, H, sizes)
    o_c, o_d, o_n = tl.arange(0, C), tl.arange(0, BD), tl.arange(0, TN)
    m_seen = o_c[:, None] >= o_c[None, :]
    base = base[0] + place.head * D * D
    state_bar, base_bar = state_bar[0] + place.program * D * D, base_bar[0] + place.program * D * D
    # the largest entry of the state's adjoint, which bounds it
    largest = 0.0

    for i in range(0, place.chunks):
        i_c = place.chunks - 1 - i
        state = saved.duals[0] + slot_of(saved, i_c, place, H, sizes)
        bound = LARGEST_STATE_ADJOINT / tl.maximum(largest, LARGEST_STATE_ADJOINT)

        # -- the chunk's tokens, gates and system ---------------------------------------------------------------------
        at = chunk_of(i_c, place, H, sizes)
        is_partial = (i_c == place.chunks - 1) & (place.taken > 0)
        m_f = o_c < tl.where(is_partial, place.taken, 0)
        b_k = bounded(load_rows(tokens.k, at), KEY_CAP)
        if partial_in is not None:
            b_k = behind(b_k, partial_in.inputs[0], at)
        b_eta, b_log_decay, total_log_decay = load_bounded_gates(tokens, partial_in, b_k, at, place, loss, link, sizes)
        b_decay, b_gq, b_gk, b_fold, b_total = chunk_gates(b_eta, b_log_decay, total_log_decay)
        half = tl.exp(0.5 * total_log_decay)
        scale = 1.0
        sums = start_of_sum(BD, link.KIND)
        if link.CAP > 0.0:
            for j in range(0, TILES):
                m_n = o_n + j * TN < D
                p_w, m_w = o_d[:, None] * D + o_n[None, :] + j * TN, (o_d < D)[:, None] & m_n[None, :]
                _, _, b_dual = load_dual(state, base, p_w, m_w, link)
                sums = add_to_sums(sums, b_dual, m_w, link, 1)
            scale = scale_of(sums, link, sizes)
        m_before = depends_on(at, sizes)
        b_q = bounded(load_rows(tokens.q, at), KEY_CAP)
        b_x, b_asked, b_keys = b_q * scale, b_k * scale, b_k * b_gk
        b_l = tl.where(m_before, product(b_asked * b_gq, tl.trans(b_keys), PRECISION), 0.0)
        b_e, b_n = factors_of(b_l, C, PRECISION)
        b_p = tl.where(m_seen, -product(b_x * b_gq, tl.trans(b_keys), PRECISION), 0.0)

        # a chunk that the final state has begun is not folded: its dual state is handed on as it is
        folds = 1.0
        b_kept_total = b_total
        if partial_out_bar is not None:
            folds = tl.where(is_partial, 0.0, 1.0)
            b_kept_total = tl.where(is_partial, 1.0, b_total)

        # -- back through the read, the fold and the system, a tile of the values' channels after the other -----------
        b_p_bar, b_l_bar = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
        b_x_decayed_bar, b_asked_decayed_bar = tl.zeros([C, BD], tl.float32), tl.zeros([C, BD], tl.float32)
        b_x_bar, b_asked_bar = tl.zeros([C, BD], tl.float32), tl.zeros([C, BD], tl.float32)
        b_k_fold_bar = tl.zeros([C, BD], tl.float32)
        b_total_bar = tl.zeros([BD], tl.float32)
        largest = 0.0
        for j in range(0, TILES):
            m_n = o_n + j * TN < D
            p_w, m_w = o_d[:, None] * D + o_n[None, :] + j * TN, (o_d < D)[:, None] & m_n[None, :]
            p_t, m_t = at.o_t[:, None] * D + o_n[None, :] + j * TN, at.m_t[:, None] & m_n[None, :]
            p_e = place.program * C * D + o_c[:, None] * D + o_n[None, :] + j * TN
            b_state, b_base, _ = load_dual(state, base, p_w, m_w, link)
            b_v = tl.load(tokens.v + p_t, mask=m_t, other=0.0).to(tl.float32)
            b_r = product(b_asked * b_decay, b_state, PRECISION) - bounded(b_v, VALUE_CAP)
            if link.TOWARD_INIT:
                b_r += product(b_asked, b_base, PRECISION)
            if partial_in is not None:
                m_e = at.m_e[:, None] & m_n[None, :]
                b_r = tl.where(at.m_e[:, None], tl.load(partial_in.gradients[0] + p_e, mask=m_e, other=0.0), b_r)
            b_r = solved(b_e, b_n, b_r, C, PRECISION)

            b_y_bar = tl.load(y_bar + p_t, mask=m_t, other=0.0).to(tl.float32)
            b_next = tl.load(state_bar + p_w, mask=m_w, other=0.0) * bound
            b_folded = b_next * folds
            b_r_bar = product(tl.trans(b_p), b_y_bar, PRECISION) - product(b_k * b_fold, b_folded, PRECISION)
            if partial_out_bar is not None:
                m_fn = m_f[:, None] & m_n[None, :]
                b_r_bar += tl.load(partial_out_bar.gradients[0] + p_e, mask=m_fn, other=0.0)
            b_p_bar += product(b_y_bar, tl.trans(b_r), PRECISION)
            b_x_decayed_bar += product(b_y_bar, tl.trans(b_state), PRECISION)
            b_k_fold_bar -= product(b_r, tl.trans(b_folded), PRECISION)
            b_total_bar += tl.sum(b_folded * b_state, 1)

            b_alone_bar = solved_transposed(b_e, b_n, b_r_bar, C, PRECISION)
            b_l_bar += product(b_alone_bar, tl.trans(b_r), PRECISION)
            if partial_in is not None:
                if partial_in_bar is not None:
                    tl.store(partial_in_bar.gradients[0] + p_e, b_alone_bar, mask=m_e)
                b_alone_bar = tl.where(at.m_e[:, None], 0.0, b_alone_bar)
            b_v_bar = tl.where(tl.abs(b_v) > VALUE_CAP, 0.0, -b_alone_bar)
            tl.store(bars.v + p_t, b_v_bar.to(bars.v.dtype.element_ty), mask=m_t)
            b_asked_decayed_bar += product(b_alone_bar, tl.trans(b_state), PRECISION)

            b_state_bar = b_next * b_kept_total[:, None]
            b_state_bar += product(tl.trans(b_x * b_decay), b_y_bar, PRECISION)
            b_state_bar += product(tl.trans(b_asked * b_decay), b_alone_bar, PRECISION)
            largest = tl.maximum(largest, tl.max(tl.abs(b_state_bar)))
            tl.store(state_bar + p_w, b_state_bar, mask=m_w)
            if link.TOWARD_INIT:
                b_x_bar += product(b_y_bar, tl.trans(b_base), PRECISION)
                b_asked_bar += product(b_alone_bar, tl.trans(b_base), PRECISION)
                b_base_bar = product(tl.trans(b_x), b_y_bar, PRECISION)
                b_base_bar += product(tl.trans(b_asked), b_alone_bar, PRECISION)
                b_base_bar += tl.load(base_bar + p_w, mask=m_w, other=0.0)
                tl.store(base_bar + p_w, b_base_bar, mask=m_w)

        # -- back through the scores, to queries, keys and gates ------------------------------------------------------
        b_p_bar, b_l_bar = tl.where(m_seen, -b_p_bar, 0.0), tl.where(m_before, -b_l_bar, 0.0)
        b_of_query, b_of_asked = product(b_p_bar, b_keys, PRECISION), product(b_l_bar, b_keys, PRECISION)
        b_keys_bar = product(tl.trans(b_p_bar), b_x * b_gq, PRECISION)
        b_keys_bar += product(tl.trans(b_l_bar), b_asked * b_gq, PRECISION)
        b_x_bar += b_of_query * b_gq + b_x_decayed_bar * b_decay
        b_asked_bar += b_of_asked * b_gq + b_asked_decayed_bar * b_decay
        b_decay_bar = b_x_decayed_bar * b_x + b_asked_decayed_bar * b_asked
        b_gq_bar = b_of_query * b_x + b_of_asked * b_asked + b_decay_bar * half[None, :]
        b_fold_bar = b_k_fold_bar * b_k
        b_gk_bar = b_keys_bar * b_k + b_fold_bar * half[None, :]
        half_bar = tl.sum(b_decay_bar * b_gq + b_fold_bar * b_gk, 0) + 2.0 * half * b_total_bar
        store_gate_bars(
            b_gq_bar, b_gk_bar, half_bar, (b_gq, b_gk, half), tokens, bars, partial_in_bar, partial_out_bar, at, m_f, place,
            link, sizes,
        )  # fmt: skip
        b_q_bar = tl.where(tl.abs(load_rows(tokens.q, at)) > KEY_CAP, 0.0, b_x_bar * scale)
        tl.store(bars.q + at.p_td, b_q_bar.to(bars.q.dtype.element_ty), mask=at.m_td)
        b_k_bar = b_keys_bar * b_gk + b_k_fold_bar * b_fold + b_asked_bar * scale
        b_k_bar = back_to_steps(b_k_bar, b_k, tokens, bars, at, loss, sizes)
        b_k_bar = handed_on(b_k_bar, partial_in_bar, partial_out_bar, at, m_f, sizes, True)
        b_k_bar = tl.where(tl.abs(load_rows(tokens.k, at)) > KEY_CAP, 0.0, b_k_bar)
        tl.store(bars.k + at.p_td, b_k_bar.to(bars.k.dtype.element_ty), mask=at.m_td)

        # -- back through the weights' cap ----------------------------------------------------------------------------
        tl.debug_barrier()
        if link.CAP > 0.0:
            rates = rates_of(sums, tl.sum(b_x_bar * b_q) + tl.sum(b_asked_bar * b_k), link, sizes)
            largest = 0.0
            for j in range(0, TILES):
                m_n = o_n + j * TN < D
                p_w, m_w = o_d[:, None] * D + o_n[None, :] + j * TN, (o_d < D)[:, None] & m_n[None, :]
                _, _, b_dual = load_dual(state, base, p_w, m_w, link)
                b_dual_bar = rates[0] * b_dual
                b_state_bar = tl.load(state_bar + p_w, mask=m_w, other=0.0) + b_dual_bar
                largest = tl.maximum(largest, tl.max(tl.abs(b_state_bar)))
                tl.store(state_bar + p_w, b_state_bar, mask=m_w)
                if link.TOWARD_INIT:
                    b_base_bar = tl.load(base_bar + p_w, mask=m_w, other=0.0) + b_dual_bar
                    tl.store(base_bar + p_w, b_base_bar, mask=m_w)
            tl.debug_barrier()
