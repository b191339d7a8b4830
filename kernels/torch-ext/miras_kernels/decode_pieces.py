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

import triton
import triton.language as tl

from .pieces import KEY_CAP, VALUE_CAP, at_least, at_most, bounded, sigmoid


LARGEST_SQUARED = tl.constexpr(1e8)  # as in mixer_ops.py of the models


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
def convolved(x, tail, weight, o_x, m_d, WIDTH, K: tl.constexpr, KP: tl.constexpr):
    # SiLU of the causal convolution of one token, [BD], and its window [KP, BD]; channels `o_x` of WIDTH, the tail has
    # queries, keys and values side by side
    o_k = tl.arange(0, KP)
    m_k = (o_k < K - 1)[:, None] & m_d[None, :]
    b_window = tl.load(tail + o_k[:, None] * 3 * WIDTH + o_x[None, :], mask=m_k, other=0.0).to(tl.float32)
    b_x = tl.load(x + o_x, mask=m_d, other=0.0).to(tl.float32)
    b_window = tl.where((o_k == K - 1)[:, None], b_x[None, :], b_window)
    m_w = (o_k < K)[:, None] & m_d[None, :]
    b_weight = tl.load(weight + o_x[None, :] * K + o_k[:, None], mask=m_w, other=0.0).to(tl.float32)
    b_y = tl.sum(b_window * b_weight, 0)
    return b_y * sigmoid(b_y), b_window


@triton.jit
def keep_window(tail, b_window, o_x, m_d, WIDTH, K: tl.constexpr, KP: tl.constexpr):
    # the next token's tail
    o_k = tl.arange(0, KP)
    m_k = ((o_k >= 1) & (o_k < K))[:, None] & m_d[None, :]
    tl.store(tail + (o_k - 1)[:, None] * 3 * WIDTH + o_x[None, :], b_window.to(tail.dtype.element_ty), mask=m_k)


@triton.jit
def load_token(
    q,
    k,
    v,
    tail,
    weight_q,
    weight_k,
    weight_v,
    cos,
    sin,
    token,
    row,
    head,
    p_rotary,
    WIDTH,
    D: tl.constexpr,
    BD: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    ROTARY: tl.constexpr,
    VALUE_SCALE: tl.constexpr,
):
    # query, key and value of one token of one head, [BD]; K = 0: they come as they are, else as their projections
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    o_x = head * D + o_d
    if K == 0:
        b_q = tl.load(q + token * WIDTH + o_x, mask=m_d, other=0.0).to(tl.float32)
        b_k = tl.load(k + token * WIDTH + o_x, mask=m_d, other=0.0).to(tl.float32)
        b_v = tl.load(v + token * WIDTH + o_x, mask=m_d, other=0.0).to(tl.float32)
    else:
        tail += row * (K - 1) * 3 * WIDTH
        q += token * WIDTH
        k += token * WIDTH
        v += token * WIDTH
        b_q, b_window_q = convolved(q, tail, weight_q, o_x, m_d, WIDTH, K, KP)
        b_k, b_window_k = convolved(k, tail + WIDTH, weight_k, o_x, m_d, WIDTH, K, KP)
        b_v, b_window_v = convolved(v, tail + 2 * WIDTH, weight_v, o_x, m_d, WIDTH, K, KP)
        if ROTARY:
            # the other half's channels are convolved again: they lie in other threads
            o_r = tl.where(o_d < D // 2, o_d + D // 2, o_d - D // 2)
            b_turn = tl.where(o_d < D // 2, -1.0, 1.0)
            b_cos = tl.load(cos + p_rotary + o_d, mask=m_d, other=0.0).to(tl.float32)
            b_sin = tl.load(sin + p_rotary + o_d, mask=m_d, other=0.0).to(tl.float32) * b_turn
            b_other, _ = convolved(q, tail, weight_q, head * D + o_r, m_d, WIDTH, K, KP)
            b_q = b_q * b_cos + b_other * b_sin
            b_other, _ = convolved(k, tail + WIDTH, weight_k, head * D + o_r, m_d, WIDTH, K, KP)
            b_k = b_k * b_cos + b_other * b_sin
        b_q, b_k = unit(b_q), unit(b_k)
        if VALUE_SCALE > 0:
            b_v = unit(b_v) * VALUE_SCALE
        # threads still read the old tail
        tl.debug_barrier()
        keep_window(tail, b_window_q, o_x, m_d, WIDTH, K, KP)
        keep_window(tail + WIDTH, b_window_k, o_x, m_d, WIDTH, K, KP)
        keep_window(tail + 2 * WIDTH, b_window_v, o_x, m_d, WIDTH, K, KP)
    return bounded(b_q, KEY_CAP), bounded(b_k, KEY_CAP), bounded(b_v, VALUE_CAP)


@triton.jit
def load_token_gates(
    eta,
    log_alpha,
    delta,
    a_log,
    p_token,
    head,
    ETA_MAX,
    MIN_LOG_ALPHA,
    D: tl.constexpr,
    BD: tl.constexpr,
    GATE_DIM: tl.constexpr,
    DELTA_DIM: tl.constexpr,
    RAW: tl.constexpr,
):
    # step, log retention and threshold of one token, [BD]; `p_token` counts tokens and heads; RAW: before activations
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    o_g = 0 * o_d
    if GATE_DIM > 1:
        o_g = o_d
    b_eta = tl.load(eta + p_token * GATE_DIM + o_g, mask=m_d, other=0.0).to(tl.float32)
    b_log_alpha = tl.load(log_alpha + p_token * GATE_DIM + o_g, mask=m_d, other=0.0).to(tl.float32)
    b_delta = b_eta
    if DELTA_DIM == 1:
        b_delta = tl.load(delta + p_token + 0 * o_d, mask=m_d, other=0.0).to(tl.float32)
    elif DELTA_DIM > 1:
        b_delta = tl.load(delta + p_token * D + o_d, mask=m_d, other=0.0).to(tl.float32)
    if RAW:
        b_eta = tl.where(m_d, ETA_MAX * sigmoid(b_eta), 0.0)
        b_log_alpha = -softplus(b_log_alpha) * tl.exp(tl.load(a_log + head).to(tl.float32))
        b_delta = softplus(b_delta) + 1e-4
    b_log_alpha = tl.where(m_d, at_most(at_least(b_log_alpha, MIN_LOG_ALPHA), 0.0), 0.0)
    return b_eta, b_log_alpha, b_delta


@triton.jit
def join_chunk(
    etas,
    log_decays,
    b_eta,
    b_log_alpha,
    program,
    phase,
    C: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    GATE_DIM: tl.constexpr,
):
    # Takes the token's slot in its chunk's gates. Returns the token's log decay since the chunk's start, [BD], and for
    # the chunk's slots, the token's included, eta_i B_t / B_i, [C, BD], zero in those still empty
    o_c, o_d = tl.arange(0, C), tl.arange(0, BD)
    m_d = o_d < D
    o_g = 0 * o_d
    m_g = m_d & (o_d == 0)
    if GATE_DIM > 1:
        o_g = o_d
        m_g = m_d
    p_slot = program * C * GATE_DIM
    m_e = (o_c < phase)[:, None] & m_d[None, :]
    p_e = p_slot + o_c[:, None] * GATE_DIM + o_g[None, :]
    b_log_decays = tl.load(log_decays + p_e, mask=m_e, other=0.0)
    b_etas = tl.load(etas + p_e, mask=m_e, other=0.0)
    m_since = m_d & (0 * o_d + phase > 0)
    b_now = tl.load(log_decays + p_slot + (phase - 1) * GATE_DIM + o_g, mask=m_since, other=0.0) + b_log_alpha
    m_own = (o_c == phase)[:, None]
    b_log_decays = tl.where(m_own, b_now[None, :], b_log_decays)
    b_etas = tl.where(m_own, b_eta[None, :], b_etas)
    b_keys = tl.where((o_c <= phase)[:, None], b_etas * tl.exp(b_now[None, :] - b_log_decays), 0.0)
    # the slot is empty: no thread reads it
    tl.store(etas + p_slot + phase * GATE_DIM + o_g, b_eta, mask=m_g)
    tl.store(log_decays + p_slot + phase * GATE_DIM + o_g, b_now, mask=m_g)
    return b_now, b_keys


@triton.jit
def load_chunk_gates(
    etas, log_decays, program, C: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, GATE_DIM: tl.constexpr
):
    # of a chunk that is full, [C, BD]
    o_c, o_d = tl.arange(0, C), tl.arange(0, BD)
    o_g = 0 * o_d
    if GATE_DIM > 1:
        o_g = o_d
    m_cd = (o_c >= 0)[:, None] & (o_d < D)[None, :]
    p_cg = program * C * GATE_DIM + o_c[:, None] * GATE_DIM + o_g[None, :]
    return tl.load(etas + p_cg, mask=m_cd, other=0.0), tl.load(log_decays + p_cg, mask=m_cd, other=0.0)


@triton.jit
def empty_slots(x, program, C: tl.constexpr, WIDTH: tl.constexpr, BW: tl.constexpr):
    o_c, o_w = tl.arange(0, C), tl.arange(0, BW)
    m_cw = (o_c >= 0)[:, None] & (o_w < WIDTH)[None, :]
    b_zeros = tl.zeros([C, BW], dtype=tl.float32)
    tl.store(x + program * C * WIDTH + o_c[:, None] * WIDTH + o_w[None, :], b_zeros, mask=m_cw)
