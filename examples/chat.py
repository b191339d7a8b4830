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
"""Teach a Miras model to chat with TRL, then talk to it: each turn reads only what is new.

What one learns: `MirasTokenizer` brings a chat template, `SFTTrainer` needs nothing but conversations and learns from
the replies alone (`assistant_only_loss`), and a conversation is a cache that is passed on from turn to turn: nothing of
what was said is read again, and the memory does not grow, however long one talks.

    python examples/chat.py                                              # from nothing, three minutes, then talk
    python examples/chat.py --model_name_or_path runs/moneta-stdlib      # from a model of pretrain.py
    python examples/chat.py --model_name_or_path runs/chat --max_steps 0 # only talk
    python examples/chat.py --conversations my.jsonl                     # rows {"messages": [{"role":, "content":}]}
    python examples/chat.py --smoke

The conversations are by default made of what Python's standard library says about itself: "What does shutil.copyfile
do?" is answered with the first sentence of its docstring. A model this small learns how a conversation goes and what an
answer looks like; what it answers about functions it has not seen is made up.
"""

import ast
import random
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

import miras_hf


@dataclass
class Arguments:
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A model with its tokenizer; else a new one."}
    )
    conversations: str | None = field(default=None, metadata={"help": "A JSONL file with a column 'messages'."})
    say: list[str] | None = field(default=None, metadata={"help": "Say this, turn by turn, instead of asking for it."})
    max_new_tokens: int = field(default=48, metadata={"help": "Longest reply."})
    hidden_size: int = field(default=128, metadata={"help": "Width of a new model."})
    num_hidden_layers: int = field(default=4, metadata={"help": "Layers of a new model."})
    vocab_size: int = field(default=2048, metadata={"help": "Vocabulary of a new tokenizer."})
    smoke: bool = field(default=False, metadata={"help": "A tiny model, few steps, two things to say."})


@dataclass
class ChatArguments(SFTConfig):
    output_dir: str = field(default="runs/chat", metadata={"help": "Where the model goes."})
    assistant_only_loss: bool = field(default=True, metadata={"help": "Learn from the replies, not the questions."})
    max_length: int | None = field(default=192, metadata={"help": "Longest conversation in training, in tokens."})
    max_steps: int = field(default=300, metadata={"help": "Optimizer steps; 0: only talk."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Conversations per step and device."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "The same in evaluation."})
    learning_rate: float = field(default=5e-3, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule after the warmup."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Warmup: steps, or a share of them if below 1."})
    logging_steps: float = field(default=25, metadata={"help": "Steps between two training losses."})
    save_strategy: str = field(default="no", metadata={"help": "The model is saved at the end."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Small models have the memory for it."})
    bf16: bool | None = field(default=torch.cuda.is_available(), metadata={"help": "On a GPU."})
    dataloader_pin_memory: bool = field(default=torch.cuda.is_available(), metadata={"help": "Where there is a GPU."})


SMOKE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "vocab_size": 512,
    "max_steps": 30,
    "max_length": 128,
    "logging_steps": 10,
    "max_new_tokens": 12,
    "say": ["What does shutil.copyfile do?", "What does json.dumps do?"],
}


def docstring_conversations(turns: int = 2) -> Dataset:
    """Questions about the standard library's functions, answered by their docstrings, a few to a conversation."""
    root, pairs = Path(sysconfig.get_paths()["stdlib"]), []
    for path in sorted(root.glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8", errors="replace")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                sentence = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split()).split(". ")[0]
                if 15 < len(sentence) < 120:
                    verb = "do" if isinstance(node, ast.FunctionDef) else "stand for"
                    question = f"What does {path.stem}.{node.name} {verb}?"
                    pairs.append((question, sentence.rstrip(".") + "."))
    random.Random(0).shuffle(pairs)
    return Dataset.from_list(
        [
            {
                "messages": [
                    {"role": role, "content": content}
                    for pair in pairs[start : start + turns]
                    for role, content in zip(("user", "assistant"), pair, strict=True)
                ]
            }
            for start in range(0, len(pairs), turns)
        ]
    )


def new_model(args: Arguments, conversations: Dataset) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    texts = (message["content"] for row in conversations for message in row["messages"])
    tokenizer = miras_hf.MirasTokenizer.train_from_iterator(texts, args.vocab_size)
    config = miras_hf.YaadConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        layer_types=["sliding_attention", "miras_memory"] * (args.num_hidden_layers // 2),
        sliding_window=32,
        num_attention_heads=4,
        chunk_size=16,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return AutoModelForCausalLM.from_config(config), tokenizer


class Conversation:
    """A conversation with a model, which remembers it in its cache."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int):
        self.model, self.tokenizer, self.max_new_tokens = model.eval(), tokenizer, max_new_tokens
        self.cache = DynamicCache(config=model.config)
        self.ids = torch.empty(1, 0, dtype=torch.long, device=model.device)

    def say(self, text: str, **kwargs) -> str:
        """The reply, printed while it is made."""
        message = [{"role": "user", "content": text}]
        new = self.tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).input_ids.to(self.model.device)
        if self.ids.shape[1]:
            # the template opens a text; this one is open, and its last reply closed, if it had the time to end
            new = new[:, 1:] if self.tokenizer.bos_token_id == new[0, 0] else new
            if self.ids[0, -1] != self.tokenizer.eos_token_id:
                new = torch.cat((new.new_tensor([[self.tokenizer.eos_token_id]]), new), dim=1)
        self.ids = torch.cat((self.ids, new), dim=1)
        # with a mask as long as the ids, `generate()` takes them for the whole text, of which the cache has a part
        known, asked = self.cache.get_seq_length(), self.ids.shape[1]
        self.ids = self.model.generate(
            self.ids,
            attention_mask=torch.ones_like(self.ids),
            cache=self.cache,
            max_new_tokens=self.max_new_tokens,
            streamer=TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
            **kwargs,
        )
        print(f"[{asked - known} tokens read of {asked} in the conversation]")
        return self.tokenizer.decode(self.ids[0, asked:], skip_special_tokens=True)


def main(argv: list[str] | None = None) -> dict[str, float]:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser((Arguments, ChatArguments))
    if "--smoke" in argv:
        parser.set_defaults(**SMOKE)
    args, training = parser.parse_args_into_dataclasses(argv)
    set_seed(training.seed)

    losses: dict[str, float] = {}
    if training.max_steps > 0 or args.model_name_or_path is None:
        if args.conversations:
            conversations = load_dataset("json", data_files=args.conversations, split="train")
        else:
            conversations = docstring_conversations()
        data = conversations.train_test_split(test_size=min(64, len(conversations) // 5), seed=0)
        if args.model_name_or_path:
            model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path)
            tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
        else:
            model, tokenizer = new_model(args, data["train"])
        trainer = SFTTrainer(
            model, training, train_dataset=data["train"], eval_dataset=data["test"], processing_class=tokenizer
        )
        losses["before"] = trainer.evaluate()["eval_loss"]
        trainer.train()
        losses["after"] = trainer.evaluate()["eval_loss"]
        model.config.use_cache = True
        trainer.save_model()
        print(f"\nLoss on unseen replies, nats per token: {losses['before']:.3f} before, {losses['after']:.3f} after")
        print(f"Saved in {training.output_dir}.\n")

    where = training.output_dir if losses else args.model_name_or_path
    model, tokenizer = AutoModelForCausalLM.from_pretrained(where), AutoTokenizer.from_pretrained(where)
    conversation = Conversation(model, tokenizer, args.max_new_tokens)
    for text in args.say or []:
        print(f"> {text}")
        conversation.say(text, do_sample=False)
    if not args.say and sys.stdin.isatty():
        print("Say something; an empty line ends the conversation.")
        while text := input("> ").strip():
            conversation.say(text, do_sample=True, temperature=0.7, top_p=0.95)
    return losses


if __name__ == "__main__":
    main()
