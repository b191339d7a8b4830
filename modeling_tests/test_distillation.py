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
"""Memories that learn from the attention they replace: errors and divergences by hand, and what training leaves alone."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from test_convert import make_teacher, text
from transformers import AutoModelForCausalLM, TrainingArguments, default_data_collator

import miras_hf
from miras_hf.distillation import (
    Alignment,
    AlignmentTrainer,
    DistillationTrainer,
    alignment_errors,
    chunked_divergence,
    collate_texts,
)
from miras_hf.layer_ranking import restored_divergences
from miras_hf.model_card import training_run
from miras_hf.modeling_miras import MirasMixer
from miras_hf.stored_alignment import (
    StoredAlignment,
    StoredAlignmentTrainer,
    collate_activations,
    store_activations,
)


LAYERS = [0, 2]


@pytest.fixture(scope="module")
def pair():
    teacher = make_teacher("smollm")
    return miras_hf.convert(teacher, LAYERS, {"chunk_size": 4}), teacher


def norms(student, teacher, ids, layer, first):
    """Of the error and of the teacher, for the tokens of one text from `first` on, with softmax attention by hand."""
    hidden = teacher.model(ids, output_hidden_states=True).hidden_states[layer]
    inputs, attention = teacher.model.layers[layer].input_layernorm(hidden), teacher.model.layers[layer].self_attn
    cos, sin = teacher.model.rotary_emb(inputs, torch.arange(ids.shape[1])[None])
    q, k, v = (getattr(attention, f"{x}_proj")(inputs).unflatten(-1, (-1, 8)).transpose(1, 2) for x in "qkv")
    q, k = (x * cos + torch.cat((-x[..., 4:], x[..., :4]), -1) * sin for x in (q, k))
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    scores = (q @ k.mT / 8**0.5).masked_fill(torch.ones(ids.shape[1], ids.shape[1]).triu(1).bool(), -torch.inf)
    expected = attention.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))
    output, _ = student.model.layers[layer].mixer(inputs, position_embeddings=(cos, sin))
    return (output - expected).norm(dim=-1)[0, first:], expected.norm(dim=-1)[0, first:]


@pytest.mark.parametrize("how", ["rows", "padded", "packed", "packed under a mask"])
@torch.no_grad()
def test_alignment_is_the_error_over_the_teachers_norm(pair, how):
    rows = [text(13, rows=1), text(9, rows=1, seed=1)]
    inputs = {"input_ids": torch.cat(rows, dim=1)}
    if how == "rows":
        rows = [text(13)[:1], text(13)[1:]]
        inputs = {"input_ids": text(13)}
    elif how == "padded":
        padded = F.pad(rows[1], (4, 0), value=5)
        mask = torch.ones(2, 13, dtype=torch.long)
        mask[1, :4] = 0
        inputs = {"input_ids": torch.cat((rows[0], padded)), "attention_mask": mask}
    else:
        inputs["position_ids"] = torch.cat((torch.arange(13), torch.arange(9)))[None]
        if how == "packed under a mask":
            inputs["attention_mask"] = torch.ones(1, 22, dtype=torch.long)
    found = Alignment(*pair, sink_tokens=3)(**inputs)
    expected = []
    for layer in LAYERS:
        errors, sizes = zip(*(norms(*pair, row, layer, first=3) for row in rows))
        expected.append(torch.cat(errors).mean() / torch.cat(sizes).mean())
    torch.testing.assert_close(found["errors"], torch.stack(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["loss"], torch.stack(expected).mean(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_memory_that_returns_nothing_has_an_error_of_one(pair):
    student, teacher = copy.deepcopy(pair)
    student.model.layers[2].mixer.o_proj.weight.zero_()
    errors = alignment_errors(student, teacher, [{"input_ids": text(13), "labels": text(13)}] * 2)
    assert errors[2] == pytest.approx(1.0, abs=1e-5) and errors.keys() == {0, 2}
    # a memory layer that is the teacher's attention has none, and stands first
    student.model.layers[0].mixer.forward = lambda x, position_embeddings, sequences: teacher.model.layers[
        0
    ].self_attn(x, position_embeddings=position_embeddings, attention_mask=None)
    errors = alignment_errors(student, teacher, [{"input_ids": text(13)}])
    assert list(errors) == [0, 2] and errors[0] < 1e-5


def arguments(folder, **options):
    options = {"learning_rate": 1e-2, "max_steps": 4, "logging_steps": 2, "save_strategy": "no", **options}
    return TrainingArguments(
        folder,
        per_device_train_batch_size=2,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        seed=0,
        **options,
    )


ROWS = [{"input_ids": row, "labels": row} for row in text(24, rows=6, seed=3)]


def test_alignment_trains_the_memories_alone_and_resumes(pair, tmp_path):
    student, teacher = copy.deepcopy(pair)
    before = {
        name: p.clone()
        for name, p in (student.state_dict() | {f"t.{n}": p for n, p in teacher.state_dict().items()}).items()
    }
    args = arguments(tmp_path, save_strategy="steps", save_steps=2)
    trainer = AlignmentTrainer(student, teacher, args=args, train_dataset=ROWS, eval_dataset=ROWS)
    trainer.train()
    changed = {
        name
        for name, p in (student.state_dict() | {f"t.{n}": p for n, p in teacher.state_dict().items()}).items()
        if not torch.equal(p, before[name])
    }
    assert changed and all(".mixer." in name for name in changed)
    assert {f"model.layers.{i}.mixer.{x}_proj.weight" for i in LAYERS for x in "qkvgo"} <= changed
    first, last = (entry for entry in trainer.state.log_history if "alignment/layer_0" in entry)
    assert last["loss"] < first["loss"] and last["alignment/layer_2"] < first["alignment/layer_2"]
    assert first["loss"] == pytest.approx((first["alignment/layer_0"] + first["alignment/layer_2"]) / 2, rel=1e-3)
    errors = alignment_errors(student, teacher, [{"input_ids": torch.stack([row["input_ids"] for row in ROWS])}])
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(sum(errors.values()) / 2, rel=1e-5)
    assert metrics["eval_alignment/layer_2"] == pytest.approx(errors[2], rel=1e-5)

    stored = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert all(name.startswith(("mixers.0.", "mixers.2.")) for name in stored)
    resumed, _ = copy.deepcopy(pair)
    trainer = AlignmentTrainer(resumed, teacher, args=args, train_dataset=ROWS)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(map(torch.equal, resumed.parameters(), student.parameters()))


@pytest.mark.parametrize("stage", [1, 2])
def test_in_bfloat16_products_are_rounded_and_weights_are_not(pair, tmp_path, stage):
    logs, learned = [], []
    for bf16 in (False, True):
        student, teacher = copy.deepcopy(pair)
        kind = AlignmentTrainer if stage == 1 else DistillationTrainer
        args = arguments(tmp_path, bf16=bf16, max_steps=3, logging_steps=1, learning_rate=1e-3)
        trainer = kind(student, teacher, args=args, train_dataset=ROWS, eval_dataset=ROWS)
        watched = {
            "the teacher's attention": teacher.model.layers[0].self_attn.q_proj,
            "the memory": student.model.layers[0].mixer.q_proj,
        }
        if stage == 2:
            watched["the teacher's head"] = teacher.lm_head
        dtypes = {}
        for name, module in watched.items():
            module.register_forward_hook(lambda _, args, output, name=name: dtypes.update({name: output.dtype}))
        trainer.train()
        assert dtypes == dict.fromkeys(watched, torch.bfloat16 if bf16 else torch.float32)
        assert {p.dtype for p in (*student.parameters(), *teacher.parameters())} == {torch.float32}
        logs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        logs[-1].append(trainer.evaluate()["eval_loss"])
        learned.append(
            student.model.layers[0].mixer.o_proj.weight.detach() - pair[0].model.layers[0].mixer.o_proj.weight
        )
    # bfloat16 has eight bits: less than a percent of each number, and of their sums
    assert logs[1] == pytest.approx(logs[0], rel=1e-2) and logs[1] != logs[0]
    assert logs[0][-1] < logs[0][0] and (learned[1] - learned[0]).norm() < 0.3 * learned[0].norm()


PADDED = [  # of very different lengths
    {
        "input_ids": row["input_ids"].where(real, 0),
        "attention_mask": real.long(),
        "labels": row["labels"].where(real, -100),
    }
    for row, real in zip(ROWS, (torch.arange(24) < torch.tensor([[5], [24], [9], [16], [7]])))
]


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_count_no_pads_on_either_side(pair, tmp_path, side):
    student, teacher = pair
    rows, divergences = [], []
    for length in (5, 12, 9):
        ids = text(length, rows=1, seed=length)
        with torch.no_grad():
            log_p, log_q = (model(ids).logits[0, :-1].log_softmax(-1) for model in (teacher, student))
        divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
        pads = (12 - length, 0) if side == "left" else (0, 12 - length)
        mask = F.pad(torch.ones_like(ids), pads)[0]
        padded = F.pad(ids, pads, value=5)[0]
        rows.append({"input_ids": padded, "attention_mask": mask, "labels": padded.masked_fill(mask == 0, -100)})
    trainer = DistillationTrainer(student, teacher, args=arguments(tmp_path), eval_dataset=rows)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(torch.cat(divergences).mean().item(), rel=1e-4)


@pytest.mark.parametrize("stage", [1, 2])
def test_evaluation_is_of_all_tokens_however_they_fall_into_batches(pair, tmp_path, stage):
    student, teacher = pair
    if stage == 1:
        sums = torch.zeros(2, 2)
        for row in PADDED:
            ids = row["input_ids"][row["attention_mask"].bool()][None]
            with torch.no_grad():
                sums += torch.tensor(
                    [[x.sum() for x in norms(student, teacher, ids, layer, first=4)] for layer in LAYERS]
                )
        expected = (sums[:, 0] / sums[:, 1]).mean().item()
    else:
        divergences = []
        for row in PADDED:
            ids = row["input_ids"][row["attention_mask"].bool()][None]
            with torch.no_grad():
                log_p, log_q = (model(ids).logits[0, :-1].log_softmax(-1) for model in (teacher, student))
            divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
        expected = torch.cat(divergences).mean().item()
    for batch in (1, 2, 5):
        args = arguments(tmp_path, per_device_eval_batch_size=batch)
        kind = AlignmentTrainer if stage == 1 else DistillationTrainer
        trainer = kind(student, teacher, args=args, eval_dataset=PADDED)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_tokenizer_without_pads_is_enough_for_rows_of_any_length(pair, tmp_path, stage):
    tokenizer = miras_hf.MirasTokenizer.train_from_iterator(["some text"], vocab_size=280)
    tokenizer.pad_token = None
    assert tokenizer.pad_token_id is None
    short = [
        {name: x[row["attention_mask"].bool()] for name, x in row.items() if name != "attention_mask"}
        for row in PADDED[1:]
    ]
    short = [{name: x.tolist() for name, x in row.items()} for row in short]
    learned, losses = [], []
    for rows, kwargs in (
        (PADDED[1:], {"data_collator": default_data_collator}),
        (short, {"processing_class": tokenizer}),
        (short, {}),
    ):
        student, teacher = copy.deepcopy(pair)
        kind = AlignmentTrainer if stage == 1 else DistillationTrainer
        args = arguments(tmp_path, max_steps=2)
        trainer = kind(student, teacher, args=args, train_dataset=rows, eval_dataset=rows, **kwargs)
        trainer.train()
        learned.append(student.model.layers[2].mixer.o_proj.weight.detach())
        losses.append(trainer.evaluate()["eval_loss"])
    assert not torch.equal(learned[0], pair[0].model.layers[2].mixer.o_proj.weight)
    for weight, loss in zip(learned[1:], losses[1:]):
        torch.testing.assert_close(weight, learned[0], rtol=1e-3, atol=1e-4)
        assert loss == pytest.approx(losses[0], rel=1e-3)


def test_rows_that_are_no_batch_are_named():
    packs = [{"input_ids": [1, 2, 3], "position_ids": [0, 1, 0]}, {"input_ids": [1, 2], "position_ids": [0, 1]}]
    with pytest.raises(ValueError, match=r"`position_ids`.* must have one length, got \[2, 3\]"):
        collate_texts(packs)
    for rows in ([{"text": "a"}], [{"input_ids": [5], "labels": [5]}, {"input_ids": [8]}]):
        with pytest.raises(ValueError, match=r"must have `input_ids`.* the same columns, got \[\("):
            collate_texts(rows)
    assert collate_texts(packs[:1])["position_ids"].tolist() == [[0, 1, 0]]
    found = collate_texts([{"input_ids": [8]}, {"input_ids": [5, 6, 7]}])
    assert found["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]] and found["input_ids"][0].tolist() == [8, 0, 0]


def stored(pair, folder, batches, dtype="float32"):
    files = store_activations(*pair, batches, folder, dtype=dtype)
    assert files.keys() == set(LAYERS) and sorted(folder.iterdir()) == sorted(files.values())
    return {layer: Dataset.from_file(str(path)) for layer, path in files.items()}


def test_stored_activations_are_those_of_every_text(pair, tmp_path):
    rows = [text(13, rows=1), text(9, rows=1, seed=1)]
    padded = {
        "input_ids": torch.cat((rows[0], F.pad(rows[1], (4, 0), value=5))),
        "attention_mask": torch.tensor([[1] * 13, [0] * 4 + [1] * 9]),
    }
    packed = {
        "input_ids": torch.cat(rows, dim=1),
        "position_ids": torch.cat((torch.arange(13), torch.arange(9)))[None],
        "labels": torch.cat(rows, dim=1),
    }
    with torch.no_grad():
        expected = Alignment(*pair, sink_tokens=3)(padded["input_ids"], padded["attention_mask"])["errors"]
    for name, batches in (("padded", [padded]), ("packed", [packed]), ("rows", [{"input_ids": row} for row in rows])):
        for i, (layer, dataset) in enumerate(stored(pair, tmp_path / name, batches).items()):
            assert [len(row["hidden_states"]) for row in dataset] == [13 * 32, 9 * 32]
            with torch.no_grad():
                found = StoredAlignment(pair[0], layer, sink_tokens=3)(**collate_activations(list(dataset), 32))
            torch.testing.assert_close(found["errors"], expected[i : i + 1], rtol=1e-4, atol=1e-5)


def test_a_layer_learns_from_a_file_what_it_learns_beside_its_teacher(pair, tmp_path):
    student, teacher = copy.deepcopy(pair)
    offline = copy.deepcopy(student)
    files = stored(pair, tmp_path / "stored", [{"input_ids": row["input_ids"][None]} for row in ROWS])
    for layer in (0, 2):  # beside its teacher each of them alone
        alone = copy.deepcopy(student)
        other = 2 - layer
        trainer = AlignmentTrainer(alone, teacher, args=arguments(tmp_path / "beside"), train_dataset=ROWS)
        del trainer.model.mixers[str(other)]
        trainer.train()
        stored_trainer = StoredAlignmentTrainer(
            offline, layer, args=arguments(tmp_path / "offline"), train_dataset=files[layer], eval_dataset=files[layer]
        )
        stored_trainer.train()
        for name, p in alone.model.layers[layer].mixer.named_parameters():
            found = offline.model.layers[layer].mixer.get_parameter(name)
            torch.testing.assert_close(found, p, rtol=1e-4, atol=1e-5)
        logs = [entry for entry in stored_trainer.state.log_history if "loss" in entry]
        assert logs[0][f"alignment/layer_{layer}"] == pytest.approx(logs[0]["loss"], rel=1e-3)
        errors = alignment_errors(offline, teacher, [{"input_ids": row["input_ids"][None]} for row in ROWS])
        assert stored_trainer.evaluate()["eval_loss"] == pytest.approx(errors[layer], rel=1e-4)
    assert not torch.equal(offline.model.layers[2].mixer.q_proj.weight, student.model.layers[2].mixer.q_proj.weight)
    # half the size, and about the same
    halves = stored(pair, tmp_path / "half", [{"input_ids": ROWS[0]["input_ids"][None]}], dtype="float16")[2]
    whole = torch.tensor(files[2][0]["attention_output"])
    torch.testing.assert_close(torch.tensor(halves[0]["attention_output"]), whole, rtol=1e-3, atol=1e-3)


def test_what_cannot_be_stored_is_named_and_leaves_no_file(pair, tmp_path):
    student, teacher = copy.deepcopy(pair)
    batch = {"input_ids": text(13)}
    for dtype, batches, message in (
        ("bfloat16", [batch], "`dtype` must be one of float32, float16, got 'bfloat16'"),
        ("float16", [], "`batches` must hold at least one text, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            store_activations(student, teacher, batches, tmp_path, dtype)
    teacher.model.layers[2].self_attn.o_proj.weight.data.mul_(1e7)
    with pytest.raises(ValueError, match="`dtype` must hold what layer 2 reads and returns, float16 cannot"):
        store_activations(student, teacher, [batch], tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"`layer` must be a memory layer, one of \[0, 2\], got 1"):
        StoredAlignment(student, 1)
    with pytest.raises(ValueError, match="`sink_tokens` must be an integer of at least 0, got -1"):
        StoredAlignment(student, 2, -1)
    rows = [{"hidden_states": [0.0] * 64, "attention_output": [0.0] * 64}]
    with pytest.raises(ValueError, match=r"more than `sink_tokens` \(4\), got \[2\]"):
        StoredAlignment(student, 2)(**collate_activations(rows, 32))


@pytest.mark.parametrize("stage", [1, 2])
def test_cards_of_what_was_trained_name_the_teacher(pair, tmp_path, stage):
    student, teacher = copy.deepcopy(pair)
    student.config.base_model, student.config.license = "me/small", "apache-2.0"
    kind = AlignmentTrainer if stage == 1 else DistillationTrainer
    trainer = kind(student, teacher, args=arguments(tmp_path / "run", max_steps=1), train_dataset=ROWS)
    trainer.train()
    if stage == 1:  # what is saved is the student
        student.save_pretrained(tmp_path / "saved")
    else:
        trainer.save_model(tmp_path / "saved")
    trainer.create_model_card(model_name="me/hybrid", tags="converted")  # as `push_to_hub` does
    for folder in ("saved", "run"):
        card = ModelCard.load(tmp_path / folder / "README.md")
        assert (card.data.base_model, card.data.license) == ("me/small", "apache-2.0")
        assert "converted from me/small and trained with `miras-hf`" in " ".join(card.text.split())
        assert "1 steps of 2 rows" in card.text
    assert card.data.model_name == "me/hybrid" and "converted" in card.data.tags
    # trained on from a folder, it still comes from the teacher
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    trainer = DistillationTrainer(loaded, teacher, args=arguments(tmp_path / "on", max_steps=1), train_dataset=ROWS)
    assert training_run(trainer)["base_model"] == "me/small"


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_divergence_in_chunks_is_the_divergence(chunk):
    torch.manual_seed(0)
    heads = [torch.nn.Linear(6, 11, bias=False).double() for _ in range(2)]
    mine, theirs = torch.randn(2, 9, 6, dtype=torch.float64).requires_grad_()
    p, q = (head(x).softmax(-1) for head, x in zip(heads, (theirs, mine)))
    expected = (p.detach() * (p.detach().log() - q.log())).sum()
    found = chunked_divergence(mine, theirs, heads[1], heads[0], chunk)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    wanted = (mine, heads[1].weight)
    for bar, other in zip(torch.autograd.grad(found, wanted), torch.autograd.grad(expected, wanted), strict=True):
        torch.testing.assert_close(bar, other, rtol=1e-5, atol=1e-6)
    assert abs(chunked_divergence(mine, mine, heads[0], heads[0], chunk)) < 1e-6


def test_distillation_measures_the_divergence_and_spares_the_body(pair, tmp_path):
    student, teacher = copy.deepcopy(pair)
    ids = torch.stack([row["input_ids"] for row in ROWS])
    with torch.no_grad():
        log_p, log_q = (model(ids).logits[:, :-1].log_softmax(-1) for model in (teacher, student))
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    before = {name: p.clone() for name, p in student.named_parameters()}
    trainer = DistillationTrainer(
        student,
        teacher,
        body_learning_rate=0,
        chunk_tokens=7,
        args=arguments(tmp_path),
        train_dataset=ROWS,
        eval_dataset=ROWS,
    )
    assert trainer.compute_loss(student.eval(), {"input_ids": ids, "labels": ids}).item() == pytest.approx(
        expected, rel=1e-4
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.9 * expected
    changed = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert {f"model.layers.{i}.mixer.{x}_proj.weight" for i in LAYERS for x in "qkvgo"} <= changed
    assert all(".mixer." in name for name in changed)
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {0, 1e-2}
    # weight decay is as `Trainer` has it: norms and memories are without
    assert {(group["is_body"], group["weight_decay"] > 0) for group in trainer.optimizer.param_groups} == {
        (False, False), (True, False)
    }  # fmt: skip


def test_rates_are_told_apart_where_sharding_changes_the_classes_of_modules(pair, tmp_path):
    student, teacher = copy.deepcopy(pair)
    mixers = [module for module in student.modules() if isinstance(module, MirasMixer)]
    for mixer in mixers:  # as `fully_shard` does
        mixer.__class__ = type("FSDPMirasMixer", (MirasMixer,), {})
    trainer = DistillationTrainer(student, teacher, args=arguments(tmp_path), train_dataset=ROWS)
    groups = trainer.create_optimizer().param_groups
    of_memories = {id(p) for mixer in mixers for p in mixer.parameters()}
    assert {id(p) for group in groups if not group["is_body"] for p in group["params"]} == of_memories
    assert {group["lr"] for group in groups if group["is_body"]} == {7e-6}


def test_rows_without_labels_are_evaluated(pair, tmp_path):
    """All their tokens count, the last ones, too, whose successors labels do not have."""
    student, teacher = pair
    rows = [{"input_ids": row["input_ids"]} for row in ROWS[:3]]
    ids = torch.stack([row["input_ids"] for row in rows])
    with torch.no_grad():
        log_p, log_q = (model(ids).logits.log_softmax(-1) for model in (teacher, student))
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    trainer = DistillationTrainer(student, teacher, args=arguments(tmp_path), eval_dataset=rows)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.mean().item(), rel=1e-4)
    predicted = trainer.predict(rows)
    assert predicted.metrics["test_loss"] == pytest.approx(expected.mean().item(), rel=1e-4)
    np.testing.assert_allclose(predicted.predictions, expected.sum(-1), rtol=1e-4)


@pytest.mark.parametrize("batches", ["labels", "no labels", "pads and no labels"])
def test_accumulated_batches_are_one_batch(pair, tmp_path, batches):
    """Rows of one length, and where labels say what counts, of different ones."""
    rows, results = [{name: ids.clone() for name, ids in row.items()} for row in ROWS[:4]], []
    for i, row in enumerate(rows):
        if batches == "labels":
            row["labels"][: 3 * i] = -100
        else:
            del row["labels"]
        if batches.startswith("pads"):
            row["attention_mask"] = (torch.arange(24) < 3 + 7 * i).long()
    for accumulation in (1, 2):
        student, teacher = copy.deepcopy(pair)
        options = {"optim": "sgd", "max_steps": 1, "max_grad_norm": 0.0, "gradient_accumulation_steps": accumulation}
        args = arguments(tmp_path, **options)
        args.per_device_train_batch_size = 4 // accumulation
        DistillationTrainer(student, teacher, body_learning_rate=1e-2, args=args, train_dataset=rows).train()
        results.append(dict(student.named_parameters()))
    moved = [p - q for p, q in zip(results[0].values(), pair[0].parameters(), strict=True)]
    assert sum(bool(x.any()) for x in moved) > len(moved) / 2
    for name, p in results[0].items():
        torch.testing.assert_close(results[1][name], p, rtol=1e-4, atol=1e-6)


def test_accumulated_batches_of_alignment_are_one_batch(pair, tmp_path):
    weights = []
    for accumulation in (1, 2):
        student, teacher = copy.deepcopy(pair)
        args = TrainingArguments(
            str(tmp_path / str(accumulation)),
            per_device_train_batch_size=4 // accumulation,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            learning_rate=0.1,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0.0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        rows = []
        for i, ids in enumerate(text(16, rows=4)):  # of very different lengths
            real = torch.arange(16) < 4 + 4 * i
            rows.append({"input_ids": ids.where(real, 0), "attention_mask": real.long()})
        trainer = AlignmentTrainer(student, teacher, sink_tokens=1, args=args, train_dataset=rows)
        trainer.train()
        mixers = [student.model.layers[i].mixer for i in LAYERS]
        weights.append([p.detach() for mixer in mixers for p in mixer.parameters()])
    start = [p.detach() for i in LAYERS for p in pair[0].model.layers[i].mixer.parameters()]
    moved = [(one - begin).norm() for one, begin in zip(weights[0], start, strict=True)]
    assert max(moved) > 1e-3
    for one, several in zip(*weights, strict=True):
        torch.testing.assert_close(several, one, rtol=1e-5, atol=1e-6)


def test_what_cannot_teach_or_learn_is_named(pair, tmp_path):
    student, teacher = pair
    for wrong, message in (
        ((teacher, teacher), "must be a MirasForCausalLM with memories, got LlamaForCausalLM"),
        ((miras_hf.convert(teacher, []), teacher), "got YaadForCausalLM without memory layers"),
        ((student, teacher.model), "`teacher` must be a decoder with a language modelling head, got LlamaModel"),
        ((student, student), "`teacher` must have attention in layer 0"),
        ((student, make_teacher("llama3-with-biases"), -1), "`sink_tokens` must be an integer of at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            Alignment(*wrong)
    with pytest.raises(ValueError, match=r"longer than `sink_tokens` \(4\), got shape \(2, 3\)"):
        Alignment(student, teacher)(text(3))
    with pytest.raises(ValueError, match="`batches` must hold at least one batch"):
        alignment_errors(student, teacher, [])
    for options, message in (
        ({"body_learning_rate": -1.0}, "`body_learning_rate` must be at least 0 and below 1, got -1.0"),
        ({"chunk_tokens": 0}, "`chunk_tokens` must be an integer of at least 1, got 0"),
        ({"compute_loss_func": lambda: 0}, "`compute_loss_func` must be left out"),
        ({"args": arguments(tmp_path, label_smoothing_factor=0.1)}, "`label_smoothing_factor` must be 0, got 0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            DistillationTrainer(student, teacher, **{"args": arguments(tmp_path), **options})
    trainer = DistillationTrainer(student, teacher, args=arguments(tmp_path))
    with pytest.raises(ValueError, match=r"`input_ids`.* alone.*got \['seq_idx'\]"):
        trainer.compute_loss(student, {"input_ids": text(5), "seq_idx": text(5)})
    with pytest.raises(ValueError, match=r"Batches must hold `input_ids`.*got \['labels'\]"):
        trainer.get_batch_samples(iter([{"labels": text(5)}]), 1, torch.device("cpu"))


@pytest.mark.parametrize("name", ["smollm", "mistral", "qwen3"])
@pytest.mark.parametrize("how", ["rows", "padded", "packed"])
@torch.no_grad()
def test_restored_layers_are_those_of_a_hybrid_without_that_memory(name, how):
    teacher, memory = make_teacher(name), {"chunk_size": 4}
    torch.manual_seed(0)
    student = miras_hf.convert(teacher, LAYERS, memory)
    inputs = {"input_ids": text(21)}
    if how == "padded":
        inputs["attention_mask"] = torch.ones(2, 21, dtype=torch.long)
        inputs["attention_mask"][1, :7] = 0
    elif how == "packed":
        inputs["position_ids"] = torch.cat((torch.arange(9), torch.arange(12)))[None].expand(2, -1)
    found = restored_divergences(student, teacher, [inputs, {"input_ids": text(9, seed=1)}], chunk_tokens=7)
    assert [*found][0] is None and found.keys() == {None, *LAYERS}
    position = inputs.get("position_ids")
    if how == "padded":
        position = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    real = inputs.get("attention_mask", torch.ones(2, 21)).bool()
    for layer in found:
        other = student
        if layer is not None:  # a hybrid made with that layer as attention, the other memory copied
            other = miras_hf.convert(teacher, [i for i in LAYERS if i != layer], memory)
            (kept,) = (i for i in LAYERS if i != layer)
            other.model.layers[kept].mixer.load_state_dict(student.model.layers[kept].mixer.state_dict())
        total = tokens = 0
        for batch, at, which in (
            (inputs, position, real),
            ({"input_ids": text(9, seed=1)}, None, torch.ones(2, 9).bool()),
        ):
            log_p, log_q = (
                model(**batch | {"position_ids": at, "use_cache": False}).logits.log_softmax(-1)
                for model in (teacher, other)
            )
            total += (log_p.exp() * (log_p - log_q)).sum(-1)[which].sum().item()
            tokens += which.sum().item()
        assert found[layer] == pytest.approx(total / tokens, rel=1e-4)
    assert [*found.values()][1:] == sorted([*found.values()][1:])
    assert isinstance(student.model.layers[0].mixer, MirasMixer) and not student.training


def test_what_cannot_be_ranked_is_named(pair):
    student, teacher = pair
    with pytest.raises(ValueError, match="at least one token that counts, got none"):
        restored_divergences(student, teacher, [])
    with pytest.raises(ValueError, match="got LlamaForCausalLM"):
        restored_divergences(teacher, teacher, [{"input_ids": text(5)}])
    other = copy.deepcopy(teacher)
    other.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="must have eager or SDPA attention, which take masks, got 'flex_attention'"):
        restored_divergences(student, other, [{"input_ids": text(5)}])
