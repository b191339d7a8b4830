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
it. One that does not end is killed, and not tried again: its row is not checked, because compiling may take longer than there
was time, unless it ran for minutes. What then is left of the step is listed by a last process, which begins nothing.
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
from whole_files import write_whole


ATTEMPTS = 4
HANG = 120.0
"""Seconds that a row may take, whatever has to be compiled for it: one that is killed later than that is wrong."""
LISTING = 20.0
"""Seconds that a process has for the names of what was not reached."""
BROKEN_DEVICE = 70
"""Exit code of a step whose CUDA context does not answer any more: an illegal access stays with its process."""


class Ending(NamedTuple):
    """How a process ended that did not end well, what that says of the row that it was at, and whether another one may go on
    behind what it did."""

    why: str
    outcome: str
    go_on: bool


def read(path: Path) -> dict:
    """What a step has written down so far."""
    empty = {"rows": [], "facts": {}, "report": [], "doing": "", "since": 0.0}
    return json.loads(path.read_text()) if path.is_file() else empty


def run(
    command: list[str], path: Path, log: Path, seconds: float, grace: float, progress: Callable[[dict], None]
) -> dict:
    """Runs a step to its end, whatever that is.

    Args:
        command (`list` of `str`): of its process, to which `--json` and `--end` are added.
        path, log (`Path`): where its rows and its output go.
        seconds (`float`): after which it begins nothing new, by itself.
        grace (`float`): seconds that it then has before it is killed.
        progress (`Callable`): called with what it has written, every few seconds.

    Returns:
        What it has written, with its `"outcome"`, a row for each process that died or had to be killed, and one that is not
        checked for each that was not reached.
    """
    end = time.monotonic() + seconds
    for attempt in range(ATTEMPTS):
        known = len(read(path)["rows"])
        ending = _attempt(command, path, log, end, grace, progress, known)
        if ending is None:
            break
        begun = path.is_file()
        _lose_row(path, ending, known)
        out_of_time, last = time.monotonic() > end, attempt == ATTEMPTS - 1
        if ending.go_on and not (out_of_time or last):
            continue
        if begun:
            why = f"{ATTEMPTS} of its processes died" if ending.go_on and last else ending.why
            _list_rest(command, path, log, "out of time" if ending.go_on and out_of_time else f"not reached: {why}")
        break
    found = read(path)
    if not found["rows"]:
        found["rows"] = [{"what": "the step", "outcome": NOT_CHECKED, "why": "it found nothing to do"}]
    return found | {"outcome": worst([row["outcome"] for row in found["rows"]])}


def _attempt(command, path, log, end, grace, progress, known) -> Ending | None:
    left = max(0.0, end - time.monotonic())
    process = _start([*command, "--json", str(path), "--end", f"{time.time() + left:.1f}"], log)
    try:
        while process.poll() is None:
            if time.monotonic() > end + grace:
                return _killed(read(path), f"killed {grace:g} s after the step's time of {left:.0f} s")
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(min(5.0, max(0.05, end + grace - time.monotonic())))
            progress(read(path))
    finally:
        _kill(process)
        progress(read(path))
    if process.returncode == 0:
        return None
    found = read(path)
    if process.returncode < 0:
        # what aborts at its end, after a row that was wrong, has lost its device as well
        go_on = bool(found["doing"]) or any(row["outcome"] == WRONG for row in found["rows"][known:])
        return Ending(f"its process died of {signal.Signals(-process.returncode).name}", WRONG, go_on)
    why = f"its process ended with exit code {process.returncode}: {_last_line(log)}"
    return Ending(why, WRONG, bool(found["doing"]) or process.returncode == BROKEN_DEVICE)


def _start(command: list[str], log: Path) -> subprocess.Popen:
    with open(log, "ab") as output:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )


def _killed(found: dict, how: str) -> Ending:
    if not found["doing"]:
        return Ending(f"it did not end, and was {how}", NOT_CHECKED, False)
    ran = time.time() - found["since"]
    why = f"it did not end in {ran:.0f} s, and was {how}"
    return Ending(why, WRONG if ran > HANG else NOT_CHECKED, False)


def _list_rest(command: list[str], path: Path, log: Path, why: str) -> None:
    """Has what the step has not reached written down as not checked, by a process of its own that has no time."""
    report = read(path)["report"]
    process = _start([*command, "--json", str(path), "--end", "0", "--why", why], log)
    try:
        listed = process.wait(LISTING) == 0
    except subprocess.TimeoutExpired:
        listed = False
    finally:
        _kill(process)
    # tables are of what was measured, which a process may know of itself alone
    write_whole(path, json.dumps(read(path) | {"report": report}, indent=1) + "\n")
    if not listed:
        _append(path, "the rest of the step", NOT_CHECKED, why)


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


def _lose_row(path: Path, ending: Ending, known: int) -> None:
    found = read(path)
    # one that has said what is wrong, and ended because of it, has lost nothing
    if found["doing"] or not any(row["outcome"] == WRONG for row in found["rows"][known:]):
        _append(path, found["doing"] or "the step", ending.outcome, ending.why)


def _append(path: Path, what: str, outcome: str, why: str) -> None:
    found = read(path)
    found["rows"].append({"what": what, "outcome": outcome, "why": why})
    write_whole(path, json.dumps(found | {"doing": ""}, indent=1) + "\n")


def python(script: Path, *arguments: str) -> list[str]:
    """The command of a script in a process like this one."""
    return [sys.executable, "-u", str(script), *arguments]
