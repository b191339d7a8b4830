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
"""The decode kernel of the delta rule: tokens of one row and head, the state read once for all of them and updated in place.

The equations are in README.md: those of `decode_matrix.py`, but for a token's residual, which is that of the memory after
the writes before it.
"""

import triton
import triton.language as tl

from .decode_pieces import after_token, next_token, row_of, taken_slots
from .layers import add_to_sums, load_dual, scale_of
from .links import start_of_sum


# as in decode_matrix.py
@triton.jit(do_not_specialize=["H", "ROTARY_TOKENS"], do_not_specialize_on_alignment=["T"])
def delta_decode_kernel(
    tokens, y, base, dual, slots, count, phases, raw, lengths, T, H, ROTARY_TOKENS, loss, link, sizes
):
    C: tl.constexpr = sizes.C
    D: tl.constexpr = sizes.D
    BD: tl.constexpr = sizes.BD
    row = row_of(lengths, T, H)
    o_c, o_d = tl.arange(0, C), tl.arange(0, BD)
    m_d = o_d < D
    o_w, m_w = o_d[:, None] * D + o_d[None, :], m_d[:, None] & m_d[None, :]
    o_cd = o_c[:, None] * D + o_d[None, :]
    dual = dual[0] + row.program * D * D
    inputs, gradients = slots.inputs[0] + row.program * C * D, slots.gradients[0] + row.program * C * D
    b_state, b_base, _ = load_dual(dual, base[0] + row.head * D * D, o_w, m_w, link)

    # whatever stands there, no slot beyond the chunk is written to
    phase = tl.load(phases + row.program) & (C - 1)
    read = 0
    for t in range(0, T):
        p_y = y + ((row.index * T + t) * H + row.head) * D + o_d
        if t >= row.length:
            tl.store(p_y, tl.zeros([BD], tl.float32).to(y.dtype.element_ty), mask=m_d)
        else:
            token = next_token(t, row, phase, tokens, raw, slots, T, H, ROTARY_TOKENS, link, sizes, loss.STEP)
            scale = 1.0
            if link.CAP > 0.0:
                b_dual = b_state
                if link.TOWARD_INIT:
                    b_dual = b_base + b_state
                scale = scale_of(add_to_sums(start_of_sum(BD, link.KIND), b_dual, m_w, link, 1), link, sizes)
            b_decay = tl.exp(token.log_decay)
            b_keyed = taken_slots(inputs, token.k, phase, sizes) * token.keys

            # -- the residual, behind the chunk's writes so far -------------------------------------------------------
            m_before = (o_c < phase)[:, None] & m_d[None, :]
            b_before = tl.load(gradients + o_cd, mask=m_before, other=0.0)
            b_asked = token.k * scale
            b_seen = tl.sum(b_keyed * b_asked[None, :], 1)
            b_r = tl.sum((b_asked * b_decay)[:, None] * b_state, 0) - token.v
            b_r -= tl.sum(b_before * b_seen[:, None], 0)
            if link.TOWARD_INIT:
                b_r += tl.sum(b_asked[:, None] * b_base, 0)
            tl.store(gradients + phase * D + o_d, b_r, mask=m_d)
            b_written = tl.where((o_c == phase)[:, None], b_r[None, :], b_before)

            # -- the read ---------------------------------------------------------------------------------------------
            b_x = token.q * scale
            b_seen = tl.sum(b_keyed * b_x[None, :], 1)
            b_y = tl.sum((b_x * b_decay)[:, None] * b_state, 0) - tl.sum(b_written * b_seen[:, None], 0)
            if link.TOWARD_INIT:
                b_y += tl.sum(b_x[:, None] * b_base, 0)
            tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_d)
            tl.debug_barrier()
            b_state, phase = after_token(b_state, phase, dual, inputs, gradients, slots, row, token.log_decay, sizes)
            read += 1
    tl.store(phases + row.program, phase)
    if row.head == 0:
        tl.store(count + row.index, tl.load(count + row.index) + read)
