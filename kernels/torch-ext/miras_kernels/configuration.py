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
"""How a kernel is launched on a device for a shape: looked up in `configurations/*.json`, never tuned at run time.

A file holds, for the device or compute capability it is named after, entries of each kernel:

    {"head_dim": 64, "chunk_size": 64, "precision": "bf16", "launch": {"TN": 32, "num_warps": 8, "num_stages": 1}}

A shape without an entry of its own takes the nearest one's, in log space; a `null` launch says that nothing fits into the
device's shared memory from there on. `"since": "3.9"` makes one of a launch under an earlier Triton, whose program is larger,
or empty. `STREAM`, of the backward kernels, leaves a chunk's operands in global memory to take less of the shared one.
`kernels/choose.py` chooses entries by what the compiler reports, `kernels/tune.py` by the clock; `since` is written by hand.
"""

import functools
import json
import math
import os
import re
from pathlib import Path

import torch


DIRECTORY = Path(__file__).parent / "configurations"
DEFAULT = "default"
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
FAMILIES = ("mlp", "matrix", "delta")
KERNELS = tuple(f"{family}_{part}" for family in FAMILIES for part in ("forward", "backward", "decode"))
PRECISIONS = ("bf16", "tf32", "tf32x3", "ieee")


def launch_configuration(
    kernel: str, *, device: torch.device | str, head_dim: int, chunk_size: int, precision: str
) -> dict[str, int]:
    """Launch arguments of `kernel`: its tile sizes, `num_warps`, `num_stages` and, where it helps, `maxnreg`.

    Args:
        kernel (`str`): one of `KERNELS`.
        device (`torch.device` or `str`): where it will run, or the name of a file in `configurations/`.
        head_dim (`int`): a head's channels.
        chunk_size (`int`): a chunk's tokens.
        precision (`str`): operands of its products, one of `PRECISIONS`.

    Returns:
        A new `dict` for `kernel[grid](..., **launch)`. A device's own file goes before its compute capability's; a device
        with neither gets the default, which asks for little.

    Raises:
        `ValueError`: for an unknown kernel, precision or file, a size below 1, a shape that the device has too little
            shared memory for, and for a file that is not as above.
    """
    if kernel not in KERNELS:
        raise ValueError(f"`kernel` must be one of {KERNELS}, got {kernel!r}.")
    if precision not in PRECISIONS:
        raise ValueError(f"`precision` must be one of {PRECISIONS}, got {precision!r}.")
    for name, value in (("head_dim", head_dim), ("chunk_size", chunk_size)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")
    return dict(_found(kernel, device, head_dim, chunk_size, precision))


@functools.cache
def _found(
    kernel: str, device: torch.device | str, head_dim: int, chunk_size: int, precision: str
) -> dict[str, int | bool]:
    names = (device,) if isinstance(device, str) else (*device_names(device), DEFAULT)
    for name in names:
        candidates = [entry for entry in entries(name).get(kernel, ()) if entry["precision"] == precision]
        if candidates:
            fitting = [entry for entry in candidates if entry["launch"] is not None]
            too_large = _too_large(candidates, head_dim, chunk_size)
            if not fitting or too_large:
                since = [entry["since"] for entry in too_large or candidates if "since" in entry]
                raise ValueError(
                    f"No launch of `{kernel}` serves {name!r} at head_dim {head_dim}, chunk_size {chunk_size}, precision "
                    f"{precision!r}: shared memory is too small, or Triton makes nothing of it. Take a smaller chunk_size, "
                    f"another precision{f', or Triton {max(since, key=_version)} or newer' if since else ''}."
                )
            # of two equally near ones the larger: what fits there fits here
            best = min(fitting, key=lambda e: (_distance(e, head_dim, chunk_size), -e["head_dim"], -e["chunk_size"]))
            # said, because Triton is about to change its default
            launch = {"enable_fp_fusion": True, **best["launch"]}
            if torch.version.hip is not None:
                launch.pop("maxnreg", None)  # an option of NVIDIA's assembler
            return launch
    raise ValueError(f"No configuration of `{kernel}` at precision {precision!r} in {', '.join(map(repr, names))}.")


def threads(launch: dict[str, int]) -> int:
    """Threads of a program that is launched so, which kernels hold against the size of their tiles."""
    return launch["num_warps"] * (32 if torch.version.hip is None else 64)


def _distance(entry: dict, head_dim: int, chunk_size: int) -> float:
    return math.hypot(math.log(entry["head_dim"] / head_dim), math.log(entry["chunk_size"] / chunk_size))


def _too_large(candidates: list[dict], head_dim: int, chunk_size: int) -> list[dict]:
    # tiles are as wide as the next power of two
    width = 1 << (head_dim - 1).bit_length()
    return [
        entry
        for entry in candidates
        if entry["launch"] is None and entry["head_dim"] <= width and entry["chunk_size"] <= chunk_size
    ]


def shipped() -> tuple[str, ...]:
    """Names of the files in `configurations/`, without their ending."""
    return tuple(sorted(path.stem for path in DIRECTORY.glob("*.json")))


@functools.cache
def device_names(device: torch.device) -> tuple[str, ...]:
    """The files that a device's configurations may be in and that exist, its own before its compute capability's."""
    if device.type == "cpu":
        names = ["cpu"]  # Triton's interpreter: few large tiles, and no shared memory to fill
    elif device.type == "cuda":
        names = [file_name(torch.cuda.get_device_name(device))]
        if torch.version.hip is None:
            names.append("sm_{}{}".format(*torch.cuda.get_device_capability(device)))
    else:
        names = []
    return tuple(name for name in names if name in shipped())


def file_name(device_name: str) -> str:
    """A device's name as a file's, "NVIDIA H200" as "nvidia_h200"."""
    return "_".join("".join(c if c.isalnum() else " " for c in device_name.lower()).split())


@functools.cache
def entries(name: str, triton: str | None = None) -> dict[str, list[dict]]:
    """What the file `name` holds of each kernel for a version of Triton, by default the one that is installed.

    Raises:
        `ValueError`: if there is no such file, or an entry in it is not as this module's docstring says.
    """
    path = DIRECTORY / f"{name}.json"
    if not path.is_file():
        raise ValueError(f"`device` must be a torch.device or one of {shipped()}, got {name!r}.")
    kernels = json.loads(path.read_text(encoding="utf-8"))["kernels"]
    for kernel, found in kernels.items():
        for entry in found:
            if not _understood(kernel, entry):
                raise ValueError(f"{path} holds an entry of {kernel!r} that no kernel understands: {entry}.")
            if "since" in entry and _version(entry["since"]) > _version(triton or _installed()):
                entry["launch"] = None
            else:
                entry.pop("since", None)
    return kernels


def _installed() -> str:
    import triton

    return triton.__version__


def _version(words: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", words)[:2]]


def _understood(kernel: str, entry: dict) -> bool:
    launch = entry.get("launch")
    return (
        kernel in KERNELS
        and entry.keys() - {"since"} == {"head_dim", "chunk_size", "precision", "launch"}
        and entry["precision"] in PRECISIONS
        and (launch is None or {"num_warps", "num_stages"} <= launch.keys())
        and re.fullmatch(r"\d+\.\d+", entry.get("since", "0.0")) is not None
    )
