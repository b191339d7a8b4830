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
"""The decode step of memories that a token writes at once: matrices whose writes are linear in them.

`step_miras_` keeps a token's write as a factor until its chunk ends, because the gradients of most memories are taken at the
chunk's start. A matrix memory with the delta rule, or with the dot-product loss, does not know chunks: its numbers are
those of the recurrence token by token, and a token may write into the matrix itself,

    A = alpha_t A,  r_t = e_t A - v_t,  A = A - eta_t k_t^T r_t,  y_t = q_t A

in a few small products, whatever has been read of the chunk; so may one of a memory that solves exactly (`exact.py`).
The slots of the state stay empty: a token that writes nothing and retains everything stands where one has been read, so
that every other form goes on from there.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .architecture import MatrixMemory
from .attentional_bias import Dot
from .delta_rule import TokenByToken
from .exact import Exact
from .inputs import bound_inputs, check_inputs, without_autocast, without_gradients
from .layout import check_layout_arguments, is_token
from .learning import GradientDescent
from .retention import ChunkWeights, Decay, NoRetention
from .rule import MirasRule
from .state import MemoryParameters, MemoryState, check_state, per_row, starting_dual
from .vjp import check_not_transformed


Folded = tuple[()]
"""What `fold_step_` returns in the place of weights: nothing has to be kept, and nothing waits in slots."""


def folds_at_once(rule: MirasRule) -> bool:
    """Whether tokens may write into the state itself: its numbers do not depend on chunks."""
    # of the classes themselves: what a subclass computes may be something else
    retention = rule.retention
    if not isinstance(retention, Decay) or type(retention) not in (Decay, NoRetention):
        return False
    if type(rule.architecture) is not MatrixMemory or retention.weight_cap is not None or rule.decay_target != "zero":
        return False
    hebbian = type(rule.algorithm) is GradientDescent and type(rule.attentional_bias) is Dot
    return hebbian or isinstance(rule.algorithm, (TokenByToken, Exact))


@without_autocast
@without_gradients
def fold_step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    log_alpha: Tensor,
    delta: Tensor | None = None,
    log_momentum: Tensor | None = None,
    erase: Tensor | None = None,
    *,
    rule: MirasRule,
    parameters: MemoryParameters,
    state: MemoryState,
    weights: Sequence[ChunkWeights] | Folded | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Folded]:
    """[`step_miras_`] for rules that `folds_at_once` knows: the tensors of `state` are the new state afterwards, its
    slots all zeros. What it keeps for the next call says that they are.

    Args:
        weights (*optional*):
            What the last call for this state returned, which then is not looked at again; else it is checked, and what waits in
            slots is folded first.

    Raises:
        `ValueError`: for a rule whose numbers depend on chunks.
        `RuntimeError`: inside a transform of `torch.func` and under forward-mode differentiation.
    """
    check_not_transformed("fold_step_")
    x = check_inputs(q, k, v, eta, log_alpha, delta, log_momentum, erase, rule, parameters)
    rows, tokens, heads, head_dim = q.shape
    if tokens != 1:
        raise ValueError(f"`q` must hold one token per row, got {tokens}; longer calls go through `chunk_miras`.")
    check_layout_arguments(rows, tokens, None, lengths)
    dtype = x.q.dtype
    # of one token nothing has to be brought into another order
    x = bound_inputs(x, rule).map(lambda t: t.reshape(rows * heads, 1, -1))
    if weights != ():
        if not folds_at_once(rule):
            raise ValueError(
                f"`rule` must be one that `folds_at_once` knows, got {rule}: `step_miras_` steps with any."
            )
        check_state(state, rule, heads, head_dim, rows, x.eta.shape[-1])
        if any(t.dtype != dtype or not t.is_contiguous() for t in (*state.matrices, *state.slots)):
            raise ValueError(f"`state` must be contiguous and in {dtype} to be updated in place.")
        _fold_slots(rule, parameters, state)

    matrix, retained, written = state.dual[0].flatten(0, 1), x.log_alpha.exp(), x.eta * x.k
    found = matrix  # of no matter to a loss that takes no errors
    if rule.algorithm.gradient_at == "previous":
        found = torch.bmm(x.asked, matrix)
    if lengths is None:
        live = None
    else:
        mask = is_token(lengths, 1)
        live = mask.repeat_interleave(heads, dim=0).unsqueeze(-1)
        retained, written = torch.where(live, retained, 1.0), torch.where(live, written, 0.0)
    matrix.mul_(retained.mT)
    if rule.algorithm.gradient_at == "decayed":
        found = torch.bmm(x.asked, matrix)
    bias = rule.written_bias
    residual = bias.residual(bias.error(found, x.v), x.delta)
    matrix.baddbmm_(written.mT, residual if live is None else torch.where(live, residual, 0.0), alpha=-1)
    asked = x.q
    if isinstance(rule.algorithm, Exact):
        covariance = state.momentum[0].flatten(0, 1)
        covariance.mul_(retained).baddbmm_(written.mT, x.k if live is None else torch.where(live, x.k, 0.0))
        logits = per_row(parameters.norm_weight, rows, dtype)
        asked = rule.algorithm.solved(covariance, asked.squeeze(1), logits).unsqueeze(1)
    y = torch.bmm(asked, matrix).view(rows, 1, heads, head_dim).to(q.dtype)
    if live is None:
        state.count.add_(1)
        return y, ()
    state.count.add_(mask[:, 0].long())
    return torch.where(mask[..., None, None], y, 0.0), ()


def _fold_slots(rule: MirasRule, parameters: MemoryParameters, state: MemoryState) -> None:
    """Folds what waits in slots, and starts rows that have not read anything, as if their chunks had ended."""
    begun = state._replace(dual=starting_dual(rule, parameters, state)).merged(state.eta.dtype)
    # in slots that are not taken what is left stays what it was
    log_decay = begun.log_decay.cummin(-2).values
    folded = rule.fold(begun.matrices, begun.factors, rule.chunk_gates(begun.eta, log_decay))
    for old, new in zip(state.matrices, folded, strict=True):
        old.copy_(new.view_as(old))
    for slots in state.slots:
        slots.zero_()
