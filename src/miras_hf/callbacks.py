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
"""What only these models have to log while they train: what their memories recall, write and keep."""

import itertools
import math
import random
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, IterableDataset
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.utils import logging

from .memory import MemoryParameters
from .memory.diagnostics import MemoryStatistics, memory_statistics
from .memory.probe import LENGTH_BOUND, probe_memory, summary
from .modeling_miras import MirasMemory, MirasMixer


if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments


logger = logging.get_logger(__name__)


class MemoryMonitorCallback(TrainerCallback):
    """
    Logs, next to the loss and for every memory layer, what the memories of a probe batch do: `inner_loss`,
    `inner_loss_initial`, `write_strength`, `retention`, `half_life` and `memory_norm`, means over heads of
    [`~miras_hf.memory.diagnostics.MemoryStatistics`], named `memory/layer_0/inner_loss` and so on.

    With `full=True` the numbers of [`~miras_hf.memory.probe.MemoryProbe`] are logged besides: `value_rms`, `write_rms`,
    `write_share`, `chunk_share`, `writing_heads`, `recall_0`, `recall_60`, `lyapunov` and more, those that the probe is too
    short for left out. They say whether what is written arrives, at several times the cost.

    Every time the loss is logged the probe is read once, without gradients and in eval mode. Training is the same, bit
    for bit, as without the callback. With several processes the first one measures; models whose parameters are
    sharded (FSDP, ZeRO-3, tensor parallelism) cannot be run by one process alone and are not measured, with a warning.

    Args:
        probe (`Mapping[str, torch.Tensor]`, *optional*):
            Inputs of the model to measure on; labels are not used. `None` takes the first rows of the training
            dataset, put together by the trainer's data collator.
        rows (`int`, *optional*, defaults to 4): How many rows to take if no probe is given.
        full (`bool`, *optional*, defaults to `False`): Whether to probe what writes do, too.

    Raises:
        `ValueError`: for `rows` below one, and at the start of training for a model without memory layers.

    ```python
    >>> trainer = Trainer(model=model, args=args, train_dataset=dataset)
    >>> MemoryMonitorCallback().attach(trainer)
    >>> trainer.train()
    ```
    """

    def __init__(self, probe: Mapping[str, Tensor] | None = None, rows: int = 4, full: bool = False):
        if rows < 1:
            raise ValueError(f"`rows` must be at least 1, got {rows}.")
        self.given_probe, self.rows, self.full = probe, rows, full
        self.probe: dict[str, Any] | None = None
        self.is_first = False

    def attach(self, trainer: "Trainer") -> "MemoryMonitorCallback":
        """Puts the callback before the trainer's others, so that the loggers of `report_to` get what it adds.

        In `Trainer(callbacks=[...])` it works too, but comes after them: the statistics are in
        `trainer.state.log_history` and on the console only.
        """
        callbacks = trainer.callback_handler.callbacks
        callbacks[:] = [self, *(callback for callback in callbacks if callback is not self)]
        self.is_first = True
        return self

    def on_train_begin(
        self,
        args: "TrainingArguments",
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        train_dataloader: DataLoader | None = None,
        **kwargs,
    ):
        if not any(isinstance(module, MirasMixer) for module in model.modules()):
            raise ValueError(f"`model` must have memory layers to be monitored, got a {type(model).__name__}.")
        self.probe = None
        if not state.is_world_process_zero:
            return
        if _is_sharded(model):
            logger.warning(
                "MemoryMonitorCallback: no statistics, since the model's parameters are sharded over processes."
            )
            return
        if args.report_to and not self.is_first:
            logger.warning(
                f"MemoryMonitorCallback: the loggers of `report_to` ({', '.join(args.report_to)}) come before it and "
                "get no statistics. `MemoryMonitorCallback().attach(trainer)` puts it first."
            )
        probe = self.given_probe
        if probe is None:
            with _randomness_restored():
                probe = _first_rows(train_dataloader, self.rows)
        self.probe = {name: value for name, value in probe.items() if name != "labels"}

    def on_log(
        self,
        args: "TrainingArguments",
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        logs: dict[str, float] | None = None,
        **kwargs,
    ):
        if self.probe is None or "loss" not in logs:  # evaluations and the summary are logged by this event, too
            return
        with _randomness_restored():
            numbers = [(layer, _over_heads(found)) for layer, found in measure_memories(model, self.probe).items()]
            if self.full:
                probed = measure_memories(model, self.probe, probe_memory)
                numbers += [(layer, summary(found)) for layer, found in probed.items()]
        values = {
            f"memory/layer_{layer}/{name}": value
            for layer, of_layer in numbers
            for name, value in of_layer.items()
            if not (name in LENGTH_BOUND and math.isnan(value))
        }
        logs.update(values)
        state.log_history[-1].update(values)


Measured = TypeVar("Measured")


@torch.no_grad()
def measure_memories(
    model: nn.Module, inputs: Mapping[str, Any], function: Callable[..., Measured] = memory_statistics
) -> dict[int, Measured]:
    """Runs a model once, in eval mode, and returns the statistics of its memory layers by layer index.

    Args:
        model (`nn.Module`): a Miras model, bare or wrapped (PEFT, `DistributedDataParallel`, `torch.compile`).
        inputs (`Mapping`): its inputs, tensors on any device; without a cache.
        function (`Callable`, *optional*, defaults to [`~miras_hf.memory.diagnostics.memory_statistics`]):
            What to measure of the tokens that a memory reads, or [`~miras_hf.memory.probe.probe_memory`].
    """
    from accelerate.utils import extract_model_from_parallel  # Trainer needs it, the models do not

    model = extract_model_from_parallel(model, keep_torch_compile=False)
    device = next(model.parameters()).device
    inputs = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in inputs.items()}
    found: dict[int, Measured] = {}
    hooks = []
    for mixer in (module for module in model.modules() if isinstance(module, MirasMixer)):
        # not `mixer.memory`: PEFT's `modules_to_save` puts two memories there, of which one is called
        for memory in (module for module in mixer.modules() if isinstance(module, MirasMemory)):

            def measure(memory: MirasMemory, args: tuple, layer: int = mixer.layer_idx) -> None:
                tokens, sequences, _ = args
                parameters = MemoryParameters(memory.initial_state(), memory.norm_weight, memory.norm_bias)
                *x, log_momentum, erase = tokens.finished(position=sequences.position)
                others = sequences.of_writes(memory.backend.writes)
                # functions for other memories need not know them
                more = {"log_momentum": log_momentum, "erase": erase}
                others |= {name: t for name, t in more.items() if t is not None}
                found[layer] = function(*x, rule=memory.rule, parameters=parameters, **others)

            hooks.append(memory.register_forward_pre_hook(measure))
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):  # hooks would have compiled layers compiled again
            model(**inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True
    return dict(sorted(found.items()))


def _over_heads(statistics: MemoryStatistics) -> dict[str, float]:
    # half-lives of heads are as far apart as those of channels
    half_life = statistics.half_life.log().mean().exp()
    return {name: value.mean().item() for name, value in statistics._replace(half_life=half_life)._asdict().items()}


def _first_rows(dataloader: DataLoader, rows: int) -> dict[str, Any]:
    """The first rows of a dataset through its collator. The dataloader's own iterator, and its sampler, stay alone."""
    dataset = dataloader.dataset
    if isinstance(dataset, IterableDataset):
        examples: Iterable = itertools.islice(iter(dataset), rows)
    else:
        examples = (dataset[i] for i in range(min(rows, len(dataset))))
    return dataloader.collate_fn(list(examples))


def _is_sharded(model: nn.Module) -> bool:
    # FSDP1 keeps flat parameters and ZeRO-3 marks its own; FSDP2 and tensor parallelism have distributed tensors
    return any(
        isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") or hasattr(parameter, "_is_flat_param")
        for parameter in model.parameters()
    )


@contextmanager
def _randomness_restored():
    """Leaves the generators of torch, numpy and Python as they were: collators and transforms may draw from any."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


__all__ = ["MemoryMonitorCallback", "measure_memories"]
