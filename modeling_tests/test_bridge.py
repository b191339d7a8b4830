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
"""The bridge from Gated DeltaNet to Yaad: its points are what they say, its runs resume, its table is the runs'."""

import gc
import json
import math
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F


ROOT = Path(__file__).resolve().parent.parent
STUDY = ROOT / "examples" / "evaluation"
sys.path[:0] = [str(STUDY), str(ROOT / "examples"), str(ROOT / "benchmarks")]

import bridge  # noqa: E402
from bridge_models import FinishedTokens, UnitStepMLP, build_model, change, our_config  # noqa: E402
from bridge_points import PATH, RUNGS, Point  # noqa: E402
from bridge_report import at_the_rungs_point, summarise, table  # noqa: E402
from bridge_training import SIZES, Job, jobs_of  # noqa: E402
from models import ModelShape  # noqa: E402
from safetensors.torch import load_model  # noqa: E402
from study import optimizer_and_schedule, read_results, train  # noqa: E402
from transformers import DynamicCache  # noqa: E402
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet  # noqa: E402

from miras_hf import MirasForCausalLM, YaadConfig, YaadForCausalLM  # noqa: E402
from miras_hf.compat import CACHE_NAME  # noqa: E402
from miras_hf.memory import L2, Decay, MemoryParameters, MirasRule, chunk_miras  # noqa: E402
from miras_hf.sequences import Sequences  # noqa: E402


SHAPE = ModelShape(width=128, layers=1, heads=2, vocabulary=64)


def mixer_of(name: str):
    model, _ = build_model(RUNGS[name].point, SHAPE, seed=0)
    return model.model.layers[0].mixer


def give_weights(mixer, theirs: Qwen3NextGatedDeltaNet) -> None:
    """The weights of Gated DeltaNet as Transformers has it, in its order of heads, to a mixer of ours."""
    heads, d = theirs.num_v_heads, theirs.head_v_dim
    with torch.no_grad():
        parts = theirs.in_proj_qkvz.weight.view(heads, 4, d, -1).unbind(1)
        for projection, part in zip((mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.g_proj), parts, strict=True):
            projection.weight.copy_(part.reshape(heads * d, -1))
        filters = theirs.conv1d.weight[:, 0].chunk(3)
        for convolution, part in zip((mixer.q_conv, mixer.k_conv, mixer.v_conv), filters, strict=True):
            convolution.weight.copy_(part)
        beta, decay = theirs.in_proj_ba.weight.view(heads, 2, -1).unbind(1)
        mixer.eta.up_proj.weight.copy_(beta)
        mixer.alpha.up_proj.weight.copy_(decay)
        mixer.alpha.bias.copy_(theirs.dt_bias)
        mixer.alpha.a_log.copy_(theirs.A_log)
        mixer.o_norm.weight.copy_(theirs.norm.weight)
        mixer.o_proj.weight.copy_(theirs.out_proj.weight)


@pytest.fixture
def theirs():
    model, _ = build_model(RUNGS["gated-deltanet"].point, SHAPE, seed=1)
    layer = model.model.layers[0].linear_attn
    with torch.no_grad():
        layer.dt_bias.normal_()
        layer.norm.weight.normal_()
        for matrix in (layer.in_proj_qkvz.weight, layer.in_proj_ba.weight, layer.conv1d.weight):
            matrix.mul_(10.0)
    return layer


def test_the_delta_rung_is_the_layer_of_transformers(theirs):
    mixer, x = mixer_of("delta"), torch.randn(2, 77, 128)
    give_weights(mixer, theirs)
    with torch.no_grad():
        ours, expected = mixer(x)[0], theirs(x)
        exact = mixer.double()(x.double())[0]
    # by norms: how far single numbers are off in float32 is a matter of the processor's matrix products
    assert (expected - exact).norm() < 1e-5 * exact.norm()
    assert (ours - exact).norm() < 2e-5 * exact.norm()


def test_an_epsilon_decides_how_loud_a_new_layer_is():
    ids = torch.randint(0, 64, (2, 96), generator=torch.Generator().manual_seed(0))

    def read_and_said(point):
        model, _ = build_model(point, SHAPE, seed=0)
        found, mixer = [], model.model.layers[0].mixer
        mixer.o_norm.register_forward_hook(lambda norm, args, y: found.append(args[0].square().mean().item()))
        with torch.no_grad():
            logits = model.double()(ids).logits
        return found[0], mixer.o_norm.variance_epsilon, logits

    square, eps, expected = read_and_said(RUNGS["delta"].point)
    assert square < eps / 100
    for name in ("delta-values", "matrix-values"):
        square, eps, _ = read_and_said(RUNGS[name].point)
        assert square > 10 * eps, name
    # what queries of norm 1 do to the read, an epsilon takes back
    width = SHAPE.width // SHAPE.heads
    queries = replace(RUNGS["delta-queries"].point, output_eps=1e-6 * width)
    torch.testing.assert_close(read_and_said(queries)[2], expected)


def test_without_decay_a_matrix_at_chunks_of_one_is_the_delta_rule(theirs):
    with torch.no_grad():
        theirs.A_log.fill_(-30.0)
    x = torch.randn(2, 77, 128)
    gaps = {}
    for name in ("matrix-1", "matrix-4"):
        mixer = mixer_of(name)
        give_weights(mixer, theirs)
        mixer.memory.point = replace(mixer.memory.point, query_scale=True)
        with torch.no_grad():
            y, expected = mixer(x)[0], theirs(x)
        gaps[name] = ((y - expected).norm() / expected.norm()).item()
    assert gaps["matrix-1"] < 1e-4 and gaps["matrix-4"] > 1e-2, gaps


def test_yaad_is_the_model_that_was_shipped_first():
    model, _ = build_model(RUNGS["yaad"].point, SHAPE, seed=3)
    torch.manual_seed(3)
    fields = {"hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
    fields |= {"attentional_bias": "huber_mixture", "eta_max": 0.09 / 8, "initial_memory_scale": 1.0}
    fields |= {"value_norm": False, "output_norm_eps": None, "conv_initializer_range": None}
    fields |= {"min_half_life": 32.0, "max_half_life": 32768.0, "use_rope": True}
    shipped = YaadForCausalLM(YaadConfig(**fields)).eval()
    ids = torch.randint(0, 64, (2, 90))
    assert model.config.intermediate_size == shipped.config.intermediate_size
    torch.testing.assert_close(model.eval()(ids, use_cache=False).logits, shipped(ids).logits)


def naive_read(q, k, v, eta, log_alpha, weights, norm_eps, residual):
    """One head, token by token: `M(x) = LN(gelu(x W1) W2)`, and x besides with `residual`; decay toward `weights`."""
    w0 = [w.clone() for w in weights]
    ws = [w.clone().requires_grad_() for w in weights]

    def memory(x, w1, w2):
        y = F.layer_norm(F.gelu(x @ w1, approximate="tanh") @ w2, x.shape[-1:], eps=norm_eps)
        return y + x if residual else y

    reads = []
    for t in range(len(q)):
        loss = 0.5 * (memory(k[t], *ws) - v[t]).square().sum()
        gradients = torch.autograd.grad(loss, ws)
        alpha = log_alpha[t].exp()
        ws = [
            (start + alpha * (w - start) - eta[t] * g).detach().requires_grad_()
            for start, w, g in zip(w0, ws, gradients, strict=True)
        ]
        reads.append(memory(q[t], *ws))
    return torch.stack(reads).detach()


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("value_norm", [True, False])
def test_values_and_read_residual_are_what_a_naive_recurrence_gives(residual, value_norm):
    point = replace(RUNGS["mlp"].point, chunk=1, read_residual=residual, value_norm=value_norm)
    model = change(MirasForCausalLM(our_config(point, SHAPE, 64)), point).double()
    memory = model.model.layers[0].mixer.memory
    d, heads, tokens = 64, 2, 9
    q, k = (F.normalize(torch.randn(1, tokens, heads, d, dtype=torch.float64), dim=-1) for _ in range(2))
    v = 3.0 * torch.randn(1, tokens, heads, d, dtype=torch.float64)
    eta = 0.05 * torch.rand(1, tokens, heads, dtype=torch.float64)
    log_alpha = -0.2 * torch.rand(1, tokens, heads, dtype=torch.float64)
    with torch.no_grad():
        y = memory(FinishedTokens(q, k, v, eta, log_alpha), Sequences())
    values = v / v.square().mean(-1, keepdim=True).sqrt() if value_norm else v
    for head in range(heads):
        x = [t[0, :, head] for t in (q, k, values, eta, log_alpha)]
        weights = [w[head].detach() for w in memory.memory.initial_state()]
        expected = naive_read(*x, weights, model.config.memory_norm_eps, residual)
        torch.testing.assert_close(y[0, :, head], expected, rtol=1e-5, atol=1e-5)


def test_a_unit_step_moves_the_read_by_its_share_of_the_error():
    d, eta, eps = 16, 1e-3, 0.1
    generator = torch.Generator().manual_seed(0)
    rule = MirasRule(UnitStepMLP(norm_eps=eps), L2(residual_clip=1e6), Decay(weight_cap=None), chunk_size=1)
    first = torch.randn(1, d, 4 * d, generator=generator, dtype=torch.float64)
    second = torch.zeros(1, 4 * d, d, dtype=torch.float64)
    norm = torch.ones(1, d, dtype=torch.float64), torch.zeros(1, d, dtype=torch.float64)
    k, v = (torch.randn(1, 1, 1, d, generator=generator, dtype=torch.float64) for _ in range(2))
    k = F.normalize(k, dim=-1)
    gates = torch.ones(1, 1, 1, dtype=torch.float64)
    parameters = MemoryParameters((first, second), *norm)
    y, _ = chunk_miras(k, k, v, eta * gates, 0.0 * gates, rule=rule, parameters=parameters)
    # without a second layer the memory returns its key, the first layer has no gradient, and the norm sees no variance
    error = (v - k).flatten()
    torch.testing.assert_close((y - k).flatten(), eta * (error - error.mean()), rtol=2e-3, atol=1e-9)


def test_the_path_goes_in_single_steps_from_one_end_to_the_other():
    assert PATH[0] == "gated-deltanet" and PATH[-1] == "yaad" and RUNGS["yaad"].point == Point()
    for before, after in zip(PATH[:-1], PATH[1:], strict=True):
        assert RUNGS[after].parent == before
    # what has to change together: a rule of ours with its chunk, an MLP with steps in its units, a start with its target
    together = [{"rule", "chunk"}, {"rule", "eta_max"}, {"last_layer", "decay_target"}, {"eta_max", "eta_start"}]
    # steps are in units of the retention gate, and Moneta is both of its choices
    together += [{"step", "eta_max"}, {"retention", "eta_max"}, {"loss", "retention", "eta_max"}]
    for name, rung in RUNGS.items():
        if rung.parent not in (None, "gated-deltanet"):
            changed = set(rung.point.changes_from(RUNGS[rung.parent].point))
            assert len(changed) == 1 or changed in together, f"{name} changes {changed}"


def test_points_refuse_what_they_cannot_be():
    with pytest.raises(ValueError, match="`rule` must be one of .*, got 'hebb'"):
        Point(rule="hebb")
    with pytest.raises(ValueError, match="`granularity` must be 'head' with the delta rule, got 'channel'"):
        Point(rule="delta")
    with pytest.raises(ValueError, match="are of MLP memories, got `rule` 'matrix'"):
        Point(rule="matrix", read_residual=False)
    with pytest.raises(ValueError, match="`last_layer` cannot be 0.1 with `retention` 'kl'"):
        Point(retention="kl", last_layer=0.1)
    with pytest.raises(ValueError, match="--only 'mpl' names no rung"):
        bridge.chosen(["mpl"])
    model, _ = build_model(RUNGS["delta"].point, SHAPE, seed=0)
    with pytest.raises(ValueError, match="`use_cache` must be False"):
        model.eval()(torch.zeros(1, 3, dtype=torch.long), use_cache=True)


@pytest.mark.parametrize("name", ["eps-residual", "mlp-unit-0.3", "matrix"])
def test_pieces_and_single_tokens_go_on_from_the_cache_as_one_call(name):
    """What a point changes around its memory is changed in every call, those of one token included."""
    model, _ = build_model(replace(RUNGS[name].point, chunk=8), SHAPE, seed=0)
    ids = torch.randint(0, 64, (1, 21), generator=torch.Generator().manual_seed(0))
    cache = DynamicCache(config=model.eval().config)
    with torch.no_grad():
        whole = model(ids).logits
        parts = [model(part, use_cache=True, **{CACHE_NAME: cache}).logits for part in ids.split([11, 1, 1, 8], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)


def test_models_of_all_rungs_have_the_same_size():
    sizes, seen = {}, set()
    for name, rung in RUNGS.items():
        point = rung.point  # of what parameters depend on
        kind = (point.model, point.rule, point.granularity, point.loss.startswith("huber"), point.last_layer == 0.0)
        if kind not in seen:
            seen.add(kind)
            with torch.device("meta"):
                model, _ = build_model(point, SIZES["cpu"].shape, seed=0)
            sizes[name] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert len(sizes) > 8 and max(sizes.values()) / min(sizes.values()) < 1.01, sizes


def test_weight_decay_spares_the_same_as_in_pretraining():
    model, _ = build_model(RUNGS["mlp"].point, SHAPE, seed=0)
    optimizer, _ = optimizer_and_schedule(model, 1e-3, 10)
    decayed, kept = optimizer.param_groups
    matrices = ("_proj.weight", "_conv.weight", "embed_tokens.weight", "lm_head.weight")
    expected = {name for name, _ in model.named_parameters() if name.endswith(matrices)}
    found = {name for name, p in model.named_parameters() if any(p is x for x in decayed["params"])}
    assert decayed["weight_decay"] == 0.1 and kept["weight_decay"] == 0.0 and found == expected


def test_published_gates_start_slower_and_are_spared_by_weight_decay():
    named = ("gated-deltanet", "gated-deltanet-gates")
    theirs, published = (build_model(RUNGS[name].point, SIZES["cpu"].shape, seed=0)[0] for name in named)

    def half_lives(model):
        layers = [layer.linear_attn for layer in model.model.layers]
        return [math.log(2) / (a.A_log.detach().exp() * F.softplus(a.dt_bias.detach())) for a in layers]

    assert (
        max(float(one.max()) for one in half_lives(theirs))
        < 2
        < max(float(one.max()) for one in half_lives(published))
    )
    (first, _), (second, _) = (optimizer_and_schedule(m, 1e-3, 10)[0].param_groups for m in (theirs, published))
    gates = {id(p) for name, p in published.named_parameters() if name.endswith(("A_log", "dt_bias"))}
    assert gates and not gates & {id(p) for p in second["params"]}
    # Transformers decays them, and `gated-deltanet` is as it is there
    spared = [name for name, p in theirs.named_parameters() if not any(p is x for x in first["params"])]
    assert not any("A_log" in name for name in spared)
    with pytest.raises(ValueError, match="`published_gates` are of `model` 'gated-deltanet', got 'llama'"):
        Point(model="llama", published_gates=True)


def test_ends_run_first_over_the_grid_and_their_other_seeds_last():
    jobs = jobs_of(SIZES["cpu"], ["gated-deltanet", "matrix", "mlp"])
    assert len(jobs) == 9 + 3 + 3 and len(set(jobs)) == len(jobs)
    assert jobs[:3] == [Job("gated-deltanet", rate, 0) for rate in (2e-3, 4e-3, 8e-3)]
    assert jobs[3:5] == [Job("matrix", 4e-3, 0), Job("mlp", 4e-3, 0)]
    assert {job.seed for job in jobs[-6:]} == {1, 2} and {job.rung for job in jobs[-6:]} == {"gated-deltanet"}


def training(rung: str, rate: float, seed: int, loss: float | None, norm: float | None = 1.0) -> dict:
    job = {"rung": rung, "learning_rate": rate, "seed": seed}
    return {"job": job, "validation": loss, "gradient_norm_max": norm}


def test_costs_are_those_of_the_best_rates():
    entries = summarise(
        [
            training("mlp", 2e-3, 0, 5.5),
            training("mlp", 4e-3, 0, 5.0, norm=7.0),
            training("mlp", 4e-3, 1, 5.2),
            training("mlp", 8e-3, 0, None, norm=None),
            training("mlp-rope", 2e-3, 0, 5.25),
            training("mlp-rope", 4e-3, 0, 5.5),
            training("mlp-zero", 2e-3, 0, 5.6),
            training("mlp-zero", 8e-3, 0, 4.9),
            training("mlp-conv", 1e-3, 0, 4.8),
            training("yaad", 4e-3, 0, None),
        ]
    )
    conv, rope, zero = (next(e for e in entries if e["rung"] == f"mlp-{word}") for word in ("conv", "rope", "zero"))
    mlp, yaad = entries[0], entries[-1]
    assert mlp["by_rate"] == {2e-3: 5.5, 4e-3: pytest.approx(5.1), 8e-3: None} and mlp["best_rate"] == 4e-3
    assert mlp["seeds"] == 2 and mlp["spread"] == pytest.approx(0.2) and not mlp["at_edge"]
    assert mlp["cost"] is None and mlp["gradient_norm_max"] is None
    # the parent's second seed at 4e-3 is nobody else's
    assert rope["cost"] == pytest.approx(5.25 - 5.0) and rope["at_edge"] and rope["parent"] == "mlp"
    assert yaad["best"] is None and yaad["cost"] is None
    # both were tried at 2e-3 and 8e-3, where the parent diverged; its 5.0 at 4e-3 is of a grid that the other did not have
    assert zero["best"] == 4.9 and zero["cost"] == pytest.approx(4.9 - 5.5) and conv["cost"] is None
    rows = list(table(entries))
    assert len({row.count("|") for row in rows}) == 1
    assert "|  | 5.500 | 5.100 | diverged | 5.100 |  | 2 (spread 0.200) | not a number |" in rows[2]
    assert "+0.250" in rows[4] and "5.250 (edge)" in rows[4]


# In a process of its own, because it makes Transformers quiet; and one process, because imports are what takes time.
DRIVER = """
import contextlib, io, json, os, sys
import bridge

rungs, folder = json.loads(sys.argv[1]), sys.argv[2]
flags = ["--smoke", "--out", folder, "--only", *rungs]
printed, times = [], []
for more in (["--keep-weights"], ["--list"], ["--workers", "2"]):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        bridge.main([*flags, *more])
    printed.append(out.getvalue())
    times.append({f.name: f.stat().st_mtime_ns for f in os.scandir(folder) if f.name.endswith("-seed0.json")})
    if more == ["--keep-weights"]:
        os.rename(f"{folder}/{rungs[1]}-lr0.01-seed0.json", f"{folder}/taken-away")
print("PRINTED" + json.dumps([printed, times]))
"""


def test_smoke_runs_are_saved_one_by_one_and_not_repeated(tmp_path):
    rungs = ("gated-deltanet", "delta", "mlp-unit-0.3")
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(rungs), str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ
        | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert "PRINTED" in done.stdout, done.stderr[-3000:]
    (first, listed, second), (before, _, after) = json.loads(done.stdout.split("PRINTED")[1])
    assert "3 of 3 trainings" in first and "1 of 3 trainings" in second
    assert "delta                0/1" in listed and "gated-deltanet       1/1" in listed
    delta = "delta-lr0.01-seed0.json"
    assert before.pop(delta) < after.pop(delta) and before == after
    again = [json.loads((tmp_path / name).read_text()) for name in ("taken-away", delta)]
    assert again[0]["train"] == again[1]["train"] and again[0]["validation"] == again[1]["validation"]

    for name in rungs:
        result = json.loads((tmp_path / f"{name}-lr0.01-seed0.json").read_text())
        assert result["point"] == json.loads(json.dumps(RUNGS[name].point.as_dict())) and not result["diverged"]
        assert [step for step, _ in result["train"]] == [1, 2, 3, 4, 5, 6]
        assert [step for step, _ in result["validation_by_step"]] == [3, 6]
        assert result["validation_by_step"][-1][1] == result["validation"] < math.log(SIZES["smoke"].vocabulary) - 0.1
        assert len(result["memories"]) == (2 if name == "mlp-unit-0.3" else 0)
        # what was kept has the loss that was written down, taken from logits here
        model, arguments = build_model(RUNGS[name].point, SIZES["smoke"].shape, seed=5)
        load_model(model, tmp_path / f"{name}-lr0.01-seed0.safetensors")
        ids = torch.load(tmp_path / "data.pt")["rows"]["validation"].long()
        with torch.no_grad():
            logits = model.eval()(ids, **arguments(ids)).logits.double()
        chosen = logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])
        assert -chosen.mean().item() == pytest.approx(result["validation"], abs=1e-4)

    report = json.loads((tmp_path / "report.json").read_text())
    assert [entry["rung"] for entry in report["rungs"]] == list(rungs)
    best = {entry["rung"]: entry["best"] for entry in report["rungs"]}
    assert report["rungs"][1]["cost"] == pytest.approx(best["delta"] - best["gated-deltanet"])
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert f"{best['delta']:.3f}" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("retention", ["decay", "lq"])
def test_the_last_layer_s_factor_is_of_its_weights(retention):
    """Of lq retention, a larger state is a smaller weight."""
    weights = []
    for factor in (1.0, 0.1):
        model, _ = build_model(Point(retention=retention, loss="l2", last_layer=factor), SHAPE, seed=0)
        memory = model.model.layers[0].mixer.memory.memory
        weights.append(memory.rule.retention.link(memory.initial_state[-1], -2))
    torch.testing.assert_close(weights[1], 0.1 * weights[0], rtol=1e-5, atol=1e-8)


def test_trainings_from_before_a_setting_count(tmp_path):
    size = SIZES["smoke"]
    point = RUNGS["yaad"].point.as_dict()
    assert point.pop("retention") == "decay"
    result = {"job": {"rung": "yaad", "learning_rate": 0.1, "seed": 0}, "point": point, "size": {"name": size.name}}
    (tmp_path / "yaad-lr0.1-seed0.json").write_text(json.dumps(result))
    of_rungs = size.name, at_the_rungs_point, "at another point than the rung's"
    assert [found["job"] for found in read_results(tmp_path, *of_rungs)] == [result["job"]]
    result["point"]["loss"] = "l2"
    (tmp_path / "yaad-lr0.1-seed0.json").write_text(json.dumps(result))
    with pytest.raises(ValueError, match="trained at another point"):
        read_results(tmp_path, *of_rungs)


class OfAnArray(torch.autograd.Function):
    """A loss whose number lies in an array of NumPy, which lives as long as any view of it does."""

    arrays: list[weakref.ref] = []

    @staticmethod
    def forward(ctx, number):
        array = np.array([float(number)], dtype=np.float32)
        OfAnArray.arrays.append(weakref.ref(array))
        return torch.from_numpy(array)[0]

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def test_a_training_keeps_nothing_of_a_step_but_two_numbers():
    OfAnArray.arrays.clear()
    model = torch.nn.Linear(1, 1)
    course = train(model, lambda step: OfAnArray.apply(model.weight.sum()), 1e-3, 40)
    gc.collect()
    assert len(course.losses) == 40 == len(OfAnArray.arrays)
    assert [array() for array in OfAnArray.arrays] == [None] * 40
