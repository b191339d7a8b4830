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
"""Choice (i) of Miras: the memory's architecture, a small network per head whose weights are the memory.

An architecture is written once in terms of `linear(layer, x)`, the product of activations with one of its weights.
The caller decides which weights these are: those of a chunk's start (write), those of every token's own time (read).
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from .declared import Choice, parameter
from .gelu import gelu, gelu_and_slope
from .vjp import differentiated_by_autograd


Linear = Callable[[int, Tensor], Tensor]
Residual = Callable[[Tensor], Tensor]

MOST_LAYERS = 16
"""Largest depth of an MLP memory."""

HAS_HIDDEN = {"memory_depth": range(2, MOST_LAYERS + 1)}


class Factors(NamedTuple):
    """One layer's gradients of a chunk in rank-one form: token i's gradient is `inputs[i]^T gradients[i]`.

    Args:
        inputs (`torch.Tensor` of shape `[..., tokens, in]`): what the layer read.
        gradients (`torch.Tensor` of shape `[..., tokens, out]`): loss gradient at the layer's output.
    """

    inputs: Tensor
    gradients: Tensor


class Known(NamedTuple):
    """Slots of a chunk whose gradients an earlier call has taken.

    Args:
        where (`torch.Tensor` of shape `[..., tokens, 1]`, bool): true at these slots.
        factors (`tuple` of `Factors`): layer by layer.
    """

    where: Tensor
    factors: tuple[Factors, ...]

    def into(self, factors: tuple[Factors, ...]) -> tuple[Factors, ...]:
        """Factors of all slots, with these in their place."""
        return tuple(
            Factors(*(torch.where(self.where, known, new) for known, new in zip(*of_layer, strict=True)))
            for of_layer in zip(self.factors, factors, strict=True)
        )


@dataclass(frozen=True)
class MemoryArchitecture(Choice):
    """Base class: what one head's memory computes, and the gradient of a loss on that."""

    @property
    def gate_axes(self) -> tuple[str, ...]:
        """Where each weight has the `head_dim` axis that channel gates live on, `"input"` or `"output"`, the other axis
        being the hidden one; `"hidden"` for a weight that has none, whose gates are the channels' means."""
        raise NotImplementedError

    @property
    def has_norm(self) -> bool:
        """Whether the layer norm's affine is used."""
        return False

    @property
    def fixed(self) -> int:
        """How many of the weights, the first ones, no text writes: they stay the learned initial ones."""
        return 0

    def weight_shapes(self, head_dim: int) -> tuple[tuple[int, int], ...]:
        """Shapes `[in, out]` of the weights, layer by layer."""
        raise NotImplementedError

    def read(self, linear: Linear, x: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> Tensor:
        """`M(x)` for `x` of shape `[..., tokens, head_dim]`."""
        raise NotImplementedError

    def write(
        self, weights: tuple[Tensor, ...], k: Tensor, residual: Residual, norm_weight: Tensor, norm_bias: Tensor
    ) -> tuple[Factors, ...]:
        """The gradients of `loss(M(W; k) - v)`, of the weights that are written; `residual` maps `M(W; k)` to `dloss/dM`."""
        raise NotImplementedError


@dataclass(frozen=True)
class LayeredMemory(MemoryArchitecture):
    """Base class of memories with hidden units: what stands around the last of their products, `M(x) = x + LN(z)`.

    The layer norm's affine belongs to the outer model: it is learned in training and not changed by what is read.

    Args:
        expansion (`int`, *optional*, defaults to 4): hidden units over the head's width.
        norm_eps (`float`, *optional*, defaults to 0.1):
            Epsilon of the layer norm, large against the variance it meets, which bounds `1/std` in its backward.
        norm (`bool`, *optional*, defaults to `True`): whether there is the layer norm.
        residual (`bool`, *optional*, defaults to `True`): whether what is read is added to what is asked with.
        update_layers (`str`, *optional*, defaults to `"all"`):
            The weights that a text writes: `"all"`, or the `"last"` alone. The others stay the learned initial ones, neither
            written nor decayed, and have no part in the state; the write is then linear in the state but for the layer norm.
    """

    expansion: int = parameter("memory_expansion", 4, 1, 64, only_with=HAS_HIDDEN)
    norm_eps: float = parameter("memory_norm_eps", 0.1, 1e-30, 1, only_with={"memory_norm": True})
    norm: bool = parameter("memory_norm", True, one_of=(True, False))
    residual: bool = parameter("memory_residual", True, one_of=(True, False))
    update_layers: str = parameter("update_layers", "all", one_of=("all", "last"), only_with=HAS_HIDDEN)

    @property
    def has_norm(self) -> bool:
        return self.norm

    @property
    def fixed(self) -> int:
        return 0 if self.update_layers == "all" else len(self.gate_axes) - 1

    def output(self, x: Tensor, z: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> Tensor:
        """`M(x)`, of the last product."""
        if self.norm:
            normed, *_ = self.normalise(z)
            z = torch.addcmul(norm_bias, normed, norm_weight)
        return x + z if self.residual else z

    def output_gradient(
        self, k: Tensor, z: Tensor, residual: Residual, norm_weight: Tensor, norm_bias: Tensor
    ) -> Tensor:
        """The loss gradient at the last product."""
        if not self.norm:
            return residual(k + z if self.residual else z)
        normed, *statistics = self.normalise(z)
        affine = torch.addcmul(norm_bias, normed, norm_weight)
        grad = residual(k + affine if self.residual else affine) * norm_weight
        return normalise_vjp(grad, z, *statistics)

    def normalise(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The layer norm without its affine, which is each head's own, and the mean and 1/std of every row."""
        if differentiated_by_autograd():
            # PyTorch's own takes mean and 1/std for constants in its third derivative, which a memory's second one meets
            mean = z.mean(-1, keepdim=True)
            centred = z - mean
            inverse_std = torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.norm_eps)
            return centred * inverse_std, mean, inverse_std
        return torch.native_layer_norm(z, z.shape[-1:], None, None, self.norm_eps)


def normalise_vjp(bar: Tensor, z: Tensor, mean: Tensor, inverse_std: Tensor) -> Tensor:
    """`inverse_std * (bar - mean(bar) - normed * mean(bar * normed))`."""
    if differentiated_by_autograd():
        normed = (z - mean) * inverse_std
        along = row_dot(bar, normed) / z.shape[-1]
        return inverse_std * (bar - bar.mean(-1, keepdim=True) - normed * along)
    only_input = [True, False, False]
    return torch.ops.aten.native_layer_norm_backward(bar, z, z.shape[-1:], mean, inverse_std, None, None, only_input)[
        0
    ]


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


@dataclass(frozen=True)
class MLPMemory(LayeredMemory):
    """`M(W; x) = x + LN(gelu(x W1) W2)`, `W1: d x n`, `W2: n x d`, `n = expansion * d`, gelu in its tanh form.

    With another depth, as many products with gelu between them, `x + LN(gelu(gelu(x W1) W2) W3)` and so on: those between
    hidden units are `n x n`, and a depth of 1 is one product, `x + LN(x W)`, `W: d x d`. A weight between hidden units has
    no axis that channel gates could live on: it decays with the mean of the channels' log retention, and its step is the
    mean of their steps.

    Args:
        depth (`int`, *optional*, defaults to 2): how many weights there are.
    """

    depth: int = parameter("memory_depth", 2, 1, MOST_LAYERS)

    @property
    def gate_axes(self) -> tuple[str, ...]:
        return ("input",) if self.depth == 1 else ("input", *("hidden",) * (self.depth - 2), "output")

    def weight_shapes(self, head_dim: int) -> tuple[tuple[int, int], ...]:
        widths = (head_dim, *(self.expansion * head_dim,) * (self.depth - 1), head_dim)
        return tuple(itertools.pairwise(widths))

    def read(self, linear: Linear, x: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> Tensor:
        hidden = x
        for layer in range(self.depth - 1):
            hidden = gelu(linear(layer, hidden))
        return self.output(x, linear(self.depth - 1, hidden), norm_weight, norm_bias)

    def write(
        self, weights: tuple[Tensor, ...], k: Tensor, residual: Residual, norm_weight: Tensor, norm_bias: Tensor
    ) -> tuple[Factors, ...]:
        inputs, slopes = [k], []
        for weight in weights[:-1]:
            hidden, slope = gelu_and_slope(inputs[-1] @ weight)
            inputs.append(hidden)
            slopes.append(slope)
        gradients = [self.output_gradient(k, inputs[-1] @ weights[-1], residual, norm_weight, norm_bias)]
        for layer in range(self.depth - 1, self.fixed, -1):
            gradients.append((gradients[-1] @ weights[layer].mT) * slopes[layer - 1])
        return tuple(map(Factors, inputs[self.fixed :], reversed(gradients)))


@dataclass(frozen=True)
class GatedMLPMemory(LayeredMemory):
    """`M(W; x) = x + LN((gelu(x W1) o x W2) W3)`, `W1, W2: d x n`, `W3: n x d`, `n = expansion * d`, gelu in its tanh form.

    The gated MLP of Transformers as a memory, with GEGLU's activation.
    """

    gate_axes: ClassVar[tuple[str, ...]] = ("input", "input", "output")

    def weight_shapes(self, head_dim: int) -> tuple[tuple[int, int], ...]:
        hidden = self.expansion * head_dim
        return (head_dim, hidden), (head_dim, hidden), (hidden, head_dim)

    def read(self, linear: Linear, x: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> Tensor:
        hidden = gelu(linear(0, x)) * linear(1, x)
        return self.output(x, linear(2, hidden), norm_weight, norm_bias)

    def write(
        self, weights: tuple[Tensor, ...], k: Tensor, residual: Residual, norm_weight: Tensor, norm_bias: Tensor
    ) -> tuple[Factors, ...]:
        w1, w2, w3 = weights
        gate, slope = gelu_and_slope(k @ w1)
        up = k @ w2
        hidden = gate * up
        dz = self.output_gradient(k, hidden @ w3, residual, norm_weight, norm_bias)
        dhidden = dz @ w3.mT
        factors = Factors(k, dhidden * up * slope), Factors(k, dhidden * gate), Factors(hidden, dz)
        return factors[self.fixed :]


@dataclass(frozen=True)
class MatrixMemory(MemoryArchitecture):
    """`M(W; x) = x W`, `W: d x d`: the linear memory of the paper's ablation and of linear attention models.

    It has no layer norm: `norm_weight` and `norm_bias` are not used.
    """

    gate_axes: ClassVar[tuple[str, ...]] = ("input",)

    def weight_shapes(self, head_dim: int) -> tuple[tuple[int, int], ...]:
        return ((head_dim, head_dim),)

    def read(self, linear: Linear, x: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> Tensor:
        return linear(0, x)

    def write(
        self, weights: tuple[Tensor, ...], k: Tensor, residual: Residual, norm_weight: Tensor, norm_bias: Tensor
    ) -> tuple[Factors, ...]:
        return (Factors(k, residual(k @ weights[0])),)


@dataclass(frozen=True)
class VectorMemory(MemoryArchitecture):
    """`M(w; x) = x o w`, `w: 1 x d`: the vector-valued memory of diagonal recurrences, one number a channel.

    It is written in the form of all others: the product of w with an input of one is w as every token finds it, and the
    gradient at w is that input times `x o dloss/dM`. It has no layer norm: `norm_weight` and `norm_bias` are not used.
    """

    gate_axes: ClassVar[tuple[str, ...]] = ("output",)

    def weight_shapes(self, head_dim: int) -> tuple[tuple[int, int], ...]:
        return ((1, head_dim),)

    def read(self, linear: Linear, x: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> Tensor:
        return x * linear(0, torch.ones_like(x[..., :1]))

    def write(
        self, weights: tuple[Tensor, ...], k: Tensor, residual: Residual, norm_weight: Tensor, norm_bias: Tensor
    ) -> tuple[Factors, ...]:
        return (Factors(torch.ones_like(k[..., :1]), k * residual(k * weights[0])),)


MEMORY_ARCHITECTURES: dict[str, type[MemoryArchitecture]] = {
    "mlp": MLPMemory,
    "gated_mlp": GatedMLPMemory,
    "matrix": MatrixMemory,
    "vector": VectorMemory,
}
