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
    python examples/evaluation/recall.py --smoke                       # seconds: everything runs
    python examples/evaluation/recall.py --device cuda --only 'mqar/yaad' --minutes 9  # the published size

Every training is one JSON in `--out`; those that are there are skipped. One command at a time works in a folder, with
`--workers` processes of one thread each. `README.md` beside this file says how to read the result.
"""

import argparse
import fnmatch
import sys
from functools import partial
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT / "examples"), str(ROOT / "benchmarks")]

from recall_models import DEFAULT_MODELS, named  # noqa: E402
from recall_report import write_report  # noqa: E402
from recall_tasks import TASKS  # noqa: E402
from recall_training import DEFAULT_PAIRS, SIZES, jobs_of, mean_accuracy, run_job  # noqa: E402
from study import add_arguments, parse_arguments, run_study  # noqa: E402


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    only = "what to run, with * and ? as in file names: a task, or one model"
    add_arguments(parser, "runs/recall", SIZES, "full", ("TASK[/MODEL]", only))
    parser.add_argument("--widths", nargs="+", type=int, metavar="WIDTH", help="other widths than the task's")
    return parse_arguments(parser, argv, SIZES)


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
    pairs = chosen(args.only)
    run_study(
        args,
        jobs_of(size, pairs, args.learning_rates, args.widths, args.seeds),
        partial(run_job, size=size, folder=args.out, device=args.device),
        groups={f"{task}/{model}": TASKS[task].says for task, model in pairs},
        group_of=lambda job: f"{job.task}/{job.model}",
        outcome=outcome,
        report=lambda: write_report(args.out, size),
        prepare=lambda: args.out.mkdir(parents=True, exist_ok=True),
        width=34,
    )


def outcome(result: dict[str, Any]) -> str:
    mean = mean_accuracy(result)
    accuracy = "diverged" if mean is None else f"accuracy {mean:.3f}"
    return f"{accuracy}, a guess {result['chance']:.3f}"


if __name__ == "__main__":
    main()
