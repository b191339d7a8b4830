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
"""The examples run as their docstrings say, and what they leave behind is what they report."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import miras_hf


EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def load_example(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    # The argument parser looks the module up to resolve its annotations.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


pretrain = load_example("pretrain")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """`python examples/pretrain.py --smoke` from an empty folder with an empty cache and no network."""
    folder = tmp_path_factory.mktemp("smoke")
    flags = ["--smoke", "--output_dir", "out", "--report", "reports/smoke.json", "--save_steps", "6"]
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "pretrain.py"), *flags],
        cwd=folder,
        env=os.environ
        | {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads((folder / "reports" / "smoke.json").read_text()), done.stdout


@pytest.mark.parametrize("model_class", ["MonetaForCausalLM", "YaadForCausalLM", "MemoraForCausalLM"])
def test_pretraining_decays_what_its_help_says(model_class, tmp_path):
    model_class = getattr(miras_hf, model_class)
    model = model_class(model_class.config_class.from_preset("tiny", vocab_size=64))
    args = pretrain.PretrainingArguments(str(tmp_path), use_cpu=True, eval_strategy="no")
    trainer = pretrain.PretrainingTrainer(model, args)
    decayed, kept = trainer.create_optimizer().param_groups
    assert decayed["weight_decay"] == 0.1 and kept["weight_decay"] == 0.0
    matrices = ("_proj.weight", "_conv.weight", "embed_tokens.weight", "lm_head.weight")
    expected = {name for name, _ in model.named_parameters() if name.endswith(matrices)}
    assert {name for name, p in model.named_parameters() if any(p is x for x in decayed["params"])} == expected
    assert len(decayed["params"]) + len(kept["params"]) == len(list(model.parameters()))


def test_smoke_learns_and_says_so(smoke):
    _, report, printed = smoke
    before, after = (report["validation"][when]["loss"] for when in ("before", "after"))
    assert 5.5 < before < 7.5  # about log(512): it knows nothing yet
    assert after < before - 0.3
    assert f"{before:.3f} before, {after:.3f} after" in printed and report["sample"] in printed
    assert report["model_type"] == "moneta"
    assert report["training"]["tokens"] == 12 * 8 * 64


def test_smoke_saved_model_is_the_one_that_was_measured(smoke):
    folder, report, _ = smoke
    model = AutoModelForCausalLM.from_pretrained(folder / "out")
    tokenizer = AutoTokenizer.from_pretrained(folder / "out")
    assert (folder / "out" / "model.safetensors").exists()
    assert type(model).__name__ == "MonetaForCausalLM" and model.num_parameters() == report["parameters"]
    assert model.config.use_cache and model.config.eos_token_id == tokenizer.eos_token_id
    ids = tokenizer(Path(json.__file__).read_text(), return_tensors="pt")["input_ids"][:, :256]
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert abs(loss - report["validation"]["after"]["loss"]) < 0.5


def test_smoke_card_and_plot_agree_with_the_run(smoke):
    folder, report, _ = smoke
    card = ModelCard.load(folder / "out" / "README.md")
    assert card.data.library_name == "transformers" and "moneta" in card.data.tags
    assert card.data.eval_results[0].metric_value == round(report["validation"]["after"]["loss"], 4)
    for words in ("No pretrained weights", "standard library", "`lp`, p = 3.0", f"{report['parameters']:,}-parameter"):
        assert words in card.text, words
    assert "{{" not in card.text and "{%" not in card.text
    curves = json.loads((folder / "out" / "loss.json").read_text())
    history = json.loads((folder / "out" / "trainer_state.json").read_text())["log_history"]
    assert curves["train"] == [[row["step"], row["loss"]] for row in history if "loss" in row]
    assert curves["validation"][0] == [0, report["validation"]["before"]["loss"]]
    assert (folder / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_resumed_run_ends_where_the_whole_run_ends(smoke, tmp_path):
    folder, report, _ = smoke
    shutil.copytree(folder / "out" / "checkpoint-6", tmp_path / "checkpoint-6")
    flags = ["--smoke", "--output_dir", str(tmp_path), "--resume_from_checkpoint", str(tmp_path / "checkpoint-6")]
    resumed = pretrain.main([*flags, "--no_eval_on_start", "--save_strategy", "no"])
    assert resumed["validation"]["after"]["loss"] == pytest.approx(report["validation"]["after"]["loss"], abs=1e-5)


@pytest.fixture
def books(tmp_path):
    for i in range(30):
        (tmp_path / f"{i:02d}.txt").write_text(f"Chapter {i}. " + "It was a dark and stormy night. " * 30)
    return str(tmp_path / "*.txt")


@pytest.mark.parametrize(
    ("model_type", "flags"),
    [("memora", ["--hybrid"]), ("yaad", []), ("llama", []), ("miras", ["--config_overrides", "chunk_size=16"])],
)
def test_local_files_and_other_models(model_type, flags, books, tmp_path):
    out = str(tmp_path / "out")
    run = ["--smoke", "--model_type", model_type, "--train_files", books, "--output_dir", out, "--max_steps", "4"]
    report = pretrain.main([*run, *flags, "--learning_rate", "0.01"])
    assert report["model_type"] == model_type
    assert report["validation"]["after"]["loss"] < report["validation"]["before"]["loss"] - 0.3
    model = AutoModelForCausalLM.from_pretrained(out)
    if "--hybrid" in flags:
        assert model.config.layer_types == ["miras_memory", "sliding_attention"]
    if model_type == "miras":
        assert model.config.chunk_size == 16


def test_model_and_tokenizer_to_continue_with(smoke, books, tmp_path):
    folder, report, _ = smoke
    start, out = str(folder / "out"), str(tmp_path / "out")
    flags = ["--smoke", "--model_name_or_path", start, "--train_files", books, "--output_dir", out]
    more = pretrain.main([*flags, "--max_steps", "1", "--learning_rate", "1e-9"])
    assert more["parameters"] == report["parameters"] and more["data"]["vocab_size"] == report["data"]["vocab_size"]
    weights = [AutoModelForCausalLM.from_pretrained(path).get_input_embeddings().weight for path in (start, out)]
    torch.testing.assert_close(*weights, rtol=0, atol=1e-6)
    assert ModelCard.load(tmp_path / "out" / "README.md").data.base_model == start


def test_a_model_to_continue_with_takes_overrides_and_nothing_of_a_new_one(smoke, books, tmp_path):
    start = str(smoke[0] / "out")
    flags = ["--smoke", "--model_name_or_path", start, "--train_files", books, "--output_dir", str(tmp_path / "out")]
    pretrain.main([*flags, "--max_steps", "1", "--config_overrides", "chunk_size=16"])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.chunk_size == 16
    with pytest.raises(ValueError, match="unknown name 'chunk_sizes'; did you mean chunk_size"):
        pretrain.main([*flags, "--config_overrides", "chunk_sizes=16"])
    with pytest.raises(ValueError, match="takes no --model_type, --hybrid, --hidden_size"):
        pretrain.parse([*flags, "--hidden_size", "32", "--hybrid", "--model_type", "yaad"])


def test_the_end_of_a_document_is_learned_with_a_tokenizer_that_pads_with_it(books, tmp_path):
    trained = pretrain.miras_hf.MirasTokenizer.train_from_iterator(["def f(x): return x"], vocab_size=300)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained.backend_tokenizer, eos_token=trained.eos_token)
    tokenizer.save_pretrained(tmp_path)
    model, data, args, _ = pretrain.parse(["--smoke", "--tokenizer_name", str(tmp_path), "--train_files", books])
    documents = pretrain.load_documents(data)
    tokenizer = pretrain.get_tokenizer(model, data, args, documents)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    train, _ = pretrain.pack(documents, tokenizer, data)
    batch = pretrain.collate(list(train))
    assert (batch["labels"] == tokenizer.eos_token_id).any() and torch.equal(batch["labels"], batch["input_ids"])


def test_stream_of_jsonl_with_another_column(tmp_path):
    lines = [json.dumps({"id": i, "body": f"row {i} of the stream, " * 20}) for i in range(1300)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(lines))
    flags = ["--smoke", "--dataset_name", str(tmp_path / "data"), "--streaming", "--text_column", "body"]
    report = pretrain.main(
        [*flags, "--model_type", "llama", "--output_dir", str(tmp_path / "out"), "--max_steps", "2"]
    )
    assert report["data"]["train_rows"] is None and report["data"]["validation_rows"] == 16
    assert report["training"]["tokens"] == 2 * 8 * 64


def test_held_out_documents_are_whole_files_and_never_trained_on(books):
    data = pretrain.DataArguments(train_files=[books], validation_fraction=0.2)
    one, two = pretrain.load_documents(data), pretrain.load_documents(data)
    train, validation = ({row["text"] for row in one[split]} for split in ("train", "validation"))
    assert (len(train), len(validation)) == (24, 6) and not train & validation
    assert [row["text"] for row in one["validation"]] == [row["text"] for row in two["validation"]]


def test_documents_are_packed_whole_and_closed_by_eos(books):
    data = pretrain.DataArguments(train_files=[books], block_size=32)
    documents = pretrain.load_documents(data)
    tokenizer = pretrain.miras_hf.MirasTokenizer.train_from_iterator(documents["train"]["text"][:], vocab_size=300)
    train, validation = pretrain.pack(documents, tokenizer, data)
    assert {len(row) for row in train["input_ids"]} == {32}
    packed = documents["validation"].map(
        lambda batch: {"input_ids": [[*row, tokenizer.eos_token_id] for row in tokenizer(batch["text"])["input_ids"]]},
        batched=True,
    )
    flat = [i for row in packed["input_ids"] for i in row]
    rows = [flat[i : i + 32] for i in range(0, len(flat) - 31, 32)]
    assert sorted(rows) == sorted(validation["input_ids"]) and any(tokenizer.eos_token_id in row for row in rows)


def test_flags_win_over_the_file_over_smoke_over_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("hidden_size: 96\nlearning_rate: 1e-4\nmax_steps: 7\n")
    model, data, training, _ = pretrain.parse(["--smoke", "--config", str(file), "--max_steps", "3"])
    assert (model.hidden_size, training.max_steps, data.block_size) == (96, 3, pretrain.SMOKE["block_size"])
    assert training.learning_rate == 1e-4 and model.model_type == "moneta"


def test_config_overrides_are_read_as_json_or_words():
    read = pretrain.parse_overrides
    assert read("a=1,b=1e-3,c=true,d=word") == {"a": 1, "b": 1e-3, "c": True, "d": "word"}
    assert read('{"a": [1, 2]}') == {"a": [1, 2]} and read(None) == {}


def test_mistakes_are_named(tmp_path, books):
    out = ["--output_dir", str(tmp_path / "out"), "--smoke", "--train_files", books]
    with pytest.raises(ValueError, match="unknown name 'hiden_size'; did you mean hidden_size"):
        pretrain.main([*out, "--config_overrides", "hiden_size=3"])
    with pytest.raises(ValueError, match="got 'chunk_size'"):
        pretrain.main([*out, "--config_overrides", "chunk_size"])
    (tmp_path / "run.json").write_text('{"max_step": 3}')
    with pytest.raises(ValueError, match="unknown name 'max_step'; did you mean max_steps"):
        pretrain.main([*out, "--config", str(tmp_path / "run.json")])
    with pytest.raises(ValueError, match="'title' is not a column of strings; those are: text"):
        pretrain.main([*out, "--text_column", "title"])
    (tmp_path / "only.txt").write_text("one document")
    with pytest.raises(ValueError, match="one document"):
        pretrain.main([*out, "--train_files", str(tmp_path / "only.txt")])


def test_plot_draws_on_the_axes_it_is_given():
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    assert pretrain.plot_loss({"train": [[1, 2.0], [2, 1.5]], "validation": [[0, 2.5]]}, ax=ax) is ax
    assert [line.get_xydata().tolist() for line in ax.lines] == [[[1, 2.0], [2, 1.5]], [[0, 2.5]]]
    assert pretrain.plot_loss({"train": [], "validation": [[0, 2.5]]}) is not ax
