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
"""The derivatives of the architectures' read and write.

Their callers hand them `linear` and `residual` as a derivative does: with the map from the result's adjoint to that of
the last argument. The adjoints of the norm's weight and bias are those of each row alone.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..architecture import Factors, MatrixMemory, MLPMemory, normalise_vjp, row_dot
from ..gelu import gelu_and_slope, gelu_slope_curvature
from ..vjp import derivative_of


WithVjp = Callable[..., tuple[Tensor, Callable[[Tensor], Tensor]]]


@derivative_of(MLPMemory.read, MLPMemory.normalise)
def read_mlp(memory: MLPMemory, linear: WithVjp, x: Tensor, norm_weight: Tensor, norm_bias: Tensor):
    z1, first_vjp = linear(0, x)
    hidden, slope = gelu_and_slope(z1)
    z2, second_vjp = linear(1, hidden)
    normed, *statistics = memory.normalise(z2)

    def vjp(y_bar: Tensor):
        z2_bar = normalise_vjp(y_bar * norm_weight, z2, *statistics)
        z1_bar = second_vjp(z2_bar).mul_(slope)
        x_bar = first_vjp(z1_bar).add_(y_bar)
        return None, x_bar, (y_bar * normed).sum(-2, keepdim=True), y_bar.sum(-2, keepdim=True)

    return x + torch.addcmul(norm_bias, normed, norm_weight), vjp


@derivative_of(MLPMemory.write, MLPMemory.normalise)
def write_mlp(
    memory: MLPMemory,
    weights: tuple[Tensor, ...],
    k: Tensor,
    residual: WithVjp,
    norm_weight: Tensor,
    norm_bias: Tensor,
):
    w1, w2 = weights
    hidden, slope, curvature = gelu_slope_curvature(torch.bmm(k, w1))
    z2 = torch.bmm(hidden, w2)
    normed, *statistics = memory.normalise(z2)
    r, residual_vjp = residual(k + torch.addcmul(norm_bias, normed, norm_weight))
    grad = r * norm_weight
    dz2 = normalise_vjp(grad, z2, *statistics)
    dhidden = torch.bmm(dz2, w2.mT)
    dz1 = dhidden * slope
    bent = curvature.mul_(dhidden)  # all that is left of both: gelu''(z1) dhidden

    def vjp(bars: tuple[Factors, ...]):
        (k_bar, dz1_bar), (hidden_bar, dz2_bar) = bars
        # dz1 = (dz2 w2^T) gelu'(z1)
        dhidden_bar = dz1_bar * slope
        dz2_bar = torch.baddbmm(dz2_bar, dhidden_bar, w2)
        w2_bar = torch.bmm(dhidden_bar.mT, dz2)
        # dz2 = inverse_std P grad, P g = g - mean(g) - normed mean(g normed): P is symmetric
        grad_bar = normalise_vjp(dz2_bar, z2, *statistics)
        prediction_bar = residual_vjp(grad_bar * norm_weight)
        # P has normed twice, the prediction once; inverse_std stands before P, and in normed
        scale = statistics[-1] / z2.shape[-1]
        normed_bar = prediction_bar * norm_weight
        normed_bar.addcmul_(dz2_bar, row_dot(grad, normed) * scale, value=-1.0)
        normed_bar.addcmul_(grad, row_dot(dz2_bar, normed) * scale, value=-1.0)
        z2_bar = normalise_vjp(normed_bar, z2, *statistics)
        z2_bar.addcmul_(normed, row_dot(dz2_bar, dz2) * scale, value=-1.0)
        hidden_bar = torch.baddbmm(hidden_bar, z2_bar, w2.mT)
        w2_bar.baddbmm_(hidden.mT, z2_bar)
        z1_bar = hidden_bar.mul_(slope).addcmul_(dz1_bar, bent)
        k_bar = torch.baddbmm(k_bar, z1_bar, w1.mT).add_(prediction_bar)
        weight_bar = (grad_bar * r).addcmul_(prediction_bar, normed).sum(-2, keepdim=True)
        return (torch.bmm(k.mT, z1_bar), w2_bar), k_bar, None, weight_bar, prediction_bar.sum(-2, keepdim=True)

    return (Factors(k, dz1), Factors(hidden, dz2)), vjp


@derivative_of(MatrixMemory.read)
def read_matrix(memory: MatrixMemory, linear: WithVjp, x: Tensor, norm_weight: Tensor, norm_bias: Tensor):
    y, linear_vjp = linear(0, x)
    return y, lambda y_bar: (None, linear_vjp(y_bar), None, None)


@derivative_of(MatrixMemory.write)
def write_matrix(
    memory: MatrixMemory,
    weights: tuple[Tensor, ...],
    k: Tensor,
    residual: WithVjp,
    norm_weight: Tensor,
    norm_bias: Tensor,
):
    r, residual_vjp = residual(torch.bmm(k, weights[0]))

    def vjp(bars: tuple[Factors, ...]):
        prediction_bar = residual_vjp(bars[0].gradients)
        k_bar = torch.baddbmm(bars[0].inputs, prediction_bar, weights[0].mT)
        return (torch.bmm(k.mT, prediction_bar),), k_bar, None, None, None

    return (Factors(k, r),), vjp
