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
"""Links, W = phi(A), of a weight whose dual state goes by in tiles.

A link needs sums over the whole dual state: of squares, of powers |A|^q, and two along the hidden axis, a maximum and a sum
of exponentials, or the mirror map's slopes. A matrix memory's hidden axis is its outputs.
"""

import triton
import triton.language as tl

from .pieces import DECAY, KL, LQ_MIRROR, power


@triton.jit
def start_of_sum(BD: tl.constexpr, LINK: tl.constexpr):
    zeros = tl.zeros([BD], dtype=tl.float32)
    first = zeros
    if LINK == KL:
        first = zeros - 1.0e30
    return 0.0, 0.0, first, zeros


@triton.jit
def sum_of_dual(dual, mask, sums, AXIS: tl.constexpr, LINK: tl.constexpr, Q: tl.constexpr):
    # adds a tile of a dual state, AXIS its hidden one, to what the link needs of the whole weight
    squares, powers, first, second = sums
    if LINK == KL:
        # running maximum and sum of exponentials along the hidden axis
        top = tl.maximum(first, tl.max(tl.where(mask, dual, -1.0e30), AXIS))
        exponentials = tl.exp(dual - (top[:, None] if AXIS == 1 else top[None, :]))
        second = second * tl.exp(first - top) + tl.sum(tl.where(mask, exponentials, 0.0), AXIS)
        first = top
    elif LINK == DECAY:
        squares += tl.sum(dual * dual)
    else:
        powered = power(tl.abs(dual), Q - 2.0)
        powers += tl.sum(powered * dual * dual)
        if LINK == LQ_MIRROR:
            # of the mirror map itself, whose cap it is; and the slope's sums over the hidden axis
            dual = dual * powered
            first += tl.sum(tl.where(mask, powered, 0.0), AXIS)
        squares += tl.sum(dual * dual)
    return squares, powers, first, second


@triton.jit
def linked(dual, scale, top, total, mass, uniform, AXIS: tl.constexpr, LINK: tl.constexpr, Q: tl.constexpr):
    # a tile of W = phi(A); `top` and `total` lie along the axis that is not AXIS, the hidden one
    if LINK == KL:
        # not exp(A - log sum), whose argument is larger, and so what is rounded of it
        share = mass / total
        if AXIS == 1:
            return share[:, None] * tl.exp(dual - top[:, None])
        else:
            # Less the uniform part, which adds the same to all channels: the layer norm takes that out, in the forward
            # and in the backward, but rounding would leave a trace of it.
            return share[None, :] * tl.exp(dual - top[None, :]) - uniform
    elif LINK == LQ_MIRROR:
        return scale * dual * power(tl.abs(dual), Q - 2.0)
    else:
        return scale * dual
