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
"""gelu in its tanh form, with its slope and their derivatives: what a memory that differentiates itself needs of it.

`gelu(z) = z s` with `s = sigmoid(w)`, `w = z (b + 3 a z^2)`, which is the tanh form exactly, and

    gelu'(z)  = s (1 + z (1 - s) w'),                  w' = b + 9 a z^2
    gelu''(z) = s (1 - s) (2 w' + z w'' + z w'^2 (1 - 2 s)),   w'' = 18 a z

One sigmoid serves all three. On a CPU it costs a sixth of PyTorch's tanh gelu, whose second derivative is besides a
chain of some twenty operations.
"""

import math

import torch
from torch import Tensor

from .vjp import by_formulas, differentiable_vjp


_B = 2.0 * math.sqrt(2.0 / math.pi)
_A = _B * 0.044715 / 3.0


# the chains below take few passes, in place where they can: on a CPU they are bound by memory, and a fresh tensor costs two more


def _quadratic(z: Tensor, constant: float, factor: float) -> Tensor:
    """`constant + factor z^2`, in one pass."""
    return torch.addcmul(z.new_full((), constant), z, z, value=factor)


def _gate(z: Tensor) -> Tensor:
    return _quadratic(z, _B, 3.0 * _A).mul_(z).sigmoid_()


def _third_of_rate(z: Tensor) -> Tensor:
    """w' / 3."""
    return _quadratic(z, _B / 3.0, 3.0 * _A)


def _gate_of(lift: Tensor, z: Tensor) -> Tensor:
    """s, of `lift = z w' / 3`: w is that and 2 b z / 3."""
    return torch.add(lift, z, alpha=2.0 * _B / 3.0).sigmoid_()


def _times_spread_(x: Tensor, gate: Tensor) -> Tensor:
    """`x s (1 - s)` in the place of x."""
    return torch.ops.aten.sigmoid_backward.grad_input(x, gate, grad_input=x)


def _slope_(lift: Tensor, gate: Tensor) -> Tensor:
    """`s + s (1 - s) z w'` in the place of `z w' / 3`."""
    return torch.add(gate, _times_spread_(lift, gate), alpha=3.0, out=lift)


def _hidden_and_slope(z: Tensor) -> tuple[Tensor, Tensor]:
    lift = _third_of_rate(z).mul_(z)
    gate = _gate_of(lift, z)
    slope = _slope_(lift, gate)
    return gate.mul_(z), slope


def gelu_slope_curvature(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`gelu(z)`, `gelu'(z)` and `gelu''(z)`, outside autograd: for adjoints written by hand."""
    rate = _third_of_rate(z)
    lift = z * rate
    gate = _gate_of(lift, z)
    # 2 w' + z w'' = 4 w' - 2 b
    bent = torch.addcmul(lift, gate, lift, value=-2.0).add_(4.0 / 3.0)
    bent = torch.addcmul(z.new_full((), -2.0 * _B), bent, rate, value=9.0, out=bent)
    curvature = _times_spread_(bent, gate)
    slope = _slope_(lift, gate)
    return gate.mul_(z), slope, curvature


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor) -> Tensor:
        if not ctx.needs_input_grad[0]:
            return _gate(z).mul_(z)
        hidden, slope = _hidden_and_slope(z)
        ctx.save_for_backward(z, slope)
        return hidden

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        z, slope = ctx.saved_tensors
        # under `create_graph` (the reference differentiates the memory by autograd) the slope depends on z
        return grad * (gelu_and_slope(z)[1] if torch.is_grad_enabled() else slope)


class _GeluAndSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor) -> tuple[Tensor, Tensor]:
        if not ctx.needs_input_grad[0]:
            return _hidden_and_slope(z)
        hidden, slope, curvature = gelu_slope_curvature(z)
        ctx.save_for_backward(z, slope, curvature)
        return hidden, slope

    @staticmethod
    def backward(ctx, grad: Tensor, grad_slope: Tensor) -> Tensor | None:
        z, slope, curvature = ctx.saved_tensors
        if torch.is_grad_enabled():
            return differentiable_vjp(_formulas, (z,), (grad, grad_slope))[0]
        return torch.addcmul(grad * slope, grad_slope, curvature)


def _formulas(z: Tensor) -> tuple[Tensor, Tensor]:
    """`gelu(z)` and `gelu'(z)`, to be differentiated as often as one likes.

    For a compiler besides, which fuses them: that of torch 2.11 gets the gradients of the functions above wrong.
    """
    rate = 9.0 * _A * z * z + _B
    gate = torch.sigmoid((rate + 2.0 * _B) * z / 3.0)
    return z * gate, gate + gate * (1.0 - gate) * z * rate


def gelu(z: Tensor) -> Tensor:
    """`gelu(z)`."""
    if by_formulas():
        return _formulas(z)[0]
    return _Gelu.apply(z) if torch.is_grad_enabled() else _gate(z).mul_(z)


def gelu_and_slope(z: Tensor) -> tuple[Tensor, Tensor]:
    """`gelu(z)` and `gelu'(z)`."""
    if by_formulas():
        return _formulas(z)
    return _GeluAndSlope.apply(z) if torch.is_grad_enabled() else _hidden_and_slope(z)
