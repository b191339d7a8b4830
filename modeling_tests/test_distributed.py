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
"""More than one process, and weights in more than one place: everything gives what one process gives.

Two processes talk over gloo, see `distributed_worker.py`. The recipe for long sequences is run as its users run it.
"""

import copy
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.big_modeling import _refuse_recurrent_layers_under_sequence_parallelism
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from distributed_cases import (
    ALMOST_PLAIN_STEPS,
    BY_KERNEL,
    CONFIGS,
    INDIVISIBLE,
    PLAIN_STEPS,
    TRAINER_ARGUMENTS,
    conversion_pair,
    of_stage,
    padded_examples,
    token_ids,
)
from filelock import FileLock
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments, set_seed

from miras_hf import YaadConfig
from miras_hf.distillation import AlignmentTrainer, DistillationTrainer


ROOT = Path(__file__).resolve().parents[1]
ACCELERATE_CONFIGS = sorted((ROOT / "examples" / "accelerate").glob("*.yaml"))


def launch(*command: str | Path, **environment: str) -> str:
    """Runs a command that starts two processes, on the CPU; returns what they print."""
    run = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
    return run.stdout


def launch_environment(config: Path) -> dict[str, str]:
    """What `accelerate launch --config_file` puts into the environment of the processes that it starts."""
    arguments = launch_command_parser().parse_args(["--config_file", str(config), "train.py"])
    arguments, *_ = _validate_launch_command(arguments)
    environment = prepare_multi_gpu_env(arguments)
    return {name: value for name, value in environment.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The models, and the results of two processes: made once, also for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = base / "distributed"
    with FileLock(base / "distributed.lock"):
        if not folder.exists():
            folder.mkdir()
            for name, config in (CONFIGS | BY_KERNEL | INDIVISIBLE).items():
                set_seed(0)
                AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
            environment = launch_environment(ROOT / "examples" / "accelerate" / "fsdp2.yaml")
            environment.pop("ACCELERATE_MIXED_PRECISION")  # the results are compared in float32
            (folder / "fsdp2.json").write_text(json.dumps(environment))
            worker = Path(__file__).with_name("distributed_worker.py")
            # kernels run in Triton's interpreter; of the models, they know the one that is made for it
            environment = {"TRITON_INTERPRET": "1"}
            launch("torch.distributed.run", "--standalone", "--nproc-per-node", "2", worker, folder, **environment)
    return folder


@pytest.fixture
def results(folder):
    """The results of a function of the worker, one per rank."""

    def of(function: str) -> list:
        ranks = [rank[function] for rank in json.loads((folder / "results.json").read_text())]
        errors = [rank["error"] for rank in ranks if "error" in rank]
        assert not errors, errors[0]
        return ranks

    return of


@pytest.mark.parametrize("name", CONFIGS)
def test_tensor_parallel(results, name):
    for rank in results("tensor_parallel"):
        found = rank[name]
        assert set(found["heads"]) == {2}, "the memory is not sharded by heads"
        assert found["logits"] < 1e-5
        assert found["loss"] < 1e-6
        assert found["gradient"][1] < 1e-4, found["gradient"]
        assert found["same_text"]
        assert found["saved"] == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_tensor_parallel_quantized(results, name):
    for rank in results("tensor_parallel_quantized"):
        assert 0 < rank[name]["sharded"] < rank[name]["quantized"]


def test_sizes_that_do_not_fit_are_refused(results):
    for messages in results("refusals"):
        assert re.search(r"`num_attention_heads` \(3\) .* tensor parallel size \(2\)", messages["three-heads"])
        assert re.search(r"`num_key_value_heads` \(1\) .* tensor parallel size \(2\)", messages["one-key-value-head"])
        shared = messages["one-key-value-head-of-memories"]
        assert re.search(r"`memory_num_key_value_heads` \(1\) .* tensor parallel size \(2\)", shared)
        together = messages["one-norm-of-all-heads"]
        assert re.search(r"`output_norm_groups` \(1\) .* tensor parallel size \(2\)", together)
        queries = messages["one-query-key-head"]
        assert re.search(r"`memory_num_query_key_heads` \(1\) .* tensor parallel size \(2\)", queries)
        assert re.search(r"`vocab_size` \(99\) .* `fsdp_size` \(2\)", messages["tied-odd-vocabulary"])


@pytest.mark.parametrize("name", CONFIGS)
def test_data_parallel(results, name):
    for rank in results("data_parallel"):
        assert rank[name]["found"] == pytest.approx(rank[name]["expected"], abs=1e-5)


def test_trainer_on_two_processes(results, folder, tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=4, **TRAINER_ARGUMENTS)
    model = AutoModelForCausalLM.from_pretrained(folder / "hybrid")
    trainer = Trainer(model=model, args=arguments, train_dataset=padded_examples())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    for rank, found in enumerate(results("trainer")):
        assert found["wrapper"] == "DistributedDataParallel"
        if rank == 0:  # the one that logs
            assert found["losses"] == pytest.approx(losses, abs=1e-4)
    saved = AutoModelForCausalLM.from_pretrained(folder / "trainer")
    for (name, a), b in zip(model.named_parameters(), saved.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0, msg=name)


def assert_moved_alike(found: dict[str, list], model, before: dict[str, torch.Tensor], rtol: float = 1e-3) -> None:
    ways = {name: (p - before[name]).norm().item() for name, p in model.named_parameters()}
    assert max(ways.values()) > 1e-3
    for name, p in model.named_parameters():
        assert (torch.tensor(found[name]) - p).norm().item() <= rtol * ways[name] + 1e-7, name


def test_alignment_on_two_processes(results, tmp_path):
    """Errors are those of all rows over the size of all: of each process's alone, another loss would be learned."""
    student, teacher = conversion_pair()
    arguments = TrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=4, **PLAIN_STEPS)
    before = {name: p.clone() for name, p in student.named_parameters()}
    trainer = AlignmentTrainer(student, teacher, sink_tokens=1, args=arguments, train_dataset=padded_examples())
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    losses, errors = ([entry[name] for entry in logs] for name in ("loss", "alignment/layer_0"))
    evaluation = trainer.evaluate(padded_examples()[11:])["eval_alignment/layer_0"]
    for rank, found in enumerate(results("alignment")):
        assert found["wrapper"] == "DistributedDataParallel"
        assert found["evaluation"] == pytest.approx(evaluation, abs=1e-5)
        if rank == 0:  # the one that logs
            assert found["losses"] == pytest.approx(losses, abs=1e-6)
            assert found["errors"] == pytest.approx(errors, abs=1e-6)
        assert_moved_alike(found["weights"], student, before)


def test_distillation_on_two_processes(results, tmp_path):
    student, teacher = conversion_pair()
    before = {name: p.clone() for name, p in student.named_parameters()}
    arguments = TrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=4, **PLAIN_STEPS)
    rows = [{name: x for name, x in row.items() if name != "labels"} for row in padded_examples()]
    trainer = DistillationTrainer(student, teacher, body_learning_rate=1e-2, args=arguments, train_dataset=rows)
    trainer.train()
    evaluation = trainer.evaluate(padded_examples()[11:])["eval_loss"]
    for found in results("distillation"):
        assert found["evaluation"] == pytest.approx(evaluation, abs=1e-5)
        assert_moved_alike(found["weights"], student, before)


@pytest.mark.parametrize("stage", [1, 2])
def test_conversion_fully_sharded(results, stage, tmp_path):
    """FSDP2 learns what one process learns, also from a checkpoint on, and in bfloat16 about that in float32 shards."""
    student, teacher = conversion_pair(tied=True)
    before = {name: p.clone() for name, p in student.named_parameters()}
    arguments = TrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=4, **ALMOST_PLAIN_STEPS)
    kind, extra = of_stage(stage)
    trainer = kind(student, teacher, **extra, args=arguments, train_dataset=padded_examples())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    evaluation = trainer.evaluate(padded_examples()[11:])["eval_loss"]
    for rank, found in enumerate(results("conversion_sharded")):
        exact, rough = found[f"stage {stage}"], found[f"stage {stage}, bf16"]
        for of in (exact, rough):
            assert of["dtypes"] == ["torch.float32"] and of["whole"] == 0
            inner = ["FSDPMirasMixer"] if stage == 1 else ["FSDPMirasDecoderLayer"] * 2
            assert [name for name in of["sharded"] if name in inner] == inner
        assert exact["evaluation"] == pytest.approx(evaluation, abs=1e-5)
        if rank == 0:  # the one that logs
            assert exact["losses"] == pytest.approx(losses, abs=1e-6)
            assert rough["losses"] == pytest.approx(losses, rel=1e-2)
        assert_moved_alike(exact["weights"], student, before)
        assert_moved_alike(exact["resumed"], student, before)
        # not what bfloat16 can tell apart, which is three digits
        assert rough["evaluation"] == pytest.approx(evaluation, rel=1e-2)
        assert_moved_alike(rough["weights"], student, before, rtol=0.1)


@pytest.mark.parametrize("name", CONFIGS)
def test_fully_sharded_by_transformers(results, name):
    for rank in results("sharded_by_transformers"):
        found = rank[name]
        assert all(found["sharded"]), "the model, or a layer, is not sharded"
        assert found["logits"] == 0
        assert found["found"] == pytest.approx(found["expected"], abs=1e-5)
        assert found["saved"] < 1e-4


@pytest.mark.parametrize("way", ["data_parallel", "sharded"])
def test_by_kernel(results, way):
    for rank in results("by_kernel"):
        found = rank[way]
        assert found["sharded"] == (way == "sharded")
        assert found["found"] == pytest.approx(rank["expected"], abs=1e-5)
        assert found["weights"] < 1e-4


def test_fully_sharded_by_accelerate(results):
    for found in results("sharded_by_accelerate"):
        assert all(found["sharded"]), "the model, or a layer, is not sharded"
        assert found["found"] == pytest.approx(found["expected"], abs=1e-5)
        assert found["saved"] < 1e-4


def test_context_parallelism_is_refused(results, folder):
    # it would give every rank a piece of the text, and a memory that has not read the pieces before it
    for message in results("context_parallel_refusal"):
        assert "Context parallelism does not support" in message
        assert "miras_memory" in message
    model = AutoModelForCausalLM.from_pretrained(folder / "hybrid")
    assert not model.supports_context_parallel


@pytest.mark.parametrize("with_lora", [False, True])
@pytest.mark.parametrize("layers", [{}, {"layer_types": ["sliding_attention", "miras_memory"]}])
def test_sequence_parallelism_is_refused(layers, with_lora):
    # Accelerate asks this before DeepSpeed's Ulysses splits the sequences; attention alone is asked to exchange them
    sizes = {"vocab_size": 80, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    model = AutoModelForCausalLM.from_config(YaadConfig(**sizes, **layers))
    if with_lora:
        model = get_peft_model(model, LoraConfig())
    with pytest.raises(ValueError, match=r"Sequence parallelism does not support .*\['miras_memory'\]"):
        _refuse_recurrent_layers_under_sequence_parallelism(model)
    llama = LlamaConfig(**sizes, intermediate_size=48)
    _refuse_recurrent_layers_under_sequence_parallelism(AutoModelForCausalLM.from_config(llama))


def test_accelerate_asks_before_it_splits_sequences():
    # the question stands in the one place where Ulysses is set up: a test of its answer alone would miss its removal
    source = inspect.getsource(Accelerator._prepare_deepspeed)
    question, ulysses = "_refuse_recurrent_layers_under_sequence_parallelism(model)", ".register_with_transformers("
    assert 0 < source.index(question) < source.index(ulysses)


def test_a_recurrent_layer_type_is_its_name_in_all_else():
    config = YaadConfig(num_hidden_layers=2, attention_layers=[1])
    memory, attention = config.layer_types
    assert memory == "miras_memory" and hash(memory) == hash("miras_memory") and repr(memory) == "'miras_memory'"
    assert "linear_attention" in memory and "linear_attention" not in attention
    assert "miras" in memory and "attention" not in memory
    assert json.dumps(config.layer_types) == '["miras_memory", "sliding_attention"]'
    assert "linear_attention" in copy.deepcopy(config).layer_types[0]


@pytest.mark.parametrize("config", ACCELERATE_CONFIGS, ids=lambda path: path.stem)
def test_accelerate_configs(config, monkeypatch):
    environment = launch_environment(config)
    fields = yaml.safe_load(config.read_text())
    assert environment["ACCELERATE_MIXED_PRECISION"] == fields["mixed_precision"]
    command = re.search(r"accelerate launch --config_file (\S+) (\S+)", config.read_text())
    assert all((ROOT / path).exists() for path in command.groups()), (
        "the header's command names files that are not there"
    )
    if fields["distributed_type"] == "FSDP":
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2
        model = AutoModelForCausalLM.from_config(CONFIGS["moneta"])
        plugin.set_auto_wrap_policy(model)  # raises if the model has no module of that class


@pytest.mark.parametrize("name", ["moneta", "hybrid", "matrix"])
def test_offloading_to_disk(folder, tmp_path, name):
    whole = AutoModelForCausalLM.from_pretrained(folder / name)
    size = sum(parameter.nbytes for parameter in whole.parameters())
    model = AutoModelForCausalLM.from_pretrained(
        folder / name, device_map="auto", max_memory={"cpu": int(0.9 * size)}, offload_folder=tmp_path
    )
    assert "disk" in model.hf_device_map.values()
    batch = token_ids(2, 19)
    with torch.no_grad():
        assert model(batch).logits.equal(whole(batch).logits)
    generation = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert model.generate(batch, **generation).equal(whole.generate(batch, **generation))


def test_ranks_along_a_long_sequence():
    # also the proof that `cpu.yaml` starts two processes
    printed = launch(
        "accelerate.commands.launch",
        "--config_file",
        ROOT / "examples" / "accelerate" / "cpu.yaml",
        ROOT / "examples" / "long_context_ranks.py",
        "--smoke",
        ACCELERATE_USE_CPU="true",
    )
    assert "2 ranks" in printed
    loss, gradient, truncated = map(
        float, re.search(r"loss (\S+), gradients (\S+), truncated (\S+)", printed).groups()
    )
    assert loss < 1e-5
    assert gradient < 1e-5
    assert truncated > 1e-3, "without gradients between ranks there should be something missing"
    losses = [float(loss) for loss in re.findall(r"step \d+: loss (\S+)", printed)]
    assert losses[-1] < losses[0]
