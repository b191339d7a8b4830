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
"""What one step of the GPU script found, written down as it comes: a step that is killed keeps what it has.

A step's process names what it is about to do before it does it, so that whoever finds it dead knows where it died. Started
again on the same file it goes on behind that.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import faults
from outcomes import NOT_CHECKED, RIGHT, WRONG, NotChecked
from steps import add_common_arguments
from supervise import BROKEN_DEVICE
from whole_files import write_whole


class Record:
    """Rows, each right, wrong or not checked, and facts beside them.

    Args:
        path (`Path`): of the file; rows that it has already are not taken again.
        seconds (`float`): from now on; what would begin later is not checked, and said so.
        why (`str`): what is said of that.
        only (`str`): rows whose name does not hold it are left out.
        report (`Callable`, *optional*): lines of Markdown from the rows so far.
    """

    def __init__(
        self,
        path: Path,
        seconds: float,
        only: str = "",
        report: Callable[[list[dict]], list[str]] | None = None,
        why: str = "out of time",
    ):
        found = json.loads(path.read_text()) if path.is_file() else {}
        self.path, self.only, self.report, self.why = path, only, report, why
        self.rows: list[dict] = found.get("rows", [])
        self.facts: dict = found.get("facts", {})
        self.end = time.monotonic() + seconds
        self.done = {row["what"] for row in self.rows}
        self.doing, self.since = "", 0.0

    def wanted(self, what: str) -> bool:
        return what not in self.done and self.only in what

    def check(self, what: str, call: Callable[[], dict]) -> None:
        """Takes a row: what `call` returns, which is right unless it says something else under `"outcome"`.

        A number that is not finite makes any row wrong, and so does an exception other than `NotChecked`.
        """
        if not self.wanted(what) or self.out_of_time(what):
            return
        self.start(what)
        faults.before(what)
        started = time.monotonic()
        try:
            row = call()
        except (NotChecked, ModuleNotFoundError) as error:
            row = {"outcome": NOT_CHECKED, "why": str(error)}
        except Exception as error:
            row = {"outcome": WRONG, "why": f"{type(error).__name__}: {error}"[:600]}
        strange = [key for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
        if strange:
            row |= {"outcome": WRONG, "why": "; ".join([*filter(None, [row.get("why")]), f"not finite: {strange}"])}
            row |= {key: str(row[key]) for key in strange}
        self.add(what, row | {"took_s": round(time.monotonic() - started, 2)})
        if row.get("outcome") == WRONG and device_is_broken():
            # not sys.exit: destructors of what is on a lost device may abort, and another exit code comes of it
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(BROKEN_DEVICE)

    def start(self, what: str) -> None:
        """Says what is about to be done, and since when."""
        self.doing, self.since = what, time.time()
        self.write()

    def add(self, what: str, row: dict) -> None:
        row = {"what": what, "outcome": RIGHT, **row}
        self.rows.append(row)
        self.done.add(what)
        self.doing = ""
        print(json.dumps(row), flush=True)
        self.write()

    def not_checked(self, what: str, why: str) -> None:
        if self.wanted(what):
            self.add(what, {"outcome": NOT_CHECKED, "why": why[:600]})

    def out_of_time(self, what: str) -> bool:
        if time.monotonic() < self.end:
            return False
        self.not_checked(what, self.why)
        return True

    def write(self) -> None:
        try:
            lines = self.report(self.rows) if self.report else []
        except Exception as error:  # a table that is not drawn must not cost the rows that are still to come
            lines = [f"The report was not drawn: {type(error).__name__}: {error}"]
        found = {"rows": self.rows, "facts": self.facts, "report": lines, "doing": self.doing, "since": self.since}
        write_whole(self.path, json.dumps(found, indent=1) + "\n")


def device_is_broken() -> bool:
    """Whether this process has lost its device: after an illegal access nothing that it says is of use."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except Exception as error:
        print(f"the device does not answer any more: {error}", flush=True)
        return True
    return False


def begin(
    description: str, report: Callable[[list[dict]], list[str]] | None = None
) -> tuple[Record, argparse.Namespace]:
    """The record and the arguments of a step's process."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True, help="where the rows go")
    # not how long from now on: what is imported before takes of the step's time
    parser.add_argument(
        "--end", type=float, default=math.inf, help="what has not begun by then, in seconds since 1970"
    )
    parser.add_argument("--why", default="out of time", help="what is said of that")
    parser.add_argument("--part", default="", help="of the step's work")
    add_common_arguments(parser)
    args = parser.parse_args()
    args.device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
    record = Record(args.json, args.end - time.time(), args.only, report, args.why)
    return record, args
