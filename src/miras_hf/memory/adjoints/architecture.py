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

from ..architecture import (
    Factors,
    GatedMLPMemory,
    LayeredMemory,
    MatrixMemory,
    MLPMemory,
    VectorMemory,
    normalise_vjp,
    row_dot,
)
from ..gelu import gelu_and_slope, gelu_slope_curvature
from ..vjp import derivative_of


WithVjp = Callable[..., tuple[Tensor, Callable[[Tensor], Tensor]]]


def _output(memory: LayeredMemory, x: Tensor, z: Tensor, norm_weight: Tensor, norm_bias: Tensor):
    """`LayeredMemory.output`; the vjp returns the adjoints of z, the norm's weight and its bias: that of x is the result's,
    if it has any."""
    if not memory.norm:
        return x + z if memory.residual else z, lambda y_bar: (y_bar, None, None)
    normed, *statistics = memory.normalise(z)
    affine = torch.addcmul(norm_bias, normed, norm_weight)

    def vjp(y_bar: Tensor):
        z_bar = normalise_vjp(y_bar * norm_weight, z, *statistics)
        return z_bar, (y_bar * normed).sum(-2, keepdim=True), y_bar.sum(-2, keepdim=True)

    return x + affine if memory.residual else affine, vjp


def _output_gradient(
    memory: LayeredMemory, k: Tensor, z: Tensor, residual: WithVjp, norm_weight: Tensor, norm_bias: Tensor
):
    """`LayeredMemory.output_gradient`; the vjp returns the adjoints of the prediction, of z, and of the norm's weight and
    bias."""
    if not memory.norm:
        r, residual_vjp = residual(k + z if memory.residual else z)

        def vjp_without_norm(dz_bar: Tensor):
            prediction_bar = residual_vjp(dz_bar)
            # two that are added to
            return prediction_bar, prediction_bar.clone(), None, None

        return r, vjp_without_norm
    normed, *statistics = memory.normalise(z)
    affine = torch.addcmul(norm_bias, normed, norm_weight)
    r, residual_vjp = residual(k + affine if memory.residual else affine)
    grad = r * norm_weight
    dz = normalise_vjp(grad, z, *statistics)

    def vjp(dz_bar: Tensor):
        # dz = inverse_std P grad, P g = g - mean(g) - normed mean(g normed): P is symmetric
        grad_bar = normalise_vjp(dz_bar, z, *statistics)
        prediction_bar = residual_vjp(grad_bar * norm_weight)
        # P has normed twice, the prediction once; inverse_std stands before P, and in normed
        scale = statistics[-1] / z.shape[-1]
        normed_bar = prediction_bar * norm_weight
        normed_bar.addcmul_(dz_bar, row_dot(grad, normed) * scale, value=-1.0)
        normed_bar.addcmul_(grad, row_dot(dz_bar, normed) * scale, value=-1.0)
        z_bar = normalise_vjp(normed_bar, z, *statistics)
        z_bar.addcmul_(normed, row_dot(dz_bar, dz) * scale, value=-1.0)
        weight_bar = (grad_bar * r).addcmul_(prediction_bar, normed).sum(-2, keepdim=True)
        return prediction_bar, z_bar, weight_bar, prediction_bar.sum(-2, keepdim=True)

    return dz, vjp


@derivative_of(MLPMemory.read, MLPMemory.normalise, MLPMemory.output)
def read_mlp(memory: MLPMemory, linear: WithVjp, x: Tensor, norm_weight: Tensor, norm_bias: Tensor):
    hidden, slopes, vjps = x, [], []
    for layer in range(memory.depth):
        z, linear_vjp = linear(layer, hidden)
        vjps.append(linear_vjp)
        if layer + 1 < memory.depth:
            hidden, slope = gelu_and_slope(z)
            slopes.append(slope)
    y, output_vjp = _output(memory, x, z, norm_weight, norm_bias)

    def vjp(y_bar: Tensor):
        z_bar, *norm_bars = output_vjp(y_bar)
        x_bar = vjps[-1](z_bar)
        for linear_vjp, slope in zip(vjps[-2::-1], reversed(slopes), strict=True):
            x_bar = linear_vjp(x_bar.mul_(slope))
        return None, x_bar.add_(y_bar) if memory.residual else x_bar, *norm_bars

    return y, vjp


@derivative_of(MLPMemory.write, MLPMemory.normalise, MLPMemory.output_gradient)
def write_mlp(
    memory: MLPMemory,
    weights: tuple[Tensor, ...],
    k: Tensor,
    residual: WithVjp,
    norm_weight: Tensor,
    norm_bias: Tensor,
):
    inputs, slopes, curvatures = [k], [], []
    for weight in weights[:-1]:
        hidden, slope, curvature = gelu_slope_curvature(torch.bmm(inputs[-1], weight))
        inputs.append(hidden)
        slopes.append(slope)
        curvatures.append(curvature)
    last, output_vjp = _output_gradient(
        memory, k, torch.bmm(inputs[-1], weights[-1]), residual, norm_weight, norm_bias
    )
    first, layers = memory.fixed, range(memory.fixed, len(slopes))  # hidden units behind weights that are written
    gradients = [*slopes, last]
    for i in reversed(layers):
        dhidden = torch.bmm(gradients[i + 1], weights[i + 1].mT)
        gradients[i] = dhidden * slopes[i]
        curvatures[i].mul_(dhidden)  # all that is left of both: gelu''(z) dhidden

    def vjp(bars: tuple[Factors, ...]):
        inputs_bar, gradients_bar = ([None] * first + [*of_layers] for of_layers in zip(*bars, strict=True))
        weights_bar = [None] * len(weights)
        # dz_i = (dz_{i+1} w_{i+1}^T) gelu'(z_i), from the keys on
        for i in layers:
            dhidden_bar = gradients_bar[i] * slopes[i]
            weights_bar[i + 1] = torch.bmm(dhidden_bar.mT, gradients[i + 1])
            gradients_bar[i + 1].baddbmm_(dhidden_bar, weights[i + 1])
        prediction_bar, z_bar, *norm_bars = output_vjp(gradients_bar[-1])
        for i in reversed(range(len(weights))):
            if weights_bar[i] is None:
                weights_bar[i] = torch.bmm(inputs[i].mT, z_bar)
            else:
                weights_bar[i].baddbmm_(inputs[i].mT, z_bar)
            if inputs_bar[i] is None:
                input_bar = torch.bmm(z_bar, weights[i].mT)
            else:
                input_bar = inputs_bar[i].baddbmm_(z_bar, weights[i].mT)
            if i > 0:
                z_bar = input_bar.mul_(slopes[i - 1])
                z_bar = z_bar.addcmul_(gradients_bar[i - 1], curvatures[i - 1]) if i > first else z_bar
        k_bar = input_bar.add_(prediction_bar) if memory.residual else input_bar
        return tuple(weights_bar), k_bar, None, *norm_bars

    return tuple(map(Factors, inputs[first:], gradients[first:])), vjp


@derivative_of(GatedMLPMemory.read, GatedMLPMemory.normalise, GatedMLPMemory.output)
def read_gated(memory: GatedMLPMemory, linear: WithVjp, x: Tensor, norm_weight: Tensor, norm_bias: Tensor):
    z, gate_vjp = linear(0, x)
    gate, slope = gelu_and_slope(z)
    up, up_vjp = linear(1, x)
    z, last_vjp = linear(2, gate * up)
    y, output_vjp = _output(memory, x, z, norm_weight, norm_bias)

    def vjp(y_bar: Tensor):
        z_bar, *norm_bars = output_vjp(y_bar)
        hidden_bar = last_vjp(z_bar)
        x_bar = up_vjp(hidden_bar * gate).add_(gate_vjp(hidden_bar * up * slope))
        return None, x_bar.add_(y_bar) if memory.residual else x_bar, *norm_bars

    return y, vjp


@derivative_of(GatedMLPMemory.write, GatedMLPMemory.normalise, GatedMLPMemory.output_gradient)
def write_gated(
    memory: GatedMLPMemory,
    weights: tuple[Tensor, ...],
    k: Tensor,
    residual: WithVjp,
    norm_weight: Tensor,
    norm_bias: Tensor,
):
    w1, w2, w3 = weights
    gate, slope, curvature = gelu_slope_curvature(torch.bmm(k, w1))
    up = torch.bmm(k, w2)
    hidden = gate * up
    dz, output_vjp = _output_gradient(memory, k, torch.bmm(hidden, w3), residual, norm_weight, norm_bias)
    dhidden = torch.bmm(dz, w3.mT)
    bent = curvature.mul_(dhidden).mul_(up)  # gelu''(z) dhidden o up

    def vjp(bars: tuple[Factors, ...]):
        hidden_bar, dz_bar = bars[-1]
        if not memory.fixed:
            # dgate = dhidden o up o gelu'(z), dup = dhidden o gate, dhidden = dz w3^T
            (k_bar, dgate_bar), (k_bar_of_up, dup_bar) = bars[:-1]
            of_slope = dgate_bar * slope
            dhidden_bar = torch.addcmul(of_slope * up, dup_bar, gate)
            dz_bar.baddbmm_(dhidden_bar, w3)
        prediction_bar, last_bar, *norm_bars = output_vjp(dz_bar)
        hidden_bar.baddbmm_(last_bar, w3.mT)
        w3_bar = torch.bmm(hidden.mT, last_bar)
        up_bar, z_bar = hidden_bar * gate, hidden_bar * up
        if not memory.fixed:
            w3_bar.baddbmm_(dhidden_bar.mT, dz)
            up_bar.addcmul_(of_slope, dhidden)
            z_bar.addcmul_(dup_bar, dhidden)
        z_bar.mul_(slope)
        if not memory.fixed:
            z_bar.addcmul_(dgate_bar, bent)
        input_bar = torch.bmm(z_bar, w1.mT).baddbmm_(up_bar, w2.mT)
        if not memory.fixed:
            input_bar.add_(k_bar).add_(k_bar_of_up)
        input_bar = input_bar.add_(prediction_bar) if memory.residual else input_bar
        return (torch.bmm(k.mT, z_bar), torch.bmm(k.mT, up_bar), w3_bar), input_bar, None, *norm_bars

    factors = Factors(k, dhidden * up * slope), Factors(k, dhidden * gate), Factors(hidden, dz)
    return factors[memory.fixed :], vjp


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
        k_bar = bars[0].inputs.baddbmm_(prediction_bar, weights[0].mT)
        return (torch.bmm(k.mT, prediction_bar),), k_bar, None, None, None

    return (Factors(k, r),), vjp


@derivative_of(VectorMemory.read)
def read_vector(memory: VectorMemory, linear: WithVjp, x: Tensor, norm_weight: Tensor, norm_bias: Tensor):
    w, linear_vjp = linear(0, torch.ones_like(x[..., :1]))

    def vjp(y_bar: Tensor):
        linear_vjp(y_bar * x)  # to the weight and what was written; what it multiplies is one
        return None, y_bar * w, None, None

    return x * w, vjp


@derivative_of(VectorMemory.write)
def write_vector(
    memory: VectorMemory,
    weights: tuple[Tensor, ...],
    k: Tensor,
    residual: WithVjp,
    norm_weight: Tensor,
    norm_bias: Tensor,
):
    r, residual_vjp = residual(k * weights[0])

    def vjp(bars: tuple[Factors, ...]):
        gradient_bar = bars[0].gradients
        prediction_bar = residual_vjp(gradient_bar * k)
        k_bar = torch.addcmul(gradient_bar * r, prediction_bar, weights[0])
        return ((prediction_bar * k).sum(-2, keepdim=True),), k_bar, None, None, None

    return (Factors(torch.ones_like(k[..., :1]), k * r),), vjp
