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
"""Momentum, the second learning algorithm: every form against the reference, the reference against a head written out."""

import copy
import dataclasses

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from memory_cases import (
    FORMS,
    OTHER_FORMS,
    assert_pads_and_packs_change_nothing,
    assert_same,
    make_case,
    relative_error,
    rule_of,
    values_and_gradients,
)
from memory_effects import assert_saved_taken_back_and_speculated

from miras_hf import (
    MirasConfig,
    MonetaConfig,
    MonetaForCausalLM,
)
from miras_hf.callbacks import measure_memories
from miras_hf.memory import L2, Decay, MatrixMemory, MirasRule, Momentum, chunk_miras, recurrent_miras, step_miras_
from miras_hf.memory.diagnostics import memory_statistics
from miras_hf.memory.probe import probe_memory


NAMES = ["yaad", "yaad_coordinate", "moneta", "moneta_mirror", "moneta_zero", "memora", "matrix"]


def momentum_case(name="yaad", tokens=13, batch=2, heads=2, chunk_size=4, **options):
    rule = name if isinstance(name, MirasRule) else rule_of(name, algorithm=Momentum(), chunk_size=chunk_size)
    case = make_case(rule, tokens=tokens, batch=batch, heads=heads, gates="head", **options)
    draw = torch.rand(batch, tokens, heads, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return case._replace(inputs=case.inputs | {"log_momentum": -0.7 * draw})


PLAIN = MirasRule(MatrixMemory(), L2(residual_clip=1e6), Decay(weight_cap=None), Momentum(), chunk_size=1)


@pytest.mark.parametrize("form", FORMS)
def test_a_head_written_out(form):
    """`S = mu S - eta g`, `A = alpha A + S` of a matrix memory, a token a chunk: the equations of Titans."""
    case = momentum_case(PLAIN, tokens=7)
    y, state = case(FORMS[form], output_final_state=True)
    start = case.parameters.initial[0]
    for row in range(2):
        for head in range(2):
            x = {name: t[row, :, head] for name, t in case.inputs.items()}
            deviation, held = torch.zeros_like(start[head]), torch.zeros_like(start[head])
            for t in range(7):
                error = x["k"][t] @ (start[head] + deviation) - x["v"][t]
                held = x["log_momentum"][t].exp() * held - x["eta"][t] * torch.outer(x["k"][t], error)
                deviation = x["log_alpha"][t].exp() * deviation + held
                torch.testing.assert_close(y[row, t, head], x["q"][t] @ (start[head] + deviation))
            torch.testing.assert_close(state.dual[0][row, head], deviation)
            torch.testing.assert_close(state.momentum[0][row, head], held)


@pytest.mark.parametrize("form", OTHER_FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_forms_agree(name, form):
    case = momentum_case(name)
    for final_state in (True, False):
        expected = values_and_gradients(case, recurrent_miras, final_state)
        assert {"grad.log_momentum"} <= expected.keys()
        assert_same(values_and_gradients(case, FORMS[form], final_state), expected, 1e-9)


@pytest.mark.parametrize("then", FORMS)
@pytest.mark.parametrize("first", FORMS)
def test_forms_take_over_from_each_other(first, then):
    """In the middle of a chunk; and what `chunk_size=1` reads exactly is the link itself."""
    case = momentum_case("moneta")
    whole, end = case(recurrent_miras, output_final_state=True)
    y, state = case.tokens(0, 6)(FORMS[first], output_final_state=True)
    z, state = case.tokens(6, 13)(FORMS[then], initial_state=state, output_final_state=True)
    assert relative_error(torch.cat((y, z), dim=1), whole) < 1e-12
    for got, want in zip(state.leaves(), end.leaves(), strict=True):
        assert relative_error(got, want) < 1e-12


def test_steps_in_place():
    case = momentum_case("moneta_mirror")
    whole, end = case(recurrent_miras, output_final_state=True)
    _, state = case.tokens(0, 2)(chunk_miras, output_final_state=True)
    state, weights = state.map(lambda t: t.clone(memory_format=torch.contiguous_format)), None
    for t in range(2, 13):
        y, weights = case.tokens(t, t + 1)(step_miras_, state=state, weights=weights)
        assert relative_error(y, whole[:, t : t + 1]) < 1e-12
    for got, want in zip(state.leaves(), end.leaves(), strict=True):
        assert relative_error(got, want) < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_no_momentum_is_gradient_descent(form):
    case = momentum_case("yaad")
    none = case._replace(inputs=case.inputs | {"log_momentum": torch.full_like(case.inputs["eta"], -torch.inf)})
    plain = {name: x for name, x in case.inputs.items() if name != "log_momentum"}
    plain = case._replace(rule=rule_of("yaad"), inputs=plain)
    assert relative_error(none(FORMS[form])[0], plain(FORMS[form])[0]) < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_pads_and_packs(form):
    """Pads neither write nor decay, nor does momentum go on over them."""
    assert_pads_and_packs_change_nothing(momentum_case("yaad", batch=1), FORMS[form], 1e-12, packs=form != "decode")


def test_a_chunk_that_is_not_full_counts_in_the_norm():
    """Diagnostics fold what waits in the slots taken, and nothing from the others."""
    case = momentum_case(PLAIN, batch=1, tokens=3)
    # of keys that do not meet, gradients at a chunk's start are those of every token's own time
    case.inputs["k"] = torch.eye(8, dtype=torch.float64)[:3].view(1, 3, 1, 8).expand(1, 3, 2, 8)
    end = case.parameters.initial[0] + case(recurrent_miras, output_final_state=True)[1].dual[0][0]
    wide = case._replace(rule=dataclasses.replace(PLAIN, chunk_size=8))
    torch.testing.assert_close(wide(memory_statistics).memory_norm, end.square().mean((-2, -1)).sqrt())


@pytest.mark.parametrize("name", ["yaad", "matrix"])
def test_gradients_of_finite_differences(name):
    case = momentum_case(name, tokens=6, batch=1, heads=1, head_dim=3)
    leaves = {key: x.requires_grad_() for key, x in case.named_leaves().items()}
    assert torch.autograd.gradcheck(
        lambda *_: case(chunk_miras)[0], tuple(leaves.values()), fast_mode=True, atol=1e-6, rtol=1e-4
    )


@pytest.mark.parametrize("form", FORMS)
def test_momentum_of_any_size_is_a_number(form):
    """None at all, all of it, and a step to the other from token to token, in float32 over many chunks."""
    case = momentum_case("yaad", tokens=200).to(torch.float32)
    kinds = torch.tensor([0.0, -torch.inf, -1e-3, -30.0])
    draw = kinds[torch.randint(4, (2, 200, 2), generator=torch.Generator().manual_seed(0))]
    case = case._replace(inputs=case.inputs | {"log_momentum": draw})
    y, state = case(FORMS[form], output_final_state=True)
    exact, _ = case.to(torch.float64)(recurrent_miras)
    assert y.isfinite().all() and all(t.isfinite().all() for t in state.leaves())
    assert relative_error(y[:, :40], exact[:, :40]) < 1e-4


@pytest.mark.parametrize("form", FORMS)
def test_a_broken_token_reaches_no_other_before_it(form):
    case = momentum_case("yaad", tokens=11)
    clean, _ = case(FORMS[form])
    broken = case.map(lambda x: torch.where(torch.arange(11).view(1, 11, *[1] * (x.dim() - 2)) == 6, torch.nan, x))
    y, state = broken(FORMS[form], output_final_state=True)
    assert torch.equal(y[:, :6], clean[:, :6]) and y[:, 6:].isnan().all()
    assert all(t.isnan().any() for t in (*state.dual, *state.momentum))


def test_what_does_not_fit_is_refused():
    case = momentum_case("yaad")
    without = {name: x for name, x in case.inputs.items() if name != "log_momentum"}
    with pytest.raises(ValueError, match="`log_momentum` is required by Momentum"):
        case._replace(inputs=without)(chunk_miras)
    with pytest.raises(ValueError, match=r"`log_momentum` must have shape \(2, 13, 2\) .*, got \(2, 13\)"):
        case._replace(inputs=without | {"log_momentum": case.inputs["log_momentum"][..., 0]})(chunk_miras)
    with pytest.raises(ValueError, match="`log_momentum` must have a floating point dtype, got torch.bool"):
        case._replace(inputs=without | {"log_momentum": case.inputs["log_momentum"] > 0})(chunk_miras)
    with pytest.raises(ValueError, match="`log_momentum` must be None: GradientDescent has no momentum"):
        case._replace(rule=rule_of("yaad"))(chunk_miras)
    with pytest.raises(
        ValueError, match="`eta`, `log_alpha` and `log_momentum` must have shape .* for Momentum, got last axes 8"
    ):
        wide = case.inputs["eta"].unsqueeze(-1).expand(-1, -1, -1, 8)
        case._replace(inputs=case.inputs | {"eta": wide})(chunk_miras)
    _, state = case(chunk_miras, output_final_state=True)
    with pytest.raises(ValueError, match="`initial_state.momentum` must have shape"):
        case(chunk_miras, initial_state=state._replace(momentum=()))
    with pytest.raises(
        StrictDataclassError, match="`gate_granularity` must be 'head' with `learning_algorithm='momentum'`"
    ):
        MirasConfig(learning_algorithm="momentum")


@pytest.mark.parametrize("name", ["moneta", "memora"])
def test_probe_of_own_writes(name):
    """The write of one token that is alone in its text is what its read has that one without a step has not."""
    case = momentum_case(name, tokens=1)
    case = case._replace(inputs=case.inputs | {"q": case.inputs["k"]})
    still = case._replace(inputs=case.inputs | {"log_alpha": 0 * case.inputs["log_alpha"]})
    no_step = still._replace(inputs=still.inputs | {"eta": 0 * still.inputs["eta"]})
    writes = still(recurrent_miras)[0] - no_step(recurrent_miras)[0]
    torch.testing.assert_close(case(probe_memory, lags=(0,)).write_rms, writes.square().mean((0, 1, 3)).sqrt())


# -- models ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = MonetaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_hidden_layers=2,
        chunk_size=4,
        gate_granularity="head",
        learning_algorithm="momentum",
        initializer_range=0.3,
    )
    return MonetaForCausalLM(config).eval()


IDS = torch.randint(32, (2, 11), generator=torch.Generator().manual_seed(1))


def test_a_model_decodes_as_it_reads(model):
    with torch.no_grad():
        whole = model(IDS).logits
        cache, parts = None, []
        for start, stop in ((0, 5), (5, 6), (6, 7), (7, 8), (8, 11)):
            out = model(IDS[:, start:stop], past_key_values=cache, use_cache=True)
            cache, parts = out.past_key_values, [*parts, out.logits]
    assert relative_error(torch.cat(parts, dim=1), whole) < 1e-5
    gates = model.model.layers[0].mixer.momentum
    with torch.no_grad():
        changed = copy.deepcopy(model)
        changed.model.layers[0].mixer.momentum.bias += 1.0
        assert not torch.allclose(changed(IDS).logits, whole, atol=1e-4)
    assert gates.up_proj.weight.shape == (4, 32)


def test_a_model_learns_its_momentum(model):
    model = copy.deepcopy(model).train()
    model(IDS, labels=IDS).loss.backward()
    gate = model.model.layers[0].mixer.momentum
    assert gate.bias.grad.abs().sum() > 0 and gate.up_proj.weight.grad.abs().sum() > 0
    parameter, step = gate.bias, 1e-2
    with torch.no_grad():
        losses = []
        for sign in (1, -1):
            parameter[0] += sign * step
            losses.append(model(IDS, labels=IDS).loss.double())
            parameter[0] -= sign * step
    torch.testing.assert_close(gate.bias.grad[0].double(), (losses[0] - losses[1]) / (2 * step), rtol=0.1, atol=1e-5)


def test_a_memory_with_momentum_is_saved_taken_back_and_speculated(model, tmp_path):
    assert_saved_taken_back_and_speculated(model, IDS[:1], tmp_path, read=6)


def test_a_model_is_saved_and_measured(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = MonetaForCausalLM.from_pretrained(tmp_path)
    assert again.config.learning_algorithm == "momentum"
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    found = measure_memories(model, {"input_ids": IDS})
    assert found.keys() == {0, 1} and all(x.isfinite().all() for x in found[0])
    plan = model.config.tensor_parallel_plan()
    assert plan["layers.*.mixer.momentum"] == "heads" and plan["layers.*.mixer.momentum.up_proj"] == "colwise"


def test_kernels_say_that_they_do_not_know_momentum(model):
    assert model.model.layers[0].mixer.memory.backend.reason == "kernels do not know Momentum"
