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
"""Bad inputs: a `ValueError` that names the argument, what it is, and what is allowed."""

import dataclasses

import pytest
import torch
from memory_cases import FORMS, make_case, rule_of

from miras_hf.memory import KL, MatrixMemory, MemoryParameters, MirasRule, chunk_miras, recurrent_miras, step_miras


TOKENS = 5
WHOLE = ["recurrent", "chunk"]


def assert_refused(case, form, *words, **options):
    """The call raises, and its message holds every word."""
    with pytest.raises(ValueError) as error:
        case(form, **options)
    for word in words:
        assert str(word) in str(error.value), str(error.value)


def with_inputs(case, **changes):
    inputs = {name: x for name, x in {**case.inputs, **changes}.items() if x is not None}
    return case._replace(inputs=inputs)


def yaad(**options):
    return make_case(rule_of("yaad"), tokens=TOKENS, **options)


# name: the changed input, and the words its error names: argument, value, allowed
SHAPES = {
    "q of three axes": ({"q": torch.zeros(2, 5, 8)}, ["`q`", "(2, 5, 8)", "[batch, tokens, heads, head_dim]"]),
    "k of fewer tokens": ({"k": torch.zeros(2, 4, 2, 8)}, ["`k`", "(2, 4, 2, 8)", "(2, 5, 2, 8)"]),
    "v of another width": ({"v": torch.zeros(2, 5, 2, 9)}, ["`v`", "(2, 5, 2, 9)", "(2, 5, 2, 8)"]),
    "eta of half the channels": ({"eta": torch.zeros(2, 5, 2, 4)}, ["`eta`", "(2, 5, 2, 4)", "(2, 5, 2, 8)"]),
    "eta of the wrong heads": ({"eta": torch.zeros(2, 5, 3)}, ["`eta`", "(2, 5, 3)", "(2, 5, 2)"]),
    "eta without heads": ({"eta": torch.zeros(2, 5)}, ["`eta`", "(2, 5)", "(2, 5, 2)"]),
    "log_alpha of one row": ({"log_alpha": torch.zeros(1, 5, 2)}, ["`log_alpha`", "(1, 5, 2)", "(2, 5, 2)"]),
    "delta of the wrong tokens": ({"delta": torch.ones(2, 6, 2)}, ["`delta`", "(2, 6, 2)", "(2, 5, 2)"]),
    "delta per channel": ({"delta": torch.ones(2, 5, 2, 8)}, ["`delta`", "8", "(2, 5, 2)", "HuberMixture"]),
    "delta missing": ({"delta": None}, ["`delta`", "HuberMixture"]),
}


@pytest.mark.parametrize("form", [recurrent_miras, chunk_miras, step_miras])
@pytest.mark.parametrize("changes, words", SHAPES.values(), ids=SHAPES)
def test_shapes(changes, words, form):
    assert_refused(with_inputs(yaad(dtype=torch.float32), **changes), form, *words)


@pytest.mark.parametrize("name", ["moneta", "memora"])
@pytest.mark.parametrize("form", FORMS)
def test_superfluous_delta(name, form):
    case = with_inputs(make_case(rule_of(name), tokens=TOKENS), delta=torch.ones(2, TOKENS, 2))
    assert_refused(case, FORMS[form], "`delta`", "None", type(case.rule.attentional_bias).__name__)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("name", ["q", "k", "v", "eta", "log_alpha"])
def test_dtypes(name, dtype):
    case = yaad()
    case = with_inputs(case, **{name: torch.ones(case.inputs[name].shape, dtype=dtype)})
    for form in FORMS.values():
        assert_refused(case, form, f"`{name}`", dtype, "floating point")


@pytest.mark.parametrize("form", FORMS)
def test_parameters(form):
    case = yaad()
    first, second = case.parameters.initial
    for changed, words in (
        ({"norm_weight": torch.ones(8)}, ["`parameters.norm_weight`", "(8,)", "(2, 8)"]),
        ({"norm_bias": torch.zeros(3, 8)}, ["`parameters.norm_bias`", "(3, 8)", "(2, 8)"]),
        ({"initial": (first,)}, ["`parameters.initial`", "[(2, 8, 32)]", "(2, 32, 8)"]),
        (
            {"initial": (second, first)},
            ["`parameters.initial`", "[(2, 32, 8), (2, 8, 32)]", "[(2, 8, 32), (2, 32, 8)]"],
        ),
        ({"initial": (first[:1], second[:1])}, ["`parameters.initial`", "(1, 8, 32)", "(2, 8, 32)"]),
    ):
        assert_refused(case._replace(parameters=case.parameters._replace(**changed)), FORMS[form], *words)


def test_parameters_of_another_architecture():
    case = yaad()
    rule = dataclasses.replace(case.rule, architecture=MatrixMemory())
    assert_refused(case._replace(rule=rule), chunk_miras, "`parameters.initial`", "MatrixMemory", "(2, 8, 8)")
    matrix = MemoryParameters((torch.zeros(2, 8, 8),), *case.parameters[1:])
    assert_refused(case._replace(parameters=matrix), chunk_miras, "`parameters.initial`", "MLPMemory", "(2, 8, 32)")


# -- packs and masks ------------------------------------------------------------------------------------------------------

BORDERS = {
    "short of the end": ([0, 2, 4], ["[0, 2, 4]", "5"]),
    "beyond the end": ([0, 2, 6], ["[0, 2, 6]", "5"]),
    "not from zero": ([1, 5], ["[1, 5]", "0"]),
    "decreasing": ([0, 3, 2, 5], ["[0, 3, 2, 5]", "5"]),
    "float": ([0.0, 5.0], ["float", "integer"]),
    "two axes": ([[0, 5]], ["(1, 2)", "[sequences + 1]"]),
    "one border": ([0], ["(1,)", "[sequences + 1]"]),
    "none": ([], ["(0,)", "[sequences + 1]"]),
}


@pytest.mark.parametrize("form", WHOLE)
@pytest.mark.parametrize("borders, words", BORDERS.values(), ids=BORDERS)
def test_borders(borders, words, form):
    assert_refused(yaad(batch=1), FORMS[form], "`cu_seqlens`", *words, cu_seqlens=torch.tensor(borders))


@pytest.mark.parametrize("form", WHOLE)
def test_long_borders_are_abbreviated(form):
    borders = torch.arange(100)
    with pytest.raises(ValueError, match="`cu_seqlens`.*99") as error:
        yaad(batch=1)(FORMS[form], cu_seqlens=borders)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("form", WHOLE)
def test_borders_of_a_batch(form):
    assert_refused(yaad(batch=2), FORMS[form], "`cu_seqlens`", "batch of 2", cu_seqlens=torch.tensor([0, 5]))


@pytest.mark.parametrize("form", WHOLE)
def test_borders_with_lengths(form):
    options = {"cu_seqlens": torch.tensor([0, 5]), "lengths": torch.tensor([5])}
    assert_refused(yaad(batch=1), FORMS[form], "`lengths`", "`cu_seqlens`", **options)


@pytest.mark.parametrize("form", WHOLE)
@pytest.mark.parametrize(
    "lengths",
    [
        torch.ones(2),
        torch.ones(2, 5) > 0,
        torch.ones(2) > 0,
        torch.ones(3).int(),
        torch.ones(2, 1).long(),
        torch.tensor(5),
    ],
)
def test_lengths(lengths, form):
    found = (lengths.dtype, tuple(lengths.shape))
    assert_refused(yaad(), FORMS[form], "`lengths`", *found, "int32 or int64", "(2,)", lengths=lengths)


@pytest.mark.parametrize("form", WHOLE)
@pytest.mark.parametrize("lengths", [[-1, 5], [6, 0]])
def test_lengths_beyond_the_tokens(lengths, form):
    assert_refused(yaad(), FORMS[form], "`lengths`", "between 0 and 5", lengths, lengths=torch.tensor(lengths))


@pytest.mark.parametrize("lengths", [torch.ones(2, 1), torch.ones(1).int(), torch.ones(2) > 0, torch.tensor([0, 2])])
def test_lengths_of_a_step(lengths):
    case, wrong = yaad().tokens(0, 1), lengths.tolist() == [0, 2]
    found = ("between 0 and 1", [0, 2]) if wrong else (lengths.dtype, tuple(lengths.shape), "int32 or int64", "(2,)")
    assert_refused(case, step_miras, "`lengths`", *found, lengths=lengths)


# -- states ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_states_of_another_rule_or_batch(form):
    case = yaad()
    _, state = case(chunk_miras, output_final_state=True)
    others = {
        "dual": [make_case(rule_of("matrix"), tokens=TOKENS), yaad(batch=3), yaad(heads=3), yaad(head_dim=4)],
        "inputs": [make_case(rule_of("yaad", chunk_size=2), tokens=TOKENS)],
        "eta": [yaad(gates="head")],
    }
    for field, cases in others.items():
        for other in cases:
            assert_refused(other, FORMS[form], f"`initial_state.{field}`", "must have shape", initial_state=state)
    assert_refused(
        case, FORMS[form], "`initial_state.count`", "(1,)", initial_state=state._replace(count=state.count[:1])
    )


def test_states_of_a_pack_have_a_row_per_sequence():
    case = yaad(batch=1)
    _, state = case(chunk_miras, output_final_state=True)
    for form in (recurrent_miras, chunk_miras):
        options = {"cu_seqlens": torch.tensor([0, 2, 5]), "initial_state": state}
        assert_refused(case, form, "`initial_state.dual`", "(2, 2, 8, 32)", "(1, 2, 8, 32)", **options)


# -- options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [0, 2])
def test_steps_read_one_token(tokens):
    assert_refused(yaad().tokens(0, tokens), step_miras, "`q`", "one token", f"got {tokens}")


@pytest.mark.parametrize("read", ["linear", "", None])
def test_read(read):
    assert_refused(yaad(), recurrent_miras, "`read`", repr(read), "'linearised'", "'exact'", read=read)


@pytest.mark.parametrize("chunks_per_group", [0, -1])
def test_chunks_per_group(chunks_per_group):
    assert_refused(yaad(), chunk_miras, "`chunks_per_group`", chunks_per_group, chunks_per_group=chunks_per_group)


def test_kept_bytes():
    assert_refused(yaad(), chunk_miras, "`kept_bytes`", -1, kept_bytes=-1)


RULES = {
    "no chunk": ({"chunk_size": 0}, ["`chunk_size`", "0", "at least 1"]),
    "negative chunk": ({"chunk_size": -4}, ["`chunk_size`", "-4", "at least 1"]),
    "target": ({"decay_target": "none"}, ["`decay_target`", "'none'", "'init'", "'zero'"]),
    "growth": ({"min_log_alpha": 0.1}, ["`min_log_alpha`", "0.1", "-2.5"]),
    "too strong a decay": ({"min_log_alpha": -2.6}, ["`min_log_alpha`", "-2.6", "-2.5"]),
    "too strong for the chunk": ({"chunk_size": 128}, ["`min_log_alpha`", "-2.5", "-1.25"]),
    "not a number": ({"min_log_alpha": float("nan")}, ["`min_log_alpha`", "nan"]),
    "a name": ({"attentional_bias": "l2"}, ["`attentional_bias`", "AttentionalBias", "'l2'"]),
    "a class": ({"retention": KL}, ["`retention`", "RetentionGate", "KL"]),
}


@pytest.mark.parametrize("changes, words", RULES.values(), ids=RULES)
def test_rules(changes, words):
    with pytest.raises(ValueError) as error:
        MirasRule(**changes)
    for word in words:
        assert word in str(error.value), str(error.value)


def test_limits_of_rules_are_allowed():
    MirasRule(chunk_size=1, min_log_alpha=-160.0)
    MirasRule(chunk_size=64, min_log_alpha=-2.5)
    MirasRule(chunk_size=128, min_log_alpha=-1.25)
    MirasRule(retention=KL(), min_log_alpha=0.0)


def test_nothing_is_refused_without_a_reason():
    """The case that all the bad ones were made from is good."""
    for form in FORMS.values():
        y, _ = yaad()(form)
        assert y.isfinite().all()
