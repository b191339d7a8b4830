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
"""First step: where this runs, and whether the kernels that were compiled elsewhere are of use here."""

import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

import memory_alone  # noqa: F401
from outcomes import listed
from record import Record, begin


def main() -> None:
    record, args = begin(__doc__, listed)
    record.check("versions", lambda: versions(record))
    if args.device == "cuda":
        record.check("device", lambda: device(record))
        record.check("clocks", clocks)
    record.check("copy bandwidth", lambda: copy_bandwidth(args.device))
    record.check("product rate", lambda: product_rate(args.device))
    record.check("carried cache", lambda: carried_cache(record, args.device))


def versions(record: Record) -> dict:
    import torch
    import triton
    from triton.runtime.cache import triton_key

    print(f"triton_key {triton_key()}", flush=True)
    key = hashlib.sha256(triton_key().encode()).hexdigest()[:16]
    found = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    found |= {"machine": platform.machine(), "triton_key_sha256": key}
    record.facts |= found
    return found


def device(record: Record) -> dict:
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("PyTorch finds no GPU. TRITON_INTERPRET=1 with --quick shows that the script runs without.")
    properties = torch.cuda.get_device_properties(0)
    found = {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": round(properties.L2_cache_size / 2**20, 1),
    }
    record.facts |= found
    return found


def clocks() -> dict:
    from outcomes import NotChecked

    if shutil.which("nvidia-smi") is None:
        raise NotChecked("no nvidia-smi")
    wanted = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu", "driver_version")
    query = [f"--query-gpu={','.join(wanted)}", "--format=csv,noheader"]
    said = subprocess.run(["nvidia-smi", *query], capture_output=True, text=True, check=True, timeout=20).stdout
    return dict(zip(wanted, map(str.strip, said.splitlines()[0].split(",")), strict=True))


def copy_bandwidth(device: str) -> dict:
    """TB/s read and written by a copy much larger than the caches."""
    import torch
    from clock import per_call

    x = torch.zeros(2 * 2**30 if device == "cuda" else 2**24, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    found = per_call([lambda: y.copy_(x)], device)
    return {"tb_per_s": round(2 * x.numel() / found["ms"] / 1e9, 3), "ms": found["ms"]}


def product_rate(device: str) -> dict:
    """bfloat16 TFLOP/s of one large product: what the matrix units of this device give."""
    import torch
    from clock import per_call

    size = 8192 if device == "cuda" else 128
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    found = per_call([lambda: a @ b], device)
    return {"tflops": round(2 * size**3 / found["ms"] / 1e9, 1), "ms": found["ms"]}


def carried_cache(record: Record, device: str) -> dict:
    """Whether the forward kernel at the main shape comes from the cache, or has to be compiled."""
    from outcomes import NotChecked

    folder = os.environ.get("TRITON_CACHE_DIR", "")
    if device != "cuda":
        raise NotChecked("nothing is compiled in Triton's interpreter")
    held = len(list(Path(folder).glob("*/*.cubin"))) if folder else 0
    import torch
    from compilations import follow
    from paths import Shape, kernel_call

    follow(record.facts)
    with torch.no_grad():
        kernel_call("yaad", Shape(1, 64, 1, 64, 64), output_final_state=True)[0]()
    torch.cuda.synchronize()
    fits = not record.facts["compiled"]
    print(f"the carried cache {'fits' if fits else 'does NOT fit: the kernels are compiled here'}", flush=True)
    return {"folder": folder, "binaries_before": held, "fits": fits}


if __name__ == "__main__":
    main()
