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
"""Vector-Jacobian products beside the forward methods of the four choices.

A method `f` of a choice may have a companion `f_with_vjp`: the same arguments, the same result, and besides a function
`vjp` that takes the adjoints of the result (the gradients of the outer loss with respect to it) to the adjoints of the
arguments. A companion keeps exactly what its `vjp` needs, and runs outside autograd.

Companions are optional. What has none is differentiated by autograd, so that a new choice is a forward method and
nothing else. A subclass with a forward of its own loses the companion written for the forward it replaces.
"""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor
from torch.autograd import forward_ad


class Companions:
    """Base class of the choices: keeps forwards and companions together under inheritance."""

    companions: ClassVar[dict[str, tuple[str, ...]]] = {}
    """For every companion the methods it differentiates."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        for companion, forwards in cls.companions.items():
            if companion not in vars(cls) and any(forward in vars(cls) for forward in forwards):
                setattr(cls, companion, None)


def by_autograd(function: Callable, *inputs: Tensor | None) -> tuple[tuple[Tensor | None, ...], Callable]:
    """`function(*inputs)`, a tuple of tensors or None, and its vjp, which returns an adjoint or None per input."""
    with torch.enable_grad():
        leaves = tuple(None if x is None else x.detach().requires_grad_() for x in inputs)
        outputs = function(*leaves)

    def vjp(*bars: Tensor | None) -> tuple[Tensor | None, ...]:
        return gradients(zip(outputs, bars, strict=True), leaves)

    return tuple(None if y is None else y.detach() for y in outputs), vjp


def gradients(outputs_and_bars, leaves, **options) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad`, `options` its own, where outputs, their adjoints and leaves may be None."""
    pairs = [(y, b) for y, b in outputs_and_bars if y is not None and b is not None and y.requires_grad]
    present = [x for x in leaves if x is not None]
    if not pairs or not present:
        return (None,) * len(leaves)
    outputs, bars = zip(*pairs, strict=True)
    grads = iter(torch.autograd.grad(outputs, present, bars, allow_unused=True, **options))
    return tuple(None if x is None else next(grads) for x in leaves)


def differentiable_vjp(function: Callable, inputs, bars) -> tuple[Tensor | None, ...]:
    """The adjoints of `function(*inputs)`'s inputs, by autograd and differentiable themselves.

    For the backward pass of an `autograd.Function` under `create_graph`, which is where grad mode is on. PyTorch's
    `once_differentiable` is no refusal there: the node that would raise hangs on nothing, so `torch.autograd.grad` never
    comes to it and leaves its term out.

    Args:
        function (`Callable`): the plain formula, returning a tensor or a tuple of them.
        inputs (sequence of `torch.Tensor` or `None`): the inputs saved in the forward pass.
        bars (sequence of `torch.Tensor` or `None`): the adjoints of the outputs.
    """
    # views: one input may have been computed from another, whose adjoint is not to hold this one's
    views = tuple(x.view_as(x) if x is not None and x.requires_grad else x for x in inputs)
    outputs = function(*views)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    wanted = tuple(x if x is not None and x.requires_grad else None for x in views)
    return gradients(zip(outputs, bars, strict=True), wanted, create_graph=True)


def in_transform() -> bool:
    """Whether `torch.func`, forward-mode differentiation or `torch.jit.trace` looks at every operation of a call."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or torch.jit.is_tracing()


def by_formulas() -> bool:
    """Whether plain formulas are asked for: by a compiler, which fuses and differentiates them, or by a transform.

    Everywhere else, adjoints written by hand, operations in place and decisions on numbers at hand may be used.
    """
    return torch.compiler.is_compiling() or in_transform()


def differentiated_by_autograd() -> bool:
    """Whether the operations of a call are differentiated one by one, maybe more than once."""
    return in_transform() or (torch.is_grad_enabled() and not torch.compiler.is_compiling())


def can_look_at(x: Tensor) -> bool:
    """Whether a decision may depend on numbers of `x`: they are at hand, and no graph is being traced."""
    return x.device.type == "cpu" and not by_formulas()


LARGEST_STATE_ADJOINT = 1e12
"""Largest entry of a state's adjoint. On streams that make the recurrence locally chaotic the adjoint grows by a factor
per chunk and overflows over thousands of tokens; one such row would make the gradients of all parameters NaN."""


def bound_adjoint(bar: Tensor) -> Tensor:
    """The adjoint of a dual state `[..., in, out]`, scaled down where an entry exceeds the largest."""
    largest = bar.abs().amax((-2, -1), keepdim=True)  # on a CPU the infinity norm takes fourteen times as long
    if can_look_at(largest) and bool((largest <= LARGEST_STATE_ADJOINT).all()):
        return bar
    return bar * (LARGEST_STATE_ADJOINT / largest.clamp(min=LARGEST_STATE_ADJOINT))


class _BoundedAdjoint(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, bar: Tensor) -> Tensor:
        return bound_adjoint(bar)


class _TransformedBoundedAdjoint(_BoundedAdjoint):
    """With what transforms of `torch.func` ask for, and compilers refuse."""

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx, tangent: Tensor) -> Tensor:
        return tangent.view_as(tangent)


def with_bounded_adjoint(x: Tensor) -> Tensor:
    """x, its adjoint bounded: `bound_adjoint` for autograd. A traced graph goes without: it would hold Python's code."""
    if torch.jit.is_tracing():
        return x
    return (_TransformedBoundedAdjoint if in_transform() else _BoundedAdjoint).apply(x)


def summed_like(bar: Tensor, x: Tensor) -> Tensor:
    """The adjoint of a factor that was broadcast along its last axis, such as a gate of one number a head."""
    return bar if x.shape[-1] == bar.shape[-1] else bar.sum(-1, keepdim=True)
