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
"""Each example's `--smoke` runs as a user would run it, without network or cache, learns, and leaves what it says."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from test_convert import make_teacher
from test_convert import text as random_text
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import miras_hf
from miras_hf import saved_memory
from miras_hf.distillation import AlignmentTrainer


EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
RUNS = {
    "finetune_lora": ["--output_dir", "lora", "--train_initial_memory"],
    "chat": ["--output_dir", "chat"],
    "long_document_qa": ["--folder", "document"],
    "classify": ["--output_dir", "classify"],
    "forecast": ["--output_dir", "forecast"],
    "distil": ["--output_dir", "distilled", "--report", "distilled/report.json"],
}
# One process for all: importing the libraries takes longer than the examples themselves.
DRIVER = """
import contextlib, io, json, runpy, sys, traceback

folder, runs = sys.argv[1], json.loads(sys.argv[2])
printed = {}
for name, flags in runs.items():
    sys.argv = [name + ".py", "--smoke", *flags]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            runpy.run_path(f"{folder}/{name}.py", run_name="__main__")
        except BaseException:
            traceback.print_exc(file=out)
    printed[name] = out.getvalue()
with open("printed.json", "w") as file:
    json.dump(printed, file)
"""


def offline(folder: Path) -> dict[str, str]:
    # the path: the package under test, installed or not
    return {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found, f"{pattern!r} is not in what was printed:\n{text[-3000:]}"
    return float(found[1].replace(",", ""))


def load_example(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    # The argument parser looks the module up to resolve its annotations.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# One test with parts, and not a fixture with tests: parallel workers would each run it.
def test_smoke_runs(tmp_path, subtests):
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(EXAMPLES), json.dumps(RUNS)],
        cwd=tmp_path,
        env=os.environ | offline(tmp_path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    printed = json.loads((tmp_path / "printed.json").read_text())
    for name, text in printed.items():
        with subtests.test(name):
            assert "Traceback" not in text, text[-3000:]
            globals()[f"check_{name}"](tmp_path, text)
    assert printed.keys() == RUNS.keys()


def check_finetune_lora(folder: Path, text: str) -> None:
    before = number(r"([\d.]+) before", text)
    adapter, loaded, merged = (number(rf"([\d.]+) {name}", text) for name in ("adapter", "loaded", "merged"))
    assert adapter < before - 0.03 and loaded == adapter and abs(merged - adapter) < 2e-3
    assert (folder / "lora" / "adapter" / "adapter_model.safetensors").exists()
    assert type(AutoModelForCausalLM.from_pretrained(folder / "lora" / "merged")).__name__ == "YaadForCausalLM"


def check_chat(folder: Path, text: str) -> None:
    assert number(r"([\d.]+) after", text) < number(r"([\d.]+) before", text) - 0.5
    first, second = (tuple(map(int, found)) for found in re.findall(r"\[(\d+) tokens read of (\d+) in the", text))
    # in the second turn all is read that was not: the first reply's last token, the end of its turn, the question
    assert first[0] == first[1] and second[0] < second[1] - first[1]
    assert text.count("> What does") == 2


def check_long_document_qa(folder: Path, text: str) -> None:
    assert number(r"Accuracy on 8 more documents: ([\d.]+)", text) >= 0.5 > 0.25 == number(r"gives ([\d.]+)", text)
    model = AutoModelForCausalLM.from_pretrained(folder / "document")
    cache = saved_memory.load_memory(folder / "document" / "memory.safetensors", model)
    assert cache.get_seq_length() == number(r"Read ([\d,]+) tokens", text)
    assert cache.get_seq_length() == len((folder / "document" / "document.txt").read_text().split())


def check_classify(folder: Path, text: str) -> None:
    assert number(r"unseen files: ([\d.]+)", text) > number(r"always: ([\d.]+)", text) + 0.1
    model = AutoModelForSequenceClassification.from_pretrained(folder / "classify")
    assert len(model.config.id2label) == 3 and text.count("in truth") == 3


def check_forecast(folder: Path, text: str) -> None:
    result = json.loads((folder / "forecast" / "forecast.json").read_text())
    assert result["mase"] == pytest.approx(number(r"MASE ([\d.]+)", text), abs=1e-3)
    # learned the season, to within what fifty steps allow; guessing bins would be several times off
    assert result["mase"] < 1.3 and 0.4 < result["mase_seasonal_naive"] < 1.2
    assert result["loss"] < result["loss_of_guessing"] - 0.5
    assert (folder / "forecast" / "forecast.png").read_bytes().startswith(b"\x89PNG")


def check_distil(folder: Path, text: str) -> None:
    result = json.loads((folder / "distilled" / "report.json").read_text())
    errors = result["alignment_errors"]
    assert (
        errors["stage 1"]["1"] < 0.5 * errors["converted"]["1"] and errors["stage 2"]["1"] < errors["converted"]["1"]
    )
    ladder = result["nats_per_token"]
    assert list(ladder) == ["teacher", "converted", "fitted", "stage 1", "stage 2"]
    # of an eighth of the tokens of stage 1, and no gradient
    assert errors["fitted"]["1"] < 0.5 * errors["converted"]["1"]
    assert result["fitted_tokens"] == 16 * 64
    assert abs(ladder["stage 2"] - ladder["teacher"]) < 0.05 and f"| stage 1 | {ladder['stage 1']:.3f} |" in text
    # two of three layers have keys and values, of 2 heads of 16 numbers in float32, as the teacher's three have
    theirs, ours = (
        {length: row["cache_bytes"] for length, row in result["after"][name].items()} for name in ("teacher", "hybrid")
    )
    assert theirs["512"] == 3 * 2 * 2 * 16 * 4 * 512
    assert ours["512"] - ours["64"] == 2 * 2 * 2 * 16 * 4 * (512 - 64)
    assert f"| stage 2 | {ladder['stage 2']:.3f} | {math.exp(ladder['stage 2']):.2f} |" in text
    assert result["tokens"] == {"stage 1": 16 * 8 * 64, "stage 2": 6 * 8 * 64}
    # what has been measured is not measured again, and nothing is trained anew
    seconds = json.loads((folder / "distilled" / "progress.json").read_text())["seconds"]
    again = load_example("distil").main(["--smoke", "--output_dir", str(folder / "distilled")])
    assert again["seconds"] == seconds and again["nats_per_token"] == ladder
    with pytest.raises(ValueError, match=r"other settings: --batch_size 8, now 4\. Name another folder"):
        load_example("distil").main(["--smoke", "--output_dir", str(folder / "distilled"), "--batch_size", "4"])
    assert AutoModelForCausalLM.from_pretrained(folder / "distilled").config.full_attention_layers == [0, 2]


def test_a_stage_that_is_stopped_goes_on_as_if_it_had_not_been(tmp_path):
    distil = load_example("distil")
    teacher = make_teacher("smollm")
    rows = [{"input_ids": row, "labels": row} for row in random_text(24, rows=6, seed=3)]
    learned = []
    for deadline in (math.inf, 0.0):
        folder = tmp_path / str(deadline)
        args = distil.Arguments(output_dir=str(folder), batch_size=2)
        progress, done, calls = distil.Progress(folder, {}), folder / "done", 0
        while not done.exists():
            torch.manual_seed(calls)  # what a checkpoint brings back is not what is made anew
            student = miras_hf.convert(teacher, [0, 2], {"chunk_size": 4})
            options = distil.training(args, "stage", 3, 1e-2, save_strategy="steps", save_steps=2)
            trainer = AlignmentTrainer(student, teacher, args=options, train_dataset=rows)
            finished = distil.train_stage(trainer, lambda: student.save_pretrained(done), deadline, progress)
            calls += 1
            assert finished == done.exists() == (calls == 3 or deadline > 0) and calls < 4
        assert not list(folder.glob("stage/checkpoint-*"))
        learned.append(AutoModelForCausalLM.from_pretrained(done).state_dict())
    assert all(torch.equal(learned[1][name], weight) for name, weight in learned[0].items())


def test_layers_learn_one_by_one_and_go_on(tmp_path):
    distil, teacher, weights = load_example("distil"), make_teacher("smollm"), []
    train = Dataset.from_dict({"input_ids": random_text(24, rows=6).tolist()})
    for name, deadline in (("whole", math.inf), ("pieces", 0.0)):
        args = distil.Arguments(output_dir=str(tmp_path / name), batch_size=2, stage1_steps=3, stage1_rate=1e-2)
        for calls in range(1, 6):  # what is done of one layer is not done again
            torch.manual_seed(0)
            student = miras_hf.convert(teacher, [0, 2], {"chunk_size": 4})
            before = {n: p.clone() for n, p in student.named_parameters()}
            if distil.align_offline(student, teacher, train, args, deadline, distil.Progress(tmp_path / name, {})):
                break
        assert calls == (1 if deadline else 5)
        weights.append(dict(student.named_parameters()))
    assert {n for n, p in before.items() if not torch.equal(p, weights[1][n])} >= {
        f"model.layers.{i}.mixer.{x}_proj.weight" for i in (0, 2) for x in "qkvgo"
    }
    assert all(
        torch.equal(weights[0][n], p) and (".mixer." in n or torch.equal(p, before[n])) for n, p in weights[1].items()
    )


def test_tables_of_layers_and_of_receivers(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    which = load_example("which_layers")
    smoke = ["--smoke", "--steps", "4", "--eval_rows", "2"]
    flags = [*smoke, "--table", "layers", "--output_dir", str(tmp_path / "layers")]
    result = which.main([*flags, "--report", str(tmp_path / "layers.json")])
    rows = result["rows"]
    assert sorted(row["layer"] for row in rows) == [0, 1, 2] and all(0 < row["alignment_error"] < 1 for row in rows)
    assert [row["gain"] for row in rows] == sorted((row["divergence"] - row["restored"] for row in rows), reverse=True)
    best = rows[0]
    assert f"| {best['layer']} | {best['alignment_error']:.3f} | {best['restored']:.3f} |" in which.markdown(result)
    # of the same command nothing is done twice
    assert which.main(flags)["rows"] == rows == json.loads((tmp_path / "layers.json").read_text())["rows"]

    # and without a gradient
    fitted = ["--smoke", "--steps", "0", "--eval_rows", "2", "--fit_rows", "8", "--output_dir"]
    found = which.main([*fitted, str(tmp_path / "fitted")])
    assert found["tokens"] == 0 and found["fitted_tokens"] == 8 * 64
    assert all(0 < row["alignment_error"] < 1 for row in found["rows"])
    assert not list((tmp_path / "fitted").glob("stage1"))
    for wrong in ("--table receivers --fit_rows 8", "--hybrid a --fit_rows 8", "--fit_rows -1"):
        with pytest.raises(ValueError, match="--fit_rows must be at least 0, and goes with --table layers without"):
            which.main(wrong.split())

    # of a hybrid that has been trained nothing is trained
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "layers" / "teacher")
    miras_hf.convert(teacher, [0, 2]).save_pretrained(tmp_path / "hybrid")
    flags = [*smoke, "--output_dir", str(tmp_path / "of-hybrid"), "--hybrid", str(tmp_path / "hybrid")]
    found = which.main(flags)
    assert sorted(row["layer"] for row in found["rows"]) == [0, 2] and found["tokens"] == 0
    assert not list((tmp_path / "of-hybrid").glob("stage1"))
    with pytest.raises(ValueError, match="--hybrid goes with --table layers, and has its own layers"):
        which.main([*flags, "--layers", "1"])

    flags = [*smoke, "--table", "receivers", "--layers", "1", "--output_dir", str(tmp_path / "receivers")]
    rows = which.main(flags)["rows"]
    # heads of 16: one matrix, two with its momentum or in an MLP without expansion
    assert [row["state_numbers_per_head"] for row in rows] == [256, 256, 512, 512, 512, 512, 512]
    assert all(row["alignment_errors"]["1"] < row["before"]["1"] for row in rows)
    assert which.main(flags)["rows"] == rows
    with pytest.raises(ValueError, match="--table must be layers or receivers, got 'heads'"):
        which.main(["--table", "heads"])
    with pytest.raises(ValueError, match="--teacher is needed"):
        which.main([])


def test_reports_of_converted_models_are_made_of_their_numbers(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    distil, which = load_example("distil"), load_example("which_layers")
    reports = sorted((EXAMPLES / "results").glob("smollm2_*.json"))
    assert reports
    for path in reports:
        result = json.loads(path.read_text())
        table = which.markdown(result) if "table" in result else distil.table(result)
        assert path.with_suffix(".md").read_text() == table + "\n", path
        assert "/tmp" not in path.read_text() and result["command"].startswith("python examples/")


def test_a_file_is_carried_in_pieces(tmp_path):
    distil, path, content = load_example("distil"), tmp_path / "model.gguf", bytes(range(256)) * 10
    path.write_bytes(content)
    pieces = distil.split_file(path, 1000)
    assert [piece.stat().st_size for piece in pieces] == [1000, 1000, 560]
    path.unlink()
    distil.join_file(path)
    assert path.read_bytes() == content
    path.unlink()
    pieces[1].write_bytes(bytes(1000))
    with pytest.raises(ValueError, match="not those that were cut"):
        distil.join_file(path)
    pieces[1].unlink()
    with pytest.raises(ValueError, match="these pieces are missing: model.gguf.piece-01"):
        distil.join_file(path)


def test_notebook_runs_and_is_stored_without_outputs(tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)
    training = next(cell for cell in cells if "STEPS, ROWS, LENGTH = 150, 8, 96" in cell.source)
    training.source = training.source.replace("150, 8, 96", "30, 8, 64")
    for name, value in offline(tmp_path).items():
        monkeypatch.setenv(name, value)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output.get("text", "") for cell in cells for output in cell.outputs)
    sizes = re.findall(r"tokens: (\d+) KiB", printed)
    assert len(sizes) == 4 and len(set(sizes)) == 1
    assert "['DynamicSlidingWindowLayer', 'MirasLayer']" in printed
    pictures = [output for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 2 and (tmp_path / "text.safetensors").exists()


def test_examples_name_their_mistakes(tmp_path):
    forecast = load_example("forecast")
    with pytest.raises(ValueError, match="--series must be elnino, co2 or sunspots, got 'tides'"):
        forecast.load(forecast.Arguments(series="tides"))
    with pytest.raises(ValueError, match="--csv needs --season"):
        forecast.load(forecast.Arguments(csv="sales.csv"))
    (tmp_path / "sales.csv").write_text("day,sold\n1,3\n2,\n3,5\n")
    values, season = forecast.load(forecast.Arguments(csv=str(tmp_path / "sales.csv"), season=7))
    assert values.tolist() == [3, 4, 5] and season == 7
    with pytest.raises(ValueError, match="a season of 12 to fit into the context and 1800 values"):
        forecast.main(["--context", "888", "--output_dir", str(tmp_path)])
    with pytest.raises(ValueError, match="--do takes train, read and ask, got rest"):
        load_example("long_document_qa").main(["--do", "rest", "--folder", str(tmp_path)])
    for flags, message in (
        (["--size", "tpu"], "--size must be one of smoke, cpu, gpu, got 'tpu'"),
        (["--teacher", "x", "--split_teacher", "4"], "--split_teacher needs --gguf_file and at least 1 MiB, got 4"),
        (["--smoke", "--train_files", __file__], "--train_files must name at least 10 files.*got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            load_example("distil").main([*flags, "--output_dir", str(tmp_path / "none")])
    for name in ("finetune_lora", "distil"):
        with pytest.raises(ValueError, match="--smoke"):
            load_example(name).main(["--output_dir", str(tmp_path)])


def test_bins_lose_no_more_than_their_width():
    import numpy as np

    bins = load_example("forecast").Bins(bins=96, context=20)
    windows = np.random.default_rng(0).normal(3.0, 5.0, (4, 30))
    ids = bins.encode(windows)
    assert ids.min() >= 0 and ids.max() < 96
    error = np.abs(bins.decode(ids, windows) - windows) / windows[:, :20].std(1, keepdims=True)
    assert error[(ids > 0) & (ids < 95)].max() <= 4 / 94
