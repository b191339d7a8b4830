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
"""Choice (iii) of Miras: the retention gate, as a link between a dual state and the weights in use.

Every gate here has one form. The memory carries a dual state A with a linear recurrence, and the weights are its image
under a link, `W = phi(A)`:

    A_t = alpha_t o A_{t-1} - eta_t o g_t          g_t: gradient at W_c = phi(A_c), c the start of t's chunk

With `decay_target="init"` the recurrence runs on the deviation `D = A - A_0` from the learned initial memory.
A link that is not linear is applied at chunk starts only (arXiv 2504.13173, after equation (29)); inside a chunk the
read uses the link linearised there, `ChunkWeights`, so that a chunk stays a handful of matrix products.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from .architecture import Factors, MemoryArchitecture
from .declared import Choice, parameter
from .vjp import lies_within


class ChunkWeights(NamedTuple):
    """One weight of the memory as a chunk sees it, B_t being the decay since the chunk's start.

    Token t of the chunk reads with

        W_t = scale * (constant + B_t o decaying + writes(N_t)),     N_t = sum_{i<=t} (B_t / B_i) o -eta_i o g_i

    Args:
        weight (`torch.Tensor` of shape `[..., in, out]`): `W_c = phi(A_c)`, where the chunk's gradients are taken.
        constant (`torch.Tensor`, *optional*): the part of the read that does not decay.
        decaying (`torch.Tensor`, *optional*): the part that decays with B_t.
        scale (`torch.Tensor` of shape `[..., 1, 1]`, *optional*): a factor on the whole read; `None` means one.
        rows, columns (`torch.Tensor` of shapes `[..., in, 1]` and `[..., 1, out]`, *optional*):
            Factors on the writes, see `RetentionGate.writes`; `None` means one.
        momentum (`torch.Tensor`, *optional*): what the linearised link makes of the momentum at the chunk's start.
    """

    weight: Tensor
    constant: Tensor | None = None
    decaying: Tensor | None = None
    scale: Tensor | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None
    momentum: Tensor | None = None


def rms(x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    return norm.clamp(min=1e-12) / math.sqrt(x.shape[-2] * x.shape[-1])


@dataclass(frozen=True)
class RetentionGate(Choice):
    """Base class of the links."""

    last_layer_scale: ClassVar[float] = 0.1
    """Factor on the initial weights of an MLP memory's last layer by default: what is written soon outweighs it."""

    full_step_tokens: ClassVar[float] = 16.0
    """Largest chunk in which, by default, a token's write may take its whole error away behind an MLP memory's layer norm; in
    larger ones the largest step is as much smaller."""

    forgets: ClassVar[bool] = True
    """Whether a memory forgets at all: if not, log retention is zero, whatever a call says."""

    def refusal(self, architecture: MemoryArchitecture) -> str | None:
        """Why it has no weights of such a memory, behind its name; `None` if it has."""
        return None

    def at_chunk_end(self, state: Tensor, tokens: int) -> Tensor:
        """What stays of the decaying state when a chunk of so many tokens is over; here all of it."""
        return state

    def link(self, dual: Tensor, hidden_axis: int) -> Tensor:
        """`W = phi(A)`, shape `[..., in, out]`, norms and simplices taken over each weight of each head alone."""
        raise NotImplementedError

    def at_chunk_start(self, state: Tensor, base: Tensor | None, hidden_axis: int) -> ChunkWeights:
        """Link and linearisation at a chunk's start.

        Args:
            state (`torch.Tensor` of shape `[..., in, out]`):
                The decaying state: A itself, or `A - base` where a base is given.
            base (`torch.Tensor`, *optional*): the learned initial dual state, for `decay_target="init"`.
            hidden_axis (`int`): -1 or -2, the axis of this weight that is the memory's hidden axis.
        """
        raise NotImplementedError

    def writes(self, weights: ChunkWeights, factors: Factors, hidden_axis: int) -> Factors:
        """The linearised link on a chunk's writes in rank-one form; here what rows and columns of the weights are
        multiplied with."""
        inputs, gradients = factors
        inputs = inputs if weights.rows is None else inputs * weights.rows.mT
        return Factors(inputs, gradients if weights.columns is None else gradients * weights.columns)

    def writes_matrix(self, weights: ChunkWeights, matrix: Tensor, hidden_axis: int) -> Tensor:
        """`writes` on a matrix `[..., in, out]`: the reference's form."""
        matrix = matrix if weights.rows is None else matrix * weights.rows
        return matrix if weights.columns is None else matrix * weights.columns

    def inverse(self, weight: Tensor, hidden_axis: int) -> Tensor:
        """A dual state with `phi(A) = weight`: how an initial memory of a given scale is made."""
        raise NotImplementedError


@dataclass(frozen=True)
class FrozenScale(RetentionGate):
    """Base class of links `phi(A) = s(A) A`, whose scalar s is held at its chunk-start value inside the chunk.

    Args:
        weight_cap (`float`, *optional*, defaults to 2.0): `rms(W)` never exceeds this, through the scalar.
    """

    weight_cap: float | None = parameter("weight_cap", 2.0, 1e-6, 1e9, optional=True)

    def scale(self, dual: Tensor) -> Tensor | None:
        """`[..., 1, 1]`, or None for one."""
        if self.weight_cap is None:
            return None
        size = rms(dual)
        # the cap is rarely met, and to multiply by one costs more than to look
        return None if lies_within(size, 0.0, self.weight_cap) else (self.weight_cap / size).clamp(max=1.0)

    def link(self, dual: Tensor, hidden_axis: int) -> Tensor:
        scale = self.scale(dual)
        return dual if scale is None else scale * dual

    def at_chunk_start(self, state: Tensor, base: Tensor | None, hidden_axis: int) -> ChunkWeights:
        dual = state if base is None else base + state
        scale = self.scale(dual)
        return ChunkWeights(dual if scale is None else scale * dual, constant=base, decaying=state, scale=scale)


@dataclass(frozen=True)
class Decay(FrozenScale):
    """l2 retention, `W = A`: equation (26) with eta and alpha decoupled."""

    def inverse(self, weight: Tensor, hidden_axis: int) -> Tensor:
        return weight


@dataclass(frozen=True)
class NoRetention(Decay):
    """No retention gate: `W = A`, and nothing is ever forgotten."""

    forgets: ClassVar[bool] = False


@dataclass(frozen=True)
class ElasticNetDecay(Decay):
    """Elastic net retention in its first form, equation (22), which learns and retains: what decay leaves is soft-thresholded
    at every step, `W_t = S_gamma(alpha_t W_{t-1} - eta_t g_t)`.

    The threshold acts on the decaying state (with `decay_target="init"` what a text has changed of the learned initial
    memory), and once a chunk, with the gamma of all its tokens, as gradients are taken once a chunk (28). It is smooth,
    `S_gamma(D) = D - gamma tanh(D / gamma)`, as that of `ElasticNet` is. What writes do not keep alive goes to zero.

    Args:
        threshold (`float`, *optional*, defaults to 1e-4): gamma of one token.
    """

    threshold: float = parameter("elastic_net_decay_threshold", 1e-4, 1e-9, 1e3, symbol="gamma")

    def at_chunk_end(self, state: Tensor, tokens: int) -> Tensor:
        return soft_threshold(state, tokens * self.threshold)


def soft_threshold(x: Tensor, gamma: float) -> Tensor:
    """`x - gamma sign(x)` for large x, and about `x^3 / (3 gamma^2)` for small, smooth in between."""
    return x - gamma * torch.tanh(x / gamma)


def _power_norm(x: Tensor, power: float, floor: float) -> Tensor:
    """`max(||x||_power, floor)` of every weight, finite and with a finite derivative whatever the power, at zero too."""
    if power == 4.0:  # the norm of the squares: one pass, and no fourth powers in memory
        squared = torch.linalg.vector_norm(x.square(), dim=(-2, -1), keepdim=True)
        return squared.clamp(min=max(floor**2, torch.finfo(x.dtype).tiny)).sqrt()
    # the norm does not depend on this unit, which is held constant; in it the powers do not overflow, nor all go under
    unit = x.detach().abs().amax((-2, -1), keepdim=True).clamp(min=floor)
    total = (x / unit).abs().pow(power).sum((-2, -1), keepdim=True).clamp(min=1e-30)
    return (unit * total.pow(1.0 / power)).clamp(min=floor)


def _power(x: Tensor, exponent: float) -> Tensor:
    """`|x|^exponent`, its derivative taken as zero where x is zero."""
    if exponent == 2.0:
        return x.square()
    if exponent >= 1.0:
        return x.abs().pow(exponent)
    nonzero = x != 0.0  # of a smaller power the derivative is infinite there
    return torch.where(nonzero, torch.where(nonzero, x, 1.0).abs().pow(exponent), 0.0 if exponent else 1.0)


LARGEST_LQ_SCALE = 1e30
"""Largest factor that the printed map of lq retention gives to a dual state, so that it stays a number."""


@dataclass(frozen=True)
class Lq(FrozenScale):
    """lq retention, the map as printed in equation (24): `W = A / ||A||_q^(q-2)`.

    The map inverts scales (twice the A, half the W at q = 4), so the norm has a floor.

    Args:
        power (`float`, *optional*, defaults to 4.0): q, at least 2.
        norm_floor (`float`, *optional*, defaults to 0.01): smallest `||A||_q` that is divided by.
    """

    power: float = parameter("lq_power", 4.0, 2, 16, symbol="q")
    norm_floor: float = parameter("lq_norm_floor", 1e-2, above=0, high=100)

    def norm(self, dual: Tensor) -> Tensor:
        """`||A||_q`, or its floor."""
        return _power_norm(dual, self.power, self.norm_floor)

    @property
    def least_norm(self) -> float:
        """What smaller norms are taken for: the floor, or the norm of the largest factor."""
        exponent = self.power - 2.0
        return max(self.norm_floor, LARGEST_LQ_SCALE ** (-1.0 / exponent)) if exponent > 0.0 else self.norm_floor

    def free_scale(self, norm: Tensor) -> Tensor:
        """The map's factor before the cap, of the norm."""
        return norm.clamp(min=self.least_norm).pow(2.0 - self.power)

    def capped_scale(self, dual: Tensor, free: Tensor) -> Tensor | None:
        """The factor that brings the weights to the cap, `None` if none comes to it."""
        if self.weight_cap is None:
            return None
        size = rms(dual)
        return None if lies_within(free * size, 0.0, self.weight_cap) else self.weight_cap / size

    def scale(self, dual: Tensor) -> Tensor:
        free = self.free_scale(self.norm(dual))
        capped = self.capped_scale(dual, free)
        return free if capped is None else torch.minimum(free, capped)

    def inverse(self, weight: Tensor, hidden_axis: int) -> Tensor:
        if self.power == 3.0:  # phi keeps no scale at q = 3: every A of this direction has the same image
            return weight
        norm = _power_norm(weight, self.power, 1e-12)
        return weight * norm.pow((self.power - 2.0) / (3.0 - self.power))


@dataclass(frozen=True)
class LqMirror(Lq):
    """lq retention with the mirror map that its derivation gives: `W = sign(A) |A|^(q-1) / ||A||_q^(q-2)`.

    The map is homogeneous of degree one, so the base of a read decays exactly. Its Jacobian on the writes,
    `(q-1) |A_c|^(q-2) / rho_c` with the denominator rho frozen, is a full matrix and would leave no matrix products;
    it enters as its best rank-one factorisation (row means times column means over the mean).
    """

    def _scaled_power(self, dual: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """`(|A| / N)^(q-2)`, A times this, and the factor of the cap on rms(W).

        N being at least `||A||_q`, the power is at most 1, and it fades where A does.
        """
        powered = _power(dual / self.norm(dual), self.power - 2.0)
        mapped = dual * powered
        return powered, mapped, None if self.weight_cap is None else (self.weight_cap / rms(mapped)).clamp(max=1.0)

    def link(self, dual: Tensor, hidden_axis: int) -> Tensor:
        _, mapped, scale = self._scaled_power(dual)
        return mapped if scale is None else scale * mapped

    def at_chunk_start(self, state: Tensor, base: Tensor | None, hidden_axis: int) -> ChunkWeights:
        dual = state if base is None else base + state
        powered, weight, scale = self._scaled_power(dual)
        constant = None if base is None else self.link(base, hidden_axis)
        rows, columns = powered.mean(-1, keepdim=True), powered.mean(-2, keepdim=True)
        # the quotient first: it is bounded by the number of columns even where all of it goes under
        columns = (columns / rows.mean(-2, keepdim=True).clamp(min=1e-30)) * (self.power - 1.0)
        if scale is not None:
            weight, columns = scale * weight, columns * scale
        decaying = weight if constant is None else weight - constant
        return ChunkWeights(weight, constant, decaying, None, rows, columns)

    def inverse(self, weight: Tensor, hidden_axis: int) -> Tensor:
        root = weight.sign() * weight.abs().pow(1.0 / (self.power - 1.0))
        return root * _power_norm(root, self.power, 1e-12).pow(self.power - 2.0)


@dataclass(frozen=True)
class Simplex(RetentionGate):
    """Base class of f-divergence retention (18), whose weights are positive and sum to c along the hidden axis of n:

        W = (c/n) g(A - zeta),     g = (f')^(-1) increasing, g(0) = 1 at the uniform weights c/n,

    with the number zeta that makes the sum right. Reads see a chunk's writes through the Jacobian at the uniform weights,
    which is the same for every f, `(c/n) (I - 11^T/n)`; the base's decay acts at the next chunk's start.

    Args:
        mass (`float`, *optional*, defaults to 2.0):
            `c = mass * n / sqrt(fan_in)`. Dual states of standard deviation `1 / mass` then give weights that deviate
            from their mean by about `1 / sqrt(fan_in)`.
    """

    mass: float = parameter("simplex_mass", 2.0, above=0, high=1e6)

    # a write does more to a weight the larger it has become
    full_step_tokens: ClassVar[float] = 4.0

    def refusal(self, architecture: MemoryArchitecture) -> str | None:
        shapes = architecture.weight_shapes(2)
        if any(
            shape[0 if axis == "output" else 1] == 1
            for shape, axis in zip(shapes, architecture.gate_axes, strict=True)
        ):
            return "keeps the sum along a hidden axis, which is of one unit here: its weights would never change"
        return None

    def simplex(self, dual: Tensor, hidden_axis: int) -> tuple[float, int]:
        size = dual.shape[hidden_axis]
        return self.mass * size / math.sqrt(dual.shape[-2]), size

    def centred(self, weight: Tensor, hidden_axis: int) -> Tensor:
        """Weights whose simplex runs along their inputs, less the uniform ones, which would add the same to every output; in
        their own place.

        Behind the last layer the layer norm takes that out again, so that with it nothing changes but what is rounded:
        differences of nearly equal numbers. Without it, and between hidden units, the weights are an affine image of the
        simplex that sums to zero."""
        return weight.sub_(self.slope(weight, hidden_axis)) if hidden_axis == -2 else weight

    def slope(self, dual: Tensor, hidden_axis: int) -> float:
        """Of the link at the uniform weights."""
        mass, size = self.simplex(dual, hidden_axis)
        return mass / size

    def at_chunk_start(self, state: Tensor, base: Tensor | None, hidden_axis: int) -> ChunkWeights:
        dual = state if base is None else base + state
        weight = self.link(dual, hidden_axis)
        return ChunkWeights(weight, constant=weight)

    def writes(self, weights: ChunkWeights, factors: Factors, hidden_axis: int) -> Factors:
        inputs, gradients = factors
        slope = self.slope(weights.weight, hidden_axis)

        def centred(x: Tensor) -> Tensor:  # slope (x - mean(x)), in two passes
            return torch.add(x.mean(-1, keepdim=True) * -slope, x, alpha=slope)

        if hidden_axis == -1:
            return Factors(inputs, centred(gradients))
        return Factors(centred(inputs), gradients)

    def writes_matrix(self, weights: ChunkWeights, matrix: Tensor, hidden_axis: int) -> Tensor:
        return self.slope(matrix, hidden_axis) * (matrix - matrix.mean(hidden_axis, keepdim=True))

    def inverse(self, weight: Tensor, hidden_axis: int) -> Tensor:
        # to first order: weights deviate from their mean by (c/n) A
        return weight / self.slope(weight, hidden_axis)


@dataclass(frozen=True)
class KL(Simplex):
    """KL retention, equations (21), (27): `W = c softmax(A)` along the hidden axis, A the log-weights; (18) with g = exp.

    `alpha log W - eta g` differs from the linear recurrence of A by a constant per simplex, which the softmax removes,
    exactly, because gates do not vary along the hidden axis. The paper's linear step in weight space between two
    chunks turns weights negative, where the next logarithm is undefined; the dual form cannot.
    """

    def link(self, dual: Tensor, hidden_axis: int) -> Tensor:
        weight = self.simplex(dual, hidden_axis)[0] * torch.softmax(dual, dim=hidden_axis)
        return self.centred(weight, hidden_axis)


@dataclass(frozen=True)
class ChiSquared(Simplex):
    """f-divergence retention (18) with the chi-squared divergence, `f(t) = (t - 1)^2 / 2`: weights that are small are zero.

        W = (c/n) max(A - zeta, 0),     sum_i max(A_i - zeta, 0) = n,

    the point of the scaled simplex that is nearest to `(c/n) A`.
    """

    def link(self, dual: Tensor, hidden_axis: int) -> Tensor:
        support = self.support(dual, hidden_axis)
        size, present = dual.shape[hidden_axis], support.sum(hidden_axis, keepdim=True)
        # of few numbers that are close to each other, whatever the largest is
        above = torch.where(support, dual - dual.amax(hidden_axis, keepdim=True).detach(), 0.0)
        zeta = (above.sum(hidden_axis, keepdim=True) - size) / present
        weight = self.slope(dual, hidden_axis) * torch.where(support, above - zeta, 0.0)
        return self.centred(weight, hidden_axis)

    def support(self, dual: Tensor, hidden_axis: int) -> Tensor:
        """Where weights are above zero: the largest entries, as many as leave each of them something."""
        size = dual.shape[hidden_axis]
        below = dual.detach() - dual.detach().amax(hidden_axis, keepdim=True)
        ordered = below.sort(dim=hidden_axis, descending=True).values
        ranks = torch.arange(1, size + 1, device=dual.device, dtype=dual.dtype).view(-1, *[1] * (-1 - hidden_axis))
        zetas = (ordered.cumsum(hidden_axis) - size) / ranks
        last = (ordered > zetas).sum(hidden_axis, keepdim=True).clamp(min=1) - 1
        # the other way around, so that what is not a number stays one
        return ~(below <= zetas.gather(hidden_axis, last))


@dataclass(frozen=True)
class Elementwise(RetentionGate):
    """Base class of links that map every entry by itself, `W = s f(A)`, f odd and increasing, s the weights' cap.

    Between two chunk starts the base of a read goes from `f(A_c)` to `f(A_0)` as the state decays. The Jacobian on the
    writes, `f'(A_c)`, enters as its best rank-one factorisation, as `LqMirror`'s does.

    Args:
        weight_cap (`float`, *optional*, defaults to 2.0): `rms(W)` never exceeds this.
    """

    weight_cap: float | None = parameter("weight_cap", 2.0, 1e-6, 1e9, optional=True)

    def function(self, dual: Tensor) -> Tensor:
        """`f(A)`."""
        raise NotImplementedError

    def slope(self, dual: Tensor) -> Tensor:
        """`f'(A)`, within 0 and 1."""
        raise NotImplementedError

    def _capped(self, dual: Tensor) -> tuple[Tensor, Tensor | None]:
        mapped = self.function(dual)
        scale = None if self.weight_cap is None else (self.weight_cap / rms(mapped)).clamp(max=1.0)
        return mapped if scale is None else scale * mapped, scale

    def link(self, dual: Tensor, hidden_axis: int) -> Tensor:
        return self._capped(dual)[0]

    def at_chunk_start(self, state: Tensor, base: Tensor | None, hidden_axis: int) -> ChunkWeights:
        dual = state if base is None else base + state
        weight, scale = self._capped(dual)
        constant = None if base is None else self.link(base, hidden_axis)
        slope = self.slope(dual)
        rows, columns = slope.mean(-1, keepdim=True), slope.mean(-2, keepdim=True)
        columns = columns / rows.mean(-2, keepdim=True).clamp(min=1e-30)
        columns = columns if scale is None else columns * scale
        return ChunkWeights(weight, constant, weight if constant is None else weight - constant, None, rows, columns)


@dataclass(frozen=True)
class Bregman(Elementwise):
    """Bregman retention with the sigmoid (variant 5): a memory whose weights stay within bounds, `W = c tanh(A / c)`.

    The paper's weights, `sigmoid(A)`, lie between 0 and 1; these are the affine image `c (2 sigmoid(2 A / c) - 1)`, so that
    reads may be negative, with slope 1 at zero.

    Args:
        bound (`float`, *optional*, defaults to 1.0): c.
    """

    bound: float = parameter("bregman_bound", 1.0, 1e-3, 1e6, symbol="c")

    def function(self, dual: Tensor) -> Tensor:
        return self.bound * torch.tanh(dual / self.bound)

    def slope(self, dual: Tensor) -> Tensor:
        return 1.0 - torch.tanh(dual / self.bound).square()

    def inverse(self, weight: Tensor, hidden_axis: int) -> Tensor:
        return self.bound * torch.atanh((weight / self.bound).clamp(-0.999, 0.999))


@dataclass(frozen=True)
class ElasticNet(Elementwise):
    """Elastic net retention in its second form, equation (23): the accumulator, soft-thresholded: small weights are zero.

    The threshold is smooth, `W = A - gamma tanh(A / gamma)`, which is `A - gamma sign(A)` for large A and `A^3 / (3 gamma^2)`
    for small.

    Args:
        threshold (`float`, *optional*, defaults to 0.03): gamma.
    """

    threshold: float = parameter("elastic_net_threshold", 0.03, 1e-6, 1e3, symbol="gamma")

    def function(self, dual: Tensor) -> Tensor:
        return soft_threshold(dual, self.threshold)

    def slope(self, dual: Tensor) -> Tensor:
        return torch.tanh(dual / self.threshold).square()

    def inverse(self, weight: Tensor, hidden_axis: int) -> Tensor:
        # Newton's steps from the right, where the map is convex, come down to the root
        size, gamma = weight.abs(), self.threshold
        found = size + gamma
        for _ in range(60):
            squashed = torch.tanh(found / gamma)
            found = found - (found - gamma * squashed - size) / squashed.square().clamp(min=1e-12)
        return torch.sign(weight) * found.clamp(min=0.0)


RETENTION_GATES: dict[str, type[RetentionGate]] = {
    "none": NoRetention,
    "decay": Decay,
    "lq": Lq,
    "lq_mirror": LqMirror,
    "kl": KL,
    "chi_squared": ChiSquared,
    "bregman": Bregman,
    "elastic_net": ElasticNet,
    "elastic_net_decay": ElasticNetDecay,
}
