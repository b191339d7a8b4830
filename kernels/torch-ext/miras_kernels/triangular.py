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
"""What a chunk of the delta rule has beyond that of gradients at its start: bounds of step sizes, and a triangular system.

The residuals R of a chunk's tokens solve `(I + L) R = P`, L strictly lower. The inverse of I + L is a well-behaved matrix
where steps are bounded, a product of maps that make no vector longer; the powers of L are not: of equal keys and steps of
one, L is all ones, and the largest number in its powers is of the order of 2^C, which the doubling product
`(I - L)(I + L^2)(I + L^4)...` would have to cancel. So blocks of 16 tokens are inverted row by row, all of a chunk's side by
side, and blocks are substituted forward with products of the whole chunk:

    E = inverse of I + L inside blocks      N = E L outside of them      R <- E P - N R,  once for each block but the first

A pass over the rows of 16 costs the same whatever the chunk, and after the n-th product the first n + 1 blocks are right.
"""

import triton
import triton.language as tl

from .pieces import at_least, product


# how steps are bounded, as `Loss.STEP` says: 0 not at all, which is gradients at a chunk's start
DELTA_RULE = tl.constexpr(1)
IMPLICIT = tl.constexpr(2)
LARGEST_STEP = tl.constexpr(2.0)  # over |k|^2: beyond it the memory along k would grow
BLOCK = tl.constexpr(16)


@triton.jit
def bounded_steps(b_eta, b_k, STEP: tl.constexpr):
    # of tokens, [C, BD]; a tile of one where it is decoded
    squared = tl.sum(b_k * b_k, 1)[:, None]
    if STEP == IMPLICIT:
        return b_eta / (1.0 + b_eta * squared)
    else:
        return b_eta * (LARGEST_STEP / at_least(b_eta * squared, LARGEST_STEP))


@triton.jit
def bounded_steps_vjp(b_eta, b_k, bar, STEP: tl.constexpr):
    # adjoints of the steps as they were given, [C, BD], and of keys by way of their norm
    squared = tl.sum(b_k * b_k, 1)[:, None]
    if STEP == IMPLICIT:
        kept = 1.0 / (1.0 + b_eta * squared)
        eta_bar = bar * kept * kept
        squared_bar = -eta_bar * b_eta * b_eta
    else:
        cut = b_eta * squared > LARGEST_STEP
        eta_bar = tl.where(cut, 0.0, bar)
        squared_bar = tl.where(cut, -LARGEST_STEP * bar / (squared * squared), 0.0)
    return eta_bar, 2.0 * b_k * tl.sum(squared_bar, 1)[:, None]


@triton.jit
def exact(a, b, PRECISION: tl.constexpr):
    # a product of the system's: bfloat16 operands would be rounded once for each block
    if PRECISION == "bf16":
        return tl.dot(a, b, input_precision="tf32")
    elif PRECISION == "bf16_rounded":
        return tl.dot(a, b, input_precision="ieee")
    else:
        return product(a, b, PRECISION)


@triton.jit
def factors_of(b_l, C: tl.constexpr, PRECISION: tl.constexpr):
    # E and N of I + L, [C, C]; L is zero on its diagonal and above
    BLOCKS: tl.constexpr = C // BLOCK
    o_b, o_r, o_c = tl.arange(0, BLOCKS), tl.arange(0, BLOCK), tl.arange(0, C)
    own = o_b[:, None, None, None] == o_b[None, None, :, None]
    # the blocks on the diagonal, [BLOCKS, BLOCK, BLOCK]: row i of the inverse needs those above it
    b_e = -tl.sum(tl.where(own, tl.reshape(b_l, [BLOCKS, BLOCK, BLOCKS, BLOCK]), 0.0), 2)
    for i in tl.static_range(1, BLOCK):
        at_row = (o_r == i)[None, :, None]
        b_row = tl.sum(tl.where(at_row, b_e, 0.0), 1)
        b_row += tl.sum(b_row[:, :, None] * b_e, 1)
        b_e = tl.where(at_row, b_row[:, None, :], b_e)
    b_e = tl.where((o_r[:, None] == o_r[None, :])[None, :, :], 1.0, b_e)
    b_e = tl.reshape(tl.where(own, b_e[:, :, None, :], 0.0), [C, C])
    b_n = tl.where(o_c[:, None] // BLOCK == o_c[None, :] // BLOCK, 0.0, b_l)
    if BLOCKS > 1:
        b_n = exact(b_e, b_n, PRECISION)
    return b_e, b_n


@triton.jit
def solved(b_e, b_n, b_p, C: tl.constexpr, PRECISION: tl.constexpr):
    # (I + L)^-1 P
    b_first = exact(b_e, b_p, PRECISION)
    b_r = b_first
    for _ in tl.static_range(C // BLOCK - 1):
        b_r = b_first - exact(b_n, b_r, PRECISION)
    return b_r


@triton.jit
def solved_transposed(b_e, b_n, b_bar, C: tl.constexpr, PRECISION: tl.constexpr):
    # (I + L)^-T R_bar, the adjoint of P
    b_p_bar = b_bar
    for _ in tl.static_range(C // BLOCK - 1):
        b_p_bar = b_bar - exact(tl.trans(b_n), b_p_bar, PRECISION)
    return exact(tl.trans(b_e), b_p_bar, PRECISION)
