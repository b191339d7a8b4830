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
"""The adjoint of a group of chunks: the backward pass of the chunk-parallel form, in matrix products.

Autograd of `chunk_miras` is right and slow: some three hundred small operations a chunk, each with a node and a saved
tensor. Here the backward pass is written out. A group of a short sequence keeps what its adjoint reads; one of a long
sequence keeps the states before it, and nothing else, and its adjoint runs the group's writes once more. Then it goes
back chunk by chunk. `x_bar` is the adjoint of x, the gradient of the outer loss with respect to it. Names are those of
`architecture.py` and `learning.py`; products are per head.

What goes back to what is derived in `kernels/README.md`, "The backward pass"; kernels and this file are two forms of it.
The reads of a chunk feed nobody but the output, and the state's adjoint comes from the next chunk's, so a chunk goes back
in the order read, fold, write, link: `adjoints/learning.py` has the first two, `adjoints/architecture.py` the write, in
which the derivatives of second order are met, `adjoints/retention.py` the link, and `adjoints/cell.py` puts them together.

Links other than the identity and losses have derivatives of their own, all of them in `adjoints/`. A bias or a retention
gate without is differentiated by autograd, on its own, inside this backward pass; with an architecture or an algorithm
without, the whole group is, recomputed by `torch.utils.checkpoint`. So are, in training only, chunks that an
earlier call has begun (`partial_in`) or that a later one ends (`partial_out`), and everything under `torch.compile`, which
fuses what is slow in eager mode. Under `create_graph`, for second derivatives, the group is differentiated by autograd;
inside transforms of `torch.func`, forward mode and traces the whole call is.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import adjoints  # noqa: F401 - it registers the derivatives
from .architecture import Factors
from .inputs import MemoryInputs, bound_inputs, hold_broken
from .layout import merge_chunks
from .learning import Gates, split_gates
from .retention import ChunkWeights
from .rule import MirasRule
from .vjp import added, bound_adjoint, differentiable_vjp, find_derivative, with_vjp


def has_adjoint(rule: MirasRule) -> bool:
    """Whether architecture and algorithm have derivatives; bias and retention gate do without."""
    architecture, algorithm = rule.architecture, rule.algorithm
    if algorithm.gradient_at != "chunk":
        return False
    methods = architecture.read, architecture.write, algorithm.chunk_gates, algorithm.read, algorithm.fold
    return all(find_derivative(method) is not None for method in methods)


class ProcessGroup(torch.autograd.Function):
    """Processes a group of chunks, keeping the state before it only, or all that its adjoint needs.

    Called as `apply(process, rule, sizes, keep, *inputs, *states, *base, *norm)`: `process` maps the last four to the outputs
    and the states after the group, `sizes` are the rows of every step, `keep` is whether the adjoint is to find the
    group's activations instead of computing them again.
    """

    @staticmethod
    def forward(ctx, process: Callable, rule: MirasRule, sizes: list[int], keep: bool, *tensors: Tensor | None):
        ctx.process, ctx.rule, ctx.sizes = process, rule, sizes
        ctx.set_materialize_grads(False)
        # the activations hang on a saved tensor, so that hooks on saved tensors meet them: activation checkpointing
        # and offloading put another tensor in its place, and what hung on this one is freed
        holder = torch.empty(0)
        if keep:
            y, states, vars(holder)["tape"] = _run(rule, sizes, *_parted(rule, tensors), reads=True)
        else:
            y, states = process(*_parted(rule, tensors))
        ctx.save_for_backward(*tensors, holder)
        return y, *states

    @staticmethod
    def backward(ctx, y_bar: Tensor | None, *state_bars: Tensor | None):
        *tensors, holder = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (
                None,
                None,
                None,
                None,
                *_differentiable_adjoint(ctx.process, ctx.rule, tensors, (y_bar, *state_bars)),
            )
        x, states, base, norm = _parted(ctx.rule, tensors)
        if y_bar is None:
            y_bar = torch.zeros_like(merge_chunks(x.q))
        with torch.autocast(y_bar.device.type, enabled=False):  # some call backward inside it
            # taken away: the adjoint frees it chunk by chunk, and a second one computes it again
            tape = vars(holder).pop("tape", None)
            if tape is None:
                _, _, tape = _run(ctx.rule, ctx.sizes, x, states, base, norm, reads=False)
            bars = _group_adjoint(ctx.rule, ctx.sizes, tape, x, states, base, norm, y_bar, state_bars)
        return None, None, None, None, *bars


def _differentiable_adjoint(process: Callable, rule: MirasRule, tensors, bars) -> tuple[Tensor | None, ...]:
    """The group's adjoint under `create_graph`."""

    def group(*tensors: Tensor | None) -> tuple[Tensor, ...]:
        y, states = process(*_parted(rule, tensors))
        return y, *states

    device = next(bar for bar in bars if bar is not None).device.type
    with torch.autocast(device, enabled=False):
        return differentiable_vjp(group, tensors, bars)


def _parted(rule: MirasRule, tensors):
    fields, layers = len(MemoryInputs._fields), len(rule.written_axes)
    x, rest = MemoryInputs(*tensors[:fields]), tensors[fields:]
    return x, rest[:layers], rest[layers : 2 * layers], rest[2 * layers :]


class _Chunk(NamedTuple):
    """What the adjoint of a chunk needs of its forward."""

    states: tuple[Tensor, ...]
    weights: tuple[ChunkWeights, ...]
    factors: tuple[Factors, ...]
    weights_vjp: Callable
    write_vjp: Callable
    read_vjp: Callable | None  # None: the chunk is to be read once more


class _Tape(NamedTuple):
    """What the adjoint of a group needs of its forward."""

    x: MemoryInputs  # within the rule's bounds, chunk after chunk
    uncut: list[Tensor | None]  # where q, k, v and log alpha were so before; None: everywhere
    gates: list[Gates]
    gates_vjp: Callable
    chunks: list[_Chunk]


def _run(rule: MirasRule, sizes: list[int], x: MemoryInputs, states, base, norm, *, reads: bool):
    """A group's forward with its tape: outputs, states after the group, tape; the writes alone unless `reads`."""
    unbounded = x.map(merge_chunks)
    x = bound_inputs(unbounded, rule)
    uncut = [None if b is u else b == u for b, u in zip(_bounded(x), _bounded(unbounded), strict=True)]
    x, broken = hold_broken(x)
    all_gates, gates_vjp = with_vjp(rule.chunk_gates, x.eta, x.log_alpha.cumsum(-2))
    if broken is not None:
        all_gates = all_gates.broken_from(broken)
    gates = split_gates(all_gates, sizes)
    q, k, v = (t.split(sizes) for t in (x.q, x.k, x.v))
    delta = [None] * len(sizes) if x.delta is None else x.delta.split(sizes)

    chunks, outputs = [], []
    for i, rows in enumerate(sizes):
        states, base_here, norm_here = (_first_rows(rows, of_kind) for of_kind in (states, base, norm))
        weights, weights_vjp = with_vjp(rule.weights, states, base_here)
        factors, write_vjp = with_vjp(rule.write, weights, k[i], v[i], delta[i], norm_here)
        y, read_vjp = with_vjp(rule.read, weights, factors, q[i], gates[i], norm_here) if reads else (None, None)
        outputs.append(y)
        chunks.append(_Chunk(states, weights, factors, weights_vjp, write_vjp, read_vjp))
        if reads or i + 1 < len(sizes):
            states = rule.fold(states, factors, gates[i])
    return torch.cat(outputs) if reads else None, states, _Tape(x, uncut, gates, gates_vjp, chunks)


def _bounded(x: MemoryInputs) -> tuple[Tensor, ...]:
    """The inputs that `bound_inputs` may change."""
    return x.q, x.k, x.v, x.log_alpha


def _group_adjoint(
    rule: MirasRule, sizes: list[int], tape: _Tape, pieces: MemoryInputs, states, base, norm, y_bar, state_bars
):
    x, uncut, gates, gates_vjp, chunks = tape
    q, y_bars = (t.split(sizes) for t in (x.q, y_bar))
    total = states[0].shape[0]

    base_bars = [None if b is None else torch.zeros_like(b) for b in base]
    norm_bars = [torch.zeros_like(p) for p in norm]
    bars_of_step = []
    for i in reversed(range(len(sizes))):
        rows, chunk = sizes[i], chunks.pop()
        read_vjp = chunk.read_vjp
        if read_vjp is None:
            _, read_vjp = with_vjp(rule.read, chunk.weights, chunk.factors, q[i], gates[i], _first_rows(rows, norm))
        weights_bar, factors_bar, q_bar, gates_bar, norm_by_read = read_vjp(y_bars[i])

        state_bars = tuple(None if bar is None else _with_ended_rows(bound_adjoint(bar), rows) for bar in state_bars)
        _, fold_vjp = with_vjp(rule.fold, chunk.states, chunk.factors, gates[i])
        state_bars, factors_by_fold, gates_by_fold = fold_vjp(state_bars)
        gates_bar = added(gates_bar, gates_by_fold)

        factors_bar = added(factors_bar, factors_by_fold)
        weights_by_write, k_bar, v_bar, delta_bar, norm_by_write = chunk.write_vjp(factors_bar)

        states_by_weights, base_bar = chunk.weights_vjp(added(weights_bar, weights_by_write))
        state_bars = added(state_bars, states_by_weights)
        of_chunk = (*base_bar, *norm_by_read, *norm_by_write)
        for sum_so_far, bar in zip(_first_rows(rows, (*base_bars, *norm_bars, *norm_bars)), of_chunk, strict=True):
            if bar is not None:
                sum_so_far.add_(bar)
        bars_of_step.append((q_bar, k_bar, v_bar, delta_bar, gates_bar))

    bars_of_step.reverse()
    q_bar, k_bar, v_bar, delta_bar, gates_bars = zip(*bars_of_step, strict=True)
    gates_bar = Gates(
        *(_joined(*field) for field in zip(zip(*gates_bars, strict=True), zip(*gates, strict=True), strict=True))
    )
    eta_bar, log_decay_bar = gates_vjp(gates_bar)
    delta_bar = None if x.delta is None else _joined(delta_bar, x.delta.split(sizes))
    log_alpha_bar = log_decay_bar.flip(-2).cumsum(-2).flip(-2)
    bars = torch.cat(q_bar), torch.cat(k_bar), torch.cat(v_bar), log_alpha_bar
    # what was cut has no gradient
    q_bar, k_bar, v_bar, log_alpha_bar = (
        bar if where is None else bar.mul_(where) for bar, where in zip(bars, uncut, strict=True)
    )
    state_bars = [None if bar is None else _with_ended_rows(bar, total) for bar in state_bars]
    of_inputs = MemoryInputs(q_bar, k_bar, v_bar, eta_bar, log_alpha_bar, delta_bar)
    of_inputs = (None if bar is None else bar.view(p.shape) for bar, p in zip(of_inputs, pieces, strict=True))
    return *of_inputs, *state_bars, *base_bars, *norm_bars


def _first_rows(rows: int, tensors) -> tuple:
    """Of tensors that have all rows, those of the rows that are still there."""
    return tuple(t if t is None or t.shape[0] == rows else t[:rows] for t in tensors)


def _with_ended_rows(bar: Tensor, rows: int) -> Tensor:
    """A state's adjoint with zeros for the rows that have ended since: rows are ordered by length."""
    missing = rows - bar.shape[0]
    return pad(bar, (0, 0, 0, 0, 0, missing)) if missing else bar


def _joined(bars, values):
    """The adjoints of all steps' values in one tensor, zeros where there is none."""
    if not isinstance(values[0], Tensor):
        return values[0]
    return torch.cat(
        [torch.zeros_like(value) if bar is None else bar for bar, value in zip(bars, values, strict=True)]
    )
