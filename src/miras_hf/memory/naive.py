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
"""The memory of one head that reads one text, as the paper says it: read this first.

Every other form computes the same for many heads, rows and packs at once, goes on from any token, and is tested against
`recurrent.py`, which is tested against this.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .exact import Exact
from .rule import MirasRule


def naive_miras(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    alpha: Tensor,
    delta: Tensor | None = None,
    mu: Tensor | None = None,
    erase: Tensor | None = None,
    *,
    rule: MirasRule,
    initial: Sequence[Tensor],
    norm: Sequence[Tensor],
) -> Tensor:
    """What a memory returns for each query, after it has learned that token's key and value.

    Args:
        q, k, v (`torch.Tensor` of shape `[tokens, head_dim]`): queries, keys, values.
        eta, alpha (`torch.Tensor` of shape `[tokens, head_dim or 1]`): step size and retention of every token.
        delta (`torch.Tensor` of shape `[tokens, head_dim or 1]`, *optional*): threshold of the Huber biases.
        mu (`torch.Tensor` of shape `[tokens, 1]`, *optional*): momentum, with `rule.algorithm=Momentum()`.
        erase (`torch.Tensor`, as `k`, *optional*): the keys of which errors are taken, with `DeltaRule(erase_key="own")`.
        rule (`MirasRule`): the four choices.
        initial (sequence of `torch.Tensor` of shape `[in, out]`): the initial dual state, layer by layer.
        norm (two `torch.Tensor` of shape `[head_dim]`):
            Affine of an MLP memory's layer norm; with `rule.algorithm=Exact()` the first is the logits of the ridge.

    Returns:
        `y` of shape `[tokens, head_dim]`.
    """
    memory, axes = rule.architecture, rule.architecture.gate_axes
    # the weights that a text writes, behind those that it leaves as they are
    layers, link = range(memory.fixed, len(initial)), rule.retention.link
    alpha = alpha.clamp(min=math.exp(rule.min_log_alpha)) if rule.retention.forgets else torch.ones_like(alpha)
    eta = rule.algorithm.bound_step_size(eta, k, erase)
    base = [a if rule.decay_target == "init" else torch.zeros_like(a) for a in initial]
    dual, momentum = list(initial), [torch.zeros_like(a) for a in initial]
    covariance, bias = torch.zeros_like(initial[0]), rule.written_bias
    outputs = []
    for t in range(len(q)):
        gates = {i: (of_axis(eta[t], axes[i]), of_axis(alpha[t].log(), axes[i]).exp()) for i in layers}
        at = list(dual)
        if rule.algorithm.gradient_at == "decayed":
            for i, (_, keep) in gates.items():
                at[i] = base[i] + keep * (dual[i] - base[i])
        # (28): all gradients of a chunk are taken at its first token's weights, but for the delta rule
        if t % rule.chunk_size == 0 or rule.algorithm.gradient_at != "chunk":
            start = [link(a, rule.hidden_axis(i)) for i, a in enumerate(at)]
            start = [w if w.requires_grad else w.detach().requires_grad_() for w in start]
        asked = k if erase is None else erase
        prediction = memory.read(lambda i, x, start=start: x @ start[i], asked[t : t + 1], *norm)
        error = bias.error(prediction, v[t : t + 1])
        residual = bias.residual(error, None if delta is None else delta[t])
        written = [start[i] for i in layers]
        gradients = torch.autograd.grad(prediction, written, residual, create_graph=True, retain_graph=True)
        if erase is not None:
            gradients = [torch.outer(k[t], residual[0])]
        for (i, (step, keep)), gradient in zip(gates.items(), gradients, strict=True):
            momentum[i] = -step * gradient if mu is None else mu[t] * momentum[i] - step * gradient
            dual[i] = base[i] + keep * (dual[i] - base[i]) + momentum[i]
        now = [link(a, rule.hidden_axis(i)) for i, a in enumerate(dual)]
        query = q[t : t + 1]
        if isinstance(rule.algorithm, Exact):
            covariance = alpha[t] * covariance + eta[t] * torch.outer(k[t], k[t])
            ridge = rule.algorithm.ridge_floor + F.softplus(norm[0])
            query = torch.linalg.solve(covariance + ridge.diag(), query.mT).mT
        outputs.append(memory.read(lambda i, x, now=now: x @ now[i], query, *norm))
        if (t + 1) % rule.chunk_size == 0:
            for i in layers:
                dual[i] = base[i] + rule.retention.at_chunk_end(dual[i] - base[i], rule.chunk_size)
    return torch.cat(outputs)


def of_axis(gate: Tensor, axis: str) -> Tensor:
    """Steps or logarithms `[head_dim or 1]` of a token for a weight with that axis; of a weight without, their mean."""
    return gate.mean() if axis == "hidden" else gate.unsqueeze(-1 if axis == "input" else 0)
