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
"""The recurrent reference: one token at a time, inner gradients by autograd. Slow and obviously right.

This is the contract of every other form. Equations (5), (8), (28) of arXiv 2504.13173.
"""

import torch
from torch import Tensor

from .exact import Exact
from .inputs import MemoryInputs, bound_inputs, check_inputs, without_autocast
from .layout import check_layout_arguments
from .rule import MirasRule
from .state import MemoryParameters, MemoryState, check_state, initial_memory_state, starting_dual
from .vjp import in_transform


@without_autocast
def recurrent_miras(
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
    read: str = "linearised",
) -> tuple[Tensor, MemoryState | None]:
    """The memory, token by token. Same arguments as [`chunk_miras`], and one more.

    Args:
        read (`str`, *optional*, defaults to `"linearised"`):
            What a token reads inside a chunk: weights under the link linearised at the chunk's start, or, with
            `"exact"`, under the link itself. With `chunk_size=1`, `"exact"` is the paper's per-token recurrence.

    Raises:
        `RuntimeError`: inside `torch.func.vmap`, forward-mode differentiation and `torch.jit.trace`.
    """
    if read not in ("linearised", "exact"):
        raise ValueError(f"`read` must be 'linearised' or 'exact', got {read!r}.")
    x = bound_inputs(check_inputs(q, k, v, eta, log_alpha, delta, log_momentum, erase, rule, parameters), rule)
    batch, tokens, heads, head_dim = q.shape
    check_layout_arguments(batch, tokens, cu_seqlens, lengths)
    gate_dim = x.eta.shape[-1]
    rows = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    if initial_state is None:
        state = initial_memory_state(rule, parameters, rows, gate_dim, x.q.dtype)
    else:
        check_state(initial_state, rule, heads, head_dim, rows, gate_dim)
        state = initial_state

    borders = [0, tokens] if cu_seqlens is None else cu_seqlens.tolist()
    outputs, states = [], []
    with torch.enable_grad():
        for index, (start, stop) in enumerate(zip(borders[:-1], borders[1:], strict=True)):
            one = state if cu_seqlens is None else state.map(lambda t, i=index: t[i : i + 1])
            tokens_of_one = x.map(lambda t, start=start, stop=stop: t[:, start:stop])
            y, one = _read_sequence(tokens_of_one, one, rule, parameters, lengths, read == "exact")
            outputs.append(y)
            states.append(one)
    y = torch.cat(outputs, dim=1).to(q.dtype)
    if not torch.is_grad_enabled():
        y, states = y.detach(), [one.map(Tensor.detach) for one in states]
    if not output_final_state:
        return y, None
    return y, MemoryState.map(states[0], lambda *parts: torch.cat(parts), *states[1:])


def _read_sequence(x: MemoryInputs, state: MemoryState, rule: MirasRule, parameters, lengths, exact: bool):
    architecture, algorithm, axes = rule.architecture, rule.algorithm, rule.written_axes
    layers, first = range(len(axes)), architecture.fixed  # the weights that are written, behind those that are not
    rows, tokens, heads, head_dim = x.q.shape
    dtype = x.q.dtype
    initial = [a.to(dtype).expand(rows, -1, -1, -1) for a in parameters.written(rule)]
    fixed = [rule.retention.link(a.to(dtype), rule.hidden_axis(i)) for i, a in enumerate(parameters.initial[:first])]
    base = initial if rule.decay_target == "init" else [None] * len(initial)
    norm = [p.to(dtype).view(1, heads, 1, head_dim) for p in (parameters.norm_weight, parameters.norm_bias)]

    def gate(values: Tensor, layer: int) -> Tensor:  # steps or logs [rows, heads, 1, c] to the axis of the weight
        if axes[layer] == "hidden":
            return values.mean(-1, keepdim=True)
        return values.mT if axes[layer] == "input" else values

    def hidden_axis(layer: int) -> int:
        return rule.hidden_axis(first + layer)

    def fresh_chunk(dual):
        return [rule.retention.at_chunk_start(dual[i], base[i], hidden_axis(i)) for i in layers]

    # what has happened since the chunk's start: the decay of the base, and the writes as the algorithm has put them
    # together, with its momentum
    start = list(starting_dual(rule, parameters, state))
    inputs, gradients = list(state.inputs), list(state.gradients)
    eta, log_decay, count = state.eta, state.log_decay, state.count
    slots = torch.arange(rule.chunk_size, device=count.device).view(1, 1, -1, 1)
    phase = (count % rule.chunk_size).view(rows, 1, 1, 1)
    held_at_start, logs_held = list(state.momentum), list(state.log_momentum)
    written = [(torch.zeros_like(d), *held) for d, *held in zip(start, *([held_at_start] if held_at_start else []))]
    logs = [torch.zeros_like(log[..., :1, :]) for log in (log_decay, *logs_held)]
    for slot in range(int(phase.max()) if len(phase) else 0):
        gone = slot < phase
        here = [log[..., slot : slot + 1, :] for log in (log_decay, *logs_held)]
        # chosen before the exponential: of a slot not taken it may be infinite
        log_alpha, *log_momentum = (
            torch.where(gone, now - before, 0.0) for now, before in zip(here, logs, strict=True)
        )
        momentum = [log.exp() for log in log_momentum]
        if algorithm.has_covariance:
            key = inputs[0][..., slot : slot + 1, :]
            momentum = [eta[..., slot : slot + 1, :] * (key.mT @ key)]
        for i in layers:
            step = gate(eta[..., slot : slot + 1, :], i) * (
                inputs[i][..., slot : slot + 1, :].mT @ gradients[i][..., slot : slot + 1, :]
            )
            after = algorithm.update(written[i], step, gate(log_alpha, i).exp(), *momentum)
            written[i] = tuple(torch.where(gone, new, old) for new, old in zip(after, written[i], strict=True))
        logs = [torch.where(gone, now, before) for now, before in zip(here, logs, strict=True)]

    outputs = []
    for t in range(tokens):
        q, k, v, eta_t, log_alpha_t, delta_t, log_momentum_t, erase_t = x.map(
            lambda of_all, t=t: of_all[:, t].unsqueeze(2)
        )
        live = torch.ones(rows, dtype=torch.bool, device=q.device) if lengths is None else t < lengths
        live = live.view(rows, 1, 1, 1)
        weights = fresh_chunk(start)

        def weight_at(layer: int, since: Tensor, writes: Tensor, weights=weights) -> Tensor:
            if exact:
                anchor, dual = base[layer], gate(since, layer).exp() * start[layer] + writes
                return rule.retention.link(dual if anchor is None else anchor + dual, hidden_axis(layer))
            w = weights[layer]
            total = rule.retention.writes_matrix(w, writes, hidden_axis(layer))
            if w.decaying is not None:
                total = total + gate(since, layer).exp() * w.decaying
            if w.constant is not None:
                total = total + w.constant
            return total if w.scale is None else w.scale * total

        # the inner gradient, at the weights of the chunk's start, or at those before the token, decayed or not
        since_t = logs[0] + log_alpha_t
        at = [w.weight for w in weights]
        if algorithm.gradient_at == "previous":
            at = [weight_at(i, logs[0], written[i][0]) for i in layers]
        elif algorithm.gradient_at == "decayed":
            at = [weight_at(i, since_t, gate(log_alpha_t, i).exp() * written[i][0]) for i in layers]
        if in_transform() and not all(w.requires_grad for w in at):
            raise RuntimeError(
                "`recurrent_miras` takes its inner gradients by autograd and cannot run inside `torch.func.vmap`, "
                "forward-mode differentiation or `torch.jit.trace`; `chunk_miras` can."
            )
        at = [w if w.requires_grad else w.detach().requires_grad_() for w in at]
        seen: list[tuple[Tensor, Tensor]] = []

        def linear(layer: int, h: Tensor, at=at, seen=seen) -> Tensor:
            if layer < first:
                return h @ fixed[layer]
            seen.append((h, h @ at[layer - first]))
            return seen[-1][1]

        prediction = architecture.read(linear, k if erase_t is None else erase_t, *norm)
        residual = rule.written_bias.residual(rule.written_bias.error(prediction, v), delta_t)
        grads = torch.autograd.grad(prediction, [*at, *(z for _, z in seen)], grad_outputs=residual, create_graph=True)
        if erase_t is not None:  # a matrix's gradient, along the key that is written
            grads, seen = (k.mT @ grads[1], grads[1]), [(k, seen[0][1])]

        # the dual state's recurrence, split into the decaying start and the writes since
        gates_t = [log for log in (log_alpha_t, log_momentum_t) if log is not None]
        logs_t = [before + log for before, log in zip(logs, gates_t, strict=True)]
        momentum = [eta_t * (k.mT @ k)] if algorithm.has_covariance else [log.exp() for log in gates_t[1:]]
        written_t = [
            algorithm.update(written[i], gate(eta_t, i) * grads[i], gate(log_alpha_t, i).exp(), *momentum)
            for i in layers
        ]
        writes_t = [of_layer[0] for of_layer in written_t]
        duals_t = [gate(since_t, i).exp() * start[i] + writes_t[i] for i in layers]

        def read(layer: int, h: Tensor, weight_at=weight_at, since_t=since_t, writes_t=writes_t) -> Tensor:
            if layer < first:
                return h @ fixed[layer]
            return h @ weight_at(layer - first, since_t, writes_t[layer - first])

        if isinstance(algorithm, Exact):
            q = algorithm.solved(written_t[0][1], q.squeeze(2), norm[0].squeeze(2)).unsqueeze(2)
        y = architecture.read(read, q, *norm)
        outputs.append(torch.where(live, y, 0.0).squeeze(2))

        # bookkeeping: the token takes its slot; a full chunk becomes the next one's start
        here = live & (slots == phase)
        inputs = [torch.where(here, seen[i][0], inputs[i]) for i in layers]
        gradients = [torch.where(here, grads[len(grads) // 2 + i], gradients[i]) for i in layers]
        eta = torch.where(here, eta_t, eta)
        log_decay, *logs_held = (
            torch.where(here, now, log) for now, log in zip(logs_t, (log_decay, *logs_held), strict=True)
        )
        count = count + live.view(rows)
        phase = (count % rule.chunk_size).view(rows, 1, 1, 1)
        full = live & (phase == 0)
        ends = [rule.retention.at_chunk_end(dual, rule.chunk_size) for dual in duals_t]
        start = [torch.where(full, ends[i], start[i]) for i in layers]
        held_at_start = [torch.where(full, new[1], old) for new, old in zip(written_t, held_at_start, strict=False)]
        for i in layers:
            writes, *held = (torch.where(live, new, old) for new, old in zip(written_t[i], written[i], strict=True))
            written[i] = torch.where(full, 0.0, writes), *held
        logs = [torch.where(full, 0.0, torch.where(live, now, log)) for now, log in zip(logs_t, logs, strict=True)]
        inputs, gradients, logs_held = (
            [torch.where(full, 0.0, f) for f in fs] for fs in (inputs, gradients, logs_held)
        )
        eta, log_decay = (torch.where(full, 0.0, f) for f in (eta, log_decay))

    y = torch.stack(outputs, dim=1) if outputs else x.q
    tuples = (tuple(parts) for parts in (start, inputs, gradients))
    return y, MemoryState(*tuples, eta, log_decay, count, tuple(held_at_start), tuple(logs_held))
