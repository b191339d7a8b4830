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
"""What a form of the recurrence is called with: its tokens, checked and kept within bounds."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .rule import MirasRule
from .state import MemoryParameters, compute_dtype
from .vjp import can_look_at, lies_within


KEY_CAP = 1e3
VALUE_CAP = 1e15
"""Queries, keys and values are cut at these magnitudes, far above any sane model's, to keep products finite."""


MIN_LOG_MOMENTUM = -80.0
"""Where the logarithm of a token's momentum is cut: below, nothing is left."""


def without_autocast(function):
    """Runs a form of the recurrence outside autocast: its state and products are float32 whatever surrounds it.

    Of a compiled form with autocast around the compiled function, PyTorch traces products of the gradient in autocast's
    dtype all the same; with autocast inside, as Accelerate puts it, it does not.
    """

    @functools.wraps(function)
    def wrapped(q: Tensor, *args, **kwargs):
        # autocast knows nothing of tensors without data
        if q.is_meta or not (torch.compiler.is_compiling() or torch.is_autocast_enabled(q.device.type)):
            return function(q, *args, **kwargs)
        with torch.autocast(q.device.type, enabled=False):
            return function(q, *args, **kwargs)

    return wrapped


def without_gradients(function):
    """Runs a form of the recurrence in `torch.no_grad()`, which is entered where gradients are on only: on a token it takes
    as long as several operations."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        with torch.no_grad():
            return function(*args, **kwargs)

    return wrapped


class MemoryInputs(NamedTuple):
    """Checked inputs, in the dtype of computation, gates with a last axis of `head_dim` or 1."""

    q: Tensor
    k: Tensor
    v: Tensor
    eta: Tensor
    log_alpha: Tensor
    delta: Tensor | None
    log_momentum: Tensor | None = None
    erase: Tensor | None = None

    @property
    def asked(self) -> Tensor:
        """The keys of which errors are taken."""
        return self.k if self.erase is None else self.erase

    def map(self, function: Callable[[Tensor], Tensor]) -> "MemoryInputs":
        """The inputs with `function` applied to every tensor."""
        return MemoryInputs(*[None if t is None else function(t) for t in self])

    @property
    def logs(self) -> list[Tensor]:
        """Of what is left after a token: of the dual state, and of the momentum, if there is one."""
        return [t for t in (self.log_alpha, self.log_momentum) if t is not None]

    def merged(self) -> "MemoryInputs":
        """`[rows, tokens, heads, f]` as `[rows * heads, tokens, f]`."""
        return MemoryInputs(*[None if t is None else t.transpose(1, 2).flatten(0, 1) for t in self])


def tokens_first(y: Tensor, heads: int) -> Tensor:
    """`[rows * heads, tokens, f]` as `[rows, tokens, heads, f]`."""
    return y.unflatten(0, (-1, heads)).transpose(1, 2)


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    log_alpha: Tensor,
    delta: Tensor | None,
    log_momentum: Tensor | None,
    erase: Tensor | None,
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
    algorithm = type(rule.algorithm).__name__
    if eta.shape[-1] != 1 and "channel" not in rule.algorithm.step_granularities:
        raise ValueError(
            f"`eta` must have shape {(batch, tokens, heads)} for {algorithm}, got last axis {eta.shape[-1]}."
        )
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
    if not rule.algorithm.has_momentum:
        if log_momentum is not None:
            raise ValueError(f"`log_momentum` must be None: {algorithm} has no momentum.")
    elif log_momentum is None:
        raise ValueError(f"`log_momentum` is required by {algorithm}, a number per token and head.")
    else:
        if not log_momentum.is_floating_point():
            raise ValueError(f"`log_momentum` must have a floating point dtype, got {log_momentum.dtype}.")
        log_momentum = _gate("log_momentum", log_momentum, (batch, tokens, heads), head_dim).to(dtype)
        if max(log_momentum.shape[-1], gate_dim) != 1:
            raise ValueError(
                f"`eta`, `log_alpha` and `log_momentum` must have shape {(batch, tokens, heads)} for {algorithm}, got last "
                f"axes {gate_dim} and {log_momentum.shape[-1]}."
            )
    if rule.algorithm.has_covariance and gate_dim != 1:
        raise ValueError(
            f"`log_alpha` must have shape {(batch, tokens, heads)} for {algorithm}, got last axis {log_alpha.shape[-1]}."
        )
    if not rule.algorithm.has_erase_key:
        if erase is not None:
            raise ValueError(f"`erase` must be None: {rule.algorithm} takes errors of the keys that it writes along.")
    elif erase is None:
        raise ValueError(f"`erase` is required by {rule.algorithm}, a key per token and head.")
    elif erase.shape != q.shape or not erase.is_floating_point():
        raise ValueError(
            f"`erase` must have the shape of `q`, {tuple(q.shape)}, and a floating point dtype, got {erase.dtype} "
            f"{tuple(erase.shape)}."
        )
    else:
        erase = erase.to(dtype)
    return MemoryInputs(q.to(dtype), k.to(dtype), v.to(dtype), eta, log_alpha, delta, log_momentum, erase)


def bound_inputs(x: MemoryInputs, rule: MirasRule) -> MemoryInputs:
    """Cuts queries, keys and values at magnitudes that keep products finite, log alpha at the rule's bound, and steps at
    the algorithm's. What nothing is cut of is returned as it is."""
    k = _cut(x.k, -KEY_CAP, KEY_CAP)
    erase = None if x.erase is None else _cut(x.erase, -KEY_CAP, KEY_CAP)
    return x._replace(
        q=_cut(x.q, -KEY_CAP, KEY_CAP),
        k=k,
        v=_cut(x.v, -VALUE_CAP, VALUE_CAP),
        eta=rule.algorithm.bound_step_size(x.eta, k, erase),
        erase=erase,
        log_alpha=_cut(x.log_alpha, rule.least_log_alpha, 0.0),
        log_momentum=None if x.log_momentum is None else _cut(x.log_momentum, MIN_LOG_MOMENTUM, 0.0),
    )


def _cut(x: Tensor, low: float, high: float) -> Tensor:
    # of one token a copy is made sooner than its numbers are looked at
    return x if x.shape[1] > 1 and lies_within(x, low, high) else x.clamp(low, high)


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
    if torch.compiler.is_compiling() or (can_look_at(x.k) and all(math.isfinite(t.sum().item()) for t in written)):
        return x, None
    # an infinite threshold is none
    finite = torch.stack(
        [~t.isnan().any(-1) if t is x.delta else t.sum(-1).isfinite() for t in written],
    ).all(0)
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
