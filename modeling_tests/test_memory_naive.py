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
"""What readers see first computes what everything is tested against."""

import pytest
import torch
from memory_cases import OTHER_RULES, RULES, assert_same, gradients, make_case, rule_of

from miras_hf.memory import L2, Decay, DeltaRule, Implicit, MatrixMemory, MirasRule, Momentum, recurrent_miras
from miras_hf.memory.naive import naive_miras


def naive(case):
    """Row by row and head by head."""
    x = {name: t if t.dim() == 4 else t.unsqueeze(-1) for name, t in case.inputs.items()}
    x["alpha"] = x.pop("log_alpha").exp()
    if "log_momentum" in x:
        x["mu"] = x.pop("log_momentum").exp()
    initial, *norm = case.parameters
    rows = [
        torch.stack(
            [
                naive_miras(
                    **{name: t[row, :, head] for name, t in x.items()},
                    rule=case.rule,
                    initial=[a[head] for a in initial],
                    norm=[p[head] for p in norm],
                )
                for head in range(x["q"].shape[2])
            ],
            dim=1,
        )
        for row in range(x["q"].shape[0])
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("chunk_size", [1, 4])
@pytest.mark.parametrize("name", [*RULES, *OTHER_RULES])
def test_the_reference_says_the_same(name, chunk_size):
    case = make_case(rule_of(name, chunk_size=chunk_size), tokens=9, heads=2, batch=2).requires_grad()
    found, expected = {"y": naive(case)}, {"y": case(recurrent_miras, read="exact")[0]}
    assert_same(found, expected, 1e-12)
    leaves = case.named_leaves()
    assert_same(gradients(found, leaves), gradients(expected, leaves), 1e-10)


@pytest.mark.parametrize("gates", ["head", "eta_channel"])
def test_gates_of_heads(gates):
    case = make_case(rule_of("yaad"), tokens=9, gates=gates)
    assert_same({"y": naive(case)}, {"y": case(recurrent_miras, read="exact")[0]}, 1e-12)


@pytest.mark.parametrize("name", ["yaad", "memora", "moneta_zero"])
def test_momentum(name):
    case = make_case(rule_of(name, algorithm=Momentum()), tokens=9, gates="head")
    case.inputs["log_momentum"] = -torch.rand(2, 9, 2, generator=torch.Generator().manual_seed(1)).double()
    assert_same({"y": naive(case)}, {"y": case(recurrent_miras, read="exact")[0]}, 1e-12)


@pytest.mark.parametrize("algorithm", [DeltaRule(), Implicit()], ids=repr)
def test_steps_are_those_that_the_algorithm_takes(algorithm):
    rule = MirasRule(MatrixMemory(), L2(residual_clip=None), Decay(), algorithm)
    case = make_case(rule, tokens=9, gates="head")
    case.inputs["eta"] = 40 * case.inputs["eta"]  # up to four, of which two turn an error round
    assert_same({"y": naive(case)}, {"y": case(recurrent_miras, read="exact")[0]}, 1e-12)


def test_log_retention_is_cut_at_the_rules_bound():
    case = make_case(rule_of("yaad", min_log_alpha=-0.2), tokens=9)
    assert (case.inputs["log_alpha"] < -0.2).any()
    assert_same({"y": naive(case)}, {"y": case(recurrent_miras, read="exact")[0]}, 1e-12)


def test_no_parameter_is_changed():
    case = make_case(rule_of("yaad_norm"), tokens=3)
    naive(case)
    assert not any(t.requires_grad for t in case.named_leaves().values())
