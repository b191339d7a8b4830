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

from .decode_pieces import after_token, next_token, row_of, taken_slots
from .layers import add_to_sums, load_dual, parts_of_read, scale_of, slope_of_hidden, weight_of
from .links import start_of_sum
from .pieces import KL, LQ_MIRROR, inverse_of_mean, residual


# a single token, the usual call, has a binary of its own: without the loop over tokens nothing is spilled. All others share
# one
@triton.jit(do_not_specialize=["H", "ROTARY_TOKENS"], do_not_specialize_on_alignment=["T"])
def matrix_decode_kernel(
    tokens, y, base, dual, slots, count, phases, raw, lengths, T, H, ROTARY_TOKENS, loss, link, sizes
):
    C: tl.constexpr = sizes.C
    D: tl.constexpr = sizes.D
    BD: tl.constexpr = sizes.BD
    # the hidden axis, the outputs, is the second
    HIDDEN: tl.constexpr = 1
    row = row_of(lengths, T, H)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    o_w, m_w = o_d[:, None] * D + o_d[None, :], m_d[:, None] & m_d[None, :]
    dual = dual[0] + row.program * D * D
    inputs, gradients = slots.inputs[0] + row.program * C * D, slots.gradients[0] + row.program * C * D
    b_state, b_base, _ = load_dual(dual, base[0] + row.head * D * D, o_w, m_w, link)
    mass = link.masses[0]

    # whatever stands there, no slot beyond the chunk is written to
    phase = tl.load(phases + row.program) & (C - 1)
    read = 0
    for t in range(0, T):
        p_y = y + ((row.index * T + t) * H + row.head) * D + o_d
        if t >= row.length:
            tl.store(p_y, tl.zeros([BD], tl.float32).to(y.dtype.element_ty), mask=m_d)
        else:
            token = next_token(t, row, phase, tokens, raw, slots, T, H, ROTARY_TOKENS, link, sizes, loss.STEP)

            # -- the link at the chunk's start, the write -----------------------------------------------------------------
            b_dual = b_state
            if link.TOWARD_INIT:
                b_dual = b_base + b_state
            sums = add_to_sums(start_of_sum(BD, link.KIND), b_dual, m_w, link, HIDDEN)
            scale = scale_of(sums, link, sizes)
            b_w = weight_of(b_dual, m_w, sums, scale, mass, 0.0, link, HIDDEN)
            b_error = tl.sum(token.k[:, None] * b_w, 0) - token.v
            b_r = residual(b_error[None, :], token.delta[None, :], m_d, loss)
            b_keyed = taken_slots(inputs, token.k, phase, sizes) * token.keys
            b_written = taken_slots(gradients, tl.sum(b_r, 0), phase, sizes)

            # -- the read -------------------------------------------------------------------------------------------------
            b_x = token.q
            if link.KIND == KL:
                mean = (tl.sum(b_written, 1) / D)[:, None]
                b_written = tl.where(m_d[None, :], (mass / D) * (b_written - mean), 0.0)
            elif link.KIND == LQ_MIRROR:
                # the slope's best rank-one factorisation: row means times column means over the mean
                b_slope = slope_of_hidden(b_dual, link, sizes, HIDDEN)
                inverse_mean = inverse_of_mean(tl.sum(sums[2]) / (1.0 * D * D))
                b_keyed = b_keyed * (sums[2] / D)[None, :]
                b_written = b_written * ((link.Q - 1.0) * scale * (b_slope * inverse_mean))[None, :]
            else:
                b_x = b_x * scale
            b_p = tl.sum(b_keyed * b_x[None, :], 1)
            b_y = -tl.sum(b_written * b_p[:, None], 0)
            if link.KIND == KL:
                b_y += tl.sum(b_x[:, None] * b_w, 0)
            else:
                base_sums = sums
                if link.KIND == LQ_MIRROR:
                    base_sums = add_to_sums(start_of_sum(BD, link.KIND), b_base, m_w, link, HIDDEN)
                base_scale = scale_of(base_sums, link, sizes)
                b_decaying, b_constant = parts_of_read(b_state, b_base, b_w, base_scale, link)
                b_y += tl.sum((b_x * tl.exp(token.log_decay))[:, None] * b_decaying, 0)
                if link.TOWARD_INIT:
                    b_y += tl.sum(b_x[:, None] * b_constant, 0)
            tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_d)
            tl.debug_barrier()
            b_state, phase = after_token(b_state, phase, dual, inputs, gradients, slots, row, token.log_decay, sizes)
            read += 1
    tl.store(phases + row.program, phase)
    if row.head == 0:
        tl.store(count + row.index, tl.load(count + row.index) + read)
