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
"""Vector-Jacobian products of functions that are written elsewhere: the registry, and autograd for what it lacks.

A derivative is a function of its own, registered for the forward function that it belongs to (`adjoints/`). It takes the
same arguments and returns the same result, and besides a function `vjp` that takes the adjoint of the result (the
gradient of the outer loss with respect to it) to the adjoints of the arguments, one each. It keeps exactly what its
`vjp` needs, and runs outside autograd. A `vjp` may write into the adjoint that it is given, and is called once.

Derivatives are optional. A forward function without one is differentiated by autograd, so that a new choice is a
forward method and nothing else. So is a method that a subclass overrides: it is another function, and the registry does
not know it.
"""

import functools
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten


DERIVATIVES: dict[Callable, tuple[Callable, tuple[FunctionType, ...]]] = {}


def derivative_of(*methods: FunctionType) -> Callable[[Callable], Callable]:
    """Registers a derivative for the first method, and names the other methods of the class whose formulas it knows."""

    def register(derivative: Callable) -> Callable:
        DERIVATIVES[methods[0]] = derivative, methods[1:]
        return derivative

    return register


def find_derivative(method: Callable) -> Callable | None:
    """The derivative that belongs to a bound method, as a function of its arguments, or `None`.

    There is none where a class has overridden the method, or one of those that the derivative has been written for.
    """
    derivative, others = DERIVATIVES.get(getattr(method, "__func__", method), (None, ()))
    if derivative is None:
        return None
    choice = cast(MethodType, method).__self__
    kind = type(choice)
    for other in others:
        if getattr(kind, other.__name__) is not other:
            return None
    return functools.partial(derivative, choice)


def with_vjp(method: Callable, *inputs: Any) -> tuple[Any, Callable]:
    """`method(*inputs)` and its vjp, by the method's derivative or by autograd."""
    return (find_derivative(method) or functools.partial(by_autograd, method))(*inputs)


def by_autograd(function: Callable, *inputs: Any) -> tuple[Any, Callable]:
    """`function(*inputs)` and its vjp; inputs and result are tensors or trees of them, of which some may be None.

    The adjoints of what is no tensor or has no part in the result are None.
    """
    leaves, inputs_spec = tree_flatten(inputs)
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() if isinstance(x, Tensor) else x for x in leaves]
        outputs, spec = tree_flatten(function(*tree_unflatten(leaves, inputs_spec)))

    def vjp(bar: Any) -> tuple[Any, ...]:
        pairs = zip(outputs, tree_leaves(bar), strict=True)
        return tree_unflatten(gradients(pairs, leaves), inputs_spec)

    return tree_unflatten([y.detach() if isinstance(y, Tensor) else y for y in outputs], spec), vjp


def gradients(outputs_and_bars, leaves, **options) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad`, `options` its own, where outputs, their adjoints and leaves may be something else, which
    has none."""
    pairs = [(y, b) for y, b in outputs_and_bars if isinstance(b, Tensor) and y.requires_grad]
    present = [x for x in leaves if isinstance(x, Tensor)]
    if not pairs or not present:
        return (None,) * len(leaves)
    outputs, bars = zip(*pairs, strict=True)
    grads = iter(torch.autograd.grad(outputs, present, bars, allow_unused=True, **options))
    return tuple(next(grads) if isinstance(x, Tensor) else None for x in leaves)


def added(bar: Any, more: Any) -> Any:
    """The sum of two adjoints, tensors or trees of them, None being zero; may write into the first."""
    if more is None:
        return bar
    if bar is None:
        return more
    if isinstance(bar, Tensor):
        return bar.add_(more)
    if not isinstance(bar, tuple):
        return bar
    parts = map(added, bar, more)
    return type(bar)(*parts) if hasattr(bar, "_fields") else tuple(parts)


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
    return not torch.compiler.is_compiling() and _is_looked_at()


def _is_looked_at() -> bool:
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or torch.jit.is_tracing()


def check_not_transformed(name: str) -> None:
    """Raises a `RuntimeError` where a function that writes into its state is transformed."""
    if in_transform() and not torch.jit.is_tracing():
        raise RuntimeError(
            f"`{name}` writes into its `state` and cannot be transformed by `torch.func` or differentiated in forward mode; "
            "`step_miras` can."
        )


def by_formulas() -> bool:
    """Whether plain formulas are asked for: by a compiler, which fuses and differentiates them, or by a transform.

    Everywhere else, adjoints written by hand, operations in place and decisions on numbers at hand may be used.
    """
    return torch.compiler.is_compiling() or _is_looked_at()


def differentiated_by_autograd() -> bool:
    """Whether the operations of a call are differentiated one by one, maybe more than once."""
    return in_transform() or (torch.is_grad_enabled() and not torch.compiler.is_compiling())


def can_look_at(x: Tensor) -> bool:
    """Whether a decision may depend on numbers of `x`: they are at hand, and no graph is being traced."""
    return x.device.type == "cpu" and not by_formulas()


def lies_within(x: Tensor, low: float, high: float) -> bool:
    """Whether all numbers of `x` are at hand and within bounds; one that is not a number is not.

    It takes one pass that writes nothing, where to cut them or to take magnitudes writes a copy.
    """
    if not can_look_at(x):
        return False
    if x.numel() == 0:
        return True
    least, largest = torch.aminmax(x)
    return low <= least.item() and largest.item() <= high


LARGEST_STATE_ADJOINT = 1e12
"""Largest entry of a state's adjoint. On streams that make the recurrence locally chaotic the adjoint grows by a factor
per chunk and overflows over thousands of tokens; one such row would make the gradients of all parameters NaN."""


def bound_adjoint(bar: Tensor) -> Tensor:
    """The adjoint of a dual state `[..., in, out]`, scaled down where an entry exceeds the largest."""
    if lies_within(bar, -LARGEST_STATE_ADJOINT, LARGEST_STATE_ADJOINT):
        return bar
    largest = bar.abs().amax((-2, -1), keepdim=True)  # on a CPU the infinity norm takes fourteen times as long
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
    """x, its adjoint bounded: `bound_adjoint` for autograd. Nothing is bound where nothing is differentiated, nor in a traced
    graph, which would hold Python's code."""
    if torch.jit.is_tracing() or not torch.is_grad_enabled():
        return x
    return (_TransformedBoundedAdjoint if in_transform() else _BoundedAdjoint).apply(x)


def summed_like(bar: Tensor, x: Tensor) -> Tensor:
    """The adjoint of a factor that was broadcast along its last axis, such as a gate of one number a head."""
    return bar if x.shape[-1] == bar.shape[-1] else bar.sum(-1, keepdim=True)
