# Copyright 2026 The miras-hf authors..
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
"""The callback that logs what memories do: its numbers are the model's, everyone gets them, and training is untouched."""

import json
import math
import random

import datasets
import numpy as np
import peft
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from transformers import (
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations import integration_utils

from miras_hf import MemoraConfig, MemoraForCausalLM, MirasTokenizer, MonetaConfig, MonetaForCausalLM
from miras_hf.callbacks import MemoryMonitorCallback, measure_memories


SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 280, "chunk_size": 4}
STATISTICS = ("inner_loss", "inner_loss_initial", "write_strength", "retention", "half_life", "memory_norm")


def make_model(**kwargs) -> MonetaForCausalLM:
    """A hybrid with dropout, so that a forward in training mode draws random numbers."""
    torch.manual_seed(0)
    layers = {"layer_types": ["miras_memory", "sliding_attention", "miras_memory"], "sliding_window": 8}
    attention = {**layers, "attention_dropout": 0.2} if kwargs.get("layer_types", layers) else {}
    config = {**SIZES, **attention, "memory_expansion": 2, "gate_rank": 4, **kwargs}
    return MonetaForCausalLM(MonetaConfig(**config))


@pytest.fixture(scope="module")
def tokenizer():
    return MirasTokenizer.train_from_iterator(["a memory that learns while it reads"] * 3, vocab_size=280)


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(4, 280, (n,), generator=generator).tolist()} for n in (9, 12, 7, 10) * 4]


class Recorder(TrainerCallback):
    """A logger of `report_to`, as far as the trainer knows."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append(dict(logs))


def train(model, tokenizer, dataset, tmp_path, callbacks=(), monitor=None, **arguments):
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)

    def noisy(features):  # draws from every generator whenever a batch is put together
        batch = collator(features)
        noise = [torch.randint(4, 280, ()), np.random.randint(4, 280), random.randrange(4, 280)]
        batch["input_ids"][:, -3:] = torch.tensor([int(x) for x in noise])
        return batch

    arguments = {"max_steps": 4, "logging_steps": 2, "learning_rate": 1e-2, "report_to": "none", **arguments}
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, save_strategy="no", disable_tqdm=True, per_device_train_batch_size=2, **arguments
    )
    trainer = Trainer(model, args, data_collator=noisy, train_dataset=dataset, callbacks=list(callbacks))
    if monitor is not None:
        monitor.attach(trainer)
    trainer.train()
    return trainer


@pytest.mark.parametrize("streaming", [False, True])
def test_training_is_bit_for_bit_the_same(streaming, rows, tokenizer, tmp_path):
    def dataset():
        found = datasets.Dataset.from_list(rows)
        return found.to_iterable_dataset(num_shards=2).shuffle(seed=0, buffer_size=4) if streaming else found

    without = train(make_model(), tokenizer, dataset(), tmp_path)
    watched = train(make_model(), tokenizer, dataset(), tmp_path, monitor=MemoryMonitorCallback(rows=3))
    assert "memory/layer_0/inner_loss" in watched.state.log_history[0]
    assert [row.get("loss") for row in without.state.log_history] == [
        row.get("loss") for row in watched.state.log_history
    ]
    for name, parameter in without.model.named_parameters():
        assert torch.equal(parameter, watched.model.get_parameter(name)), name
    assert all(module.training for module in watched.model.modules())


def test_compiled_training_is_not_compiled_again(rows, tokenizer, tmp_path):
    dataset = datasets.Dataset.from_list([{"input_ids": row["input_ids"][:7]} for row in rows])
    arguments = {"torch_compile": True, "torch_compile_backend": "eager", "logging_steps": 1}
    small = {"layer_types": None, "num_hidden_layers": 1, "chunk_size": 8}
    torch._dynamo.reset()
    counters.clear()
    trainer = train(make_model(**small), tokenizer, dataset, tmp_path, monitor=MemoryMonitorCallback(), **arguments)
    assert sum("memory/layer_0/inner_loss" in row for row in trainer.state.log_history) == 4
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_every_memory_layer_is_logged_with_the_loss(rows, tokenizer, tmp_path, capsys):
    recorder = Recorder()
    dataset = datasets.Dataset.from_list(rows)
    probe = {"input_ids": torch.tensor([rows[1]["input_ids"]])}
    monitor = MemoryMonitorCallback(probe)
    trainer = train(make_model(), tokenizer, dataset, tmp_path, [recorder], monitor, eval_strategy="no")
    history = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["step"] for row in history] == [2, 4]
    names = {f"memory/layer_{layer}/{name}" for layer in (0, 2) for name in STATISTICS}
    for row, logged in zip(history, recorder.logs):
        assert {name for name in row if name.startswith("memory/")} == names
        assert {name: row[name] for name in logged} == logged and names < logged.keys()
        assert all(math.isfinite(row[name]) for name in names)
    assert not any(name.startswith("memory/") for name in trainer.state.log_history[-1])  # the summary
    assert "memory/layer_2/half_life" in capsys.readouterr().out
    json.dumps(trainer.state.log_history)

    # the last row is what the trained model does now
    for layer, statistics in measure_memories(trainer.model, probe).items():
        for name in set(STATISTICS) - {"half_life"}:
            assert history[-1][f"memory/layer_{layer}/{name}"] == pytest.approx(
                getattr(statistics, name).mean().item()
            )


def test_the_full_probe_is_logged_as_far_as_the_text_goes(rows, tokenizer, tmp_path):
    inputs = {"input_ids": torch.tensor([rows[1]["input_ids"]])}  # twelve tokens, three chunks
    monitor = MemoryMonitorCallback(inputs, full=True)
    trainer = train(make_model(), tokenizer, datasets.Dataset.from_list(rows), tmp_path, monitor=monitor, max_steps=2)
    (logged,) = [row for row in trainer.state.log_history if "loss" in row]
    prefix = "memory/layer_2/"
    names = {name.removeprefix(prefix) for name in logged if name.startswith(prefix)}
    assert names >= {*STATISTICS, "value_rms", "write_share", "recall_0", "chance_8", "half_life_50", "lyapunov"}
    assert not {"recall_60", "chance_200", "recall_1000"} & names
    assert all(math.isfinite(logged[prefix + name]) for name in names)
    # of the values that the layer's own modules make of the same tokens
    values = []
    mixer = trainer.model.model.layers[2].mixer
    mixer.v_conv.register_forward_hook(lambda m, i, out: values.append(out.detach()))
    with torch.no_grad():
        trainer.model.eval()(**inputs)
    assert trainer.model.config.value_norm
    values = values[0].unflatten(-1, (2, 16))
    values = values * (values.square().sum(-1, keepdim=True) + 1e-6).rsqrt() * 4.0
    rms = values.square().mean((0, 1, 3)).sqrt().mean().item()
    assert logged[prefix + "value_rms"] == pytest.approx(rms, rel=1e-5)


def test_after_the_loggers_it_says_so(rows, tokenizer, tmp_path, caplog, monkeypatch):
    class Logger(Recorder):
        found = []

        def on_log(self, args, state, control, logs, **kwargs):
            self.found.append(dict(logs))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Logger)
    caplog.set_level("WARNING", logger="transformers")
    monkeypatch.setattr("miras_hf.callbacks.logger.propagate", True)
    dataset = datasets.Dataset.from_list(rows)
    trainer = train(
        make_model(), tokenizer, dataset, tmp_path, [MemoryMonitorCallback()], report_to="tensorboard", max_steps=2
    )
    assert "memory/layer_0/inner_loss" in trainer.state.log_history[0]
    assert "memory/layer_0/inner_loss" not in Logger.found[0]
    assert "`report_to` (tensorboard)" in caplog.text and "attach(trainer)" in caplog.text

    caplog.clear()
    monitor = MemoryMonitorCallback()
    train(make_model(), tokenizer, dataset, tmp_path, [monitor], monitor, report_to="tensorboard", max_steps=2)
    assert "memory/layer_0/inner_loss" in Logger.found[2]
    assert "report_to" not in caplog.text


def test_statistics_are_those_of_the_forward(rows):
    """The gates that the callback reports are the gates that the model's modules return."""
    model = make_model().eval()
    ids = torch.tensor([rows[1]["input_ids"]])
    seen = {}
    for layer in (0, 2):
        mixer = model.model.layers[layer].mixer
        mixer.eta.register_forward_hook(lambda m, i, out, layer=layer: seen.update({layer: out.detach()}))
    found = measure_memories(model.train(), {"input_ids": ids})
    assert found.keys() == {0, 2} and all(module.training for module in model.modules())
    for layer, statistics in found.items():
        torch.testing.assert_close(statistics.write_strength, seen[layer].mean((0, 1, 3)))
        assert (statistics.inner_loss != statistics.inner_loss_initial).all()


def test_pads_and_packs_of_a_probe(rows):
    model = make_model(layer_types=None)
    first, second = (torch.tensor(row["input_ids"]) for row in rows[:2])
    padded = torch.zeros(2, 12, dtype=torch.long)
    padded[0, 3:], padded[1] = first, second
    by_rows = measure_memories(model, {"input_ids": padded, "attention_mask": (padded > 0).long()})
    position_ids = torch.cat((torch.arange(9), torch.arange(12)))[None]
    packed = measure_memories(model, {"input_ids": torch.cat((first, second))[None], "position_ids": position_ids})
    for layer in range(3):
        torch.testing.assert_close(by_rows[layer], packed[layer], rtol=1e-5, atol=1e-6)


def test_wrapped_models(rows):
    model = make_model()
    probe = {"input_ids": torch.tensor([rows[1]["input_ids"]])}
    plain = measure_memories(model, probe)
    compiled = torch.compile(model, backend="eager")
    assert measure_memories(compiled, probe)[2].memory_norm.equal(plain[2].memory_norm)
    tuned = peft.get_peft_model(model, peft.LoraConfig(modules_to_save=["memory"]))
    assert measure_memories(tuned, probe)[2].memory_norm.equal(plain[2].memory_norm)
    memory = tuned.base_model.model.model.layers[2].mixer.memory.modules_to_save["default"]
    with torch.no_grad():
        memory.initial_state[0].mul_(3.0)
    assert not measure_memories(tuned, probe)[2].memory_norm.equal(plain[2].memory_norm)


def test_low_precision_weights_are_measured_in_float32(rows):
    torch.manual_seed(0)
    model = MemoraForCausalLM(MemoraConfig(**SIZES)).bfloat16()
    found = measure_memories(model, {"input_ids": torch.tensor([rows[0]["input_ids"]])})
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in found[0])


def test_sharded_models_are_not_measured(rows, tokenizer, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("miras_hf.callbacks.logger.propagate", True)
    model = make_model()
    model.lm_head.weight.ds_id = 0  # the mark of ZeRO-3
    dataset = datasets.Dataset.from_list(rows)
    trainer = train(model, tokenizer, dataset, tmp_path, monitor=MemoryMonitorCallback(), max_steps=2)
    assert "sharded over processes" in caplog.text
    assert not any("memory" in name for row in trainer.state.log_history for name in row)


def test_mistakes_are_named(rows, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="`rows` must be at least 1, got 0"):
        MemoryMonitorCallback(rows=0)
    config = LlamaConfig(
        hidden_size=8, num_attention_heads=1, num_hidden_layers=1, intermediate_size=8, vocab_size=280
    )
    dataset = datasets.Dataset.from_list(rows)
    model: nn.Module = LlamaForCausalLM(config)
    with pytest.raises(ValueError, match="memory layers to be monitored, got a LlamaForCausalLM"):
        train(model, tokenizer, dataset, tmp_path, monitor=MemoryMonitorCallback())
