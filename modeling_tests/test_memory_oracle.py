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
"""The memory against an oracle written from the paper's equations alone: loops over sequences, heads and tokens.

The oracle takes the inner gradient by autograd from the loss itself and forms every token's weights as a matrix; it
shares no line with the library. All in float64.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from memory_cases import Case, make_case, relative_error

from miras_hf.memory import (
    KL,
    L2,
    Decay,
    HuberCoordinate,
    HuberMixture,
    HuberNorm,
    Lp,
    Lq,
    LqMirror,
    MatrixMemory,
    MirasRule,
    MLPMemory,
    recurrent_miras,
)


# -- losses of an error e, equations (9) to (16) --------------------------------------------------------------------------


def l2(e, delta):
    return (e @ e) / 2


def lp(power: int, cap: float = 4.0) -> Callable:
    """The primitive of `p sign(e) (e^2 + 1e-6)^((p-1)/2)` for odd p, going on as a straight line beyond the cap."""
    s = 1e-6
    primitive = {3: lambda a: a**3 + 3 * s * a, 5: lambda a: a**5 + 10 / 3 * s * a**3 + 5 * s * s * a}[power]
    slope = power * (cap * cap + s) ** ((power - 1) // 2)

    def loss(e, delta):
        size = e.abs()
        return torch.where(size <= cap, primitive(size), primitive(torch.tensor(cap)) + slope * (size - cap)).sum()

    return loss


def huber_coordinate(e, delta):
    total = 0.0
    for error, threshold in zip(e, delta, strict=True):
        size = error.abs()
        total = total + (size * size / 2 if size <= threshold else threshold * size - threshold * threshold / 2)
    return total


def huber_norm(e, delta):
    size = e.norm()
    return size * size / 2 if size <= delta else delta * size - delta * delta / 2


def huber_mixture(e, delta):
    return (e @ e) / 2 if e.norm() <= delta else delta * e.abs().sum()


# -- links, equations (21) to (27): the weights of a dual state, and what a token of the chunk reads ----------------------


class Identity:
    """`W = A`, scaled down where its root mean square exceeds the cap."""

    def __init__(self, cap: float | None = 2.0):
        self.cap = cap

    def capped(self, w):
        size = w.square().mean().sqrt()
        return w if self.cap is None or size <= self.cap else w * (self.cap / size)

    def weights(self, a, hidden_axis):
        return self.capped(a)

    def read(self, a_c, a_t, decay, a_0, hidden_axis):
        # exact but for the scalar, which is the chunk start's
        w_c = self.weights(a_c, hidden_axis)
        return a_t * ((w_c * a_c).sum() / (a_c * a_c).sum())


class Printed(Identity):
    """`W = A / ||A||_q^(q-2)`, the norm not below a floor."""

    def __init__(self, q: float = 4.0, cap: float = 2.0, floor: float = 0.01):
        super().__init__(cap)
        self.q, self.floor = q, floor

    def norm(self, a):
        return (a.abs() ** self.q).sum().clamp(min=self.floor**self.q) ** (1 / self.q)

    def weights(self, a, hidden_axis):
        return self.capped(a / self.norm(a) ** (self.q - 2))


class Mirror(Printed):
    """`W = sign(A) |A|^(q-1) / ||A||_q^(q-2)`; writes pass the Jacobian's diagonal in its rank-one approximation."""

    def weights(self, a, hidden_axis):
        return self.capped(a.sign() * a.abs() ** (self.q - 1) / self.norm(a) ** (self.q - 2))

    def read(self, a_c, a_t, decay, a_0, hidden_axis):
        w_c = self.weights(a_c, hidden_axis)
        if a_0 is None:
            base, writes = decay * w_c, a_t - decay * a_c
        else:
            w_0 = self.weights(a_0, hidden_axis)
            base, writes = w_0 + decay * (w_c - w_0), a_t - a_0 - decay * (a_c - a_0)
        rho = (a_c.sign() * a_c.abs() ** (self.q - 1) / w_c).mean()  # the denominator, the cap included
        diagonal = (self.q - 1) * a_c.abs() ** (self.q - 2) / rho
        rank_one = torch.outer(diagonal.mean(1), diagonal.mean(0)) / diagonal.mean()
        return base + rank_one * writes


class Softmax:
    """`W = c softmax(A)` along the hidden axis; reads see the writes centred over it and scaled by c/n."""

    def mass(self, a, hidden_axis):
        # log-weights of standard deviation 1/2 against 1/sqrt(fan_in)
        return 2 * a.shape[hidden_axis] / math.sqrt(a.shape[0])

    def weights(self, a, hidden_axis):
        return self.mass(a, hidden_axis) * torch.softmax(a, hidden_axis)

    def read(self, a_c, a_t, decay, a_0, hidden_axis):
        n = a_c.shape[hidden_axis]
        writes = a_t - decay * a_c if a_0 is None else a_t - a_0 - decay * (a_c - a_0)
        centring = torch.eye(n, dtype=a_c.dtype) - torch.ones(n, n, dtype=a_c.dtype) / n
        centred = writes @ centring if hidden_axis == 1 else centring @ writes
        return self.weights(a_c, hidden_axis) + self.mass(a_c, hidden_axis) / n * centred


# -- the recurrence -------------------------------------------------------------------------------------------------------


@dataclass
class Oracle:
    """The equations of one rule, next to the rule they are to match."""

    rule: MirasRule
    loss: Callable
    link: Identity | Softmax
    clip: float = 3.0
    norm_eps: float = 0.1

    def memory(self, weights, x, gamma, beta):
        if len(weights) == 1:
            return x @ weights[0]
        hidden = F.gelu(x @ weights[0], approximate="tanh")
        return x + F.layer_norm(hidden @ weights[1], x.shape, gamma, beta, self.norm_eps)

    def inner_gradient(self, weights, k, v, delta, gamma, beta):
        weights = [w.detach().requires_grad_() for w in weights]
        error = self.memory(weights, k, gamma, beta) - v
        loss = self.loss(error, delta)
        (residual,) = torch.autograd.grad(loss, error, retain_graph=True)
        shrink = min(1.0, self.clip * math.sqrt(len(k)) / residual.norm().item())
        return [shrink * g for g in torch.autograd.grad(loss, weights)]

    def read(self, case: Case, exact: bool = False):
        """Outputs, and the dual state at the start of the chunk that is open at the end."""
        q, k, v, eta, log_alpha = (case.inputs[name] for name in ("q", "k", "v", "eta", "log_alpha"))
        batch, tokens, heads, head_dim = q.shape
        y = torch.zeros_like(q)
        duals = [torch.zeros(batch, *a.shape, dtype=a.dtype) for a in case.parameters.initial]
        for b in range(batch):
            for h in range(heads):
                gamma, beta = case.parameters.norm_weight[h], case.parameters.norm_bias[h]
                a_0 = [a[h] for a in case.parameters.initial]
                # W1 and the matrix memory have the d axis of the gates in front, W2 behind; the other one is hidden
                columns = [(-1, 1), (1, -1)][: len(a_0)]
                hidden = [1, 0][: len(a_0)]
                target = [None if self.rule.decay_target == "zero" else a for a in a_0]
                a_t = a_0
                for t in range(tokens):
                    if t % self.rule.chunk_size == 0:
                        a_c = a_t
                        decay = [torch.ones(c, dtype=q.dtype) for c in ((1, 1),) * len(a_0)]
                        w_c = [self.link.weights(a, axis) for a, axis in zip(a_c, hidden, strict=True)]
                    delta = case.inputs["delta"][b, t, h] if "delta" in case.inputs else None
                    g = self.inner_gradient(w_c, k[b, t, h], v[b, t, h], delta, gamma, beta)
                    alpha = [log_alpha[b, t, h].exp().reshape(c) for c in columns]
                    step = [eta[b, t, h].reshape(c) for c in columns]
                    decay = [alpha_i * d for alpha_i, d in zip(alpha, decay, strict=True)]
                    a_t = [
                        (alpha[i] * a_t[i] if target[i] is None else target[i] + alpha[i] * (a_t[i] - target[i]))
                        - step[i] * g[i]
                        for i in range(len(a_0))
                    ]
                    w_t = [
                        self.link.weights(a_t[i], hidden[i])
                        if exact
                        else self.link.read(a_c[i], a_t[i], decay[i], target[i], hidden[i])
                        for i in range(len(a_0))
                    ]
                    y[b, t, h] = self.memory(w_t, q[b, t, h], gamma, beta)
                for i, dual in enumerate(duals):
                    dual[b, h] = a_t[i] if tokens % self.rule.chunk_size == 0 else a_c[i]
        return y, duals


ORACLES = {
    "yaad": Oracle(MirasRule(attentional_bias=HuberMixture()), huber_mixture, Identity()),
    "yaad_coordinate": Oracle(MirasRule(attentional_bias=HuberCoordinate()), huber_coordinate, Identity()),
    "yaad_norm": Oracle(MirasRule(attentional_bias=HuberNorm()), huber_norm, Identity()),
    "moneta": Oracle(MirasRule(attentional_bias=Lp(), retention=Lq()), lp(3), Printed()),
    "moneta_q5": Oracle(MirasRule(attentional_bias=Lp(), retention=Lq(power=5.0)), lp(3), Printed(5.0)),
    "moneta_p5": Oracle(MirasRule(attentional_bias=Lp(power=5.0), retention=Lq()), lp(5), Printed()),
    "moneta_mirror": Oracle(MirasRule(attentional_bias=Lp(), retention=LqMirror()), lp(3), Mirror()),
    "mirror_q3": Oracle(MirasRule(attentional_bias=L2(), retention=LqMirror(power=3.0)), l2, Mirror(3.0)),
    "memora": Oracle(MirasRule(attentional_bias=L2(), retention=KL()), l2, Softmax()),
    "memora_loud": Oracle(
        MirasRule(architecture=MLPMemory(norm_eps=0.01), attentional_bias=L2(), retention=KL()),
        l2,
        Softmax(),
        norm_eps=0.01,
    ),
    "l2_decay": Oracle(MirasRule(attentional_bias=L2(), retention=Decay(weight_cap=None)), l2, Identity(None)),
    "narrow": Oracle(MirasRule(architecture=MLPMemory(expansion=1), attentional_bias=L2()), l2, Identity()),
    "matrix": Oracle(MirasRule(architecture=MatrixMemory(), attentional_bias=L2()), l2, Identity()),
    "matrix_memora": Oracle(
        MirasRule(architecture=MatrixMemory(), attentional_bias=Lp(), retention=KL()), lp(3), Softmax()
    ),
    # guards at work
    "clipped": Oracle(MirasRule(attentional_bias=Lp(residual_clip=0.7, error_cap=1.0)), lp(3, 1.0), Identity(), 0.7),
    "capped": Oracle(MirasRule(attentional_bias=L2(), retention=Decay(weight_cap=0.3)), l2, Identity(0.3)),
    "capped_moneta": Oracle(MirasRule(attentional_bias=L2(), retention=Lq(weight_cap=0.3)), l2, Printed(cap=0.3)),
    "capped_mirror": Oracle(MirasRule(attentional_bias=L2(), retention=LqMirror(weight_cap=0.3)), l2, Mirror(cap=0.3)),
    "floored_moneta": Oracle(MirasRule(attentional_bias=L2(), retention=Lq(norm_floor=0.9)), l2, Printed(floor=0.9)),
}


def oracle_and_case(name: str, gates: str, **changes):
    oracle = ORACLES[name]
    oracle = Oracle(
        dataclasses.replace(oracle.rule, **changes), oracle.loss, oracle.link, oracle.clip, oracle.norm_eps
    )
    return oracle, make_case(oracle.rule, batch=1, tokens=10, head_dim=6, gates=gates)


def assert_equal_to_oracle(oracle: Oracle, case: Case, exact: bool):
    expected, expected_dual = oracle.read(case, exact)
    with torch.no_grad():
        y, state = case(recurrent_miras, output_final_state=True, read="exact" if exact else "linearised")
    assert relative_error(y, expected) < 1e-11
    for got, dual, initial in zip(state.dual, expected_dual, case.parameters.initial, strict=True):
        assert relative_error(got if oracle.rule.decay_target == "zero" else initial + got, dual) < 1e-11


@pytest.mark.parametrize("gates", ["channel", "head"])
@pytest.mark.parametrize("decay_target", ["init", "zero"])
@pytest.mark.parametrize("name", ORACLES)
def test_linearised_reads(name, decay_target, gates):
    assert_equal_to_oracle(*oracle_and_case(name, gates, decay_target=decay_target, chunk_size=4), exact=False)


@pytest.mark.parametrize("chunk_size", [1, 4])
@pytest.mark.parametrize("decay_target", ["init", "zero"])
@pytest.mark.parametrize("name", ORACLES)
def test_exact_reads(name, decay_target, chunk_size):
    """Chunks of one token make this the paper's recurrence."""
    oracle, case = oracle_and_case(name, "channel", decay_target=decay_target, chunk_size=chunk_size)
    assert_equal_to_oracle(oracle, case, exact=True)


@pytest.mark.parametrize("decay_target", ["init", "zero"])
def test_memora_in_weight_space(decay_target):
    """Equation (27): `W_t = c softmax(alpha log W_{t-1} - eta g_t)`, which the dual recurrence equals.

    The two log-weights differ by a constant per simplex, since the gates do not vary along it.
    """
    oracle, case = oracle_and_case("memora", "channel", decay_target=decay_target, chunk_size=1)
    q, k, v, eta, log_alpha = case.inputs.values()
    gamma, beta = case.parameters.norm_weight[0], case.parameters.norm_bias[0]
    axes, columns = (1, 0), ((-1, 1), (1, -1))
    start = weights = [oracle.link.weights(a[0], axis) for a, axis in zip(case.parameters.initial, axes, strict=True)]
    expected = []
    for t in range(q.shape[1]):
        g = oracle.inner_gradient(weights, k[0, t, 0], v[0, t, 0], None, gamma, beta)
        logs = []
        for i in (0, 1):
            alpha, step = log_alpha[0, t, 0].exp().reshape(columns[i]), eta[0, t, 0].reshape(columns[i])
            kept = alpha * weights[i].log()
            if decay_target == "init":
                kept = kept + (1 - alpha) * start[i].log()
            logs.append(kept - step * g[i])
        weights = [oracle.link.weights(a, axis) for a, axis in zip(logs, axes, strict=True)]
        expected.append(oracle.memory(weights, q[0, t, 0], gamma, beta))
    y, _ = case(recurrent_miras, read="exact")
    assert relative_error(y[0, :, 0], torch.stack(expected)) < 1e-11


def test_cases_meet_what_they_test():
    """The inputs lie on both sides of the Huber thresholds, and the guarded cases do meet their guards."""
    for name in ("yaad", "yaad_norm", "yaad_coordinate"):
        oracle, case = oracle_and_case(name, "head")
        y, _ = case(recurrent_miras)
        errors = y - case.inputs["v"]
        size = errors.abs() if name == "yaad_coordinate" else errors.norm(dim=-1)
        share = (size <= case.inputs["delta"]).double().mean().item()
        assert 0.1 < share < 0.9, (name, share)
    for name, guard in (
        ("clipped", "residual"),
        ("capped", "cap"),
        ("capped_moneta", "cap"),
        ("floored_moneta", "floor"),
    ):
        oracle, case = oracle_and_case(name, "head")
        unguarded = {
            "residual": Oracle(oracle.rule, oracle.loss, oracle.link, math.inf),
            "cap": Oracle(oracle.rule, oracle.loss, type(oracle.link)(cap=math.inf)),
            "floor": Oracle(oracle.rule, oracle.loss, Printed()),
        }[guard]
        case = case.tokens(0, 6)
        assert relative_error(unguarded.read(case)[0], oracle.read(case)[0]) > 1e-3, name
