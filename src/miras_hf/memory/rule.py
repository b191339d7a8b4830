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
"""The memory rule (the four choices of Miras in one object), its parameters, its state, and the checks on both."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .architecture import MatrixMemory, MLPMemory
from .attentional_bias import AttentionalBias, HuberMixture
from .learning import GradientDescent
from .retention import Decay, RetentionGate
from .vjp import can_look_at


KEY_CAP = 1e3
VALUE_CAP = 1e15
"""Queries, keys and values are cut at these magnitudes, far above any sane model's, to keep products finite."""

# exp(80) is the largest factor 1/B_i that leaves float32 room for the numbers it multiplies
_LARGEST_CHUNK_LOG_DECAY = 160.0


@dataclass(frozen=True)
class MirasRule:
    """A point of the Miras design space: what one head's memory is and how it learns while it reads.

    Args:
        architecture (`MLPMemory` or `MatrixMemory`): choice (i).
        attentional_bias (`AttentionalBias`): choice (ii).
        retention (`RetentionGate`): choice (iii).
        algorithm (`GradientDescent`): choice (iv).
        chunk_size (`int`, *optional*, defaults to 64):
            Tokens whose gradients are taken at the same weights (equation (28)). Part of the trained model: the grid
            starts at a sequence's first real token, in training, prefill and decoding alike.
        decay_target (`str`, *optional*, defaults to `"init"`):
            `"init"` decays toward the learned initial memory, `"zero"` toward zero as printed in the paper. Toward
            zero both layers of an MLP memory shrink into a saddle: over thousands of tokens it goes out (its reads
            return the query) or its reads become chaotic (runs in float32 and float64 end up unrelated).
        min_log_alpha (`float`, *optional*, defaults to -2.5): lower bound of a token's log retention; smaller is cut.
    """

    architecture: MLPMemory | MatrixMemory = field(default_factory=MLPMemory)
    attentional_bias: AttentionalBias = field(default_factory=HuberMixture)
    retention: RetentionGate = field(default_factory=Decay)
    algorithm: GradientDescent = field(default_factory=GradientDescent)
    chunk_size: int = 64
    decay_target: str = "init"
    min_log_alpha: float = -2.5

    def __post_init__(self):
        if not isinstance(self.chunk_size, int) or self.chunk_size < 1:
            raise ValueError(f"`chunk_size` must be an integer of at least 1, got {self.chunk_size}.")
        if self.decay_target not in ("init", "zero"):
            raise ValueError(f"`decay_target` must be 'init' or 'zero', got {self.decay_target!r}.")
        if not -_LARGEST_CHUNK_LOG_DECAY / self.chunk_size <= self.min_log_alpha <= 0:
            raise ValueError(
                f"`min_log_alpha` must lie between {-_LARGEST_CHUNK_LOG_DECAY} / chunk_size = "
                f"{-_LARGEST_CHUNK_LOG_DECAY / self.chunk_size:g} and 0, got {self.min_log_alpha}."
            )

    def hidden_axis(self, layer: int) -> int:
        return -1 if self.architecture.gate_axes[layer] == "input" else -2


class MemoryParameters(NamedTuple):
    """What the outer model learns about a memory; nothing here changes while it reads.

    Args:
        initial (`tuple` of `torch.Tensor` of shape `[heads, in, out]`): the initial dual state A_0, layer by layer.
        norm_weight (`torch.Tensor` of shape `[heads, head_dim]`): gamma of the memory's own layer norm.
        norm_bias (`torch.Tensor` of shape `[heads, head_dim]`): beta.
    """

    initial: tuple[Tensor, ...]
    norm_weight: Tensor
    norm_bias: Tensor


class MemoryState(NamedTuple):
    """The memory of `rows` sequences between two calls, of constant size, also in the middle of a chunk.

    Inside a chunk the weights do not move: the chunk's writes wait as rank-one factors (slots at or past the phase
    `count % chunk_size` have `eta = 0`) and are folded in when the row's chunk ends.

    Args:
        dual (`tuple` of `torch.Tensor` of shape `[rows, heads, in, out]`):
            The dual state at the start of the row's chunk, as the deviation from the initial memory if
            `decay_target="init"`. A row of zeros, `count` included, is at the learned initial memory.
        inputs (`tuple` of `torch.Tensor` of shape `[rows, heads, chunk_size, in]`): what each layer read.
        gradients (`tuple` of `torch.Tensor` of shape `[rows, heads, chunk_size, out]`): gradients at its output.
        eta (`torch.Tensor` of shape `[rows, heads, chunk_size, head_dim or 1]`): steps.
        log_decay (`torch.Tensor` of the same shape): log retention since the chunk's start, cumulative.
        count (`torch.Tensor` of shape `[rows]`, int64): real tokens read so far.
    """

    dual: tuple[Tensor, ...]
    inputs: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]
    eta: Tensor
    log_decay: Tensor
    count: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> "MemoryState":
        """The state with `function` applied to every tensor; all have the rows first."""
        return MemoryState(
            dual=tuple(map(function, self.dual)),
            inputs=tuple(map(function, self.inputs)),
            gradients=tuple(map(function, self.gradients)),
            eta=function(self.eta),
            log_decay=function(self.log_decay),
            count=function(self.count),
        )


def initial_memory_state(
    rule: MirasRule, parameters: MemoryParameters, rows: int, gate_dim: int, dtype: torch.dtype | None = None
) -> MemoryState:
    """The state before the first token.

    Args:
        rows (`int`): number of sequences.
        gate_dim (`int`): last axis of the gates, `head_dim` for channel gates or 1 for head gates.
        dtype (`torch.dtype`, *optional*, defaults to float32, or float64 if the parameters are).
    """
    reference = parameters.initial[0]
    dtype = compute_dtype(reference) if dtype is None else dtype
    heads, head_dim = parameters.norm_weight.shape

    def zeros(*shape):
        return torch.zeros(rows, heads, *shape, dtype=dtype, device=reference.device)

    shapes = rule.architecture.weight_shapes(head_dim)
    if rule.decay_target == "init":
        dual = tuple(zeros(*shape) for shape in shapes)
    else:
        dual = tuple(a.to(dtype).expand(rows, -1, -1, -1).clone() for a in parameters.initial)
    size = rule.chunk_size
    return MemoryState(
        dual=dual,
        inputs=tuple(zeros(size, fan_in) for fan_in, _ in shapes),
        gradients=tuple(zeros(size, fan_out) for _, fan_out in shapes),
        eta=zeros(size, gate_dim),
        log_decay=zeros(size, gate_dim),
        count=torch.zeros(rows, dtype=torch.int64, device=reference.device),
    )


def starting_dual(rule: MirasRule, parameters: MemoryParameters, state: MemoryState) -> tuple[Tensor, ...]:
    """The state's dual, with rows that have not read anything put at the learned initial memory."""
    if rule.decay_target == "init":  # the deviation from the initial memory: a new row's is zero already
        return state.dual
    fresh = (state.count == 0).view(-1, 1, 1, 1)
    return tuple(torch.where(fresh, a.to(d.dtype), d) for a, d in zip(parameters.initial, state.dual, strict=True))


def without_autocast(function):
    """Runs a form of the recurrence outside autocast: its state and products are float32 whatever surrounds it.

    Of a compiled form with autocast around the compiled function, PyTorch traces products of the gradient in autocast's
    dtype all the same; with autocast inside, as Accelerate puts it, it does not.
    """

    @functools.wraps(function)
    def wrapped(q: Tensor, *args, **kwargs):
        with torch.autocast(q.device.type, enabled=False):
            return function(q, *args, **kwargs)

    return wrapped


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class MemoryInputs(NamedTuple):
    """Checked inputs, in the dtype of computation, gates with a last axis of `head_dim` or 1."""

    q: Tensor
    k: Tensor
    v: Tensor
    eta: Tensor
    log_alpha: Tensor
    delta: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> "MemoryInputs":
        """The inputs with `function` applied to every tensor."""
        return MemoryInputs(
            q=function(self.q),
            k=function(self.k),
            v=function(self.v),
            eta=function(self.eta),
            log_alpha=function(self.log_alpha),
            delta=None if self.delta is None else function(self.delta),
        )


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    log_alpha: Tensor,
    delta: Tensor | None,
    rule: MirasRule,
    parameters: MemoryParameters,
) -> MemoryInputs:
    """Checks shapes and dtypes against the rule and each other, and brings gates to four axes.

    Raises:
        `ValueError`: naming the argument, its shape or dtype and what is allowed.
    """
    if q.dim() != 4:
        raise ValueError(f"`q` must have shape [batch, tokens, heads, head_dim], got {tuple(q.shape)}.")
    batch, tokens, heads, head_dim = q.shape
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape:
            raise ValueError(f"`{name}` must have the shape of `q`, {tuple(q.shape)}, got {tuple(x.shape)}.")
    for name, x in (("q", q), ("k", k), ("v", v), ("eta", eta), ("log_alpha", log_alpha)):
        if not x.is_floating_point():
            raise ValueError(f"`{name}` must have a floating point dtype, got {x.dtype}.")
    for name, x in (("norm_weight", parameters.norm_weight), ("norm_bias", parameters.norm_bias)):
        if x.shape != (heads, head_dim):
            raise ValueError(f"`parameters.{name}` must have shape {(heads, head_dim)}, got {tuple(x.shape)}.")
    shapes = [(heads, *shape) for shape in rule.architecture.weight_shapes(head_dim)]
    if [tuple(a.shape) for a in parameters.initial] != shapes:
        raise ValueError(
            f"`parameters.initial` must have shapes {shapes} for {rule.architecture} with `q` of shape "
            f"{tuple(q.shape)}, got {[tuple(a.shape) for a in parameters.initial]}."
        )

    dtype = compute_dtype(q)
    eta = _gate("eta", eta, (batch, tokens, heads), head_dim).to(dtype)
    log_alpha = _gate("log_alpha", log_alpha, (batch, tokens, heads), head_dim).to(dtype)
    gate_dim = max(eta.shape[-1], log_alpha.shape[-1])
    if eta.shape != log_alpha.shape:
        eta, log_alpha = (x.expand(-1, -1, -1, gate_dim) for x in (eta, log_alpha))

    granularity = rule.attentional_bias.delta_granularity
    if granularity is None:
        if delta is not None:
            raise ValueError(f"`delta` must be None: {type(rule.attentional_bias).__name__} has no threshold.")
    elif delta is None:
        raise ValueError(f"`delta` is required by {type(rule.attentional_bias).__name__}, a threshold per token.")
    else:
        if not delta.is_floating_point():
            raise ValueError(f"`delta` must have a floating point dtype, got {delta.dtype}.")
        delta = _gate("delta", delta, (batch, tokens, heads), head_dim).to(dtype)
        if granularity == "head" and delta.shape[-1] != 1:
            raise ValueError(
                f"`delta` must have shape {(batch, tokens, heads)} for {type(rule.attentional_bias).__name__}, "
                f"got last axis {delta.shape[-1]}."
            )
    return MemoryInputs(q.to(dtype), k.to(dtype), v.to(dtype), eta, log_alpha, delta)


def bound_inputs(x: MemoryInputs, rule: MirasRule) -> MemoryInputs:
    """Cuts queries, keys and values at magnitudes that keep products finite, and log alpha at the rule's bound."""
    return x._replace(
        q=x.q.clamp(-KEY_CAP, KEY_CAP),
        k=x.k.clamp(-KEY_CAP, KEY_CAP),
        v=x.v.clamp(-VALUE_CAP, VALUE_CAP),
        log_alpha=x.log_alpha.clamp(rule.min_log_alpha, 0.0),
    )


def hold_broken(x: MemoryInputs) -> tuple[MemoryInputs, Tensor | None]:
    """Takes out of chunks what is not a number, so that it does not reach the tokens before it.

    A chunk is read in matrix products, whose masked entries are zeros, and zero times NaN is NaN. Held here, a broken
    token and those after it in its chunk are told to the chunk's gates (`Gates.broken_from`), which are NaN from there
    on, and so are outputs and state, as they are token by token. A query reaches nobody else, and is left alone.

    Args:
        x (`MemoryInputs`): chunks `[chunks * heads, chunk_size, f]`.

    Returns:
        The inputs with every number finite but those of queries, and where `[chunks * heads, chunk_size, 1]` a chunk is
        broken, `None` if none is. A compiled graph is left as it is: it cannot branch, and would pay in every call.
    """
    written = [t for name, t in zip(x._fields, x, strict=True) if t is not None and name != "q"]
    if torch.compiler.is_compiling() or (can_look_at(x.k) and all(bool(t.sum().isfinite()) for t in written)):
        return x, None
    finite = torch.stack([t.sum(-1).isfinite() for t in written]).all(0)
    broken = ((~finite).cumsum(-1) > 0).unsqueeze(-1)
    held = [
        t if t is None else torch.where(broken, float(name == "delta"), t)
        for name, t in zip(x._fields, x, strict=True)
    ]
    return MemoryInputs(*held)._replace(q=x.q), broken


def _gate(name: str, gate: Tensor, shape: tuple[int, int, int], head_dim: int) -> Tensor:
    if gate.shape == shape:
        return gate.unsqueeze(-1)
    if gate.dim() == 4 and gate.shape[:3] == shape and gate.shape[-1] in (1, head_dim):
        return gate
    raise ValueError(
        f"`{name}` must have shape {shape} (per head) or {(*shape, head_dim)} (per channel), got {tuple(gate.shape)}."
    )


def check_state(state: MemoryState, rule: MirasRule, heads: int, head_dim: int, rows: int, gate_dim: int) -> None:
    """Raises a `ValueError` if the state was not made by this rule for that many rows and gates."""
    shapes = rule.architecture.weight_shapes(head_dim)
    expected = {
        "dual": [(rows, heads, *shape) for shape in shapes],
        "inputs": [(rows, heads, rule.chunk_size, fan_in) for fan_in, _ in shapes],
        "gradients": [(rows, heads, rule.chunk_size, fan_out) for _, fan_out in shapes],
        "eta": [(rows, heads, rule.chunk_size, gate_dim)],
        "log_decay": [(rows, heads, rule.chunk_size, gate_dim)],
        "count": [(rows,)],
    }
    for name, shapes in expected.items():
        value = getattr(state, name)
        got = [tuple(x.shape) for x in (value if isinstance(value, tuple) else (value,))]
        if got != shapes:
            raise ValueError(f"`initial_state.{name}` must have shape {shapes}, got {got}: another model's state?")
