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
"""The exact solution: a memory that solves the ridge regression of all that it has read, against the regression itself."""

import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from memory_cases import (
    FORMS,
    OTHER_FORMS,
    Case,
    assert_pads_and_packs_change_nothing,
    assert_same,
    assert_taken_over,
    make_case,
    relative_error,
    values_and_gradients,
)
from memory_effects import assert_saved_taken_back_and_speculated
from test_memory_stability import streams

from miras_hf import MirasConfig, MirasForCausalLM
from miras_hf.memory import (
    KL,
    L2,
    Decay,
    Dot,
    Exact,
    MatrixMemory,
    MirasRule,
    MLPMemory,
    NoRetention,
    chunk_miras,
    fold_step_,
    folds_at_once,
    recurrent_miras,
    step_miras_,
)
from miras_hf.memory.diagnostics import memory_statistics
from miras_hf.memory.naive import naive_miras
from miras_hf.memory.probe import probe_memory
from miras_hf.model_card import four_choices


def exact(retention=Decay, decay_target="zero", chunk_size=4, ridge_floor=0.25) -> MirasRule:
    algorithm = Exact(ridge_floor=ridge_floor)
    return MirasRule(
        MatrixMemory(), L2(residual_clip=None), retention(weight_cap=None), algorithm, chunk_size, decay_target
    )


RULES = {
    "zero": exact(),
    "init": exact(decay_target="init"),
    "none": exact(NoRetention),
    "floor": exact(ridge_floor=2.0),
}


def exact_case(rule="zero", tokens=13, **options):
    rule = rule if isinstance(rule, MirasRule) else RULES[rule]
    case = make_case(rule, tokens=tokens, gates="head", **options)
    return case._replace(inputs=case.inputs | {"eta": 9 * case.inputs["eta"]})


def regression(case, row, head):
    """The reads of one head: of every token the ridge regression of all before it and of itself, its rows weighted by what is
    left of them and the ridge's pull among its rows, by least squares."""
    x = {name: t[row, :, head].double() for name, t in case.inputs.items()}
    kept = x["log_alpha"].cumsum(0) if case.rule.retention.forgets else torch.zeros_like(x["log_alpha"])
    logits, start = case.parameters.norm_weight[head].double(), case.parameters.initial[0][head].double()
    ridge = case.rule.algorithm.ridge_floor + F.softplus(logits)
    reads = []
    for t, q in enumerate(x["q"]):
        weight = (x["eta"][: t + 1] * (kept[t] - kept[: t + 1]).exp()).sqrt().unsqueeze(-1)
        left = 1.0 if case.rule.decay_target == "init" else kept[t].exp()
        # |Lambda^(1/2) (W - Lambda^(-1) G_0)|^2
        design = torch.cat((weight * x["k"][: t + 1], ridge.sqrt().diag()))
        target = torch.cat((weight * x["v"][: t + 1], left * start / ridge.sqrt().unsqueeze(-1)))
        reads.append(q @ torch.linalg.lstsq(design, target).solution)
    return torch.stack(reads)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", RULES)
def test_reads_are_those_of_the_regression(rule, form):
    case = exact_case(rule)
    expected = torch.stack(
        [torch.stack([regression(case, row, head) for head in range(2)], dim=1) for row in range(2)]
    )
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        for chunk_size in (1, 4, 13):
            given = case._replace(rule=dataclasses.replace(case.rule, chunk_size=chunk_size)).to(dtype)
            assert relative_error(given(FORMS[form])[0], expected) < tolerance


@pytest.mark.parametrize("form", OTHER_FORMS)
@pytest.mark.parametrize("rule", RULES)
def test_forms_agree(rule, form):
    case = exact_case(rule)
    for final_state in (True, False):
        expected = values_and_gradients(case, recurrent_miras, final_state)
        assert_same(values_and_gradients(case, FORMS[form], final_state), expected, 1e-9)


@pytest.mark.parametrize("rule", ["zero", "init"])
def test_the_naive_form_says_the_same(rule):
    case = exact_case(rule, batch=1, heads=1, tokens=9)
    x = {name: t[0, :, 0] for name, t in case.inputs.items()}
    x |= {"eta": x["eta"].unsqueeze(-1), "alpha": x.pop("log_alpha").exp().unsqueeze(-1)}
    initial, *norm = case.parameters
    y = naive_miras(**x, rule=case.rule, initial=[a[0] for a in initial], norm=[p[0] for p in norm])
    assert relative_error(y, case(chunk_miras)[0][0, :, 0]) < 1e-12


@pytest.mark.parametrize("then", ["recurrent", "chunk", "chunk_groups_of_1", "decode"])
@pytest.mark.parametrize("first", ["recurrent", "chunk", "decode"])
def test_forms_take_over_from_each_other(first, then):
    assert_taken_over(exact_case("init"), FORMS[first], FORMS[then], 1e-11)


@pytest.mark.parametrize("rule", ["zero", "none", "init"])
def test_steps_in_place(rule):
    """A token that waits in its slot and, where nothing stays of the initial memory, one that is folded at once."""
    case = exact_case(rule)
    whole, end = case(recurrent_miras, output_final_state=True)
    assert folds_at_once(case.rule) == (rule != "init")
    for step in (step_miras_, fold_step_) if rule != "init" else (step_miras_,):
        _, state = case.tokens(0, 2)(chunk_miras, output_final_state=True)
        weights = None
        for t in range(2, 11):
            y, weights = case.tokens(t, t + 1)(step, state=state, weights=weights)
            assert relative_error(y, whole[:, t : t + 1]) < 1e-11
        assert any(t.any() for t in state.slots) == (step is step_miras_)
        y, state = case.tokens(11, 13)(chunk_miras, initial_state=state, output_final_state=True)
        assert relative_error(y, whole[:, 11:]) < 1e-11
        for got, want in zip(state.leaves(), end.leaves(), strict=True):
            assert relative_error(got, want) < 1e-11
    # a row without a token stays where it is
    if rule != "init":
        _, state = case.tokens(0, 2)(chunk_miras, output_final_state=True)
        y, _ = case.tokens(2, 3)(fold_step_, state=state, lengths=torch.tensor([0, 1]))
        assert not y[0].any() and relative_error(y[1], whole[1, 2:3]) < 1e-11 and state.count.tolist() == [2, 3]
        y, _ = case.row(0).tokens(2, None)(chunk_miras, initial_state=state.map(lambda t: t[:1]))
        assert relative_error(y[0], whole[0, 2:]) < 1e-11


@pytest.mark.parametrize("form", FORMS)
def test_pads_and_packs(form):
    assert_pads_and_packs_change_nothing(exact_case(batch=1), FORMS[form], 1e-11, packs=form != "decode")


@pytest.mark.parametrize("rule", ["zero", "init"])
def test_gradients_of_finite_differences(rule):
    case = exact_case(rule, tokens=6, batch=1, heads=1, head_dim=3)
    leaves = {key: x.requires_grad_() for key, x in case.named_leaves().items() if key != "norm_bias"}
    assert torch.autograd.gradcheck(
        lambda *_: case(chunk_miras)[0], tuple(leaves.values()), fast_mode=True, atol=1e-6, rtol=1e-4
    )


@pytest.mark.parametrize(("form", "tokens"), [("chunk", 512), ("recurrent", 16), ("decode", 16)])
@pytest.mark.parametrize("step", [1.0, 1e3])
def test_adversarial_streams(step, form, tokens):
    """Values and gradients are finite, of keys and steps far above any model's too, with which the ridge goes under in what is
    rounded."""
    rows = [tuple(x.unsqueeze(-2) for x in row) for row in streams(tokens, 64).values()]
    q, k, v = (torch.stack(x) for x in zip(*rows, strict=True))
    inputs = {
        "q": q,
        "k": k,
        "v": v,
        "eta": torch.full(q.shape[:3], step),
        "log_alpha": torch.full(q.shape[:3], -1e-3),
    }
    rule = dataclasses.replace(RULES["zero"], chunk_size=64)
    parameters = make_case(rule, heads=1, head_dim=16, dtype=torch.float32).parameters
    found = values_and_gradients(Case(rule, inputs, parameters), FORMS[form])
    assert all(t.isfinite().all() for t in found.values())


def test_a_memory_gives_back_what_it_was_told():
    """As many keys as it is wide and a small ridge: every value, where gradient descent is still on its way."""
    rule = exact(NoRetention, ridge_floor=1e-6, chunk_size=8)
    case = exact_case(rule, tokens=16)
    case.inputs["k"] = case.inputs["k"][:, :8].repeat(1, 2, 1, 1)
    case.inputs["v"] = case.inputs["v"][:, :8].repeat(1, 2, 1, 1)
    case.inputs["q"], case.inputs["eta"] = case.inputs["k"], torch.ones_like(case.inputs["eta"])
    parameters = case.parameters._replace(
        initial=(torch.zeros_like(case.parameters.initial[0]),),
        norm_weight=torch.full_like(case.parameters.norm_weight, -20.0),
    )
    y, _ = case._replace(parameters=parameters)(chunk_miras)
    assert relative_error(y[:, 8:], case.inputs["v"][:, 8:]) < 1e-2


@pytest.mark.parametrize("form", ["recurrent", "chunk", "decode"])
def test_a_broken_token_reaches_no_other_before_it(form):
    case = exact_case()
    whole, _ = case(FORMS[form])
    for name in ("k", "v", "eta", "log_alpha"):
        x = case.inputs[name].clone()
        x[0, 6] = torch.nan
        y, state = case._replace(inputs=case.inputs | {name: x})(FORMS[form], output_final_state=True)
        assert torch.equal(y[1], whole[1]) or relative_error(y[1], whole[1]) < 1e-12
        assert relative_error(y[0, :6], whole[0, :6]) < 1e-12 and y[0, 6:].isnan().all()
        assert state.dual[0][0].isnan().any() and not state.dual[0][1].isnan().any()


def test_what_does_not_fit_is_refused():
    for fields, why in (
        ({"architecture": MLPMemory()}, "of a matrix memory only"),
        ({"attentional_bias": Dot(residual_clip=None)}, "of the l2 loss"),
        ({"attentional_bias": L2()}, "with `residual_clip=None`"),
        ({"retention": KL()}, "with decay or none"),
        ({"retention": Decay()}, "`weight_cap=None`"),
    ):
        with pytest.raises(ValueError, match=f"`algorithm` must fit.*{why}"):
            dataclasses.replace(RULES["zero"], **fields)
    with pytest.raises(ValueError, match="`ridge_floor` must be above 0, got 0"):
        Exact(ridge_floor=0.0)
    case = exact_case()
    channels = case.inputs["log_alpha"].unsqueeze(-1).expand_as(case.inputs["q"])
    for name in ("eta", "log_alpha"):
        with pytest.raises(ValueError, match=f"`{name}` must have shape .2, 13, 2. for Exact, got last axis 8"):
            case._replace(inputs=case.inputs | {name: channels})(chunk_miras)


def test_probes_ask_as_the_memory_is_read():
    """Where nothing was read before a chunk, what it returns for its keys is what its initial memory solves."""
    case = exact_case("init", tokens=4)
    statistics = case(memory_statistics)
    ridge = case.rule.algorithm.ridge_floor + F.softplus(case.parameters.norm_weight)
    found = torch.einsum("bthi,hij->bthj", case.inputs["k"] / ridge, case.parameters.initial[0])
    loss = 0.5 * (found - case.inputs["v"]).square().sum(-1).mean((0, 1))
    assert relative_error(statistics.inner_loss, loss) < 1e-12
    probe = exact_case(tokens=24)(probe_memory, lags=(0, 4))
    assert all(x.isfinite().all() for x in probe[:-1])


SMALL = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "chunk_size": 4,
}
IDS = torch.randint(32, (2, 11), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return MirasForCausalLM(MirasConfig.from_preset("mesa", **SMALL)).eval()


def test_a_model_has_a_ridge_and_decodes_as_it_reads(model):
    memory = model.model.layers[0].mixer.memory
    torch.testing.assert_close(0.25 + F.softplus(memory.norm_weight), torch.ones(4, 8))
    assert memory.backend.reason == "kernels do not know Exact"
    model(IDS, labels=IDS).loss.backward()
    assert memory.norm_weight.grad.abs().max() > 0
    with torch.no_grad():
        whole = model(IDS).logits
        cache, parts = None, []
        for start, stop in ((0, 5), (5, 6), (6, 7), (7, 8), (8, 11)):
            out = model(IDS[:, start:stop], past_key_values=cache, use_cache=True)
            cache, parts = out.past_key_values, [*parts, out.logits]
    assert relative_error(torch.cat(parts, dim=1), whole) < 1e-5


def test_a_memory_is_saved_taken_back_and_speculated(model, tmp_path):
    assert_saved_taken_back_and_speculated(model, IDS[:1], tmp_path, read=5, decoded=1)


def test_a_config_says_what_does_not_fit(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = MirasForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    config = MirasConfig.from_pretrained(tmp_path, ridge_floor=0.5)
    assert "`exact`, `ridge_floor` = 0.5, computed in chunks of 4 tokens" in four_choices(config)
    # a step of one whatever the chunk: no sum overshoots
    fields = {
        name: getattr(config, name) for name in ("memory_architecture", "learning_algorithm", "gate_granularity")
    }
    fields |= {"residual_clip": None, "weight_cap": None}
    assert MirasConfig(**SMALL | {"chunk_size": 64}, **fields).eta_max == 1.0
    for changed, why in (
        ({"memory_architecture": "mlp"}, "of a matrix memory only, got `memory_architecture='mlp'`"),
        ({"residual_clip": 3.0}, "with `residual_clip=None`, got .*`residual_clip=3.0`"),
        ({"attentional_bias": "huber_norm"}, "of the l2 loss.*`attentional_bias='huber_norm'`"),
        ({"retention": "kl", "weight_cap": 2.0}, "with decay or none.*`retention='kl'`"),
        ({"weight_cap": 2.0}, "`weight_cap=None`"),
        ({"gate_granularity": "channel"}, "`gate_granularity` must be 'head' with `learning_algorithm='exact'`"),
        ({"ridge_floor": 0.0}, "must be above 0"),
        ({"learning_algorithm": "gradient_descent", "ridge_floor": 0.5}, "`ridge_floor` means nothing without"),
    ):
        with pytest.raises(StrictDataclassError, match=f"(?s){why}"):
            MirasConfig(**SMALL, **{**fields, **changed})


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_compiled_is_eager(backend):
    torch._dynamo.reset()
    case = exact_case()
    compiled = torch.compile(chunk_miras, backend=backend, fullgraph=True)
    expected = values_and_gradients(case, chunk_miras)
    assert_same(values_and_gradients(case, functools.partial(compiled)), expected, 1e-9)
