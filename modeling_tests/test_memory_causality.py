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
"""What a token may reach: its own row and head, itself and later tokens, and these it does reach."""

import functools

import pytest
import torch
from memory_cases import FORMS, MODELS, decode_miras, make_case, relative_error, rule_of

from miras_hf.memory import chunk_miras


NAMES = [*MODELS, "moneta_mirror", "memora_zero", "matrix"]
TOKENS = 11  # chunks of 4, 4 and 3


def read_with(case, form, token: int, names) -> torch.Tensor:
    """How far the outputs of every token move when some inputs of one token change: `[batch, tokens, heads]`."""
    inputs = dict(case.inputs)
    for name in names:
        inputs[name] = inputs[name].clone()
        # halved: steps stay positive and log retention negative
        inputs[name][:, token] *= 0.5
    with torch.no_grad():
        before, _ = case(form)
        after, _ = case._replace(inputs=inputs)(form)
    return (after - before).norm(dim=-1) / before.norm(dim=-1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_the_past_is_not_changed_and_the_future_is(name, form):
    """One token altered in all its inputs: nothing before it moves, everything from it on does."""
    case = make_case(rule_of(name), tokens=TOKENS)
    for token in range(TOKENS):
        moved = read_with(case, FORMS[form], token, case.inputs)
        # rescaling of exponents within a chunk rounds the past anew, no more
        assert moved[:, :token].amax() < 1e-13 if token else True, token
        assert (moved[:, token:] > 1e-8).all(), token


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_a_query_moves_its_own_read_alone(name, form):
    case = make_case(rule_of(name), tokens=TOKENS)
    for token in (0, 3, 4, 10):
        moved = read_with(case, FORMS[form], token, ["q"])
        assert (moved[:, token] > 1e-3).all()
        moved[:, token] = 0.0
        assert moved.amax() == 0.0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("what", ["k", "v", "eta", "log_alpha"])
@pytest.mark.parametrize("name", MODELS)
def test_a_read_sees_its_own_write(name, what, form):
    """Keys, values and steps act from their own token on; retention on all that was there before."""
    case = make_case(rule_of(name), tokens=TOKENS)
    for token in (1, 3, 4, 6):
        moved = read_with(case, FORMS[form], token, [what])
        assert moved[:, :token].amax() < 1e-13
        if what == "log_alpha" and token == 4 and name == "memora":
            # nothing was written in this chunk yet, and Memora's base decays at the next chunk's start only
            assert moved[:, token].amax() < 1e-13
            assert (moved[:, 8:] > 1e-8).all()
        else:
            assert (moved[:, token] > 1e-8).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_flow_backward_in_time_alone(name, form):
    """The derivative of a read with respect to every later token's inputs is zero."""
    case = make_case(rule_of(name), batch=1, tokens=TOKENS, heads=1).requires_grad()
    y, _ = case(FORMS[form])
    for token in (0, 2, 4, 7):
        found = torch.autograd.grad(y[:, token].sum(), list(case.inputs.values()), retain_graph=True)
        for what, gradient in zip(case.inputs, found, strict=True):
            scale = gradient.abs().amax()
            assert gradient[:, token + 1 :].abs().amax() <= 1e-13 * max(1.0, scale), (what, token)
            # not so for values, which a Huber loss may ignore beyond its threshold
            if what in ("k", "eta"):
                assert (gradient[:, : token + 1].flatten(2).norm(dim=-1) > 1e-8).all(), (what, token)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_rows_and_heads_keep_to_themselves(name, form):
    case = make_case(rule_of(name), batch=3, tokens=TOKENS, heads=3)
    expected, _ = case(FORMS[form])
    row, _ = case.row(1)(FORMS[form])
    assert relative_error(row, expected[1:2]) < 1e-13

    inputs = {name: x[:, :, 1:2] for name, x in case.inputs.items()}
    parameters = type(case.parameters)(
        tuple(a[1:2] for a in case.parameters.initial),
        case.parameters.norm_weight[1:2],
        case.parameters.norm_bias[1:2],
    )
    head, _ = case._replace(inputs=inputs, parameters=parameters)(FORMS[form])
    assert relative_error(head, expected[:, :, 1:2]) < 1e-13


@pytest.mark.parametrize("form", ["recurrent", "chunk", "decode"])
def test_the_chunk_is_part_of_the_model(form):
    """Chunks of another size are another model, with the same first read: all gradients at the initial memory."""
    outputs = []
    for chunk_size in (2, 4):
        case = make_case(rule_of("yaad", chunk_size=chunk_size), tokens=TOKENS)
        outputs.append(case(FORMS[form])[0])
    small, large = outputs
    assert relative_error(small[:, :2], large[:, :2]) < 1e-13
    assert relative_error(small[:, 2:], large[:, 2:]) > 1e-4


# -- what is not a number -------------------------------------------------------------------------------------------------


def broken_at(case, name, token, value):
    x = case.inputs[name].clone()
    x[1, token, 0].view(-1)[-1] = value
    return case._replace(inputs={**case.inputs, name: x})


@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("token", [5, 7])
@pytest.mark.parametrize("rule", ["yaad", "yaad_coordinate", "moneta_mirror", "memora", "matrix"])
def test_what_is_not_a_number_reaches_the_future_alone(rule, token, with_gradients):
    """In the middle and at the end of a chunk: outputs and states are NaN where those of decoding are, and nowhere else."""
    case = make_case(rule_of(rule), tokens=11)
    if with_gradients:
        case = case.requires_grad()
    whole, _ = case(chunk_miras)
    for name in case.inputs:
        broken = broken_at(case, name, token, float("nan"))
        with torch.no_grad():
            expected, expected_state = broken(decode_miras, output_final_state=True)
        for form in (chunk_miras, functools.partial(chunk_miras, chunks_per_group=1, kept_bytes=0)):
            for final_state in (False, True):
                y, state = broken(form, output_final_state=final_state)
                assert y[1, token, 0].isnan().all()
                torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-11, equal_nan=True)
                torch.testing.assert_close(y[:, :token], whole[:, :token], rtol=1e-9, atol=1e-11)
        reach = expected_state.dual[0].isnan().any(-1).any(-1)
        for dual in state.dual:
            assert torch.equal(dual.isnan().any(-1).any(-1), reach)
        # and the text goes on so: the chunk that has begun is in the state
        again = case.tokens(0, 2)
        y, _ = again(chunk_miras, initial_state=state)
        expected, _ = again(decode_miras, initial_state=expected_state)
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-11, equal_nan=True)


@pytest.mark.parametrize("kept_bytes", [0, 2**20])
def test_gradients_of_what_is_not_a_number_are_none(kept_bytes):
    """A broken run does not look healthy: rows of a batch have their own gradients, parameters have those of all."""
    case = make_case(rule_of("yaad"), tokens=11)
    case = broken_at(case, "v", 6, float("nan")).requires_grad()
    y, _ = case(chunk_miras, kept_bytes=kept_bytes)
    y.sum().backward()
    assert case.inputs["k"].grad[0].isfinite().all() and case.inputs["k"].grad[1, :, 0].isnan().any()
    assert case.parameters.initial[0].grad[0].isnan().any()


def test_infinite_steps_and_packs():
    """An infinite step is no number times zero either; sequences of a pack and rows with pads keep to themselves."""
    case = make_case(rule_of("yaad"), tokens=11, batch=2)
    broken = broken_at(case, "eta", 6, float("inf"))
    torch.testing.assert_close(broken(chunk_miras)[0][:, :6], case(chunk_miras)[0][:, :6], rtol=1e-9, atol=1e-11)
    case = case.row(1)
    broken = case.map(lambda x: torch.where(torch.arange(11).view(1, 11, *[1] * (x.dim() - 2)) == 4, torch.nan, x))
    borders = torch.tensor([0, 6, 11])
    y, whole = (one(chunk_miras, cu_seqlens=borders)[0] for one in (broken, case))
    assert y[:, 4:6].isnan().all()
    torch.testing.assert_close(y[:, :4], whole[:, :4], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(y[:, 6:], whole[:, 6:], rtol=1e-9, atol=1e-11)
    mask = torch.ones(1, 11, dtype=torch.bool)
    mask[:, 4] = False
    y, whole = (one(chunk_miras, mask=mask)[0] for one in (broken, case))
    torch.testing.assert_close(y, whole, rtol=1e-9, atol=1e-11)
