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

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from .gelu import gelu, gelu_and_slope


Linear = Callable[[int, Tensor], Tensor]
Residual = Callable[[Tensor], Tensor]


class Factors(NamedTuple):
    """One layer's gradients of a chunk in rank-one form: token i's gradient is `inputs[i]^T gradients[i]`.

    Args:
        inputs (`torch.Tensor` of shape `[..., tokens, in]`): what the layer read.
        gradients (`torch.Tensor` of shape `[..., tokens, out]`): loss gradient at the layer's output.
    """

    inputs: Tensor
    gradients: Tensor


@dataclass(frozen=True)
class MLPMemory:
    """`M(W; x) = x + LN(gelu(x W1) W2)`, `W1: d x n`, `W2: n x d`, `n = expansion * d`, gelu in its tanh form.

    The layer norm's affine belongs to the outer model: it is learned in training and not changed by what is read.

    Args:
        expansion (`int`, *optional*, defaults to 4): n / d.
        norm_eps (`float`, *optional*, defaults to 0.1):
            Epsilon of the layer norm, large against the variance it meets, which bounds `1/std` in its backward.
    """

    expansion: int = 4
    norm_eps: float = 0.1

    def __post_init__(self):
        if self.expansion < 1 or not self.norm_eps > 0:
            raise ValueError(
                f"`expansion` must be at least 1 and `norm_eps` positive, got {self.expansion} and {self.norm_eps}."
            )

    gate_axes: ClassVar[tuple[str, ...]] = ("input", "output")
    """Where each weight has the `head_dim` axis that channel gates live on; the other axis is the hidden one."""

    has_norm: ClassVar[bool] = True
    """Whether the layer norm's affine is used."""

    def weight_shapes(self, head_dim: int) -> tuple[tuple[int, int], ...]:
        hidden = self.expansion * head_dim
        return (head_dim, hidden), (hidden, head_dim)

    def read(self, linear: Linear, x: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> Tensor:
        """`M(x)` for `x` of shape `[..., tokens, head_dim]`."""
        hidden = gelu(linear(0, x))
        normed, _ = self._normalise(linear(1, hidden))
        return x + torch.addcmul(norm_bias, normed, norm_weight)

    def write(
        self, weights: tuple[Tensor, ...], k: Tensor, residual: Residual, norm_weight: Tensor, norm_bias: Tensor
    ) -> tuple[Factors, ...]:
        """Forward and hand-written backward of `loss(M(W; k) - v)`; `residual` maps `M(W; k)` to `dloss/dM`."""
        w1, w2 = weights
        z1 = k @ w1
        hidden, slope = gelu_and_slope(z1)
        normed, inverse_std = self._normalise(hidden @ w2)
        grad = residual(k + torch.addcmul(norm_bias, normed, norm_weight)) * norm_weight
        grad = grad - grad.mean(-1, keepdim=True) - normed * (grad * normed).mean(-1, keepdim=True)
        dz2 = grad * inverse_std
        dz1 = (dz2 @ w2.mT) * slope
        return Factors(k, dz1), Factors(hidden, dz2)

    def _normalise(self, z: Tensor) -> tuple[Tensor, Tensor]:
        centred = z - z.mean(-1, keepdim=True)
        inverse_std = torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.norm_eps)
        return centred * inverse_std, inverse_std


@dataclass(frozen=True)
class MatrixMemory:
    """`M(W; x) = x W`, `W: d x d`: the linear memory of the paper's ablation and of linear attention models.

    It has no layer norm: `norm_weight` and `norm_bias` are not used.
    """

    gate_axes: ClassVar[tuple[str, ...]] = ("input",)
    has_norm: ClassVar[bool] = False

    def weight_shapes(self, head_dim: int) -> tuple[tuple[int, int], ...]:
        return ((head_dim, head_dim),)

    def read(self, linear: Linear, x: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> Tensor:
        return linear(0, x)

    def write(
        self, weights: tuple[Tensor, ...], k: Tensor, residual: Residual, norm_weight: Tensor, norm_bias: Tensor
    ) -> tuple[Factors, ...]:
        return (Factors(k, residual(k @ weights[0])),)


MEMORY_ARCHITECTURES: dict[str, type] = {"mlp": MLPMemory, "matrix": MatrixMemory}
