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
"""The derivatives of gradient descent: of a chunk's gates, of what a layer reads, and of the fold.

Gates are those of whole chunks.
"""

import torch
from torch import Tensor

from ..architecture import Factors
from ..learning import Gates, GradientDescent, scores_of
from ..retention import ChunkWeights
from ..vjp import derivative_of, summed_like


@derivative_of(GradientDescent.chunk_gates)
def chunk_gates(algorithm: GradientDescent, eta: Tensor, log_decay: Tensor):
    gates = algorithm.chunk_gates(eta, log_decay)
    query, key = gates.query, gates.key
    half = torch.exp(0.5 * log_decay[..., -1:, :])

    def vjp(bar: Gates) -> tuple[Tensor, Tensor]:
        key_bar = torch.addcmul(bar.key, bar.fold, half)
        query_bar = torch.addcmul(bar.query, bar.decay, half)
        half_bar = torch.addcmul(bar.decay * query, bar.fold, key).sum(-2, keepdim=True)
        half_bar.addcmul_(bar.total, half, value=2.0)
        eta_bar = key_bar / query
        # query is an exponential, key its inverse
        log_decay_bar = (query_bar * query).addcmul_(key_bar, key, value=-1.0)
        reference_bar = half_bar.mul_(half).sub_(log_decay_bar.sum(-2, keepdim=True))
        log_decay_bar[..., -1:, :].add_(reference_bar, alpha=0.5)
        return eta_bar, log_decay_bar

    return gates, vjp


@derivative_of(GradientDescent.read)
def read(algorithm: GradientDescent, gate_axis: str, weights: ChunkWeights, factors: Factors, x: Tensor, gates: Gates):
    on_axis = _read_on_input if gate_axis == "input" else _read_on_output
    return on_axis(weights, factors, x, gates)


def _read_on_input(weights: ChunkWeights, factors: Factors, x: Tensor, gates: Gates):
    inputs, gradients = factors
    scaled = x if weights.scale is None else x * weights.scale
    of_query, decayed, keys = scaled * gates.query, scaled * gates.decay, inputs * gates.key
    scores = scores_of(of_query, keys, "past")
    z = torch.bmm(scores, gradients)
    if weights.decaying is not None:
        z.baddbmm_(decayed, weights.decaying)
    if weights.constant is not None:
        z.baddbmm_(scaled, weights.constant)

    def vjp(z_bar: Tensor):
        scores_bar = torch.bmm(z_bar, gradients.mT).tril_().neg_()
        query_bar, keys_bar = torch.bmm(scores_bar, keys), torch.bmm(scores_bar.mT, of_query)
        x_bar = query_bar * gates.query
        decay_bar = decaying_bar = constant_bar = scale_bar = None
        if weights.decaying is not None:
            decayed_bar = torch.bmm(z_bar, weights.decaying.mT)
            decaying_bar = torch.bmm(decayed.mT, z_bar)
            x_bar.addcmul_(decayed_bar, gates.decay)
            decay_bar = summed_like(decayed_bar.mul_(scaled), gates.decay)
        if weights.constant is not None:
            x_bar.baddbmm_(z_bar, weights.constant.mT)
            constant_bar = torch.bmm(scaled.mT, z_bar)
        if weights.scale is not None:
            scale_bar = (x_bar * x).sum((-2, -1), keepdim=True)
            x_bar.mul_(weights.scale)
        return (
            None,
            ChunkWeights(None, constant_bar, decaying_bar, scale_bar),
            Factors(keys_bar * gates.key, torch.bmm(scores.mT, z_bar)),
            x_bar,
            Gates(
                decay=decay_bar,
                query=summed_like(query_bar.mul_(scaled), gates.query),
                key=summed_like(keys_bar.mul_(inputs), gates.key),
                sees="past",
            ),
        )

    return z, vjp


def _read_on_output(weights: ChunkWeights, factors: Factors, x: Tensor, gates: Gates):
    inputs, gradients = factors
    keys = gradients * gates.key
    scores = scores_of(x, inputs, "past")
    written = torch.bmm(scores, keys)
    z = written * gates.query
    kept = None if weights.decaying is None else torch.bmm(x, weights.decaying)
    if kept is not None:
        z.addcmul_(kept, gates.decay)
    if weights.constant is not None:
        z.baddbmm_(x, weights.constant)

    def vjp(z_bar: Tensor):
        decay_bar = decaying_bar = constant_bar = scale_bar = None
        if weights.scale is not None:
            scale_bar = (z_bar * z).sum((-2, -1), keepdim=True)
            z_bar = z_bar * weights.scale
        written_bar = z_bar * gates.query
        scores_bar = torch.bmm(written_bar, keys.mT).tril_().neg_()
        keys_bar = torch.bmm(scores.mT, written_bar)
        x_bar = torch.bmm(scores_bar, inputs)
        if kept is not None:
            kept_bar = z_bar * gates.decay
            x_bar.baddbmm_(kept_bar, weights.decaying.mT)
            decaying_bar = torch.bmm(x.mT, kept_bar)
            decay_bar = summed_like(z_bar * kept, gates.decay)
        if weights.constant is not None:
            x_bar.baddbmm_(z_bar, weights.constant.mT)
            constant_bar = torch.bmm(x.mT, z_bar)
        return (
            None,
            ChunkWeights(None, constant_bar, decaying_bar, scale_bar),
            Factors(torch.bmm(scores_bar.mT, x), keys_bar * gates.key),
            x_bar,
            Gates(
                decay=decay_bar,
                query=summed_like(z_bar * written, gates.query),
                key=summed_like(keys_bar.mul_(gradients), gates.key),
                sees="past",
            ),
        )

    return z if weights.scale is None else z * weights.scale, vjp


@derivative_of(GradientDescent.fold)
def fold(algorithm: GradientDescent, gate_axis: str, slots: tuple[Tensor, ...], factors: Factors, gates: Gates):
    """Without the result, which nobody needs here: the adjoint reads nothing of it."""
    (state,), (inputs, gradients) = slots, factors

    def vjp(bars: tuple[Tensor, ...]) -> tuple[None, tuple[Tensor], Factors, Gates]:
        (bar,) = bars
        if gate_axis == "input":
            total_bar = (bar * state).sum(-1, keepdim=True).mT
            folded_bar = torch.bmm(gradients, bar.mT).neg_()
            factors_bar = Factors(folded_bar * gates.fold, torch.bmm((inputs * gates.fold).neg_(), bar))
            state_bar, fold_bar = bar * gates.total.mT, folded_bar.mul_(inputs)
        else:
            total_bar = (bar * state).sum(-2, keepdim=True)
            folded_bar = torch.bmm(inputs, bar).neg_()
            factors_bar = Factors(torch.bmm((gradients * gates.fold).neg_(), bar.mT), folded_bar * gates.fold)
            state_bar, fold_bar = bar * gates.total, folded_bar.mul_(gradients)
        fold_bar, total_bar = summed_like(fold_bar, gates.fold), summed_like(total_bar, gates.total)
        return None, (state_bar,), factors_bar, Gates(None, None, None, "past", fold_bar, total_bar)

    return None, vjp
