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
"""`pipeline(...)` and `torch.export` as any user calls them, and lm_eval on local tasks."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import pipeline

import miras_hf


PACKAGE = Path(miras_hf.__file__).resolve().parent.parent
EXAMPLES = PACKAGE.parent / "examples"
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "chunk_size": 4, "initializer_range": 0.1}
TEXTS = ["to be or not to be, that is the question", "whether 'tis nobler in the mind to suffer", "to be"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for each head, with a tokenizer beside each model."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = miras_hf.MirasTokenizer.train_from_iterator(TEXTS, vocab_size=300)
    config = miras_hf.YaadConfig(
        vocab_size=len(tokenizer),
        pad_token_id=0,
        **SIZE,
        id2label={0: "prose", 1: "verse"},
        label2id={"prose": 0, "verse": 1},
    )
    torch.manual_seed(0)
    for head in ("ForCausalLM", "ForSequenceClassification", "ForTokenClassification"):
        getattr(miras_hf, f"Yaad{head}")(config).save_pretrained(root / head)
        tokenizer.save_pretrained(root / head)
    return root


def test_text_generation(folder):
    generator = pipeline("text-generation", model=str(folder / "ForCausalLM"))
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "return_full_text": False}
    alone = [generator(text, **options)[0]["generated_text"] for text in TEXTS]
    together = [out[0]["generated_text"] for out in generator(TEXTS, batch_size=3, **options)]
    assert alone == together and all(alone)
    chat = [{"role": "user", "content": "to be?"}]
    assert generator(chat, max_new_tokens=4)[0]["generated_text"][-1]["role"] == "assistant"


def test_text_classification(folder):
    classify = pipeline("text-classification", model=str(folder / "ForSequenceClassification"))
    alone = [classify(text)[0] for text in TEXTS]
    for one, other in zip(alone, classify(TEXTS, batch_size=3), strict=True):
        assert one["label"] == other["label"] in ("prose", "verse")
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)


def test_token_classification(folder):
    tag = pipeline("token-classification", model=str(folder / "ForTokenClassification"), aggregation_strategy="simple")
    words = tag(TEXTS[0])
    assert "".join(word["word"] for word in words).strip() == TEXTS[0]
    assert {word["entity_group"] for word in words} <= {"prose", "verse"}


def test_feature_extraction(folder):
    extract = pipeline("feature-extraction", model=str(folder / "ForCausalLM"))
    features = torch.tensor(extract(TEXTS[0]))
    model, tokenizer = miras_hf.YaadModel.from_pretrained(folder / "ForCausalLM"), extract.tokenizer
    expected = model(**tokenizer(TEXTS[0], return_tensors="pt")).last_hidden_state
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)


TASK = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
"""
PERPLEXITY = """
task: local_perplexity
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
"""


def test_lm_eval_on_local_tasks(folder, tmp_path):
    rows = [{"question": text, "choices": [" be", " mind", " suffer"], "label": i} for i, text in enumerate(TEXTS)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tasks").mkdir()
    for name, text in (("choice", TASK), ("perplexity", PERPLEXITY)):
        (tmp_path / "tasks" / f"{name}.yaml").write_text(text.format(data=data))
    done = subprocess.run(
        [
            sys.executable, str(EXAMPLES / "lm_eval_miras.py"), "--model", "hf", "--device", "cpu",
            "--model_args", f"pretrained={folder / 'ForCausalLM'},dtype=float32", "--include_path", str(tmp_path / "tasks"),
            "--tasks", "local_choice,local_perplexity", "--output_path", str(tmp_path / "out"), "--batch_size", "2",
        ],
        env=os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(PACKAGE)},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(next((tmp_path / "out").rglob("results*.json")).read_text())["results"]

    model = miras_hf.YaadForCausalLM.from_pretrained(folder / "ForCausalLM").eval()
    tokenizer = miras_hf.MirasTokenizer.from_pretrained(folder / "ForCausalLM")

    def log_likelihood(context, continuation):
        ids = torch.tensor([[*context, *continuation]])
        with torch.no_grad():
            scores = model(input_ids=ids).logits.log_softmax(-1)[0, :-1]
        return scores.gather(1, ids[0, 1:, None])[len(context) - 1 :].sum().item()

    right = 0
    for row in rows:
        context = tokenizer(row["question"])["input_ids"]
        choices = [tokenizer(row["question"] + choice)["input_ids"][len(context) :] for choice in row["choices"]]
        scores = [log_likelihood(context, choice) for choice in choices]
        right += scores.index(max(scores)) == row["label"]
    assert results["local_choice"]["acc,none"] == pytest.approx(right / 3)
    # the harness puts bos before every text, also before the one that the tokenizer has put there
    total = sum(log_likelihood([tokenizer.bos_token_id], tokenizer(text)["input_ids"]) for text in TEXTS)
    assert results["local_perplexity"]["byte_perplexity,none"] == pytest.approx(
        math.exp(-total / sum(len(text.encode()) for text in TEXTS)), rel=1e-4
    )
