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
"""Every kernel that the later steps launch, compiled or loaded from Triton's cache, each in a process of its own.

A backward kernel takes half a minute to compile: one after the other they would take the whole run. A process makes one
small call and leaves its binaries in the cache. Where they are there already it takes a second or two.

That the call runs, and that its results are finite and of the right order, is all that a row here says. What right results in
bfloat16 are off was measured of more rows and chunks than the call has, and is for the steps that follow to ask.
"""

import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import compilations
import memory_alone  # noqa: F401
import torch
import variants
from cases import CASES, Case
from correctness import check
from launches import MOST, changed
from outcomes import NOT_CHECKED, WRONG, NotChecked
from paths import small
from record import Record, begin
from whole_files import write_whole


WORKERS = 14
JOB = 90.0
"""Seconds that one call may take."""
MARGIN = 10.0
"""How many times what the later steps allow: kernels that run and write something else are off by all of it."""


def main() -> None:
    record, args = begin(__doc__, report)
    wanted = {what: job for what, job in jobs(args.device, args.quick).items() if record.wanted(what)}
    run(record, wanted, min(WORKERS, 2 if args.quick else max(2, (os.cpu_count() or 2) - 2)))


def jobs(device: str, quick: bool) -> dict[str, Callable[[], dict]]:
    """Calls by name, what is needed first and what takes longest before the rest."""
    order = {"backward": 0, "forward": 1, "decode": 2}
    found: dict[str, Callable[[], dict]] = {}
    for part in CASES:
        cases = sorted(CASES[part](device, quick), key=lambda case: order[case.kind])
        if quick:
            cases = [case for case in cases if case.model == "matrix" and case.kind == "forward" and case.packed]
        for case in cases:
            one = shrunk(case)
            found.setdefault(str(one), partial(check, one))
        if part == "main":
            found |= variant_jobs(device, quick)
    return found


def shrunk(case: Case) -> Case:
    """A case for which the same binaries are launched, on two chunks and a piece, of one head."""
    shape = small(case.shape)
    # packed sequences need room, and a row without tokens has another beside it
    shape = replace(shape, tokens=max(shape.tokens, 80)) if case.packed else shape
    return replace(case, shape=shape, repeats=1, margin=MARGIN)


def variant_jobs(device: str, quick: bool) -> dict[str, Callable[[], dict]]:
    """Launches by number: what they are is looked up by the device's name, in a process that may touch the device."""
    if quick:
        return {}
    return {
        f"{kernel}, variant {number}": partial(take_variant, kernel, number, device)
        for kernel in ("mlp_backward", "mlp_forward", "mlp_decode")
        for number in range(1, MOST)
    }


def take_variant(kernel: str, number: int, device: str) -> dict:
    shape = small(variants.shape_of(kernel, False, device))
    launches = changed(variants.configured(kernel, shape))
    if number >= len(launches):
        return {"launch": None}
    at = replace(shape, tokens=1) if kernel == "mlp_decode" else shape
    return {"launch": launches[number], **variants.once(kernel, at, launches[number])}


def run(record: Record, wanted: dict[str, Callable[[], dict]], workers: int) -> None:
    """Takes the jobs in order, so many at a time; a process that dies is a wrong row, what is left at the end of time not
    checked."""
    if torch.cuda.is_initialized():
        raise RuntimeError("this process has touched the device: those that it starts could not")
    context = multiprocessing.get_context("fork")
    waiting, running = list(wanted), {}
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            now = time.monotonic()
            while waiting and len(running) < workers and now < record.end:
                what = waiting.pop(0)
                path = Path(folder) / f"{len(wanted) - len(waiting)}.json"
                process = context.Process(target=attempt, args=(wanted[what], path))
                process.start()
                running[process] = (what, path, now)
            if not running:
                break
            multiprocessing.connection.wait([process.sentinel for process in running], timeout=1.0)
            for process, (what, path, begun) in list(running.items()):
                late = time.monotonic() > min(record.end, begun + JOB)
                if process.is_alive() and late:
                    process.kill()
                process.join(0 if process.is_alive() else None)
                if process.is_alive():
                    continue
                del running[process]
                record.add(what, row_of(process.exitcode, path, late) | {"took_s": round(time.monotonic() - begun, 1)})
    for what in waiting:
        record.not_checked(what, record.why)


def row_of(exit_code: int, path: Path, late: bool) -> dict:
    if path.is_file():
        return json.loads(path.read_text())
    if late:
        return {"outcome": NOT_CHECKED, "why": "out of time: it did not end"}
    why = f"died of {signal.Signals(-exit_code).name}" if exit_code < 0 else f"ended with exit code {exit_code}"
    return {"outcome": WRONG, "why": f"its process {why}"}


def attempt(job: Callable[[], dict], path: Path) -> None:
    facts: dict = {}
    compilations.follow(facts)
    try:
        row = job()
    except NotChecked as error:
        row = {"outcome": NOT_CHECKED, "why": str(error)}
    except Exception as error:
        row = {"outcome": WRONG, "why": f"{type(error).__name__}: {error}"[:600]}
    row |= {"loaded": sum(facts["loaded"].values()), "compiled": facts["compiled"]}
    write_whole(path, json.dumps(row))


def report(rows: list[dict]) -> list[str]:
    compiled = [(name, s) for row in rows for name, found in row.get("compiled", {}).items() for s in found]
    loaded = sum(row.get("loaded", 0) for row in rows)
    lines = [f"{len(compiled)} kernels compiled in {sum(s for _, s in compiled):.0f} s of processes, {loaded} loaded."]
    return [*lines, "", *(f"- {row['what']}: {row['outcome']}, {row.get('took_s', 0)} s" for row in rows)]


if __name__ == "__main__":
    main()
