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
"""The ablations: every change is what it says, corruption reaches what it says, runs resume, tables are the runs'."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F


ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "examples" / "evaluation"), str(ROOT / "examples"), str(ROOT / "benchmarks")]

import ablations  # noqa: E402
from ablation_models import build_model, change, config_of, point_of, served_at  # noqa: E402
from ablation_points import ABLATIONS, MODELS, SERVED_AT, Ablation  # noqa: E402
from ablation_report import is_todays, table_of, with_measures  # noqa: E402
from bridge_models import FinishedTokens  # noqa: E402
from bridge_report import summarise  # noqa: E402
from bridge_training import SIZES, Trained, jobs_of  # noqa: E402
from corruption import CORRUPTIONS, Corruption, corrupted, corrupted_loss, under_corruption  # noqa: E402
from models import ModelShape  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedConfig  # noqa: E402

from miras_hf import MirasConfig  # noqa: E402
from miras_hf.memory import MemoryParameters, chunk_miras, recurrent_miras  # noqa: E402
from miras_hf.modeling_miras import MirasMemory  # noqa: E402
from miras_hf.sequences import Sequences  # noqa: E402


SHAPE = ModelShape(width=32, layers=1, heads=2, vocabulary=64, chunk=4)
HEADS, DIM = 2, 16


def mixer_of(name: str):
    model, _ = build_model(ABLATIONS[name], SHAPE, seed=0)
    return model.double().model.layers[0].mixer


def tokens_of(mixer, tokens: int = 11) -> list:
    """Queries, keys, values and gates for a memory, float64, with steps that write something."""
    generator = torch.Generator().manual_seed(1)

    def randn(*shape):
        return torch.randn(1, tokens, HEADS, *shape, generator=generator, dtype=torch.float64)

    q, k = F.normalize(randn(DIM), dim=-1), F.normalize(randn(DIM), dim=-1)
    eta, log_alpha = 0.05 * randn(DIM).sigmoid(), -0.2 * randn(DIM).sigmoid()
    return [q, k, randn(DIM), eta, log_alpha, None if mixer.delta is None else 1.0 + randn().abs()]


def read(mixer, *x):
    return mixer.memory(FinishedTokens(*x), Sequences())


def reference(mixer, q, k, v, eta, log_alpha, delta, form=recurrent_miras):
    memory = mixer.memory
    parameters = MemoryParameters(tuple(memory.initial_state()), memory.norm_weight, memory.norm_bias)
    return form(q, k, v, eta, log_alpha, delta, rule=memory.rule, parameters=parameters, output_final_state=True)


def read_by_hand(x, w1, w2, norm_eps):
    """`M(x)` with the layer norm's affine at its start."""
    return x + F.layer_norm(F.gelu(x @ w1, approximate="tanh") @ w2, x.shape[-1:], eps=norm_eps)


def naive(k, v, eta, log_alpha, weights, norm_eps, written, sign):
    """One head of an l2 memory with decay toward its start and chunks of one: weights after every token, each learned
    from by autograd; `sign` is 1 for descent."""
    start = [w.detach().clone() for w in weights]
    ws = [w.detach().clone().requires_grad_() for w in weights]
    after = []
    for t in range(len(k)):
        loss = 0.5 * (read_by_hand(k[t], *ws, norm_eps) - v[t]).square().sum()
        gradients = torch.autograd.grad(loss, ws)
        gates = [(log_alpha[t].exp()[:, None], eta[t][:, None]), (log_alpha[t].exp()[None], eta[t][None])]
        ws = [
            (w0 + a * (w - w0) - (sign * e * g if layer in written else 0.0)).detach().requires_grad_()
            for layer, (w0, w, g, (a, e)) in enumerate(zip(start, ws, gradients, gates, strict=True))
        ]
        after.append([w.detach() for w in ws])
    return after


def test_the_readme_names_every_ablation_and_counts_them():
    readme = (ROOT / "examples" / "evaluation" / "README.md").read_text(encoding="utf-8")
    for name, ablation in ABLATIONS.items():
        change = name.removeprefix(f"{ablation.model}-")
        assert ablation.parent is None or not ablation.default or f"`{change}`" in readme, name
    default = [name for name, ablation in ABLATIONS.items() if ablation.default]
    jobs = jobs_of(SIZES["cpu"], default, MODELS)
    once = len(default) - len(MODELS) + len(MODELS) * len(SIZES["cpu"].learning_rates)
    words = f"there are {len(jobs)} trainings by default, the three models over the grid first, then every change once"
    assert f"{words} ({once} trainings in all)" in " ".join(readme.split())


@pytest.mark.parametrize("model", MODELS)
def test_steps_are_multiples_of_what_the_default_gives(model):
    default, half, double = (
        config_of(ABLATIONS[name], SHAPE, 64) for name in (model, f"{model}-half-steps", f"{model}-double-steps")
    )
    assert half.eta_max == default.eta_max / 2 and double.eta_max == default.eta_max * 2
    assert {**half.to_dict(), "eta_max": default.eta_max} == default.to_dict()


@pytest.mark.parametrize(
    ("change", "written", "sign", "asked"),
    [("ascent", (0, 1), -1.0, "q"), (None, (1,), 1.0, "q"), ("keys", (0, 1), 1.0, "k")],
)
def test_changes_of_the_write_and_the_read_are_those_of_a_naive_recurrence(change, written, sign, asked):
    name = f"yaad-{change or 'last-layer'}"
    settings = {**ABLATIONS[name].settings, "attentional_bias": "l2", "chunk_size": 1, "residual_clip": 1e6}
    l2 = Ablation("yaad", "yaad", "", settings, change)
    model, _ = build_model(l2, SHAPE, seed=0)
    mixer = model.double().model.layers[0].mixer
    assert ABLATIONS[name].change == change
    x = tokens_of(mixer)
    with torch.no_grad():
        y = read(mixer, *x)
    norm_eps = model.config.memory_norm_eps
    for head in range(HEADS):
        q, k, v, eta, log_alpha = (t[0, :, head] for t in x[:5])
        initial = [w[head] for w in mixer.memory.initial_state()]
        after = naive(k, v, eta, log_alpha, initial, norm_eps, written, sign)
        at = {"q": q, "k": k}[asked]
        expected = torch.stack([read_by_hand(at[t], *after[t], norm_eps) for t in range(len(at))])
        torch.testing.assert_close(y[0, :, head], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("model", MODELS)
def test_ascent_is_the_reference_with_negative_steps(model):
    mixer = mixer_of(f"{model}-ascent")
    q, k, v, eta, *rest = tokens_of(mixer)
    with torch.no_grad():
        y = read(mixer, q, k, v, eta, *rest)
        up, _ = reference(mixer, q, k, v, -eta, *rest)
        down, _ = reference(mixer, q, k, v, eta, *rest)
    torch.testing.assert_close(y, up, rtol=1e-8, atol=1e-10)
    assert (y - down).norm() > 1e-3 * y.norm()


@pytest.mark.parametrize("model", MODELS)
def test_only_the_last_layer_moves(model):
    for name, moves in ((f"{model}-last-layer", False), (model, True)):
        mixer = mixer_of(name)
        with torch.no_grad():
            _, state = reference(mixer, *tokens_of(mixer), form=chunk_miras)
        assert len(state.dual) == 1 + moves and all(bool(dual.any()) for dual in state.dual), name
        assert state.dual[-1].shape[-1] == mixer.head_dim


def test_a_memory_whose_last_layer_alone_is_written_trains():
    model, _ = build_model(ABLATIONS["yaad-last-layer"], SHAPE, seed=0)
    ids = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(0))
    model(ids, labels=ids).loss.backward()
    memory = model.model.layers[0].mixer.memory
    # the first layer is learned in training, though not at test time
    assert all(bool(weight.grad.any()) for weight in memory.initial_state())


@pytest.mark.parametrize("model", MODELS)
def test_a_fixed_start_is_not_trained_and_its_parameters_are_the_mlp_s(model):
    (own, _), (fixed, _) = (build_model(ABLATIONS[name], SHAPE, seed=0) for name in (model, f"{model}-fixed-start"))
    ids = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(0))
    fixed(ids, labels=ids).loss.backward()
    held = [weight for layer in fixed.model.layers for weight in layer.mixer.memory.initial_state()]
    assert not any(weight.requires_grad for weight in held)
    # three matrices of the block's MLP are each wider by so much
    wider = fixed.config.intermediate_size - own.config.intermediate_size
    of_memories = sum(weight.numel() for weight in held)
    step = 8 * 3 * SHAPE.width * SHAPE.layers
    assert abs(3 * SHAPE.width * SHAPE.layers * wider - of_memories) <= step and wider > 0


@pytest.mark.parametrize("model", MODELS)
def test_queries_are_the_keys(model):
    mixer = mixer_of(f"{model}-keys")
    q, k, *rest = tokens_of(mixer)
    with torch.no_grad():
        y = read(mixer, q, k, *rest)
        expected, _ = reference(mixer, k, k, *rest)
        other = read(mixer, torch.zeros_like(q), k, *rest)
    torch.testing.assert_close(y, expected, rtol=1e-8, atol=1e-10)
    assert torch.equal(y, other)
    # what nothing depends on is not counted among the parameters
    assert not any(p.requires_grad for part in (mixer.q_proj, mixer.q_conv) for p in part.parameters())


@pytest.mark.parametrize("model", MODELS)
def test_nothing_is_forgotten(model):
    mixer = mixer_of(f"{model}-no-retention")
    *x, log_alpha, delta = tokens_of(mixer)
    with torch.no_grad():
        y = read(mixer, *x, 10.0 * log_alpha, delta)
        expected, _ = reference(mixer, *x, torch.zeros_like(log_alpha), delta)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("model", MODELS)
def test_without_writes_the_initial_memory_is_read(model):
    mixer = mixer_of(f"{model}-no-write")
    eta = mixer.eta(torch.randn(1, 11, 32, dtype=torch.float64))
    q, k, v, _, *rest = tokens_of(mixer)
    with torch.no_grad():
        y = read(mixer, q, k, v, eta.double(), *rest)
    gate = mixer.memory.rule.retention
    for head in range(HEADS):
        weights = [gate.link(w[head], axis) for w, axis in zip(mixer.memory.initial_state(), (-1, -2), strict=True)]
        expected = read_by_hand(q[0, :, head], *weights, mixer.memory.rule.architecture.norm_eps)
        torch.testing.assert_close(y[0, :, head], expected, rtol=1e-5, atol=1e-5)


def test_a_constant_threshold_is_the_same_for_every_text_and_learned():
    gate = mixer_of("yaad-constant-delta").delta
    delta = gate(torch.randn(1, 5, 32, dtype=torch.float64))
    torch.testing.assert_close(delta, (gate.bias.exp() + 1.0).log().float().expand(1, 5, HEADS) + 1e-4)
    assert gate.bias.requires_grad and not gate.up_proj.weight.requires_grad
    assert mixer_of("yaad").delta(torch.randn(1, 5, 32, dtype=torch.float64)).std(1).min() > 1e-4


def test_serving_at_another_chunk_size_is_a_model_of_that_size_with_the_same_weights():
    ids = torch.randint(0, 64, (2, 45), generator=torch.Generator().manual_seed(0))
    for name in ("yaad", "memora-last-layer"):
        model, _ = build_model(ABLATIONS[name], SHAPE, seed=0)
        before = model.eval()(ids).logits
        config = config_of(ABLATIONS[name], replace(SHAPE, chunk=256), model.config.intermediate_size)
        # the step is learned with the model; the bound of the retention is what it is at so long a chunk
        assert config.eta_max < model.config.eta_max
        config.eta_max = model.config.eta_max
        other = change(AutoModelForCausalLM.from_config(config).eval(), ABLATIONS[name].change)
        other.load_state_dict(model.state_dict())
        with served_at(model, 256):
            served = model(ids).logits
        torch.testing.assert_close(served, other(ids).logits)
        assert (served - before).norm() > 1e-5 * before.norm()
        assert torch.equal(model(ids).logits, before)


def own_fields(config) -> dict:
    return {f.name: getattr(config, f.name) for f in fields(config)} | {"model_type": config.model_type}


def test_models_are_the_library_s_defaults_and_ablations_single_changes():
    of_size = {
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "use_cache",
    }
    of_size |= {"head_dim", "num_key_value_heads", "architectures", "_attn_implementation_internal"}
    for name in MODELS:
        config = build_model(ABLATIONS[name], SIZES["smoke"].shape, 0)[0].config
        sizes = {field: getattr(config, field) for field in ("hidden_size", "num_attention_heads")}
        default = own_fields(AutoConfig.for_model(name, **sizes))
        differing = {f for f, value in own_fields(config).items() if value != default[f]} - of_size
        assert not differing, f"{name}: {differing}"
        assert ABLATIONS[name].parent is None
    for name, ablation in ABLATIONS.items():
        if ablation.parent is not None:
            parent = ABLATIONS[ablation.parent]
            changed = {f for f, value in ablation.settings.items() if value != parent.settings.get(f, "the default")}
            changed |= {f for f in ("change", "steps", "trained_with") if getattr(ablation, f) != getattr(parent, f)}
            # what is no longer used is not trained
            assert len(changed) == 1 or changed == {"change", "min_log_alpha"}, f"{name} changes {changed}"


def test_models_of_all_ablations_can_be_said_and_have_the_same_size():
    sizes, seen = {}, set()
    for name, ablation in ABLATIONS.items():
        config = config_of(ablation, SIZES["cpu"].shape, 64)
        # of what parameters depend on
        kind = (config.memory_architecture, config.gate_granularity, config.attentional_bias, ablation.change)
        if not ablation.refitted:
            with torch.device("meta"):
                (own, _), (model, _) = (
                    build_model(a, SIZES["cpu"].shape, 0) for a in (ABLATIONS[ablation.model], ablation)
                )
            assert model.config.intermediate_size == own.config.intermediate_size
            layers = SIZES["cpu"].shape.layers * SIZES["cpu"].shape.heads
            # two layers of 64 x 256 a head against one of 64 x 64; and what the norm of an MLP memory learns
            smaller = own.num_parameters() - model.num_parameters()
            assert layers * (2 * 64 * 256 - 64 * 64) <= smaller < 1.05 * layers * (2 * 64 * 256 - 64 * 64), name
        elif kind not in seen:
            seen.add(kind)
            with torch.device("meta"):
                model, _ = build_model(ablation, SIZES["cpu"].shape, seed=0)
            sizes[name] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert len(sizes) > 15 and max(sizes.values()) / min(sizes.values()) < 1.01, sizes


# -- corruption ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained():
    model, arguments = build_model(ABLATIONS["yaad"], ModelShape(32, 2, 2, 64, 4), seed=0)
    rows = torch.randint(0, 64, (6, 50), generator=torch.Generator().manual_seed(3))
    return Trained(model.eval(), arguments, rows, nullcontext, at_once=4)


def values_of(model, ids):
    seen = []
    memories = [module for module in model.modules() if isinstance(module, MirasMemory)]

    def keep(memory, inputs):
        tokens, sequences, *_ = inputs
        seen.append(tokens.finished(position=sequences.position)[2].detach())

    handles = [memory.register_forward_pre_hook(keep) for memory in memories]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return seen


def test_some_values_are_noise_of_that_size_and_the_others_what_they_were(trained):
    model, ids = trained.model, torch.randint(0, 64, (8, 200), generator=torch.Generator().manual_seed(0))
    before = values_of(model, ids)
    with corrupted(model, ids, Corruption("values", 0.1, 5.0), torch.Generator().manual_seed(0)) as (read, kept):
        during = values_of(model, ids)
    after = values_of(model, ids)
    assert torch.equal(read, ids) and (~kept).float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert len(before) == 2
    # the first layer's values come from the text alone
    assert torch.equal(during[0][kept], before[0][kept])
    for was, now in zip(before, during, strict=True):
        assert now[~kept].square().mean().sqrt().item() == pytest.approx(
            5.0 * was[~kept].square().mean().sqrt().item(), rel=0.03
        )
        assert abs(F.cosine_similarity(now[~kept].flatten(1), was[~kept].flatten(1)).mean().item()) < 0.05
    assert all(map(torch.equal, before, after))


def test_tokens_are_replaced_and_the_measure_is_of_the_others(trained):
    corruption = Corruption("tokens", 0.2)
    generator = torch.Generator().manual_seed(0)
    sums, count = {"clean": 0.0, "corrupted": 0.0}, 0
    for ids in (trained.rows[:4], trained.rows[4:]):
        with corrupted(trained.model, ids, corruption, generator) as (read, kept):
            assert torch.equal(read[kept], ids[kept]) and (read != ids).sum() > 0.7 * (~kept).sum()
        for name, text in (("clean", ids), ("corrupted", read)):
            with torch.no_grad():
                logs = trained.model(text).logits.double().log_softmax(-1)
            for row in range(len(ids)):
                for t in range(ids.shape[1] - 1):
                    if kept[row, t] and kept[row, t + 1]:
                        sums[name] -= logs[row, t, ids[row, t + 1]].item()
                        count += name == "clean"
    found = under_corruption(trained, corruption)
    assert found["tokens"] == count
    assert found["clean"] == pytest.approx(sums["clean"] / count, rel=1e-5)
    assert found["corrupted"] == pytest.approx(sums["corrupted"] / count, rel=1e-5)
    assert found["corrupted"] != pytest.approx(found["clean"], rel=1e-7)


def test_training_on_corrupted_text_has_the_same_noise_for_every_model(trained):
    corruption = Corruption("values", 0.1, 8.0)
    loss = corrupted_loss(corruption, seed=2)
    first, again, next_step = (loss(trained.model, trained.arguments, trained.rows, step) for step in (1, 1, 2))
    assert first == again and first != next_step
    generator = torch.Generator().manual_seed(2 * 1_000_003 + 1)
    with corrupted(trained.model, trained.rows, corruption, generator) as (_, kept):
        logs = trained.model(trained.rows).logits.log_softmax(-1)
    own = -logs[:, :-1].gather(-1, trained.rows[:, 1:, None])[..., 0]
    torch.testing.assert_close(first, own[kept[:, :-1]].mean())
    first.backward()


def test_corruption_refuses_what_it_cannot_be(trained):
    for arguments, complaint in (
        (("keys", 0.1), "`kind` must be one of .*, got 'keys'"),
        (("values", 1.0), "`share` must be above 0 and below 1, got 1.0"),
        (("values", 0.1, 0.0), "`scale` must be positive"),
        (("tokens", 0.1, 2.0), "`scale` must be positive, and 1 for tokens"),
    ):
        with pytest.raises(ValueError, match=complaint):
            Corruption(*arguments)
    llama = LlamaConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1, intermediate_size=8, vocab_size=64)
    with pytest.raises(ValueError, match="must have memories whose values can be replaced, got a LlamaForCausalLM"):
        with corrupted(LlamaForCausalLM(llama), trained.rows, CORRUPTIONS[0], torch.Generator()):
            pass
    with pytest.raises(ValueError, match="`change` must be one of .*, got 'descent'"):
        Ablation("yaad", "yaad", "", change="descent")


# -- trainings and their report -----------------------------------------------------------------------------------------


def training(name: str, rate: float, seed: int, loss: float | None, **measured) -> dict:
    job = {"rung": name, "learning_rate": rate, "seed": seed}
    return {"job": job, "validation": loss, "gradient_norm_max": 1.0, **measured}


def test_measures_are_those_of_the_best_rate_over_its_seeds():
    def at(loss):
        return {"2% of tokens": {"clean": 1.0, "corrupted": loss, "tokens": 9}}

    results = [
        training("yaad", 2e-3, 0, 5.5, served={"4": 9.0}, corrupted=at(9.0)),
        training("yaad", 4e-3, 0, 5.0, served={"4": 5.0}, corrupted=at(1.5)),
        training("yaad", 4e-3, 1, 5.0, served={"4": 6.0}, corrupted=at(2.0)),
        training("yaad-keys", 4e-3, 0, 5.25),
        training("moneta", 4e-3, 0, None),
    ]
    moneta, yaad, keys = with_measures(summarise(results, ABLATIONS, MODELS), results)
    assert yaad["served"] == {"4": pytest.approx(5.5)} and yaad["corrupted"] == {"2% of tokens": pytest.approx(0.75)}
    assert keys["cost"] == pytest.approx(0.25) and keys["served"] is None and moneta["corrupted"] is None
    assert list(table_of([moneta, yaad, keys], "corrupted", "+.3f"))[2:] == ["| yaad | +0.750 |"]
    assert list(table_of([keys], "served", ".3f")) == []


def test_a_new_memora_of_the_earlier_epsilon_is_three_times_as_loud():
    shape = ModelShape(width=128, layers=1, heads=2, vocabulary=64)
    keys = F.normalize(torch.randn(2, 512, 64, generator=torch.Generator().manual_seed(1)), dim=-1)

    def loudness(name: str) -> float:
        model, _ = build_model(ABLATIONS[name], shape, seed=0)
        memory = model.model.layers[0].mixer.memory
        w1, w2 = (
            memory.rule.retention.link(dual.detach(), axis)
            for dual, axis in zip(memory.initial_state(), (-1, -2), strict=True)
        )
        return (read_by_hand(keys, w1, w2, model.config.memory_norm_eps) - keys).square().mean().sqrt().item()

    loud, *quiet = map(loudness, ("memora-earlier", "memora", "memora-earlier-small-start"))
    assert all(2.7 < loud / of_quiet < 3.6 for of_quiet in quiet)


def test_trainings_of_other_defaults_are_not_todays():
    size = SIZES["smoke"]
    point = json.loads(json.dumps(point_of("moneta-q-5", size.shape)))
    result = {"job": {"rung": "moneta-q-5"}, "point": point}
    assert point["config"]["lq_power"] == 5.0 and is_todays(result, size)
    for field, value in (("max_half_life", 256.0), ("lp_power", 2.0)):
        other = {**point, "config": {**point["config"], field: value}}
        assert not is_todays({**result, "point": other}, size)
    assert not is_todays({**result, "job": {"rung": "moneta-q-6"}}, size)
    # a step that another processor has measured, and one that somebody else has chosen
    for of_it, same in ((1.0 + 1e-13, True), (1.0 + 1e-6, False)):
        other = {**point, "config": {**point["config"], "eta_max": point["config"]["eta_max"] * of_it}}
        assert is_todays({**result, "point": other}, size) == same
    # stored before a field was there: as the library reads a checkpoint that lacks it
    for field, same in (("use_rope", True), ("value_norm", False), ("output_norm_eps", False)):
        older = {name: value for name, value in point["config"].items() if name != field}
        assert is_todays({**result, "point": {**point, "config": older}}, size) == same, field
    assert set(point["config"]) - {"model_type"} == (
        {f.name for f in fields(MirasConfig)} - {f.name for f in fields(PreTrainedConfig)} - {"intermediate_size"}
    )


# In a process of its own, because it makes Transformers quiet; and one process, because imports are what takes time.
DRIVER = """
import contextlib, io, json, os, sys
import ablations, study, torch

folder = sys.argv[1]
flags = ["--smoke", "--out", folder, "--only", "yaad", "memora-last-layer", "yaad-noisy-values"]
printed, times, steps, clip = [], [], [], torch.nn.utils.clip_grad_norm_

def killed_in_the_fifth_step(*args):
    if len(steps) == 4:
        raise KeyboardInterrupt
    steps.append(0)
    return clip(*args)

def counted(*args):
    steps.append(1)
    return clip(*args)

for more in (["--keep-weights"], ["--list"], ["--minutes", "1e-9"], []):
    if not more:
        study.SAVED_EVERY, torch.nn.utils.clip_grad_norm_ = 0.0, killed_in_the_fifth_step
        try:
            ablations.main(flags)
        except KeyboardInterrupt:
            torch.nn.utils.clip_grad_norm_ = counted
            left = [name for name in os.listdir(folder) if "unfinished" in name]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        ablations.main([*flags, *more])
    printed.append(out.getvalue())
    times.append({f.name: f.stat().st_mtime_ns for f in os.scandir(folder) if f.name.endswith("-seed0.json")})
    if more == ["--keep-weights"]:
        os.rename(f"{folder}/yaad-noisy-values-lr0.01-seed0.json", f"{folder}/taken-away")
print("PRINTED" + json.dumps([printed, times, steps, left]))
"""


def test_smoke_runs_are_saved_one_by_one_and_not_repeated(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ
        | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert "PRINTED" in done.stdout, done.stderr[-3000:]
    printed, times, steps, left = json.loads(done.stdout.split("PRINTED")[1])
    (first, listed, _, last), (before, _, stopped, after) = printed, times
    noisy = "yaad-noisy-values-lr0.01-seed0.json"
    assert "3 of 3 trainings" in first and "1 of 3 trainings" in last
    assert f"{'yaad-noisy-values':24} 0/1" in listed and f"{'memora-last-layer':24} 1/1" in listed
    assert noisy not in stopped and before.pop(noisy) < after.pop(noisy) and before == after
    once, again, yaad = (
        json.loads((tmp_path / name).read_text()) for name in ("taken-away", noisy, "yaad-lr0.01-seed0.json")
    )
    assert once["train"] == again["train"] and once["corrupted"] == again["corrupted"]
    # killed after four of six steps, it went on from there, past the validation of the third
    assert steps == [0] * 4 + [1] * 2 and once["validation_by_step"] == again["validation_by_step"]
    assert left == ["yaad-noisy-values-lr0.01-seed0.unfinished.pt"] and not list(tmp_path.glob("*unfinished*"))

    assert list(yaad["served"]) == [str(chunk) for chunk in SERVED_AT] and "served" not in again
    # rows of 32 tokens fit into one chunk of 64 as into one of 256
    assert yaad["served"]["64"] == yaad["validation"] == pytest.approx(yaad["served"]["256"], abs=1e-5)
    assert yaad["served"]["4"] != yaad["validation"] and list(yaad["corrupted"]) == [c.name for c in CORRUPTIONS]
    assert yaad["point"]["trained_with"] is None and again["point"]["trained_with"]["scale"] == 8.0
    assert again["train"] != yaad["train"] and again["point"]["config"] == yaad["point"]["config"]
    report = json.loads((tmp_path / "report.json").read_text())
    assert [entry["rung"] for entry in report["ablations"]] == ["yaad", "memora-last-layer", "yaad-noisy-values"]
    assert report["ablations"][2]["cost"] == pytest.approx(again["validation"] - yaad["validation"])
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "report.md").read_text()
    assert "## Served with other chunks" in text and "## On corrupted text" in text and text in last + "\n"


def test_mistakes_are_named(capsys):
    with pytest.raises(ValueError, match="--only 'yad' names no rung; there are moneta, moneta-no-retention"):
        ablations.main(["--only", "yad", "--list"])
    for flags, complaint in (
        (["--smoke", "--size", "cpu"], "--smoke is --size smoke, got --size cpu"),
        (["--workers", "0"], "--workers must be at least 1, got 0"),
        (["--minutes", "0"], "--minutes must be more than 0, got 0"),
        (["--size", "cuda"], "--size cuda needs --device cuda"),
    ):
        with pytest.raises(SystemExit):
            ablations.main(flags)
        assert complaint in capsys.readouterr().err


def test_a_size_has_a_folder_of_its_own(tmp_path, capsys, monkeypatch):
    """Trainings of two sizes have one name: neither counts as the other, and commands run one after the other do not meet."""
    for flags, folder in ((["--list"], "runs/ablations"), (["--size", "long"], "runs/ablations-long")):
        assert ablations.arguments(flags).out == Path(folder)
    assert ablations.arguments(["--size", "long", "--out", "here"]).out == Path("here")
    monkeypatch.chdir(tmp_path)
    kept = ROOT / "examples" / "evaluation" / "results" / "ablations-long" / "yaad-lr0.004-seed0.json"
    (tmp_path / "runs" / "ablations-wide").mkdir(parents=True)
    (tmp_path / "runs" / "ablations-wide" / kept.name).write_text(kept.read_text())
    flags = ["--learning-rates", "4e-3", "--seeds", "0", "--only", "yaad"]
    ablations.main([*flags, "--size", "long", "--list"])
    assert "yaad                     0/1" in capsys.readouterr().out
    with pytest.raises(ValueError, match="is of size 'long', not 'wide': take another --out"):
        ablations.main([*flags, "--size", "wide"])
    assert not (tmp_path / "runs" / "ablations-wide" / "data.pt").exists()


def test_what_the_page_says_of_widths_and_initial_memories():
    with torch.device("meta"):
        yaad, matrix = (build_model(ABLATIONS[name], SIZES["long"].shape, 0)[0] for name in ("yaad", "yaad-linear"))
    initial = sum(w.numel() for layer in yaad.model.layers for w in layer.mixer.memory.initial_state.parameters())
    page = " ".join((ROOT / "docs" / "does_it_learn.md").read_text(encoding="utf-8").split())
    assert f"{initial:,} of Yaad's {yaad.num_parameters() / 1e6:.2f}M parameters" in page
    assert f"{matrix.config.intermediate_size} wide where Yaad's is {yaad.config.intermediate_size}" in page
    results = ROOT / "examples" / "evaluation" / "results" / "ablations-long"
    trained = [
        json.loads((results / f"{name}-lr0.004-seed0.json").read_text())["parameters"]
        for name in ("yaad", "yaad-linear-alone")
    ]
    assert f"with {1 - trained[1] / trained[0]:.0%}".replace("%", " %") + " fewer parameters" in page
