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
"""What a user does with a converted Transformer, each once: on a tiny one, and on any in the folder `MIRAS_CONVERTED`.

That folder is one that `examples/distil.py` wrote, of SmolLM2 for instance.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import openai
import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from test_hub import check_card
from test_serving import TOKENS, answer, serve
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import miras_hf
from miras_hf.compat import CACHE_NAME


QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
BOOK = Path(json.__file__).read_text()
OF_A_PERSON = os.environ.get("MIRAS_CONVERTED")


def tiny(folder: Path) -> None:
    """A converted Llama of random weights, half of its layers memories, as `examples/distil.py` saves it."""
    tokenizer = miras_hf.MirasTokenizer.train_from_iterator([BOOK, QUESTION[0]["content"]], vocab_size=400)
    torch.manual_seed(0)
    # no answer ends before it is compared
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    ids = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    teacher = LlamaForCausalLM(LlamaConfig(**sizes, **ids, num_key_value_heads=2, initializer_range=0.3))
    hybrid = miras_hf.convert(teacher, [1, 3], {"chunk_size": 8}, base_model="me/small", license="apache-2.0")
    # parts of characters come out in another way one by one than together
    hybrid.generation_config.suppress_tokens = [
        i
        for i in range(len(tokenizer))
        if not tokenizer.decode([i]).isascii() or not tokenizer.decode([i]).isprintable()
    ]
    hybrid.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module", params=["tiny", "yours"])
def folder(request, tmp_path_factory):
    if request.param == "yours":
        if not OF_A_PERSON:
            pytest.skip("needs `MIRAS_CONVERTED`, a folder that examples/distil.py wrote")
        return Path(OF_A_PERSON).resolve()
    folder = tmp_path_factory.mktemp("converted")
    tiny(folder)
    return folder


@pytest.fixture
def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def question(tokenizer):
    return tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)


FRESH = """
import json, sys
import miras_hf
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = (auto.from_pretrained(sys.argv[1]) for auto in (AutoModelForCausalLM, AutoTokenizer))
turn = [{"role": "user", "content": "What is the capital of France?"}]
inputs = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
ids = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=12, do_sample=False)
text = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
print(json.dumps({"class": type(model).__name__, "types": model.config.layer_types, "text": text}))
"""


def test_a_fresh_process_loads_it_and_answers_in_the_teachers_template(folder, loaded, tmp_path):
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", FRESH, str(folder)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    model, tokenizer = loaded
    assert said["class"] == type(model).__name__ and said["types"] == model.config.layer_types
    assert {"miras_memory", "full_attention"} == set(said["types"])
    # greedy decoding by hand, without a cache
    ids = question(tokenizer)["input_ids"]
    first, suppressed = ids.shape[1], model.generation_config.suppress_tokens or []
    ends = {model.generation_config.eos_token_id, model.config.eos_token_id} - {None}
    with torch.no_grad():
        while ids.shape[1] < first + 12 and int(ids[0, -1]) not in (ends if ids.shape[1] > first else ()):
            logits = model(ids, use_cache=False).logits[:, -1]
            logits[:, suppressed] = -torch.inf
            ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), dim=1)
    assert said["text"] == tokenizer.decode(ids[0, first:], skip_special_tokens=True)


def test_what_it_read_is_kept_on_disk(loaded, tmp_path):
    model, tokenizer = loaded
    ids = tokenizer(BOOK, return_tensors="pt")["input_ids"][:, :600]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :-20], logits_to_keep=1, **{CACHE_NAME: cache})
        miras_hf.save_memory(cache, tmp_path / "book.safetensors", model)
        expected = model(ids, use_cache=False).logits[:, -20:]
        later = miras_hf.load_memory(tmp_path / "book.safetensors", model)
        found = model(ids[:, -20:], **{CACHE_NAME: later}).logits
    assert later.get_seq_length() == ids.shape[1]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_adapters_learn_and_come_back(folder, loaded, tmp_path):
    model, tokenizer = loaded
    ids = tokenizer(BOOK)["input_ids"]
    rows = Dataset.from_dict({"input_ids": [ids[i : i + 32] for i in range(0, 128, 32)]})
    rows = rows.add_column("labels", rows["input_ids"][:])
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, task_type="CAUSAL_LM"))
    of_adapters = {name for name, p in adapted.named_parameters() if p.requires_grad}
    kinds = {kind for kind in ("mixer", "self_attn") if any(f".{kind}." in name for name in of_adapters)}
    assert kinds == {"mixer", "self_attn"}
    args = TrainingArguments(
        str(tmp_path / "run"), max_steps=6, per_device_train_batch_size=4, learning_rate=5e-3, logging_steps=1,
        lr_scheduler_type="constant", use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(adapted, args, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter").eval()
    with torch.no_grad():
        batch = torch.tensor(rows["input_ids"][:1])
        assert torch.equal(again(batch).logits, adapted.eval()(batch).logits)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(batch).logits, adapted(batch).logits, rtol=1e-3, atol=1e-3)


def test_the_server_says_what_it_generates(folder, loaded, tmp_path):
    model, tokenizer = loaded
    env = os.environ | {"HF_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    with serve(env, tmp_path / "log", str(folder), "--trust-remote-code") as url:
        client = openai.OpenAI(base_url=url, api_key="none")
        said = client.chat.completions.create(model=str(folder), messages=QUESTION, max_tokens=TOKENS, temperature=0)
    assert said.choices[0].message.content.strip() == answer(model, tokenizer, QUESTION).strip()


def test_what_would_be_pushed_has_a_card_with_its_teacher(folder, loaded, tmp_path):
    model, tokenizer = loaded
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    check_card(card)
    assert card.data.base_model == model.config.base_model and card.data.license == model.config.license
    named = model.config.base_model is not None  # a teacher in a folder has no name unless it is given one
    assert (f"converted from {model.config.base_model}" in " ".join(card.text.split())) == named
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.chat_template


def test_a_teacher_without_pads_teaches_rows_of_one_length(tmp_path):
    """Nothing in conversion or alignment needs a pad token, and where one is, it says where pads are."""
    tokenizer = miras_hf.MirasTokenizer.train_from_iterator([BOOK], vocab_size=300)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    teacher = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokenizer), pad_token_id=None))
    hybrid = miras_hf.convert(teacher, [1], {"chunk_size": 8}).eval()
    assert hybrid.config.pad_token_id is None
    hybrid.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.pad_token_id is None
    ids = tokenizer(BOOK, return_tensors="pt")["input_ids"][:, :24]
    with torch.no_grad():
        alone = hybrid(ids, labels=ids).loss
        # whatever stands at the pads
        padded = torch.cat((torch.full((1, 5), 7), ids), dim=1)
        mask = (torch.arange(29) >= 5).long()[None]
        # nothing stands before the first token to predict it
        labels = padded.masked_fill(torch.arange(29) < 6, -100)
        loss = hybrid(padded, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(loss, alone, rtol=1e-4, atol=1e-5)
