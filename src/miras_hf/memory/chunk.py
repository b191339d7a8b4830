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
"""The chunk-parallel form: matrix products inside a chunk, a loop over chunks, recomputation over groups of chunks.

Section 3.2 of arXiv 2504.13173 (equations (28), (29)): all gradients of a chunk are taken at its start's weights, so
they come from one forward and backward pass of the memory over the chunk's keys; the reads add the chunk's own writes
as products with rank-one factors. Numbers equal those of the recurrent reference to rounding.
"""

import functools
import itertools
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .adjoint import ProcessGroup, has_adjoint
from .architecture import Factors, Known
from .inputs import MemoryInputs, bound_inputs, check_inputs, hold_broken, without_autocast
from .layout import ChunkLayout, build_layout, check_layout_arguments, merge_chunks
from .learning import split_gates
from .rule import MirasRule
from .state import MemoryParameters, MemoryState, check_state, initial_memory_state, per_row, starting_dual
from .vjp import by_formulas, in_transform, with_bounded_adjoint


@without_autocast
def chunk_miras(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    log_alpha: Tensor,
    delta: Tensor | None = None,
    log_momentum: Tensor | None = None,
    erase: Tensor | None = None,
    *,
    rule: MirasRule,
    parameters: MemoryParameters,
    initial_state: MemoryState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
    chunks_per_group: int | None = None,
    kept_bytes: int = 160 * 2**20,
) -> tuple[Tensor, MemoryState | None]:
    """Reads tokens with a memory that learns from each of them; a token's read sees its own write.

    Costs `56 d^2 + 20 C d` FLOPs per token and head for an MLP memory of expansion 4 (`16 d^2` more for
    `decay_target="init"`), about four times that for forward and backward.

    Args:
        q, k (`torch.Tensor` of shape `[batch, tokens, heads, head_dim]`): queries and keys, l2-normalised by the caller.
        v (`torch.Tensor` of the same shape): values.
        eta (`torch.Tensor` of shape `[batch, tokens, heads]` or `[batch, tokens, heads, head_dim]`):
            Step size of every token, per head or per channel, not negative.
        log_alpha (`torch.Tensor`, as `eta`):
            Log retention of every token, at most 0; cut at `rule.min_log_alpha`.
        delta (`torch.Tensor`, as `eta`, *optional*): threshold of the Huber biases, positive.
        log_momentum (`torch.Tensor` of shape `[batch, tokens, heads]`, *optional*):
            Log momentum of every token, at most 0, of `Momentum`, whose other gates are one number a head, too.
        erase (`torch.Tensor`, as `k`, *optional*): the keys of which errors are taken, of `DeltaRule(erase_key="own")`.
        rule (`MirasRule`): the four choices.
        parameters (`MemoryParameters`): initial memory and layer norm.
        initial_state (`MemoryState`, *optional*): where to go on from, also in the middle of a chunk.
        output_final_state (`bool`, *optional*, defaults to `False`): whether to return the state after the last token.
        cu_seqlens (`torch.Tensor` of shape `[sequences + 1]`, *optional*):
            Borders of sequences packed into one row (`batch` is 1 then). Each has its own grid and start state;
            states have one row a sequence.
        lengths (`torch.Tensor` of shape `[batch]`, int32 or int64, *optional*):
            Tokens of each row, from 0 to `tokens`. What stands behind them are pads, which neither write nor decay nor
            advance the grid; their output is zero.
        chunks_per_group (`int`, *optional*):
            Chunks whose activations are recomputed together in the backward pass (`adjoint.py`); only the states
            between groups are kept. Defaults to the number that balances the two.
        kept_bytes (`int`, *optional*, defaults to 160 MiB):
            Where the activations of all chunks take about so many bytes at most, they are kept for the backward pass
            and nothing is recomputed. Of each call, and so of each layer of a model.

    Returns:
        `y` of the shape and dtype of `q`, and the final `MemoryState` or `None`.

    Raises:
        `ValueError`: naming the argument, its value and what is allowed.
    """
    x = check_inputs(q, k, v, eta, log_alpha, delta, log_momentum, erase, rule, parameters)
    batch, tokens, heads, head_dim = q.shape
    check_layout_arguments(batch, tokens, cu_seqlens, lengths)
    if chunks_per_group is not None and chunks_per_group < 1:
        raise ValueError(f"`chunks_per_group` must be at least 1, got {chunks_per_group}.")
    if kept_bytes < 0:
        raise ValueError(f"`kept_bytes` must not be negative, got {kept_bytes}.")
    rows = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    phase = None
    if initial_state is not None:
        check_state(initial_state, rule, heads, head_dim, rows, x.eta.shape[-1])
        phase = initial_state.count % rule.chunk_size
    layout = build_layout(
        batch, tokens, rule.chunk_size, q.device, cu_seqlens=cu_seqlens, lengths=lengths, phase=phase
    )
    memory = _Memory.build(rule, parameters, initial_state, layout, x, output_final_state)

    steps = len(layout.active)
    # `torch.func` has no hooks on saved tensors, and so no recomputation
    recompute = torch.is_grad_enabled() and not in_transform()
    recompute = recompute and (
        any(t is not None and t.requires_grad for t in x) or any(t.requires_grad for t in memory.tensors())
    )
    # a graph that is being compiled has the chunks one by one: as a nested region they would be compiled once and run
    # faster, but inductor of torch 2.13 then gives wrong gradients
    by_hand = recompute and has_adjoint(rule) and not by_formulas()
    keep = by_hand and memory.activation_bytes() <= kept_bytes
    if chunks_per_group is None and keep:
        chunks_per_group = max(1, steps)  # what groups have in common is made once
    elif chunks_per_group is None:
        chunks_per_group = _chunks_per_group(rule, head_dim, steps) if recompute else 8

    # a group either is plain or does one of the rare things that only `process_group` knows
    borders = sorted({*range(0, steps, chunks_per_group), steps, *memory.special_borders()})
    groups = list(itertools.pairwise(borders))
    pieces = [itertools.repeat(None) if t is None else layout.to_groups(t, borders) for t in x]

    states, partial_out = memory.start, memory.partial_out
    outputs = []
    for (first, last), *group in zip(groups, *pieces, strict=False):
        group = MemoryInputs(*group)
        if by_hand and memory.is_plain(first, last):
            y, states = memory.process_group_by_hand(first, last, group, states, keep)
            if partial_out is not None and last == layout.full_steps:
                partial_out = partial_out.with_matrices(states)
        elif recompute and len(groups) > 1:  # a single group would be computed twice for nothing
            y, states, partial_out = checkpoint(
                memory.process_group,
                first,
                last,
                group,
                states,
                partial_out,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        else:
            y, states, partial_out = memory.process_group(first, last, group, states, partial_out)
        outputs.append(y)
    y = layout.from_groups(outputs, heads) if outputs else x.q
    final_state = None if partial_out is None else memory.final_state(partial_out)
    return y.to(q.dtype), final_state


def _chunks_per_group(rule: MirasRule, head_dim: int, steps: int) -> int:
    """Balances what is kept per group (a state) against what is recomputed at once (activations of its chunks)."""
    state, activations = _sizes(rule, head_dim)
    return max(1, round(math.sqrt(steps * state / activations)))


def _sizes(rule: MirasRule, head_dim: int) -> tuple[int, int]:
    """Numbers in a head's state, and about so many in what the adjoint of one chunk reads of its forward."""
    shapes = rule.architecture.weight_shapes(head_dim)
    state = sum(fan_in * fan_out for fan_in, fan_out in shapes)
    return state, rule.chunk_size * sum(3 * (fan_in + fan_out) for fan_in, fan_out in shapes) + 4 * state


@dataclass
class _Memory:
    """What the loop over chunks needs, rows and heads merged into one axis, rows in the layout's order."""

    rule: MirasRule
    layout: ChunkLayout
    heads: int
    start: tuple[Tensor, ...]
    base: tuple[Tensor | None, ...]
    norm: tuple[Tensor, ...]  # of `MemoryParameters.norm`
    partial_in: MemoryState | None  # the initial state, with a chunk that may have begun
    partial_out: MemoryState | None  # the final state so far, with a chunk that may be left over

    @staticmethod
    def build(
        rule: MirasRule, parameters: MemoryParameters, state, layout: ChunkLayout, x: MemoryInputs, capture: bool
    ) -> "_Memory":
        rows, heads, dtype = layout.rows, x.q.shape[2], x.q.dtype
        base, partial_in, partial_out = parameters.base(rule, rows, dtype), None, None
        if state is not None:
            partial_in = state._replace(dual=starting_dual(rule, parameters, state)).merged(dtype, layout.row_order)
            start = partial_in.matrices
        else:
            # a copy: who decodes on writes into the final state, which before the first chunk's end is this one
            start = tuple(
                torch.zeros_like(b) if b is not None else per_row(a, rows, dtype).clone()
                for a, b in zip(parameters.written(rule), base, strict=True)
            )
            if rule.algorithm.has_second_matrix:
                start = (*start, *map(torch.zeros_like, start))
        if capture:
            empty = initial_memory_state(rule, parameters, rows, x.eta.shape[-1], dtype)
            partial_out = empty.merged(dtype).with_matrices(start)
        norm = parameters.norm(rule, rows, dtype)
        return _Memory(rule, layout, heads, start, base, norm, partial_in, partial_out)

    def tensors(self) -> list[Tensor]:
        begun = [] if self.partial_in is None else self.partial_in.leaves()
        return [*self.start, *self.norm, *(b for b in self.base if b is not None), *begun]

    def special_borders(self) -> set[int]:
        """Where groups end besides: after a chunk that a state has begun, before the chunk that the new state begins."""
        steps = len(self.layout.active)
        borders = {1} if self.partial_in is not None and steps else set()
        if self.partial_out is not None and self.layout.full_steps is not None:
            borders.add(self.layout.full_steps)
        return borders

    def is_plain(self, first: int, last: int) -> bool:
        """Whether these steps neither go on from the chunk of `partial_in` nor leave anything for the final state."""
        if first == 0 and self.partial_in is not None:
            return False
        full_steps = self.layout.full_steps
        return self.partial_out is None or (full_steps is not None and last <= full_steps)

    def activation_bytes(self) -> int:
        """About what the adjoints of all chunks read of their forwards."""
        _, activations = _sizes(self.rule, self.norm[0].shape[-1])
        return sum(self.layout.active) * self.heads * activations * self.norm[0].element_size()

    def process_group_by_hand(self, first: int, last: int, x: MemoryInputs, states, keep: bool):
        """`process_group` of plain steps, with the adjoint of `adjoint.py`."""

        def process(x: MemoryInputs, states, base, norm):
            # those given: under `create_graph` they are not this object's own
            return replace(self, base=base, norm=norm).process_group(first, last, x, states, None)[:2]

        sizes = [rows * self.heads for rows in self.layout.active[first:last]]
        y, *states = ProcessGroup.apply(process, self.rule, sizes, keep, *x, *states, *self.base, *self.norm)
        return y, tuple(states)

    def process_group(self, first: int, last: int, x: MemoryInputs, states, partial_out):
        """Processes the chunks of steps `first` to `last`; `x` holds their slots (`to_groups`), `states` the living rows' dual states."""
        rule, heads = self.rule, self.heads
        # here, where it is recomputed: copies of the whole length would be kept
        x, broken = hold_broken(bound_inputs(x.map(merge_chunks), rule))
        # what is left of the state at the chunk's start, and of its momentum
        eta, logs = x.eta, [t.cumsum(-2) for t in x.logs]
        if first == 0 and self.partial_in is not None:
            eta = self._behind_partial_in(eta, self.partial_in.eta)
            logs = list(map(self._log_behind_partial_in, logs, self.partial_in.logs))
        sizes = [rows * heads for rows in self.layout.active[first:last]]
        gates = rule.chunk_gates(eta, *logs)
        gates_of_gradients = rule.algorithm.chunk_gradient_gates(eta, *logs)
        if broken is not None:
            # the decay says so to the final state
            gates, logs[0] = gates.broken_from(broken), torch.where(broken, torch.nan, logs[0])
        gates_of_step = split_gates(gates, sizes)
        if gates_of_gradients is None:
            gates_of_gradients = [None] * len(sizes)
        else:
            gates_of_gradients = split_gates(gates_of_gradients, sizes)
        q, k, v, eta, *logs = (t.split(sizes) for t in (x.q, x.k, x.v, eta, *logs))
        delta, erase = ([None] * len(sizes) if t is None else t.split(sizes) for t in (x.delta, x.erase))

        outputs = []
        base, norm = self.base, self.norm
        for i, step in enumerate(range(first, last)):
            if states[0].shape[0] != sizes[i]:
                states = tuple(s[: sizes[i]] for s in states)
            if norm[0].shape[0] != sizes[i]:
                base = tuple(None if b is None else b[: sizes[i]] for b in base)
                norm = tuple(p[: sizes[i]] for p in norm)
            weights = rule.weights(states, base)
            known = self._known(sizes[0]) if step == 0 and self.partial_in is not None else None
            factors = rule.write(weights, k[i], v[i], delta[i], norm, gates_of_gradients[i], known, erase[i])
            outputs.append(rule.read(weights, factors, q[i], gates_of_step[i], norm))
            states = tuple(map(with_bounded_adjoint, rule.fold(states, factors, gates_of_step[i])))
            if partial_out is not None:
                partial_out = self._capture(step, partial_out, states, factors, eta[i], *(log[i] for log in logs))
        return torch.cat(outputs), states, partial_out

    # -- continuing in the middle of a chunk ------------------------------------------------------------------------

    def _slots_of_partial_in(self, rows: int) -> Tensor:
        phase = (self.partial_in.count % self.rule.chunk_size).repeat_interleave(self.heads)[:rows]
        return torch.arange(self.rule.chunk_size, device=phase.device).view(1, -1, 1) < phase.view(-1, 1, 1)

    def _behind_partial_in(self, slots: Tensor, before: Tensor) -> Tensor:
        """With the slots of the chunks that `partial_in` has begun; of tensors of chunks, in those of the first step."""
        rows = self.layout.active[0] * self.heads
        begun = torch.where(self._slots_of_partial_in(rows), before[:rows], slots[:rows])
        return torch.cat((begun, slots[rows:]))

    def _log_behind_partial_in(self, log: Tensor, before: Tensor) -> Tensor:
        """As `_behind_partial_in`, and cumulative: what comes after goes on from the last slot before."""
        rows = self.layout.active[0] * self.heads
        begun = self._slots_of_partial_in(rows)
        last = begun & ~F.pad(begun[:, 1:], (0, 0, 0, 1))  # the slot before the phase
        since = torch.where(last, before[:rows], 0.0).sum(-2, keepdim=True)
        return self._behind_partial_in(torch.cat((since + log[:rows], log[rows:])), before)

    def _known(self, rows: int) -> Known:
        first_rows = (Factors(*(t[:rows] for t in of_layer)) for of_layer in self.partial_in.factors)
        return Known(self._slots_of_partial_in(rows), tuple(first_rows))

    # -- the state after the last token -----------------------------------------------------------------------------

    def _capture(
        self, step: int, partial_out: MemoryState, states, factors, eta, log_decay, *log_momentum
    ) -> MemoryState:
        """Keeps what the final state needs of this step: rows end at different steps, the others go on."""
        inputs, gradients = zip(*factors, strict=True)
        now = MemoryState((), inputs, gradients, eta, log_decay, partial_out.count, (), log_momentum)
        full_steps = self.layout.full_steps
        if full_steps is not None:
            partial_out = partial_out.with_matrices(states) if step + 1 == full_steps else partial_out
            return now.with_matrices(partial_out.matrices) if step == full_steps else partial_out
        ends = (self.layout.used // self.rule.chunk_size).repeat_interleave(self.heads).view(-1, 1, 1)

        def keep(when: Tensor, new: Tensor, old: Tensor) -> Tensor:
            rows = new.shape[0]
            return torch.cat((torch.where(when[:rows], new, old[:rows]), old[rows:]))

        matrices = [keep(ends == step + 1, new, old) for new, old in zip(states, partial_out.matrices, strict=True)]
        return now.map_slots(functools.partial(keep, ends == step), partial_out).with_matrices(matrices)

    def final_state(self, partial_out: MemoryState) -> MemoryState:
        layout, size = self.layout, self.rule.chunk_size
        taken = (layout.used % size).repeat_interleave(self.heads).view(-1, 1, 1)
        filled = torch.arange(size, device=taken.device).view(1, -1, 1) < taken
        # the slots used are those of this call's tokens, behind those of the chunk that `partial_in` has begun
        count = layout.used if self.partial_in is None else layout.used + self.partial_in.count // size * size
        state = partial_out.map_slots(lambda t: torch.where(filled, t, 0.0))._replace(count=count)
        return state.parted(self.heads, layout.row_order)
