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
"""The default step is what it is said to be: alone, at a new memory, a write of that size takes its token's error away."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from miras_hf import MirasConfig, MirasForCausalLM
from miras_hf.callbacks import measure_memories
from miras_hf.memory import MemoryParameters, Momentum, chunk_miras
from miras_hf.memory.probe import probe_memory, summary
from miras_hf.step_size import largest_step, moment, unit_step


def memory_of(config):
    torch.manual_seed(0)
    return MirasForCausalLM(config).model.layers[0].mixer.memory


@torch.no_grad()
def measured_share(config: MirasConfig) -> float:
    """The share of the error that a write takes away, as the probe measures it, for steps small enough to be linear."""
    memory, d, tokens = memory_of(config), config.head_dim, config.chunk_size
    shape = (16, tokens, config.num_attention_heads)
    k, v = F.normalize(torch.randn(*shape, d), dim=-1), torch.randn(*shape, d)
    eta, log_alpha = torch.full(shape, unit_step(config) / 100), torch.full(shape, -1e-6)
    delta = None
    if config.attentional_bias == "huber_coordinate":
        delta = torch.full((*shape, d), 2.0)
    elif memory.rule.attentional_bias.delta_granularity == "head":  # where they start, see `MirasThresholdGate`
        delta = (torch.linspace(0.25, 1.0, tokens)[None, :, None] * d**0.5).expand(shape)
    parameters = MemoryParameters(memory.initial_state(), memory.norm_weight, memory.norm_bias)
    found = probe_memory(k, k, v, eta, log_alpha, delta, rule=memory.rule, parameters=parameters)
    return 100 * summary(found)["write_share"]


CASES = {
    "l2": {},
    "huber_norm": {"attentional_bias": "huber_norm"},
    "huber_mixture": {"attentional_bias": "huber_mixture"},
    "huber_coordinate": {"attentional_bias": "huber_coordinate"},
    "lp": {"attentional_bias": "lp"},
    "lp_2": {"attentional_bias": "lp", "lp_power": 2.0},
    "large_last_layer": {"initial_memory_scale": 1.0},
    "wide_start": {"initial_hidden_scale": 4.0},
    "wide_start_moneta": {"initial_hidden_scale": 8.0, "retention": "lq", "attentional_bias": "lp"},
    "wide_start_kl": {"initial_hidden_scale": 4.0, "retention": "kl"},
    "small_start": {"initial_hidden_scale": 0.5, "memory_depth": 3},
    "narrow": {"memory_expansion": 2},
    "shallow": {"memory_depth": 1},
    "deep": {"memory_depth": 3},
    "deeper_lq": {"memory_depth": 4, "retention": "lq"},
    "deep_kl": {"memory_depth": 3, "retention": "kl"},
    "last": {"update_layers": "last"},
    "deep_last": {"memory_depth": 3, "update_layers": "last"},
    "without_norm": {"memory_norm": False},
    "without_residual": {"memory_depth": 3, "memory_residual": False, "attentional_bias": "lp"},
    "lq": {"retention": "lq"},
    "moneta": {"retention": "lq", "attentional_bias": "lp"},
    "lq_3": {"retention": "lq", "lq_power": 3.0},
    "lq_6": {"retention": "lq", "lq_power": 6.0},
    "mirror": {"retention": "lq", "lq_map": "mirror"},
    "kl": {"retention": "kl"},
    "dot": {"attentional_bias": "dot"},
    "robust": {"attentional_bias": "robust"},
    "l1": {"attentional_bias": "l1"},
    "chi_squared": {"retention": "chi_squared"},
    "bregman": {"retention": "bregman"},
    "elastic_net": {"retention": "elastic_net"},
    "elastic_net_decay": {"retention": "elastic_net_decay"},
    "none": {"retention": "none"},
    "matrix": {"memory_architecture": "matrix"},
    "gated": {"memory_architecture": "gated_mlp"},
    "gated_kl": {"memory_architecture": "gated_mlp", "retention": "kl", "memory_expansion": 2},
    "vector": {"memory_architecture": "vector"},
    "vector_lp": {"memory_architecture": "vector", "attentional_bias": "lp"},
    "vector_bregman": {"memory_architecture": "vector", "retention": "bregman", "attentional_bias": "huber_norm"},
    "matrix_lq": {"memory_architecture": "matrix", "retention": "lq"},
}


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("case", CASES)
def test_a_unit_step_takes_the_error_away(case, head_dim):
    config = MirasConfig(
        vocab_size=8,
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        num_hidden_layers=1,
        chunk_size=16,
        **CASES[case],
    )
    share = measured_share(config)
    # one over the width is what the layer norm takes out of writes and errors both
    # what is drawn of three layers of simplices is off by more, 0.153 at a width of 64
    most = 1.2 if case == "deep_kl" else 1.15
    assert 1.0 - 8.0 / head_dim - 0.15 < share < most, share


def test_chunks_of_equal_tokens_contract_at_the_first_step_of_a_matrix():
    """At a third of the default, C equal tokens leave no more of their error than they found, and at twice that more."""
    for chunk_size in (16, 64):
        config = MirasConfig(
            vocab_size=8, hidden_size=64, num_attention_heads=2, num_hidden_layers=1, chunk_size=chunk_size,
            memory_architecture="matrix", weight_cap=None, residual_clip=1e6,
        )  # fmt: skip
        share = largest_step(config) / 3.0 / unit_step(config)
        assert chunk_size * share <= 2.0 + 1e-9
        # by hand: the memory after n chunks of one key and value, W_n = W_{n-1} - C eta k^T (k W - v)
        for factor, contracts in ((1.0, True), (1.1, False)):
            error = 1.0
            for _ in range(20):
                error *= 1.0 - chunk_size * share * factor
            assert (abs(error) <= 1.0 + 1e-9) == contracts


@pytest.mark.parametrize(
    ("whole", "choices"),
    [
        (4, {"attentional_bias": "l2", "retention": "kl"}),
        (16, {"attentional_bias": "huber_norm", "retention": "decay"}),
    ],
    ids=["memora", "yaad"],
)
def test_an_mlp_forgets_differences_of_its_start_in_chunks_of_64(whole, choices):
    """A text of three words in chunks of 64: at a new model's steps a difference at the start stays as small as it was, and
    at those of shorter chunks, which take a token's whole error away, it grows a hundredfold before it is forgotten."""
    shared = {"vocab_size": 8, "hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 1, **choices}
    config, shorter = MirasConfig(chunk_size=64, **shared), MirasConfig(chunk_size=whole, **shared)
    assert shorter.eta_max == pytest.approx(unit_step(shorter)) == pytest.approx(64 / whole * config.eta_max)
    memory = memory_of(config).double()
    chunks, shape = 24, (4, 24 * 64, 2)
    words = [torch.randn(4, 3, 2, 64, dtype=torch.float64) for _ in "kv"]
    text = torch.randint(3, shape[1:2])
    k, v = F.normalize(words[0], dim=-1)[:, text], words[1][:, text]
    delta = None if choices["retention"] == "kl" else torch.full(shape, 5.0, dtype=torch.float64)
    starts = memory.initial_state()
    starts = [starts, [x + 1e-10 * x.std() * torch.randn_like(x) for x in starts]]

    def growth(eta_max: float) -> float:
        gates = torch.full(shape, eta_max / 3, dtype=torch.float64), torch.full(shape, -1e-3, dtype=torch.float64)
        with torch.no_grad():
            one, other = (
                chunk_miras(
                    *(k, k, v, *gates, delta),
                    rule=memory.rule,
                    parameters=MemoryParameters(tuple(start), memory.norm_weight, memory.norm_bias),
                )[0].reshape(4, chunks, -1)
                for start in starts
            )
        difference = (one - other).norm(dim=-1) / one.norm(dim=-1)
        return (difference / difference[:, :1]).max().item()

    assert growth(config.eta_max) < 10 and growth(shorter.eta_max) > 100


@pytest.mark.parametrize("chunk_size", [16, 64, 256])
@pytest.mark.parametrize("model_type", ["moneta", "yaad", "memora"])
def test_a_chunk_of_a_new_model_takes_no_more_than_the_error_away(model_type, chunk_size):
    """Of what a text's keys have in common, all writes of a chunk together: half of what would overshoot, of Memora an
    eighth."""
    torch.manual_seed(0)
    of_all = 0.25 if model_type == "memora" else 1.0
    shape = {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 256}
    config = AutoConfig.for_model(model_type, chunk_size=chunk_size, **shape)
    ids = torch.tensor([list(Path(__file__).read_bytes()[:1024])])
    probes = measure_memories(AutoModelForCausalLM.from_config(config), {"input_ids": ids}, probe_memory)
    for probe in probes.values():
        assert 0.4 < probe.chunk_share.max() / of_all < 1.2


def test_momentum_moves_as_far_in_the_end():
    config = MirasConfig(vocab_size=8, gate_granularity="head", learning_algorithm="momentum")
    gate = MirasForCausalLM(
        MirasConfig.from_preset("tiny", gate_granularity="head", learning_algorithm="momentum")
    ).model.layers[0].mixer.momentum  # fmt: skip
    mu = gate(torch.zeros(1, 1, 128)).exp()[0, 0, :1].detach()
    slots, step = (torch.zeros(1), torch.zeros(1)), torch.ones(1)
    for _ in range(60):  # one write, and then nothing
        slots = Momentum().update(slots, step, torch.ones(1), mu)
        step = torch.zeros(1)
    assert -slots[0].item() * config.eta_max == pytest.approx(MirasConfig(vocab_size=8).eta_max)


def test_moments_are_those_of_a_normal():
    z = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for power in (0.5, 1.0, 2.0, 3.0, 4.0):
        assert moment(power) == pytest.approx(z.abs().pow(power).mean().item(), rel=0.02)


@pytest.mark.parametrize(
    "fields",
    [
        {"retention": "kl", "simplex_mass": 1e-38},
        {"retention": "kl", "simplex_mass": 1e6},
        {"retention": "lq", "lq_power": 2.999999},
        {"retention": "lq", "lq_power": 3.000001},
        {"retention": "lq", "initial_memory_scale": 1e-6},
        {"residual_clip": 1e-30},
        {"chunk_size": 4096, "memory_norm_eps": 1e-30},
        {"attentional_bias": "lp", "lp_power": 16.0, "residual_clip": 1e9},
        {"retention": "bregman", "bregman_bound": 1e-3},
        {"retention": "elastic_net", "elastic_net_threshold": 1e3},
        {"retention": "elastic_net", "head_dim": 2**14, "memory_expansion": 64},  # too many weights to draw
        {"attentional_bias": "robust", "residual_clip": 1e-30},
    ],
)
def test_every_config_has_a_step(fields):
    assert 0 < MirasConfig(**fields).eta_max <= 1e3


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (
            {"initial_hidden_scale": 4.0},
            r"`initial_hidden_scale=4` and weights of shapes \(\(1024, 4096\), \(4096, 1024\)\)",
        ),
        ({"initial_hidden_scale": 4.0, "memory_depth": 3}, "`memory_architecture='mlp'` and weights of shapes"),
    ],
)
def test_a_memory_too_large_to_be_drawn_names_what_asks_for_it(settings, named):
    shape = {"hidden_size": 1024, "num_attention_heads": 1, **settings}
    with pytest.raises(ValueError, match=f"`eta_max` must be given with {named}"):
        MirasConfig(**shape)
    assert MirasConfig(**shape, eta_max=0.01).eta_max == 0.01
