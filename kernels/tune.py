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
"""Times launch configurations on this machine's GPU and keeps the fastest of each shape for its name.

    python kernels/tune.py --out tuned                        # every kernel and shape at bf16
    python kernels/tune.py --out tuned --kernel mlp_forward mlp_decode --head_dim 64 --chunk_size 64

writes `<device>.json` into the folder, entry by entry, beginning with what `configurations/` holds of the device; copied there
it goes before its compute capability's file. Entries of other shapes stay, and so does that of a shape of which no launch
ran. `tuning.json` beside it has every time, and of what did not run the reason.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path


sys.path.append(str(Path(__file__).resolve().parent / "benchmarks"))  # scripts, not a package
import memory_alone  # noqa: F401, E402
import torch  # noqa: E402
from choose import candidates, write  # noqa: E402
from clock import per_call  # noqa: E402
from decoding import decode_call  # noqa: E402
from launches import launching  # noqa: E402
from paths import TIMED, Shape, kernel_call  # noqa: E402
from record import device_is_broken  # noqa: E402

from miras_kernels import configuration  # noqa: E402
from miras_kernels.choices import CHUNK_SIZES, HEAD_DIMS  # noqa: E402


def time_on_gpu(kernel: str, shape: dict, launch: dict[str, int], options: argparse.Namespace) -> float:
    """Milliseconds of a call of every model that the kernel is for, together; a backward kernel's with the forward pass.

    Raises:
        Whatever Triton, its assembler or the device say of a launch that does not run.
    """
    memory, _, part = kernel.partition("_")
    precision = shape["precision"]
    at = Shape(
        batch=options.batch,
        tokens=1 if part == "decode" else options.tokens,
        heads=options.heads,
        head_dim=shape["head_dim"],
        chunk_size=shape["chunk_size"],
        dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
    )
    total = 0.0
    models = [model for model in TIMED if model != "matrix"] if memory == "mlp" else [memory]
    for model in models:
        with torch.set_grad_enabled(part == "backward"), launching(kernel, launch):
            if part == "decode":
                call, _ = decode_call(model, at, precision=precision)
            else:
                path = kernel_call(model, at, precision=precision)
                call = path.training_step() if part == "backward" else path.call
            # all phases of a chunk, where a token is decoded
            total += per_call([call], "cuda", replays=2 * at.chunk_size if part == "decode" else 12, budget=0.3)["ms"]
    return total


def tune(kernel: str, shape: dict, time: Callable[[str, dict, dict], float], log: list[dict]) -> dict[str, int] | None:
    """The fastest candidate that runs, `None` if none does; `log` gets every one, with its time or the reason."""
    best, launch_of_best = math.inf, None
    for launch in candidates(kernel, **shape, by_clock=True):
        entry = {"kernel": kernel, **shape, "launch": launch}
        try:
            entry["ms"] = time(kernel, shape, launch)
        except Exception as error:  # one that does not fit, or does not compile, must not hide the others
            entry["skipped"] = f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
        log.append(entry)
        print(json.dumps(entry), flush=True)
        if "skipped" in entry and device_is_broken():
            raise SystemExit("The device does not answer any more: go on without the last launch, in a new process.")
        if entry.get("ms", math.inf) < best:
            best, launch_of_best = entry["ms"], launch
    return launch_of_best


def keep(kernels: dict[str, list[dict]], kernel: str, shape: dict, launch: dict[str, int] | None) -> None:
    """Puts an entry in the place of the shape's old one. Of no launch there is none: `null` would say that nothing fits."""
    if launch is None:
        return
    others = [e for e in kernels.get(kernel, ()) if any(e[part] != value for part, value in shape.items())]
    kernels[kernel] = [*others, {**shape, "launch": launch}]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the configurations and all times")
    parser.add_argument("--kernel", nargs="+", choices=configuration.KERNELS, default=configuration.KERNELS)
    parser.add_argument("--head_dim", nargs="+", type=int, choices=HEAD_DIMS, default=HEAD_DIMS)
    parser.add_argument("--chunk_size", nargs="+", type=int, choices=CHUNK_SIZES, default=CHUNK_SIZES)
    parser.add_argument("--precision", nargs="+", choices=configuration.PRECISIONS, default=["bf16"])
    parser.add_argument("--batch", type=int, default=8, help="8 by default; with --heads enough to fill the device")
    parser.add_argument("--heads", type=int, default=16, help="16 by default")
    parser.add_argument("--tokens", type=int, default=2048, help="of each sequence, 2048 by default")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "No GPU here to time launches on. `python kernels/choose.py sm_90` chooses by what the compiler reports.",
            file=sys.stderr,
        )
        return 1

    options.out.mkdir(parents=True, exist_ok=True)
    name = configuration.file_name(torch.cuda.get_device_name())
    path = configuration.DIRECTORY / f"{name}.json"
    kernels = json.loads(path.read_text(encoding="utf-8"))["kernels"] if path.is_file() else {}
    log: list[dict] = []
    shapes = [(d, c, p) for p in options.precision for d in options.head_dim for c in options.chunk_size]
    for kernel in options.kernel:
        for head_dim, chunk_size, precision in shapes:
            shape = {"head_dim": head_dim, "chunk_size": chunk_size, "precision": precision}
            try:
                keep(kernels, kernel, shape, tune(kernel, shape, partial(time_on_gpu, options=options), log))
            finally:
                (options.out / "tuning.json").write_text(json.dumps(log, indent=1) + "\n")
            if kernels:
                write(name, kernels, options.out)
    print(f"Wrote {options.out / f'{name}.json'}: copy it to {configuration.DIRECTORY} to use it.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
