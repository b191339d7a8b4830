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
"""Where a run's numbers come from: the command, the machine, the versions."""

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import torch


def machine(threads: int, packages: tuple[str, ...] = ("torch", "transformers", "titans-pytorch")) -> dict:
    """The machine, and the versions of `packages`, `None` for one that is not installed."""
    cpu = platform.processor()
    try:
        lines = subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout.splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("Model name"))
    except (OSError, subprocess.CalledProcessError, StopIteration):
        pass
    return {
        "cpu": cpu,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": threads,
        "niceness": os.nice(0),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: package_version(name) for name in packages},
    }


def package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


SPEED_SETTINGS = ("ATEN_CPU_", "GLIBC_TUNABLES", "KMP_", "MALLOC_", "MKL_", "OMP_", "THP_MEM_ALLOC_ENABLE")
"""Beginnings of the environment variables that processors and allocators go by."""

# as the process was started: compilers set some of them later
_SETTINGS = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(SPEED_SETTINGS)]


def command_line() -> str:
    """The command as a reader would type it, without this machine's folders."""
    words = [os.path.relpath(w) if os.path.isabs(w) else w for w in sys.argv]
    return " ".join([*_SETTINGS, "python", *words])


def say(text: str) -> None:
    print(text, flush=True)
