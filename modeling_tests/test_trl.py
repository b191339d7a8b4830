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
"""TRL's `SFTTrainer` on our chat template: only replies count, however chats are batched, and the model learns to stop."""

import datasets
import pytest
import torch
from peft import LoraConfig
from torch.nn import functional as F
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import is_chat_template_prefix_preserving, supports_tool_calling

from miras_hf import MirasTokenizer, YaadConfig, YaadForCausalLM


CHATS = [
    [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "a memory"}],
    [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "what do you read?"},
        {"role": "assistant", "content": "text"},
        {"role": "user", "content": "and then?"},
        {"role": "assistant", "content": "I answer"},
    ],
    [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer to it"}],
    [{"role": "user", "content": "bye"}, {"role": "assistant", "content": "see you"}],
]


@pytest.fixture(scope="module")
def tokenizer():
    texts = [message["content"] for chat in CHATS for message in chat]
    return MirasTokenizer.train_from_iterator(texts, vocab_size=290, min_frequency=1)


@pytest.fixture(scope="module")
def chats():
    return datasets.Dataset.from_list([{"messages": chat} for chat in CHATS])


def make_model(**kwargs) -> YaadForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 290, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "chunk_size": 16}
    memory = {"memory_expansion": 2, "gate_rank": 4, "attentional_bias": "huber_norm"}
    return YaadForCausalLM(YaadConfig(**{**sizes, **memory, "pad_token_id": 0, **kwargs}))


def make_trainer(model, tokenizer, dataset, folder, peft_config=None, **arguments) -> SFTTrainer:
    defaults = {"assistant_only_loss": True, "per_device_train_batch_size": 4, "max_length": 96, "logging_steps": 1}
    defaults |= {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    args = SFTConfig(str(folder), gradient_checkpointing=False, **{**defaults, **arguments})
    return SFTTrainer(model, args, train_dataset=dataset, processing_class=tokenizer, peft_config=peft_config)


def losses(trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def loss_of_replies(model, tokenizer) -> float:
    """Cross-entropy of the replies and the tokens that end them, every chat alone."""
    total = count = 0
    for chat in CHATS:
        ids, replies = [], []
        for i, message in enumerate(chat):
            # what a message adds to the text is its turn, of which only a reply and its end count
            with_it = tokenizer.apply_chat_template(chat[: i + 1])["input_ids"]
            added = len(with_it) - len(ids)
            reply = len(tokenizer(message["content"], add_special_tokens=False)["input_ids"]) + 1
            replies += [0] * (added - reply) + [int(message["role"] == "assistant")] * reply
            ids = with_it
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1]
        each = F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        counts = torch.tensor(replies[1:])
        total, count = total + (each * counts).sum().item(), count + counts.sum().item()
    return total / count


WAYS = {
    "padded": {},
    "padding_free": {"padding_free": True, "max_length": None},
    "bfd": {"packing": True, "packing_strategy": "bfd"},
    "bfd_rows": {"packing": True, "packing_strategy": "bfd", "gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_only_replies_count_in_every_batch_form(way, tokenizer, chats, tmp_path, caplog):
    arguments = dict(WAYS[way])
    if way == "bfd_rows":
        arguments["per_device_train_batch_size"] = 1
    trainer = make_trainer(make_model(), tokenizer, chats, tmp_path, max_steps=1, **arguments)
    trainer.train()
    if "bfd" in way:  # several chats a row
        assert len(trainer.train_dataset) < len(CHATS)
    assert losses(trainer)[0] == pytest.approx(loss_of_replies(make_model(), tokenizer), abs=1e-4)
    assert "end-of-turn" not in caplog.text  # TRL's check that the template trains the model to stop


def test_all_tokens_count_if_asked(tokenizer, chats, tmp_path):
    trainer = make_trainer(make_model(), tokenizer, chats, tmp_path, max_steps=1, assistant_only_loss=False)
    trainer.train()
    assert abs(losses(trainer)[0] - loss_of_replies(make_model(), tokenizer)) > 1e-3


def test_lora_through_peft_config(tokenizer, chats, tmp_path):
    model = make_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer = make_trainer(
        model, tokenizer, chats, tmp_path, LoraConfig(), max_steps=12, learning_rate=5e-2, packing=True
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.3
    changed = 0
    for name, parameter in trainer.model.named_parameters():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if "lora_" in name:
            changed += 1
            assert parameter.requires_grad
        else:
            assert not parameter.requires_grad and torch.equal(parameter, before[plain]), name
    assert changed == 2 * 2 * 5


def test_model_learns_replies_and_when_to_stop(tokenizer, chats, tmp_path):
    model_folder = tmp_path / "model"
    make_model(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id).save_pretrained(model_folder)
    arguments = {"max_steps": 40, "learning_rate": 1e-2, "logging_steps": 40}
    # by its path: TRL finds our class through the configuration
    trainer = make_trainer(
        str(model_folder), tokenizer, chats, tmp_path, model_init_kwargs={"dtype": "float32"}, **arguments
    )
    assert type(trainer.model) is YaadForCausalLM
    trainer.train()
    trainer.model.config.use_cache = True
    for chat in CHATS:
        inputs = tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, return_tensors="pt")
        text = trainer.model.generate(**inputs, max_new_tokens=30, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert text[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(text, skip_special_tokens=True) == chat[-1]["content"]


TOOL_CHAT = [
    {"role": "user", "content": "a question"},
    {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "text", "arguments": {"a": 1}}}]},
    {"role": "tool", "name": "text", "content": "bye"},
    {"role": "assistant", "content": "see you"},
]


def test_calls_of_tools_are_learned_with_their_words(tokenizer, tmp_path):
    """A turn that only calls a tool is its call, and not an empty answer: the loss is that of the call's own tokens."""
    tools = [{"type": "function", "function": {"name": "text", "parameters": {"a": "int"}}}]
    dataset = datasets.Dataset.from_list([{"messages": TOOL_CHAT, "tools": tools}])
    trainer = make_trainer(make_model(), tokenizer, dataset, tmp_path, max_steps=1, max_length=None)
    trainer.train()

    text = tokenizer.apply_chat_template(TOOL_CHAT, tools=tools, tokenize=False)
    replies = ['<tool_call>\n{"name": "text", "arguments": {"a": 1}}\n</tool_call><|eos|>', "see you<|eos|>"]
    assert text.endswith(f"assistant\n{replies[0]}<|turn|>tool\nbye<|eos|><|turn|>assistant\n{replies[1]}")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    begins = [text.index(f"assistant\n{reply}") + len("assistant\n") for reply in replies]
    spans = [(begin, begin + len(reply)) for begin, reply in zip(begins, replies, strict=True)]
    counts = torch.tensor([any(a < end and begin < b for a, b in spans) for begin, end in encoded["offset_mapping"]])
    ids = torch.tensor(encoded["input_ids"])
    with torch.no_grad():
        logits = make_model()(ids[None]).logits[0, :-1]
    expected = F.cross_entropy(logits[counts[1:]], ids[1:][counts[1:]]).item()
    assert losses(trainer)[0] == pytest.approx(expected, abs=1e-4)


def test_trl_knows_that_the_template_has_tools(tokenizer):
    assert supports_tool_calling(tokenizer)
    assert is_chat_template_prefix_preserving(tokenizer)
