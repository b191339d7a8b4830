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
"""The reports under `examples/evaluation/results` are what the studies make of the results beside them, today.

A study refuses what was trained with other defaults than the library's, and so a default that changes fails here until
what was trained with the old one has a name of its own.
"""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


EVALUATION = Path(__file__).resolve().parent.parent / "examples" / "evaluation"
STUDIES = [
    ("ablations", "ablations", ["--size", "cpu"]),
    ("ablations-long", "ablations", ["--size", "long"]),
    ("ablations-wide", "ablations", ["--size", "wide"]),
    ("ablations-context-2048", "ablations", ["--size", "context-2048"]),
    ("bridge", "bridge", ["--size", "cpu"]),
    ("bridge-long", "bridge", ["--size", "long"]),
    ("bridge-wide", "bridge", ["--size", "wide"]),
    ("recall", "recall", ["--size", "cpu"]),
    ("recall-seeds", "recall", ["--size", "cpu"]),
    ("length", "length", []),
    ("stability", "stability", []),
]


@pytest.mark.parametrize(("folder", "study", "size"), STUDIES, ids=[folder for folder, *_ in STUDIES])
def test_a_report_is_what_the_study_makes_of_its_results(folder, study, size, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EVALUATION))
    results = EVALUATION / "results" / folder
    for path in results.glob("*.json"):
        shutil.copy(path, tmp_path)
    importlib.import_module(study).main([*size, "--report", "--out", str(tmp_path)])
    assert (tmp_path / "report.md").read_text() == (results / "report.md").read_text()


def test_no_folder_with_a_report_is_left_out():
    folders = {path.parent.name for path in (EVALUATION / "results").glob("*/report.md")}
    assert folders == {folder for folder, *_ in STUDIES}


def test_a_command_names_the_settings_it_was_started_with_alone():
    """What a compiler sets while a study runs is nothing that a reader would type."""
    code = "import os, provenance; os.environ['KMP_DUPLICATE_LIB_OK'] = 'TRUE'; print(provenance.command_line())"
    benchmarks = str(EVALUATION.parents[1] / "benchmarks")
    env = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "PYTHONPATH": benchmarks}
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout
    assert said == "OMP_NUM_THREADS=1 python -c\n"
