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
"""Trainings of the recall study: a model learns one task and is tested on it, one JSON a training."""

import functools
import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from provenance import command_line, machine
from recall_models import (
    DEFAULT_MODELS,
    Reader,
    RecallShape,
    StateReader,
    add_convolutions,
    build_model,
    described,
    state_size,
)
from recall_tasks import TASKS, UNSCORED, Examples, Part, Protocol, Task
from study import OutOfTime, elsewhere, number, train, write_json
from torch import Tensor


TRAIN, VALIDATION, TEST = 0, 1, 2
"""First numbers of the seeds of a task's sets, so that no two share any."""


@dataclass(frozen=True)
class Size:
    """What all tasks have in common at a size; `Task.protocols` has the rest.

    Args:
        head_dim, chunk (`int`): of the models.
        seeds (`int`): trainings that differ by initial weights and order of the data, of each point of the grid.
        bf16 (`bool`): whether products are in bfloat16.
        intervals (`int`): into how many a training is divided, for losses and for stopping at a deadline.
    """

    name: str
    head_dim: int
    chunk: int = 16
    seeds: int = 1
    bf16: bool = False
    intervals: int = 20


SIZES = {
    size.name: size
    for size in (
        Size("cpu", head_dim=16),
        Size("full", head_dim=32, seeds=3, bf16=True, intervals=200),
        Size("smoke", head_dim=16, chunk=4, intervals=3),
    )
}


@dataclass(frozen=True)
class Job:
    """One training."""

    task: str
    model: str
    width: int
    learning_rate: float
    weight_decay: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}-{self.model}-w{self.width}-lr{self.learning_rate:.3g}-wd{self.weight_decay:g}-seed{self.seed}"


def jobs_of(
    size: Size,
    pairs: Iterable[tuple[str, str]],
    learning_rates: Iterable[float] | None = None,
    widths: Iterable[int] | None = None,
    seeds: Iterable[int] | None = None,
) -> list[Job]:
    """All trainings of tasks and models over the size's grid, or another one; first seeds first."""
    jobs = [
        Job(task, model, width, rate, decay, seed)
        for task, model in pairs
        for protocol in (TASKS[task].protocols[size.name],)
        for width in widths or protocol.widths
        for rate in learning_rates or protocol.learning_rates
        for decay in protocol.weight_decays
        for seed in (range(size.seeds) if seeds is None else seeds)
    ]
    return sorted(jobs, key=lambda job: job.seed)  # stable


DEFAULT_PAIRS = [(name, model) for name, task in TASKS.items() if task.default for model in DEFAULT_MODELS]


class TrainingSet:
    """Batches of a task by number: the same for every model, made when they are asked for.

    With `distinct_batches` there are as many, in a new order every epoch, and a batch stays together; each is made
    once.
    """

    def __init__(self, task: Task, protocol: Protocol, seed: int):
        self.task, self.protocol, self.seed = task, protocol, seed
        self.shares = np.array([part.batches for part in protocol.train], dtype=float)
        self._kept: dict[int, Examples] = {}

    def __getitem__(self, step: int) -> Examples:
        """The batch of step 1, 2, ..."""
        distinct = self.protocol.distinct_batches
        if distinct is None:
            return self._made(step)
        epoch, place = divmod(step - 1, distinct)
        order = np.random.default_rng([TRAIN, self.seed, 0, epoch]).permutation(distinct)
        index = 1 + int(order[place])
        if index not in self._kept:
            self._kept[index] = self._made(index)
        return self._kept[index]

    def _made(self, index: int) -> Examples:
        rng = np.random.default_rng([TRAIN, self.seed, index])
        part = self.protocol.train[rng.choice(len(self.shares), p=self.shares / self.shares.sum())]
        return self.task.generate(rng, self.protocol.batch, self.protocol.vocabulary, True, **part.settings)


def examples_of(task: Task, protocol: Protocol, part: Part, split: int) -> Examples:
    """The validation or the test set of a part, the same for every model and seed."""
    rng = np.random.default_rng([split, *part.name.encode()])
    return task.generate(rng, protocol.test_examples, protocol.vocabulary, False, **part.settings)


@torch.no_grad()
def accuracy(
    logits_at: Callable[[Tensor, Tensor], Tensor],
    examples: Examples,
    at_once: int = 32,
    device: str = "cpu",
    precision: Callable[[], AbstractContextManager] = nullcontext,
) -> float:
    """The share of the labels that are the most likely token.

    Args:
        logits_at (`Callable`): as `Reader.forward`, logits at the positions where the second argument is True.

    Raises:
        `ValueError`: for examples without any label.
    """
    right = asked_for = 0
    for first in range(0, len(examples.ids), at_once):
        ids, labels = tensors(examples, slice(first, first + at_once), device)
        asked = labels != UNSCORED
        with precision():
            predicted = logits_at(ids, asked).argmax(-1)
        right += (predicted == labels[asked]).sum().item()
        asked_for += asked.sum().item()
    if not asked_for:
        raise ValueError("`examples` must ask for something, got no label.")
    return right / asked_for


def tensors(examples: Examples, rows: slice = slice(None), device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Ids and labels of some rows."""
    ids, labels = (torch.from_numpy(array[rows]).long().to(device) for array in (examples.ids, examples.labels))
    return ids, labels


def shape_of(size: Size, protocol: Protocol, width: int) -> RecallShape:
    """What a task's models are as large as."""
    chunk = size.chunk if protocol.chunk is None else protocol.chunk
    return RecallShape.of(width, protocol.layers, size.head_dim, protocol.vocabulary, chunk)


def model_today(job: Job, size: Size) -> dict[str, Any]:
    """What `recall_models.described` says of the model that a job trains."""
    return _described(job.model, shape_of(size, TASKS[job.task].protocols[size.name], job.width))


@functools.cache
def _described(name: str, shape: RecallShape) -> dict[str, Any]:
    with torch.device("meta"):
        model, _ = build_model(name, shape, seed=0)
    return described(name, model)


def run_job(
    job: Job, size: Size, folder: Path, device: str = "cpu", deadline: float = math.inf
) -> dict[str, Any] | None:
    """Trains and tests one job, and writes its JSON, whole or not at all.

    Returns `None` if the deadline (as `time.time()`) came first: then what was trained waits in the folder.
    """
    if time.time() >= deadline:
        return None
    task = TASKS[job.task]
    protocol = task.protocols[size.name]
    shape = shape_of(size, protocol, job.width)
    # a seed's initial weights are the same on every device
    model, arguments = build_model(job.model, shape, job.seed)
    if protocol.convolution:
        add_convolutions(model)
    reader = (StateReader if task.reads_last_state else Reader)(model, arguments)
    reader.to(device)
    batches = TrainingSet(task, protocol, job.seed)

    about = {
        "job": asdict(job),
        "size": asdict(size),
        "protocol": asdict(protocol),
        "model": described(job.model, model),
    }

    def precision() -> AbstractContextManager:
        return torch.autocast(device, torch.bfloat16) if size.bf16 else nullcontext()

    def loss_at(step: int) -> Tensor:
        ids, labels = tensors(batches[step], device=device)
        asked = labels != UNSCORED
        with precision():
            logits = reader(ids, asked)
        return F.cross_entropy(logits.float(), labels[asked])

    unfinished = folder / f"{job.name}.unfinished.pt"
    try:
        course = train(
            reader,
            loss_at,
            job.learning_rate,
            protocol.steps,
            weight_decay=job.weight_decay,
            intervals=size.intervals,
            unfinished=unfinished,
            what={**about, **elsewhere(device)},
            deadline=deadline,
        )
    except OutOfTime:
        return None
    reader.eval()

    def scores(part: Part, split: int) -> float | None:
        if not course.reached:
            return None
        examples = examples_of(task, protocol, part, split)
        at_once = max(1, min(protocol.batch, 2**16 // examples.ids.shape[1]))
        return accuracy(reader, examples, at_once, device, precision)

    result = {
        **about,
        "says": task.says,
        "chance": task.chance(size.name),
        "device": device,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "tests": {
            part.name: {
                "validation": scores(part, VALIDATION),
                "accuracy": scores(part, TEST),
                "state": state_size(model, arguments, examples_of(task, protocol, part, TEST).ids.shape[1]),
            }
            for part in protocol.tests
        },
        "diverged": not course.reached,
        **course.summary(),
        "command": command_line(),
        "machine": machine(torch.get_num_threads(), packages=("torch", "transformers", "miras-hf", "numpy")),
        "seconds": course.seconds,
    }
    if device == "cuda":
        result["machine"]["gpu"] = torch.cuda.get_device_name()
    write_json(folder / f"{job.name}.json", result)
    unfinished.unlink(missing_ok=True)
    return result


def mean_accuracy(result: dict[str, Any], which: str = "accuracy") -> float | None:
    """Of a result, the mean over its tests' parts; `None` if it diverged."""
    values = [test[which] for test in result["tests"].values()]
    return None if None in values else float(np.mean(values))


__all__ = [
    "DEFAULT_PAIRS",
    "SIZES",
    "TEST",
    "TRAIN",
    "VALIDATION",
    "Job",
    "Size",
    "TrainingSet",
    "accuracy",
    "examples_of",
    "jobs_of",
    "mean_accuracy",
    "model_today",
    "number",
    "run_job",
    "tensors",
]
