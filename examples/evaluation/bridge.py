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
"""What each step from Gated DeltaNet's layer to Yaad's costs: the same small model, one change at a time, trained on
the same tokens over a grid of learning rates.

    python examples/evaluation/bridge.py --list                    # the rungs, and what is there already
    python examples/evaluation/bridge.py                           # all of them: hours on a CPU, resumed where it stopped
    python examples/evaluation/bridge.py --only mlp 'yaad*'        # some of them
    python examples/evaluation/bridge.py --report                  # table and plot of what is there
    python examples/evaluation/bridge.py --smoke --out runs/smoke  # seconds: everything runs
    python examples/evaluation/bridge.py --device cuda             # a wider model on more tokens

Every training is one JSON in `--out`; those that are there are skipped. One command at a time works in a folder, with
`--workers` processes of one thread each. `README.md` beside this file says how to read the result.
"""

import argparse
import fnmatch
import sys
import time
from functools import partial
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT / "examples"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from bridge_points import RUNGS  # noqa: E402
from bridge_report import write_report  # noqa: E402
from bridge_training import SIZES, Job, Size, jobs_of, prepare_data, run_job  # noqa: E402
from study import quiet, run_all  # noqa: E402


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bridge"), help="folder of the results")
    parser.add_argument("--only", nargs="+", metavar="RUNG", help="rungs to run, with * and ? as in file names")
    parser.add_argument("--learning-rates", nargs="+", type=float, metavar="LR", help="another grid than the size's")
    parser.add_argument(
        "--seeds", nargs="+", type=int, metavar="SEED", help="other seeds than the size's, of every rung"
    )
    parser.add_argument("--size", choices=sorted(SIZES), help="by default cpu, or cuda with --device cuda")
    parser.add_argument("--smoke", action="store_true", help="the same as --size smoke")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes, each with one thread on a CPU")
    parser.add_argument(
        "--keep-weights", action="store_true", help="a safetensors file beside each JSON, for probe.py"
    )
    parser.add_argument("--list", action="store_true", help="say what there is to run and what is done, run nothing")
    parser.add_argument("--report", action="store_true", help="table and plot of what is done, run nothing")
    args = parser.parse_args(argv)
    if args.smoke and args.size not in (None, "smoke"):
        parser.error(f"--smoke is --size smoke, got --size {args.size}")
    args.size = "smoke" if args.smoke else args.size or args.device
    if args.workers < 1:
        parser.error(f"--workers must be at least 1, got {args.workers}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that PyTorch finds")
    if args.device == "cpu" and SIZES[args.size].bf16:
        parser.error(f"--size {args.size} needs --device cuda")
    return args


def chosen(only: list[str] | None) -> list[str]:
    """Names of the rungs that match, in their order.

    Raises:
        `ValueError`: for a pattern that matches none.
    """
    if only is None:
        return [name for name, rung in RUNGS.items() if rung.default]
    for pattern in only:
        if not fnmatch.filter(RUNGS, pattern):
            raise ValueError(f"--only {pattern!r} names no rung; there are {', '.join(RUNGS)}.")
    return [name for name in RUNGS if any(fnmatch.fnmatch(name, pattern) for pattern in only)]


def jobs_for(args: argparse.Namespace, size: Size) -> list[Job]:
    rungs = chosen(args.only)
    jobs = jobs_of(size, rungs)
    if args.learning_rates is None and args.seeds is None:
        return jobs
    rates = args.learning_rates or size.learning_rates
    if args.seeds is None:
        seeds = {name: sorted({job.seed for job in jobs if job.rung == name}) for name in rungs}
    else:
        seeds = dict.fromkeys(rungs, args.seeds)
    return [Job(name, rate, seed) for name in rungs for rate in rates for seed in seeds[name]]


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    size = SIZES[args.size]
    quiet()
    jobs = jobs_for(args, size)
    waiting = [job for job in jobs if not (args.out / f"{job.name}.json").exists()]
    if args.list:
        for name in dict.fromkeys(job.rung for job in jobs):
            of_rung = [job for job in jobs if job.rung == name]
            done = sum(job not in waiting for job in of_rung)
            print(f"{name:20} {done}/{len(of_rung)}  {RUNGS[name].says} (against {RUNGS[name].parent})")
        return
    if not args.report:
        print(f"{len(waiting)} of {len(jobs)} trainings of {size.tokens:,} tokens to do, in {args.out}", flush=True)
        if waiting:
            if args.device == "cpu":
                torch.set_num_threads(1)
            prepare_data(args.out, size)
        _run(waiting, size, args)
    for line in write_report(args.out, size):
        print(line)


def _run(jobs: list[Job], size: Size, args: argparse.Namespace) -> None:
    started = time.perf_counter()

    def say(number: int, result: dict) -> None:
        job, loss = Job(**result["job"]), result["validation"]
        loss = "diverged" if loss is None else f"{loss:.4f}"
        minutes = (time.perf_counter() - started) / 60
        print(
            f"{number}/{len(jobs)} {job.name}: {loss}, gradient norm up to {result['gradient_norm_max']}, "
            f"{result['seconds']['wall']:.0f} s ({result['seconds']['cpu']:.0f} s of CPU), {minutes:.0f} min in all",
            flush=True,
        )

    run = partial(run_job, size=size, folder=args.out, device=args.device, keep_weights=args.keep_weights)
    run_all(jobs, run, say, args.workers)


if __name__ == "__main__":
    main()
