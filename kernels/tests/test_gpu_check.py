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
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu_check.py"), "--quick", "--out", str(tmp_path), "--paths", *wanted],
        env=os.environ | interpreted | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["right"] and {row["model"] for row in results["correctness"]} == {"moneta", "yaad", "memora"}
    assert all(row["right"] and row["error"] > 0 for row in results["correctness"])
    said = {row["path"] for row in results["times"]} | {row["name"].split(", quick")[0] for row in results["skipped"]}
    assert said == set(wanted)
    report = (tmp_path / "results.md").read_text()
    assert "3 configurations checked against float64, 0 wrong" in report and "yaad, Triton" in report


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
