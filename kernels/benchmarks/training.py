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
"""Training of whole models: time and peak memory of a step, ours beside a Llama, Mamba2 and Gated DeltaNet of equal size.

A step is the forward pass with its loss and the backward pass; there is no optimizer. The number of tokens in a step is
the same at every length, so the batch goes down as the length goes up.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch


ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "kernels")]  # scripts, not a package
import own_packages  # noqa: E402, F401
import quick_interpreter  # noqa: E402, F401
from models import BUILDERS, LABELS, ModelShape, WholeModel, build  # noqa: E402
from timing import CLOCKS, Rounds, Sample, round_robin, summary, timed  # noqa: E402


MODELS = list(BUILDERS)


@dataclass(frozen=True)
class Training:
    """What is trained.

    Args:
        size (`str`): name of the shape.
        shape (`ModelShape`): of ours; the neighbours have as many parameters.
        lengths (`tuple` of `int`): tokens of a sequence.
        step_tokens (`int`): tokens of a step, a multiple of every length.
        autocast (`bool`): bfloat16 autocast over float32 weights, float32 alone if not.
        seconds (`float`): about how long the timed steps of all models at one length may take; one each at least.
    """

    size: str
    shape: ModelShape
    lengths: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768)
    step_tokens: int = 32768
    autocast: bool = True
    seconds: float = 10.0


def measure_training(run, training: Training, names: list[str]) -> None:
    """Adds a row of `"training"` to the run for every model and length; what fails or finds no memory is skipped by name."""
    models: dict[str, WholeModel] = {}
    for name in names:
        try:
            # a kernel or an error, never the slow path in silence
            models[name] = build(name, training.shape, run.device, our_settings={"memory_backend": "triton"})
            models[name].module.train()
        except Exception as error:
            run.skip(f"{training.size} {name}", f"{type(error).__name__}: {error}")
    for length in training.lengths:
        if not run.out_of_time(f"training of {training.size}, T = {length}"):
            measure_length(run, training, models, length)


def measure_length(run, training: Training, models: dict[str, WholeModel], length: int) -> None:
    """All models at one length, interleaved."""
    batch = training.step_tokens // length
    draw = torch.Generator().manual_seed(0)
    input_ids = torch.randint(training.shape.vocabulary, (batch, length), generator=draw).to(run.device)
    peaks: dict[str, float] = {}
    spent = 0.0

    def failed(key, error):
        release(models[key[0]], run.device)
        run.skip(f"training of {training.size} {key[0]}, T = {length}", f"{type(error).__name__}: {error}")

    def step(name: str) -> float:
        with torch.autocast(run.device, torch.bfloat16, enabled=training.autocast):
            loss = models[name].module(input_ids, labels=input_ids, use_cache=False).loss
        loss.backward()
        loss = loss.item()
        synchronize(run.device)
        models[name].module.zero_grad(set_to_none=True)
        return loss

    def first_steps(key) -> Sample:
        """Kernels are compiled in the first one; the second tells peak memory and about how long a step is."""
        nonlocal spent
        (name,) = key
        release(models[name], run.device)
        loss = step(name)
        if not abs(loss) < float("inf"):
            raise FloatingPointError(f"the loss is {loss}")
        with PeakMemory(run.device) as peak:
            start = time.perf_counter()
            step(name)
            spent += time.perf_counter() - start
        if peak.added is not None:
            weights = sum(p.numel() * p.element_size() for p in models[name].module.parameters())
            peaks[name] = (weights + peak.added) / 2**20
        return Sample(0.0, None)

    once = Rounds(wanted=1, most=1, quiet_limit=1.0, patience=0.0)
    keys = list(round_robin([[(name,) for name in models]], first_steps, once, failed))
    rounds = max(1, min(5, int(training.seconds / max(spent, 1e-6))))
    timed_rounds = Rounds(wanted=rounds, most=rounds, quiet_limit=1.0, patience=0.0)
    found = round_robin([keys], lambda key: timed(lambda: step(key[0]), 1, CLOCKS["wall"]), timed_rounds, failed)
    for (name,), samples in found.items():
        entry = summary(samples, timed_rounds.quiet_limit)
        low, high = (1e3 * s for s in entry["seconds_quartiles"])
        row = {"size": training.size, "model": name, "label": LABELS[name], "settings": models[name].settings}
        row |= {"parameters": models[name].parameters(), "batch": batch, "tokens": length}
        row |= {"median": 1e3 * entry["seconds"], "low": low, "high": high, "samples": len(samples)}
        row["tokens_per_s"] = batch * length / entry["seconds"]
        if name in peaks:
            row["peak_mib"] = round(peaks[name], 1)
        run.add("training", row)


class PeakMemory:
    """Bytes that a GPU's allocator handed out at most inside the block, above what it had before; `None` on a CPU."""

    added: int | None = None

    def __init__(self, device: str):
        self.device = device

    def __enter__(self):
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *_):
        if self.device == "cuda":
            self.added = torch.cuda.max_memory_allocated() - self.before


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def release(model: WholeModel, device: str) -> None:
    """Forgets gradients, and gives back what the allocator keeps: the next model's blocks have other sizes."""
    model.module.zero_grad(set_to_none=True)
    if device == "cuda":
        torch.cuda.empty_cache()
