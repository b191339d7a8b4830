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
"""`Trainer` as people use it: what must change nothing changes nothing, and what is saved goes on where it stopped."""

import datasets
import numpy as np
import pytest
import torch
from memory_effects import never_writing
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from miras_hf import MemoraConfig, MemoraForCausalLM, MirasLayer, MirasTokenizer, MonetaConfig, MonetaForCausalLM
from miras_hf.weight_decay import undecayed_parameter_names


SIZES = {"vocab_size": 270, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "chunk_size": 4}
MEMORY = {"memory_expansion": 2, "gate_rank": 4, "initializer_range": 0.1, "pad_token_id": 0}
HYBRID = {"layer_types": ["miras_memory", "sliding_attention"], "sliding_window": 6}


def make_model(model_class=MonetaForCausalLM, **kwargs):
    torch.manual_seed(0)
    config = {MonetaForCausalLM: MonetaConfig, MemoraForCausalLM: MemoraConfig}[model_class]
    hybrid = HYBRID if kwargs.get("layer_types", HYBRID) else {}
    return model_class(config(**{**SIZES, **MEMORY, **hybrid, **kwargs}))


@pytest.fixture(scope="module")
def padded():
    # of a row with pads on the left, Trainer counts the first token as a target, which nobody predicts
    tokenizer = MirasTokenizer.train_from_iterator(["to be or not to be"], vocab_size=270, padding_side="right")
    return DataCollatorForLanguageModeling(tokenizer, mlm=False)


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 270, (n,), generator=generator).tolist()} for n in (11, 1, 9, 14)]


def train(model, collator, dataset, folder, resume=None, **arguments) -> Trainer:
    defaults = {"per_device_train_batch_size": 4, "max_steps": 1, "logging_steps": 1, "save_strategy": "no"}
    args = TrainingArguments(
        str(folder), **{**defaults, "use_cpu": True, "report_to": "none", "disable_tqdm": True, **arguments}
    )
    if isinstance(dataset, list):
        dataset = datasets.Dataset.from_list(dataset)
    trainer = Trainer(model, args, data_collator=collator, train_dataset=dataset)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer: Trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


# -- what changes nothing ---------------------------------------------------------------------------------------------

# one step of plain gradient descent: the difference of the weights is the gradient
ONE_STEP = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}


def gradients(model_class, collator, rows, folder, **arguments) -> tuple[float, dict[str, Tensor]]:
    before = {name: p.detach() for name, p in make_model(model_class).named_parameters()}
    trainer = train(make_model(model_class), collator, rows, folder, **ONE_STEP, **arguments)
    return losses(trainer)[0], {n: before[n] - p.detach() for n, p in trainer.model.named_parameters()}


@pytest.fixture(scope="module", params=[MonetaForCausalLM, MemoraForCausalLM])
def reference(request, padded, rows, tmp_path_factory):
    """Loss and gradients of the rows as a padded batch, and of each row alone, weighted by its tokens."""
    loss, found = gradients(request.param, padded, rows, tmp_path_factory.mktemp("reference"))
    model = make_model(request.param)
    targets = sum(len(row["input_ids"]) - 1 for row in rows)
    total = 0.0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        if ids.shape[1] > 1:
            total = total + model(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1) / targets
    total.backward()
    assert loss == pytest.approx(total.item(), abs=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5)
    return request.param, loss, found


WAYS = {
    "flattened": (DataCollatorWithFlattening(), {}),
    "flattened_borders": (DataCollatorWithFlattening(return_flash_attn_kwargs=True), {}),
    "flattened_seq_idx": (DataCollatorWithFlattening(return_seq_idx=True, return_position_ids=False), {}),
    "flattened_all": (DataCollatorWithFlattening(return_seq_idx=True, return_flash_attn_kwargs=True), {}),
    "accumulated": (None, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}),
    "accumulated_packs": (
        DataCollatorWithFlattening(),
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    ),
    "checkpointed": (None, {"gradient_checkpointing": True}),
    "checkpointed_packs": (DataCollatorWithFlattening(), {"gradient_checkpointing": True}),
}


@pytest.mark.parametrize("way", WAYS)
def test_other_ways_to_the_same_gradient(way, reference, padded, rows, tmp_path):
    model_class, loss, expected = reference
    collator, arguments = WAYS[way]
    found_loss, found = gradients(model_class, collator or padded, rows, tmp_path, **arguments)
    assert found_loss == pytest.approx(loss, abs=2e-5)
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-6, name


def test_a_pack_without_borders_is_another_text(reference, rows, tmp_path):
    """The test above can fail: one long row that is not told apart has another loss."""
    model_class, loss, _ = reference
    collator = DataCollatorWithFlattening(return_position_ids=False)
    found_loss, _ = gradients(model_class, collator, rows, tmp_path)
    assert abs(found_loss - loss) > 1e-3


# -- what goes on ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many_rows():
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(3, 270, (8,), generator=generator).tolist()} for _ in range(12)]


def assert_equal_weights(one, other):
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name


def test_resumed_training_is_bit_for_bit_the_uninterrupted_one(padded, many_rows, tmp_path):
    arguments = {"max_steps": 6, "per_device_train_batch_size": 3, "learning_rate": 1e-2, "save_strategy": "steps"}
    arguments |= {"save_steps": 4, "gradient_accumulation_steps": 2}  # in the third epoch
    dropout = {"attention_dropout": 0.3}
    whole = train(make_model(**dropout), padded, many_rows, tmp_path, **arguments)
    fresh = make_model(**dropout, initializer_range=0.5)
    resumed = train(fresh, padded, many_rows, tmp_path, tmp_path / "checkpoint-4", **arguments)
    assert losses(resumed) == losses(whole) and len(losses(whole)) == 6
    assert_equal_weights(whole.model, resumed.model)


def test_streams_are_read_like_datasets(many_rows, tmp_path):
    arguments = {"max_steps": 5, "train_sampling_strategy": "sequential", "learning_rate": 1e-2}
    table = datasets.Dataset.from_list(many_rows)
    collator = DataCollatorWithFlattening()
    from_table = train(make_model(), collator, table, tmp_path, **arguments)
    from_stream = train(make_model(), collator, table.to_iterable_dataset(), tmp_path, **arguments)
    assert losses(from_stream) == losses(from_table)
    assert_equal_weights(from_stream.model, from_table.model)


def test_bf16_learns_as_float32_does(padded, many_rows, tmp_path):
    # from where steps of AdamW do not make a multiple of what bfloat16 rounds
    start = {"value_norm": False, "output_norm_eps": None, "conv_initializer_range": None, "eta_max": 4.5e-3}
    start |= {"min_half_life": 32.0, "max_half_life": 32768.0, "use_rope": True, "initial_memory_scale": 1.0}
    arguments = {"max_steps": 12, "learning_rate": 1e-2, "train_sampling_strategy": "sequential"}
    plain = losses(train(make_model(**start), padded, many_rows, tmp_path, **arguments))
    model = make_model(**start)
    with never_writing(model):
        unwritten = losses(train(model, padded, many_rows, tmp_path, **arguments))
    trainer = train(make_model(**start), padded, many_rows, tmp_path, bf16=True, **arguments)
    found = losses(trainer)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in trainer.model.parameters())
    assert found != plain and found[-1] < found[0] - 0.5
    # tighter than the third of what the memory is worth
    assert np.abs(np.subtract(unwritten, plain)).mean() > 0.03
    assert np.abs(np.subtract(found, plain)).mean() < 0.01


def test_compiled_training_is_one_graph_with_the_same_losses(many_rows, tmp_path, recwarn):
    """Without inductor, whose C++ takes minutes to compile."""
    arguments = {"max_steps": 3, "learning_rate": 1e-2, "train_sampling_strategy": "sequential"}
    model = {"layer_types": None, "num_hidden_layers": 1, "chunk_size": 8}
    collator = DataCollatorWithFlattening(return_position_ids=False)
    plain = train(make_model(**model), collator, many_rows, tmp_path, **arguments)
    torch._dynamo.reset()
    counters.clear()
    compiled = train(
        make_model(**model),
        collator,
        many_rows,
        tmp_path,
        torch_compile=True,
        torch_compile_backend="aot_eager",
        **arguments,
    )
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert not [str(warning.message) for warning in recwarn if "Dynamo" in str(warning.message)]
    np.testing.assert_allclose(losses(compiled), losses(plain), rtol=1e-5)


# -- evaluation ---------------------------------------------------------------------------------------------------------


def test_metrics_see_logits_and_no_caches(padded, rows, tmp_path):
    """Also with a cache in the model's outputs, of which rows of a batch cannot be put together."""
    seen = []

    def most_likely(logits, labels):
        assert isinstance(logits, Tensor) and logits.shape[:2] == labels.shape
        return logits.argmax(-1)

    def accuracy(prediction):
        found, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
        seen.append(found.shape)
        return {"accuracy": (found == labels)[labels != -100].mean()}

    model = make_model()
    args = TrainingArguments(str(tmp_path), per_device_eval_batch_size=3, use_cpu=True, report_to="none")
    trainer = Trainer(
        model,
        args,
        data_collator=padded,
        eval_dataset=datasets.Dataset.from_list(rows),
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=most_likely,
    )
    model.config.use_cache = True
    metrics = trainer.evaluate()
    assert seen == [(4, 13)]

    hits = targets = 0
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            logits = model(input_ids=ids).logits[:, :-1]
            hits += (logits.argmax(-1) == ids[:, 1:]).sum().item()
            targets += ids.shape[1] - 1
    assert metrics["eval_accuracy"] == pytest.approx(hits / targets)
    assert np.isfinite(metrics["eval_loss"])
    assert trainer.predict(datasets.Dataset.from_list(rows[2:])).predictions.shape == (2, 14)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_and_evaluation_make_no_caches(checkpointing, padded, rows, tmp_path, monkeypatch):
    made = []
    make = MirasLayer.__init__
    monkeypatch.setattr(
        MirasLayer, "__init__", lambda self, *args, **kwargs: (made.append(1), make(self, *args, **kwargs))[1]
    )
    trainer = train(make_model(), padded, rows, tmp_path, gradient_checkpointing=checkpointing)
    trainer.evaluate(trainer.train_dataset)
    assert not made
    make_model()(torch.tensor([rows[0]["input_ids"]]))  # the count counts: a call outside of a trainer makes one
    assert made


# -- label smoothing -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def smoothed_loss(model, rows, factor: float) -> float:
    """Cross-entropy of the next token against targets of which `factor` is spread evenly over the vocabulary, every row
    alone, mean over the predicted tokens."""
    total = count = 0
    for ids in (torch.tensor(row["input_ids"]) for row in rows):
        log_probs = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        target = torch.nn.functional.one_hot(ids[1:], log_probs.shape[-1]).float()
        target = (1 - factor) * target + factor / log_probs.shape[-1]
        total, count = total - (target * log_probs).sum().item(), count + len(ids) - 1
    return total / count


@pytest.mark.parametrize("with_lora", [False, True])
@pytest.mark.parametrize("model_class", [MonetaForCausalLM, MemoraForCausalLM])
def test_label_smoothing_is_of_the_next_token(model_class, with_lora, padded, rows, tmp_path):
    torch.manual_seed(2)  # an adapter that already says something
    model = make_model(model_class)
    if with_lora:
        model = get_peft_model(model, LoraConfig(init_lora_weights=False))
    expected = smoothed_loss(model, rows, 0.3)
    trainer = train(model, padded, rows, tmp_path, label_smoothing_factor=0.3, learning_rate=0.0)
    assert losses(trainer)[0] == pytest.approx(expected, abs=2e-5)
    # and not of the token itself, nor without smoothing
    assert abs(losses(trainer)[0] - smoothed_loss(model, rows, 0.0)) > 1e-3
    found = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    assert found == pytest.approx(expected, abs=2e-5)


# -- weight decay ----------------------------------------------------------------------------------------------------------

# of a memory layer, an attention layer, and what is around them
DECAYED = [
    "lm_head.weight",
    "model.embed_tokens.weight",
    *(f"model.layers.0.mixer.{x}_proj.weight" for x in "gkoqv"),
    *(f"model.layers.0.mixer.{x}_conv.weight" for x in "kqv"),
    *(f"model.layers.0.mixer.{gate}.{x}_proj.weight" for gate in ("alpha", "delta", "eta") for x in ("down", "up")),
    *(f"model.layers.1.self_attn.{x}_proj.weight" for x in "koqv"),
    *(f"model.layers.{i}.mlp.{x}_proj.weight" for i in range(2) for x in ("down", "gate", "up")),
]


def decayed(trainer: Trainer) -> list[str]:
    """Names of the parameters that the optimizer of a trainer decays."""
    decay = {id(p) for g in trainer.create_optimizer().param_groups if g["weight_decay"] > 0 for p in g["params"]}
    return sorted(name for name, p in trainer.model.named_parameters() if id(p) in decay)


def make_trainer(model, folder) -> Trainer:
    return Trainer(model, TrainingArguments(str(folder), weight_decay=0.1, use_cpu=True, report_to="none"))


@pytest.mark.parametrize("biases", [False, True])
def test_matrices_decay_and_nothing_else(biases, tmp_path):
    model = make_model(MonetaForCausalLM, attentional_bias="huber_coordinate", attention_bias=biases)
    names = {name for name, _ in model.named_parameters()}
    mixer = "model.layers.0.mixer"
    memory = {"memory.initial_state.0", "memory.initial_state.1", "memory.norm_weight", "memory.norm_bias"}
    kept = {f"{mixer}.{name}" for name in memory | {"alpha.a_log", "alpha.bias", "eta.bias", "o_norm.weight"}}
    assert kept <= names
    assert decayed(make_trainer(model, tmp_path)) == sorted(DECAYED)
    assert undecayed_parameter_names(model) == names - set(DECAYED)


def test_decay_pulls_at_matrices_only(padded, rows, tmp_path):
    """One step of gradient descent differs by the learning rate times the decay times the weight, or not at all."""
    found = []
    for weight_decay in (0.0, 0.25):
        trainer = train(make_model(), padded, rows, tmp_path, **ONE_STEP, weight_decay=weight_decay)
        found.append({name: p.detach() for name, p in trainer.model.named_parameters()})
    for name, before in make_model().named_parameters():
        pull = 0.25 * before if name in DECAYED else torch.zeros_like(before)
        torch.testing.assert_close(found[0][name] - found[1][name], pull, rtol=1e-4, atol=1e-6)


def test_decay_of_adapted_models(tmp_path):
    model = get_peft_model(make_model(), LoraConfig(modules_to_save=["memory"]))
    names = decayed(make_trainer(model, tmp_path))
    assert names == sorted(name for name, p in model.named_parameters() if p.requires_grad and "lora_" in name)
    assert any(p.requires_grad and "initial_state" in name for name, p in model.named_parameters())


def test_other_models_decay_as_before(tmp_path):
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
    make_trainer(make_model(), tmp_path)  # from here on, `Trainer` knows our models
    expected = sorted(name for name, _ in llama.named_parameters() if "norm" not in name)
    assert decayed(make_trainer(llama, tmp_path)) == expected
