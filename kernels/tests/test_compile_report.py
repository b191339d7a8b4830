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

import importlib.metadata
import importlib.util
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
# of the newest Triton that was tried, and of the one that a machine with a GPU may have
HELD = {"3.9.0": NAMES, "3.6.0": ("sm_80", "sm_90", "sm_100")}
PAIRS = [(version, name) for version, names in HELD.items() for name in names]
SLOW = pytest.mark.slow
SHAPE = ("head_dim", "chunk_size", "precision")
# what a kernel's numbers stand on, in the order in which they are to be looked at
COUNTS = ("spilled_bytes_per_chunk", "spilled_bytes_per_tile", "shared", "instructions", "global_bytes", "local_bytes")


def report(name, version="3.9.0"):
    return json.loads((REPORTS / version / f"{name}.json").read_text(encoding="utf-8"))


def environment():
    # of a process of its own: this one may be the interpreter's, which compiles nothing
    paths = [str(ROOT / "kernels"), str(ROOT / "kernels" / "torch-ext")]
    return {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": os.pathsep.join(paths)}


def check(*arguments):
    command = [sys.executable, str(ROOT / "kernels" / "compile_report.py"), "--check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment())


@pytest.mark.parametrize("version, name", PAIRS)
def test_every_shipped_configuration_is_in_its_report(version, name):
    found = {
        (program["kernel"], *(program[part] for part in SHAPE), json.dumps(program["launch"]))
        for program in report(name, version)["programs"]
    }
    for kernel in KERNELS:
        for entry in entries(name, version)[kernel]:
            if entry["launch"] is None:  # nothing fits, nothing ships
                continue
            launch = json.dumps({"enable_fp_fusion": True, **entry["launch"]})
            assert (kernel, *(entry[part] for part in SHAPE), launch) in found, (kernel, entry)


def test_every_generic_file_has_a_report():
    assert set(NAMES) <= set(shipped())
    assert {(path.parent.name, path.stem) for path in REPORTS.glob("*/*.json")} == set(PAIRS)
    assert all(report(name, version)["triton"] == version for version, name in PAIRS)


@pytest.mark.parametrize("version, name", PAIRS)
def test_reports_fit_into_shared_memory(version, name):
    limit = {"default": 99, "sm_80": 163, "sm_90": 227, "sm_100": 227}[name]
    programs = report(name, version)["programs"]
    assert programs and max(program["counts"]["shared"] for program in programs) <= limit * 1024


@pytest.mark.parametrize("version, name", [pair for pair in PAIRS if pair[1] in ("sm_90", "sm_100")])
def test_the_main_shape_uses_its_generation_s_matrix_units(version, name):
    units = {"sm_90": "wgmma", "sm_100": "tcgen05"}[name]
    main = [p for p in report(name, version)["programs"] if tuple(p[part] for part in SHAPE) == (64, 64, "bf16")]
    # Triton 3.6 makes nothing of one of them, which is refused
    empty = {"delta_backward"} if (version, name) == ("3.6.0", "sm_100") else set()
    assert {p["kernel"] for p in main} >= set(KERNELS) - empty
    assert all(program["counts"][units] > 0 for program in main)


def state_of(program):
    # bytes of both weights, d x 4d each, or of a matrix memory's one
    return program["head_dim"] ** 2 * 4 * (8 if program["kernel"].startswith("mlp") else 1)


@pytest.mark.parametrize("version, name", PAIRS)
def test_no_program_spills_more_than_its_limit(version, name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "kernels"))
    from compile_report import LIMITS, over_limit

    assert over_limit(name, version, report(name, version)["programs"]) == []
    limits = json.loads(LIMITS.read_text(encoding="utf-8"))
    assert limits["triton"] == "3.9.0" and limits.keys() == {"triton", *NAMES}


@pytest.mark.parametrize(
    "kernel, shape, call",
    [("mlp_forward", (64, 32, "bf16"), "memora"), ("matrix_backward", (128, 64, "bf16"), "yaad")],
)
def test_a_program_that_spills_more_than_its_limit_is_named(kernel, shape, call, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "kernels"))
    from compile_report import LIMITS, over_limit

    limit = json.loads(LIMITS.read_text(encoding="utf-8"))["sm_90"][kernel][", ".join(map(str, shape))][call]
    program = dict(zip(SHAPE, shape, strict=True)) | {"kernel": kernel, "call": call}
    state = state_of(program)
    allowed = int(limit * state)

    def over(version, local_bytes, **changed):
        return over_limit("sm_90", version, [program | changed | {"counts": {"local_bytes": local_bytes}}])

    assert over("3.9.0", allowed) == over("3.6.0", 2 * (allowed + state)) == []
    described = f"sm_90: {kernel}, head_dim {shape[0]}, chunk_size {shape[1]}, {shape[2]}, {call}: spills"
    (words,) = over("3.9.0", allowed + 1)
    assert words.startswith(described)
    assert len(over("3.6.0", 2 * (allowed + state) + 2)) == 1
    # a program that is new has to be given one
    assert "has no limit in limits.json" in over("3.9.0", 0, head_dim=32, chunk_size=16, precision="ieee")[0]


@pytest.mark.parametrize("name", NAMES)
def test_limits_are_near_what_is_reported(name):
    """One that allows half as much again, and a state's bytes more, would let through what it stands for."""
    limits = json.loads((REPORTS / "limits.json").read_text(encoding="utf-8"))[name]
    for program in report(name)["programs"]:
        if "local_bytes" in program["counts"]:
            limit = limits[program["kernel"]][", ".join(str(program[part]) for part in SHAPE)][program["call"]]
            assert limit <= 1.5 * program["counts"]["local_bytes"] / state_of(program) + 1, program


# Two commands where one would do, for two workers: the backward kernel of an MLP memory compiles as long as all the others.
LONGEST = ("mlp_backward",)
OTHERS = tuple(kernel for kernel in KERNELS if kernel not in LONGEST)


@pytest.mark.parametrize(
    "name, kernels",
    [
        ("sm_90", OTHERS),
        ("sm_90", LONGEST),
        *(pytest.param(name, KERNELS, marks=SLOW) for name in NAMES if name != "sm_90"),
    ],
)
def test_programs_are_not_worse_than_reported(name, kernels):
    version = importlib.metadata.version("triton")
    if name not in HELD.get(version, NAMES):
        pytest.skip(f"there is no report of Triton {version} for {name}")
    few = () if os.environ.get("MIRAS_COMPILE_ALL") == "1" else ("--few",)
    done = check(name, *few, *(word for kernel in kernels for word in ("--kernel", kernel)))
    assert done.returncode == 0, done.stderr
    # one at least for each forward kernel, and for the other kernels of one file
    assert done.stdout.count("as reported") >= (len(kernels) if name == "sm_90" else 2), done.stdout


# As both versions print what they make of a program for Hopper; of the second, whose wait was put off, the shared memory
# that the product still reads may be written to.
WAITED = """
  %b_z1_401 = ttng.warp_group_dot %b_k_399, %b_w1_400, %cst_20 {inputPrecision = 0 : i32, isAsync = true} : !ttg.memdesc<>
  %b_z1_402:3 = ttng.warp_group_dot_wait %b_z1_401, %b_k_399, %b_w1_400 {pendings = 0 : i32} : tensor<64x64xf32, #mma>
  %c = arith.addf %b_z1_402#0, %cst_20 : tensor<64x64xf32, #mma>
"""
PUT_OFF = "\n".join(WAITED.split("\n")[i] for i in (0, 1, 3, 2, 4))
SYNCHRONOUS = WAITED.replace(", isAsync = true", "").replace("_wait", "")


@pytest.mark.parametrize(
    "ttgir, found, late", [(WAITED, 1, 0), (PUT_OFF, 1, 1), (SYNCHRONOUS, 0, 0), (2 * WAITED + PUT_OFF, 3, 1)]
)
def test_an_asynchronous_product_waits_for_its_result_on_the_next_line(ttgir, found, late, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "kernels"))
    from ahead_of_time import asynchronous_products

    asynchronous, unawaited = asynchronous_products(ttgir)
    assert (len(asynchronous), len(unawaited)) == (found, late)


# a launch as it ships, whose products are asynchronous and each waited for, made one where one is not; and one of more
# threads than a tile has numbers
REFUSED = """
from unittest.mock import patch
import ahead_of_time, compile_report
program, = [p for p in compile_report.programs("sm_90", "matrix_forward")
            if (p["head_dim"], p["chunk_size"], p["precision"], p["call"]) == (32, 64, "bf16", "memora")]
usual = ahead_of_time.asynchronous_products
def put_off(ttgir):
    asynchronous, unawaited = usual(ttgir)
    assert asynchronous and not unawaited, (asynchronous, unawaited)
    lines = ttgir.splitlines()
    i = next(i for i, line in enumerate(lines) if "warp_group_dot_wait" in line)
    return usual("\\n".join([*lines[:i], lines[i + 1], lines[i], *lines[i + 2:]]))
with patch.object(ahead_of_time, "asynchronous_products", put_off):
    try:
        compile_report.compile("sm_90", program)
    except RuntimeError as error:
        print(error)
call = compile_report.CALLS["moneta"].at("mlp_forward", 32, 16, "bf16")
try:
    ahead_of_time.compiled(call, {"TN": 16, "num_warps": 16, "num_stages": 1, "enable_fp_fusion": True}, 90)
except Exception as error:
    print(error)
"""


def test_compiling_refuses_a_late_wait_and_more_threads_than_numbers_of_a_tile():
    done = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True, env=environment())
    assert "matrix_forward goes on before an asynchronous product has its result" in done.stdout, done.stderr
    assert "more threads than one of its tiles has numbers" in done.stdout, done.stderr


# As the assembler prints it: a prologue with a loop of its own, a loop over chunks with a loop over tiles inside, what
# follows, and a barrier's waiting loop behind the end.
ASSEMBLED = """
        /*0000*/                   LDG.E.64 R2, desc[UR4][R2.64] ;           /* 0x0000000402027981 */
        /*0010*/                   STL [R1], R2 ;                            /* 0x0000000201007387 */
        /*0020*/               @P0 BRA 0x10 ;                                /* 0x0000000000000947 */
        /*0030*/               @P1 LDG.E.U16 R4, desc[UR4][R4.64+0x80] ;     /* 0x0000800404048981 */
        /*0040*/                   MUFU.RCP R5, R5 ;                         /* 0x0000000500057308 */
        /*0050*/                   LDL.LU.64 R6, [R1+0x8] ;                  /* 0x0000080001067983 */
        /*0060*/                   LDGSTS.E.BYPASS.128 [R7], [R8.64] ;       /* 0x0000000008077fae */
        /*0070*/                   MUFU.EX2 R9, R9 ;                         /* 0x0000000900097308 */
        /*0080*/                   NOP ;                                     /* 0x0000000000007918 */
        /*0090*/               @P2 BRA 0x60 ;                                /* 0xffffffc000002947 */
        /*00a0*/                   STG.E desc[UR4][R10.64], R9 ;             /* 0x000000090a007986 */
        /*00b0*/               @P3 BRA 0x30 ;                                /* 0xffffff7000003947 */
        /*00c0*/                   EXIT ;                                    /* 0x000000000000794d */
        /*00d0*/                   BRA 0xd0;                                 /* 0xfffffffc00fc7947 */
"""


def test_work_is_counted_once_a_chunk_and_once_for_each_of_its_tiles(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "kernels"))
    from ahead_of_time import work

    # of a chunk: 5 instructions at 0x30, 0x40, 0x50, 0xa0 and 0xb0, and of 4 tiles 3 each
    assert work(ASSEMBLED, tiles=4, threads=32) == {
        "instructions": 5 + 4 * 3,
        "special_functions": 1 + 4,
        "global_bytes": 32 * (2 + 4 * 16 + 4),
        "local_bytes": 32 * 8,
    }
    # a call that decodes has no loop over chunks: everything counts, each loop's part for each tile
    without = ASSEMBLED.replace("@P3 BRA 0x30", "BRA 0xc0")
    assert work(without, tiles=2, threads=1, every_chunk=False) == {
        "instructions": 8 + 2 * 2 + 2 * 3,
        "special_functions": 1 + 2,
        "global_bytes": 8 + 2 + 2 * 16 + 4,
        "local_bytes": 2 * 4 + 8,
    }


def test_every_launch_of_a_call_in_parts_is_counted(monkeypatch):
    """Where the first weight is not written, each launch of a forward pass has one row, and a backward pass its own."""
    monkeypatch.syspath_prepend(str(ROOT / "kernels"))
    import ahead_of_time
    import compile_report

    launches = {kernel: [] for kernel in ("mlp_forward", "mlp_backward")}
    for kernel, made in launches.items():
        module, name = ahead_of_time.KERNELS[kernel]

        class Counted:
            def __getitem__(self, grid, made=made):
                return lambda *arguments, **launch: made.append(launch.get("PART"))

        monkeypatch.setattr(module, name, Counted())
    calls = {name: call for name, call in compile_report.CALLS.items() if name.startswith("last")}
    ahead_of_time.run(calls["last"].at("mlp_backward", 64, 64, "bf16"))()
    parts = [launches["mlp_forward"][call.at("mlp_forward", 64, 64, "bf16").nth] for call in calls.values()]
    assert sorted(parts) == sorted(launches["mlp_forward"]) and len(set(parts)) == 3
    assert all(
        launches["mlp_backward"][call.at("mlp_backward", 64, 64, "bf16").nth] is None for call in calls.values()
    )


def test_a_report_s_table_holds_what_the_main_shape_does(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "kernels"))
    import compile_report

    program = {"kernel": "mlp_forward", "head_dim": 64, "chunk_size": 64, "precision": "bf16", "call": "plain"}
    counts = {
        "instructions": 7,
        "special_functions": 6,
        "global_bytes": 5,
        "local_bytes": 4,
        "registers": 3,
        "shared": 2,
    }
    programs = [program | {"counts": counts | {"wgmma": 1}}, program | {"head_dim": 128, "counts": counts}]
    lines = compile_report.table({"programs": programs}).split("\n")
    assert lines[2:] == ["| mlp_forward, plain | 7 | 6 | 5 | 4 | 3 | 2 | 1 |"]


# decorated without `triton.jit`, which makes something else of a function where kernels are interpreted
KERNEL = """
from typing import NamedTuple

from triton import JITFunction
from triton import language as tl

FOUR = tl.constexpr(4)


class Pair(NamedTuple):
    first: object


@JITFunction
def inner(x):
    return x * FOUR


@JITFunction
def kernel(x):
    return Pair(inner(x) + 1)
"""


@pytest.mark.parametrize(
    "before, after, changes",
    [
        ("    return Pair", '    "what it does"\n    # and why\n    return  Pair', False),
        ("FOUR =", "\n\nUNUSED = 5\nFOUR =", False),
        ("+ 1", "+ 2", True),
        ("first: object", "first: object\n    last: object", True),
        ("x * FOUR", "x + FOUR", True),  # of what it calls
        ("constexpr(4)", "constexpr(5)", True),
    ],
)
def test_a_source_s_digest_is_that_of_what_it_says(tmp_path, monkeypatch, before, after, changes):
    monkeypatch.syspath_prepend(str(ROOT / "kernels"))
    from source_digest import source_digest

    digests = []
    for i, text in enumerate((KERNEL, KERNEL.replace(before, after))):
        path = tmp_path / f"kernel_{i}.py"
        path.write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location("digested", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "digested", module)  # where a class's source is looked for
        spec.loader.exec_module(module)
        digests.append(source_digest(module.kernel))
    assert text != KERNEL and len(set(digests)) == 1 + changes


def test_a_source_that_is_not_understood_is_refused(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "kernels"))
    from source_digest import source_digest

    path = tmp_path / "kernel.py"
    path.write_text("import math\n" + KERNEL.replace("+ 1", "+ math.pi"), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("digested", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "digested", module)
    spec.loader.exec_module(module)
    with pytest.raises(TypeError, match="`math` in digested.kernel is neither .* got module"):
        source_digest(module.kernel)


def test_rows_of_another_source_are_named(tmp_path):
    script = """
import sys
from compile_report import main, programs, source_of, write
from pathlib import Path

kernel, folder = "matrix_decode", Path(sys.argv[1])
path = folder / sys.argv[2] / "sm_90.json"
of_today, of_another, of_none, *_ = ({**program, "counts": {}} for program in programs("sm_90", kernel))
of_today["source"], of_another["source"] = source_of(kernel), source_of("matrix_forward")
write(path, "sm_90", [of_today, of_another, of_none])
sys.argv[1:] = ["sm_90", "--stale", "--reports", str(folder)]
main()
"""
    command = [sys.executable, "-c", script, str(tmp_path), importlib.metadata.version("triton")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    first, *rows = done.stdout.splitlines()
    assert "2 of 3 rows" in first and len(rows) == 2 and all("matrix_decode" in row for row in rows)


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
    (tmp_path / "0.0").mkdir()
    for program in better["programs"]:
        program["counts"]["shared"] //= 4
    (tmp_path / "0.0" / "sm_90.json").write_text(json.dumps(better), encoding="utf-8")
    # and what no report holds
    (tmp_path / "0.0" / "sm_100.json").write_text(json.dumps(better | {"programs": []}), encoding="utf-8")
    done = check("sm_90", "sm_100", "--few", "--kernel", "matrix_forward", "--reports", str(tmp_path))
    assert done.returncode == 1
    assert "worse: sm_90: matrix_forward, head_dim 64, chunk_size 64, bf16, yaad: shared " in done.stderr
    assert "the report is of Triton 0.0" in done.stdout
    assert "sm_100: matrix_forward, head_dim 64, chunk_size 64, bf16, yaad: not in the report" in done.stderr
