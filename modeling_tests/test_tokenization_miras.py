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
"""The tokenizer: training, exact round trips, special tokens, chat, saving, and errors."""

import inspect
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from miras_hf import MemoraConfig, MirasConfig, MirasTokenizer, MonetaConfig, YaadConfig


TEXTS = [inspect.getsource(module) for module in (json, textwrap, inspect)]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "def?"},
    {"role": "assistant", "content": "  a function\n"},
    {"role": "user", "content": "class?"},
    {"role": "assistant", "content": "a type"},
]


@pytest.fixture(scope="module")
def tokenizer() -> MirasTokenizer:
    return MirasTokenizer.train_from_iterator(TEXTS, vocab_size=600)


def test_training_gives_the_size_asked_for_and_is_deterministic(tokenizer):
    batched = MirasTokenizer.train_from_iterator(([text] for text in TEXTS), vocab_size=600)
    assert len(tokenizer) == tokenizer.vocab_size == 600
    assert batched.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_training_compresses_its_own_text_more_with_more_vocabulary(tokenizer):
    smallest = MirasTokenizer.train_from_iterator(TEXTS, vocab_size=260)
    assert len(smallest.encode_bytes(TEXTS[0].encode())) == len(TEXTS[0].encode())
    assert len(tokenizer.encode_bytes(TEXTS[0].encode())) < 0.6 * len(TEXTS[0].encode())


def test_extra_special_tokens_follow_the_built_in_ones():
    extra = MirasTokenizer.train_from_iterator(TEXTS[:1], vocab_size=300, extra_special_tokens=["<|fim|>"])
    assert extra.convert_tokens_to_ids(["<|pad|>", "<|bos|>", "<|eos|>", "<|turn|>", "<|fim|>"]) == [0, 1, 2, 3, 4]
    assert extra("a<|fim|>", add_special_tokens=False)["input_ids"][-1] == 4


@given(text=st.text())
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_every_text_comes_back(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_bytes(text.encode()) == ids


@pytest.mark.parametrize("text", ["e\u0301 \u00e9", "\r\n\t \x00", "don't  stop .  ,", "नमस्ते 日本語 🙂", " ", ""])
def test_text_that_normalizers_and_clean_up_would_change_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


@given(data=st.binary())
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_all_bytes_come_back(tokenizer, data):
    assert tokenizer.decode_bytes(tokenizer.encode_bytes(data)) == data


def test_every_single_byte_and_every_cut_character_comes_back(tokenizer):
    everything = bytes(range(256))
    assert tokenizer.decode_bytes(tokenizer.encode_bytes(everything)) == everything
    ids = tokenizer("🙂", add_special_tokens=False)["input_ids"]
    assert len(ids) > 1 and b"".join(tokenizer.decode_bytes([i]) for i in ids) == "🙂".encode()


def test_bytes_never_become_special_tokens(tokenizer):
    ids = tokenizer.encode_bytes(b"a<|eos|>b")
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer.eos_token_id in tokenizer("a<|eos|>b")["input_ids"]
    assert tokenizer.decode_bytes([tokenizer.bos_token_id, *ids, tokenizer.pad_token_id]) == b"a<|eos|>b"


def test_special_tokens(tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer("x")["input_ids"] == [1, *tokenizer.encode_bytes(b"x")]
    assert tokenizer.unk_token is None


def test_pads_on_the_left_with_a_mask(tokenizer):
    batch = tokenizer(["a", "a b c"], padding=True, return_tensors="pt")
    assert sorted(batch) == ["attention_mask", "input_ids"]
    assert batch["input_ids"][0, 0] == tokenizer.pad_token_id
    assert batch["attention_mask"][0].tolist() == (batch["input_ids"][0] != tokenizer.pad_token_id).long().tolist()
    assert batch["attention_mask"][:, -1].tolist() == [1, 1]


def test_chat_text_and_generation_prompt(tokenizer):
    text = tokenizer.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    assert text == "<|bos|><|turn|>system\nBe brief.<|eos|><|turn|>user\ndef?<|eos|><|turn|>assistant\n"
    ids = tokenizer.apply_chat_template(CHAT[:2], add_generation_prompt=True)["input_ids"]
    full = tokenizer.apply_chat_template(CHAT[:3])["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert full[: len(ids)] == ids and full[-1] == tokenizer.eos_token_id


def test_chat_assistant_mask_covers_exactly_the_replies_and_their_ends(tokenizer):
    chat = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    kept = [i for i, mask in zip(chat["input_ids"], chat["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(kept) == "  a function\n<|eos|>a type<|eos|>"


def test_chat_content_may_be_parts_or_absent(tokenizer):
    parts = [{"role": "user", "content": [{"type": "text", "text": "de"}, {"type": "text", "text": "f?"}]}]
    plain = [{"role": "user", "content": "def?"}]
    assert tokenizer.apply_chat_template(parts) == tokenizer.apply_chat_template(plain)
    absent = tokenizer.apply_chat_template([{"role": "assistant", "content": None}], tokenize=False)
    assert absent == "<|bos|><|turn|>assistant\n<|eos|>"


@pytest.mark.parametrize("config_class", [MirasConfig, MonetaConfig, YaadConfig, MemoraConfig])
def test_auto_tokenizer_gives_the_same_ids(tokenizer, config_class, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    config_class().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is MirasTokenizer
    assert_same(tokenizer, loaded)


def test_auto_tokenizer_finds_the_class_from_the_model_type_alone(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    MonetaConfig().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    settings_of_file = json.loads(file.read_text())
    del settings_of_file["tokenizer_class"]
    file.write_text(json.dumps(settings_of_file))
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is MirasTokenizer


def test_saved_twice_gives_the_same_files(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "one")
    MirasTokenizer.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "two" / name).read_text() == (tmp_path / "one" / name).read_text(), name
    one, two = (json.loads((tmp_path / name / "tokenizer_config.json").read_text()) for name in ("one", "two"))
    assert one.items() <= two.items() and set(two) - set(one) <= {"is_local", "local_files_only"}


def test_loads_without_the_package(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    MonetaConfig().save_pretrained(tmp_path)
    code = """
        import json, sys
        from transformers import AutoTokenizer
        tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=False)
        assert "miras_hf" not in sys.modules
        texts = json.load(sys.stdin)
        chat = tokenizer.apply_chat_template(texts.pop(), return_dict=True, return_assistant_tokens_mask=True)
        print(json.dumps([tokenizer(texts, padding=True)["input_ids"], dict(chat), type(tokenizer).__name__]))
    """
    texts = [TEXTS[0], "", "<|turn|> naïve"]
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        input=json.dumps([*texts, CHAT]),
        capture_output=True,
        text=True,
        check=True,
    )
    ids, chat, name = json.loads(found.stdout)
    assert ids == tokenizer(texts, padding=True)["input_ids"]
    assert chat == dict(tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True))
    assert name == "TokenizersBackend"


def test_train_new_from_iterator_keeps_class_and_special_tokens(tokenizer):
    retrained = tokenizer.train_new_from_iterator(["abc abc abd"] * 5, vocab_size=270)
    assert type(retrained) is MirasTokenizer
    assert (retrained.pad_token_id, retrained.bos_token_id, retrained.eos_token_id) == (0, 1, 2)
    assert retrained.decode_bytes(retrained.encode_bytes(b"\xffabc")) == b"\xffabc"


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"iterator": []}, ValueError, ["`iterator`", "no text"]),
        ({"iterator": ["", ""]}, ValueError, ["`iterator`", "no text"]),
        ({"iterator": "abc"}, TypeError, ["`iterator`", "'abc'", "list"]),
        ({"iterator": 3}, TypeError, ["`iterator`", "int"]),
        ({"iterator": ["a", 7]}, TypeError, ["item 1", "int", "7"]),
        ({"iterator": ["a", ["b", None]]}, TypeError, ["item 1", "None"]),
        ({"iterator": [b"a"]}, TypeError, ["item 0", "bytes"]),
        ({"vocab_size": 259}, ValueError, ["`vocab_size`", "260", "259"]),
        ({"vocab_size": 260, "extra_special_tokens": ["<a>"]}, ValueError, ["`vocab_size`", "261", "260"]),
        ({"vocab_size": "600"}, TypeError, ["`vocab_size`", "integer", "'600'"]),
        ({"min_frequency": 0}, ValueError, ["`min_frequency`", "1", "0"]),
        ({"extra_special_tokens": "<a>"}, TypeError, ["`extra_special_tokens`", "list", "'<a>'"]),
        ({"extra_special_tokens": ["<|eos|>"]}, ValueError, ["`extra_special_tokens`", "<|eos|>"]),
    ],
)
def test_bad_arguments_are_named(arguments, error, words):
    with pytest.raises(error) as caught:
        MirasTokenizer.train_from_iterator(**({"iterator": ["a"]} | arguments))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_bad_bytes_and_ids_are_named(tokenizer):
    with pytest.raises(TypeError, match="`data` must be bytes, got str"):
        tokenizer.encode_bytes("text")
    with pytest.raises(ValueError, match="600, but the ids of this tokenizer are 0 to 599"):
        tokenizer.decode_bytes([600])


def assert_same(one: MirasTokenizer, two: MirasTokenizer) -> None:
    """Same ids, text, padding and chat from both."""
    texts = [TEXTS[1], "", "<|turn|> naïve\x00"]
    assert one(texts, padding=True).data == two(texts, padding=True).data
    assert one.apply_chat_template(CHAT) == two.apply_chat_template(CHAT)
    assert one.special_tokens_map == two.special_tokens_map
    assert Path(two.name_or_path).is_dir()
