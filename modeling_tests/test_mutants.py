# Copyright 2026 The miras-hf authors.
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
"""The tests fail when the thing is broken: every mutant of `mutants.py` fails the tests of its own subject.

A test that is loosened until a memory that never learns passes it, or that compares one broken answer with another, is
found here.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


HERE = Path(__file__).parent

RECALL, CONTINUATION = "test_memory_recall.py", "test_memory_continuation.py"
GENERATION, BATCHING = "test_generation_miras.py", "test_batching.py"
MONETA, HYBRID = "('moneta', False)", "('yaad', True)"

CAUGHT = {
    "never_writes": [
        f"{RECALL}::test_repeated_pairs_are_learned[moneta-chunk]",
        f"{RECALL}::test_reads_are_those_of_the_oracle[yaad--0.001-chunk]",
        f"{RECALL}::test_reads_are_those_of_the_oracle[memora--0.001-decode]",
        f"{GENERATION}::test_bfloat16_decoding_stays_close[moneta]",
        f"{GENERATION}::test_autocast_leaves_the_memory_in_float32[memora]",
    ],
    "never_forgets": [
        f"{RECALL}::test_strong_decay_forgets[yaad]",
        f"{RECALL}::test_reads_are_those_of_the_oracle[memora--1.0-chunk]",
        f"{RECALL}::test_reads_are_those_of_the_oracle[moneta--1.0-decode]",
        f"{GENERATION}::test_bfloat16_decoding_stays_close[yaad]",
        f"{GENERATION}::test_autocast_leaves_the_memory_in_float32[memora]",
    ],
    "ignores_cache": [
        f"{CONTINUATION}::test_forms_take_over_from_each_other[yaad-chunk-decode-recurrent]",
        f"{CONTINUATION}::test_steps_in_place[moneta-True]",
        f"{GENERATION}::test_decoding_equals_one_forward[{MONETA}-splits0]",
        f"{GENERATION}::test_generate_uses_the_cache[{MONETA}]",
        f"{GENERATION}::test_generate_goes_on_from_a_cache[{HYBRID}]",
        f"{GENERATION}::test_static_cache[{MONETA}]",
        f"{GENERATION}::test_bfloat16_decoding_stays_close[yaad]",
        f"{BATCHING}::test_a_padded_prompt_is_read_once[{MONETA}]",
    ],
    "ignores_mask": [
        f"{GENERATION}::test_padded_rows_equal_rows_alone[{MONETA}-left]",
        f"{GENERATION}::test_generate_left_padded_batch[{MONETA}]",
        f"{GENERATION}::test_pads_leave_gradients_alone",
        f"{BATCHING}::test_beams_of_padded_rows[{MONETA}-{{'num_beams': 4}}]",
        f"{BATCHING}::test_rows_end_at_different_times[{MONETA}]",
    ],
    "ignores_borders": [
        f"{GENERATION}::test_packed_rows_equal_rows_alone[{MONETA}-cu_seq_lens_q]",
        f"{GENERATION}::test_packed_rows_equal_rows_alone[{HYBRID}-position_ids]",
        f"{GENERATION}::test_a_batch_of_packed_rows",
        f"{GENERATION}::test_gradients_of_a_pack",
    ],
}
# all that a mutant must fail, in health
HEALTHY = ""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """By mutant and test, how it ended."""
    path = tmp_path_factory.mktemp("mutants") / "outcomes.json"
    tests = {HEALTHY: sorted({test for tests in CAUGHT.values() for test in tests}), **CAUGHT}
    path.write_text(json.dumps(tests))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(HERE / "mutants.py"), str(path)]
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(path.read_text())
    return {
        name: {test.removeprefix("modeling_tests/"): how for test, how in of.items()} for name, of in found.items()
    }


def test_every_mutant_has_its_tests():
    from mutants import MUTANTS

    assert MUTANTS.keys() == CAUGHT.keys()


@pytest.mark.parametrize("mutant", CAUGHT)
def test_a_mutant_is_caught(mutant, outcomes):
    """By an assertion of every test: one that breaks otherwise says nothing about what it compares."""
    assert outcomes[mutant].keys() == set(CAUGHT[mutant])
    for test, how in outcomes[mutant].items():
        assert how.startswith(("assert ", "AssertionError")), (test, how)
        assert outcomes[HEALTHY][test] == "passed", (test, outcomes[HEALTHY][test])


def test_a_mutant_nobody_knows_is_refused():
    from conftest import break_on_purpose

    with pytest.raises(pytest.UsageError, match=r"`MIRAS_MUTANT` must be one of \[.*'never_writes'\], got 'writes'"):
        break_on_purpose("writes")
