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
"""A step's processes: started, watched, stopped at the time limit together with what they have started themselves.

A process that dies takes the row that it was at with it, and no other: that row is wrong, and a new process goes on behind
it. One that does not end is killed, and not tried again.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from outcomes import NOT_CHECKED, WRONG, worst


ATTEMPTS = 4
BROKEN_DEVICE = 70
"""Exit code of a step whose CUDA context does not answer any more: an illegal access stays with its process."""


class Ending(NamedTuple):
    """How a process ended that did not end well, and whether another one may go on behind what it did."""

    why: str
    go_on: bool


def read(path: Path) -> dict:
    """What a step has written down so far."""
    empty = {"rows": [], "facts": {}, "report": [], "doing": ""}
    return json.loads(path.read_text()) if path.is_file() else empty


def run(
    command: list[str], path: Path, log: Path, seconds: float, grace: float, progress: Callable[[dict], None]
) -> dict:
    """Runs a step to its end, whatever that is.

    Args:
        command (`list` of `str`): of its process, to which `--json` and `--seconds` are added.
        path, log (`Path`): where its rows and its output go.
        seconds (`float`): after which it begins nothing new, by itself.
        grace (`float`): seconds that it then has before it is killed.
        progress (`Callable`): called with what it has written, every few seconds.

    Returns:
        What it has written, with its `"outcome"`, and a wrong row for each process that died or had to be killed.
    """
    end = time.monotonic() + seconds
    for attempt in range(ATTEMPTS):
        ending = _attempt(command, path, log, end, grace, progress)
        if ending is None:
            break
        _lose_row(path, ending.why)
        if not ending.go_on or time.monotonic() > end:
            break
        if attempt == ATTEMPTS - 1:
            _append(path, "the rest of the step", NOT_CHECKED, f"{ATTEMPTS} of its processes died")
    found = read(path)
    if not found["rows"]:
        found["rows"] = [{"what": "the step", "outcome": NOT_CHECKED, "why": "it found nothing to do"}]
    return found | {"outcome": worst([row["outcome"] for row in found["rows"]])}


def _attempt(command, path, log, end, grace, progress) -> Ending | None:
    left = max(0.0, end - time.monotonic())
    with open(log, "ab") as output:
        process = subprocess.Popen(
            [*command, "--json", str(path), "--seconds", f"{left:.1f}"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        while process.poll() is None:
            if time.monotonic() > end + grace:
                return Ending(f"it did not end, and was killed {grace:g} s after its time of {left:.0f} s", False)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(min(5.0, max(0.05, end + grace - time.monotonic())))
            progress(read(path))
    finally:
        _kill(process)
        progress(read(path))
    if process.returncode == 0:
        return None
    if process.returncode < 0:
        why = f"its process died of {signal.Signals(-process.returncode).name}"
    else:
        why = f"its process ended with exit code {process.returncode}: {_last_line(log)}"
    return Ending(why, bool(read(path)["doing"]) or process.returncode == BROKEN_DEVICE)


def _kill(process: subprocess.Popen) -> None:
    """Ends what is left of a process and of all that it has started: compilers, profilers, workers."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sent)
        if process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(3.0)


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][-400:] if lines else "it said nothing"


def _lose_row(path: Path, why: str) -> None:
    found = read(path)
    # one that has said what is wrong, and ended because of it, has lost nothing
    if found["doing"] or not any(row["outcome"] == WRONG for row in found["rows"]):
        _append(path, found["doing"] or "the step", WRONG, why)


def _append(path: Path, what: str, outcome: str, why: str) -> None:
    found = read(path)
    found["rows"].append({"what": what, "outcome": outcome, "why": why})
    path.write_text(json.dumps(found | {"doing": ""}, indent=1) + "\n")


def python(script: Path, *arguments: str) -> list[str]:
    """The command of a script in a process like this one."""
    return [sys.executable, "-u", str(script), *arguments]
