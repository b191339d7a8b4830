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
"""Derivatives that are not one backward pass: second ones, and those of the transforms of `torch.func` and of traces.

Adjoints written by hand serve a backward pass and nothing else; whatever else asks for a derivative must get the right
one. Here it is held against finite differences of gradients and against derivatives taken another way.
"""

import pytest
import torch
from memory_cases import ARCHITECTURES, RULES, make_case, rule_of
from torch import func
from torch.autograd import gradgradcheck

import miras_hf
from miras_hf.memory import MemoryParameters, chunk_miras, recurrent_miras, step_miras, step_miras_


def on_leaves(case, form=chunk_miras, **options):
    """The form as a function of `case.named_leaves()`."""

    def call(leaves):
        inputs = {name: leaves[name] for name in case.inputs}
        initial = tuple(leaves[f"initial.{i}"] for i in range(len(case.parameters.initial)))
        parameters = MemoryParameters(initial, leaves["norm_weight"], leaves["norm_bias"])
        return form(**inputs, rule=case.rule, parameters=parameters, **options)

    return call


def number(y, state=None):
    """A number that depends on every output, each with its own weight."""
    outputs = [y, *(() if state is None else state.dual)]
    weights = [torch.linspace(0.0, 7.0, x.numel(), dtype=x.dtype).cos().view(x.shape) for x in outputs]
    return sum((x * weight).sum() for x, weight in zip(outputs, weights, strict=True))


def stacked(x):
    return torch.stack((x, 0.9 * x, 0.8 * x))


# -- second derivatives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("final_state", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("name", [*RULES, *ARCHITECTURES])
def test_second_derivatives(name, final_state):
    """Against finite differences of gradients; with a final state the last chunk goes back by other means."""
    case = make_case(rule_of(name), tokens=6, batch=1, heads=1, head_dim=3)
    leaves = {key: x.requires_grad_() for key, x in case.named_leaves().items()}
    call = on_leaves(case, output_final_state=final_state)
    y, _ = call(leaves)
    plain, first = (
        torch.autograd.grad(
            number(y),
            list(leaves.values()),
            create_graph=twice,
            retain_graph=True,
            materialize_grads=True,
            allow_unused=True,
        )
        for twice in (False, True)
    )
    for found, expected in zip(first, plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert gradgradcheck(
        lambda *xs: call(dict(zip(leaves, xs, strict=True)))[0],
        tuple(leaves.values()),
        fast_mode=True,
        atol=1e-5,
        rtol=1e-3,
    )


@pytest.mark.parametrize("options", [{"chunks_per_group": 1, "kept_bytes": 0}, {"chunks_per_group": 2}])
def test_second_derivatives_of_recomputed_groups(options, monkeypatch):
    """One group in one piece, groups of which one feeds the next, and `torch.utils.checkpoint`."""
    case = make_case(rule_of("moneta"), tokens=13).requires_grad()
    leaves = case.named_leaves()

    def twice(**options):
        first = torch.autograd.grad(number(*case(chunk_miras, **options)), list(leaves.values()), create_graph=True)
        return *first, *torch.autograd.grad(sum(number(g) for g in first), list(leaves.values()))

    expected = twice()
    for way in ("by hand", "by autograd"):
        if way == "by autograd":
            monkeypatch.setattr("miras_hf.memory.chunk.has_adjoint", lambda rule: False)
        for found, other in zip(twice(**options), expected, strict=True):
            torch.testing.assert_close(found, other, rtol=1e-9, atol=1e-9 * float(other.detach().abs().max()))


def test_inputs_computed_from_each_other():
    """The adjoint of a query is not to hold that of the key that was made from it."""
    case = make_case(rule_of("yaad"), tokens=5)
    x = case.inputs["q"].clone().requires_grad_()

    def read(x):
        k = 0.5 * x
        return number(*case._replace(inputs={**case.inputs, "q": x, "k": k, "v": k.sin()})(chunk_miras))

    plain = torch.autograd.grad(read(x), x)[0]
    torch.testing.assert_close(torch.autograd.grad(read(x), x, create_graph=True)[0], plain, rtol=1e-12, atol=1e-12)


def tiny_model(name, **options):
    torch.manual_seed(0)
    config = getattr(miras_hf, f"{name}Config")(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=2,
        chunk_size=4,
        memory_backend="pytorch",
        **options,
    )
    return getattr(miras_hf, f"{name}ForCausalLM")(config).double().eval()


@pytest.fixture
def in_float64(monkeypatch):
    """Models take some tensors to float32, whose rounding finite differences would show."""
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x)


MODELS = [
    ("Yaad", {}),
    ("Moneta", {"gate_granularity": "head", "use_rope": True}),
    ("Memora", {}),
]


@pytest.mark.parametrize("name,options", MODELS)
def test_hessian_vector_products_of_a_model(name, options, in_float64):
    model = tiny_model(name, **options)
    generator = torch.Generator().manual_seed(0)
    embeds, direction = (torch.randn(1, 11, 16, generator=generator, dtype=torch.float64) for _ in range(2))

    def loss(embeds):
        return model(inputs_embeds=embeds, use_cache=False).logits.square().mean()

    def gradient(embeds):
        embeds = embeds.detach().requires_grad_()
        return torch.autograd.grad(loss(embeds), embeds)[0]

    step = 1e-5
    expected = (gradient(embeds + step * direction) - gradient(embeds - step * direction)) / (2 * step)
    _, product = torch.autograd.functional.hvp(loss, embeds, direction)
    tolerance = {"rtol": 1e-6, "atol": 1e-7 * float(expected.abs().max())}
    torch.testing.assert_close(product, expected, **tolerance)
    leaf = embeds.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(first, leaf, direction)[0], expected, **tolerance)
    product = func.jvp(func.grad(loss), (embeds,), (direction,))[1]
    torch.testing.assert_close(product, expected, **tolerance)


# -- transforms -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["yaad", "moneta", "moneta_mirror", "memora", "matrix"])
def test_transforms_of_the_chunk_form(name):
    case = make_case(rule_of(name), tokens=9)
    leaves = case.named_leaves()
    call = on_leaves(case, output_final_state=True)

    def loss(leaves):
        return number(*call(leaves))

    own = {key: x.clone().requires_grad_() for key, x in leaves.items()}
    found = torch.autograd.grad(loss(own), list(own.values()), materialize_grads=True, allow_unused=True)
    expected = dict(zip(own, found, strict=True))
    for key, other in func.grad(loss)(leaves).items():
        torch.testing.assert_close(other, expected[key], rtol=1e-9, atol=1e-12)
    _, along = func.jvp(loss, (leaves,), (leaves,))
    torch.testing.assert_close(along, sum((expected[key] * x).sum() for key, x in leaves.items()))
    with torch.autograd.forward_ad.dual_level():
        dual = {key: torch.autograd.forward_ad.make_dual(x, x) for key, x in leaves.items()}
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent, along)
    every = func.vmap(func.grad(loss))({key: stacked(x) for key, x in leaves.items()})
    for key, other in expected.items():
        torch.testing.assert_close(every[key][0], other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["yaad", "moneta_zero", "memora"])
def test_each_leaf_batched_alone(name):
    """Every product has factors that are batched beside others that are not."""
    case = make_case(rule_of(name), tokens=9)
    leaves = case.named_leaves()
    call = on_leaves(case)
    for key, x in leaves.items():
        many = stacked(x)
        expected = torch.stack([call({**leaves, key: one})[0] for one in many])
        found = func.vmap(lambda one, key=key: call({**leaves, key: one})[0])(many)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("phase", [2, 3])
def test_transforms_of_a_step(phase):
    """In the middle of a chunk and at its end."""
    case = make_case(rule_of("moneta"), tokens=phase + 1)
    _, state = case.tokens(0, phase)(chunk_miras, output_final_state=True)
    last = case.tokens(phase, None)
    leaves = last.named_leaves()

    def step(leaves, state):
        return number(*on_leaves(last, step_miras, initial_state=state)(leaves))

    own = {key: x.clone().requires_grad_() for key, x in leaves.items()}
    expected = dict(zip(own, torch.autograd.grad(step(own, state), list(own.values())), strict=True))
    for key, other in func.grad(step)(leaves, state).items():
        torch.testing.assert_close(other, expected[key], rtol=1e-9, atol=1e-12)
    states = state.map(stacked)._replace(count=torch.stack((state.count,) * 3))
    each = [states.map(lambda x, i=i: x[i]) for i in range(3)]
    found = func.vmap(step, (None, 0))(leaves, states)
    torch.testing.assert_close(found, torch.stack([step(leaves, one) for one in each]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", [chunk_miras, step_miras])
def test_traces(form):
    """A trace serves numbers that it has not seen."""
    case = make_case(rule_of("yaad"), tokens=9 if form is chunk_miras else 1)
    leaves = {key: x.requires_grad_() for key, x in case.named_leaves().items()}

    def read(*xs):
        return on_leaves(case, form)(dict(zip(leaves, xs, strict=True)))[0]

    traced = torch.jit.trace(read, tuple(leaves.values()))
    others = tuple((0.9 * x).detach().requires_grad_() for x in leaves.values())
    found, expected = traced(*others), read(*others)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    found, expected = (torch.autograd.grad(number(y), others) for y in (found, expected))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_transforms_of_a_model(in_float64):
    model = tiny_model("Yaad")
    generator = torch.Generator().manual_seed(0)
    embeds, direction = (torch.randn(2, 9, 16, generator=generator, dtype=torch.float64) for _ in range(2))

    def loss(embeds):
        return number(model(inputs_embeds=embeds, use_cache=False).logits)

    leaf = embeds.clone().requires_grad_()
    value = loss(leaf)
    (expected,) = torch.autograd.grad(value, leaf)
    torch.testing.assert_close(func.grad(loss)(embeds), expected)
    torch.testing.assert_close(func.jvp(loss, (embeds,), (direction,))[1], (expected * direction).sum())
    torch.testing.assert_close(func.vmap(loss)(stacked(embeds))[0], value)
    torch.testing.assert_close(func.vmap(func.grad(loss))(stacked(embeds))[0], expected)


# -- refusals ---------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_transformed_says_so():
    case = make_case(rule_of("yaad"), tokens=1)
    leaves = case.named_leaves()
    _, state = case(chunk_miras, output_final_state=True)
    with pytest.raises(RuntimeError, match="`step_miras_` writes into its `state`"):
        func.vmap(lambda x: on_leaves(case, step_miras_, state=state)(x)[0])(
            {k: stacked(x) for k, x in leaves.items()}
        )
    with pytest.raises(RuntimeError, match="`recurrent_miras` takes its inner gradients by autograd"):
        func.vmap(lambda x: on_leaves(case, recurrent_miras)(x)[0])({k: stacked(x) for k, x in leaves.items()})
    with pytest.raises(RuntimeError, match="`recurrent_miras` takes its inner gradients by autograd"):
        func.jvp(lambda x: on_leaves(case, recurrent_miras)(x)[0], (leaves,), (leaves,))
