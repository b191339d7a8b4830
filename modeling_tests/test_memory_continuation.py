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
"""Reading in several calls is reading in one: states hand a memory on, also in the middle of a chunk."""

import functools
import itertools

import pytest
import torch
from memory_cases import (
    FORMS,
    MODELS,
    OTHER_FORMS,
    OTHER_RULES,
    RULES,
    assert_same,
    gradients,
    make_case,
    relative_error,
    rule_of,
    state_tensors,
    values,
    values_and_gradients,
    weighted_sum,
)

from miras_hf.memory import (
    MemoryState,
    Momentum,
    chunk_miras,
    initial_memory_state,
    recurrent_miras,
    step_miras,
    step_miras_,
)


NAMES = [*MODELS, "moneta_zero", "memora_zero", "matrix"]


def read_in_parts(case, cuts, forms, final_state: bool = True) -> dict[str, torch.Tensor]:
    """Outputs, and the final state where it is asked for, of the calls between cuts, each in its own form."""
    state, outputs = None, []
    for (start, stop), form in zip(itertools.pairwise(cuts), itertools.cycle(forms)):
        if start == stop and form == "decode":
            continue
        hand_on = final_state or stop < cuts[-1]
        y, state = case.tokens(start, stop)(FORMS[form], initial_state=state, output_final_state=hand_on)
        outputs.append(y)
    return {"y": torch.cat(outputs, dim=1), **(state_tensors(state) if final_state else {})}


@pytest.mark.parametrize("name", ["yaad", "memora", "matrix"])
def test_a_state_given_to_a_step_is_nobody_elses(name):
    """Two readers may go on from one state, the one of them in place."""
    case = make_case(rule_of(name), tokens=8)
    with torch.no_grad():
        _, given = case.tokens(0, 5)(chunk_miras, output_final_state=True)
        kept = given.map(torch.clone)
        _, state = case.tokens(5, 6)(step_miras, initial_state=given, output_final_state=True)
        for t in (6, 7):
            case.tokens(t, t + 1)(step_miras_, state=state)
        assert_same(state_tensors(given), state_tensors(kept), 0.0)


@pytest.mark.parametrize("algorithm", [None, Momentum()], ids=["descent", "momentum"])
def test_gradients_where_chunks_of_rows_end_at_different_tokens(algorithm):
    """A decay of a chunk that float32 cannot turn round, in a row whose chunk goes on."""
    changes = {"chunk_size": 64} | ({} if algorithm is None else {"algorithm": algorithm})
    case = make_case(rule_of("yaad", **changes), tokens=64, gates="head", dtype=torch.float32)
    case.inputs["log_alpha"].fill_(-2.0)
    if algorithm is not None:
        case.inputs["log_momentum"] = torch.full_like(case.inputs["log_alpha"], -0.5)
    with torch.no_grad():
        _, state = case.tokens(0, 63)(chunk_miras, output_final_state=True, lengths=torch.tensor([63, 62]))
    case = case.tokens(63, 64).requires_grad()
    y, state = case(step_miras, initial_state=state, output_final_state=True)
    loss = y.sum() + sum(t.sum() for t in state.dual)
    for name, gradient in gradients({"loss": loss}, case.named_leaves()).items():
        assert gradient.isfinite().all(), name


@pytest.mark.parametrize("name", NAMES)
def test_two_and_three_calls_at_every_cut(name):
    """All pairs of cuts of 13 tokens: before, at and after the borders of the chunks of 4, with empty calls."""
    case = make_case(rule_of(name), tokens=13, heads=1, head_dim=6)
    with torch.no_grad():
        expected = values(case, chunk_miras)
        for a, b in itertools.combinations_with_replacement(range(14), 2):
            assert_same(read_in_parts(case, [0, a, b, 13], ["chunk"]), expected, 1e-11)


@pytest.mark.parametrize("forms", itertools.permutations(["recurrent", "chunk", "decode"]), ids="-".join)
@pytest.mark.parametrize("name", MODELS)
def test_forms_take_over_from_each_other(name, forms):
    """A prompt read in chunks, decoded token by token, and gone on with in chunks: one state serves all."""
    case = make_case(rule_of(name), tokens=17)
    with torch.no_grad():
        expected = values(case, recurrent_miras)
        for cuts in ([0, 5, 10, 17], [0, 4, 8, 17], [0, 7, 8, 17], [0, 1, 15, 17]):
            assert_same(read_in_parts(case, cuts, forms), expected, 1e-10)


@functools.cache
def whole(name: str, final_state: bool) -> dict[str, torch.Tensor]:
    case = make_case(rule_of(name), tokens=13, heads=1, head_dim=6)
    return values_and_gradients(case, recurrent_miras, final_state)


@pytest.mark.parametrize("final_state", [True, False])
@pytest.mark.parametrize("form", ["recurrent", "chunk", "chunk_groups_of_1", "decode"])
@pytest.mark.parametrize("cut", [2, 4, 7])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_through_the_state(name, cut, form, final_state):
    """Backpropagation from the second call into the first is that of one call: nothing is detached on the way."""
    case = make_case(rule_of(name), tokens=13, heads=1, head_dim=6).requires_grad()
    got = read_in_parts(case, [0, cut, 13], [form], final_state)
    assert_same({**got, **gradients(got, case.named_leaves())}, whole(name, final_state), 1e-9)


@pytest.mark.parametrize("final_state", [True, False])
@pytest.mark.parametrize("form", OTHER_FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_with_respect_to_a_state(name, form, final_state):
    """The state as a leaf, as where a caller computes its start by other means; the reference is autograd's own."""

    def read(form):
        case = make_case(rule_of(name), tokens=9, heads=1, head_dim=6)
        with torch.no_grad():
            _, state = case.tokens(0, 6)(recurrent_miras, output_final_state=True)
        state = state.map(lambda x: x.clone().requires_grad_(x.is_floating_point()))
        outputs = values(case, form, final_state, initial_state=state)
        leaves = {name: x for name, x in state_tensors(state).items() if x.is_floating_point()}
        # beyond the phase, slots are no part of the state
        return {name: x if "dual" in name else x[:, :, :2] for name, x in gradients(outputs, leaves).items()}

    assert_same(read(FORMS[form]), read(recurrent_miras), 1e-9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_gradient_through_a_state_without_decay(name, form):
    """Tokens without decay have equal cumulative decays; the gradient of the last one is its own all the same."""

    def read(form):
        case = make_case(rule_of(name), batch=1, tokens=6)
        case.inputs["log_alpha"][:, 1] = 0.0
        case = case.requires_grad()
        _, state = case.tokens(0, 2)(form, output_final_state=True)
        y, _ = case.tokens(2, 6)(form, initial_state=state)
        return gradients({"y": y}, case.named_leaves())

    assert_same(read(FORMS[form]), read(recurrent_miras), 1e-9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_states_have_a_constant_size(name, form):
    """However much was read: the shapes and dtypes of the initial state, and no slot filled beyond the phase."""
    for tokens in (1, 4, 6, 13):
        case = make_case(rule_of(name), tokens=tokens)
        _, state = case(FORMS[form], output_final_state=True)
        initial = initial_memory_state(case.rule, case.parameters, 2, 8)
        for (part, x), start in zip(state_tensors(state).items(), state_tensors(initial).values(), strict=True):
            assert (x.shape, x.dtype) == (start.shape, start.dtype), part
        assert state.count.tolist() == [tokens, tokens]
        for x in (*state.inputs, *state.gradients, state.eta, state.log_decay):
            assert not x[:, :, tokens % 4 :].any()
            assert x[:, :, : tokens % 4].any() or tokens % 4 == 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [*MODELS, "moneta_zero"])
def test_starting_from_the_initial_state_is_starting_without(name, form):
    case = make_case(rule_of(name))
    state = initial_memory_state(case.rule, case.parameters, 2, 8)
    assert_same(values(case, FORMS[form], initial_state=state), values(case, FORMS[form]), 1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("decay_target", ["init", "zero"])
def test_zeros_are_a_fresh_state(decay_target, form):
    """How a cache hands a row to the next prompt, whatever memory the model has learned to start from."""
    case = make_case(rule_of("yaad", decay_target=decay_target))
    state = initial_memory_state(case.rule, case.parameters, 2, 8).map(torch.zeros_like)
    assert_same(values(case, FORMS[form], initial_state=state), values(case, FORMS[form]), 1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("decay_target", ["init", "zero"])
def test_rows_reset_one_by_one(decay_target, form):
    """A row of zeros beside rows that go on: each starts or continues on its own."""
    case = make_case(rule_of("memora", decay_target=decay_target), batch=2, tokens=12)
    _, state = case.tokens(0, 6)(chunk_miras, output_final_state=True)
    later = case.tokens(6, 12)
    y, _ = later(FORMS[form], initial_state=state.map(lambda x: torch.stack((torch.zeros_like(x[0]), x[1]))))
    assert relative_error(y[:1], later.row(0)(FORMS[form])[0]) < 1e-12
    assert relative_error(y[1:], later(FORMS[form], initial_state=state)[0][1:]) < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_initial_states_are_not_written_to(form):
    case = make_case(rule_of("yaad"), tokens=10)
    _, state = case.tokens(0, 2)(FORMS[form], output_final_state=True)
    before = state.map(torch.clone)
    case.tokens(2, 10)(FORMS[form], initial_state=state, output_final_state=True)
    for name, x in state_tensors(before).items():
        assert torch.equal(x, state_tensors(state)[name]), name


@pytest.mark.parametrize("keeps_weights", [True, False])
@pytest.mark.parametrize("name", [*RULES, *OTHER_RULES])
def test_steps_in_place(name, keeps_weights):
    """As a cache decodes: into the tensors of the state, rows at phases of their own, some without a token now and then."""
    case = make_case(rule_of(name), batch=3, tokens=17)
    prompt = torch.arange(6) < torch.tensor([[6], [3], [0]])
    new = torch.ones(3, 11, dtype=torch.bool)
    new[0, 2:5], new[1, ::2] = False, False
    with torch.no_grad():
        _, state = case.tokens(0, 6)(chunk_miras, mask=prompt, output_final_state=True)
        later = case.tokens(6, 17)
        expected = values(later, FORMS["decode"], initial_state=state, mask=new)
        state, weights, outputs = state.map(torch.clone), None, []
        where = {name: x.data_ptr() for name, x in state_tensors(state).items()}
        for t in range(11):
            mask = None if bool(new[:, t].all()) else new[:, t : t + 1]
            step = functools.partial(step_miras_, state=state, weights=weights if keeps_weights else None)
            y, weights = later.tokens(t, t + 1)(step, mask=mask)
            outputs.append(y)
        whole = values(case, recurrent_miras, mask=torch.cat((prompt, new), dim=1))
    got = {"y": torch.cat(outputs, dim=1), **state_tensors(state)}
    assert_same(got, expected, 1e-12)
    # two forms that both lost the state would agree
    assert_same(got, {**whole, "y": whole["y"][:, 6:]}, 1e-10)
    assert {name: x.data_ptr() for name, x in state_tensors(state).items()} == where


def test_steps_in_place_need_a_state_of_their_own_dtype():
    case = make_case(rule_of("yaad"), tokens=3)
    _, state = case.tokens(0, 2)(chunk_miras, output_final_state=True)
    with pytest.raises(ValueError, match="`state` must be contiguous and in torch.float64"):
        case.tokens(2, 3)(step_miras_, state=state.map(lambda x: x.float() if x.is_floating_point() else x))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_rows_of_a_state_may_be_reordered(name, form):
    """Beam search: rows chosen anew, some twice, go on as the rows they were; here at phases of their own."""
    case = make_case(rule_of(name), batch=3, tokens=12)
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[1, :2], mask[2, :5] = False, False
    _, state = case.tokens(0, 6)(chunk_miras, mask=mask, output_final_state=True)
    order = torch.tensor([2, 0, 2, 1])
    later = case.tokens(6, 12)
    expected = values(later, FORMS[form], initial_state=state)
    got = values(later.map(lambda x: x[order]), FORMS[form], initial_state=state.map(lambda x: x[order]))
    assert_same(got, {name: x[order] for name, x in expected.items()}, 1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_states_in_a_lower_precision(form):
    """A cache may keep states in another dtype: they are read in the dtype of computation."""
    case = make_case(rule_of("yaad_norm"), dtype=torch.float32)
    _, state = case.tokens(0, 6)(chunk_miras, output_final_state=True)
    half = state.map(lambda x: x.bfloat16() if x.is_floating_point() else x)
    y, after = case.tokens(6, 13)(FORMS[form], initial_state=half, output_final_state=True)
    exact, _ = case.tokens(6, 13)(FORMS[form], initial_state=state)
    assert y.dtype == after.dual[0].dtype == torch.float32
    assert relative_error(y, exact) < 2e-2


def test_state_without_gradient_under_no_grad():
    """The reference takes inner gradients under `no_grad` too, and leaves no graph behind."""
    case = make_case(rule_of("yaad")).requires_grad()
    for form in FORMS.values():
        with torch.no_grad():
            y, state = case(form, output_final_state=True)
        assert not y.requires_grad
        assert not any(x.requires_grad for x in state_tensors(state).values())


def test_no_state_is_returned_unasked():
    case = make_case(rule_of("yaad"))
    for form in FORMS.values():
        assert case(form)[1] is None
        assert isinstance(case(form, output_final_state=True)[1], MemoryState)


def test_weighted_sums_see_every_entry():
    """The gradients compared here are of a sum in which no entry is lost."""
    x = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(weighted_sum({"x": x}), x)
    assert (gradient != 0).all() and gradient.unique().numel() == 12
