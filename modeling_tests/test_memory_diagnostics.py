# Copyright 2026 The miras-hf authors..
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
"""The statistics of a memory against the recurrent reference and sums written out token by token, in float64."""

import math

import pytest
import torch
from memory_cases import RULES, make_case, rule_of
from torch.nn import functional as F

from miras_hf.memory import (
    L2,
    AttentionalBias,
    Decay,
    ElasticNetDecay,
    MatrixMemory,
    MirasRule,
    MLPMemory,
    recurrent_miras,
)
from miras_hf.memory.diagnostics import memory_statistics


def assert_equal(actual, expected):
    for name, one, other in zip(actual._fields, actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", RULES)
def test_inner_loss_is_that_of_the_weights_the_reference_has_at_chunk_starts(name):
    rule = rule_of(name)
    case = make_case(rule, tokens=10)
    losses = {"inner_loss": 0.0, "inner_loss_initial": 0.0}
    norm = [p[None, :, None] for p in case.parameters[1:]]
    for start in (0, 4, 8):
        chunk = case.tokens(start, start + 4).map(lambda x: x.transpose(1, 2)).inputs
        of_chunk = {"inner_loss": start, "inner_loss_initial": 0}
        for which, read in of_chunk.items():
            _, state = case.tokens(0, read)(recurrent_miras, output_final_state=True)
            duals = [
                d + a if rule.decay_target == "init" else (d if read else a.expand_as(d))
                for d, a in zip(state.dual, case.parameters.initial)
            ]
            weights = [rule.retention.link(d, rule.hidden_axis(i)) for i, d in enumerate(duals)]
            if isinstance(rule.architecture, MLPMemory):
                hidden = F.gelu(chunk["k"] @ weights[0], approximate="tanh") @ weights[1]
                hidden = F.layer_norm(hidden, hidden.shape[-1:], eps=rule.architecture.norm_eps)
                recalled = chunk["k"] + hidden * norm[0] + norm[1]
            else:
                recalled = chunk["k"] @ weights[0]
            delta = chunk.get("delta")
            if delta is not None and delta.dim() == 3:
                delta = delta[..., None]
            losses[which] += rule.attentional_bias.loss(recalled - chunk["v"], delta).sum((0, 2, 3)) / 20
    found = case(memory_statistics)
    torch.testing.assert_close(found.inner_loss, losses["inner_loss"])
    torch.testing.assert_close(found.inner_loss_initial, losses["inner_loss_initial"])
    assert not torch.allclose(found.inner_loss, found.inner_loss_initial)


@pytest.mark.parametrize("architecture", [MLPMemory(norm_eps=0.01), MatrixMemory()], ids=["mlp", "matrix"])
def test_memory_writes_the_gradient_of_the_inner_loss(architecture):
    rule = MirasRule(architecture, L2(residual_clip=1e6), Decay(weight_cap=None), chunk_size=4)
    case = make_case(rule, batch=1, tokens=1).requires_grad()
    gradients = torch.autograd.grad(case(memory_statistics).inner_loss.sum(), case.parameters.initial)
    _, state = case(recurrent_miras, output_final_state=True)
    for gradient, inputs, outputs in zip(gradients, state.inputs, state.gradients):
        torch.testing.assert_close(gradient, (inputs.mT @ outputs)[0])


def test_norm_counts_the_writes_of_a_chunk_that_is_not_full():
    rule = MirasRule(MatrixMemory(), L2(residual_clip=1e6), Decay(weight_cap=None), chunk_size=8)
    case = make_case(rule, batch=1, tokens=3)
    (weight,) = case.parameters.initial  # [heads, in, out]
    written = torch.zeros_like(weight)
    k, v, eta, log_alpha = (case.inputs[name][0] for name in ("k", "v", "eta", "log_alpha"))  # [tokens, heads, d]
    for t in range(3):
        error = (k[t, :, None] @ weight)[:, 0] - v[t]
        written = log_alpha[t].exp()[..., None] * written - (eta[t] * k[t])[..., None] * error[:, None]
    norm = (weight + written).square().mean((-2, -1)).sqrt()
    torch.testing.assert_close(case(memory_statistics).memory_norm, norm)


@pytest.mark.parametrize("tokens", [4, 6, 8])
def test_norm_is_of_what_the_text_has_left_with_a_gate_at_the_ends_of_chunks(tokens):
    rule = MirasRule(MatrixMemory(), L2(), ElasticNetDecay(threshold=0.05), chunk_size=4)
    case = make_case(rule, batch=1, tokens=tokens)
    # tokens of a chunk that has not ended are read with one that has not begun
    _, state = case.tokens(0, tokens // 4 * 4)(recurrent_miras, output_final_state=True)
    ended = state.dual[0][0] + case.parameters.initial[0]
    found = case(memory_statistics).memory_norm
    if tokens % 4 == 0:
        torch.testing.assert_close(found, ended.square().mean((-2, -1)).sqrt())
    else:
        k, v, eta, log_alpha = (case.inputs[name][0] for name in ("k", "v", "eta", "log_alpha"))
        written = state.dual[0][0]
        for t in range(4, tokens):
            residual = rule.attentional_bias.residual((k[t, :, None] @ ended)[:, 0] - v[t])
            written = log_alpha[t].exp()[..., None] * written - (eta[t] * k[t])[..., None] * residual[:, None]
        weight = written + case.parameters.initial[0]
        torch.testing.assert_close(found, weight.square().mean((-2, -1)).sqrt())


def test_a_loss_that_only_learns_is_not_a_number():
    class Cauchy(L2):
        loss = AttentionalBias.loss

        def gradient(self, error, delta=None):
            return error / (1.0 + error.square())

    found = make_case(MirasRule(MatrixMemory(), Cauchy(), Decay()))(memory_statistics)
    assert found.inner_loss.isnan().all() and found.memory_norm.isfinite().all()


def test_gates_are_averaged_over_tokens_and_channels():
    case = make_case(rule_of("moneta"))
    eta, log_alpha = case.inputs["eta"], case.inputs["log_alpha"].clone()
    log_alpha[:, 0] = -1e3  # cut at the rule's bound
    found = case._replace(inputs=case.inputs | {"log_alpha": log_alpha})(memory_statistics)
    log_alpha = log_alpha.clamp(min=case.rule.min_log_alpha)
    torch.testing.assert_close(found.write_strength, eta.mean((0, 1, 3)))
    torch.testing.assert_close(found.retention, log_alpha.exp().mean((0, 1, 3)))
    half_lives = math.log(2) / -log_alpha.mean((0, 1))
    torch.testing.assert_close(found.half_life, half_lives.log().mean(-1).exp())


@pytest.mark.parametrize("pad", [0.7, math.nan])
@pytest.mark.parametrize("gates", ["channel", "head"])
def test_pads_and_packs_change_nothing(gates, pad):
    case = make_case(rule_of("yaad"), batch=1, tokens=13, gates=gates)
    rows = [case.tokens(0, 6), case.tokens(6, 13)]
    packed = case(memory_statistics, cu_seqlens=torch.tensor([0, 6, 13], dtype=torch.int32))

    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, [0, 1, 4]], mask[1, [2, 8]] = False, False
    padded = {name: torch.full((2, 9, *x.shape[2:]), pad, dtype=x.dtype) for name, x in case.inputs.items()}
    for name, x in padded.items():
        for row in range(2):
            x[row, mask[row]] = rows[row].inputs[name][0]
    assert_equal(case._replace(inputs=padded)(memory_statistics, mask=mask), packed)

    alone = [row(memory_statistics) for row in rows]
    for name in ("inner_loss", "inner_loss_initial", "write_strength", "retention"):
        mean = (6 * getattr(alone[0], name) + 7 * getattr(alone[1], name)) / 13
        torch.testing.assert_close(getattr(packed, name), mean)
    squares = sum(one.memory_norm.square() for one in alone) / 2
    torch.testing.assert_close(packed.memory_norm, squares.sqrt())


def test_arguments_are_checked():
    case = make_case(rule_of("memora"))
    with pytest.raises(ValueError, match="`q` must hold at least one real token"):
        case(memory_statistics, mask=torch.zeros(2, 13, dtype=torch.bool))
    with pytest.raises(ValueError, match="`lengths` must be an int32 or int64 tensor of shape"):
        case(memory_statistics, lengths=torch.ones(3, dtype=torch.int32))
    with pytest.raises(ValueError, match="`delta` must be None"):
        case._replace(inputs=case.inputs | {"delta": case.inputs["eta"]})(memory_statistics)
