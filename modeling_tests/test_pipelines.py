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
"""`pipeline(...)` as any user calls it, alone and in batches."""

import pytest
import torch
from transformers import pipeline

import miras_hf


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
    torch.manual_seed(1)
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
