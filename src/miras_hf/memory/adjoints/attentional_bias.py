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
"""The derivatives of the attentional biases: from the adjoint of a residual to those of the error and of delta."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..attentional_bias import (
    L1,
    L2,
    AttentionalBias,
    Dot,
    HuberCoordinate,
    HuberMixture,
    HuberNorm,
    Lp,
    mixture,
    norm,
)
from ..vjp import can_look_at, derivative_of, summed_like, with_vjp


WithErrorVjp = tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor | None]]]


@derivative_of(AttentionalBias.error)
def error(bias: AttentionalBias, prediction: Tensor, value: Tensor):
    return prediction - value, lambda bar: (bar, bar.neg())


@derivative_of(Dot.error)
def dot_error(bias: Dot, prediction: Tensor, value: Tensor):
    return value.neg(), lambda bar: (None, bar.neg())


@derivative_of(AttentionalBias.residual)
def residual(bias: AttentionalBias, error: Tensor, delta: Tensor | None) -> WithErrorVjp:
    gradient, gradient_vjp = with_vjp(bias.gradient, error, delta)
    if bias.residual_clip is None:
        return gradient, gradient_vjp
    clipped, clip_vjp = _shortened(gradient, bias.residual_clip * math.sqrt(error.shape[-1]))
    return clipped, lambda bar: gradient_vjp(clip_vjp(bar)[0])


def _shortened(x: Tensor, limit: Tensor | float) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor | None]]]:
    """The second adjoint is that of the limit, `None` where nothing is as long."""
    size = norm(x)
    # the guard is rarely met, and to multiply by one costs more than to look
    if can_look_at(size) and bool((size <= limit).all()):
        return x, lambda bar: (bar, None)
    factor = (limit / size).clamp(max=1.0)

    def vjp(bar: Tensor) -> tuple[Tensor, Tensor]:
        # below one, the factor limit / ||x|| grows with the limit and falls with ||x||
        along = torch.where(factor < 1.0, (bar * x).sum(-1, keepdim=True) / size, 0.0)
        return (bar * factor).addcmul_(x, along * factor / size, value=-1.0), along

    return x * factor, vjp


@derivative_of(L2.gradient)
@derivative_of(Dot.gradient)
def l2(bias: L2 | Dot, error: Tensor, delta: None) -> WithErrorVjp:
    return error, lambda bar: (bar, None)


@derivative_of(Lp.gradient)
def lp(bias: Lp, error: Tensor, delta: None) -> WithErrorVjp:
    p, a = bias.power, bias.sharpness
    cut = error.clamp(-bias.error_cap, bias.error_cap)
    squared = cut.square() + bias.smoothing
    signed = p * (torch.sign(cut) if bias.sign == "exact" else torch.tanh(a * cut))
    if p != 3.0:
        signed = signed * squared.pow((p - 3.0) / 2.0)

    def vjp(bar: Tensor) -> tuple[Tensor, None]:
        # of p sign(e) |e|^(p-1): p sign(e) |e|^(p-3) (p-1) e, and where the sign is smooth p sign'(e) |e|^(p-1)
        slope = (signed * cut).mul_(p - 1.0)
        if bias.sign != "exact":
            slope = slope + p * a * (1.0 - torch.tanh(a * cut).square()) * squared.pow((p - 1.0) / 2.0)
        return (bar * slope).mul_(cut == error), None

    return signed * squared, vjp


@derivative_of(L1.gradient)
def l1(bias: L1, error: Tensor, delta: None) -> WithErrorVjp:
    inverse = (error.square() + bias.smoothing).rsqrt()
    return error * inverse, lambda bar: (bar * (bias.smoothing * inverse**3), None)


@derivative_of(HuberCoordinate.gradient)
def huber_coordinate(bias: HuberCoordinate, error: Tensor, delta: Tensor) -> WithErrorVjp:
    def vjp(bar: Tensor) -> tuple[Tensor, Tensor]:
        inside = bar * (error.abs() <= delta)
        return inside, summed_like((bar - inside).mul_(error.sign()), delta)

    return bias.gradient(error, delta), vjp


@derivative_of(HuberNorm.gradient)
def huber_norm(bias: HuberNorm, error: Tensor, delta: Tensor) -> WithErrorVjp:
    return _shortened(error, delta)


@derivative_of(HuberMixture.gradient)
def huber_mixture(bias: HuberMixture, error: Tensor, delta: Tensor) -> WithErrorVjp:
    inside, sign = norm(error) <= delta, torch.sign(error)

    def vjp(bar: Tensor) -> tuple[Tensor, Tensor]:
        of_delta = (bar * sign).sum(-1, keepdim=True)
        return bar * inside, torch.where(inside, 0.0, of_delta)

    return mixture(error, sign, inside, delta), vjp
