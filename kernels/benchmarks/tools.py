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
"""The kernels under NVIDIA's tools, where they are there: compute-sanitizer for races, ncu for what a kernel waits for."""

import csv
import io
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

from outcomes import WRONG, NotChecked, listed
from record import Record, begin
from supervise import python


HERE = Path(__file__).resolve().parent
PLACES = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
# racecheck sees what lies between barriers of a program in shared memory, memcheck what lies outside of tensors
CHECKS = ("racecheck", "memcheck")
SECTIONS = ("SpeedOfLight", "WarpStateStats", "MemoryWorkloadAnalysis", "SourceCounters", "LaunchStats", "Occupancy")


def main() -> None:
    record, args = begin(__doc__, listed)
    if args.part == "sanitizer":
        for check in CHECKS:
            for kernel in ("mlp_decode", "mlp_backward"):
                record.check(f"{kernel} under {check}", lambda at=(check, kernel): sanitize(record, *at))
    else:
        for kernel in ("mlp_forward", "mlp_backward"):
            record.check(f"{kernel} under ncu", lambda kernel=kernel: profile(record, kernel))


def tool(name: str) -> str:
    """The tool's path.

    Raises:
        `NotChecked`: if it is not there.
    """
    found = shutil.which(name, path=PLACES)
    if found is None:
        raise NotChecked(f"no such tool: {name}")
    return found


def said_by(record: Record, command: list[str], log: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs a tool in the time that the step has left; what it said stays beside the step's rows."""
    left = max(5.0, record.end - time.monotonic())
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=min(left, 600.0), env=os.environ | environment
        )
    except subprocess.TimeoutExpired as error:
        raise NotChecked(f"{Path(command[0]).name} did not end in {left:.0f} s") from error
    record.path.with_name(log).write_text(f"{command}\n{done.stdout}\n{done.stderr}")
    return done


def sanitize(record: Record, check: str, kernel: str) -> dict:
    sanitizer = tool("compute-sanitizer")
    command = [sanitizer, "--tool", check, *of_kernel(sanitizer, kernel)]
    command += python(HERE / "one_call.py", kernel, "--heads", "1")
    # the caching allocator's blocks are larger than tensors, and hide what lies outside of them
    done = said_by(record, command, f"{check}-{kernel}.txt", PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    return verdict(done.stdout + done.stderr, done.returncode)


def of_kernel(sanitizer: str, kernel: str) -> list[str]:
    """The words that keep compute-sanitizer to a kernel: of 2025.3 under a new name, which earlier ones do not know."""
    said = subprocess.run([sanitizer, "--help"], capture_output=True, text=True, timeout=60.0)
    option = "--kernel-name" if re.search(r"--kernel-name\b(?!-)", said.stdout + said.stderr) else "--kernel-regex"
    return [option, f"kns={kernel}"]


def verdict(text: str, exit_code: int) -> dict:
    """What compute-sanitizer's last words come to; without a summary nothing was looked at."""
    found = re.search(r"ERROR SUMMARY:\s*(\d+) errors?|RACECHECK SUMMARY:.*\((\d+) errors?, (\d+) warnings?\)", text)
    if found is None or "done" not in text.splitlines():
        last = next((line for line in reversed(text.splitlines()) if line.strip()), "nothing")
        raise NotChecked(f"no summary, exit code {exit_code}: {last}")
    # "hazards displayed" are both; what racecheck warns of may be meant, as between threads of a warp
    number = int(found[1] or found[2])
    row: dict = {"reported": number}
    if found[3] is not None:
        row |= {"warnings": int(found[3])}
        warned = next((line.strip(" =") for line in text.splitlines() if "Warning" in line), "")
        row |= {"first_warning": warned} if warned else {}
    if number:
        first = next(
            (line for line in text.splitlines() if "Error" in line or "Race" in line or "Invalid" in line), ""
        )
        return row | {"outcome": WRONG, "why": f"{number} reported, the first: {first.strip(' =')}"}
    return row


def profile(record: Record, kernel: str) -> dict:
    command = [tool("ncu"), "--clock-control", "none", "--kernel-name", f"regex:{kernel}_kernel"]
    command += ["--launch-skip", "0", "--launch-count", "1", "--csv", "--page", "raw"]
    command += [word for section in SECTIONS for word in ("--section", section)]
    command += python(HERE / "one_call.py", kernel, "--batch", "8", "--heads", "16", "--tokens", "512")
    done = said_by(record, command, f"ncu-{kernel}.csv")
    found = metrics(done.stdout)
    if not found:
        last = next((line for line in reversed((done.stdout + done.stderr).splitlines()) if line.strip()), "nothing")
        raise NotChecked(f"no metrics, exit code {done.returncode}: {last}")
    return found


def metrics(text: str) -> dict:
    """Of ncu's table the stall reasons, largest first, and traffic to memory, to the L2 and to the threads' own stacks."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    rows = list(csv.DictReader(io.StringIO("\n".join(lines))))
    if len(rows) < 2:  # units come first
        return {}
    units, values = rows[0], rows[1]
    wanted = (
        "gpu__time_duration.sum",
        "dram__bytes",
        "lts__t_bytes.sum",
        "local",
        "registers_per_thread",
        "sm__throughput",
    )
    found = {k: f"{v} {units[k]}".strip() for k, v in values.items() if k and any(name in k for name in wanted)}
    stalls = {
        k: float(v.replace(",", "")) for k, v in values.items() if k and "issue_stalled" in k and "ratio" in k and v
    }
    largest = sorted(stalls, key=lambda name: -stalls[name])[:8]
    return {
        "stalls": {re.sub(r".*issue_stalled_(\w+?)(?:_per.*)?\.ratio", r"\1", k): stalls[k] for k in largest},
        **found,
    }


if __name__ == "__main__":
    main()
