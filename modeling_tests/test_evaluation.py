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
"""Evaluation: the standard harness on local tasks, and perplexity by position."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import miras_hf


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TEXTS = ["to be or not to be, that is the question", "whether 'tis nobler in the mind to suffer", "to be"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("model")
    tokenizer = miras_hf.MirasTokenizer.train_from_iterator(TEXTS, vocab_size=300)
    torch.manual_seed(0)
    config = miras_hf.YaadConfig.from_preset("tiny", vocab_size=len(tokenizer), hidden_size=32, initializer_range=0.1)
    miras_hf.YaadForCausalLM(config).save_pretrained(root)
    tokenizer.save_pretrained(root)
    return root


def run(arguments, tmp_path):
    env = os.environ | {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


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
    flags = {
        "--model": "hf",
        "--device": "cpu",
        "--model_args": f"pretrained={folder},dtype=float32",
        "--include_path": tmp_path / "tasks",
        "--tasks": "local_choice,local_perplexity",
        "--output_path": tmp_path / "out",
        "--batch_size": 2,
    }
    run([EXAMPLES / "lm_eval_miras.py", *(str(word) for pair in flags.items() for word in pair)], tmp_path)
    results = json.loads(next((tmp_path / "out").rglob("results*.json")).read_text())["results"]

    model = miras_hf.YaadForCausalLM.from_pretrained(folder).eval()
    tokenizer = miras_hf.MirasTokenizer.from_pretrained(folder)

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


def load_example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("piece", [1, 7, 64])
def test_losses_read_piece_by_piece_are_those_of_one_forward(folder, piece):
    by_position = load_example("perplexity_by_position")
    model = miras_hf.YaadForCausalLM.from_pretrained(folder).eval()
    ids = torch.randint(3, model.config.vocab_size, (50,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
    torch.testing.assert_close(by_position.losses_of(model, ids, piece), expected, rtol=1e-4, atol=1e-5)


def test_buckets_hold_every_position_once():
    by_position = load_example("perplexity_by_position")
    losses = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    rows = by_position.bucketed(losses, buckets=12)
    assert rows[0]["first"] == 1 and rows[-1]["last"] == 1000
    assert all(before["last"] + 1 == after["first"] for before, after in zip(rows, rows[1:]))
    total = sum(row["loss"] * (row["last"] - row["first"] + 1) for row in rows)
    assert total / 1000 == pytest.approx(losses.mean().item(), abs=1e-5)


def test_perplexity_by_position_writes_what_it_prints(folder, tmp_path):
    (tmp_path / "text.txt").write_text(" ".join(TEXTS) * 20)
    flags = ["--models", folder, "--files", "*.txt", "--length", "64", "--piece", "40", "--out", "result"]
    printed = run([EXAMPLES / "perplexity_by_position.py", *map(str, flags)], tmp_path)
    (rows,) = json.loads((tmp_path / "result.json").read_text())["results"].values()
    assert rows[-1]["last"] == 64 and all(f"{row['loss']:.3f}" in printed for row in rows)
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(AssertionError, match="more than --length 100000 tokens"):
        run(
            [EXAMPLES / "perplexity_by_position.py", "--models", folder, "--files", "*.txt", "--length", "100000"],
            tmp_path,
        )
