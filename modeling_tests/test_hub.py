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
"""Models, adapters and tokenizers go to the Hub and come back, over HTTP, and their cards say what they are."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard import RepoCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from loopback_hub import LoopbackHub
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification

import miras_hf
from miras_hf.files import atomic_write
from miras_hf.hub import SHIM_MODULE, auto_map
from miras_hf.model_card import MARKER, model_card


SIZE = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "chunk_size": 4}
FAMILIES = {
    "miras": miras_hf.MirasConfig,
    "moneta": miras_hf.MonetaConfig,
    "yaad": miras_hf.YaadConfig,
    "memora": miras_hf.MemoraConfig,
}


def run(hub, folder, script, name):
    """A script in a process of its own that knows only `hub`; what it prints last is JSON."""
    env = os.environ | hub.env | {"HF_HOME": str(folder / name), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


PUSH = """
    import json, torch, miras_hf
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments, set_seed
    from miras_hf.model_card import ModelCardMixin

    set_seed(0)
    size = {size}
    tokenizer = miras_hf.MirasTokenizer.train_from_iterator(["to be or not to be"], vocab_size=300)
    model = miras_hf.MonetaForCausalLM(miras_hf.MonetaConfig(**size))
    logits = lambda model: model(input_ids=torch.arange(4, 24)[None]).logits[0, -1].tolist()
    told = {{"plain": logits(model)}}

    model.push_to_hub("me/moneta", max_shard_size="60KB")
    tokenizer.push_to_hub("me/moneta")
    miras_hf.MemoraConfig(**size).push_to_hub("me/config")
    miras_hf.YaadForSequenceClassification(miras_hf.YaadConfig(**size, num_labels=3)).push_to_hub("me/yaad-classes")

    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    adapted.base_model.model.name_or_path = "me/moneta"
    adapted.peft_config["default"].base_model_name_or_path = "me/moneta"
    adapted.push_to_hub("me/adapter")
    told["adapted"] = logits(adapted)

    class CardTrainer(ModelCardMixin, Trainer):
        pass

    rows = Dataset.from_dict({{"input_ids": [list(range(4, 20))] * 8, "labels": [list(range(4, 20))] * 8}})
    trainer = CardTrainer(
        model=miras_hf.YaadForCausalLM(miras_hf.YaadConfig(**size)), train_dataset=rows, eval_dataset=rows,
        args=TrainingArguments(
            output_dir="out", hub_model_id="me/trained", push_to_hub=True, max_steps=2, per_device_train_batch_size=2,
            eval_strategy="steps", eval_steps=2, logging_steps=1, use_cpu=True, report_to="none", hub_strategy="end",
        ),
    )
    trainer.run_details = {{"data": {{"name": "the numbers from 4 to 19"}}, "command": "python count.py"}}
    trainer.train()
    trainer.push_to_hub(license="apache-2.0", tags=["counting"])
    told["trained"] = logits(trainer.model)
    print(json.dumps(told))
"""

PULL_IMPORTED = """
    import json, torch, miras_hf
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    logits = lambda model: model(input_ids=torch.arange(4, 24)[None]).logits[0, -1].tolist()
    model = AutoModelForCausalLM.from_pretrained("me/moneta")
    told = {"class": type(model).__name__, "plain": logits(model)}
    told["trained"] = logits(AutoModelForCausalLM.from_pretrained("me/trained"))
    told["adapted"] = logits(PeftModel.from_pretrained(model, "me/adapter"))
    told["labels"] = AutoModelForSequenceClassification.from_pretrained("me/yaad-classes").config.num_labels
    told["tokenizer"] = type(AutoTokenizer.from_pretrained("me/moneta")).__name__
    print(json.dumps(told))
"""

PULL_REMOTE = """
    import json, sys, torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    told = {}
    tokenizer = AutoTokenizer.from_pretrained("me/moneta", trust_remote_code=False)
    told["ids"] = tokenizer("to be")["input_ids"]
    try:
        AutoModelForCausalLM.from_pretrained("me/moneta", trust_remote_code=False)
    except ValueError as error:
        told["untrusted"] = str(error)

    class NotInstalled:
        def find_spec(self, name, path=None, target=None):
            if name == "miras_hf":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, NotInstalled())
    try:
        AutoModelForCausalLM.from_pretrained("me/moneta", trust_remote_code=True)
    except ImportError as error:
        told["absent"] = str(error)
    sys.meta_path.pop(0)
    model = AutoModelForCausalLM.from_pretrained("me/moneta", trust_remote_code=True)
    told["module"] = type(model).__module__
    told["plain"] = model(input_ids=torch.arange(4, 24)[None]).logits[0, -1].tolist()
    told["config"] = type(AutoConfig.from_pretrained("me/config", trust_remote_code=True)).__module__
    model.save_pretrained("again")
    again = AutoModelForCausalLM.from_pretrained("again", trust_remote_code=True)
    told["again"] = again(input_ids=torch.arange(4, 24)[None]).logits[0, -1].tolist()
    print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    with LoopbackHub() as hub:
        yield hub, folder, run(hub, folder, PUSH.format(size=SIZE), "push")


def test_repositories_hold_no_code_and_no_pickle(pushed):
    hub, _, _ = pushed
    for repo_id, files in hub.repos.items():
        others = [path for path in files if not path.endswith((".safetensors", ".json", ".md", ".jinja"))]
        allowed = {".gitattributes", f"{SHIM_MODULE}.py", "training_args.bin"}
        assert set(others) <= allowed, (repo_id, others)
    # the one pickle is Trainer's own record of its arguments, which nothing of ours loads
    assert [repo_id for repo_id, files in hub.repos.items() if "training_args.bin" in files] == ["me/trained"]


def test_large_models_are_sharded(pushed):
    hub, _, _ = pushed
    files = hub.files("me/moneta")
    shards = {path for path in files if path.endswith(".safetensors")}
    assert len(shards) > 1
    assert set(json.loads(files["model.safetensors.index.json"])["weight_map"].values()) == shards


def test_what_was_pushed_loads_with_the_package_imported(pushed):
    hub, folder, told = pushed
    found = run(hub, folder, PULL_IMPORTED, "pull")
    assert (found["class"], found["labels"], found["tokenizer"]) == ("MonetaForCausalLM", 3, "MirasTokenizer")
    for name in ("plain", "trained", "adapted"):
        torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(told[name]), rtol=1e-6, atol=1e-6)
    assert found["adapted"] != found["plain"]


def test_what_was_pushed_loads_through_the_shim(pushed):
    hub, folder, told = pushed
    found = run(hub, folder, PULL_REMOTE, "remote")
    assert found["ids"][0] == 1
    assert "trust_remote_code=True" in found["untrusted"]
    # in our words, and not in those of Transformers, which would send people to a package index
    assert found["absent"].startswith(
        "This model needs the package miras-hf, which is not installed: `pip install -e .`"
    )
    assert found["module"] == "miras_hf.modeling_miras" and found["config"] == "miras_hf.configuration_miras"
    torch.testing.assert_close(torch.tensor(found["plain"]), torch.tensor(told["plain"]), rtol=1e-6, atol=1e-6)
    assert found["again"] == found["plain"]


def test_cards_on_the_hub(pushed):
    hub, _, _ = pushed
    card = ModelCard(hub.files("me/moneta")["README.md"].decode())
    assert card.data.pipeline_tag == "text-generation" and "moneta" in card.data.tags
    assert 'from_pretrained("me/moneta")' in card.text and "without a record of training" in card.text
    assert ModelCard(hub.files("me/yaad-classes")["README.md"].decode()).data.pipeline_tag == "text-classification"

    card = ModelCard(hub.files("me/trained")["README.md"].decode())
    assert card.data.license == "apache-2.0" and "counting" in card.data.tags
    for words in ("the numbers from 4 to 19", "python count.py", "2 steps of 2 rows", "after 2 steps", "peak memory"):
        assert words in card.text, words
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert f"| loss | {measured['loss']:.4f} |" in card.text
    # the client has every card checked by the Hub before it is committed
    assert any("the numbers from 4 to 19" in content for content in hub.cards)


# -- without a server -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_shim_gives_the_classes_that_the_config_names(family, tmp_path):
    config = FAMILIES[family](**SIZE)
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert stored == auto_map(type(config).__name__.removesuffix("Config"))
    shim = {}
    exec((tmp_path / f"{SHIM_MODULE}.py").read_text(), shim)
    for target in stored.values():
        module, name = target.split(".")
        assert module == SHIM_MODULE and shim[name] is getattr(miras_hf, name) and name in shim["__all__"]
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(config)


def test_config_of_a_class_derived_elsewhere_names_no_code(tmp_path):
    class OwnConfig(miras_hf.MonetaConfig):
        model_type = "own"

    OwnConfig(**SIZE).save_pretrained(tmp_path)
    assert not json.loads((tmp_path / "config.json").read_text()).get("auto_map")
    assert not (tmp_path / f"{SHIM_MODULE}.py").exists()


HUB_TASKS = {"text-generation", "text-classification", "token-classification", "feature-extraction"}


def check_card(card: ModelCard) -> None:
    """What the Hub's validation asks of the metadata, without the Hub."""
    block = RepoCard(str(card)).data.to_dict()
    assert yaml.safe_load(re.match("---\n(.*?)\n---\n", str(card), flags=re.DOTALL)[1]) == yaml.safe_load(
        yaml.safe_dump(block)
    )
    assert block["library_name"] == "transformers" and block["pipeline_tag"] in HUB_TASKS
    assert all(isinstance(tag, str) and tag for tag in block["tags"])
    for field in ("license", "language", "base_model"):
        assert field not in block or (isinstance(block[field], str) and block[field])
    for result in block.get("model-index", [{"results": []}])[0]["results"]:
        assert result["task"]["type"] and result["dataset"]["name"] and result["dataset"]["type"]
        assert all(isinstance(metric["value"], int | float) and metric["type"] for metric in result["metrics"])
    if "model-index" in block:
        assert model_index_to_eval_results(block["model-index"])
    for leftover in ("{{", "{%", "None |", "| None", "{'"):
        assert leftover not in card.text, leftover


RUN = {
    "base_model": None,
    "data": {"name": "a book", "train_rows": 12, "validation_rows": 3, "block_size": 64, "vocab_size": 300},
    "training": {
        "steps": 1000, "tokens": 64000, "rows_per_step": 2, "learning_rate": 1e-3, "schedule": "cosine",
        "weight_decay": 0.1, "optimizer": "adamw_torch", "precision": "bf16", "seed": 1,
    },
    "metrics": {"step": 1000, "loss": 2.5},
    "seconds": {"training": 10.0},
    "machine": {"cpu": "a cpu", "threads": 2, "gpus": [], "processes": 1, "peak_memory": 2**30},
    "versions": {"torch": "2.13.0"},
}  # fmt: skip


@pytest.mark.parametrize("head", ["Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification"])
@pytest.mark.parametrize("record", [None, RUN])
@pytest.mark.parametrize("family", ["Moneta", "Yaad", "Memora"])
def test_cards_are_valid_and_complete(family, head, record):
    model = getattr(miras_hf, family + head)(FAMILIES[family.lower()](**SIZE))
    card = model_card(model, record, name="me/x")
    check_card(card)
    choices = {"Moneta": "`lp`, p = 3.0", "Yaad": "`huber_norm`", "Memora": "`kl`"}
    for words in (choices[family], "No pretrained weights", "behrouz2025miras", "`chunk_size` (4)"):
        assert words in card.text, words
    state = 4 * sum(p.numel() for name, p in model.named_parameters() if "initial_state" in name)
    assert f"{state / 1024:.1f} KiB" in card.text
    assert ("6,400 tokens/s" in card.text) == (record is not None)


def test_save_writes_a_card_and_never_over_a_persons(tmp_path):
    model = miras_hf.MonetaForCausalLM(miras_hf.MonetaConfig(**SIZE))
    model.save_pretrained(tmp_path)
    assert MARKER in (tmp_path / "README.md").read_text()
    model.training_run = RUN
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    check_card(card)
    assert "a book" in card.text and card.data.eval_results[0].metric_value == 2.5
    (tmp_path / "README.md").write_text("my own words")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my own words"
    assert AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters() == model.num_parameters()
    AutoModelForTokenClassification.from_pretrained(tmp_path, num_labels=2).save_pretrained(tmp_path / "tags")
    assert ModelCard.load(tmp_path / "tags" / "README.md").data.pipeline_tag == "token-classification"


def blocks(markdown):
    """Language and content of fenced code blocks, by CommonMark's rule: a fence ends at one that is as long, and bare."""
    found, opened = [], None
    for line in re.split(r"\r\n|\n|\r", markdown):
        fence = re.fullmatch(r" {0,3}(`{3,})([^`]*)", line)
        if opened is None and fence:
            opened = fence[1]
            found.append((fence[2].strip(), []))
        elif opened is not None and fence and len(fence[1]) >= len(opened) and not fence[2].strip():
            opened = None
        elif opened is not None:
            found[-1][1].append(line)
    assert opened is None
    return [(language, "\n".join(lines)) for language, lines in found]


def strings_of_calls(code, function):
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    names = [(getattr(call.func, "attr", getattr(call.func, "id", None)), call) for call in calls]
    return [call.args[0].value for name, call in names if name == function]


HOSTILE = [
    'a"); import os; os.system("true"); ("',
    "a\\",
    'a\\"b',
    "````\n# Not a heading",
    "a\n```\n<script>",
    "a\r\n---\nlicense: mit",
    "x: [y\n---\n",
    "{{ config }} {% raw %}",
    "<!-- a & b | c *d* `e` -->",
    "a\u2028b\x85c\x0bd\x00",
    "' # \t",
    os.fsdecode(b"caf\xe9"),
]


@pytest.mark.parametrize("text", HOSTILE)
def test_names_prompts_and_samples_stay_where_they_are_put(text, tmp_path):
    model = miras_hf.MonetaForCausalLM(miras_hf.MonetaConfig(**SIZE))
    plain = str(model_card(model, RUN | {"command": "c", "sample": "s"}, name="name"))
    data = RUN["data"] | {"name": text}
    training = RUN["training"] | {"optimizer": text}
    run = RUN | {
        "prompt": text,
        "sample": text,
        "command": text,
        "data": data,
        "base_model": text,
        "training": training,
    }
    card = model_card(model, run, name=text)
    if "{{" not in text:  # which it takes for a template's remains
        check_card(card)
    # everything else has the same structure
    headings = re.findall("^#+ .*", plain, flags=re.MULTILINE)
    outside = re.sub("^(`{3,}).*?^\\1$", "", card.text, flags=re.MULTILINE | re.DOTALL)
    assert len(re.findall("^#", outside, flags=re.MULTILINE)) == len(headings)
    assert "<script" not in outside.replace("\\<script", "") and "<!--" not in outside.replace(MARKER, "").replace(
        "\\<!--", ""
    )
    assert card.text.count("\n| ") == plain.count("\n| ")
    (_, code), (_, sample), *_ = found = blocks(card.text)
    assert [language for language, _ in found] == [language for language, _ in blocks(plain)]
    assert strings_of_calls(code, "from_pretrained") == [text, text] and strings_of_calls(code, "tokenizer") == [text]
    shown = text.encode("utf-8", "replace").decode()
    for block in (sample, found[-2][1]):
        assert block == re.sub("\r\n|\r", "\n", shown)
    # nothing but the known fields in the metadata, and the name on one line
    block = RepoCard(str(card)).data.to_dict()
    fields = RepoCard(plain.replace("tags:", "base_model: x\ntags:", 1)).data.to_dict()
    assert block.keys() == fields.keys()
    assert block["model-index"][0]["name"].split() == re.sub(r"[\x00\x85\u2028]", " ", shown).split()
    # the whole path through a folder of that name
    if "\0" not in text:
        folder = tmp_path / text.replace("/", "|")
        model.save_pretrained(folder)
        (_, code), *_ = blocks(ModelCard.load(folder / "README.md").text)
        assert strings_of_calls(code, "from_pretrained") == [folder.name] * 2


def test_a_readme_that_is_not_ours_does_not_stop_a_save(tmp_path):
    model = miras_hf.MonetaForCausalLM(miras_hf.MonetaConfig(**SIZE))
    latin = "Ein Modell f\xfcr Texte".encode("latin-1")
    (tmp_path / "README.md").write_bytes(latin)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == latin
    (tmp_path / "b" / "README.md").mkdir(parents=True)
    model.save_pretrained(tmp_path / "b")
    (tmp_path / "c").mkdir()
    os.mkfifo(tmp_path / "c" / "README.md")  # reading it would wait for ever
    model.save_pretrained(tmp_path / "c")
    for folder in (tmp_path, tmp_path / "b", tmp_path / "c"):
        assert AutoConfig.from_pretrained(folder).hidden_size == 32


def test_card_and_shim_are_not_written_through_links(tmp_path):
    model = miras_hf.MonetaForCausalLM(miras_hf.MonetaConfig(**SIZE))
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "folder"
    model.save_pretrained(elsewhere)
    before = {path.name: path.read_bytes() for path in elsewhere.iterdir()}
    (elsewhere / "shim.py").write_text("precious")
    folder.mkdir()
    (folder / "README.md").symlink_to(elsewhere / "README.md")
    (folder / f"{SHIM_MODULE}.py").symlink_to(elsewhere / "shim.py")
    model.training_run = RUN
    model.save_pretrained(folder)
    assert (elsewhere / "shim.py").read_text() == "precious"
    assert (elsewhere / "README.md").read_bytes() == before["README.md"]
    assert "a book" in (folder / "README.md").read_text() and not (folder / "README.md").is_symlink()
    assert (folder / f"{SHIM_MODULE}.py").read_bytes() == before[f"{SHIM_MODULE}.py"]
    # a person's card stays a person's card
    (elsewhere / "README.md").write_text("my own words")
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(elsewhere / "README.md")
    model.save_pretrained(folder)
    assert (folder / "README.md").is_symlink() and (folder / "README.md").read_text() == "my own words"


def test_pushing_leaves_out_what_others_are_writing(tmp_path, monkeypatch):
    from transformers.utils import hub as transformers_hub

    committed = []

    class Hub:
        def create_commit(self, *args, operations, **kwargs):
            committed.extend(operation.path_in_repo for operation in operations)

    monkeypatch.setattr(transformers_hub, "hf_api", Hub)
    model = miras_hf.MonetaForCausalLM(miras_hf.MonetaConfig(**SIZE))
    model.save_pretrained(tmp_path)
    for pushed in (model, model.config):
        with atomic_write(tmp_path / "book.safetensors") as file:
            file.write(b"half")
            committed.clear()
            pushed._upload_modified_files(tmp_path, "me/x", {"config.json": 0.0})
        assert set(committed) == set(os.listdir(tmp_path)) - {"book.safetensors"}
        (tmp_path / "book.safetensors").unlink()


def test_cards_of_the_papers_sizes_are_up_to_date():
    folder = Path(__file__).resolve().parents[1] / "model_cards"
    spec = importlib.util.spec_from_file_location("make_cards", folder / "make_cards.py")
    cards = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cards)
    names = {
        f"{family}-{preset}": cards.make_card(family, preset) for family in cards.FAMILIES for preset in cards.SIZES
    }
    assert {path.stem for path in folder.glob("*.md")} - {"README"} == names.keys()
    for name, card in names.items():
        check_card(card)
        assert "There are no weights here" in card.text
        assert (folder / f"{name}.md").read_text() == str(card) + "\n", "run model_cards/make_cards.py"
