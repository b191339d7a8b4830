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
"""Data and trainings of the bridge: the text of `pretrain.py`, and one JSON a run."""

import fnmatch
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pretrain
import torch
from bridge_models import build_model
from bridge_points import ENDS, RUNGS
from models import ModelShape
from provenance import command_line, machine
from safetensors.torch import save_model
from study import OutOfTime, elsewhere, number, train, write_json
from torch import Tensor, nn

from miras_hf.callbacks import measure_memories
from miras_hf.files import atomic_write
from miras_hf.modeling_miras import MirasMixer


@dataclass(frozen=True)
class Size:
    """How large a study is: the shape of its models, the tokens that they see, and the grid of learning rates."""

    name: str
    shape: ModelShape
    context: int = 512
    rows: int = 2
    steps: int = 400
    learning_rates: tuple[float, ...] = (2e-3, 4e-3, 8e-3)
    seeds_of_ends: int = 3
    validation_rows: int = 64
    documents: int | None = None
    bf16: bool = False
    vocabulary: int = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "vocabulary", self.shape.vocabulary)

    @property
    def tokens(self) -> int:
        return self.context * self.rows * self.steps


SIZES = {
    size.name: size
    for size in (
        Size("cpu", ModelShape(width=128, layers=4, heads=2, vocabulary=2048)),
        Size("long", ModelShape(width=128, layers=4, heads=2, vocabulary=2048), steps=2000),
        Size(
            "context-2048",
            ModelShape(width=128, layers=4, heads=2, vocabulary=2048),
            context=2048,
            rows=1,
            steps=1000,
            validation_rows=16,
        ),
        Size("wide", ModelShape(width=256, layers=4, heads=4, vocabulary=2048), rows=4, steps=1000),
        Size("cuda", ModelShape(width=256, layers=4, heads=4, vocabulary=2048), rows=32, steps=150, bf16=True),
        Size(
            "smoke",
            ModelShape(width=32, layers=2, heads=2, vocabulary=320),
            context=32,
            steps=6,
            learning_rates=(1e-2,),
            seeds_of_ends=1,
            validation_rows=4,
            documents=40,
        ),
    )
}


@dataclass(frozen=True)
class Job:
    """One training: a rung, a learning rate, a seed."""

    rung: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.rung}-lr{self.learning_rate:g}-seed{self.seed}"


def jobs_of(
    size: Size,
    rungs: Sequence[str],
    ends: Sequence[str] = ENDS,
    learning_rates: Sequence[float] | None = None,
    seeds: Sequence[int] | None = None,
) -> list[Job]:
    """All trainings of the rungs, those that say most first: the ends over the grid, every rung at the middle of the
    grid, the rest of the grid, the other seeds of the ends.

    Args:
        ends (sequence of `str`): the rungs that have more seeds.
        learning_rates, seeds (sequences, *optional*): others than the size's, of every rung.
    """
    rates = size.learning_rates if learning_rates is None else learning_rates
    middle = rates[len(rates) // 2]

    def seeds_of(rung: str) -> Sequence[int]:
        return range(size.seeds_of_ends if rung in ends else 1) if seeds is None else seeds

    def rank(job: Job) -> tuple[int, ...]:
        if job.rung in ends:
            return (0,) if job.seed == seeds_of(job.rung)[0] else (3,)
        return (1,) if job.learning_rate == middle else (2,)

    jobs = [Job(rung, rate, seed) for rung in rungs for seed in seeds_of(rung) for rate in rates]
    return sorted(jobs, key=rank)  # stable: rungs stay in their order


def matching(only: Sequence[str] | None, rungs: Mapping[str, Any]) -> list[str]:
    """Names of the rungs that match a pattern of `--only`, in their order; those that run by default without any.

    Raises:
        `ValueError`: for a pattern that matches none.
    """
    if only is None:
        return [name for name, rung in rungs.items() if rung.default]
    for pattern in only:
        if not fnmatch.filter(rungs, pattern):
            raise ValueError(f"--only {pattern!r} names no rung; there are {', '.join(rungs)}.")
    return [name for name in rungs if any(fnmatch.fnmatch(name, pattern) for pattern in only)]


def in_words(rung: Any) -> str:
    """What a rung is, and what it stands against."""
    return rung.says if rung.parent is None else f"{rung.says} (against {rung.parent})"


def prepare_data(folder: Path, size: Size) -> dict[str, Tensor]:
    """Rows of ids, `train` and `validation`, `[rows, context]`: made by the functions of `pretrain.py` once, and kept in
    the folder.

    Raises:
        `ValueError`: for a folder whose rows were made for another size, and for less text than the size needs.
    """
    file, wanted = (
        folder / "data.pt",
        {
            "context": size.context,
            "vocabulary": size.vocabulary,
            "documents": size.documents,
            "validation_rows": size.validation_rows,
            "python": platform.python_version(),
        },
    )
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        data = pretrain.DataArguments(
            block_size=size.context, max_eval_samples=size.validation_rows, max_documents=size.documents
        )
        model = pretrain.ModelArguments(vocab_size=size.vocabulary)
        arguments = pretrain.PretrainingArguments(output_dir=str(folder / "tokenizer"), use_cpu=True)
        documents = pretrain.load_documents(data)
        tokenizer = pretrain.get_tokenizer(model, data, arguments, documents)
        if len(tokenizer) > size.vocabulary:
            raise ValueError(f"The tokenizer has {len(tokenizer)} ids and the models {size.vocabulary}.")
        train, validation = pretrain.pack(documents, tokenizer, data)
        rows = {"train": train, "validation": validation}
        kept = {name: torch.tensor(list(split["input_ids"]), dtype=torch.int32) for name, split in rows.items()}
        with atomic_write(file) as part:
            torch.save({"wanted": wanted, "rows": kept}, part)
    found = torch.load(file)
    if found["wanted"] != wanted:
        raise ValueError(f"{file} was made for {found['wanted']}, and this study wants {wanted}: take another --out.")
    available = len(found["rows"]["train"])
    if available < size.rows * size.steps:
        raise ValueError(f"The text has {available} rows of {size.context} ids, fewer than {size.rows * size.steps}.")
    return found["rows"]


@torch.no_grad()
def validate(model: nn.Module, rows: Tensor, arguments, precision, at_once: int) -> float:
    """Mean loss in nats over the rows."""
    model.eval()
    losses = []
    for ids in rows.split(at_once):
        with precision():
            losses.append(model(ids, labels=ids, **arguments(ids)).loss.float() * len(ids))
    model.train()
    return (torch.stack(losses).sum() / len(rows)).item()


@dataclass
class Trained:
    """A model at the end of its training, and what measures it.

    Args:
        model (`nn.Module`): in eval mode.
        arguments (`Callable`): what its forward takes besides ids.
        rows (`torch.Tensor` of shape `[rows, context]`): the validation text.
        precision (`Callable`): the context in which it computes.
        at_once (`int`): rows of a call.
    """

    model: nn.Module
    arguments: Callable[[Tensor], dict[str, Any]]
    rows: Tensor
    precision: Callable[[], AbstractContextManager]
    at_once: int

    def validate(self) -> float:
        return validate(self.model, self.rows, self.arguments, self.precision, self.at_once)


Loss = Callable[[nn.Module, Callable[[Tensor], dict[str, Any]], Tensor, int], Tensor]
"""A training's loss of a model, what it takes besides ids, ids `[rows, context]` and the step."""


def next_token_loss(model: nn.Module, arguments: Callable, ids: Tensor, step: int) -> Tensor:
    return model(ids, labels=ids, **arguments(ids)).loss


def run_job(
    job: Job,
    size: Size,
    folder: Path,
    device: str = "cpu",
    keep_weights: bool = False,
    intervals: int = 20,
    deadline: float = math.inf,
) -> dict[str, Any] | None:
    """Trains one rung of the bridge, see `run_training`."""
    rung = RUNGS[job.rung]
    about = {"says": rung.says, "parent": rung.parent, "point": rung.point.as_dict()}
    return run_training(
        job,
        size,
        folder,
        lambda: build_model(rung.point, size.shape, job.seed),
        about,
        device=device,
        keep_weights=keep_weights,
        intervals=intervals,
        deadline=deadline,
    )


def run_training(
    job: Job,
    size: Size,
    folder: Path,
    build: Callable[[], tuple[nn.Module, Callable[[Tensor], dict[str, Any]]]],
    about: dict[str, Any],
    *,
    device: str = "cpu",
    keep_weights: bool = False,
    intervals: int = 20,
    deadline: float = math.inf,
    loss: Loss = next_token_loss,
    measure: Callable[[Trained], dict[str, Any]] = lambda trained: {},
) -> dict[str, Any] | None:
    """Trains one job and writes its JSON, whole or not at all, and before it the weights if they are to be kept. One that
    was stopped or killed goes on from what it has left in the folder.

    Args:
        build (`Callable`): a new model, and what its forward takes besides ids.
        about (`dict`): what the JSON says of the model: `says`, `parent` and `point`.
        deadline (`float`): as `time.time()`.
        loss (`Callable`): what is trained.
        measure (`Callable`): more for the JSON, of a training that has reached its end.

    Returns the JSON's content, or `None` if the deadline came first: then what was trained waits in the folder.
    """
    if time.time() >= deadline:
        return None
    rows = {name: ids.long().to(device) for name, ids in prepare_data(folder, size).items()}
    # a seed's initial weights are the same on every device
    model, arguments = build()
    model.to(device)

    def precision():
        return torch.autocast(device, torch.bfloat16) if size.bf16 else nullcontext()

    trained = Trained(model, arguments, rows["validation"], precision, max(2, size.rows))
    # a seed's order is the same for every rung
    order = torch.randperm(len(rows["train"]), generator=torch.Generator().manual_seed(job.seed)).to(device)

    def loss_at(step: int) -> Tensor:
        ids = rows["train"][order[(step - 1) * size.rows : step * size.rows]]
        with precision():
            return loss(model, arguments, ids, step)

    def validation_at(step: int) -> float | None:
        return trained.validate() if step in (size.steps // 2, size.steps) else None

    unfinished = folder / f"{job.name}.unfinished.pt"
    try:
        course = train(
            model,
            loss_at,
            job.learning_rate,
            size.steps,
            intervals=intervals,
            measure=validation_at,
            unfinished=unfinished,
            what={"job": asdict(job), "size": asdict(size), **about, **elsewhere(device)},
            deadline=deadline,
        )
    except OutOfTime:
        return None
    validation = course.measured
    reached = course.reached and math.isfinite(validation[-1][1])
    model.eval()

    result = {
        "job": asdict(job),
        **about,
        "size": asdict(size),
        "device": device,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "intermediate_size": model.config.intermediate_size,
        "validation": validation[-1][1] if reached else None,
        "validation_by_step": [[step, number(value)] for step, value in validation],
        "diverged": not reached,
        **course.summary(),
        "memories": memories_after(model, rows["validation"][:2], arguments),
        **(measure(trained) if reached else {}),
        "tokens": size.context * size.rows * len(course.losses),
        "data": pretrain.data_name(pretrain.DataArguments())["name"],
        "command": command_line(),
        "machine": machine(torch.get_num_threads(), packages=("torch", "transformers", "miras-hf")),
        "seconds": course.seconds,
    }
    if keep_weights:
        save_model(model, folder / f"{job.name}.safetensors")
    write_json(folder / f"{job.name}.json", result)
    unfinished.unlink(missing_ok=True)
    return result


def loss_in_words(result: dict[str, Any]) -> str:
    return "diverged" if result["validation"] is None else f"{result['validation']:.4f}"


def memories_after(model: nn.Module, ids: Tensor, arguments) -> dict[str, dict[str, float | None]]:
    """What the memories of a model do after training, means over heads, by layer; empty for a model without any."""
    if not any(isinstance(module, MirasMixer) for module in model.modules()):
        return {}
    found = measure_memories(model, {"input_ids": ids, **arguments(ids)})
    return {
        str(layer): {name: number(value.mean().item()) for name, value in statistics._asdict().items()}
        for layer, statistics in found.items()
    }
