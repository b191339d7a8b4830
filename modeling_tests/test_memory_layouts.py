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
"""Packs and masks: a sequence reads the same alone, packed with others, and with pad tokens anywhere.

The chunk grid belongs to the sequence: it starts at its first real token, and pads neither write nor decay nor advance
it. What is expected here is always the same: every sequence read alone by the recurrent reference, without pads.
"""

import functools
import itertools

import pytest
import torch
from memory_cases import (
    FORMS,
    MODELS,
    OTHER_RULES,
    Case,
    assert_same,
    make_case,
    relative_error,
    rule_of,
    values,
    values_and_gradients,
)

from miras_hf.memory import MemoryState, chunk_miras, recurrent_miras


def alone(borders, *, rule, parameters, output_final_state, initial_state=None, **inputs):
    """A form that reads the sequences of a pack one by one."""
    outputs, states = [], []
    for i, (start, stop) in enumerate(itertools.pairwise(borders)):
        case = Case(rule, inputs, parameters).tokens(start, stop)
        state = None if initial_state is None else initial_state.map(lambda x, i=i: x[i : i + 1])
        y, state = case(recurrent_miras, initial_state=state, output_final_state=output_final_state)
        outputs.append(y)
        states.append(state)
    return torch.cat(outputs, dim=1), concatenated(states)


def without_pads(mask, *, rule, parameters, output_final_state, **inputs):
    """A form that takes every row's pads out and reads the rows one by one."""
    outputs, states = torch.zeros_like(inputs["q"]), []
    for row, real in enumerate(mask):
        case = Case(rule, inputs, parameters).row(row).map(lambda x, real=real: x[:, real])
        y, state = case(recurrent_miras, output_final_state=output_final_state)
        outputs = outputs.index_put((torch.tensor(row), real.nonzero()[:, 0]), y[0])
        states.append(state)
    return outputs, concatenated(states)


def concatenated(states):
    if states[0] is None:
        return None
    parts = zip(*states, strict=True)
    return MemoryState(
        *(tuple(map(torch.cat, zip(*p, strict=True))) if isinstance(p[0], tuple) else torch.cat(p) for p in parts)
    )


# -- packs ----------------------------------------------------------------------------------------------------------------

PACKS = {
    "one": [0, 21],
    "whole_chunks": [0, 8, 12, 20, 21],
    "ragged": [0, 3, 10, 11, 21],
    "single_tokens": [0, 1, 2, 3, 21],
    "empty_first_middle_last": [0, 0, 5, 5, 5, 9, 21, 21],
    "growing": [0, 1, 3, 6, 10, 15, 21],
}


@functools.cache
def packed_reference(name: str, pack: str, final_state: bool) -> dict[str, torch.Tensor]:
    return values_and_gradients(packed_case(name), functools.partial(alone, PACKS[pack]), final_state)


def packed_case(name: str) -> Case:
    return make_case(rule_of(name), batch=1, tokens=21, heads=1)


@pytest.mark.parametrize("final_state", [True, False])
@pytest.mark.parametrize("form", ["recurrent", "chunk", "chunk_groups_of_1"])
@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("name", MODELS)
def test_packed_is_one_by_one(name, pack, form, final_state):
    expected, borders = packed_reference(name, pack, final_state), torch.tensor(PACKS[pack])
    got = values_and_gradients(packed_case(name), FORMS[form], final_state, cu_seqlens=borders)
    assert_same(got, expected, 1e-9)
    if final_state:
        assert torch.equal(got["state.count.0"], borders.diff())


@pytest.mark.parametrize("form", ["recurrent", "chunk", "chunk_groups_of_1"])
@pytest.mark.parametrize("name", [*MODELS, *OTHER_RULES])
def test_packs_go_on_from_states(name, form):
    """Every sequence at its own phase, some without a token in one of the calls."""
    case = make_case(rule_of(name), batch=1, tokens=42, heads=1)
    first, second = [0, 3, 3, 7, 8, 21], [0, 2, 9, 9, 13, 21]

    def both(read_first, read_second, *, rule, parameters, output_final_state, **inputs):
        whole = Case(rule, inputs, parameters)
        y_first, state = whole.tokens(0, 21)(read_first, output_final_state=True)
        y_second, state = whole.tokens(21, 42)(read_second, initial_state=state, output_final_state=output_final_state)
        return torch.cat((y_first, y_second), dim=1), state

    one_by_one = functools.partial(both, *(functools.partial(alone, borders) for borders in (first, second)))
    packed = functools.partial(
        both, *(functools.partial(FORMS[form], cu_seqlens=torch.tensor(borders)) for borders in (first, second))
    )
    for final_state in (True, False):
        expected = values_and_gradients(case, one_by_one, final_state)
        assert_same(values_and_gradients(case, packed, final_state), expected, 1e-9)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_integer_dtypes_of_borders(dtype):
    case = make_case(rule_of("yaad"), batch=1, tokens=21)
    y, _ = case(chunk_miras, cu_seqlens=torch.tensor([0, 3, 21], dtype=dtype))
    assert torch.equal(y, case(chunk_miras, cu_seqlens=torch.tensor([0, 3, 21]))[0])


def test_sequences_of_a_pack_do_not_see_each_other():
    case = make_case(rule_of("memora"), batch=1, tokens=21)
    borders = torch.tensor([0, 6, 13, 21])
    y, _ = case(chunk_miras, cu_seqlens=borders)
    changed, _ = case.map(lambda x: torch.cat((x[:, :6], 0.5 * x[:, 6:13], x[:, 13:]), dim=1))(
        chunk_miras, cu_seqlens=borders
    )
    assert torch.equal(y[:, :6], changed[:, :6]) and torch.equal(y[:, 13:], changed[:, 13:])
    assert relative_error(y[:, 6:13], changed[:, 6:13]) > 1e-2


# -- masks ----------------------------------------------------------------------------------------------------------------


def random_mask(tokens: int, share: float, seed: int) -> torch.Tensor:
    return torch.rand(3, tokens, generator=torch.Generator().manual_seed(seed)) < share


def lengths_mask(lengths, side: str, tokens: int) -> torch.Tensor:
    positions = torch.arange(tokens).view(1, -1)
    if side == "left":
        positions = tokens - 1 - positions
    return positions < torch.tensor(lengths).view(-1, 1)


MASKS = {
    "left": lengths_mask([14, 9, 4], "left", 14),
    "right": lengths_mask([14, 9, 4], "right", 14),
    "left_with_an_empty_row": lengths_mask([1, 0, 8], "left", 14),
    "right_with_an_empty_row": lengths_mask([0, 13, 5], "right", 14),
    "holes": random_mask(14, 0.6, 0),
    "few": random_mask(14, 0.2, 1),
    "all_real": torch.ones(3, 14, dtype=torch.bool),
    "all_pad": torch.zeros(3, 14, dtype=torch.bool),
}


@functools.cache
def masked_reference(name: str, pads: str, final_state: bool) -> dict[str, torch.Tensor]:
    return values_and_gradients(masked_case(name), functools.partial(without_pads, MASKS[pads]), final_state)


def masked_case(name: str) -> Case:
    return make_case(rule_of(name), batch=3, tokens=14, heads=1, head_dim=6)


# what the final state is asked for is differentiated by other means, which the other forms do not know
MASKED_READS = [("recurrent", True), ("decode", True), ("chunk", True), ("chunk", False), ("chunk_groups_of_1", False)]


@pytest.mark.parametrize("form, final_state", MASKED_READS)
@pytest.mark.parametrize("pads", MASKS)
@pytest.mark.parametrize("name", MODELS)
def test_masked_is_without_pads(name, pads, form, final_state):
    """Outputs at pads are zero, and so are the gradients of what stands there."""
    expected = masked_reference(name, pads, final_state)
    got = values_and_gradients(masked_case(name), FORMS[form], final_state, mask=MASKS[pads])
    assert_same(got, expected, 1e-9)
    if final_state:
        assert got["state.count.0"].tolist() == MASKS[pads].sum(-1).tolist()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [*MODELS, *OTHER_RULES])
def test_masked_calls_go_on_from_states(name, form):
    """Two masked calls: the rows reach the second at phases of their own, and all end where reading alone ends."""
    case = masked_case(name)
    first, second = MASKS["left"][:, :9], MASKS["holes"][:, :5]
    mask = torch.cat((first, second), dim=1)
    expected = values(case, functools.partial(without_pads, mask))
    y_first, state = case.tokens(0, 9)(FORMS[form], mask=first, output_final_state=True)
    assert len(set((state.count % 4).tolist())) > 1
    got = values(case.tokens(9, 14), FORMS[form], mask=second, initial_state=state)
    got["y"] = torch.cat((y_first, got["y"]), dim=1)
    assert_same(got, expected, 1e-10)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("form", FORMS)
def test_pads_may_hold_anything(form, bad):
    """Masked entries are selected, never multiplied. Gradients too in the form that models train with."""
    case = make_case(rule_of("yaad"), batch=3, tokens=14)
    mask = MASKS["holes"]

    def spoilt(x):
        return torch.where(mask.view(3, 14, *[1] * (x.dim() - 2)), x, bad)

    chunked = form.startswith("chunk")
    read = values_and_gradients if chunked else values
    with torch.set_grad_enabled(chunked):
        for final_state in (True, False) if chunked else (True,):
            expected = read(case, FORMS[form], final_state, mask=mask)
            assert_same(read(case.map(spoilt), FORMS[form], final_state, mask=mask), expected, 1e-12)


def test_a_mask_of_ones_is_no_mask():
    case = make_case(rule_of("memora"), batch=3, tokens=14)
    assert_same(values(case, chunk_miras, mask=MASKS["all_real"]), values(case, chunk_miras), 1e-13)


def test_pads_on_the_left_do_not_shift_the_grid():
    """Stated once in full: with 2 pads in front, the first chunk still has four real tokens."""
    case = make_case(rule_of("moneta"), batch=1, tokens=12)
    padded = case.map(lambda x: torch.cat((x[:, :2], x), dim=1))
    mask = torch.ones(1, 14, dtype=torch.bool)
    mask[:, :2] = False
    y, _ = padded(chunk_miras, mask=mask)
    expected, _ = case(chunk_miras)
    assert relative_error(y[:, 2:], expected) < 1e-13
    # the phase matters: reading the pads' places as tokens without a step would shift the anchors
    shifted = padded._replace(inputs={**padded.inputs, "eta": padded.inputs["eta"] * mask.view(1, 14, 1, 1)})
    assert relative_error(shifted(chunk_miras)[0][:, 2:], expected) > 1e-5
