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
"""What the compiler makes of every shipped launch configuration, without a GPU: `kernels/reports/<triton>/<name>.json`.

    python kernels/compile_report.py                                     # all again, an hour of one core
    python kernels/compile_report.py sm_90 --kernel matrix_forward       # what a change touches
    python kernels/compile_report.py --missing                           # what they lack of today's kernels, or go on
    python kernels/compile_report.py --stale                             # which rows are not of today's kernels, at once
    python kernels/compile_report.py sm_90 --main                        # the main shape alone
    python kernels/compile_report.py sm_90 --table                       # what the report holds of it, drawn as a table
    python kernels/compile_report.py --check --few                       # compare with the reports, a minute

A report holds, for each program: registers, stack and spills of a thread, shared memory, instructions of the matrix
units, and what it does in a chunk, or in a call that decodes: a thread's instructions and special functions, the bytes that
all threads move to and from global memory and their stacks. Each has a digest of the kernel's source, so that a row of
yesterday's kernel is known as one. `--table` prints that of the main shape. `--check` fails where
a program got worse, and leaves the reports alone. Each version of Triton has reports of its own, because each schedules
and spills differently; `make test-triton36` checks those of the oldest.
"""

import argparse
import functools
import json
import math
import re
import sys
from pathlib import Path

import triton
from ahead_of_time import CAPABILITIES, KERNELS, Call, compiled
from source_digest import source_digest

from miras_kernels import configuration
from miras_kernels.choices import Choices


REPORTS = Path(__file__).parent / "reports"
# By device, kernel, shape and call: how many times the bytes of its memory's state a program may move to and from its
# threads' stacks in a chunk, or in a call that decodes. A tenth above what was found when they were written. Reports are
# written anew by whoever changes a kernel, and what got worse away from the main shape shows here, not in a comparison
# with a report that is as new: a limit is raised by hand, with the reason in the commit's message
LIMITS = REPORTS / "limits.json"

# Each link, each loss, both granularities of gates and of thresholds, each thing that a call may ask for, once.
CALLS = {
    "plain": Call(Choices(attentional_bias="l2", retention="decay")),
    "moneta": Call(Choices(attentional_bias="lp", retention="lq")),
    "yaad": Call(Choices(attentional_bias="huber_mixture", retention="decay"), continues=True, keeps=True),
    "memora": Call(Choices(attentional_bias="l2", retention="kl")),
    "mirror": Call(
        Choices(attentional_bias="huber_coordinate", retention="lq_mirror"), continues=True, keeps=True, padded=True
    ),
    "head gates": Call(
        Choices(attentional_bias="huber_norm", retention="decay", decay_target="zero"),
        channel_gates=False,
        save_every=4,
    ),
    # on Hopper alone; of the forward pass the chain of writes, and what is made of all chunks at once
    "last, features": Call(Choices(update_layers="last"), nth=0),
    "last": Call(Choices(update_layers="last"), nth=1),
    "last, reads": Call(Choices(update_layers="last"), nth=2),
    # of the kernels of the delta rule: KDA, and all that a call may ask for
    "delta": Call(
        Choices("matrix", decay_target="zero", weight_cap=None, learning_algorithm="delta_rule"),
    ),
    "delta, begun": Call(Choices("matrix", learning_algorithm="delta_rule"), continues=True, keeps=True, padded=True),
}
MAIN = (64, 64, "bf16")

# A program is worse when it spills more bytes, or takes more shared memory, than `factor` times the report's and `bytes`
# more, or does that much more in a chunk, or no longer uses matrix units. The same sources under the same Triton give the
# same counts. But register allocation is a heuristic: a few lines anywhere in a kernel move some spills, and a change that
# does no more than that should not have to redo the reports. Another Triton schedules everything anew.
SLACK = {"factor": 1.15, "bytes": 64}
SLACK_OF_ANOTHER_TRITON = {"factor": 2.0, "bytes": 512}
WORK = ("instructions", "special_functions", "global_bytes", "local_bytes")
NOT_MORE = ("spilled_bytes_per_chunk", "spilled_bytes_per_tile", "shared", *WORK)
NOT_NONE = ("wgmma", "tcgen05", "mma")


def programs(name: str, kernel: str) -> list[dict]:
    """What a report has to hold: all calls at the main shape, one or two of those that spill most at the others."""
    wanted = []
    for entry in configuration.entries(name).get(kernel, ()):
        if entry["launch"] is None:
            continue
        shape = (entry["head_dim"], entry["chunk_size"], entry["precision"])
        last = {"mlp_forward": ["last, features", "last", "last, reads"], "mlp_backward": ["last"]}
        last = last.get(kernel, []) if name == "sm_90" else []
        calls = [call for call in CALLS if not call.startswith(("last", "delta")) or call in last]
        if shape != MAIN:
            calls = ["memora"] if shape[2] == "bf16" else ["yaad"]
            if (kernel, shape[2]) == ("mlp_forward", "bf16"):
                calls.append("yaad")  # which of the two spills more depends on the shape
        if kernel.endswith("_backward"):
            # half a minute each
            calls = ["plain", "yaad", *last] if shape == MAIN else ["yaad"]
        if kernel.startswith("delta"):
            calls = ["delta", "delta, begun"] if shape == MAIN else ["delta, begun"]
        if name != "sm_90" or kernel.endswith("_decode"):
            calls = [call for call in calls if call not in ("plain", "delta")]  # of the README's table
        wanted += [(shape, call) for call in calls]
    # widths between the entries' take a neighbour's launch
    if not kernel.endswith("_backward") and not kernel.startswith("delta"):
        wanted += [((head_dim, *MAIN[1:]), "yaad") for head_dim in (48, 96)]
    found = []
    for (head_dim, chunk_size, precision), call in wanted:
        shape = {"head_dim": head_dim, "chunk_size": chunk_size, "precision": precision}
        launch = configuration.launch_configuration(kernel, device=name, **shape)
        found.append({"kernel": kernel, **shape, "call": call, "launch": launch})
    return found


def compile(name: str, program: dict) -> dict[str, int]:
    call = CALLS[program["call"]].at(program["kernel"], *shape_of(program))
    counts = compiled(call, program["launch"], CAPABILITIES[name][0])
    if counts["shared"] > CAPABILITIES[name][1] * 1024:
        raise RuntimeError(
            f"{describe(name, program)} takes {counts['shared']} bytes of shared memory, "
            f"more than the {CAPABILITIES[name][1]} KiB there are."
        )
    return counts


def describe(name: str, program: dict) -> str:
    shape = f"head_dim {program['head_dim']}, chunk_size {program['chunk_size']}, {program['precision']}"
    return f"{name}: {program['kernel']}, {shape}, {program['call']}"


def key(program: dict) -> dict:
    return {name: value for name, value in program.items() if name not in ("source", "counts")}


@functools.cache
def source_of(kernel: str) -> str:
    module, attribute = KERNELS[kernel]
    return source_digest(getattr(module, attribute))


def is_todays(program: dict) -> bool:
    return program.get("source") == source_of(program["kernel"])


def worse(reported: dict[str, int], counts: dict[str, int], slack: dict[str, float]) -> list[str]:
    """In what `counts` is worse than `reported`, in words."""
    more = [
        f"{name} {counts[name]}, reported {reported[name]}"
        for name in NOT_MORE
        # what was reported before it was counted bounds nothing
        if name in reported and counts[name] > slack["factor"] * reported[name] + slack["bytes"]
    ]
    gone = [f"no {name}, reported {reported[name]}" for name in NOT_NONE if reported[name] and not counts[name]]
    # one generation's units may take over from another's, as long as they are not the slower ones
    return more + [words for words in gone if not (words.startswith("no mma") and counts["wgmma"] + counts["tcgen05"])]


def over_limit(name: str, version: str, programs: list[dict]) -> list[str]:
    """Which programs move more to and from their threads' stacks, in a chunk or in a call that decodes, than `LIMITS` allow.

    Args:
        name (`str`): of the report.
        version (`str`): the report's Triton. Of another than the limits' a state more is allowed, and twice as much.
        programs (`list[dict]`): its programs. Those from before bytes were counted are passed over.

    Returns:
        A sentence for each, and for each that has no limit.
    """
    limits, found = json.loads(LIMITS.read_text(encoding="utf-8")), []
    for program in programs:
        if "local_bytes" not in program["counts"]:
            continue
        shape = f"{program['head_dim']}, {program['chunk_size']}, {program['precision']}"
        limit = limits.get(name, {}).get(program["kernel"], {}).get(shape, {}).get(program["call"])
        choices = CALLS[program["call"]].at(program["kernel"], *shape_of(program)).choices
        numbers = sum(math.prod(weight) for weight in choices.weight_shapes(program["head_dim"]))
        states = program["counts"]["local_bytes"] / (4 * numbers)
        words = f"{describe(name, program)}: spills {states:.1f} times its state"
        if limit is None:
            found.append(f"{words}, which has no limit in {LIMITS.name}")
            continue
        if version != limits["triton"]:
            limit = SLACK_OF_ANOTHER_TRITON["factor"] * (limit + 1.0)
        if states > limit:
            found.append(f"{words}, allowed {limit:.1f}")
    return found


def path_of_report(reports: Path, name: str) -> Path:
    """Where this Triton's report is, or is to be; of a Triton that has none, the newest of another."""
    own = reports / triton.__version__ / f"{name}.json"
    others = sorted(
        reports.glob(f"*/{name}.json"), key=lambda path: [int(n) for n in re.findall(r"\d+", path.parent.name)]
    )
    return own if own.is_file() or not others else others[-1]


def check(name: str, wanted: list[dict], report: dict) -> list[str]:
    same = report["triton"] == triton.__version__
    if not same:
        print(
            f"{name}: the report is of Triton {report['triton']}, this is {triton.__version__}: compared with more slack, "
            f"{SLACK_OF_ANOTHER_TRITON} instead of {SLACK}."
        )
    failures = []
    for program in wanted:
        reported = next((found for found in report["programs"] if key(found) == program), None)
        if reported is None:
            failures.append(f"{describe(name, program)}: not in the report with launch {program['launch']}")
            continue
        counts = compile(name, program)
        found = worse(reported["counts"], counts, SLACK if same else SLACK_OF_ANOTHER_TRITON)
        failures += [f"{describe(name, program)}: {words}" for words in found]
        of = "" if is_todays(reported) else " (of another source)"
        print(describe(name, program), ("; ".join(found) or "as reported") + of, flush=True)
    return failures


def shape_of(program: dict) -> tuple[int, int, str]:
    return program["head_dim"], program["chunk_size"], program["precision"]


def is_main(program: dict) -> bool:
    return shape_of(program) == MAIN


def table(report: dict) -> str:
    """What programs of the main shape do in a chunk, or in a call that decodes, in Markdown."""
    columns = ("program", *WORK, "registers", "shared", "wgmma")
    rows = [columns, ["---"] * len(columns)]
    for program in filter(is_main, report["programs"]):
        counts = program["counts"]
        rows.append([f"{program['kernel']}, {program['call']}", *(f"{counts.get(name, '')}" for name in columns[1:])])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def write(path: Path, name: str, found: list[dict]) -> None:
    order = [program for kernel in KERNELS for program in programs(name, kernel)]
    found = sorted(found, key=lambda program: order.index(key(program)) if key(program) in order else len(order))
    capability, shared = CAPABILITIES[name]
    head = {"command": f"python kernels/compile_report.py {name}", "triton": triton.__version__}
    head |= {"capability": capability, "shared_memory_kib": shared}
    lines = ",\n".join("    " + json.dumps(program) for program in found)
    text = json.dumps(head, indent=2).removesuffix("\n}") + ',\n  "programs": [\n' + lines + "\n  ]\n}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(CAPABILITIES)}; all by default")
    parser.add_argument("--kernel", choices=KERNELS, action="append")
    parser.add_argument("--check", action="store_true", help="compare with the reports instead of writing them")
    parser.add_argument("--main", action="store_true", help="only the main shape; what is reported of others stays")
    parser.add_argument("--table", action="store_true", help="print what a report holds of the main shape")
    parser.add_argument(
        "--missing", action="store_true", help="compile only what the reports do not hold yet of today's kernels"
    )
    parser.add_argument("--stale", action="store_true", help="print which rows are of other kernels than today's")
    parser.add_argument(
        "--few",
        action="store_true",
        help="only the main shape as one model uses it; on others than sm_90 of forward kernels only",
    )
    parser.add_argument("--reports", type=Path, default=REPORTS, help="folder of the reports")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(CAPABILITIES):
        parser.error(f"names must be of {', '.join(CAPABILITIES)}, got {', '.join(sorted(unknown))}.")
    if arguments.few and not arguments.check:
        parser.error("--few needs --check: a report holds everything.")

    kernels, failures = arguments.kernel or list(KERNELS), []
    for name in arguments.names or CAPABILITIES:
        wanted = [program for kernel in kernels for program in programs(name, kernel)]
        path = path_of_report(arguments.reports, name)
        report = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"triton": None, "programs": []}
        if arguments.main:
            wanted = list(filter(is_main, wanted))
        if arguments.stale:
            stale = [
                program for program in report["programs"] if program["kernel"] in kernels and not is_todays(program)
            ]
            print(
                f"{name}, Triton {report['triton']}: {len(stale)} of {len(report['programs'])} rows are of other kernels."
            )
            for program in stale:
                print(describe(name, program))
            continue
        if arguments.table:
            print(f"{name}, Triton {report['triton']}\n\n{table(report)}\n")
            continue
        if arguments.check:
            if arguments.few:
                wanted = [
                    program for program in wanted if is_main(program) and program["call"] in ("yaad", "delta, begun")
                ]
                if name != "sm_90":
                    wanted = [program for program in wanted if program["kernel"].endswith("_forward")]
            failures += check(name, wanted, report)
            continue
        path = arguments.reports / triton.__version__ / f"{name}.json"
        own = report["programs"] if report["triton"] == triton.__version__ else []
        # those of other kernels and, with --main, of other shapes stay; with --missing, also those that are still wanted
        found = [p for p in own if p["kernel"] not in kernels or (arguments.main and not is_main(p))]
        if arguments.missing:
            found += [program for program in own if key(program) in wanted and is_todays(program)]
        if found != own:
            write(path, name, found)
        held = [key(program) for program in found]
        for program in wanted:
            if program in held:
                continue
            counts = compile(name, program)
            print(describe(name, program), counts, flush=True)
            found.append(program | {"source": source_of(program["kernel"]), "counts": counts})
            write(path, name, found)
        failures += over_limit(name, triton.__version__, found)
    for failure in failures:
        print("worse:", failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
