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
"""Milliseconds of a call on a device: replays of a CUDA graph over inputs that the caches do not hold any more.

A call of the kernels' operators costs Python 0.06 (decoding) to 0.5 ms (training), more than decoding takes on the device,
and as much as a short forward pass: only a graph shows the latter. Python's share is measured beside it.
"""

import statistics
import time
from collections.abc import Callable

import torch


# of what the L2 holds, how much the inputs of all calls must take together
ROTATED = 3.0
MOST_SETS = 64


def sets_beyond_l2(bytes_of_one: int, device: str) -> int:
    """How many sets of inputs have to take turns so that none is in the L2 when its turn comes."""
    if device != "cuda":
        return 1
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(MOST_SETS, -(-int(ROTATED * l2) // max(bytes_of_one, 1))))


def per_call(calls: list[Callable[[], object]], device: str, replays: int = 12, budget: float = 1.5) -> dict:
    """Milliseconds of one of `calls`, which do the same on inputs of their own, and what Python takes for it.

    Args:
        calls (`list` of `Callable`): taken one after the other.
        replays (`int`): how often all are taken, `budget` permitting.
        budget (`float`): seconds that the timed replays may take together, two replays at least.

    Returns:
        `ms`, the median over replays, `low` and `high`, the quartiles, and all `samples`; `python_ms`, of a call outside a
        graph without waiting for the device; `by`, what was timed: `"graph"`, or, where a call cannot be captured,
        `"events"` and why, or in the interpreter `"wall"`.
    """
    if device != "cuda":
        return _wall(calls)
    for call in calls:  # compiles, loads, allocates
        call()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for call in calls:
        call()
    python = (time.perf_counter() - started) / len(calls)
    torch.cuda.synchronize()
    found: dict = {"python_ms": round(1e3 * python, 4)}
    replay, by = _captured(calls)
    found["by"] = by
    replay()
    torch.cuda.synchronize()
    samples: list[float] = []
    end = time.monotonic() + budget
    while len(samples) < replays and (len(samples) < 2 or time.monotonic() < end):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        replay()
        after.record()
        after.synchronize()
        samples.append(before.elapsed_time(after) / len(calls))
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return found | {"ms": middle, "low": low, "high": high, "samples": samples}


def _captured(calls: list[Callable[[], object]]) -> tuple[Callable[[], object], str]:
    def all_of_them() -> None:
        for call in calls:
            call()

    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            all_of_them()
    except Exception as error:
        torch.cuda.synchronize()
        return all_of_them, f"events, not a graph: {type(error).__name__}: {error}"[:200]
    return graph.replay, "graph"


def _wall(calls: list[Callable[[], object]]) -> dict:
    started = time.perf_counter()
    for call in calls:
        call()
    ms = 1e3 * (time.perf_counter() - started) / len(calls)
    return {"ms": ms, "low": ms, "high": ms, "samples": [ms], "python_ms": 0.0, "by": "wall"}
