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
"""Fine-tune a Miras model on other text with LoRA: a few percent of the weights, a small adapter file, one merged model.

What one learns: PEFT needs nothing special for a Miras model, not even the names of the modules to adapt. The memory
itself has no weights to adapt in this way, it learns while it reads; but the state that every text starts from is
learned, and `--train_initial_memory` trains it too, in full, next to the adapter.

    python examples/pretrain.py                                          # first, a model of Python source
    python examples/finetune_lora.py --model_name_or_path runs/moneta-stdlib
    python examples/finetune_lora.py --smoke                             # half a minute, from nothing

The new text is by default what the standard library says about itself in English, its docstrings. `--train_files` takes
your own. What is printed in the end is measured on files held out: before, with the adapter, with the adapter loaded
from disk, and merged; the last three must agree.
"""

import ast
import math
import sys
import sysconfig
from dataclasses import dataclass, field
from glob import glob
from itertools import chain
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

import miras_hf


@dataclass
class Arguments:
    model_name_or_path: str | None = field(default=None, metadata={"help": "The model to adapt, with its tokenizer."})
    train_files: list[str] | None = field(
        default=None, metadata={"help": "Text files or globs; by default docstrings."}
    )
    block_size: int = field(default=256, metadata={"help": "Tokens in one row."})
    rank: int = field(default=16, metadata={"help": "Rank of the adapter."})
    train_initial_memory: bool = field(default=False, metadata={"help": "Train the learned initial memory as well."})
    smoke: bool = field(default=False, metadata={"help": "A tiny model, made on the spot, and few steps."})


@dataclass
class LoraTrainingArguments(TrainingArguments):
    output_dir: str = field(default="runs/lora", metadata={"help": "Gets adapter/ and merged/."})
    max_steps: int = field(default=200, metadata={"help": "Optimizer steps."})
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Rows per step and device."})
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Rows per evaluation step and device."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Adapters take ten times what a whole model takes."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule after the warmup."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Warmup: steps, or a share of them if below 1."})
    logging_steps: float = field(default=20, metadata={"help": "Steps between two training losses."})
    save_strategy: str = field(default="no", metadata={"help": "The adapter is saved at the end."})
    dataloader_pin_memory: bool = field(default=torch.cuda.is_available(), metadata={"help": "Where there is a GPU."})


SMOKE = {
    "max_steps": 30,
    "per_device_train_batch_size": 8,
    "block_size": 64,
    "logging_steps": 10,
    "learning_rate": 1e-2,
    "rank": 8,
}


def stdlib_sources() -> list[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    return [path.read_text(encoding="utf-8", errors="replace") for path in sorted(root.glob("*.py"))]


def docstrings(source: str) -> str:
    """Everything that a module says about itself in English."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(filter(None, found))


def rows(texts: list[str], tokenizer, block_size: int) -> Dataset:
    """Texts one after the other, each closed by eos, cut into rows of `block_size` ids, which are all learned."""
    encoded = tokenizer(texts, split_special_tokens=True, verbose=False)["input_ids"]
    ids = list(chain.from_iterable([*row, tokenizer.eos_token_id] for row in encoded))
    cut = [ids[i : i + block_size] for i in range(0, len(ids) - block_size, block_size)]
    # said here: a collator that makes labels leaves out every eos of a tokenizer that pads with it
    return Dataset.from_dict({"input_ids": cut, "labels": cut})


def small_model(texts: list[str], folder: str) -> str:
    """A small model of the source itself, in place of what `pretrain.py` would have made."""
    tokenizer = miras_hf.MirasTokenizer.train_from_iterator(texts, vocab_size=512)
    config = miras_hf.YaadConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        chunk_size=16,
        initializer_range=math.sqrt(0.4 / 64),
        tie_word_embeddings=True,
    )
    args = TrainingArguments(
        folder,
        max_steps=30,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        warmup_steps=5,
        save_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = Trainer(
        AutoModelForCausalLM.from_config(config),
        args,
        default_data_collator,
        rows(texts, tokenizer, 64).shuffle(seed=0),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.model.config.use_cache = True
    trainer.save_model(folder)
    return folder


def main(argv: list[str] | None = None) -> dict[str, float]:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser((Arguments, LoraTrainingArguments))
    if "--smoke" in argv:
        parser.set_defaults(**SMOKE)
    args, training = parser.parse_args_into_dataclasses(argv)
    folder = Path(training.output_dir)
    if args.model_name_or_path is None and not args.smoke:
        raise ValueError("--model_name_or_path is needed: make a model with examples/pretrain.py, or pass --smoke.")

    sources = stdlib_sources()[: 60 if args.smoke else None]
    start = args.model_name_or_path or small_model(sources[:40], str(folder / "start"))
    tokenizer = AutoTokenizer.from_pretrained(start)
    model = AutoModelForCausalLM.from_pretrained(start)
    if args.train_files:
        files = sorted(chain.from_iterable(glob(pattern, recursive=True) for pattern in args.train_files))
        texts = [Path(file).read_text(encoding="utf-8", errors="replace") for file in files]
    else:
        texts = list(filter(None, map(docstrings, sources)))
    # whole files are held out, every tenth
    held_out = rows(texts[::10], tokenizer, args.block_size)
    held_out = held_out.select(range(min(len(held_out), 32 if args.smoke else 128)))
    train = rows([text for i, text in enumerate(texts) if i % 10], tokenizer, args.block_size).shuffle(seed=0)

    # no target_modules: the package tells PEFT which ones a Miras model has
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=args.rank,
        lora_alpha=2 * args.rank,
        modules_to_save=["memory"] if args.train_initial_memory else None,
    )
    trainer = Trainer(
        get_peft_model(model, lora),
        training,
        default_data_collator,
        train,
        held_out,
        processing_class=tokenizer,
    )
    trainer.model.print_trainable_parameters()
    with trainer.model.disable_adapter():
        losses = {"before": trainer.evaluate()["eval_loss"]}
    trainer.train()
    losses["adapter"] = trainer.evaluate()["eval_loss"]
    trainer.save_model(folder / "adapter")

    # what a user of the adapter does: the base model, and the adapter's few megabytes on top
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(start), folder / "adapter")
    trainer.model = trainer.model_wrapped = adapted
    losses["loaded"] = trainer.evaluate()["eval_loss"]
    merged = adapted.merge_and_unload()
    merged.config.use_cache = True
    merged.save_pretrained(folder / "merged")
    tokenizer.save_pretrained(folder / "merged")
    trainer.model = trainer.model_wrapped = AutoModelForCausalLM.from_pretrained(folder / "merged")
    losses["merged"] = trainer.evaluate()["eval_loss"]

    size = (folder / "adapter" / "adapter_model.safetensors").stat().st_size
    print(
        "\nLoss on held-out text, nats per token: " + ", ".join(f"{loss:.3f} {name}" for name, loss in losses.items())
    )
    print(f"The adapter in {folder / 'adapter'} takes {size / 2**20:.2f} MiB; {folder / 'merged'} loads without PEFT.")
    return losses


if __name__ == "__main__":
    main()
