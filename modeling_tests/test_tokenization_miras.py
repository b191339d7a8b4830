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

import copy
import inspect
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
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


def test_added_tokens_stand_for_their_content(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["<new é>"])
    ids = tokenizer.encode_bytes("a <new é> b".encode())
    assert len(tokenizer) - 1 in ids and tokenizer.decode_bytes(ids) == "a <new é> b".encode()


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


def test_chat_content_may_be_parts(tokenizer):
    parts = [{"role": "user", "content": [{"type": "text", "text": "de"}, {"type": "text", "text": "f?"}]}]
    plain = [{"role": "user", "content": "def?"}]
    assert tokenizer.apply_chat_template(parts) == tokenizer.apply_chat_template(plain)


# -- tools ----------------------------------------------------------------------------------------------------------------

ADD = {"type": "function", "function": {"name": "add", "description": "Adds <b>é</b>.", "parameters": {"a": "int"}}}
SUB = {"type": "function", "function": {"name": "sub", "parameters": {}}}
# the words of Qwen's template
TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function "
    "signatures within <tools></tools> XML tags:\n<tools>\n"
    '{"type": "function", "function": {"name": "add", "description": "Adds <b>é</b>.", "parameters": {"a": "int"}}}\n'
    '{"type": "function", "function": {"name": "sub", "parameters": {}}}\n</tools>\n\n'
    "For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML "
    'tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)


def call(name, arguments, **kwargs):
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **kwargs}


def say(role, content=None, **kwargs):
    return {"role": role, "content": content, **kwargs}


WITH_TOOLS = [
    say("user", "one and two?"),
    say("assistant", tool_calls=[call("add", {"a": 1, "b": "<é>"}, id="x1"), call("sub", '{"a": 2}', id="x2")]),
    say("tool", "3", tool_call_id="x1", name="add"),
    say("tool", [{"type": "text", "text": "-1"}], tool_call_id="x2"),
    say("assistant", "3", tool_calls=[{"name": "sub", "arguments": None}]),
    say("tool", ""),
    say("assistant", "done", tool_calls=None),
]
CALLS = [
    '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "<é>"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "sub", "arguments": {"a": 2}}\n</tool_call><|eos|>',
    '3\n<tool_call>\n{"name": "sub", "arguments": {}}\n</tool_call><|eos|>',
    "done<|eos|>",
]


def test_tools_stand_in_the_first_turn(tokenizer):
    question = "<|turn|>user\none and two?<|eos|><|turn|>assistant\n"
    ask = {"tools": [ADD, SUB], "add_generation_prompt": True, "tokenize": False}
    found = tokenizer.apply_chat_template(WITH_TOOLS[:1], **ask)
    assert found == f"<|bos|><|turn|>system\n{TOOLS}<|eos|>{question}"
    found = tokenizer.apply_chat_template([say("system", "Be brief."), WITH_TOOLS[0]], **ask)
    assert found == f"<|bos|><|turn|>system\nBe brief.\n\n{TOOLS}<|eos|>{question}"
    assert tokenizer.apply_chat_template(WITH_TOOLS[:1], **{**ask, "tools": []}) == f"<|bos|>{question}"

    def add(a: int):
        """Adds.

        Args:
            a: a number
        """

    assert '"name": "add", "description": "Adds."' in tokenizer.apply_chat_template(
        WITH_TOOLS[:1], **{**ask, "tools": [add]}
    )


def test_calls_and_results_are_turns(tokenizer):
    found = tokenizer.apply_chat_template(WITH_TOOLS, tokenize=False)
    assert found == (
        f"<|bos|><|turn|>user\none and two?<|eos|><|turn|>assistant\n{CALLS[0]}<|turn|>tool\n3<|eos|><|turn|>tool\n-1<|eos|>"
        f"<|turn|>assistant\n{CALLS[1]}<|turn|>tool\n<|eos|><|turn|>assistant\n{CALLS[2]}"
    )
    # what was said stays what it was when more is said
    for i in range(1, len(WITH_TOOLS)):
        assert found.startswith(tokenizer.apply_chat_template(WITH_TOOLS[:i], tokenize=False))


def test_calls_count_as_replies(tokenizer):
    chat = tokenizer.apply_chat_template(WITH_TOOLS, tools=[ADD, SUB], return_assistant_tokens_mask=True)
    kept = [i for i, mask in zip(chat["input_ids"], chat["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(kept) == "".join(CALLS)


def test_the_final_message_is_continued(tokenizer):
    for last in ("3 and", [{"type": "text", "text": "3"}, {"type": "text", "text": " and"}]):
        chat = [*WITH_TOOLS[:4], say("assistant", last)]
        found = tokenizer.apply_chat_template(chat, continue_final_message=True, tokenize=False)
        assert found == tokenizer.apply_chat_template(WITH_TOOLS[:4], tokenize=False) + "<|turn|>assistant\n3 and"


REFUSED = {
    "a reply that says nothing": ([say("assistant")], ["`content`", "message 0", "`tool_calls`"]),
    "an empty list of parts": ([say("user", [])], ["`content`", "message 0"]),
    "no content": ([{"role": "user"}], ["`content`", "message 0", "'user'"]),
    "a result without content": ([*WITH_TOOLS[:2], {"role": "tool"}], ["`content`", "message 2", "'tool'"]),
    "an unknown role": ([CHAT[0], say("critic", "no")], ["`role`", "message 1", "critic", "assistant"]),
    "no role": ([{"content": "hi"}], ["`role`", "message 0"]),
    "an image": ([say("user", [{"type": "image", "url": "a.png"}])], ["`content`", "message 0", "image", "text only"]),
    "a part without type": ([say("user", [{"text": "a"}])], ["`content`", "message 0"]),
    "a string as a part": ([say("user", ["a"])], ["`content`", "message 0"]),
    "content that is a mapping": ([say("user", {"text": "a"})], ["`content`", "message 0"]),
    "reasoning": ([say("assistant", "a", reasoning_content="hm")], ["`reasoning_content`", "message 0", "assistant"]),
    "an old call": ([say("assistant", "a", function_call={"name": "f"})], ["`function_call`", "message 0"]),
    "a weight": ([say("assistant", "a", weight=0)], ["`weight`", "message 0"]),
    "calls of a user": ([say("user", "a", tool_calls=[call("f", {})])], ["`tool_calls`", "message 0", "'user'"]),
    "a call without name": ([say("assistant", tool_calls=[{"function": {}}])], ["`tool_calls`", "`name`"]),
    "a call of another type": ([say("assistant", tool_calls=[call("f", {}) | {"type": "code"}])], ["`tool_calls`"]),
    "arguments that are no JSON": ([say("assistant", tool_calls=[call("f", "a=1")])], ["`arguments`", "'f'", "a=1"]),
    "arguments in a list": ([say("assistant", tool_calls=[call("f", [1])])], ["`arguments`", "'f'", "[1]"]),
    "results in another order": (
        [*WITH_TOOLS[:2], say("tool", "-1", tool_call_id="x2")],
        ["`tool_call_id`", "message 2", "call 0", "'add'", "order"],
    ),
    "a result of another function": (
        [*WITH_TOOLS[:2], say("tool", "-1", name="sub")],
        ["`name`", "message 2", "'add'"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_template_has_no_words_for_is_refused(tokenizer, case):
    chat, words = REFUSED[case]
    with pytest.raises(TemplateError) as caught:
        tokenizer.apply_chat_template(chat)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_arguments_that_the_template_does_not_use_are_refused(tokenizer):
    with pytest.raises(TemplateError, match="`documents` have no place"):
        tokenizer.apply_chat_template(CHAT, documents=[{"title": "a", "text": "b"}])
    with pytest.raises(TypeError, match="`enable_thinking`=True"):
        tokenizer.apply_chat_template(CHAT, enable_thinking=True)
    with pytest.raises(TypeError, match="`padding_side`='right'.*`tokenizer_kwargs`"):
        tokenizer.apply_chat_template([CHAT, CHAT[:2]], padding=True, padding_side="right")
    with pytest.raises(ValueError, match="reasoning_content"):
        tokenizer.apply_chat_template([say("assistant", "a")], continue_final_message="reasoning_content")
    plain = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert tokenizer.apply_chat_template(CHAT, documents=[], enable_thinking=False, tokenize=False) == plain
    found = tokenizer.apply_chat_template(CHAT, chat_template="{{ tone }}", tone="mild", tokenize=False)
    assert found == "mild"
    assert tokenizer.apply_chat_template(CHAT, bos_token="", tokenize=False) == plain.removeprefix("<|bos|>")
    padded = tokenizer.apply_chat_template([CHAT, CHAT[:2]], padding=True, tokenizer_kwargs={"padding_side": "right"})
    assert padded["input_ids"][1][-1] == tokenizer.pad_token_id


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
        ({"vocabulary": 600}, TypeError, ["`vocabulary`", "padding_side"]),
        ({"eos_token": "</s>"}, TypeError, ["`eos_token`", "add_eos_token"]),
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
