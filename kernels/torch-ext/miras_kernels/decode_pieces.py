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
"""What the decode kernels of both memories share: the way from a layer's projections to a token's query, key, value and
gates, and the gates of the chunk that the token joins.

A token's channels are vectors `[BD]`. Where functions of `pieces.py` want tiles of tokens, a token is a tile of one.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .pieces import KEY_CAP, VALUE_CAP, at_least, at_most, bounded, chunk_gates, gate_channels, product, sigmoid
from .triangular import bounded_steps


LARGEST_SQUARED = tl.constexpr(1e8)  # as in mixer_ops.py of the models


class Row(NamedTuple):
    """The row and head that a program serves, and how many tokens the row has."""

    program: Any
    index: Any
    head: Any
    length: Any


class Token(NamedTuple):
    """A token of one head, vectors [BD], and its place in its chunk."""

    q: Any
    k: Any
    v: Any
    delta: Any
    log_decay: Any  # since the chunk's start
    keys: Any  # eta_i B_t / B_i of the chunk's slots, the token's included, [C, BD], zero in those still empty


@triton.jit
def row_of(lengths, T, H):
    program = tl.program_id(0).to(tl.int64)
    length = T
    if lengths is not None:
        length = tl.load(lengths + program // H).to(tl.int32)
    return Row(program, program // H, program % H, length)


@triton.jit
def softplus(x):
    # log1p(e) = 2 artanh(e / (2 + e)): for long half-lives e is small, and log(1 + e) would lose its digits
    e = tl.exp(-tl.abs(x))
    r = e / (2.0 + e)
    s = r * r
    series = 1.0 + s * (1.0 / 3 + s * (1.0 / 5 + s * (1.0 / 7 + s * (1.0 / 9 + s * (1.0 / 11 + s * (1.0 / 13))))))
    return at_least(x, 0.0) + 2.0 * r * series


@triton.jit
def unit(x):
    # squares of more than 1e19 leave float32; over its largest entry a spike has the same direction
    largest = tl.max(tl.abs(x), 0)
    scale = tl.where(largest > LARGEST_SQUARED, largest, 1.0)
    x = x / scale
    return x * (1.0 / tl.sqrt(tl.sum(x * x, 0) + 1e-6 / (scale * scale)))


@triton.jit
def convolved(x, tail, weight, o_x, m_d, WIDTH, raw):
    # SiLU of the causal convolution of one token, [BD], and its window [KP, BD]; channels `o_x` of WIDTH, the tail has
    # queries, keys and values side by side
    o_k = tl.arange(0, raw.KP)
    m_k = (o_k < raw.K - 1)[:, None] & m_d[None, :]
    b_window = tl.load(tail + o_k[:, None] * 3 * WIDTH + o_x[None, :], mask=m_k, other=0.0).to(tl.float32)
    b_x = tl.load(x + o_x, mask=m_d, other=0.0).to(tl.float32)
    b_window = tl.where((o_k == raw.K - 1)[:, None], b_x[None, :], b_window)
    m_w = (o_k < raw.K)[:, None] & m_d[None, :]
    b_weight = tl.load(weight + o_x[None, :] * raw.K + o_k[:, None], mask=m_w, other=0.0).to(tl.float32)
    b_y = tl.sum(b_window * b_weight, 0)
    return b_y * sigmoid(b_y), b_window


@triton.jit
def keep_window(tail, b_window, o_x, m_d, WIDTH, raw):
    # the next token's tail
    o_k = tl.arange(0, raw.KP)
    m_k = ((o_k >= 1) & (o_k < raw.K))[:, None] & m_d[None, :]
    tl.store(tail + (o_k - 1)[:, None] * 3 * WIDTH + o_x[None, :], b_window.to(tail.dtype.element_ty), mask=m_k)


@triton.jit
def rotated(b_x, x, tail, weight, raw, p_rotary, o_x, m_d, WIDTH, sizes):
    # the other half's channels are convolved again: they lie in other threads
    o_d = tl.arange(0, sizes.BD)
    first = o_d < sizes.D // 2
    b_cos = tl.load(raw.cos + p_rotary + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_sin = tl.load(raw.sin + p_rotary + o_d, mask=m_d, other=0.0).to(tl.float32) * tl.where(first, -1.0, 1.0)
    o_r = tl.where(first, o_x + sizes.D // 2, o_x - sizes.D // 2)
    b_other, _ = convolved(x, tail, weight, o_r, m_d, WIDTH, raw)
    return b_x * b_cos + b_other * b_sin


@triton.jit
def load_token(tokens, raw, token, row, head, p_rotary, WIDTH, sizes):
    # query, key and value of one token of one head, [BD], as they come or, with `raw`, from their projections on
    o_d = tl.arange(0, sizes.BD)
    m_d = o_d < sizes.D
    o_x = head * sizes.D + o_d
    q, k, v = tokens.q + token * WIDTH, tokens.k + token * WIDTH, tokens.v + token * WIDTH
    if raw is None:
        b_q = tl.load(q + o_x, mask=m_d, other=0.0).to(tl.float32)
        b_k = tl.load(k + o_x, mask=m_d, other=0.0).to(tl.float32)
        b_v = tl.load(v + o_x, mask=m_d, other=0.0).to(tl.float32)
    else:
        tail = raw.tail + row * (raw.K - 1) * 3 * WIDTH
        b_q, b_window_q = convolved(q, tail, raw.weights[0], o_x, m_d, WIDTH, raw)
        b_k, b_window_k = convolved(k, tail + WIDTH, raw.weights[1], o_x, m_d, WIDTH, raw)
        b_v, b_window_v = convolved(v, tail + 2 * WIDTH, raw.weights[2], o_x, m_d, WIDTH, raw)
        if raw.cos is not None:
            b_q = rotated(b_q, q, tail, raw.weights[0], raw, p_rotary, o_x, m_d, WIDTH, sizes)
            b_k = rotated(b_k, k, tail + WIDTH, raw.weights[1], raw, p_rotary, o_x, m_d, WIDTH, sizes)
        b_q, b_k = unit(b_q), unit(b_k)
        if raw.VALUE_SCALE > 0:
            b_v = unit(b_v) * raw.VALUE_SCALE
        # threads still read the old tail
        tl.debug_barrier()
        keep_window(tail, b_window_q, o_x, m_d, WIDTH, raw)
        keep_window(tail + WIDTH, b_window_k, o_x, m_d, WIDTH, raw)
        keep_window(tail + 2 * WIDTH, b_window_v, o_x, m_d, WIDTH, raw)
    return bounded(b_q, KEY_CAP), bounded(b_k, KEY_CAP), bounded(b_v, VALUE_CAP)


@triton.jit
def load_token_gates(tokens, raw, p_token, head, link, sizes):
    # step, log retention and threshold of one token, [BD]; `p_token` counts tokens and heads
    o_d = tl.arange(0, sizes.BD)
    m_d, o_g = o_d < sizes.D, gate_channels(sizes)
    b_eta = tl.load(tokens.eta + p_token * sizes.GATE_DIM + o_g, mask=m_d, other=0.0).to(tl.float32)
    b_log_alpha = tl.load(tokens.log_alpha + p_token * sizes.GATE_DIM + o_g, mask=m_d, other=0.0).to(tl.float32)
    b_delta = b_eta
    if sizes.DELTA_DIM == 1:
        b_delta = tl.load(tokens.delta + p_token + 0 * o_d, mask=m_d, other=0.0).to(tl.float32)
    elif sizes.DELTA_DIM > 1:
        b_delta = tl.load(tokens.delta + p_token * sizes.D + o_d, mask=m_d, other=0.0).to(tl.float32)
    if raw is not None:
        b_eta = tl.where(m_d, raw.eta_max * sigmoid(b_eta), 0.0)
        b_log_alpha = -softplus(b_log_alpha) * tl.exp(tl.load(raw.a_log + head).to(tl.float32))
        b_delta = softplus(b_delta) + 1e-4
    b_log_alpha = tl.where(m_d, at_most(at_least(b_log_alpha, link.min_log_alpha), 0.0), 0.0)
    return b_eta, b_log_alpha, b_delta


@triton.jit
def join_chunk(slots, b_eta, b_log_alpha, program, phase, sizes):
    # Takes the token's slot in its chunk's gates. Returns its `log_decay` and `keys`
    o_c, o_d = tl.arange(0, sizes.C), tl.arange(0, sizes.BD)
    m_d, o_g = o_d < sizes.D, gate_channels(sizes)
    m_g = m_d if sizes.GATE_DIM > 1 else m_d & (o_d == 0)
    p_slot = program * sizes.C * sizes.GATE_DIM
    m_e = (o_c < phase)[:, None] & m_d[None, :]
    p_e = p_slot + o_c[:, None] * sizes.GATE_DIM + o_g[None, :]
    b_log_decays = tl.load(slots.log_decay + p_e, mask=m_e, other=0.0)
    b_etas = tl.load(slots.eta + p_e, mask=m_e, other=0.0)
    p_own = p_slot + phase * sizes.GATE_DIM + o_g
    m_since = m_d & (0 * o_d + phase > 0)
    b_now = tl.load(slots.log_decay + p_own - sizes.GATE_DIM, mask=m_since, other=0.0) + b_log_alpha
    m_own = (o_c == phase)[:, None]
    b_log_decays = tl.where(m_own, b_now[None, :], b_log_decays)
    b_etas = tl.where(m_own, b_eta[None, :], b_etas)
    b_keys = tl.where((o_c <= phase)[:, None], b_etas * tl.exp(b_now[None, :] - b_log_decays), 0.0)
    # the slot is empty: no thread reads it
    tl.store(slots.eta + p_own, b_eta, mask=m_g)
    tl.store(slots.log_decay + p_own, b_now, mask=m_g)
    return b_now, b_keys


@triton.jit
def next_token(t, row, phase, tokens, raw, slots, T, H, ROTARY_TOKENS, link, sizes, STEP: tl.constexpr):
    # a row's t-th token, which has joined its chunk
    token = row.index * T + t
    p_rotary = (row.index * ROTARY_TOKENS + t) * sizes.D
    b_q, b_k, b_v = load_token(tokens, raw, token, row.index, row.head, p_rotary, H * sizes.D, sizes)
    b_eta, b_log_alpha, b_delta = load_token_gates(tokens, raw, token * H + row.head, row.head, link, sizes)
    if STEP > 0:
        b_eta = tl.sum(bounded_steps(b_eta[None, :], b_k[None, :], STEP), 0)
    b_log_decay, b_keys = join_chunk(slots, b_eta, b_log_alpha, row.program, phase, sizes)
    return Token(b_q, b_k, b_v, b_delta, b_log_decay, b_keys)


@triton.jit
def taken_slots(slots, own, phase, sizes):
    # of a chunk, [C, BD], and a token's own, which is put there and not read back
    o_c, o_d = tl.arange(0, sizes.C), tl.arange(0, sizes.BD)
    m_d = o_d < sizes.D
    tl.store(slots + phase * sizes.D + o_d, own, mask=m_d)
    m_cd = (o_c < phase)[:, None] & m_d[None, :]
    b_slots = tl.load(slots + o_c[:, None] * sizes.D + o_d[None, :], mask=m_cd, other=0.0)
    return tl.where((o_c == phase)[:, None], own[None, :], b_slots)


@triton.jit
def load_chunk_gates(slots, row, b_now, sizes):
    # of a chunk that is full: what a slot is folded with, [C, BD], and the chunk's whole decay, [BD]
    o_c, o_d = tl.arange(0, sizes.C), tl.arange(0, sizes.BD)
    m_cd = (o_c >= 0)[:, None] & (o_d < sizes.D)[None, :]
    p_cg = row.program * sizes.C * sizes.GATE_DIM + o_c[:, None] * sizes.GATE_DIM + gate_channels(sizes)[None, :]
    b_etas = tl.load(slots.eta + p_cg, mask=m_cd, other=0.0)
    b_log_decays = tl.load(slots.log_decay + p_cg, mask=m_cd, other=0.0)
    _, _, _, b_fold, b_total = chunk_gates(b_etas, b_log_decays, b_now)
    return b_fold, b_total


@triton.jit
def empty_slots(x, C: tl.constexpr, WIDTH: tl.constexpr, BW: tl.constexpr):
    o_c, o_w = tl.arange(0, C), tl.arange(0, BW)
    m_cw = (o_c >= 0)[:, None] & (o_w < WIDTH)[None, :]
    tl.store(x + o_c[:, None] * WIDTH + o_w[None, :], tl.zeros([C, BW], dtype=tl.float32), mask=m_cw)


@triton.jit
def empty_chunk(gradients, slots, row, sizes):
    # of slots: the last weight's gradients, the gates
    BG: tl.constexpr = sizes.BD if sizes.GATE_DIM > 1 else 1
    gates = row.program * sizes.C * sizes.GATE_DIM
    empty_slots(gradients, sizes.C, sizes.D, sizes.BD)
    empty_slots(slots.eta + gates, sizes.C, sizes.GATE_DIM, BG)
    empty_slots(slots.log_decay + gates, sizes.C, sizes.GATE_DIM, BG)


@triton.jit
def after_token(b_state, phase, dual, inputs, gradients, slots, row, b_now, sizes):
    # a matrix memory's state and its row's phase behind one more token: what waits in the slots of a chunk that is full is
    # folded into the state, which is written to `dual`, and the slots are empty again
    phase += 1
    if phase == sizes.C:
        o_c, o_d = tl.arange(0, sizes.C), tl.arange(0, sizes.BD)
        m_d = o_d < sizes.D
        o_cd, m_cd = o_c[:, None] * sizes.D + o_d[None, :], (o_c >= 0)[:, None] & m_d[None, :]
        b_fold, b_total = load_chunk_gates(slots, row, b_now, sizes)
        b_into = tl.trans(tl.load(inputs + o_cd, mask=m_cd, other=0.0) * b_fold)
        b_out = tl.load(gradients + o_cd, mask=m_cd, other=0.0)
        b_state = b_state * b_total[:, None] - product(b_into, b_out, sizes.PRECISION)
        tl.store(dual + o_d[:, None] * sizes.D + o_d[None, :], b_state, mask=m_d[:, None] & m_d[None, :])
        tl.debug_barrier()
        empty_slots(inputs, sizes.C, sizes.D, sizes.BD)
        empty_chunk(gradients, slots, row, sizes)
        phase = 0
        tl.debug_barrier()
    return b_state, phase
