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
"""Where a program's row and a chunk's slots are, what is loaded of them, and what of a begun chunk is kept."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .layers import within
from .pieces import (
    HUBER_COORDINATE,
    VALUE_CAP,
    at_least,
    at_most,
    bounded,
    gate_channels,
    normalise,
    residual,
    residual_vjp,
)


class Place(NamedTuple):
    """The row and head of a program, and the row's chunks: `taken` slots of the last are filled, 0 if it is full."""

    program: Any
    row: Any
    head: Any
    start: Any
    length: Any
    phase: Any
    chunks: Any
    taken: Any


class Chunk(NamedTuple):
    """Offsets and masks of a chunk's C slots: of the call's tokens, t, and of those that the state has filled, e."""

    o_t: Any
    m_t: Any
    p_td: Any
    m_td: Any
    p_e: Any
    m_e: Any
    m_ed: Any


@triton.jit
def place_of(rows, H, sizes):
    program = tl.program_id(0).to(tl.int64)
    row, head = program // H, program % H
    start = tl.load(rows.starts + row).to(tl.int64)
    length = tl.load(rows.lengths + row).to(tl.int32)
    phase = 0
    if rows.phases is not None:
        phase = tl.load(rows.phases + row).to(tl.int32)
    return Place(
        program, row, head, start, length, phase, tl.cdiv(phase + length, sizes.C), (phase + length) % sizes.C
    )


@triton.jit
def slot_of(saved, nth, place, H, sizes):
    # where the state at a chunk's start is saved
    slot = (tl.load(saved.of_row + place.row) + nth) * H + place.head
    return slot.to(tl.int64) * sizes.D * sizes.N


@triton.jit
def chunk_of(i_c, place, H, sizes):
    o_c, o_d = tl.arange(0, sizes.C), tl.arange(0, sizes.BD)
    m_d = o_d < sizes.D
    o_t = o_c + i_c * sizes.C - place.phase
    m_t = (o_t >= 0) & (o_t < place.length)
    o_t = ((place.start + o_t) * H + place.head).to(tl.int64)
    p_e = place.program * sizes.C * sizes.D + o_c[:, None] * sizes.D + o_d[None, :]
    m_e = o_c < tl.where(i_c == 0, place.phase, 0)
    return Chunk(
        o_t,
        m_t,
        o_t[:, None] * sizes.D + o_d[None, :],
        m_t[:, None] & m_d[None, :],
        p_e,
        m_e,
        m_e[:, None] & m_d[None, :],
    )


@triton.jit
def ends_before(slot, at, sizes):
    # the same chunk without the tokens from a slot on
    m_t = at.m_t & (tl.arange(0, sizes.C) < slot)
    m_td = m_t[:, None] & (tl.arange(0, sizes.BD) < sizes.D)[None, :]
    return Chunk(at.o_t, m_t, at.p_td, m_td, at.p_e, at.m_e, at.m_ed)


@triton.jit
def load_rows(x, at):
    return tl.load(x + at.p_td, mask=at.m_td, other=0.0).to(tl.float32)


@triton.jit
def behind(x, partial_in, at):
    # with the rows of slots that an earlier call has filled
    return tl.where(at.m_e[:, None], tl.load(partial_in + at.p_e, mask=at.m_ed, other=0.0), x)


@triton.jit
def load_delta(tokens, at, b_error, sizes):
    if sizes.DELTA_DIM == 0:
        return b_error
    elif sizes.DELTA_DIM == 1:
        return tl.load(tokens.delta + at.o_t, mask=at.m_t, other=0.0).to(tl.float32)[:, None]
    else:
        return load_rows(tokens.delta, at)


@triton.jit
def residual_of(b_error, tokens, at, loss, sizes):
    b_delta = load_delta(tokens, at, b_error, sizes)
    return residual(b_error, b_delta, tl.arange(0, sizes.BD) < sizes.D, loss)


@triton.jit
def first_broken(b_k, tokens, at, sizes):
    # the slot of the chunk's first token whose write is not a number, C if there is none. A chunk's products multiply
    # what later tokens write by zero, which a NaN survives: earlier tokens are read as if the chunk ended before it
    b_v = load_rows(tokens.v, at)
    broken = (b_k != b_k) | (b_v != b_v)
    if sizes.GATE_DIM == 1:
        b_eta = tl.load(tokens.eta + at.o_t, mask=at.m_t, other=0.0)[:, None]
        b_log_alpha = tl.load(tokens.log_alpha + at.o_t, mask=at.m_t, other=0.0)[:, None]
    else:
        b_eta, b_log_alpha = load_rows(tokens.eta, at), load_rows(tokens.log_alpha, at)
    # an infinite step is no better, the others are bounded
    broken = broken | (b_log_alpha != b_log_alpha) | (b_eta - b_eta != 0.0)
    if sizes.DELTA_DIM > 0:
        b_delta = load_delta(tokens, at, b_eta, sizes)
        broken = broken | (b_delta != b_delta)
    o_c = tl.arange(0, sizes.C)
    return tl.min(tl.where(broken, o_c[:, None], 0 * o_c[:, None] + sizes.C))


@triton.jit
def store_broken(y, broken, at, sizes):
    if broken < sizes.C:
        b_nan = tl.full([sizes.C, sizes.BD], float("nan"), tl.float32)
        m_broken = at.m_td & (tl.arange(0, sizes.C) >= broken)[:, None]
        tl.store(y + at.p_td, b_nan.to(y.dtype.element_ty), mask=m_broken)


@triton.jit
def load_gates(tokens, partial_in, at, place, link, sizes):
    # steps and log decay since the chunk's start of its slots, [C, BD], and the whole chunk's log decay, [BD]
    o_c, o_g = tl.arange(0, sizes.C), gate_channels(sizes)
    m_d = tl.arange(0, sizes.BD) < sizes.D
    p_g = at.o_t[:, None] * sizes.GATE_DIM + o_g[None, :]
    b_eta = tl.load(tokens.eta + p_g, mask=at.m_td, other=0.0).to(tl.float32)
    b_log_alpha = tl.load(tokens.log_alpha + p_g, mask=at.m_td, other=0.0).to(tl.float32)
    b_log_alpha = at_most(at_least(b_log_alpha, link.min_log_alpha), 0.0)
    total = tl.sum(b_log_alpha, 0)
    b_log_decay = tl.cumsum(b_log_alpha, 0)
    if partial_in is not None:
        # the chunk was begun before this call: its first slots come from the state
        m_g = at.m_e[:, None] & m_d[None, :]
        p_g = place.program * sizes.C * sizes.GATE_DIM + o_c[:, None] * sizes.GATE_DIM + o_g[None, :]
        b_since = tl.load(partial_in.log_decay + p_g, mask=m_g, other=0.0)
        last = at.m_e[:, None] & (o_c == place.phase - 1)[:, None]
        since = tl.sum(tl.where(last, b_since, 0.0), 0)
        b_log_decay = tl.where(at.m_e[:, None], b_since, b_log_decay + since[None, :])
        total += since
        b_eta = tl.where(at.m_e[:, None], tl.load(partial_in.eta + p_g, mask=m_g, other=0.0), b_eta)
    return b_eta, b_log_decay, total


@triton.jit
def keep_slots(partial_out, b_inputs, b_gradients, b_eta, b_log_decay, broken, at, place, sizes):
    # of the last chunk, which is not full: the inputs of its first weight, the gradients of its last, its gates
    o_c, o_d = tl.arange(0, sizes.C), tl.arange(0, sizes.BD)
    m_f = (o_c < place.taken)[:, None] & (o_d < sizes.D)[None, :]
    if sizes.FIXED == 0:
        tl.store(partial_out.inputs[0] + at.p_e, b_inputs, mask=m_f)
    tl.store(partial_out.gradients[-1] + at.p_e, b_gradients, mask=m_f)
    p_g = place.program * sizes.C * sizes.GATE_DIM + o_c[:, None] * sizes.GATE_DIM + o_d[None, :]
    if sizes.GATE_DIM == 1:
        m_f = m_f & (o_d == 0)[None, :]
    tl.store(partial_out.eta + p_g, b_eta, mask=m_f)
    # the decay up to now stands in everything that is read from here on
    b_log_decay = tl.where((o_c >= broken)[:, None], float("nan"), b_log_decay)
    tl.store(partial_out.log_decay + p_g, b_log_decay, mask=m_f)


@triton.jit
def error_of_write(b_z2, b_k, b_gamma, b_beta, tokens, at, norm, loss, sizes):
    # of an MLP memory's write: the layer norm of its second product without the affine, 1/std, the error, the residual
    m_d = within(tl.arange(0, sizes.BD), sizes.D, sizes.D == sizes.BD)
    b_normed, inverse_std = normalise(b_z2, m_d, sizes.D, norm.EPS)
    b_error = b_k + (b_beta[None, :] + b_normed * b_gamma[None, :]) - bounded(load_rows(tokens.v, at), VALUE_CAP)
    return b_normed, inverse_std, b_error, residual_of(b_error, tokens, at, loss, sizes)


# -- adjoints ---------------------------------------------------------------------------------------------------------


@triton.jit
def residual_vjp_of(b_error, bar, tokens, at, loss, sizes):
    b_delta = load_delta(tokens, at, b_error, sizes)
    return residual_vjp(b_error, b_delta, bar, tl.arange(0, sizes.BD) < sizes.D, loss)


@triton.jit
def store_delta_bar(b_delta_bar, bars, at, loss, sizes):
    if sizes.DELTA_DIM == 1:
        b_bar = tl.sum(tl.where((tl.arange(0, sizes.BD) < sizes.D)[None, :], b_delta_bar, 0.0), 1)
        if loss.KIND != HUBER_COORDINATE:
            b_bar = b_bar / sizes.D  # the loss has one threshold a head, and its adjoint stands in every channel
        tl.store(bars.delta + at.o_t, b_bar, mask=at.m_t)
    elif sizes.DELTA_DIM > 1:
        tl.store(bars.delta + at.p_td, b_delta_bar, mask=at.m_td)


@triton.jit
def store_gate_bars(
    b_query_bar, b_key_bar, half_bar, gates, tokens, bars, partial_in_bar, partial_out_bar, at, m_f, place, link, sizes
):
    # from the adjoints of what `chunk_gates` makes its gates of, Gq and Gk [C, BD] and `half`, the root of B_C [BD], to
    # those of the tokens' gates, and of a begun chunk's in both states
    b_gq, b_gk, half = gates
    C: tl.constexpr = sizes.C
    GATE_DIM: tl.constexpr = sizes.GATE_DIM
    o_c, o_d = tl.arange(0, C), tl.arange(0, sizes.BD)
    m_d = o_d < sizes.D
    b_eta_bar = tl.where(m_d[None, :], b_key_bar / b_gq, 0.0)
    b_log_decay_bar = tl.where(m_d[None, :], b_query_bar * b_gq - b_key_bar * b_gk, 0.0)
    # the chunk's last slot decides its reference and its whole decay; slots without a token decay by nothing
    reference_bar = tl.where(m_d, half_bar * half - tl.sum(b_log_decay_bar, 0), 0.0)
    b_log_decay_bar += tl.where((o_c == C - 1)[:, None], 0.5 * reference_bar[None, :], 0.0)
    # one number for all channels is given to the first of them: sums are taken in the end
    o_g, m_g = o_d, m_d
    if GATE_DIM == 1:
        o_g, m_g = 0 * o_d, o_d == 0
    p_e = place.program * C * GATE_DIM
    p_g = p_e + o_c[:, None] * GATE_DIM + o_g[None, :]
    if partial_out_bar is not None:
        m_fg = m_f[:, None] & m_g[None, :]
        b_eta_bar += tl.load(partial_out_bar.eta + p_g, mask=m_fg, other=0.0)
        b_log_decay_bar += tl.load(partial_out_bar.log_decay + p_g, mask=m_fg, other=0.0)
    # log B_t is a sum over the tokens up to t: its adjoint one over those from t on
    b_log_alpha_bar = tl.sum(b_log_decay_bar, 0)[None, :] - tl.cumsum(b_log_decay_bar, 0) + b_log_decay_bar
    if partial_in_bar is not None:
        # the decay before this call stands in every later slot of the chunk
        later = tl.sum(tl.where(at.m_e[:, None], 0.0, b_log_decay_bar), 0)
        b_since_bar = b_log_decay_bar + tl.where((o_c == place.phase - 1)[:, None], later[None, :], 0.0)
        if GATE_DIM == 1:
            tl.store(partial_in_bar.eta + p_e + o_c, tl.sum(b_eta_bar, 1), mask=at.m_e)
            tl.store(partial_in_bar.log_decay + p_e + o_c, tl.sum(b_since_bar, 1), mask=at.m_e)
        else:
            tl.store(partial_in_bar.eta + p_g, b_eta_bar, mask=at.m_e[:, None] & m_g[None, :])
            tl.store(partial_in_bar.log_decay + p_g, b_since_bar, mask=at.m_e[:, None] & m_g[None, :])
    if GATE_DIM == 1:
        b_raw = tl.load(tokens.log_alpha + at.o_t, mask=at.m_t, other=0.0).to(tl.float32)
        b_bar = tl.where((b_raw < link.min_log_alpha) | (b_raw > 0.0), 0.0, tl.sum(b_log_alpha_bar, 1))
        tl.store(bars.eta + at.o_t, tl.sum(b_eta_bar, 1), mask=at.m_t)
        tl.store(bars.log_alpha + at.o_t, b_bar, mask=at.m_t)
    else:
        m_tg = at.m_t[:, None] & m_g[None, :]
        b_raw = tl.load(tokens.log_alpha + at.p_td, mask=m_tg, other=0.0).to(tl.float32)
        b_bar = tl.where((b_raw < link.min_log_alpha) | (b_raw > 0.0), 0.0, b_log_alpha_bar)
        tl.store(bars.eta + at.p_td, b_eta_bar, mask=m_tg)
        tl.store(bars.log_alpha + at.p_td, b_bar, mask=m_tg)
