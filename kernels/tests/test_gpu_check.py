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
"""The standing GPU script runs every step, says truly what it found, and finds and names what is wrong."""

import json
import os
import subprocess
import sys
import textwrap
import time
import venv
from pathlib import Path

import pytest
import torch

import miras_hf  # noqa: F401  whole, before a step takes its memory alone


BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
ROOT = BENCHMARKS.parents[1]
STEPS = [
    "machine", "warm_up", "correctness", "sanitizer", "times", "variants", "ncu", "more_correctness", "more_times",
    "training", "prefill", "decode",
]  # fmt: skip


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def environment(**more):
    paths = [str(ROOT / "src"), str(ROOT / "kernels" / "torch-ext"), str(BENCHMARKS)]
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    return os.environ | interpreted | {"PYTHONPATH": os.pathsep.join(paths)} | more


def gpu_check(out, *arguments, **more):
    """Exit code, results, and what was said."""
    # minutes as for a machine that others keep busy
    command = [sys.executable, str(BENCHMARKS / "gpu_check.py"), "--quick", "--minutes", "60", "--out", str(out)]
    done = subprocess.run([*command, *arguments], env=environment(**more), capture_output=True, text=True)
    assert (out / "results.json").is_file(), done.stdout[-2000:] + done.stderr[-2000:]
    return done.returncode, json.loads((out / "results.json").read_text()), done.stdout + done.stderr


def rows_of(results):
    return {row["what"]: row for entry in results["steps"] for row in entry["rows"]}


# -- all of it --------------------------------------------------------------------------------------------------------


def test_quick_run_takes_every_step_and_says_what_each_did(tmp_path):
    code, results, said = gpu_check(tmp_path / "out")
    assert [entry["name"] for entry in results["steps"]] == STEPS
    rows = rows_of(results)
    wrong = {what: row for what, row in rows.items() if row["outcome"] == "wrong"}
    assert not wrong, said[-3000:]
    without = {what for what, row in rows.items() if row["outcome"] == "not checked"}
    assert all(rows[what]["why"] for what in without)
    assert code == (3 if without else 0) and results["outcome"] == ("not checked" if without else "right")
    if not torch.cuda.is_available():
        # what only a device can show, and nothing else
        assert without == {
            "carried cache",
            *(f"{k} under {t}" for k in ("mlp_decode", "mlp_backward") for t in ("racecheck", "memcheck")),
            *(f"{k} under ncu" for k in ("mlp_forward", "mlp_backward")),
        }
        assert rows["mlp_decode under racecheck"]["why"] == "no such tool: compute-sanitizer"
    checked = [row for what, row in rows.items() if "block" in row]
    assert all(0 < row[kind] < 0.3 for row in checked for kind in ("largest", "norm", "block"))
    text = " ".join(what for what, row in rows.items() if "block" in row)
    kinds = ("forward", "backward", "decode", "yaad", "moneta", "memora", "matrix", "head gates", "padded", "packed")
    assert all(word in text for word in (*kinds, "continued", "bf16", "ieee", "tf32x3"))
    assert rows["one token of yaad, B 1, T 1, 1 x 32, C 16"]["tb_per_s"] > 0
    trained = [row for what, row in rows.items() if what.startswith("training of")]
    assert {row["model"] for row in trained} == {"yaad", "llama"}
    assert all(row["batch"] * row["tokens"] == 9 and row["tokens_per_s"] > 0 for row in trained)
    report = (tmp_path / "out" / "results.md").read_text()
    assert all(f"| {name} |" in report for name in STEPS)
    assert "Milliseconds a step, batch 1" in report and "in pieces of 12 tokens" in report
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) <= 8 and all(len(path.relative_to(tmp_path / "out").parts) <= 2 for path in files)


def test_wrong_numbers_are_found_and_named(tmp_path):
    faults = {
        "nan gradient": ("backward of memora", "gradient of k: 1 of 288 numbers are not finite, the first at (0, 4"),
        "stale tile": ("forward of yaad", "worst in block (0, 0, 0)"),
        "unequal bits": ("decode of yaad", "repeat 1 gives 1 other numbers of 128"),
        "does not fit": ("forward of moneta", "OutOfResources: out of resource: shared memory, Required: 258048"),
    }
    asked = ";".join(f"{kind}:{where}" for kind, (where, _) in faults.items())
    code, results, said = gpu_check(tmp_path, "--steps", "correctness", MIRAS_GPU_CHECK_FAULT=asked)
    rows = rows_of(results)
    wrong = {what: row["why"] for what, row in rows.items() if row["outcome"] == "wrong"}
    assert code == 1 and len(wrong) == len(faults) < len(rows)
    for where, words in faults.values():
        (why,) = [why for what, why in wrong.items() if what.startswith(where)]
        assert words in why, why
        assert words in said and words in (tmp_path / "results.md").read_text()


# -- steps that die, hang, or end ------------------------------------------------------------------------------------


STEP = """
import os, subprocess, sys, time
{imports}
from record import begin
record, args = begin("A step of a test.")
{before}
for what in ("first", "second", "third"):
    record.check(what, lambda: {row})
"""


def parent(
    tmp_path, row="{}", before="", minutes=30.0, grace=1.0, fault="", seconds=90.0, hang=120.0, imports="", attempts=4
):
    """The script with one step, which knows nothing of kernels."""
    (tmp_path / "step.py").write_text(STEP.format(row=row, before=before, imports=imports))
    program = textwrap.dedent(f"""
        import sys, pathlib, gpu_check, steps, supervise
        supervise.HANG, supervise.ATTEMPTS = {hang}, {attempts}
        gpu_check.HERE, gpu_check.NAMES = pathlib.Path({str(tmp_path)!r}), ("step",)
        gpu_check.STEPS = (steps.Step("step", "of a test", "step", {seconds * 7.5 / minutes}),)
        code = gpu_check.main()
        assert not [name for name in sys.modules if name.split(".")[0] in ("torch", "triton", "transformers")]
        sys.exit(code)
    """)
    command = [sys.executable, "-c", program, "--quick", "--out", str(tmp_path / "out"), "--minutes", str(minutes)]
    return subprocess.Popen(
        [*command, "--grace", str(grace)],
        env=environment(MIRAS_GPU_CHECK_FAULT=fault),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def outcomes(tmp_path, **options):
    process = parent(tmp_path, **options)
    said = process.communicate()[0]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "Traceback" not in said, said
    rows = {what: (row["outcome"], row.get("why", "")) for what, row in rows_of(results).items()}
    return process.returncode, rows


@pytest.mark.parametrize(
    ("row", "code", "outcome", "why"),
    [
        ("{'ms': 1.0}", 0, "right", ""),
        ("{'outcome': 'wrong', 'why': 'it is'}", 1, "wrong", "it is"),
        ("{'ms': float('nan')}", 1, "wrong", "not finite: ['ms']"),
        ("1 / 0", 1, "wrong", "ZeroDivisionError: division by zero"),
        ("__import__('a_path_that_is_not_installed')", 3, "not checked", "No module named"),
    ],
)
def test_three_outcomes_are_told_apart_by_rows_and_exit_codes(tmp_path, row, code, outcome, why):
    found, rows = outcomes(tmp_path, row=row)
    assert found == code and set(rows) == {"first", "second", "third"}
    assert all(one == outcome and why in said for one, said in rows.values())


def test_a_step_that_crashes_loses_one_row_and_names_it(tmp_path):
    code, rows = outcomes(tmp_path, fault="crash:second")
    assert code == 1 and rows["second"] == ("wrong", "its process died of SIGSEGV")
    assert rows["first"] == rows["third"] == ("right", "")


def test_a_step_that_hangs_is_killed_with_what_it_started_and_named(tmp_path):
    before = "child = subprocess.Popen(['sleep', '600']); record.facts['child'] = child.pid"
    started = time.monotonic()
    code, rows = outcomes(tmp_path, fault="hang:second", before=before, seconds=8.0)
    assert time.monotonic() - started < 120.0
    # it may have been compiling; and what it kept from being reached has a row of its own
    assert code == 3 and rows["first"][0] == "right" and rows["second"][0] == rows["third"][0] == "not checked"
    assert "it did not end in " in rows["second"][1] and "was killed 1 s after the step's time" in rows["second"][1]
    assert rows["third"][1] == "not reached: " + rows["second"][1]
    facts = json.loads((tmp_path / "out" / "results.json").read_text())["steps"][0]["facts"]
    state = Path(f"/proc/{facts['child']}/stat")
    # gone, or waiting for a parent to ask for its exit code
    assert not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_a_row_that_runs_for_minutes_is_wrong_when_it_is_killed(tmp_path):
    code, rows = outcomes(tmp_path, fault="hang:second", seconds=8.0, hang=2.0)
    assert code == 1 and rows["second"][0] == "wrong" and "it did not end in " in rows["second"][1]
    assert rows["third"][0] == "not checked"


def test_what_is_left_when_processes_keep_dying_is_named(tmp_path):
    before = "record.report = lambda rows: ['measured: ' + args.why]"
    code, rows = outcomes(tmp_path, fault="crash:first;crash:second", before=before, attempts=2)
    assert code == 1 and rows["first"] == rows["second"] == ("wrong", "its process died of SIGSEGV")
    assert rows["third"] == ("not checked", "not reached: 2 of its processes died")
    # the report is of those that measured
    assert "measured: out of time" in (tmp_path / "out" / "results.md").read_text()


def test_what_is_left_is_said_when_it_cannot_be_named(tmp_path):
    before = "args.why == 'out of time' or sys.exit(5)"
    code, rows = outcomes(tmp_path, fault="crash:second", before=before, attempts=1)
    assert code == 1 and rows["the rest of the step"] == ("not checked", "not reached: 1 of its processes died")
    assert "third" not in rows


def test_a_step_that_cannot_begin_says_why(tmp_path):
    code, rows = outcomes(tmp_path, before="raise RuntimeError('no such luck')")
    assert code == 1 and list(rows) == ["the step"]
    assert "exit code 1: RuntimeError: no such luck" in rows["the step"][1]


def test_a_device_that_is_lost_costs_one_row(tmp_path):
    before = "import record as r\nr.device_is_broken = lambda: record.rows[-1]['what'] == 'second'"
    row = "1 / 0 if what == 'second' else {}"
    code, rows = outcomes(tmp_path, before=before, row=row)
    assert code == 1 and [one for one, _ in rows.values()] == ["right", "wrong", "right"]


@pytest.mark.parametrize("ends", ["a destructor aborts", "the process is killed"])
def test_a_lost_device_costs_one_row_however_its_process_ends(tmp_path, ends):
    # what is on a lost device aborts when it is destroyed; and a process may die before it has said that it ends
    before = "import atexit\natexit.register(os.abort)\nimport record as r\n"
    lost = "record.rows[-1]['what'] == 'second'"
    if ends == "the process is killed":
        lost += " and os.kill(os.getpid(), 6)"
    before += f"r.device_is_broken = lambda: {lost}\nif 'second' in record.done: atexit.unregister(os.abort)"
    code, rows = outcomes(tmp_path, before=before, row="1 / 0 if what == 'second' else {}")
    assert code == 1 and [one for one, _ in rows.values()] == ["right", "wrong", "right"]
    assert rows["second"][1] == "ZeroDivisionError: division by zero"


def test_a_step_s_time_is_counted_from_before_its_imports(tmp_path):
    # of 6 seconds the imports take all
    code, rows = outcomes(tmp_path, before="", row="{}", seconds=6.0, grace=60.0, imports="time.sleep(8.0)")
    assert code == 3 and set(rows.values()) == {("not checked", "out of time")} and len(rows) == 3


def test_results_are_whole_at_any_time(tmp_path, monkeypatch):
    import whole_files

    path = tmp_path / "results.json"
    whole_files.write_whole(path, "one")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(whole_files.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        whole_files.write_whole(path, "another, longer")
    assert path.read_text() == "one"
    # all that writes what others read does it so
    for name in ("gpu_check", "tables", "record", "supervise", "warm_up"):
        assert "write_text(" not in (BENCHMARKS / f"{name}.py").read_text(), name


def test_what_there_is_no_time_for_is_not_checked(tmp_path):
    code, rows = outcomes(tmp_path, row="time.sleep(8.0) or {}", seconds=6.0, grace=60.0)
    assert code == 3 and rows["first"] == ("right", "")
    assert rows["second"] == rows["third"] == ("not checked", "out of time")
    (tmp_path / "again").mkdir()
    code, rows = outcomes(tmp_path / "again", minutes=0.01)
    assert code == 3 and rows["the step"][1].startswith("out of time")


def test_what_is_known_is_written_when_the_script_is_told_to_stop(tmp_path):
    process = parent(tmp_path, fault="hang:second", seconds=600.0)
    results, end = tmp_path / "out" / "results.json", time.monotonic() + 60.0
    while time.monotonic() < end and not (results.is_file() and "first" in results.read_text()):
        time.sleep(0.2)
    process.terminate()
    process.communicate()
    assert process.returncode == 143
    entry = json.loads(results.read_text())["steps"][0]
    assert [row["what"] for row in entry["rows"]] == ["first"] and entry["doing"] == "second"
    assert (tmp_path / "out" / "logs.zip").is_file()


def test_without_a_device_nothing_else_is_tried(tmp_path):
    row = "{'outcome': 'wrong', 'why': 'there is none'} if what == 'device' else {}"
    (tmp_path / "machine.py").write_text(STEP.format(row=row, before="", imports="").replace('"second"', '"device"'))
    (tmp_path / "step.py").write_text(STEP.format(row="{}", before="", imports=""))
    program = textwrap.dedent(f"""
        import sys, pathlib, gpu_check, steps
        gpu_check.HERE, gpu_check.NAMES = pathlib.Path({str(tmp_path)!r}), ("machine", "step")
        gpu_check.STEPS = [steps.Step(name, "of a test", name, 90) for name in gpu_check.NAMES]
        sys.exit(gpu_check.main())
    """)
    command = [sys.executable, "-c", program, "--quick", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    rows = rows_of(json.loads((tmp_path / "out" / "results.json").read_text()))
    assert done.returncode == 1 and rows["device"]["outcome"] == "wrong"
    assert rows["the step"]["why"] == "there is no device"


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """An interpreter that has what we need, and nothing of ours: `.pth` files of the folders that it reads are not."""
    import transformers
    import triton

    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    homes = {str(Path(package.__file__).resolve().parents[1]) for package in (torch, triton, transformers)}
    (site / "there.pth").write_text("\n".join(sorted(homes)) + "\n")
    python = str(folder / "bin" / "python")
    program = (
        "import importlib.util as u; print([u.find_spec(name) for name in ('torch', 'miras_hf', 'miras_kernels')])"
    )
    found = subprocess.run([python, "-c", program], env=without_path(), capture_output=True, text=True).stdout
    assert found.startswith("[ModuleSpec(") and found.strip().endswith(", None, None]"), found
    return python


def without_path():
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | interpreted


@pytest.mark.parametrize(
    "script", ["benchmarks/correctness.py", "benchmarks/whole_models.py", "precompile.py", "tune.py"]
)
def test_scripts_of_the_day_with_a_gpu_need_nothing_installed_of_ours(bare, script, tmp_path):
    command = [bare, str(ROOT / "kernels" / script), "--help"]
    done = subprocess.run(command, env=without_path(), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr


def test_the_script_needs_nothing_installed_of_ours(bare, tmp_path):
    command = [
        bare,
        str(BENCHMARKS / "gpu_check.py"),
        "--quick",
        "--out",
        str(tmp_path / "out"),
        "--steps",
        "correctness",
    ]
    done = subprocess.run(
        [*command, "--only", "forward of matrix"], env=without_path(), capture_output=True, text=True, cwd=tmp_path
    )
    rows = rows_of(json.loads((tmp_path / "out" / "results.json").read_text()))
    assert done.returncode == 0 and rows and {row["outcome"] for row in rows.values()} == {"right"}, rows


def test_results_are_not_written_over(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    command = [sys.executable, str(BENCHMARKS / "gpu_check.py"), "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2 and "name another folder" in done.stderr


# -- pieces -----------------------------------------------------------------------------------------------------------


def test_a_tile_of_one_program_is_lost_in_the_norm_and_not_in_its_block():
    from comparison import TOKENS, Allowed, Comparison

    draw = torch.Generator().manual_seed(0)
    expected = torch.randn(4, 200, 8, 64, generator=draw)
    got = expected + 0.005 * torch.randn(expected.shape, generator=draw)
    got[2, 64 + 16 : 64 + 32, 5, 32:48] *= 0.8  # smaller than the largest number by far
    found = Comparison(64)
    found.add("y", got, expected, Allowed(0.25, 0.02, 0.03), TOKENS)
    assert found.errors["norm"] < 0.01 and found.errors["largest"] < 0.25
    assert "block error" in found.row()["why"] and "worst in block (2, 1, 5)" in found.row()["why"]
    # computed another way
    block = (got - expected)[2, 64:128, 5].norm() / (expected.norm() / (4 * 4 * 8) ** 0.5)
    assert found.errors["block"] == pytest.approx(block.item(), rel=1e-5)


@pytest.mark.parametrize(("size", "outcome"), [(0.0, None), (1e-5, None), (0.1, "wrong")])
def test_rounding_where_nothing_is_expected_is_right_and_a_number_is_not(size, outcome):
    from comparison import TOKENS, Allowed, Comparison

    # of numbers of size 0.5 by nature, float64 leaves 1e-17 where there is nothing, and float32 more
    expected = torch.zeros(1, 9, 2, dtype=torch.float64)
    expected[0, 3, 1] = 1e-17
    got = torch.zeros(1, 9, 2)
    got[0, 5, 0] = size
    found = Comparison(4)
    found.add("gradient of delta", got, expected, Allowed(0.02, 0.01, 0.02), TOKENS, scale=0.5)
    assert found.row().get("outcome") == outcome, found.row()
    # one of 18 numbers, alone in its block
    of_18 = {"largest": size / 0.5, "norm": size / (0.5 * 18**0.5)}
    assert {kind: found.errors[kind] for kind in of_18} == pytest.approx(of_18, rel=1e-5, abs=1e-15)
    # without a scale only zeros are nothing
    strict = Comparison(4)
    strict.add("state 0", got, torch.zeros_like(got), Allowed(0.02, 0.01, 0.02), TOKENS)
    assert strict.row().get("outcome") == ("wrong" if size else None)


@pytest.mark.parametrize("model", ["mixture", "yaad"])
def test_warm_up_calls_right_numbers_right_and_others_wrong(model, monkeypatch):
    import correctness
    import roundings
    from cases import CASES
    from comparison import Comparison
    from warm_up import shrunk

    cases = CASES["more"]("cpu", False)
    case = next(case for case in cases if (case.kind, case.model, case.shape.head_dim) == ("backward", model, 128))
    usual, nothing = correctness.make_inputs, 0
    for seed in (10, 14):
        monkeypatch.setattr(correctness, "make_inputs", lambda *given, seed=seed: usual(*given, seed=seed))
        prepared = correctness.Prepared(shrunk(case))
        names, got, expected, axes = roundings.gradients_of(prepared)
        scales = prepared.scales(prepared.expected()[0])
        for factor, outcome in ((1.0, None), (2.0, "wrong")):
            found = Comparison(64)
            for name, one, other, kind, scale in zip(names, got, expected, axes, scales, strict=True):
                found.add(name, factor * one, other, prepared.case.allowed(name), kind, scale)
            assert found.row().get("outcome") == outcome, found.row()
        nothing += expected[names.index("delta")].abs().max().item() < 1e-12
    # where no residual lies between delta and the clip, delta has no gradient
    assert nothing == (model == "mixture")


def spoilt(x):
    """16 tokens of a head with one tenth of 16 channels missing: what one program adds in one product of a pass."""
    x = x.clone()
    tile = (0, slice(16, 32), 0, slice(0, 16))
    x[tile] *= 0.9
    return x


@pytest.mark.parametrize("head_dim", [64, 128])
def test_what_is_allowed_in_bfloat16_passes_right_numbers_and_finds_a_tile(head_dim):
    import roundings
    from cases import Case
    from comparison import TOKENS, Comparison
    from correctness import Prepared
    from paths import Shape

    # other numbers than those that were measured: another length
    shape = Shape(2, 150, 1, head_dim, 64, device="cpu")
    for kind, name in (("forward", "y"), ("backward", "k"), ("backward", "v")):
        case = Case(kind, "yaad", shape)
        prepared = Prepared(case)
        if kind == "forward":
            got, expected = roundings.emulated(prepared)[0].to(shape.dtype), prepared.expected()[0]
        else:
            names, ours, right, _ = roundings.gradients_of(prepared)
            got, expected = (x[names.index(name)] for x in (ours, right))
        for x, outcome in ((got, None), (spoilt(got), "wrong")):
            found = Comparison(64)
            found.add(name, x, expected, case.allowed(name), TOKENS)
            assert found.row().get("outcome") == outcome, (kind, name, found.row())


def test_what_is_allowed_of_decoding_passes_right_numbers_and_finds_wrong_ones():
    import roundings
    from cases import Case
    from comparison import TOKENS, Comparison
    from paths import Shape

    case = Case("decode", "matrix", Shape(1, 2, 1, 128, 16, device="cpu"))
    right = roundings.of_decode(case)
    assert all(
        right.errors_of[name][kind] <= getattr(case.allowed(name), kind)
        for name in ("y", "state 0")
        for kind in ("largest", "norm", "block")
    ), right.errors_of
    # outputs are in bfloat16: some 0.0017 of their norm, whatever is right
    assert 0.0008 < right.errors_of["y"]["norm"] < 0.004
    draw = torch.Generator().manual_seed(0)
    expected = torch.randn(1, 2, 1, 128, generator=draw)
    found = Comparison(16)
    found.add("y", expected + 0.02 * torch.randn(expected.shape, generator=draw), expected, case.allowed("y"), TOKENS)
    assert found.row()["outcome"] == "wrong"


def test_bfloat16_errors_are_known_of_every_case_and_no_others():
    from cases import CASES, key, roundings

    cases = [case for part in CASES for quick in (False, True) for case in CASES[part]("cpu", quick)]
    cases = [case for case in cases if case.precision == "bf16"]
    assert {key(case) for case in cases} == set(roundings())
    for case in cases:
        name = "k" if case.kind == "backward" else "y"
        assert 0.001 < case.allowed(name).norm < 0.2 and case.allowed(name).norm <= case.allowed(name).block
    with pytest.raises(ValueError, match="lacks 'nothing' of 'forward of yaad, 64, C 64, channel gates'"):
        cases[0].allowed("nothing")


def test_bfloat16_errors_are_those_of_what_the_cases_are_now():
    import roundings
    from cases import ROUNDINGS, key

    norms = json.loads(ROUNDINGS.read_text())["norms"]
    cases = {
        key(case): case for case in reversed([*roundings.wanted()])
    }  # the first of those with one name was measured
    assert set(norms) == set(cases)
    of_right = {name: roundings.right_norm(case) for name, case in cases.items()}
    assert of_right == pytest.approx(norms, rel=1e-4)


def test_the_interpreter_rounds_to_the_nearest_number():
    from rounded_interpreter import nearest

    draw = torch.Generator().manual_seed(0)
    x = torch.randn(100000, generator=draw) * 10.0 ** torch.randint(-38, 38, (100000,), generator=draw)
    x = torch.cat((x, torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1.00390625, 1.01171875, 1.9999999])))
    assert (torch.from_numpy(nearest(x.numpy()).view("int16")) == x.bfloat16().view(torch.int16)).all()
    assert torch.from_numpy(nearest(torch.tensor([float("nan")]).numpy()).view("int16")).view(torch.bfloat16).isnan()


def test_a_report_that_cannot_be_drawn_costs_no_row(tmp_path):
    from record import Record
    from variants import report

    def never(rows):
        raise KeyError("ms")

    record = Record(tmp_path / "step.json", 60.0, report=never)
    record.check("one", lambda: {"ms": float("nan")})
    record.check("two", lambda: {"ms": 1.0})
    found = json.loads((tmp_path / "step.json").read_text())
    assert [row["outcome"] for row in found["rows"]] == ["wrong", "right"] and "KeyError" in found["report"][0]
    row = {"what": "a launch", "kernel": "mlp_forward", "ms": 1.0, "low": 1.0, "high": 1.0, "outcome": "wrong"}
    assert "| nan |" in report([row | {"shipped": True, "differs": "nan"}])[-1]


def test_gradients_are_of_a_random_adjoint_and_do_not_add_up():
    from paths import Shape, kernel_call

    device = "cuda" if torch.cuda.is_available() else "cpu"
    step = kernel_call("yaad", Shape(1, 9, 1, 32, 16, torch.float32, device), precision="ieee").training_step()
    one, other = step(), step()
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    # ones would leave nothing behind the layer norm but what goes around it, to q and the norm's affine
    assert all(x.abs().max() > 1e-6 for x in one)


def test_warm_up_knows_its_jobs_without_touching_the_device(monkeypatch):
    from launches import MOST, changed
    from variants import configured, shape_of
    from warm_up import jobs

    def touched(*args, **kwargs):
        raise AssertionError("a process that is forked from one that has touched the device cannot")

    for name in ("init", "_lazy_init", "is_available", "get_device_name", "get_device_properties", "device_count"):
        monkeypatch.setattr(torch.cuda, name, touched)
    found = list(jobs("cuda", False))
    # what takes longest begins first, and the main shape before the others
    assert len(found) > 100 and found[0].startswith("backward") and "16 x" not in found[0] and "1 x 64" in found[0]
    assert (
        max(
            len(changed(configured(f"mlp_{part}", shape_of(f"mlp_{part}", True, "cpu"))))
            for part in ("forward", "decode")
        )
        <= MOST
    )


def test_what_the_tools_say_is_read():
    from outcomes import NotChecked
    from tools import metrics, verdict

    assert verdict("done\n========= ERROR SUMMARY: 0 errors\n", 0) == {"reported": 0}
    race = "========= Warning: Race reported between Write access at a and Read access at b\ndone\n========= RACECHECK SUMMARY: "
    # by errors: a summary's first number counts warnings as well, and what is warned of stays in the row
    warned = verdict(race + "2 hazards displayed (0 errors, 2 warnings)", 0)
    assert "outcome" not in warned and (warned["reported"], warned["warnings"]) == (0, 2)
    assert warned["first_warning"] == "Warning: Race reported between Write access at a and Read access at b"
    found = verdict(race.replace("Warning", "Error") + "3 hazards displayed (1 error, 2 warnings)", 0)
    assert found["outcome"] == "wrong" and found["why"].startswith("1 reported, the first: Error: Race reported")
    clean = verdict("done\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0)
    assert clean == {"reported": 0, "warnings": 0}
    said = "========= Invalid __global__ read of size 4 bytes\ndone\n========= ERROR SUMMARY: 3 errors\n"
    assert verdict(said, 1)["outcome"] == "wrong" and "Invalid __global__ read" in verdict(said, 1)["why"]
    for nothing in ("", "done\n", "RuntimeError: no GPU\n========= ERROR SUMMARY: 0 errors\n"):
        with pytest.raises(NotChecked):
            verdict(nothing, 1)
    head = '"ID","Kernel Name","gpu__time_duration.sum","x_issue_stalled_wait_per_warp_active.ratio"'
    table = f'==PROF== x\n{head}\n"","","us",""\n"0","mlp_forward_kernel","12.5","1.75"\n'
    assert metrics(table) == {"stalls": {"wait": 1.75}, "gpu__time_duration.sum": "12.5 us"}
    assert metrics("==ERROR== ERR_NVGPUCTRPERM\n") == {}


@pytest.mark.parametrize(
    ("said", "option"),
    [
        ("  --kernel-regex arg   Filter\n  --kernel-regex-exclude arg", "--kernel-regex"),
        ("  --kernel-name arg   Filter\n  --kernel-regex arg   Deprecated", "--kernel-name"),
        ("  --kernel-name-exclude arg", "--kernel-regex"),
    ],
)
def test_the_sanitizer_is_kept_to_a_kernel_by_the_name_that_it_knows(tmp_path, said, option):
    from tools import of_kernel

    sanitizer = tmp_path / "compute-sanitizer"
    sanitizer.write_text(f"#!/bin/sh\ncat <<'END'\n{said}\nEND\n")
    sanitizer.chmod(0o755)
    assert of_kernel(str(sanitizer), "mlp_decode") == [option, "kns=mlp_decode"]


def test_out_of_memory_is_reported_and_not_fatal(monkeypatch):
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
    from tables import training

    lines = training(rows)
    # no Llama was measured at 16 tokens
    assert "| 125 | 1.25 | 16.0 | 0.25 |" in lines[-5] and "| 50 |  | 16.0 |  |" in lines[-4]


def test_table_names_the_length_that_overtakes_attention():
    from tables import overtaking

    times = {"yaad, Triton": {1024: 3.0, 2048: 2.0, 4096: 2.0}, "SDPA attention": {1024: 1.0, 2048: 2.0, 4096: 4.0}}
    rows = [
        {"path": path, "tokens": tokens, "ms": ms} for path, found in times.items() for tokens, ms in found.items()
    ]
    assert "faster than attention from T = 4096" in "\n".join(overtaking(rows))
    for row in rows:
        row["ms"] = 9.0 if "Triton" in row["path"] else 1.0
    assert "not faster than attention" in "\n".join(overtaking(rows))
