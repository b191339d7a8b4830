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
"""The standing GPU script: are the kernels right on this device, and how fast are they beside their neighbours?

    python kernels/benchmarks/gpu_check.py --out kernels/benchmarks/results/h200

First correctness, every model, head width, chunk size and precision against float64; then times: of a layer's
recurrence, of training steps of whole models, of decoding with them. `--parts` chooses. Results are written after every
measurement (`results.json`), so a run that is stopped keeps what it has; at the end `results.md` and `results.png`. What
is not installed (titans-pytorch, flash-linear-attention), fails or finds no memory is skipped by name. `--minutes` says
when to stop measuring: correctness takes what it needs, the other parts share the rest.

Without a GPU, `TRITON_INTERPRET=1 python kernels/benchmarks/gpu_check.py --quick --out quick` shows that it runs; it
times nothing that means anything.
"""

import argparse
import datetime
import itertools
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from decoding import TOKENS, decode_call, decoded
from paths import LONGEST, MODELS, PATHS, Shape, forward_and_backward, kernel_call, make_inputs, make_rule
from tables import write_report
from training import MODELS as WHOLE_MODELS
from training import ModelShape, Training, measure_training

from miras_hf.memory import MemoryParameters, chunk_miras


# relative to the largest output
TOLERANCE = {"ieee": 1e-5, "tf32x3": 5e-5, "tf32": 2e-2, "bf16": 3e-2}
OTHER_SIZES = ((64, 16), (64, 32), (48, 64), (96, 64), (128, 64))
KL_TOLERANCE = {"ieee": 5e-5, "tf32x3": 2e-4, "tf32": 5e-2, "bf16": 1e-1}


# of the time that correctness leaves
SHARES = {"layers": 0.4, "training": 0.3, "prefill": 0.1, "decode": 0.2}


PARTS = ("correctness", "times", "training", "first_token", "prefill", "decode", "skipped")


class Run:
    """Collects results and writes them down as they come."""

    def __init__(self, out: Path, device: str, minutes: float):
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.device = out, device
        self.end = self.last = time.monotonic() + 60 * minutes
        self.results: dict = {"machine": machine(device)}
        self.results |= {part: [] for part in PARTS}

    def begin(self, part: str, later: list[str]) -> None:
        """Gives a part its share of the time that is left for it and the later ones."""
        now = time.monotonic()
        share = SHARES[part] / sum(SHARES[name] for name in (part, *later))
        self.end = now + share * (self.last - now)

    def add(self, part: str, row: dict) -> None:
        self.results[part].append(row)
        print(part, json.dumps(row), flush=True)
        self.write()

    def skip(self, name: str, why: str) -> None:
        self.add("skipped", {"name": name, "why": why[:300]})

    def write(self) -> None:
        (self.out / "results.json").write_text(json.dumps(self.results, indent=1) + "\n")

    def out_of_time(self, what: str) -> bool:
        if time.monotonic() < self.end:
            return False
        self.skip(what, "out of time")
        return True


def machine(device: str) -> dict:
    import triton

    found = {
        "date": datetime.date.today().isoformat(),
        "device": platform.machine() if device == "cpu" else torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    if device == "cuda":
        found["capability"] = "{}.{}".format(*torch.cuda.get_device_capability())
        found["matmul_tflops"] = round(matmul_peak(), 1)
        found["copy_tb_per_s"] = round(copy_bandwidth(), 3)
    return found


def matmul_peak(size: int = 8192) -> float:
    """bf16 TFLOP/s of one large product: what the matrix units of this device give."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / milliseconds(lambda: a @ b, "cuda")["median"] / 1e9


def copy_bandwidth(gibibytes: int = 2) -> float:
    """TB/s read and written by a copy much larger than the caches."""
    x = torch.empty(gibibytes * 2**30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() / milliseconds(lambda: y.copy_(x), "cuda")["median"] / 1e9


def milliseconds(call, device: str, repeats: int = 12) -> dict:
    """Median and quartiles of single calls; caches are cold between them where `do_bench` does it."""
    if device == "cuda":
        from triton.testing import do_bench

        low, middle, high = do_bench(call, warmup=25, rep=100, quantiles=[0.25, 0.5, 0.75])
        return {"median": middle, "low": low, "high": high}
    samples = []
    for _ in range(min(repeats, 3)):
        started = time.perf_counter()
        call()
        samples.append(1e3 * (time.perf_counter() - started))
    return {"median": statistics.median(samples), "low": min(samples), "high": max(samples)}


def check_correctness(run: Run, quick: bool) -> bool:
    """Every model at every width, chunk size and precision, odd lengths, against float64 on the same device.

    Values, and in the two full precisions the gradients of queries, keys, values, gates and initial memory.
    """
    sizes = [(32, 16)] if quick else list(itertools.product((32, 48, 64, 96, 128), (16, 32, 64)))
    precisions = ["ieee"] if quick else ["bf16", "tf32", "tf32x3", "ieee"]
    right = True
    for (head_dim, chunk_size), model in itertools.product(sizes, MODELS):
        if run.out_of_time(f"correctness of {model} at {head_dim}, {chunk_size}"):
            return False
        tokens = chunk_size + 5 if quick else 4 * chunk_size + 7
        shape = Shape(2, tokens, 2, head_dim, chunk_size, torch.float32, run.device)
        inputs, parameters = make_inputs(model, shape)
        wide = [None if x is None else x.double().requires_grad_() for x in inputs]
        initial = [a.double().requires_grad_() for a in parameters.initial]
        memory = MemoryParameters(tuple(initial), *(p.double() for p in parameters[1:]))
        expected, _ = chunk_miras(*wide, rule=make_rule(model, chunk_size), parameters=memory)
        weights = torch.randn(expected.shape, generator=torch.Generator(run.device).manual_seed(1), device=run.device)
        expected.backward(weights.double())
        leaves = [x for x in (*wide, *initial) if x is not None]
        for precision in precisions:
            row = {"model": model, "head_dim": head_dim, "chunk_size": chunk_size, "precision": precision}
            allowed = (KL_TOLERANCE if model == "memora" else TOLERANCE)[precision]
            try:
                call, given = kernel_call(model, shape, precision=precision)
                y, *_ = call()
                errors = {"error": _error(y, expected), "allowed": allowed}
                last = decoded(model, shape, precision)
                errors["decode_error"] = _error(last, expected[:, -TOKENS:])
                if precision in ("ieee", "tf32x3"):
                    y.backward(weights)
                    found = [_error(one.grad, other.grad) for one, other in zip(given, leaves, strict=True)]
                    errors["gradient_error"] = max(found)
            except Exception as error:  # a configuration that does not launch must not hide the others
                run.add("correctness", row | {"right": False, "error": f"{type(error).__name__}: {error}"[:300]})
                right = False
                continue
            row |= errors
            values = max(errors["error"], errors["decode_error"])
            row["right"] = values <= allowed and errors.get("gradient_error", 0.0) <= 3 * allowed
            right &= row["right"]
            run.add("correctness", row)
    return right


def _error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.detach().double() - expected.detach()).abs().max() / expected.abs().max()).item()


def measure(run: Run, name: str, shape: Shape, setting: str, backward: bool = False) -> None:
    kind = "forward + backward" if backward else "forward"
    row = {"path": name, "setting": f"{setting}, {kind}", "batch": shape.batch, "tokens": shape.tokens}
    row |= {"heads": shape.heads, "head_dim": shape.head_dim, "chunk_size": shape.chunk_size}
    what = f"{name}, {row['setting']}, T = {shape.tokens}"
    if shape.tokens > LONGEST.get(name, shape.tokens):
        return run.skip(what, f"not measured beyond T = {LONGEST[name]}")
    if run.out_of_time(what):
        return None
    try:
        with torch.set_grad_enabled(backward):
            call = PATHS[name](shape)
            call = forward_and_backward(call) if backward else call
            call()
            if run.device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                call()
                torch.cuda.synchronize()
                row["peak_mib"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
            row |= {key: round(value, 4) for key, value in milliseconds(call, run.device).items()}
    except Exception as error:
        return run.skip(what, f"{type(error).__name__}: {error}")
    if "Triton" in name:
        row["tflops"] = round((3 if backward else 1) * shape.miras_flops() / row["median"] / 1e9, 2)
        if "matmul_tflops" in run.results["machine"]:
            row["share_of_matmul"] = round(row["tflops"] / run.results["machine"]["matmul_tflops"], 4)
    return run.add("times", row)


def measure_token(run: Run, model: str, shape: Shape) -> None:
    """One token of one layer for every row."""
    row = {"path": f"{model}, Triton", "setting": "one token a row, decoding", "batch": shape.batch, "tokens": 1}
    row |= {"heads": shape.heads, "head_dim": shape.head_dim, "chunk_size": shape.chunk_size}
    what = f"{model}, decoding, B = {shape.batch}"
    if run.out_of_time(what):
        return None
    try:
        with torch.no_grad():
            call, moved = decode_call(model, shape)
            row |= {key: round(value, 4) for key, value in milliseconds(call, run.device).items()}
    except Exception as error:
        return run.skip(what, f"{type(error).__name__}: {error}")
    row["tb_per_s"] = float(f"{moved / row['median'] / 1e9:.3g}")
    return run.add("times", row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json, results.md, results.png")
    parser.add_argument("--minutes", type=float, default=9.0, help="stop measuring after so many")
    parser.add_argument("--parts", nargs="+", default=["correctness", *SHARES], choices=["correctness", *SHARES])
    parser.add_argument("--paths", nargs="+", default=list(PATHS), choices=list(PATHS), metavar="PATH")
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 4096, 8192, 16384, 32768, 65536, 131072])
    parser.add_argument("--models", nargs="+", default=WHOLE_MODELS, choices=WHOLE_MODELS, help="whole models")
    parser.add_argument("--sizes", nargs="+", default=["170m", "340m"], help="of whole models; the last one decodes")
    parser.add_argument("--compile", action="store_true", help="decode through torch.compile as well")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: shows that it runs")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.quick:
        parser.error("there is no GPU here; --quick shows that the script runs, in Triton's interpreter")

    run = Run(args.out, device, args.minutes)
    right = None
    if "correctness" in args.parts:
        right = check_correctness(run, args.quick)
        print(
            f"Correctness: {'every configuration is right' if right else 'SOMETHING IS WRONG, see above'}", flush=True
        )
    measures = dict(zip(SHARES, (measure_layers, measure_whole_models, measure_prefill, measure_decode), strict=True))
    parts = [part for part in measures if part in args.parts]
    for i, part in enumerate(parts):
        run.begin(part, parts[i + 1 :])
        measures[part](run, args)
    run.results["right"] = right
    run.write()
    write_report(args.out)
    sys.exit(1 if right is False else 0)


def measure_layers(run: Run, args: argparse.Namespace) -> None:
    both = (False, True)
    if args.quick:
        for name, backward in itertools.product(args.paths, both):
            measure(run, name, Shape(1, 40, 1, 32, 16, torch.float32, run.device), "quick", backward)
        measure_token(run, "yaad", Shape(2, 1, 1, 32, 16, torch.float32, run.device))
        return
    for model, batch in itertools.product(MODELS, (1, 8, 64, 256)):
        measure_token(run, model, Shape(batch, 1, 16, 64, 64))
    # the shape of the issue, the other sizes at it, the constant number of tokens, and batch 1
    for name, backward in itertools.product(args.paths, both):
        measure(run, name, Shape(8, 4096, 16, 64, 64), "B*H = 128", backward)
    for (head_dim, chunk_size), backward in itertools.product(OTHER_SIZES, both):
        measure(run, "yaad, Triton", Shape(8, 4096, 16, head_dim, chunk_size), "other sizes", backward)
    for tokens, name, backward in itertools.product(args.lengths, args.paths, both):
        measure(run, name, Shape(max(1, 65536 // tokens), tokens, 16, 64, 64), "constant tokens", backward)
    for tokens, name in itertools.product(args.lengths, args.paths):
        measure(run, name, Shape(1, tokens, 16, 64, 64), "batch 1")


TINY = ModelShape(width=32, layers=1, heads=1, vocabulary=64, chunk=16)
OUR_SETTINGS = {"memory_backend": "triton"}


def measure_whole_models(run: Run, args: argparse.Namespace) -> None:
    trained = [Training(size, ModelShape.preset(size)) for size in args.sizes]
    if args.quick:
        trained = [Training("tiny", TINY, lengths=(20,), step_tokens=40, autocast=False, seconds=0.0)]
    for training in trained:
        measure_training(run, training, args.models)


def measure_prefill(run: Run, args: argparse.Namespace) -> None:
    from models import OURS, build
    from prefill import Plan, measure
    from timing import Rounds

    plan = Plan(
        lengths=[40] if args.quick else [131072, 1048576],
        prefill_chunk_size=24 if args.quick else 32768,
        repeat_tokens=131072,
        rounds=Rounds(2, 2, 1.0, 0.0),  # the first one loads and compiles
    )
    run.results["prefill_settings"] = {**vars(plan), "rounds": vars(plan.rounds)}
    for name in (name for name in args.models if name in OURS):  # one by one: each asks for the time that is left
        model = build(name, decoding_shape(args), run.device, decoding_dtype(args), our_settings=OUR_SETTINGS)
        model.module.eval()
        measure(
            {name: model},
            plan,
            lambda row: run.add("prefill", row),
            lambda name, error: run.skip(f"{name}, long prompts", f"{type(error).__name__}: {error}"),
            run.out_of_time,
        )


def decoding_shape(args: argparse.Namespace) -> ModelShape:
    return TINY if args.quick else ModelShape.preset(args.sizes[-1])


def decoding_dtype(args: argparse.Namespace) -> torch.dtype:
    return torch.float32 if args.quick else torch.bfloat16


def measure_decode(run: Run, args: argparse.Namespace) -> None:
    from decode import Plan, available_memory, prepare
    from decode import measure as measure_decoding
    from timing import Rounds

    if run.out_of_time("decoding"):
        return
    plan = Plan(
        batches=[2] if args.quick else [1, 16, 64, 256],
        contexts=[24] if args.quick else [1024, 8192, 65536, 1048576],
        steps=16 if args.quick else 64,
        sample_seconds=1.0,
        prefill_tokens=48 if args.quick else 131072,
        repeat_tokens=48 if args.quick else 65536,
        state_tokens=8 if args.quick else 256,
        memory_bytes=available_memory(run.device, 0.8),
        cell_seconds=10.0,
        rounds=Rounds(1, 1, 1.0, 0.0) if args.quick else Rounds(3, 3, 1.0, 0.0),
        compiled=args.compile,
    )
    models, facts = prepare(args.models, decoding_shape(args), run.device, decoding_dtype(args), run.add, OUR_SETTINGS)
    run.results["decode_settings"] = {**vars(plan), "rounds": vars(plan.rounds), "device": run.device}
    run.results["decode_models"] = facts
    measure_decoding(models, plan, run.add, run.out_of_time)


if __name__ == "__main__":
    main()
