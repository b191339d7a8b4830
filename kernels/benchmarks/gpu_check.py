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
"""The standing GPU script: are the kernels right on this device, and how fast are they beside their neighbours?

    python3 kernels/benchmarks/gpu_check.py --out "$OUT/kernels"

A list of steps (`--list`) in order of worth, each a process of its own with a time limit of its own: a crash costs a row.
Whatever was looked at is right, wrong or not checked, and so is the run: exit code 0, 1 or 3. After every step, and while
it runs, `--out` holds all that is known: `results.json`, `results.md`, and `logs.zip` with what every process said.
`--minutes` fits into a command of ten; where it is not enough, go on in a second one with `--steps`.

A Triton cache that was filled before (`TRITON_CACHE_DIR`) saves minutes of compiling. Without a GPU,
`TRITON_INTERPRET=1 python kernels/benchmarks/gpu_check.py --quick --out quick` shows that every step runs; it times
nothing that means anything.
"""

import argparse
import datetime
import json
import os
import resource
import signal
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import supervise
from outcomes import EXIT_CODES, NOT_CHECKED, WRONG, count, worst
from steps import MINUTES, NAMES, STEPS, Step, add_common_arguments, common_arguments
from tables import write_report
from whole_files import write_whole


HERE = Path(__file__).resolve().parent
GRACE = 30.0
"""Seconds that a step has beyond its time for what it has begun: more than most kernels take to compile."""
LEAST = 4.0
"""Seconds without which no step is begun."""


class Run:
    """The steps of one run, what they found, and the files in `out`.

    Args:
        out (`Path`): where the files go.
        work (`Path`): a folder for what the steps write, which is packed into one file of `out`.
        minutes (`float`): when to begin nothing new.
        grace (`float`): seconds that a step has beyond its time.
        arguments (`list` of `str`): what every step is told.
    """

    def __init__(self, out: Path, work: Path, minutes: float, grace: float, arguments: list[str]):
        self.out, self.work, self.grace, self.arguments = out, work, grace, arguments
        self.started, self.minutes, self.no_device = time.monotonic(), minutes, ""
        begun = datetime.datetime.now().isoformat(timespec="seconds")
        self.results: dict = {"begun": begun, "minutes": minutes, "arguments": arguments, "steps": []}

    def take(self, step: Step) -> None:
        left = 60 * self.minutes - (time.monotonic() - self.started)
        entry = {"name": step.name, "about": step.what, "outcome": NOT_CHECKED, "seconds": 0.0}
        entry |= {"rows": [], "facts": {}, "report": []}
        why = self.no_device or (f"out of time: {max(left, 0.0):.0f} s left" if left < LEAST else "")
        if why:
            return self.keep(entry | {"rows": [{"what": "the step", "outcome": NOT_CHECKED, "why": why}]})
        command = supervise.python(HERE / f"{step.module}.py", "--part", step.part, *self.arguments)
        begun, used = time.monotonic(), cpu_seconds()
        print(f"== {step.name}: {step.what}", flush=True)
        self.results["steps"].append(entry)

        def progress(found: dict) -> None:
            outcome = worst([row["outcome"] for row in found["rows"]])
            entry.update(found, outcome=outcome, seconds=round(time.monotonic() - begun, 1))
            self.write()

        limit = min(left, step.seconds * self.minutes / MINUTES)
        found = supervise.run(
            command, self.work / f"{step.name}.json", self.work / f"{step.name}.log", limit, self.grace, progress
        )
        self.results["steps"].pop()
        spent = {"seconds": round(time.monotonic() - begun, 1), "cpu_s": round(cpu_seconds() - used, 1)}
        return self.keep(entry | found | spent)

    def keep(self, entry: dict) -> None:
        self.results["steps"].append(entry)
        print(f"{entry['name']}: {count(entry['rows'])}, {entry['seconds']:.0f} s", flush=True)
        for row in entry["rows"]:
            if row["outcome"] == WRONG:
                print(f"  WRONG {row['what']}: {row.get('why', '')}", flush=True)
        if entry["name"] == "machine":
            print("\n".join(entry["report"]), flush=True)
            lost = any(row["what"] == "device" and row["outcome"] == WRONG for row in entry["rows"])
            self.no_device = "there is no device" if lost else ""
        self.write()
        self.pack()

    def outcome(self) -> str:
        return worst([entry["outcome"] for entry in self.results["steps"]])

    def write(self) -> None:
        self.results["outcome"] = self.outcome()
        write_whole(self.out / "results.json", json.dumps(self.results, indent=1) + "\n")
        write_report(self.out)

    def pack(self) -> None:
        """All that the processes have written, in one file: what brings results home may carry few."""
        with zipfile.ZipFile(self.out / "logs.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(self.work.rglob("*")):
                if path.is_file():
                    archive.write(path, path.relative_to(self.work))


def cpu_seconds() -> float:
    """Of the processes of all steps that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder for results.json, results.md and logs.zip")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="begin nothing after so many; 7.5 by default")
    parser.add_argument("--steps", nargs="+", default=list(NAMES), choices=NAMES, metavar="STEP")
    parser.add_argument("--list", action="store_true", help="say what the steps are, and do nothing")
    parser.add_argument(
        "--grace", type=float, default=GRACE, help="seconds of a step beyond its time; then it is killed"
    )
    add_common_arguments(parser)
    args = parser.parse_args()
    if args.list:
        return args
    if args.out is None:
        parser.error("`--out` is needed: a folder for what is found")
    if (args.out / "results.json").exists():
        parser.error(f"{args.out} holds the results of a run already: name another folder")
    if os.environ.get("TRITON_INTERPRET") == "1" and not args.quick:
        parser.error("TRITON_INTERPRET=1 runs no kernel on a GPU; --quick shows that the script runs")
    return args


def main() -> int:
    args = parse_arguments()
    if args.list:
        print("\n".join(f"{step.name:17} {step.seconds:4.0f} s  {step.what}" for step in STEPS))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    # so that a step's processes are ended, and what is known written, if this one is asked to stop
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory() as work:
        run = Run(args.out, Path(work), args.minutes, args.grace, common_arguments(args))
        try:
            for step in (step for step in STEPS if step.name in args.steps):
                run.take(step)
        finally:
            run.write()
            run.pack()
    rows = [row for entry in run.results["steps"] for row in entry["rows"]]
    print(f"In all: {count(rows)}. {args.out / 'results.md'}", flush=True)
    return EXIT_CODES[run.outcome()]


if __name__ == "__main__":
    sys.exit(main())
