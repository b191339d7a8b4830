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
"""The CPU benchmarks run from their one command each, and the hand-written neighbour is what it says it is."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F


ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def ttt_mlp(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import ttt_mlp

    torch.manual_seed(0)
    layer = ttt_mlp.TTTMLP(hidden_size=32, num_heads=2, mini_batch_size=8).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            # away from the initial zeros and ones, where terms could be missing unseen
            parameter.add_(0.2 * torch.randn_like(parameter))
    return layer, torch.randn(2, 27, 32, dtype=torch.float64)


def quick_run(script, folder, *flags):
    command = [sys.executable, str(BENCHMARKS / f"{script}.py"), "--quick", "--out", str(folder), *flags]
    paths = [str(ROOT / "src"), str(ROOT / "kernels" / "torch-ext"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr


def test_quick_run(tmp_path):
    quick_run("layer_cpu", tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    # only a package that is not installed may be missing
    assert set(results["skipped"]) <= {"titans", "titans-anchored"}, results["skipped"]
    names = {"moneta", "yaad", "memora", "ttt-mlp", "gated-deltanet", "mamba2", "sdpa"}
    for mode in ("forward", "backward"):
        measured = {entry["name"] for entry in results["speed"] if entry["mode"] == mode}
        assert names | {"moneta-recurrent", "yaad-recurrent", "memora-recurrent"} <= measured
    assert names <= {entry["name"] for entry in results["decode"]}
    assert {entry["name"] for entry in results["memory"]} == {"yaad", "ttt-mlp"}
    assert all(entry["added_mib"] > 0 and entry["finite"] for entry in results["memory"])
    for name, competitor in results["competitors"].items():
        assert competitor["decode_against_forward"]["max_relative"] < 1e-4, name
    assert {entry["name"] for entry in results["model"]} == {"moneta", "yaad", "memora"}
    for entry in results["model"]:
        assert entry["max_relative"] < 1e-3, entry
    for name in names:
        assert results["competitors"][name]["label"] in (tmp_path / "results.md").read_text()


def test_quick_run_of_decoding(tmp_path):
    quick_run("decode", tmp_path)
    results = json.loads((tmp_path / "decode.json").read_text())
    names = {"moneta", "yaad", "memora", "llama", "gated-deltanet", "mamba2"}
    assert not results["skipped"] and set(results["models"]) == names
    for fact in results["models"].values():
        assert fact["decode_against_forward"]["max_relative"] < 1e-4, fact
    for batch, context in itertools.product((1, 2), (24, 100)):
        # 200 tokens of both sequences are more than a quick run reads
        read = batch * context <= 100
        rows = {row["name"]: row for row in results["decode"] if (row["batch"], row["context"]) == (batch, context)}
        assert set(rows) == names
        assert all((row["filled"] == "read") == read for row in rows.values())
        measured = {
            row["name"] for row in results["first_token"] if (row["batch"], row["context"]) == (batch, context)
        }
        assert measured == (names if read else set())
        # keys and values of 2 layers of 32 channels for the context and 16 steps, and two lengths
        assert rows["llama"]["cache_bytes_per_sequence"] * batch == 2 * (2 * 32 * 4 * (context + 16) * batch + 8)
    for name, batch in itertools.product(names - {"llama"}, (1, 2)):
        rows = [row for row in results["decode"] if (row["name"], row["batch"]) == (name, batch)]
        assert len({row["cache_bytes_per_sequence"] for row in rows}) == 1, rows
    report = (tmp_path / "decode.md").read_text()
    assert all(fact["label"] in report for fact in results["models"].values())


@pytest.mark.slow
def test_quick_run_of_prefill(tmp_path):
    quick_run("prefill", tmp_path)
    results = json.loads((tmp_path / "prefill.json").read_text())
    assert not results["skipped"]
    assert set(results["models"]) == {"moneta", "yaad", "memora"}
    for name, fact in results["models"].items():
        assert fact["pieces_against_whole"]["max_relative"] < 1e-4, fact
        assert [row["tokens"] for row in results["prefill"] if row["name"] == name] == [64, 200]
        assert fact["label"] in (tmp_path / "prefill.md").read_text()


def test_ttt_mlp_dual_form_is_gradient_descent(ttt_mlp):
    layer, hidden_states = ttt_mlp
    tokens, size = hidden_states.shape[1], layer.mini_batch_size
    q, k, v, eta = layer._inputs(hidden_states, torch.arange(tokens) % size)
    scale = layer._token_scale()

    def memory(weights, x):
        w1, b1, w2, b2 = weights
        return x + layer._memory_norm(F.gelu(x @ w1 + b1, approximate="tanh") @ w2 + b2)

    outputs, weights = [], layer.initial_state(2).start
    for t in range(tokens):
        if t % size == 0:  # the last token's weights are the next mini-batch's start
            start = [w.detach().requires_grad_() for w in weights]
            steps = [torch.zeros_like(w) for w in start]
        token = slice(t, t + 1)
        loss = 0.5 * (eta[:, :, token] * (memory(start, k[:, :, token]) - v[:, :, token]).square()).sum()
        steps = [s + g for s, g in zip(steps, torch.autograd.grad(loss, start), strict=True)]
        weights = [w - scale[t % size] * s for w, s in zip(start, steps, strict=True)]
        outputs.append(memory(weights, q[:, :, token]))
    expected = layer._output(torch.cat(outputs, dim=2))
    torch.testing.assert_close(layer(hidden_states), expected, rtol=1e-10, atol=1e-10)


def test_ttt_mlp_decodes_as_it_reads(ttt_mlp):
    layer, hidden_states = ttt_mlp
    _, state = layer.run(hidden_states[:, :16], layer.initial_state(2))
    outputs = []
    for t in range(16, hidden_states.shape[1]):
        output, state = layer.step(hidden_states[:, t : t + 1], state)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, dim=1), layer(hidden_states)[:, 16:], rtol=1e-10, atol=1e-10)
