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
"""Choice (ii) of Miras: the attentional bias, the inner loss a memory minimises on each (key, value) pair.

An attentional bias sees the error `e = M(W; k) - v` of one token and one head and gives the residual `r = dloss/dM`,
which the memory's architecture carries back to its weights. Equations are those of arXiv 2504.13173.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .declared import Choice, parameter


def norm(x: Tensor) -> Tensor:
    # the tiny term keeps the derivative of the root finite at an error of exactly zero
    return (x.square().sum(-1, keepdim=True) + 1e-24).sqrt()


def shortened(x: Tensor, limit: Tensor | float) -> Tensor:
    """`x min(1, limit / ||x||)`."""
    return x * (limit / norm(x)).clamp(max=1.0)


@dataclass(frozen=True)
class AttentionalBias(Choice):
    """Base class: a loss on the error, its gradient, and the guard that bounds one token's write.

    Args:
        residual_clip (`float`, *optional*, defaults to 3.0):
            Largest root mean square of the residual: `||r||_2 <= residual_clip * sqrt(head_dim)`; `None` for no limit.
    """

    residual_clip: float | None = parameter("residual_clip", 3.0, above=0, high=1e9, optional=True)

    delta_granularity: ClassVar[str | None] = None
    """`None` for a loss without threshold, `"head"` for one threshold a head, `"channel"` for one a channel."""

    def initial_delta(self, head_dim: int) -> tuple[float, float]:
        """Smallest and largest threshold at the start, between which heads or channels are spread."""
        if self.delta_granularity == "channel":
            return 2.0, 2.0
        # on both sides of errors of rms 1: in the l2 branch of the mixture delta has no gradient, and in its l1 branch,
        # which knows only the signs of errors, values have none
        return 0.25 * math.sqrt(head_dim), math.sqrt(head_dim)

    def error(self, prediction: Tensor, value: Tensor) -> Tensor:
        """What the gradient is a function of."""
        return prediction - value

    def loss_at(self, prediction: Tensor, value: Tensor, delta: Any = None) -> Tensor:
        """The loss `[..., 1]` of what the memory returns for a key whose value is another."""
        return self.loss(self.error(prediction, value), delta)

    def loss(self, error: Tensor, delta: Any = None) -> Tensor:
        """The loss `[..., 1]` of errors `[..., head_dim]`, summed over channels, without the guard. Only measured, never
        learned from: where there is none it is not a number."""
        return torch.full_like(error[..., :1], math.nan)

    def gradient(self, error: Tensor, delta: Any = None) -> Tensor:
        """`dloss/de`, same shape as the error, without the guard."""
        raise NotImplementedError

    def residual(self, error: Tensor, delta: Tensor | None = None) -> Tensor:
        """The gradient, its norm clipped: what the memory writes."""
        gradient = self.gradient(error, delta)
        if self.residual_clip is None:
            return gradient
        return shortened(gradient, self.residual_clip * math.sqrt(error.shape[-1]))


@dataclass(frozen=True)
class L2(AttentionalBias):
    """Half the squared error (the regression loss of equations (9) and (31)): `r = e`."""

    def loss(self, error: Tensor, delta: Any = None) -> Tensor:
        return 0.5 * error.square().sum(-1, keepdim=True)

    def gradient(self, error: Tensor, delta: Any = None) -> Tensor:
        return error


@dataclass(frozen=True)
class Dot(AttentionalBias):
    """Equation (8), the Hebbian loss `-<M(k), v>`: `r = -v`, whatever the memory returns already."""

    def error(self, prediction: Tensor, value: Tensor) -> Tensor:
        return -value

    def loss_at(self, prediction: Tensor, value: Tensor, delta: Any = None) -> Tensor:
        return -(prediction * value).sum(-1, keepdim=True)

    def gradient(self, error: Tensor, delta: Any = None) -> Tensor:
        return error


@dataclass(frozen=True)
class Lp(AttentionalBias):
    """Equations (10), (11): `sum |e|^p`, hence `r = p sign(e) |e|^(p-1)` with `|e| = sqrt(e^2 + 1e-6)`.

    Args:
        power (`float`, *optional*, defaults to 3.0): p, at least 1.
        error_cap (`float`, *optional*, defaults to 4.0): errors are cut here before the power is taken.
        sign (`str`, *optional*, defaults to `"exact"`): `"exact"`, or `"tanh"` for `tanh(sharpness * e)` (Remark 5).
        sharpness (`float`, *optional*, defaults to 10.0): a of Remark 5.
    """

    power: float = parameter("lp_power", 3.0, 1, 16, symbol="p")
    error_cap: float = parameter("lp_error_cap", 4.0, above=0, high=1e6)
    sign: str = parameter("lp_sign", "exact", one_of=("exact", "tanh"))
    sharpness: float = parameter("lp_sharpness", 10.0, above=0, high=1e6, only_with={"lp_sign": "tanh"})

    smoothing: ClassVar[float] = 1e-6

    def loss(self, error: Tensor, delta: Any = None) -> Tensor:
        # its derivative is `gradient` up to the smoothing, for the exact sign; that of Remark 5 has no closed form
        magnitude = (error.square() + self.smoothing).sqrt()
        return magnitude.pow(self.power).sum(-1, keepdim=True)

    def gradient(self, error: Tensor, delta: Any = None) -> Tensor:
        error = error.clamp(-self.error_cap, self.error_cap)
        squared = error.square() + self.smoothing
        sign = torch.sign(error) if self.sign == "exact" else torch.tanh(self.sharpness * error)
        if self.power == 3.0:
            return self.power * sign * squared
        return self.power * sign * squared.pow((self.power - 1.0) / 2.0)


@dataclass(frozen=True)
class L1(AttentionalBias):
    """Equation (12), `sum |e|`: `r = sign(e)`, a write that says of each channel no more than whether it is too large.

    The sign turns around within a small distance of zero, `e / sqrt(e^2 + smoothing)`: where it jumps, as that of `Lp` with
    p = 1 does, a difference of rounding is a difference of writes, and memories come to errors of zero.
    """

    smoothing: ClassVar[float] = 1e-4

    def loss(self, error: Tensor, delta: Any = None) -> Tensor:
        return (error.square() + self.smoothing).sqrt().sum(-1, keepdim=True)

    def gradient(self, error: Tensor, delta: Any = None) -> Tensor:
        return error / (error.square() + self.smoothing).sqrt()


@dataclass(frozen=True)
class HuberCoordinate(AttentionalBias):
    """Equation (14): the Huber loss of each coordinate, `r = clamp(e, -delta, delta)`, delta per channel."""

    delta_granularity: ClassVar[str | None] = "channel"

    def loss(self, error: Tensor, delta: Any = None) -> Tensor:
        size = error.abs()
        return torch.where(size <= delta, 0.5 * size.square(), delta * (size - 0.5 * delta)).sum(-1, keepdim=True)

    def gradient(self, error: Tensor, delta: Any = None) -> Tensor:
        return torch.maximum(torch.minimum(error, delta), -delta)


@dataclass(frozen=True)
class HuberNorm(AttentionalBias):
    """Equation (15): the Huber loss of the error's l2 norm, `r = e min(1, delta / ||e||)`, delta per head."""

    delta_granularity: ClassVar[str | None] = "head"

    def loss(self, error: Tensor, delta: Any = None) -> Tensor:
        size = norm(error)
        return torch.where(size <= delta, 0.5 * size.square(), delta * (size - 0.5 * delta))

    def gradient(self, error: Tensor, delta: Any = None) -> Tensor:
        return shortened(error, delta)


@dataclass(frozen=True)
class HuberMixture(AttentionalBias):
    """Equations (16), (26): l2 where `||e||_2 <= delta`, `delta * l1` elsewhere; `r = e` or `delta sign(e)`.

    The two branches do not meet at the border: the loss jumps there, as printed. Delta is one number per head.
    """

    delta_granularity: ClassVar[str | None] = "head"

    def loss(self, error: Tensor, delta: Any = None) -> Tensor:
        return torch.where(
            norm(error) <= delta,
            0.5 * error.square().sum(-1, keepdim=True),
            delta * error.abs().sum(-1, keepdim=True),
        )

    def gradient(self, error: Tensor, delta: Any = None) -> Tensor:
        return mixture(error, torch.sign(error), norm(error) <= delta, delta)


@dataclass(frozen=True)
class Robust(AttentionalBias):
    """Equation (17), robust to values that are off by up to delta: `||e||^2 / 2 + delta ||e|| + delta^2 / 2`.

    Its gradient `e + delta e / ||e||` turns around within a small distance of the error zero, which is where a memory
    comes to that works; under the root stands `smoothing`, so that it does not jump there. Delta is one number per head.
    """

    delta_granularity: ClassVar[str | None] = "head"
    smoothing: ClassVar[float] = 1e-4

    def size(self, error: Tensor) -> Tensor:
        return (error.square().sum(-1, keepdim=True) + self.smoothing).sqrt()

    def loss(self, error: Tensor, delta: Any = None) -> Tensor:
        return 0.5 * error.square().sum(-1, keepdim=True) + delta * self.size(error) + 0.5 * delta**2

    def gradient(self, error: Tensor, delta: Any = None) -> Tensor:
        return error * (1.0 + delta / self.size(error))


def mixture(error: Tensor, sign: Tensor, inside: Tensor, delta: Tensor) -> Tensor:
    # chosen among the factors, one number a token each, not among the products
    return (error * inside).addcmul(sign, torch.where(inside, 0.0, delta))


ATTENTIONAL_BIASES: dict[str, type[AttentionalBias]] = {
    "l2": L2,
    "dot": Dot,
    "lp": Lp,
    "l1": L1,
    "huber_coordinate": HuberCoordinate,
    "huber_norm": HuberNorm,
    "huber_mixture": HuberMixture,
    "robust": Robust,
}
