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
"""The standing GPU script runs, here at its smallest size, and says truly what it found."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import torch


BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
ROOT = BENCHMARKS.parents[1]


def load_tables():
    spec = importlib.util.spec_from_file_location("tables", BENCHMARKS / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_quick_run_checks_measures_and_reports(tmp_path):
    paths = [str(ROOT / "src"), str(ROOT / "kernels" / "torch-ext")]
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    wanted = ["yaad, Triton", "Gated DeltaNet (fla)", "SDPA attention"]
    models = {"yaad", "llama", "gated-deltanet", "mamba2"}
    command = [sys.executable, str(BENCHMARKS / "gpu_check.py"), "--quick", "--out", str(tmp_path)]
    done = subprocess.run(
        [*command, "--paths", *wanted, "--models", *models],
        env=os.environ | interpreted | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["right"] and {row["model"] for row in results["correctness"]} == {"moneta", "yaad", "memora"}
    assert all(row["right"] and row["error"] > 0 for row in results["correctness"])
    assert all(row["decode_error"] > 0 for row in results["correctness"])
    assert [row["tb_per_s"] > 0 for row in results["times"] if row["setting"] == "one token a row, decoding"] == [True]
    said = {row["path"] for row in results["times"]} | {row["name"].split(", quick")[0] for row in results["skipped"]}
    assert said == set(wanted)
    assert {row["model"] for row in results["training"]} == models
    assert all(row["batch"] * row["tokens"] == 40 and row["tokens_per_s"] > 0 for row in results["training"])
    sizes = [row["parameters"] for row in results["training"] if row["model"] != "mamba2"]
    assert max(sizes) <= 1.02 * min(sizes)
    assert {(row["name"], row["batch"]) for row in results["decode"]} == {(name, 2) for name in models}
    assert {(row["name"], row["tokens"]) for row in results["prefill"]} == {("yaad", 40)}
    # only what is not installed may be missing
    assert not any("batch" in row["name"] or "training" in row["name"] for row in results["skipped"])
    report = (tmp_path / "results.md").read_text()
    assert "3 configurations checked against float64, 0 wrong" in report and "yaad, Triton" in report
    assert "Training of whole models, tiny" in report and "Milliseconds a step, batch 2" in report
    assert "Long prompts, batch 1, in pieces of 24 tokens" in report


def test_out_of_memory_is_reported_and_not_fatal(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import training

    class Run:
        device, skipped, rows = "cpu", [], []

        def skip(self, name, why):
            self.skipped.append((name, why))

        def add(self, part, row):
            self.rows.append((part, row["model"]))

        def out_of_time(self, what):
            return False

    def no_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("there is none left")

    run, build = Run(), training.build
    tiny = training.Training("tiny", training.ModelShape(32, 1, 1, 64, 16), (8,), 8, autocast=False, seconds=0.0)

    def build_one_without_memory(name, *args, **kwargs):
        model = build(name, *args, **kwargs)
        if name == "llama":
            monkeypatch.setattr(model.module, "forward", no_memory)
        return model

    monkeypatch.setattr(training, "build", build_one_without_memory)
    training.measure_training(run, tiny, ["llama", "gated-deltanet"])
    assert run.rows == [("training", "gated-deltanet")]
    assert run.skipped == [("training of tiny llama, T = 8", "OutOfMemoryError: there is none left")]


def test_table_compares_training_with_the_llama():
    row = {"size": "tiny", "batch": 1, "parameters": 10, "settings": "", "median": 1.0, "low": 1.0, "high": 1.0}
    rows = [
        row | {"model": name, "label": name, "tokens": tokens, "tokens_per_s": speed, "peak_mib": peak}
        for name, tokens, speed, peak in [
            ("llama", 8, 100.0, 64.0),
            ("yaad", 8, 125.0, 16.0),
            ("yaad", 16, 50.0, 16.0),
        ]
    ]
    lines = load_tables().training(rows)
    # no Llama was measured at 16 tokens
    assert "| 125 | 1.25 | 16.0 | 0.25 |" in lines[-5] and "| 50 |  | 16.0 |  |" in lines[-4]


def test_table_names_the_length_that_overtakes_attention():
    times = {"yaad, Triton": {1024: 3.0, 2048: 2.0, 4096: 2.0}, "SDPA attention": {1024: 1.0, 2048: 2.0, 4096: 4.0}}
    rows = [
        {"path": path, "setting": "batch 1", "tokens": tokens, "median": median}
        for path, found in times.items()
        for tokens, median in found.items()
    ]
    tables = load_tables()
    assert "faster than attention from T = 4096" in "\n".join(tables.overtaking({"times": rows}, "batch 1"))
    for row in rows:
        row["median"] = 9.0 if "Triton" in row["path"] else 1.0
    assert "not faster than attention" in "\n".join(tables.overtaking({"times": rows}, "batch 1"))
