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
"""The forward pass of a matrix memory with gradients token by token: the delta rule, and the implicit step.

As that of `forward_pass.py`, with the state in registers and one pass, but for the residuals, which depend on each other:

    L = tril((K s Gq)(K Gk)^T, -1)      (I + L) R = (K s B) D + K s A_0 - V      s: the weights' cap at the chunk's start

Slots that an earlier call has filled have the residuals of that call, and rows of L that are zero.
"""

import triton
import triton.language as tl

from .chunks import behind, load_gates, load_rows, place_of, slot_of
from .forward_pass import after_chunk, keys_of
from .layers import add_to_sums, scale_of
from .links import start_of_sum
from .pieces import KEY_CAP, VALUE_CAP, bounded, chunk_gates, product
from .triangular import bounded_steps, factors_of, solved


@triton.jit
def load_bounded_gates(tokens, partial_in, b_k, at, place, loss, link, sizes):
    # `load_gates`, steps bounded; those of slots filled before have been, when these were
    b_eta, b_log_decay, total_log_decay = load_gates(tokens, partial_in, at, place, link, sizes)
    b_bounded = bounded_steps(b_eta, b_k, loss.STEP)
    if partial_in is not None:
        b_bounded = tl.where(at.m_e[:, None], b_eta, b_bounded)
    return b_bounded, b_log_decay, total_log_decay


@triton.jit
def depends_on(at, sizes):
    # [C, C]: the residual of the rows' token is taken after the writes of the columns'
    o_c = tl.arange(0, sizes.C)
    return (o_c[:, None] > o_c[None, :]) & ~at.m_e[:, None]


@triton.jit(do_not_specialize=["H"])
def delta_forward_kernel(
    tokens, y, base, dual, partial_in, partial_out, rows, saved, H, loss, link, sizes, SAVE_EVERY: tl.constexpr
):
    place = place_of(rows, H, sizes)
    o_c, o_d = tl.arange(0, sizes.C), tl.arange(0, sizes.BD)
    m_d = o_d < sizes.D
    o_w, m_w = o_d[:, None] * sizes.D + o_d[None, :], m_d[:, None] & m_d[None, :]
    dual = dual[0] + place.program * sizes.D * sizes.D
    base = base[0] + place.head * sizes.D * sizes.D
    b_state = tl.load(dual + o_w, mask=m_w, other=0.0)

    for i_c in range(0, place.chunks):
        at, b_k, broken = keys_of(i_c, tokens, y, partial_in, place, H, sizes)
        if SAVE_EVERY > 0:
            if i_c % SAVE_EVERY == 0:
                slot = slot_of(saved, i_c // SAVE_EVERY, place, H, sizes)
                tl.store(saved.duals[0] + slot + o_w, b_state, mask=m_w)
        b_base, b_dual = b_state, b_state
        if link.TOWARD_INIT:
            b_base = tl.load(base + o_w, mask=m_w, other=0.0).to(tl.float32)
            b_dual = b_base + b_state
        scale = 1.0
        if link.CAP > 0.0:
            scale = scale_of(add_to_sums(start_of_sum(sizes.BD, link.KIND), b_dual, m_w, link, 1), link, sizes)

        # -- the residuals --------------------------------------------------------------------------------------------
        b_eta, b_log_decay, total_log_decay = load_bounded_gates(tokens, partial_in, b_k, at, place, loss, link, sizes)
        b_decay, b_gq, b_gk, b_fold, b_total = chunk_gates(b_eta, b_log_decay, total_log_decay)
        b_total = tl.where(broken < sizes.C, float("nan"), b_total)
        b_keys = tl.trans(b_k * b_gk)
        b_asked = b_k * scale
        b_l = tl.where(depends_on(at, sizes), product(b_asked * b_gq, b_keys, sizes.PRECISION), 0.0)
        b_e, b_n = factors_of(b_l, sizes.C, sizes.PRECISION)
        b_r = product(b_asked * b_decay, b_state, sizes.PRECISION)
        if link.TOWARD_INIT:
            b_r += product(b_asked, b_base, sizes.PRECISION)
        b_r -= bounded(load_rows(tokens.v, at), VALUE_CAP)
        if partial_in is not None:
            b_r = behind(b_r, partial_in.gradients[0], at)
        b_r = solved(b_e, b_n, b_r, sizes.C, sizes.PRECISION)

        # -- the read -------------------------------------------------------------------------------------------------
        b_x = bounded(load_rows(tokens.q, at), KEY_CAP) * scale
        b_p = product(b_x * b_gq, b_keys, sizes.PRECISION)
        b_y = product(tl.where(o_c[:, None] >= o_c[None, :], -b_p, 0.0), b_r, sizes.PRECISION)
        b_y += product(b_x * b_decay, b_state, sizes.PRECISION)
        if link.TOWARD_INIT:
            b_y += product(b_x, b_base, sizes.PRECISION)
        tl.store(y + at.p_td, b_y.to(y.dtype.element_ty), mask=at.m_td)

        # -- the fold, or the begun chunk's factors -------------------------------------------------------------------
        gates = b_eta, b_log_decay, b_fold, b_total
        b_state = after_chunk(b_state, b_k, b_r, gates, i_c, broken, partial_out, at, place, sizes)

    if partial_out is not None:
        tl.store(dual + o_w, b_state, mask=m_w)
