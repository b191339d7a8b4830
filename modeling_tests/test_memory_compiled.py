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
"""The chunk-parallel form under `torch.compile`, which differentiates it by itself: the numbers of the eager one, from one
graph. `aot_eager` traces forward and backward as inductor does, without its minutes of C++; one test is of inductor."""

import shutil

import pytest
import torch
from memory_cases import MODELS, assert_same, make_case, rule_of, values_and_gradients

from miras_hf.memory import chunk_miras


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def compiled(form=chunk_miras, backend="aot_eager"):
    return torch.compile(form, fullgraph=True, backend=backend)


@pytest.mark.parametrize("final_state", [True, pytest.param(False, marks=pytest.mark.slow)])
# the others' losses and gates are in the graphs below
@pytest.mark.parametrize("name", ["yaad", *(pytest.param(n, marks=pytest.mark.slow) for n in MODELS if n != "yaad")])
def test_compiled_is_eager(name, final_state):
    case = make_case(rule_of(name), tokens=13)
    expected = values_and_gradients(case, chunk_miras, final_state)
    assert_same(values_and_gradients(case, compiled(), final_state), expected, 1e-10)


def test_groups_are_recomputed():
    case = make_case(rule_of("memora"), tokens=13)
    expected = values_and_gradients(case, chunk_miras, final_state=False)
    options = {"kept_bytes": 0, "chunks_per_group": 2}
    assert_same(values_and_gradients(case, compiled(), final_state=False, **options), expected, 1e-10)


def test_masked():
    case = make_case(rule_of("moneta"), tokens=13)
    mask = torch.arange(13) >= torch.tensor([[0], [6]])
    expected = values_and_gradients(case, chunk_miras, mask=mask)
    assert_same(values_and_gradients(case, compiled(), mask=mask), expected, 1e-10)


def test_from_a_state():
    case = make_case(rule_of("yaad"), tokens=15)
    _, state = case.tokens(0, 6)(chunk_miras, output_final_state=True)
    rest = case.tokens(6, None)
    expected = values_and_gradients(rest, chunk_miras, initial_state=state)
    assert_same(values_and_gradients(rest, compiled(), initial_state=state), expected, 1e-10)


@pytest.mark.slow(reason="compiles twice what `test_compiled_is_eager` compiles once")
def test_batches_of_many_sizes():
    form = compiled()
    for batch in (2, 3):
        case = make_case(rule_of("yaad"), batch=batch, tokens=5)
        expected = values_and_gradients(case, chunk_miras, final_state=False)
        assert_same(values_and_gradients(case, form, final_state=False), expected, 1e-10)


@pytest.mark.parametrize("inside", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_under_autocast(inside):
    """Around a compiled function autocast reaches the products of its gradient, whatever the function has left."""
    case = make_case(rule_of("yaad", chunk_size=8), tokens=21, dtype=torch.float32)
    expected = values_and_gradients(case, chunk_miras, final_state=False)

    def within(form):
        def call(*args, **kwargs):
            with torch.autocast("cpu", torch.bfloat16):
                return form(*args, **kwargs)

        return call

    form = compiled(within(chunk_miras)) if inside else within(compiled())
    found = values_and_gradients(case, form, final_state=False)
    assert_same({"y": found["y"]}, {"y": expected["y"]}, 1e-5)
    assert_same(found, expected, 1e-5 if inside else 2e-2)


@pytest.mark.slow(reason="compiles C++ for minutes; the graphs that it compiles are compared by aot_eager above")
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_inductor():
    # a chunk and a begun one: compiling takes its time per chunk
    case = make_case(rule_of("yaad"), tokens=5)
    expected = values_and_gradients(case, chunk_miras, final_state=False)
    assert_same(values_and_gradients(case, compiled(backend="inductor"), final_state=False), expected, 1e-10)
