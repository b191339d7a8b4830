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
"""What a mixer does token by token around its memory, with adjoints that keep less than autograd does.

Autograd keeps what every small operation has read, tensors of the whole length; over a mixer they take more than the
memory does. Here each piece keeps its inputs, or its result where that is kept anyway, and computes the rest again. With
`y_bar` the adjoint of y, r the inverse norm, per head, and products channel by channel:

    convolution   u_t = b + sum_s w_s x_{t-s},  y = silu(u) or u
                  x_bar_t = sum_s w_s u_bar_{t+s},  w_s_bar = sum_t u_bar_t x_{t-s},  b_bar = sum_t u_bar_t
    l2 norm       y = s r x,  r = (x . x + eps)^(-1/2)       x_bar = s r (y_bar - y (y . y_bar) / s^2)
    gated norm    y = w n silu(g),  n = r x                  n_bar = y_bar w silu(g),  x_bar = r (n_bar - n mean(n n_bar))
    step          y = m sigmoid(u)                           u_bar = y_bar y (1 - y / m)
    retention     y = -a softplus(u)                         u_bar = -y_bar a (1 - exp(y / a)),  a_bar = y . y_bar / a

Under `torch.compile`, which fuses and recomputes as it likes, the formulas are left to it; transforms of `torch.func`,
forward mode, traces and decoding take them as they are. Under `create_graph` an adjoint is differentiable itself: by
autograd of the formula, or because it is written in terms of results, which know where they come from.

Squares of more than 1e19 leave float32, and so do cubes of inverse norms below 1e-13, which autograd takes. A norm
therefore takes the squares of `x / s`, where a row's largest entry, s, is above `LARGEST_SQUARED`, and s = 1 elsewhere,
which changes nothing: neither result nor gradient depends on s.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .memory.state import compute_dtype
from .memory.vjp import by_formulas, can_look_at, differentiable_vjp


LARGEST_SQUARED = 1e8
"""Rows whose entries are all below this are squared as they are."""


def _by_hand() -> bool:
    return torch.is_grad_enabled() and not by_formulas()


def causal_convolution(
    x: Tensor,
    weight: Tensor,
    tail: Tensor | None = None,
    position: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """The depthwise convolution of each token with the tokens before it, and its `silu`.

    Args:
        x (`torch.Tensor` of shape `[batch, tokens, channels]`): inputs.
        weight (`torch.Tensor` of shape `[channels, kernel_size]`): the last column is the token's own.
        tail (`torch.Tensor` of shape `[batch, kernel_size - 1, channels]`, *optional*): the inputs before `x`.
        position (`torch.Tensor` of shape `[batch, tokens]`, *optional*):
            Tokens since the sequence's start: products stop at the border of a packed sequence.
        bias (`torch.Tensor` of shape `[channels]`, *optional*): what is added before the activation.
        silu (`bool`, *optional*, defaults to `True`): whether the activation follows.
    """
    if tail is None and not by_formulas():
        return _Convolution.apply(x, weight, bias, position, silu)
    if x.shape[1] == 1 and tail is not None:
        output = (torch.cat((tail, x), dim=1) * weight.mT).sum(dim=1, keepdim=True)
        output = output if bias is None else output + bias
        # nobody may write into it while a gradient is to come
        return F.silu(output, inplace=not torch.is_grad_enabled()) if silu else output
    return _convolution(x, weight, bias, position, silu, tail)


def _convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor | None, silu: bool, tail: Tensor | None = None
) -> Tensor:
    tokens, before = x.shape[1], weight.shape[1] - 1
    padded = F.pad(x, (0, 0, before, 0)) if tail is None else torch.cat((tail, x), dim=1)
    taps = _taps(weight)
    output = x * taps[0]
    for shift in range(1, before + 1):
        shifted = padded[:, before - shift : before - shift + tokens]
        if position is not None:
            shifted = shifted.masked_fill((position < shift)[..., None], 0.0)
        output = torch.addcmul(output, shifted, taps[shift])
    output = output if bias is None else output + bias
    return F.silu(output) if silu else output


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor | None, silu: bool) -> Tensor:
        ctx.silu = silu
        ctx.save_for_backward(x, weight, bias, position)
        u = _convolved(x, weight, bias, position)
        return F.silu(u, inplace=True) if silu else u

    @staticmethod
    def backward(ctx, y_bar: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, position = ctx.saved_tensors
        if torch.is_grad_enabled():

            def formula(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
                return _convolution(x, weight, bias, position, ctx.silu)

            if bias is None:
                return *differentiable_vjp(formula, (x, weight), (y_bar,)), None, None, None
            return *differentiable_vjp(formula, (x, weight, bias), (y_bar,)), None, None
        taps = _taps(weight)
        u_bar = y_bar
        if ctx.silu:
            u = _convolved(x, weight, bias, position)
            u_bar = torch.ops.aten.silu_backward.grad_input(y_bar, u, grad_input=u)
        x_bar, taps_bar = u_bar * taps[0], torch.zeros_like(taps, dtype=u_bar.dtype)
        product = u_bar * x
        torch.sum(product, (0, 1), out=taps_bar[0])
        for shift, outside in _shifts(x, weight, position):
            late = u_bar[:, shift:] if outside is None else u_bar[:, shift:].masked_fill(outside, 0.0)
            x_bar[:, :-shift].addcmul_(late, taps[shift])
            torch.sum(torch.mul(late, x[:, :-shift], out=product[:, shift:]), (0, 1), out=taps_bar[shift])
        bias_bar = None if bias is None else u_bar.sum((0, 1)).to(bias.dtype)
        return x_bar.to(x.dtype), taps_bar.flip(0).mT.to(weight.dtype), bias_bar, None, None


def _taps(weight: Tensor) -> Tensor:
    """The weights of every shift, `[kernel_size, channels]`, contiguous: strided ones cost a factor of four on a CPU."""
    return weight.mT.flip(0).contiguous()


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor | None) -> Tensor:
    taps = _taps(weight)
    u = x * taps[0]
    for shift, outside in _shifts(x, weight, position):
        # selected, not multiplied: what is not finite stays in its sequence
        early = x[:, :-shift] if outside is None else x[:, :-shift].masked_fill(outside, 0.0)
        u[:, shift:].addcmul_(early, taps[shift])
    return u if bias is None else u.add_(bias)


def _shifts(x: Tensor, weight: Tensor, position: Tensor | None) -> Iterator[tuple[int, Tensor | None]]:
    """Shifts that reach a token, and where they leave the sequence of a token that has fewer before it."""
    for shift in range(1, min(weight.shape[1], x.shape[1])):
        yield shift, None if position is None else (position[:, shift:] < shift).unsqueeze(-1)


def _scale_of_squares(x: Tensor, squares: Tensor) -> Tensor | None:
    """The s of every row whose squares make `squares`; None if it is one everywhere. Nothing depends on it."""
    # not a number is not below anything, either
    if can_look_at(squares) and (squares.numel() == 0 or squares.max().item() <= LARGEST_SQUARED**2):
        return None
    largest = x.detach().abs().amax(-1, keepdim=True)
    return torch.where(largest > LARGEST_SQUARED, largest, 1.0)


def l2norm(x: Tensor, eps: float = 1e-6, length: float = 1.0) -> Tensor:
    """x over its l2 norm along the last axis, times `length`."""
    return _L2Norm.apply(x, eps, length)[0] if _by_hand() else _l2norm(x, eps, length)[0]


def _l2norm(x: Tensor, eps: float, length: float) -> tuple[Tensor, Tensor]:
    """The result and its factor, the length over the norm."""
    total = (x * x).sum(dim=-1, keepdim=True)
    scale = _scale_of_squares(x, total)
    if scale is None:
        factor = torch.rsqrt(total + eps)
        factor = factor if length == 1.0 else length * factor
        return x * factor, factor
    x = x / scale
    factor = length * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + eps / scale.square())
    return x * factor, factor / scale


def _normed(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x over its root mean square, and the latter's inverse."""
    mean = (x * x).mean(-1, keepdim=True)
    scale = _scale_of_squares(x, mean)
    if scale is None:
        inverse = torch.rsqrt(mean + eps)
        return x * inverse, inverse
    x = x / scale
    inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps / scale.square())
    return x * inverse, inverse / scale


class _L2Norm(torch.autograd.Function):
    """The factor is a result, too, so that the adjoint is differentiable in terms of the two."""

    @staticmethod
    def forward(ctx, x: Tensor, eps: float, length: float) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        y, factor = _l2norm(x, eps, length)
        ctx.length = length
        ctx.save_for_backward(y, factor)
        return y, factor

    @staticmethod
    def backward(ctx, y_bar: Tensor | None, factor_bar: Tensor | None) -> tuple[Tensor | None, None, None]:
        y, factor = ctx.saved_tensors
        x_bar = None
        if y_bar is not None:
            along = (y * y_bar).sum(dim=-1, keepdim=True) / ctx.length**2
            x_bar = torch.addcmul(y_bar, y, along, value=-1.0)
            x_bar = x_bar * factor if torch.is_grad_enabled() else x_bar.mul_(factor)
        if factor_bar is not None:  # of slope -r^3 x, r the factor over the length
            bent = -factor_bar * (factor / ctx.length).square() * y
            x_bar = bent if x_bar is None else x_bar + bent
        return x_bar, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight` times x over its root mean square along the last axis, which is computed in float32 at least."""
    return weight * _normed(x.to(compute_dtype(x)), eps)[0].to(x.dtype)


def rms_norm_of_heads(x: Tensor, weight: Tensor, eps: float, together: int) -> Tensor:
    """`rms_norm` of `[..., heads, head_dim]` with one mean square for every `together` heads that stand side by side."""
    groups = x.unflatten(-2, (-1, together))
    return rms_norm(groups.flatten(-2), weight.repeat(together), eps).view(groups.shape).flatten(-3, -2)


def silu_gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm(x) * silu(gate)`, both of one shape and dtype."""
    if _by_hand():
        return _SiLUGatedRMSNorm.apply(x, gate, weight, eps)
    return _silu_gated_rms_norm(x, gate, weight, eps)


def _silu_gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms_norm(x, weight, eps) * F.silu(gate)


class _SiLUGatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.eps = eps
        ctx.save_for_backward(x, gate, weight)
        return rms_norm(x, weight, eps).mul_(F.silu(gate))

    @staticmethod
    def backward(ctx, y_bar: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *differentiable_vjp(lambda *x: _silu_gated_rms_norm(*x, ctx.eps), (x, gate, weight), (y_bar,)), None
        wide, wide_gate, y_bar = (t.to(compute_dtype(x)) for t in (x, gate, y_bar))
        normed, inverse = _normed(wide, ctx.eps)
        bar = F.silu(wide_gate).mul_(y_bar)
        product = bar * normed
        weight_bar = product.flatten(0, -2).sum(0)
        along = product.mul_(weight).mean(-1, keepdim=True)
        product = torch.mul(normed, weight, out=product).mul_(y_bar)
        gate_bar = torch.ops.aten.silu_backward.grad_input(product, wide_gate, grad_input=product)
        x_bar = bar.mul_(weight).addcmul_(normed, along, value=-1.0).mul_(inverse)
        return x_bar.to(x.dtype), gate_bar.to(gate.dtype), weight_bar.to(weight.dtype), None


def scaled_sigmoid(u: Tensor, scale: float) -> Tensor:
    """`scale * sigmoid(u)`."""
    return _ScaledSigmoid.apply(u, scale) if _by_hand() else scale * torch.sigmoid(u)


class _ScaledSigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        y = torch.sigmoid(u).mul_(scale)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, y_bar: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        slope = torch.addcmul(y, y, y, value=-1.0 / ctx.scale)
        return slope * y_bar if torch.is_grad_enabled() else slope.mul_(y_bar), None


def negative_softplus(u: Tensor, scale: Tensor) -> Tensor:
    """`-scale * softplus(u)`, the scale positive and broadcast over leading axes and the last one."""
    return _NegativeSoftplus.apply(u, scale) if _by_hand() else -F.softplus(u) * scale


class _NegativeSoftplus(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u: Tensor, scale: Tensor) -> Tensor:
        y = F.softplus(u).neg_().mul_(scale)
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, y_bar: Tensor) -> tuple[Tensor, Tensor]:
        y, scale = ctx.saved_tensors
        scale = scale.clamp(min=1e-30)  # an exponential that may have gone under
        scale_bar = (y * y_bar).sum_to_size(scale.shape) / scale
        # softplus' is the sigmoid, 1 - exp(-softplus)
        if torch.is_grad_enabled():
            return (y / scale).expm1() * scale * y_bar, scale_bar
        return (y / scale).expm1_().mul_(scale).mul_(y_bar), scale_bar
