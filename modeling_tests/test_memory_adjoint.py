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
"""The adjoint of the chunk loop: derivatives against autograd of their forwards, choices without, and its bound.

That its gradients are those of the reference is what `test_memory_forms.py` and the files on layouts and states test;
here is what they cannot see: which path was taken, every derivative alone, and what the design space's users add.
"""

import dataclasses
import math
import sys
import weakref

import pytest
import torch
from memory_cases import (
    ARCHITECTURES,
    FORMS,
    MODELS,
    RULES,
    assert_same,
    gradients,
    make_case,
    rule_of,
    values_and_gradients,
)
from torch.utils.checkpoint import checkpoint

from miras_hf.memory import (
    KL,
    L2,
    AttentionalBias,
    Decay,
    Factors,
    GradientDescent,
    HuberCoordinate,
    HuberMixture,
    HuberNorm,
    Lp,
    Lq,
    LqMirror,
    MirasRule,
    MLPMemory,
    RetentionGate,
    adjoint,
    chunk_miras,
    recurrent_miras,
)
from miras_hf.memory.adjoint import has_adjoint
from miras_hf.memory.retention import ChunkWeights
from miras_hf.memory.vjp import DERIVATIVES, LARGEST_STATE_ADJOINT, added, find_derivative, with_vjp


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def groups_by_hand(monkeypatch) -> list:
    """A list that grows by one for every group of chunks that goes back through the adjoint."""
    met, original = [], adjoint._group_adjoint
    monkeypatch.setattr(adjoint, "_group_adjoint", lambda *args: (met.append(1), original(*args))[1])
    return met


# -- which path -----------------------------------------------------------------------------------------------------------


WITH_ADJOINT = [*RULES, *ARCHITECTURES, "nearest", "nearest_zero"]


@pytest.mark.parametrize("name", WITH_ADJOINT)
def test_every_choice_of_the_library_has_its_adjoint(name, monkeypatch):
    assert has_adjoint(rule_of(name))
    met = groups_by_hand(monkeypatch)
    case = make_case(rule_of(name), tokens=13)
    values_and_gradients(case, chunk_miras, final_state=False, chunks_per_group=1)
    assert len(met) == 4
    # the chunk that has begun when the tokens end goes to the state by other means
    values_and_gradients(case, chunk_miras, final_state=True, chunks_per_group=1)
    assert len(met) == 4 + 3


@pytest.mark.parametrize("name", WITH_ADJOINT)
def test_autograd_of_the_chunks_gives_the_same(name, monkeypatch):
    """What everything without an adjoint goes through."""
    case = make_case(rule_of(name), tokens=13)
    expected = values_and_gradients(case, chunk_miras, final_state=False)
    met = groups_by_hand(monkeypatch)
    monkeypatch.setattr("miras_hf.memory.chunk.has_adjoint", lambda rule: False)
    assert_same(values_and_gradients(case, chunk_miras, final_state=False, chunks_per_group=2), expected, 1e-10)
    assert_same(values_and_gradients(case, chunk_miras, final_state=False, chunks_per_group=9), expected, 1e-10)
    assert not met


@pytest.fixture
def tapes(monkeypatch) -> list:
    """Weak references to the keys of every group that is run with its tape, in the order of the runs."""
    met, original = [], adjoint._run

    def run(*args, **kwargs):
        result = original(*args, **kwargs)
        met.append(weakref.ref(result[-1].x.k))
        return result

    monkeypatch.setattr(adjoint, "_run", run)
    return met


@pytest.mark.parametrize("kept_bytes", [None, 0])
def test_what_fits_is_kept(kept_bytes, tapes):
    """Then nothing runs again in the backward pass, which frees what it has read."""
    case = make_case(rule_of("yaad"), tokens=13).requires_grad()
    y, _ = case(chunk_miras, chunks_per_group=2, **({} if kept_bytes is None else {"kept_bytes": kept_bytes}))
    assert [tape() is not None for tape in tapes] == ([True, True] if kept_bytes is None else [])
    y.sum().backward(retain_graph=True)
    assert [tape() for tape in tapes] == [None, None]
    y.sum().backward()  # once more: what is gone is computed again
    assert len(tapes) == 4


def test_activation_checkpointing_frees_what_is_kept(tapes):
    case = make_case(rule_of("yaad"), tokens=13)
    expected = values_and_gradients(case, chunk_miras, final_state=False)
    assert len(tapes) == 1
    met = []

    def checkpointed(*args, **kwargs):
        y = checkpoint(lambda: chunk_miras(*args, **kwargs)[0], use_reentrant=False)
        met.extend(tape() for tape in tapes)
        return y, None

    assert_same(values_and_gradients(case, checkpointed, final_state=False), expected, 1e-13)
    assert met == [None, None]


@pytest.mark.parametrize("wanted", ["q", "v", "eta", "log_alpha", "delta", "initial.0", "norm_weight"])
def test_some_leaves_alone(wanted):
    """A frozen memory, or frozen gates: the rest has its gradient all the same."""
    case = make_case(rule_of("yaad_norm"), tokens=13)
    expected = values_and_gradients(case, recurrent_miras, final_state=False)
    leaf = case.named_leaves()[wanted].requires_grad_()
    y, _ = case(chunk_miras)
    assert_same(gradients({"y": y}, {wanted: leaf}), {f"grad.{wanted}": expected[f"grad.{wanted}"]}, 1e-9)


def test_a_state_alone_asked_for():
    """Reads that nobody uses: the loss is on the final state."""

    def of_state(form):
        case = make_case(rule_of("memora"), tokens=12).requires_grad()
        _, state = case(form, output_final_state=True)
        return gradients({f"dual.{i}": x for i, x in enumerate(state.dual)}, case.named_leaves())

    assert_same(of_state(chunk_miras), of_state(recurrent_miras), 1e-9)


def test_gradients_do_not_depend_on_the_call_before():
    """Adjoints add in place: into nothing that belongs to the caller or to autograd."""
    case = make_case(rule_of("moneta"), tokens=13).requires_grad()
    y, _ = case(chunk_miras)
    first = gradients_twice(y, case)
    second = gradients_twice(y, case)
    assert_same(first, second, 0.0)
    for name, x in make_case(rule_of("moneta"), tokens=13).named_leaves().items():
        assert torch.equal(x, case.named_leaves()[name]), name


def gradients_twice(y, case) -> dict[str, torch.Tensor]:
    leaves = case.named_leaves()
    weights = normal(*y.shape, seed=5)
    kept = weights.clone()
    found = torch.autograd.grad(y, list(leaves.values()), weights, retain_graph=True)
    assert torch.equal(weights, kept)
    return dict(zip(leaves, found, strict=True))


# -- derivatives of the library's choices ----------------------------------------------------------------------------------

BIASES = {
    "l2": L2(),
    "l2_clipped": L2(residual_clip=0.5),
    "l2_unbounded": L2(residual_clip=None),
    "lp_1": Lp(power=1.0),
    "lp_3": Lp(power=3.0),
    "lp_3_guarded": Lp(power=3.0, error_cap=1.0, residual_clip=1.0),
    "lp_2.5_tanh": Lp(power=2.5, sign="tanh", sharpness=2.0),
    "lp_4_tanh": Lp(power=4.0, sign="tanh", error_cap=1.0),
    "huber_coordinate": HuberCoordinate(residual_clip=0.8),
    "huber_norm": HuberNorm(residual_clip=0.8),
    "huber_mixture": HuberMixture(residual_clip=0.8),
}


@pytest.mark.parametrize("name", BIASES)
def test_derivatives_of_residuals(name):
    bias, errors = BIASES[name], normal(3, 40, 8).requires_grad_()
    delta = None
    if bias.delta_granularity is not None:
        delta = 0.4 + 1.2 * normal(3, 40, 8, seed=1).abs()
        if bias.delta_granularity == "head":
            delta = delta[..., :1] * math.sqrt(8)
        delta.requires_grad_()
    for forward in (bias.residual, bias.gradient):
        expected = forward(errors, delta)
        with torch.no_grad():
            residual, vjp = find_derivative(forward)(errors, delta)
            found = vjp(normal(3, 40, 8, seed=2))
        leaves = [errors] if delta is None else [errors, delta]
        wanted = torch.autograd.grad(expected, leaves, normal(3, 40, 8, seed=2), materialize_grads=True)
        torch.testing.assert_close(residual, expected.detach(), rtol=1e-12, atol=1e-14)
        assert (found[1] is None) == (delta is None)
        for got, want in zip(found, wanted, strict=False):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


GATES = {
    "decay": Decay(),
    "decay_capped": Decay(weight_cap=0.3),
    "decay_uncapped": Decay(weight_cap=None),
    "lq": Lq(),
    "lq_5": Lq(power=5.0),
    "lq_capped": Lq(weight_cap=0.3),
    "lq_floored": Lq(norm_floor=100.0, weight_cap=None),
    "lq_floored_capped": Lq(norm_floor=0.5, weight_cap=0.1),
    "mirror": LqMirror(),
    "mirror_3.5_capped": LqMirror(power=3.5, weight_cap=0.3),
    "kl": KL(),
}


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("hidden_axis, shape", [(-1, (3, 6, 10)), (-2, (3, 10, 6))])
@pytest.mark.parametrize("name", GATES)
def test_derivatives_of_links(name, hidden_axis, shape, with_base):
    """The weights, what the link does to writes, and the adjoints of both; a gate without falls back to autograd."""
    gate = GATES[name]
    state, base = 0.3 * normal(*shape), normal(*shape, seed=1) if with_base else None
    factors = [normal(3, 4, shape[1], seed=2), normal(3, 4, shape[2], seed=3)]

    def loss(parts):
        return sum((part * normal(*part.shape, seed=10 + i)).sum() for i, part in enumerate(parts) if part is not None)

    # by autograd, from end to end
    leaves = [x.clone().requires_grad_() for x in (state, *([base] if with_base else []), *factors)]
    weights = gate.at_chunk_start(leaves[0], leaves[1] if with_base else None, hidden_axis)
    mapped = gate.writes(weights, Factors(*leaves[-2:]), hidden_axis)
    expected = torch.autograd.grad(loss([*weights[:4], *mapped]), leaves, materialize_grads=True)

    # by derivatives
    linked, linked_vjp = with_vjp(gate.at_chunk_start, state, base, hidden_axis)
    with torch.no_grad():
        for got, want in zip(linked, weights, strict=True):
            assert (got is None) == (want is None)
            if got is not None:
                torch.testing.assert_close(got, want.detach(), rtol=1e-12, atol=1e-14)
        bars = [None if part is None else normal(*part.shape, seed=10 + i) for i, part in enumerate(weights[:4])]
        written = Factors(*(normal(*part.shape, seed=14 + i) for i, part in enumerate(mapped)))
        again, writes_vjp = find_derivative(gate.writes)(linked, Factors(*factors), hidden_axis)
        torch.testing.assert_close(again[0], mapped[0].detach(), rtol=1e-12, atol=1e-14)
        by_writes, written, _ = writes_vjp(written)
        of_state, of_base, _ = linked_vjp(added(ChunkWeights(*bars), by_writes))
    found = [of_state, *([of_base] if with_base else []), *written]
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("gate_dim", [1, 6])
def test_derivative_of_the_gates(gate_dim):
    eta, steps = normal(3, 5, gate_dim).abs(), -0.5 * normal(3, 5, gate_dim, seed=1).abs()
    leaves = [eta.requires_grad_(), steps.cumsum(-2).requires_grad_()]
    algorithm = GradientDescent()
    expected = algorithm.chunk_gates(*leaves)
    tensors = [x for x in expected if isinstance(x, torch.Tensor)]
    bars = [normal(*x.shape, seed=2 + i) for i, x in enumerate(tensors)]
    wanted = torch.autograd.grad(tensors, leaves, bars)
    with torch.no_grad():
        gates, vjp = find_derivative(algorithm.chunk_gates)(*leaves)
        remaining = iter(bars)
        found = vjp(type(gates)(*(next(remaining) if isinstance(x, torch.Tensor) else x for x in gates)))
    for got, want in zip(
        (*(x for x in gates if isinstance(x, torch.Tensor)), *found), (*tensors, *wanted), strict=True
    ):
        torch.testing.assert_close(got, want.detach(), rtol=1e-11, atol=1e-12)


# -- choices of one's own: a forward is enough -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PseudoHuber(AttentionalBias):
    """A bias of one's own."""

    def loss(self, error, delta=None):
        return ((1 + error.square()).sqrt() - 1).sum(-1, keepdim=True)

    def gradient(self, error, delta=None):
        return error / (1 + error.square()).sqrt()


@dataclasses.dataclass(frozen=True)
class Doubled(L2):
    """A choice of the library with a forward of one's own: the derivative of the old forward must not serve."""

    def gradient(self, error, delta=None):
        return 2 * error


@dataclasses.dataclass(frozen=True)
class OwnGuard(L2):
    def residual(self, error, delta=None):
        return torch.tanh(error)


@dataclasses.dataclass(frozen=True)
class Sigmoid(RetentionGate):
    """The Bregman divergence of the logistic entropy, linearised at the chunk's start: its slope as a rank-one map."""

    def link(self, dual, hidden_axis):
        return torch.sigmoid(dual) - 0.5

    def at_chunk_start(self, state, base, hidden_axis):
        dual = state if base is None else base + state
        weight = self.link(dual, hidden_axis)
        slope = (0.25 - weight.square()).mean((-2, -1), keepdim=True)
        return ChunkWeights(weight, constant=weight, columns=slope.expand_as(weight[..., :1, :]))

    def inverse(self, weight, hidden_axis):
        return torch.logit(weight + 0.5)


@dataclasses.dataclass(frozen=True)
class HalfDecay(Decay):
    def scale(self, dual):
        return 0.5 / (1 + dual.square().mean((-2, -1), keepdim=True))


@dataclasses.dataclass(frozen=True)
class Sine(MLPMemory):
    """An architecture of one's own."""

    def read(self, linear, x, norm_weight, norm_bias):
        return norm_weight * linear(1, torch.sin(linear(0, x))) + norm_bias

    def write(self, weights, k, residual, norm_weight, norm_bias):
        z = k @ weights[0]
        gradient = norm_weight * residual(norm_weight * (torch.sin(z) @ weights[1]) + norm_bias)
        return Factors(k, (gradient @ weights[1].mT) * torch.cos(z)), Factors(torch.sin(z), gradient)


OWN = {
    "bias": (MirasRule(attentional_bias=PseudoHuber(), chunk_size=4), True),
    "gradient": (MirasRule(attentional_bias=Doubled(residual_clip=1.0), chunk_size=4), True),
    "guard": (MirasRule(attentional_bias=OwnGuard(), chunk_size=4), True),
    "gate": (MirasRule(attentional_bias=L2(), retention=Sigmoid(), chunk_size=4), True),
    "scale": (MirasRule(attentional_bias=L2(), retention=HalfDecay(), chunk_size=4), True),
    "architecture": (MirasRule(architecture=Sine(), attentional_bias=L2(), chunk_size=4), False),
}


@dataclasses.dataclass(frozen=True)
class Damped(MirasRule):
    """A rule with a step of one's own: the derivative of the cell must not serve."""

    def write(self, weights, k, v, delta, norm):
        return tuple(f._replace(gradients=f.gradients * 0.5) for f in super().write(weights, k, v, delta, norm))


@pytest.mark.parametrize("name", ["yaad", "moneta_mirror", "memora", "matrix"])
def test_a_rule_with_a_step_of_its_own(name):
    """Half the gradients are half the step of the rule that it changes."""
    rule = rule_of(name)
    case = make_case(rule, tokens=12)
    half = case._replace(inputs=case.inputs | {"eta": 0.5 * case.inputs["eta"]})
    expected = values_and_gradients(half, chunk_miras, final_state=False)
    damped = Damped(**{field.name: getattr(rule, field.name) for field in dataclasses.fields(rule)})
    found = values_and_gradients(case._replace(rule=damped), chunk_miras, final_state=False)
    assert_same(found, expected | {"grad.eta": 0.5 * expected["grad.eta"]}, 1e-9)


@pytest.mark.parametrize(
    "methods", [(f, *others) for f, (_, others) in DERIVATIVES.items()], ids=lambda m: m[0].__qualname__
)
def test_no_derivative_serves_what_it_does_not_know(methods):
    """Of every derivative: it is found for the class it was written for, and for no class that overrides its formulas."""
    module = sys.modules[methods[0].__module__]
    owner = getattr(module, methods[0].__qualname__.split(".")[0])
    name = methods[0].__name__
    assert find_derivative(getattr(owner(), name)) is not None
    for method in methods:

        def own(self, *args, method=method):
            return method(self, *args)

        changed = type("Changed", (owner,), {method.__name__: own})
        assert find_derivative(getattr(changed(), name)) is None


@pytest.mark.parametrize("form", [name for name in FORMS if name != "recurrent"])
@pytest.mark.parametrize("name", OWN)
def test_choices_without_derivatives(name, form, monkeypatch):
    rule, by_hand = OWN[name]
    assert has_adjoint(rule) == by_hand
    case = make_case(rule, tokens=13)
    if name == "gate":  # weights of the sigmoid stay below one half, whose logit is the dual
        parameters = case.parameters
        initial = tuple(0.5 * normal(*a.shape, seed=i) for i, a in enumerate(parameters.initial))
        case = case._replace(parameters=parameters._replace(initial=initial))
    for final_state in (True, False):
        expected = values_and_gradients(case, recurrent_miras, final_state)
        assert_same(values_and_gradients(case, FORMS[form], final_state), expected, 1e-9)


# -- the bound on the state's adjoint --------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_hand", [True, False], ids=["adjoint", "autograd"])
@pytest.mark.parametrize("name", MODELS)
def test_adjoints_of_states_are_bounded(name, by_hand, monkeypatch):
    """What reaches a token from later chunks saturates, direction kept; far below the bound it is linear."""
    if not by_hand:
        monkeypatch.setattr("miras_hf.memory.chunk.has_adjoint", lambda rule: False)
    case = make_case(rule_of(name), batch=1, tokens=16, heads=1).requires_grad()
    y, _ = case(chunk_miras)
    bar = normal(*y.shape)
    bar[:, :12] = 0.0  # the last chunk alone is used: all that the first three get comes through its state

    def early(scale):
        found = torch.autograd.grad(y, [case.inputs["k"], case.inputs["eta"]], scale * bar, retain_graph=True)
        return {str(i): x[:, :12] for i, x in enumerate(found)}

    assert_same(early(1e5), {i: 1e5 * x for i, x in early(1.0).items()}, 1e-10)
    assert_same(early(1e30), early(1e20), 1e-10)
    assert 0 < max(x.abs().amax() for x in early(1e30).values()) < 1e3 * LARGEST_STATE_ADJOINT
