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
"""What a program puts aside between two passes over its tiles: tensors of a chunk's C rows, in its part of `rows`.

A place holds [C, BD] or [C, C] numbers in float32. What is put there may be read after the program's next barrier.
"""

import triton
import triton.language as tl

from .pieces import operand


@triton.jit
def put(rows, PLACE: tl.constexpr, x, C: tl.constexpr, BD: tl.constexpr):
    o_c, o_w = tl.arange(0, C), tl.arange(0, x.shape[1])
    tl.store(rows + o_c[:, None] * x.shape[1] + o_w[None, :] + PLACE * C * (C if C > BD else BD), x)


@triton.jit
def get(rows, PLACE: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr, BD: tl.constexpr):
    o_c, o_w = tl.arange(0, C), tl.arange(0, WIDTH)
    return tl.load(rows + o_c[:, None] * WIDTH + o_w[None, :] + PLACE * C * (C if C > BD else BD))


@triton.jit
def put_tile(rows, PLACE: tl.constexpr, x, tile, C: tl.constexpr, BD: tl.constexpr):
    # channels of a tile, [TN, C]
    p_nc = tile.o_h[:, None] + tl.arange(0, C)[None, :] * BD + PLACE * C * (C if C > BD else BD)
    tl.store(rows + p_nc, x, mask=tile.m_hc)


@triton.jit
def get_tile(rows, PLACE: tl.constexpr, tile, C: tl.constexpr, BD: tl.constexpr):
    p_nc = tile.o_h[:, None] + tl.arange(0, C)[None, :] * BD + PLACE * C * (C if C > BD else BD)
    return tl.load(rows + p_nc, mask=tile.m_hc, other=0.0)


@triton.jit
def hold(
    rows,
    PLACE: tl.constexpr,
    x,
    C: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
    STREAM: tl.constexpr,
):
    # an operand of every tile's products, rounded once: half the registers where it is bfloat16
    if STREAM:
        put(rows, PLACE, x, C, BD)
    return operand(x, PRECISION)


@triton.jit
def held(rows, PLACE: tl.constexpr, x, WIDTH: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, STREAM: tl.constexpr):
    # with STREAM, read again where it is used
    if STREAM:
        return get(rows, PLACE, WIDTH, C, BD)
    else:
        return x
