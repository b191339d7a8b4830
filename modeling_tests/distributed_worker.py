# Copyright 2026 The miras-hf authors.
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
"""What two processes compute, for `test_distributed.py`, which starts this file with torchrun and looks at the numbers.

One start for everything, because starting is most of the time: each function below runs on both ranks and returns
numbers, the ranks' results go to one JSON file.
"""

import contextlib
import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from distributed_cases import (
    ALMOST_PLAIN_STEPS,
    CONFIGS,
    INDIVISIBLE,
    PLAIN_STEPS,
    TRAINER_ARGUMENTS,
    conversion_pair,
    of_stage,
    optimizer_of,
    padded_examples,
    token_ids,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torchao.quantization import Float8WeightOnlyConfig
from transformers import AutoModelForCausalLM, TorchAoConfig, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

import miras_hf  # noqa: F401  (registers the models)
from miras_hf.distillation import AlignmentTrainer, DistillationTrainer


def largest_difference(one, other) -> float:
    pairs = zip(one, other, strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def train(model, batch, optimizer) -> list[float]:
    """Losses of two steps."""
    losses = []
    for _ in range(2):
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def mean_over_ranks(values: list[float]) -> list[float]:
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return (total / dist.get_world_size()).tolist()


def my_rows(batch):
    return batch.chunk(dist.get_world_size())[dist.get_rank()]


def tensor_parallel(folder: Path) -> dict:
    results = {}
    for name in CONFIGS:
        whole = AutoModelForCausalLM.from_pretrained(folder / name)
        # both ways to ask for the plan of the config; the second is the older one
        ask = {"distributed_config": DistributedConfig(tp_size=2)} if name != "moneta" else {"tp_plan": "auto"}
        model = AutoModelForCausalLM.from_pretrained(folder / name, **ask)
        batch = token_ids(2, 19)
        expected, found = whole(batch, labels=batch), model(batch, labels=batch)
        expected.loss.backward()
        found.loss.backward()
        gradients = {}
        for (parameter_name, a), b in zip(whole.named_parameters(), model.parameters(), strict=True):
            gradient = b.grad.full_tensor() if hasattr(b.grad, "full_tensor") else b.grad
            gradients[parameter_name] = ((gradient - a.grad).norm() / a.grad.norm()).item()
        generation = dict(max_new_tokens=11, do_sample=False, eos_token_id=None, pad_token_id=0)
        prompt = batch[:, :7]
        saved = folder / f"{name}-tensor-parallel"
        model.save_pretrained(saved)
        dist.barrier()
        memories = [m for m in model.modules() if isinstance(m, miras_hf.modeling_miras.MirasMemory)]
        results[name] = {
            "heads": [memory.initial_state[0].to_local().shape[0] for memory in memories],
            "logits": largest_difference([expected.logits], [found.logits]),
            "loss": abs(expected.loss.item() - found.loss.item()),
            "gradient": max(gradients.items(), key=lambda item: item[1]),
            "same_text": model.generate(prompt, **generation).equal(whole.generate(prompt, **generation)),
            "saved": largest_difference(
                AutoModelForCausalLM.from_pretrained(saved).state_dict().values(), whole.state_dict().values()
            ),
        }
    return results


def tensor_parallel_quantized(folder: Path) -> dict:
    """What quantizing does to logits, and how far shards that are quantized one by one are from that."""
    results, batch = {}, token_ids(2, 19)
    for name in CONFIGS:
        logits = []
        for sizes in ({}, {"distributed_config": DistributedConfig(tp_size=2)}):
            quantization = TorchAoConfig(Float8WeightOnlyConfig())
            model = AutoModelForCausalLM.from_pretrained(folder / name, quantization_config=quantization, **sizes)
            with torch.no_grad():
                logits.append(model(batch).logits)
        with torch.no_grad():
            exact = AutoModelForCausalLM.from_pretrained(folder / name)(batch).logits
        results[name] = {
            "quantized": (logits[0] - exact).norm().item(),
            "sharded": (logits[1] - logits[0]).norm().item(),
        }
    return results


def refusals(folder: Path) -> dict:
    messages = {}
    for name in INDIVISIBLE:
        sizes = {"fsdp_size": 2} if name == "tied-odd-vocabulary" else {"tp_size": 2}
        try:
            AutoModelForCausalLM.from_pretrained(folder / name, distributed_config=DistributedConfig(**sizes))
            messages[name] = ""
        except ValueError as error:
            messages[name] = str(error)
    return messages


def data_parallel(folder: Path) -> dict:
    """Two steps: DistributedDataParallel complains in the second about parameters that the first one did not use."""
    results = {}
    for name in CONFIGS:
        batch = token_ids(4, 19)
        whole = AutoModelForCausalLM.from_pretrained(folder / name)
        model = DistributedDataParallel(AutoModelForCausalLM.from_pretrained(folder / name))
        results[name] = {
            "expected": train(whole, batch, optimizer_of(whole)),
            "found": mean_over_ranks(train(model, my_rows(batch), optimizer_of(model))),
        }
    return results


def trainer(folder: Path) -> dict:
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"), per_device_train_batch_size=2, ddp_backend="gloo", **TRAINER_ARGUMENTS
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "hybrid")
    trainer = Trainer(model=model, args=arguments, train_dataset=padded_examples())
    trainer.train()
    trainer.save_model()
    result = {
        "wrapper": type(trainer.model_wrapped).__name__,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }
    AcceleratorState._reset_state()
    return result


def alignment(folder: Path) -> dict:
    """Stage 1 of a conversion, on rows of different lengths, which leave each process other tokens."""
    student, teacher = conversion_pair()
    arguments = TrainingArguments(
        output_dir=str(folder / "alignment"), per_device_train_batch_size=2, ddp_backend="gloo", **PLAIN_STEPS
    )
    trainer = AlignmentTrainer(student, teacher, sink_tokens=1, args=arguments, train_dataset=padded_examples())
    trainer.train()
    result = {
        "wrapper": type(trainer.model_wrapped).__name__,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "errors": [entry["alignment/layer_0"] for entry in trainer.state.log_history if "loss" in entry],
        # one process has a row more than the other
        "evaluation": trainer.evaluate(padded_examples()[11:])["eval_alignment/layer_0"],
        "weights": {name: p.tolist() for name, p in student.named_parameters()},
    }
    AcceleratorState._reset_state()
    return result


def distillation(folder: Path) -> dict:
    """Stage 2 on the same rows, without labels: what counts is what is no pad."""
    student, teacher = conversion_pair()
    arguments = TrainingArguments(
        output_dir=str(folder / "distillation"), per_device_train_batch_size=2, ddp_backend="gloo", **PLAIN_STEPS
    )
    rows = [{name: x for name, x in row.items() if name != "labels"} for row in padded_examples()]
    trainer = DistillationTrainer(student, teacher, body_learning_rate=1e-2, args=arguments, train_dataset=rows)
    trainer.train()
    result = {
        "evaluation": trainer.evaluate(padded_examples()[11:])["eval_loss"],
        "weights": {name: p.tolist() for name, p in student.named_parameters()},
    }
    AcceleratorState._reset_state()
    return result


def sharded_by_transformers(folder: Path) -> dict:
    results = {}
    for name in CONFIGS:
        batch = token_ids(4, 19)
        whole = AutoModelForCausalLM.from_pretrained(folder / name)
        model = AutoModelForCausalLM.from_pretrained(folder / name, distributed_config=DistributedConfig(fsdp_size=2))
        optimizer = optimizer_of(model)  # before the first call, after which some parameters are gathered
        with torch.no_grad():
            logits = largest_difference([model(batch).logits], [whole(batch).logits])
        expected = train(whole, batch, optimizer_of(whole))
        found = mean_over_ranks(train(model, my_rows(batch), optimizer))
        saved = folder / f"{name}-fsdp"
        model.save_pretrained(saved)
        dist.barrier()
        results[name] = {
            "sharded": [isinstance(module, FSDPModule) for module in (model, *model.model.layers)],
            "logits": logits,
            "expected": expected,
            "found": found,
            "saved": largest_difference(
                AutoModelForCausalLM.from_pretrained(saved).state_dict().values(), whole.state_dict().values()
            ),
        }
    return results


def by_kernel(folder: Path) -> dict:
    """Both ways to train, the memory on Triton kernels, which the backend `triton` insists on, in their interpreter."""
    batch = token_ids(4, 19)
    whole = AutoModelForCausalLM.from_pretrained(folder / "by-kernel", memory_backend="pytorch")
    results = {"expected": train(whole, batch, optimizer_of(whole))}
    for way in ("data_parallel", "sharded"):
        ask = {"distributed_config": DistributedConfig(fsdp_size=2)} if way == "sharded" else {}
        model = AutoModelForCausalLM.from_pretrained(folder / "by-kernel", memory_backend="triton", **ask)
        optimizer = optimizer_of(model)
        model = model if way == "sharded" else DistributedDataParallel(model)
        results[way] = {
            "found": mean_over_ranks(train(model, my_rows(batch), optimizer)),
            "sharded": isinstance(model, FSDPModule),
            "weights": largest_difference(
                [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()], whole.parameters()
            ),
        }
    return results


@contextlib.contextmanager
def launched_with_fsdp2(folder: Path):
    """What runs inside was launched with examples/accelerate/fsdp2.yaml. It calls the function that it is given as soon as
    Accelerate knows its processes: left alone, that replaces FSDP by DDP where there are no GPUs."""
    environment = json.loads((folder / "fsdp2.json").read_text())
    os.environ.update(environment)
    AcceleratorState._reset_state(reset_partial_state=True)

    def as_on_gpus():
        PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU

    try:
        yield as_on_gpus
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        for name in environment:
            os.environ.pop(name)


@contextlib.contextmanager
def accelerate_as_on_gpus(folder: Path, **kwargs):
    with launched_with_fsdp2(folder) as as_on_gpus:
        as_on_gpus()
        yield Accelerator(cpu=True, **kwargs)


def sharded_by_accelerate(folder: Path) -> dict:
    batch = token_ids(4, 19)
    whole = AutoModelForCausalLM.from_pretrained(folder / "hybrid")
    with accelerate_as_on_gpus(folder) as accelerator:
        # only the first rank reads the weights
        model = AutoModelForCausalLM.from_pretrained(folder / "hybrid")
        model, optimizer = accelerator.prepare(model, optimizer_of(model))
        losses = train(model, my_rows(batch), optimizer)
        sharded = [isinstance(module, FSDPModule) for module in (model, *model.model.layers)]
        state = accelerator.get_state_dict(model)
        if accelerator.is_main_process:
            accelerator.unwrap_model(model).save_pretrained(folder / "accelerate", state_dict=state)
        accelerator.wait_for_everyone()
    saved = AutoModelForCausalLM.from_pretrained(folder / "accelerate")
    return {
        "sharded": sharded,
        "expected": train(whole, batch, optimizer_of(whole)),
        "found": mean_over_ranks(losses),
        "saved": largest_difference(saved.state_dict().values(), whole.state_dict().values()),
    }


def conversion_sharded(folder: Path) -> dict:
    """Both stages of a conversion with tied embeddings, sharded: in float32, from a checkpoint on, and in bfloat16."""
    results = {}
    for stage, bf16 in ((1, False), (1, True), (2, False), (2, True)):
        name = f"stage {stage}{', bf16' if bf16 else ''}"
        student, teacher = conversion_pair(tied=True)
        of_steps = {} if bf16 else {"save_strategy": "steps", "save_steps": 2}
        with launched_with_fsdp2(folder) as as_on_gpus:
            arguments = TrainingArguments(
                output_dir=str(folder / name),
                per_device_train_batch_size=2,
                ddp_backend="gloo",
                bf16=bf16,
                **ALMOST_PLAIN_STEPS | of_steps,
            )
            assert arguments.device.type == "cpu"  # with which the processes are known
            as_on_gpus()

            def trainer(student=student, arguments=arguments, teacher=teacher, stage=stage):
                kind, extra = of_stage(stage)
                return kind(student, teacher, **extra, args=arguments, train_dataset=padded_examples())

            first = trainer()
            first.train()
            shards = [p for p in first.model.parameters() if isinstance(p, DTensor)]
            results[name] = {
                "sharded": [
                    type(module).__name__ for module in first.model.modules() if isinstance(module, FSDPModule)
                ],
                "dtypes": sorted({str(p.dtype) for p in shards}),
                "whole": len([*first.model.parameters()]) - len(shards),
                "losses": [entry["loss"] for entry in first.state.log_history if "loss" in entry],
                "evaluation": first.evaluate(padded_examples()[11:])["eval_loss"],
            }
            results[name]["weights"] = learned_weights(first, folder / f"{name}-saved")
            if not bf16:
                student, _ = conversion_pair(tied=True)
                second = trainer(student)
                second.train(resume_from_checkpoint=str(folder / name / "checkpoint-2"))
                results[name]["resumed"] = learned_weights(second, folder / f"{name}-resumed")
    return results


def learned_weights(trainer: Trainer, saved: Path) -> dict:
    """Weights of the student as a user gets them: stage 1 leaves them in it, stage 2 in the folder where it is saved."""
    if isinstance(trainer, AlignmentTrainer):
        student = trainer.model_of_card()
    else:
        trainer.save_model(str(saved))
        dist.barrier()
        student = AutoModelForCausalLM.from_pretrained(saved)
    return {name: p.tolist() for name, p in student.named_parameters()}


def context_parallel_refusal(folder: Path) -> str:
    with accelerate_as_on_gpus(folder, parallelism_config=ParallelismConfig(cp_size=2)) as accelerator:
        model = AutoModelForCausalLM.from_config(CONFIGS["moneta"])
        try:
            accelerator.prepare(model, optimizer_of(model))
        except ValueError as error:
            return str(error)
    return ""


def main(folder: Path) -> None:
    # a rank that fails leaves the other one waiting: not for the half hour that is the default
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    mine = {}
    for run in (
        tensor_parallel,
        tensor_parallel_quantized,
        refusals,
        data_parallel,
        trainer,
        alignment,
        distillation,
        sharded_by_transformers,
        by_kernel,
        sharded_by_accelerate,
        conversion_sharded,
        context_parallel_refusal,
    ):
        try:
            mine[run.__name__] = run(folder)
        except Exception:
            mine[run.__name__] = {"error": traceback.format_exc()}
    results = [None] * dist.get_world_size()
    dist.all_gather_object(results, mine)
    if dist.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
