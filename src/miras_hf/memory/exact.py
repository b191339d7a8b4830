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
"""Choice (iv) of Miras without steps: the memory that solves the regression of all that it has read, at every token."""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .architecture import Factors, MatrixMemory, MemoryArchitecture
from .attentional_bias import L2, AttentionalBias
from .declared import parameter
from .learning import LearningAlgorithm
from .retention import ChunkWeights, Decay, NoRetention, RetentionGate


class ExactGates(NamedTuple):
    """What is left of a chunk's start and of its tokens, one number a head; B_t the decay since the start.

    Args:
        decay (`torch.Tensor` of shape `[..., queries, 1]`): B_t of the tokens that read.
        writes (`torch.Tensor` of shape `[..., queries, tokens]`): `eta_i B_t / B_i` of the tokens up to the reading one.
        fold (`torch.Tensor` of shape `[..., tokens, 1]`): eta_i B_C / B_i, for the chunk's end.
        total (`torch.Tensor` of shape `[..., 1, 1]`): B_C.
    """

    decay: Tensor
    writes: Tensor
    fold: Tensor
    total: Tensor

    def broken_from(self, broken: Tensor) -> "ExactGates":
        """As `Gates.broken_from`."""
        decay = torch.where(broken, torch.nan, self.decay)
        return self._replace(decay=decay, total=torch.where(broken[..., -1:, :], torch.nan, self.total))


@dataclass(frozen=True)
class Exact(LearningAlgorithm):
    """The exact solution of a ridge regression (Mesa layer, arXiv 2506.05233), of a matrix memory with l2 loss; gates are one
    number a head:

        W_t = argmin_W sum_{i<=t} eta_i (B_t / B_i) |k_i W - v_i|^2 + tr(W^T Lambda W)
            = (H_t + Lambda)^(-1) G_t,    H_t = alpha_t H_{t-1} + eta_t k_t^T k_t,    G_t = alpha_t G_{t-1} + eta_t k_t^T v_t

    The dual state is G, and H lies where momentum does in other memories. Neither depends on what the memory returns, so that
    chunks add them up in matrix products; a token reads `(q_t (H_t + Lambda)^(-1)) G_t`, and the solution of the system is
    that of `torch.linalg.solve`, a system a token. The initial memory is one of G: with `decay_target="init"` the ridge
    pulls to `Lambda^(-1) G_0`.

    Lambda is a positive diagonal a head, `ridge_floor + softplus(.)` of logits `MemoryParameters.norm_weight`, which such a
    memory has for nothing else. It is at least what rounding makes of H, `d` times the machine's epsilon times its trace: of
    tens of thousands of tokens in float32, of none in float64.

    Args:
        ridge_floor (`float`, *optional*, defaults to 0.25): smallest entry of Lambda.
    """

    ridge_floor: float = parameter("ridge_floor", 0.25, above=0, high=1e3)

    has_covariance: ClassVar[bool] = True
    gate_granularities: ClassVar[tuple[str, ...]] = ("head",)
    step_granularities: ClassVar[tuple[str, ...]] = ("head",)

    def refusal(self, architecture: MemoryArchitecture, bias: AttentionalBias, retention: RetentionGate) -> str | None:
        if type(architecture) is not MatrixMemory:
            return "solves a regression that is linear in the memory: of a matrix memory only"
        if type(bias) is not L2 or bias.residual_clip is not None:
            return "solves a regression by its normal equations: of the l2 loss, with `residual_clip=None`"
        if type(retention) not in (Decay, NoRetention) or retention.keys()["weight_cap"] is not None:
            return "solves for weights that are the solution itself: with decay or none, and `weight_cap=None`"
        return None

    @property
    def initial_norm_weight(self) -> float:
        """The logit of a ridge of 1, or of twice the floor where that is more."""
        softplus = max(1.0 - self.ridge_floor, self.ridge_floor)
        return softplus + math.log(-math.expm1(-softplus))

    def update(self, slots: tuple[Tensor, ...], step: Tensor, alpha: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        """As of the base class, with `eta_t k_t^T k_t` behind alpha."""
        (dual, covariance), (outer,) = slots, more
        return alpha * dual - step, alpha * covariance + outer

    def chunk_gates(self, eta: Tensor, log_decay: Tensor) -> ExactGates:
        size = eta.shape[-2]
        before = torch.ones(size, size, dtype=torch.bool, device=eta.device).tril()
        # selected before the exponential, which has no gradient to lose there then
        retained = torch.exp(torch.where(before, log_decay - log_decay.mT, -torch.inf))
        total = log_decay[..., -1:, :]
        return ExactGates(
            torch.exp(log_decay), retained * eta.mT, eta * torch.exp(total - log_decay), torch.exp(total)
        )

    def step_gates(self, eta: Tensor, log_decay: Tensor, now: Tensor) -> ExactGates:
        fold = eta * torch.exp(now - log_decay)  # none of slots that are not taken
        return ExactGates(torch.exp(now), fold.mT, fold, torch.exp(now))

    def own_gates(self, eta: Tensor) -> ExactGates:
        one = torch.ones_like(eta)
        return ExactGates(one, torch.diag_embed(eta.squeeze(-1)), eta, one[..., -1:, :])

    def solved(self, covariance: Tensor, x: Tensor, logits: Tensor) -> Tensor:
        """`x (H + Lambda)^(-1)`.

        Args:
            covariance (`torch.Tensor` of shape `[..., head_dim, head_dim]`): H.
            x (`torch.Tensor` of shape `[..., head_dim]`): queries.
            logits (`torch.Tensor` of the shape of x, or one that is broadcast to it): of Lambda.
        """
        ridge = self.ridge_floor + F.softplus(logits)
        trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
        ridge = torch.maximum(ridge, x.shape[-1] * torch.finfo(x.dtype).eps * trace)
        # the one that does not raise: of what is not a number nothing else comes
        return torch.linalg.solve_ex(covariance + torch.diag_embed(ridge), x.unsqueeze(-1))[0].squeeze(-1)

    def asked(self, weights: ChunkWeights, keys: Tensor, x: Tensor, gates: ExactGates, logits: Tensor) -> Tensor:
        """What G is asked with in the place of queries x `[rows, tokens, head_dim]`: `x_t (H_t + Lambda)^(-1)`.

        Args:
            keys (`torch.Tensor` of shape `[rows, writes, head_dim]`): of the chunk.
        """
        width = x.shape[-1]
        outer = (keys.unsqueeze(-1) * keys.unsqueeze(-2)).flatten(-2)
        covariance = torch.bmm(gates.writes, outer).unflatten(-1, (width, width))
        covariance = covariance + gates.decay.unsqueeze(-1) * weights.momentum.unsqueeze(1)
        return self.solved(covariance, x, logits)

    def read(self, gate_axis: str, weights: ChunkWeights, factors: Factors, x: Tensor, gates: ExactGates) -> Tensor:
        """What G returns for x, which has been `asked` for; as `GradientDescent.read`."""
        inputs, gradients = factors
        z = gates.decay * torch.bmm(x, weights.decaying) - torch.bmm(torch.bmm(x, inputs.mT) * gates.writes, gradients)
        return z if weights.constant is None else z + torch.bmm(x, weights.constant)

    def fold(
        self, gate_axis: str, slots: tuple[Tensor, ...], factors: Factors, gates: ExactGates
    ) -> tuple[Tensor, ...]:
        """G and H after the chunk."""
        (dual, covariance), (inputs, gradients) = slots, factors
        written = (inputs * gates.fold).mT
        return gates.total * dual - written @ gradients, gates.total * covariance + written @ inputs
