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
"""The memory learns at test time: what it has read it returns, what has decayed it forgets."""

import pytest
import torch
import torch.nn.functional as F
from memory_cases import FORMS, MODELS, Case, make_parameters, relative_error, rule_of
from test_memory_oracle import ORACLES, Oracle


STEPS = {"moneta": 5e-3, "yaad": 0.1, "memora": 0.1}
PAIRS, ROUNDS = 4, 12


def recall_case(name: str, log_alpha: float) -> Case:
    """The same few pairs again and again, each key asked for as it comes; the memory is asked before it is told."""
    generator = torch.Generator().manual_seed(0)
    rule = rule_of(name)
    keys, values = (torch.randn(1, PAIRS, 1, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    keys = F.normalize(keys, dim=-1)
    gates = torch.ones(1, PAIRS * ROUNDS, 1, dtype=torch.float64)
    inputs = {
        "q": keys.repeat(1, ROUNDS, 1, 1),
        "k": keys.repeat(1, ROUNDS, 1, 1),
        "v": values.repeat(1, ROUNDS, 1, 1),
        "eta": STEPS[name] * gates,
        "log_alpha": log_alpha * gates,
    }
    if rule.attentional_bias.delta_granularity is not None:
        inputs["delta"] = 8 * gates
    return Case(rule, inputs, make_parameters(rule, 1, 16, generator))


def read(case: Case, form) -> torch.Tensor:
    with torch.no_grad():
        return case(form)[0]


def errors(case: Case, y: torch.Tensor) -> torch.Tensor:
    """Distance of the reads from the values, relative to the values' size, by round."""
    distance = (y - case.inputs["v"]).norm(dim=-1) / case.inputs["v"].norm(dim=-1)
    return distance.view(ROUNDS, PAIRS).mean(1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("log_alpha", [-1e-3, -1.0])
@pytest.mark.parametrize("name", MODELS)
def test_reads_are_those_of_the_oracle(name, log_alpha, form):
    case = recall_case(name, log_alpha)
    oracle = ORACLES[name]
    expected, _ = Oracle(case.rule, oracle.loss, oracle.link, oracle.clip, oracle.norm_eps).read(case)
    assert relative_error(read(case, FORMS[form]), expected) < 1e-9


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_repeated_pairs_are_learned(name, form):
    case = recall_case(name, log_alpha=-1e-3)
    by_round = errors(case, read(case, FORMS[form]))
    # what a memory that is never written returns has nothing to do with the values: its error is larger than they are
    unwritten = case._replace(inputs={**case.inputs, "eta": 0 * case.inputs["eta"]})
    at_start = errors(case, read(unwritten, FORMS[form]))
    assert (at_start > 1).all()
    assert by_round[-1] < 0.3 * at_start[-1], by_round
    # and by learning, round after round, not by the write of the same token alone
    assert by_round[-1] < 0.55 * by_round[0], by_round
    assert (by_round[1:] < by_round[:-1]).all(), by_round


@pytest.mark.parametrize("name", MODELS)
def test_strong_decay_forgets(name):
    """With an e-fold of decay per token, no pair survives until it is asked for again."""
    kept, lost = (recall_case(name, log_alpha) for log_alpha in (-1e-3, -1.0))
    by_round = errors(lost, read(lost, FORMS["chunk"]))
    assert by_round[-1] > 1.5 * errors(kept, read(kept, FORMS["chunk"]))[-1]
