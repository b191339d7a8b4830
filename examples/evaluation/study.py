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
"""What studies share: their flags, jobs that run one by one or side by side, the loop that trains, and files of results.

Trainer has its own place for the loss and the order of data. Here every model of a study must see the same batches,
whatever it is, and the norm of every step's gradients is part of the result: so the loop is written out.
"""

import argparse
import functools
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pretrain
import torch
import transformers
from torch import Tensor, nn
from transformers import Trainer, get_cosine_schedule_with_warmup

from miras_hf.files import atomic_write, write_text
from miras_hf.weight_decay import exempt_from_trainer


SAVED_EVERY = 300.0
"""Seconds after which a training that can go on is saved, when an interval ends."""


class OutOfTime(Exception):
    """A training stopped before its end and was saved, see `train`."""


@dataclass(frozen=True)
class Course:
    """Losses and gradient norms of a training, step by step.

    Args:
        losses, gradient_norms (`list` of `float`): one a step; the norms before clipping.
        every (`int`): steps of an interval.
        measured (`list`): step and value of what `train`'s `measure` gave.
        reached (`bool`): whether all steps were made, and none led to a loss that is no number.
        seconds (`dict`): `wall` and `cpu`, of all the processes that it took.
    """

    losses: list[float]
    gradient_norms: list[float]
    every: int
    measured: list[list[Any]]
    reached: bool
    seconds: dict[str, float]

    def summary(self) -> dict[str, Any]:
        """What a result's JSON says of it: means and largest norms of intervals, with the last step of each."""

        def mean(part: list[float]) -> float:
            return sum(part) / len(part)

        return {
            "train": self._of_intervals(self.losses, mean),
            "gradient_norm": self._of_intervals(self.gradient_norms, max),
            "gradient_norm_max": number(max(self.gradient_norms, key=lambda g: g if math.isfinite(g) else math.inf)),
        }

    def _of_intervals(self, values: list[float], reduce: Callable[[list[float]], float]) -> list[list[float | None]]:
        starts = range(0, len(values), self.every)
        parts = [values[i : i + self.every] for i in starts]
        return [[i + len(part), number(reduce(part))] for i, part in zip(starts, parts, strict=True)]


def optimizer_and_schedule(model: nn.Module, learning_rate: float, steps: int, weight_decay: float | None = None):
    """AdamW and the schedule of `pretrain.py`, with the weight decay that Trainer gives each parameter there, or
    another one."""
    defaults = {f.name: f.default for f in pretrain.PretrainingArguments.__dataclass_fields__.values()}
    exempt_from_trainer()
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    weight_decay = defaults["weight_decay"] if weight_decay is None else weight_decay
    groups = [
        {
            "params": [p for n, p in model.named_parameters() if p.requires_grad and (n in decayed) == decays],
            "weight_decay": weight_decay if decays else 0.0,
        }
        for decays in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, defaults["adam_beta2"]))
    warmup = math.ceil(defaults["warmup_steps"] * steps)
    return optimizer, get_cosine_schedule_with_warmup(optimizer, warmup, steps)


def train(
    model: nn.Module,
    loss_at: Callable[[int], Tensor],
    learning_rate: float,
    steps: int,
    *,
    weight_decay: float | None = None,
    intervals: int = 20,
    measure: Callable[[int], Any] = lambda step: None,
    unfinished: Path | None = None,
    what: Any = None,
    deadline: float = math.inf,
) -> Course:
    """
    Trains a model until its last step, or until an interval ends with a loss that is no number.

    Args:
        loss_at (`Callable`): the loss of step 1, 2, ..., whose batch must depend on the step alone.
        intervals (`int`): into how many the steps are divided.
        measure (`Callable`): called with the number of each step that was made; what it gives besides `None` is kept.
        unfinished (`Path`, *optional*): where a training goes on, if that file is there, and is saved at the deadline and
            every `SAVED_EVERY` seconds, so that one that was killed goes on, too. Who has the result removes it.
        what (*optional*): what is trained, as JSON can say it: an unfinished training of anything else is refused.
        deadline (`float`): as `time.time()`; looked at when an interval ends.

    Raises:
        `OutOfTime`: at the deadline, with the training saved in `unfinished`, from which the same call goes on as if it
            had never stopped.
        `ValueError`: for an unfinished training of something else.
    """
    optimizer, schedule = optimizer_and_schedule(model, learning_rate, steps, weight_decay)
    every = max(1, steps // intervals)
    # a number of every step kept where the step has put it would hold the heap behind it: megabytes a step on a CPU
    device = next(model.parameters()).device
    losses, norms = torch.zeros(2, steps, device=device)
    first, measured = 0, []
    before = {"wall": 0.0, "cpu": 0.0}
    what = plain(what)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    if unfinished is not None and unfinished.exists():
        # its parts bring what they load to where it belongs, and leave AdamW's count of steps on the CPU
        saved = torch.load(unfinished, map_location="cpu")
        if saved.get("what") != what:
            raise ValueError(
                f"{unfinished} is a training of {saved.get('what')}, and this one is of {what}: move it away to train anew."
            )
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        first, before, measured = len(saved["losses"]), saved["seconds"], saved["measured"]
        losses[:first], norms[:first] = saved["losses"], saved["norms"]
    wall, cpu, saved_at = time.perf_counter(), time.process_time(), time.time()

    def seconds() -> dict[str, float]:
        return {
            "wall": before["wall"] + time.perf_counter() - wall,
            "cpu": before["cpu"] + time.process_time() - cpu,
        }

    def save(unfinished: Path, step: int) -> None:
        state = {name: part.state_dict() for name, part in parts.items()} | {"what": what, "measured": measured}
        with atomic_write(unfinished) as file:
            torch.save(state | {"losses": losses[:step], "norms": norms[:step], "seconds": seconds()}, file)

    model.train()
    step = first
    for step in range(first + 1, steps + 1):
        loss = loss_at(step)
        loss.backward()
        losses[step - 1] = loss.detach()
        norms[step - 1] = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % every == 0 and not math.isfinite(losses[step - 1].item()):
            break
        value = measure(step)
        if value is not None:
            measured.append([step, value])
        if unfinished is not None and step % every == 0 and step < steps:
            now = time.time()
            if now >= min(deadline, saved_at + SAVED_EVERY):
                save(unfinished, step)
                saved_at = now
            if now >= deadline:
                raise OutOfTime(f"{unfinished} holds step {step} of {steps}.")
    values = losses[:step].tolist()
    reached = step == steps and math.isfinite(values[-1])
    return Course(values, norms[:step].tolist(), every, measured, reached, seconds())


def elsewhere(device: str) -> dict[str, str]:
    """For `train`'s `what`: the device of a training that is not on the CPU, which no other goes on with."""
    return {} if device == "cpu" else {"device": device}


def run_all(jobs: Sequence[Any], run: Callable[[Any], Any], say: Callable[[int, Any], None], workers: int) -> None:
    """Runs the jobs one after the other, or in processes of one thread each; says what each returned, with how many
    have."""
    if workers == 1 or not jobs:
        for done, job in enumerate(jobs, 1):
            say(done, run(job))
        return
    # forked processes would share PyTorch's locked threads
    context = get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context, initializer=_start_worker) as pool:
        futures = [pool.submit(run, job) for job in jobs]
        for done, future in enumerate(as_completed(futures), 1):
            say(done, future.result())


def _start_worker() -> None:
    torch.set_num_threads(1)
    quiet()


def add_arguments(
    parser: argparse.ArgumentParser, out: str, sizes: Iterable[str], gpu_size: str, only: tuple[str, str]
) -> None:
    """The flags that all studies of trainings have.

    Args:
        out (`str`): the folder of results by default; of another size than `cpu` its name follows.
        sizes (iterable of `str`): names of sizes, `"cpu"` and `"smoke"` among them.
        gpu_size (`str`): the one that `--device cuda` means.
        only (`tuple` of `str`): what `--only` takes, as a metavar and in words.
    """
    metavar, says = only
    parser.add_argument(
        "--out", type=Path, help=f"folder of the results, by default {out}, or {out}-SIZE of another size"
    )
    parser.add_argument("--only", nargs="+", metavar=metavar, help=says)
    parser.add_argument("--learning-rates", nargs="+", type=float, metavar="LR", help="another grid of learning rates")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="other seeds than the size's, for all")
    parser.add_argument("--size", choices=sorted(sizes), help=f"by default cpu, or {gpu_size} with --device cuda")
    parser.add_argument("--smoke", action="store_true", help="the same as --size smoke")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes, each with one thread on a CPU")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="stop after so many; the next command goes on where it was"
    )
    parser.add_argument("--list", action="store_true", help="say what there is to run and what is done, run nothing")
    parser.add_argument("--report", action="store_true", help="the report of what is done, run nothing")
    parser.set_defaults(gpu_size=gpu_size, folder=out)


def parse_arguments(
    parser: argparse.ArgumentParser, argv: list[str] | None, sizes: Mapping[str, Any]
) -> argparse.Namespace:
    """What the flags of `add_arguments` say, with the size that they mean; leaves with a word for what cannot be."""
    args = parser.parse_args(argv)
    if args.smoke and args.size not in (None, "smoke"):
        parser.error(f"--smoke is --size smoke, got --size {args.size}")
    args.size = "smoke" if args.smoke else args.size or {"cpu": "cpu", "cuda": args.gpu_size}[args.device]
    args.out = args.out or Path(args.folder if args.size == "cpu" else f"{args.folder}-{args.size}")
    if args.workers < 1:
        parser.error(f"--workers must be at least 1, got {args.workers}")
    if not args.minutes > 0:
        parser.error(f"--minutes must be more than 0, got {args.minutes:g}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that PyTorch finds")
    if args.device == "cpu" and sizes[args.size].bf16:
        parser.error(f"--size {args.size} needs --device cuda")
    return args


def run_study(
    args: argparse.Namespace,
    jobs: Sequence[Any],
    run: Callable[..., dict[str, Any] | None],
    *,
    groups: Mapping[str, str],
    group_of: Callable[[Any], str],
    outcome: Callable[[dict[str, Any]], str],
    report: Callable[[], Iterable[str]],
    prepare: Callable[[], Any],
    trainings: str = "trainings",
    width: int = 20,
) -> None:
    """What a command does once it knows its jobs: say what there is, or run what is not done yet and print the report.

    Args:
        jobs: with a `name` each, which is that of their JSON.
        run (`Callable`): one job, with the `deadline` as `time.time()`; returns what its JSON holds, or `None` if the
            deadline came first.
        groups (`Mapping`): what `--list` says of each group of jobs.
        group_of (`Callable`): a job's group.
        outcome (`Callable`): a result in a few words.
        report (`Callable`): writes the report and returns its lines.
        prepare (`Callable`): called before anything runs.
        trainings (`str`): what the jobs are called.
        width (`int`): of the groups' names in the list.

    Raises:
        `ValueError`: for a folder with a result of another size, before anything runs.
    """
    quiet()
    files = {job: args.out / f"{job.name}.json" for job in jobs}
    waiting = [job for job, file in files.items() if not file.exists()]
    for file in (file for file in files.values() if file.exists()):
        _read(file, args.size)
    if args.list:
        for group, says in groups.items():
            of_group = [job for job in jobs if group_of(job) == group]
            done = sum(job not in waiting for job in of_group)
            print(f"{group:{width}} {done}/{len(of_group)}  {says}")
        return
    if not args.report:
        print(f"{len(waiting)} of {len(jobs)} {trainings} to do, in {args.out}", flush=True)
        if args.device == "cpu":
            torch.set_num_threads(1)
        if waiting:
            prepare()
        started = time.time()

        def say(done: int, result: dict[str, Any] | None) -> None:
            if result is None:
                return
            wall, cpu = result["seconds"]["wall"], result["seconds"]["cpu"]
            print(
                f"{done}/{len(waiting)} {type(jobs[0])(**result['job']).name}: {outcome(result)}, gradient norm up to "
                f"{result['gradient_norm_max']}, {wall:.0f} s ({cpu:.0f} s of CPU), "
                f"{(time.time() - started) / 60:.0f} min in all",
                flush=True,
            )

        run_all(waiting, functools.partial(run, deadline=started + 60 * args.minutes), say, args.workers)
    for line in report():
        print(line)


def number(value: float) -> float | None:
    """JSON has no word for what is not a number."""
    return value if math.isfinite(value) else None


def without_nan(value: Any) -> Any:
    """`number` of all numbers in lists and dicts."""
    if isinstance(value, dict):
        return {name: without_nan(part) for name, part in value.items()}
    if isinstance(value, list):
        return [without_nan(part) for part in value]
    return number(value) if isinstance(value, float) else value


def write_json(file: Path, content: Any) -> None:
    write_text(file, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_results(
    folder: Path, size: str, is_current: Callable[[dict[str, Any]], bool], otherwise: str
) -> list[dict[str, Any]]:
    """The trainings in a folder.

    Args:
        size (`str`): the name of the size that they must have.
        is_current (`Callable`): whether a result is of what its job means today.
        otherwise (`str`): how it was trained if it is not.

    Raises:
        `ValueError`: for a training of another size, for one that is not current, and if there is none.
    """
    results = []
    for file in sorted(folder.glob("*-seed*.json")):
        result = _read(file, size)
        if not is_current(result):
            raise ValueError(f"{file} was trained {otherwise}: move it away or run it again.")
        results.append(result)
    if not results:
        raise ValueError(f"{folder} holds no training yet.")
    return results


def _read(file: Path, size: str) -> dict[str, Any]:
    result = json.loads(file.read_text())
    if result["size"]["name"] != size:
        raise ValueError(f"{file} is of size {result['size']['name']!r}, not {size!r}: take another --out.")
    return result


def write_report_files(folder: Path, lines: Iterable[str], content: Any, figure: Any, dpi: int = 150) -> None:
    """`report.md`, `report.json` and `report.png`."""
    (folder / "report.md").write_text("\n".join(lines) + "\n")
    write_json(folder / "report.json", content)
    figure.savefig(folder / "report.png", dpi=dpi)


def plain(content: Any) -> Any:
    """What JSON gives back of it: names as strings, tuples as lists."""
    return json.loads(json.dumps(content))


def markdown(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """A table's lines."""
    titles = list(titles)
    return [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def quiet() -> None:
    """Progress of a study is its own lines."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    import datasets

    datasets.disable_progress_bars()
