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
"""What the probe says of a memory against one head written out token by token, in float64."""

import math

import pytest
import torch
from memory_cases import RULES, make_case, rule_of
from torch.nn import functional as F

from miras_hf.memory import L2, Decay, MatrixMemory, MirasRule, MLPMemory, recurrent_miras
from miras_hf.memory.probe import probe_memory, summary


LAGS = (0, 1, 3)


def naive(case, row: int, head: int) -> dict[str, list]:
    """A head of an l2 memory with decay toward its start, a token a chunk: errors, own writes, weights after each token."""
    x = {name: t[row, :, head] for name, t in case.inputs.items()}
    mlp, eps = isinstance(case.rule.architecture, MLPMemory), getattr(case.rule.architecture, "norm_eps", None)
    gamma, beta = case.parameters.norm_weight[head], case.parameters.norm_bias[head]
    start = [a[head] for a in case.parameters.initial]

    def memory(k, weights):
        if not mlp:
            return k @ weights[0]
        z = F.gelu(k @ weights[0], approximate="tanh") @ weights[1]
        return k + F.layer_norm(z, z.shape[-1:], gamma, beta, eps)

    def gated(
        gate, layer, weight
    ):  # channels on the input rows of the first layer, on the output columns of the second
        return gate[:, None] * weight if layer == 0 else weight * gate

    found = {"errors": [], "writes": [], "weights": [], "memory": memory, "start": start, **x}
    weights = start
    for k, v, eta, log_alpha in zip(x["k"], x["v"], x["eta"], x["log_alpha"], strict=True):
        leaves = [w.detach().requires_grad_() for w in weights]
        gradients = torch.autograd.grad(0.5 * (memory(k, leaves) - v).square().sum(), leaves)
        steps = [gated(eta, i, g) for i, g in enumerate(gradients)]
        before = memory(k, weights)
        found["errors"].append(v - before)
        found["writes"].append(memory(k, [w - s for w, s in zip(weights, steps, strict=True)]) - before)
        weights = [
            w0 + gated(log_alpha.exp(), i, w - w0) - s
            for i, (w0, w, s) in enumerate(zip(start, weights, steps, strict=True))
        ]
        found["weights"].append(weights)
    return found


@pytest.fixture(params=["mlp", "matrix"])
def case(request):
    architecture = MLPMemory(expansion=2, norm_eps=0.05) if request.param == "mlp" else MatrixMemory()
    rule = MirasRule(architecture, L2(residual_clip=1e6), Decay(weight_cap=None), chunk_size=1)
    return make_case(rule, batch=2, tokens=9)


def test_writes_and_recall_are_those_of_a_head_written_out(case):
    found = case(probe_memory, lags=LAGS)
    for head in range(2):
        rows = [naive(case, row, head) for row in range(2)]
        values = torch.stack([row["v"] for row in rows])
        errors, writes = (torch.stack([torch.stack(row[name]) for row in rows]) for name in ("errors", "writes"))
        start = torch.stack([torch.stack([row["memory"](k, row["start"]) for k in row["k"]]) for row in rows])
        reads = torch.stack(
            [
                torch.stack([row["memory"](q, weights) for q, weights in zip(row["q"], row["weights"], strict=True)])
                for row in rows
            ]
        )
        for name, tensor in (("value", values), ("write", writes), ("initial", start), ("read", reads)):
            torch.testing.assert_close(getattr(found, f"{name}_rms")[head], tensor.square().mean().sqrt())
        torch.testing.assert_close(found.write_cosine[head], F.cosine_similarity(writes, values, dim=-1).mean())
        torch.testing.assert_close(found.write_share[head], (writes * errors).sum() / errors.square().sum())
        for i, lag in enumerate(LAGS):
            hits, misses = [], []
            for row, at_start in zip(rows, start, strict=True):
                for t in range(9 - lag):
                    recalled = row["memory"](row["k"][t], row["weights"][t + lag]) - at_start[t]
                    hits.append(F.cosine_similarity(recalled, row["v"][t], dim=0))
                    misses.append(F.cosine_similarity(recalled, row["v"][(t + 4) % 9], dim=0))
            torch.testing.assert_close(found.recall[i, head], torch.stack(hits).mean())
            torch.testing.assert_close(found.chance[i, head], torch.stack(misses).mean())


def test_half_lives_are_those_of_the_mean_rates():
    case = make_case(rule_of("yaad"))
    rates = -case.inputs["log_alpha"].mean((0, 1))
    half_lives = case(probe_memory, lags=(0,)).half_lives
    torch.testing.assert_close(half_lives, math.log(2.0) / rates)
    # what is left of a write after so many tokens at that rate
    torch.testing.assert_close((-rates * half_lives).exp(), torch.full_like(rates, 0.5))


@pytest.mark.parametrize("name", RULES)
def test_writes_are_what_the_reference_reads_with_and_without_the_step(name):
    rule = rule_of(name, chunk_size=1)
    case = make_case(rule, tokens=6)
    writes, errors = [], []
    for t in range(6):
        _, state = case.tokens(0, t)(recurrent_miras, output_final_state=True)
        token = case.tokens(t, t + 1)
        kept = token.inputs | {"q": token.inputs["k"], "log_alpha": 0.0 * token.inputs["log_alpha"]}
        reads = [
            token._replace(inputs=kept | {"eta": step})(recurrent_miras, initial_state=state)[0]
            for step in (kept["eta"], 0.0 * kept["eta"])
        ]
        writes.append(reads[0] - reads[1])
        errors.append(token.inputs["v"] - reads[1])
    writes, errors = torch.cat(writes, dim=1), torch.cat(errors, dim=1)
    found = case(probe_memory, lags=(0,))
    torch.testing.assert_close(found.write_rms, writes.square().mean((0, 1, 3)).sqrt())
    shares = (writes * errors).sum((0, 1, 3)) / errors.square().sum((0, 1, 3))
    torch.testing.assert_close(found.write_share, shares)
    assert (writes.abs().amax((0, 1, 3)) > 1e-4).all()


@pytest.mark.parametrize("step", [0.25, 1.25, 1.0])
def test_a_difference_grows_as_the_step_on_a_repeated_key_says(step):
    # one key fills a space of one dimension: both tokens of a chunk take off `step` of what the weight is wrong by
    rule = MirasRule(MatrixMemory(), L2(residual_clip=1e6), Decay(weight_cap=None), chunk_size=2)
    case = make_case(rule, batch=1, tokens=20, heads=1, head_dim=1, gates="head")
    one = torch.ones(1, 20, 1, 1, dtype=torch.float64)
    gates = {"eta": step * one[..., 0], "log_alpha": 0.0 * one[..., 0]}
    found = case._replace(inputs={"q": one, "k": one, "v": case.inputs["v"]} | gates)(probe_memory, lags=(0,))
    expected = math.log(abs(1.0 - 2.0 * step))
    assert found.log_growth.shape == (9, 1)
    torch.testing.assert_close(found.log_growth, torch.full_like(found.log_growth, expected), atol=1e-6, rtol=0.0)
    assert found.lyapunov.item() == pytest.approx(expected / 2, abs=1e-6)
    assert found.largest_growth.item() == pytest.approx(max(0.0, 9 * expected), abs=1e-5)
    # what a write takes away is taken away by both
    assert found.key_alignment.item() == pytest.approx(1.0) and found.chunk_share.item() == pytest.approx(2 * step)


def test_the_largest_growth_is_that_of_a_stretch():
    found = make_case(rule_of("yaad"), tokens=12)(probe_memory, lags=(0,))
    log_growth = torch.tensor([[-1.0, -1.0], [2.0, -0.5], [-0.5, -2.0], [3.0, -1.0], [-9.0, -1.0], [4.0, -3.0]])
    torch.testing.assert_close(found._replace(log_growth=log_growth).largest_growth, torch.tensor([4.5, 0.0]))
    assert found._replace(log_growth=log_growth[:0]).largest_growth.isnan().all()


def test_alignment_is_the_mean_share_of_a_chunk_s_first_eigenvalue():
    case = make_case(rule_of("yaad"), batch=2, tokens=10)
    size, k = case.rule.chunk_size, case.inputs["k"]
    largest = torch.zeros(2, dtype=k.dtype)
    for row in k:
        for chunk in row.split(size):  # the last one is not full
            for head in range(2):
                largest[head] += torch.linalg.eigvalsh(chunk[:, head] @ chunk[:, head].T)[-1]
    assert size == 4
    found = case(probe_memory, lags=(0,))
    torch.testing.assert_close(found.key_alignment, largest / 20)
    torch.testing.assert_close(found.chunk_share, found.write_share * largest / 5)


def test_a_difference_that_decays_alone_shrinks_by_the_decay():
    case = make_case(rule_of("yaad"), batch=1, tokens=16)
    rate = 0.1
    gates = {"eta": 0.0 * case.inputs["eta"], "log_alpha": torch.full_like(case.inputs["log_alpha"], -rate)}
    found = case._replace(inputs=case.inputs | gates)(probe_memory, lags=(0,))
    torch.testing.assert_close(found.log_growth, torch.full((3, 2), -4 * rate, dtype=torch.float64))


@pytest.mark.parametrize("pad", [0.7, math.nan])
def test_pads_and_packs_change_nothing(pad):
    case = make_case(rule_of("yaad"), batch=1, tokens=13)
    packed = case(probe_memory, lags=LAGS, cu_seqlens=torch.tensor([0, 6, 13], dtype=torch.int32))
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, [0, 1, 4]], mask[1, [2, 8]] = False, False
    padded = {name: torch.full((2, 9, *x.shape[2:]), pad, dtype=x.dtype) for name, x in case.inputs.items()}
    for name, x in padded.items():
        for row, (start, stop) in enumerate(((0, 6), (6, 13))):
            x[row, mask[row]] = case.inputs[name][0, start:stop]
    found = case._replace(inputs=padded)(probe_memory, lags=LAGS, mask=mask)
    for name, one, other in zip(found._fields, found, packed, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


def test_summary_means_over_heads_and_counts_those_that_write():
    case = make_case(rule_of("yaad"), tokens=12)
    found = case(probe_memory, lags=(0, 50))
    assert found.recall.shape == (2, 2) and found.recall[1].isnan().all() and found.chance[1].isnan().all()
    found = found._replace(
        value_rms=torch.tensor([1.0, 1.0]),
        write_rms=torch.tensor([0.04, 0.06]),
        half_lives=torch.tensor([[1.0, 2.0], [3.0, 5.0]]),
        log_growth=torch.tensor([[0.4, 0.0], [0.8, 0.4]]),
    )
    numbers = summary(found, lags=(0, 50))
    assert numbers["writing_heads"] == 0.5 and numbers["half_life_50"] == 2.5
    assert numbers["lyapunov"] == pytest.approx(0.4 / 4) and numbers["write_rms"] == pytest.approx(0.05)
    assert numbers["largest_growth"] == pytest.approx(1.2)  # of the head where it is largest
    assert numbers["chunk_share"] == pytest.approx(found.chunk_share.max().item())
    assert numbers["recall_0"] == pytest.approx(found.recall[0].mean().item()) and math.isnan(numbers["recall_50"])


def test_arguments_are_checked():
    case = make_case(rule_of("memora"))
    with pytest.raises(ValueError, match=r"`lags` must not be negative, got \(0, -1\)"):
        case(probe_memory, lags=(0, -1))
    with pytest.raises(ValueError, match="`q` must hold at least one real token"):
        case(probe_memory, mask=torch.zeros(2, 13, dtype=torch.bool))
