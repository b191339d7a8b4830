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
"""What small models recall, and from how large a state: synthetic tasks, ours and their neighbours side by side.

    python examples/evaluation/recall.py --list                        # tasks, models, and what is there already
    python examples/evaluation/recall.py                               # about an hour of one thread, resumed
    python examples/evaluation/recall.py --only needle '*-recall/llama' # some tasks, with all models or some
    python examples/evaluation/recall.py --report                      # tables and plot of what is there
    python examples/evaluation/recall.py --smoke --out runs/smoke      # seconds: everything runs
    python examples/evaluation/recall.py --device cuda --only 'mqar/yaad' --minutes 9  # the published size

Every training is one JSON in `--out`; those that are there are skipped. One command at a time works in a folder, with
`--workers` processes of one thread each. `README.md` beside this file says how to read the result.
"""

import argparse
import fnmatch
import math
import sys
import time
from functools import partial
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT / "examples"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from recall_models import DEFAULT_MODELS, named  # noqa: E402
from recall_report import write_report  # noqa: E402
from recall_tasks import TASKS  # noqa: E402
from recall_training import DEFAULT_PAIRS, SIZES, Job, Size, jobs_of, mean_accuracy, run_job  # noqa: E402
from study import quiet, run_all  # noqa: E402


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/recall"), help="folder of the results")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="TASK[/MODEL]",
        help="what to run, with * and ? as in file names: a task, or one model",
    )
    parser.add_argument("--learning-rates", nargs="+", type=float, metavar="LR", help="another grid than the task's")
    parser.add_argument("--widths", nargs="+", type=int, metavar="WIDTH", help="other widths than the task's")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="other seeds than the size's")
    parser.add_argument("--size", choices=sorted(SIZES), help="by default cpu, or full with --device cuda")
    parser.add_argument("--smoke", action="store_true", help="the same as --size smoke")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes, each with one thread on a CPU")
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        help="stop then, in the middle of a training; the next command goes on",
    )
    parser.add_argument("--list", action="store_true", help="say what there is to run and what is done, run nothing")
    parser.add_argument("--report", action="store_true", help="tables and plot of what is done, run nothing")
    args = parser.parse_args(argv)
    if args.smoke and args.size not in (None, "smoke"):
        parser.error(f"--smoke is --size smoke, got --size {args.size}")
    args.size = "smoke" if args.smoke else args.size or {"cpu": "cpu", "cuda": "full"}[args.device]
    if args.workers < 1:
        parser.error(f"--workers must be at least 1, got {args.workers}")
    if not args.minutes > 0:
        parser.error(f"--minutes must be more than 0, got {args.minutes:g}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that PyTorch finds")
    if args.device == "cpu" and SIZES[args.size].bf16:
        parser.error(f"--size {args.size} needs --device cuda")
    return args


def chosen(only: list[str] | None) -> list[tuple[str, str]]:
    """Tasks and models that match patterns of `--only`, task by task.

    Raises:
        `ValueError`: for a pattern that matches none.
    """
    if only is None:
        return DEFAULT_PAIRS
    pairs: dict[tuple[str, str], None] = {}
    for pattern in only:
        task_pattern, slash, model_pattern = pattern.partition("/")
        tasks = fnmatch.filter(TASKS, task_pattern)
        if not tasks:
            raise ValueError(f"--only {pattern!r} names no task; there are {', '.join(TASKS)}.")
        models = named(model_pattern) if slash else DEFAULT_MODELS
        pairs |= dict.fromkeys((task, model) for task in tasks for model in models)
    return sorted(pairs, key=lambda pair: list(TASKS).index(pair[0]))  # stable


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    size = SIZES[args.size]
    quiet()
    pairs = chosen(args.only)
    jobs = jobs_of(size, pairs, args.learning_rates, args.widths, args.seeds)
    waiting = [job for job in jobs if not (args.out / f"{job.name}.json").exists()]
    if args.list:
        for task, model in pairs:
            of_pair = [job for job in jobs if (job.task, job.model) == (task, model)]
            done = sum(job not in waiting for job in of_pair)
            print(f"{task + '/' + model:34} {done}/{len(of_pair)}  {TASKS[task].says}")
        return
    if not args.report:
        print(f"{len(waiting)} of {len(jobs)} trainings to do, in {args.out}", flush=True)
        args.out.mkdir(parents=True, exist_ok=True)
        if args.device == "cpu":
            torch.set_num_threads(1)
        _run(waiting, size, args)
    for line in write_report(args.out, size):
        print(line)


def _run(jobs: list[Job], size: Size, args: argparse.Namespace) -> None:
    started = time.time()

    def say(number: int, result: dict | None) -> None:
        if result is None:
            return
        mean = mean_accuracy(result)
        accuracy = "diverged" if mean is None else f"accuracy {mean:.3f}"
        wall, cpu = result["seconds"]["wall"], result["seconds"]["cpu"]
        print(
            f"{number}/{len(jobs)} {Job(**result['job']).name}: {accuracy}, a guess {result['chance']:.3f}, gradient norm "
            f"up to {result['gradient_norm_max']}, {wall:.0f} s ({cpu:.0f} s of CPU), "
            f"{(time.time() - started) / 60:.0f} min in all",
            flush=True,
        )

    deadline = started + 60 * args.minutes
    run = partial(run_job, size=size, folder=args.out, device=args.device, deadline=deadline)
    run_all(jobs, run, say, args.workers)


if __name__ == "__main__":
    main()
