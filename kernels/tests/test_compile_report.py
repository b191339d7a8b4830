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
"""No shipped launch configuration is worse than its report: compiled for real, for GPUs that need not be here.

`MIRAS_COMPILE_ALL=1` compiles everything the reports hold, an hour of one core, instead of a few programs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from miras_kernels.configuration import KERNELS, entries, shipped


ROOT = Path(__file__).resolve().parents[2]
REPORTS = ROOT / "kernels" / "reports"
NAMES = ("default", "sm_80", "sm_90", "sm_100")
SHAPE = ("head_dim", "chunk_size", "precision")
# what a kernel's numbers stand on, in the order in which they are to be looked at
COUNTS = ("spilled_bytes_per_chunk", "spilled_bytes_per_tile", "shared")


def report(name):
    return json.loads((REPORTS / f"{name}.json").read_text(encoding="utf-8"))


def check(*arguments):
    # in a process of its own: this one may be the interpreter's, which compiles nothing
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT / "kernels" / "torch-ext")
    command = [sys.executable, str(ROOT / "kernels" / "compile_report.py"), "--check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_configuration_is_in_its_report(name):
    found = {
        (program["kernel"], *(program[part] for part in SHAPE), json.dumps(program["launch"]))
        for program in report(name)["programs"]
    }
    for kernel in KERNELS:
        for entry in entries(name)[kernel]:
            if entry["launch"] is None:  # nothing fits, nothing ships
                continue
            launch = json.dumps({"enable_fp_fusion": True, **entry["launch"]})
            assert (kernel, *(entry[part] for part in SHAPE), launch) in found, (kernel, entry)


def test_every_generic_file_has_a_report():
    assert set(NAMES) <= set(shipped())
    assert {path.stem for path in REPORTS.glob("*.json")} == set(NAMES)


@pytest.mark.parametrize("name, limit", [("default", 99), ("sm_80", 163), ("sm_90", 227), ("sm_100", 227)])
def test_reports_fit_into_shared_memory(name, limit):
    programs = report(name)["programs"]
    assert programs and max(program["counts"]["shared"] for program in programs) <= limit * 1024


@pytest.mark.parametrize("name, units", [("sm_90", "wgmma"), ("sm_100", "tcgen05")])
def test_the_main_shape_uses_its_generation_s_matrix_units(name, units):
    main = [p for p in report(name)["programs"] if tuple(p[part] for part in SHAPE) == (64, 64, "bf16")]
    assert {p["kernel"] for p in main} == set(KERNELS)
    assert all(program["counts"][units] > 0 for program in main)


def test_programs_are_not_worse_than_reported():
    done = check() if os.environ.get("MIRAS_COMPILE_ALL") == "1" else check("--few")
    assert done.returncode == 0, done.stderr
    # one at least for each file and forward kernel, and the other kernels for one file
    assert done.stdout.count("as reported") >= len(NAMES) * 2 + 4, done.stdout


@pytest.mark.parametrize("count", COUNTS)
def test_a_worse_program_is_named(tmp_path, monkeypatch, count):
    monkeypatch.syspath_prepend(str(ROOT / "kernels"))
    import compile_report

    reported = dict.fromkeys(COUNTS, 1000) | {"wgmma": 4, "tcgen05": 0, "mma": 8}
    slack = compile_report.SLACK
    assert compile_report.worse(reported, reported, slack) == []
    assert compile_report.worse(reported, reported | {count: 1100, "mma": 0}, slack) == []
    assert compile_report.worse(reported, reported | {count: 1300}, slack) == [f"{count} 1300, reported 1000"]
    assert compile_report.worse(reported, reported | {"wgmma": 0}, slack) == ["no wgmma, reported 4"]


def test_the_command_fails_by_name_and_says_when_tritons_differ(tmp_path):
    better = report("sm_90")
    better["triton"] = "0.0"
    for program in better["programs"]:
        program["counts"]["shared"] //= 4
    (tmp_path / "sm_90.json").write_text(json.dumps(better), encoding="utf-8")
    done = check("sm_90", "--few", "--kernel", "matrix_forward", "--reports", str(tmp_path))
    assert done.returncode == 1
    assert "worse: sm_90: matrix_forward, head_dim 64, chunk_size 64, bf16, yaad: shared " in done.stderr
    assert "the report is of Triton 0.0" in done.stdout
    # and what no report holds
    better["programs"] = []
    (tmp_path / "sm_90.json").write_text(json.dumps(better), encoding="utf-8")
    done = check("sm_90", "--few", "--kernel", "matrix_forward", "--reports", str(tmp_path))
    assert done.returncode == 1 and "not in the report" in done.stderr
