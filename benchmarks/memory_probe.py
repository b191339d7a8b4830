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
"""Peak memory that one call of one layer adds, measured in a process of its own.

    python benchmarks/memory_probe.py yaad 8192 backward

prints one line of JSON. The baseline is the resident set once the model, its input and one warm-up call at a small
length exist; the peak is the kernel's high-water mark (VmHWM), reset just before the call that is measured.
"""

import argparse
import ctypes
import gc
import json
import resource

import torch
from competitors import Shape, build
from timing import one_backward, one_forward


def status_kib(key: str) -> int | None:
    try:
        with open("/proc/self/status") as file:
            for line in file:
                if line.startswith(key + ":"):
                    return int(line.split()[1])
    except OSError:
        pass
    return None


def reset_peak() -> bool:
    """True where the kernel let the high-water mark be set back to the present resident set."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        return True
    except OSError:
        return False


def release_free_memory() -> None:
    gc.collect()
    try:
        # what the warm-up freed would otherwise sit in the baseline and be reused unseen by the measured call
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        pass


def measure(name: str, seq_len: int, mode: str, shape: Shape) -> dict:
    competitor = build(name, shape)
    call = {"forward": one_forward, "backward": one_backward}[mode]
    call(competitor, torch.randn(1, 2 * shape.chunk, shape.width))
    competitor.module.zero_grad(set_to_none=True)
    x = torch.randn(1, seq_len, shape.width)
    release_free_memory()

    if reset_peak() and status_kib("VmHWM") is not None:
        method, before = "VmHWM after clear_refs", status_kib("VmRSS")
        finite = call(competitor, x)
        after = status_kib("VmHWM")
    else:
        # the high-water mark of the whole process: an upper baseline, so the difference is a lower bound
        method, before = "ru_maxrss, lower bound", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        finite = call(competitor, x)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "name": name,
        "T": seq_len,
        "mode": mode,
        "added_mib": round((after - before) / 1024, 1),
        "baseline_mib": round(before / 1024, 1),
        "finite": finite,
        "method": method,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name")
    parser.add_argument("seq_len", type=int)
    parser.add_argument("mode", choices=["forward", "backward"])
    parser.add_argument("--width", type=int, default=Shape.width)
    parser.add_argument("--heads", type=int, default=Shape.heads)
    parser.add_argument("--chunk", type=int, default=Shape.chunk)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(json.dumps(measure(args.name, args.seq_len, args.mode, Shape(args.width, args.heads, args.chunk))))
