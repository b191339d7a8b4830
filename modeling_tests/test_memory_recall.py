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
from memory_cases import FORMS, MODELS, Case, make_parameters, rule_of


STEPS = {"moneta": 5e-3, "yaad": 0.1, "memora": 0.2}
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


def errors(case: Case, form) -> torch.Tensor:
    """Distance of the reads from the values, relative to the values' size, by round."""
    with torch.no_grad():
        y, _ = case(form)
    distance = (y - case.inputs["v"]).norm(dim=-1) / case.inputs["v"].norm(dim=-1)
    return distance.view(ROUNDS, PAIRS).mean(1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_repeated_pairs_are_learned(name, form):
    by_round = errors(recall_case(name, log_alpha=-1e-3), FORMS[form])
    assert by_round[-1] < 0.6 * by_round[0], by_round
    # and by learning, round after round, not by chance
    assert (by_round[1:] < by_round[:-1] + 0.02).all(), by_round


@pytest.mark.parametrize("name", MODELS)
def test_strong_decay_forgets(name):
    """With an e-fold of decay per token, no pair survives until it is asked for again."""
    kept, lost = (errors(recall_case(name, log_alpha), FORMS["chunk"])[-1] for log_alpha in (-1e-3, -1.0))
    assert lost > 1.5 * kept
