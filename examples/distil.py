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
"""Attention layers of a pretrained Transformer become memories that learn from it, in two stages.

What one learns: `miras_hf.convert` gives memories the projections of the attention that they replace; stage 1 aligns each of
them with that attention, layer by layer; stage 2 distils what the whole teacher says. The ladder (teacher, converted,
stage 1, stage 2) is measured on text held out, with what a few prompts lead to and how much a cache holds; and a table says
which layers were easily replaced.

    python examples/distil.py --teacher my-llama --layers 5 11 17 23
    python examples/distil.py --teacher HuggingFaceTB/SmolLM2-135M-Instruct --stage1_steps 2000 --stage2_steps 2000
    python examples/distil.py --teacher folder --gguf_file SmolLM2-135M-Instruct.Q4_1.gguf
    python examples/distil.py --smoke                                    # a tiny Llama trained on the spot

Text is Python's own source unless `--train_files` name others. Continue with any trainer: the result is a model like others.
"""

import json
import math
import platform
import shlex
import sys
import sysconfig
import time
from dataclasses import dataclass, field
from glob import glob
from itertools import chain
from pathlib import Path

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DynamicCache,
    HfArgumentParser,
    LlamaConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

import miras_hf
from miras_hf.compat import CACHE_NAME
from miras_hf.distillation import AlignmentTrainer, DistillationTrainer, alignment_errors
from miras_hf.model_card import versions


@dataclass
class Arguments:
    teacher: str | None = field(
        default=None, metadata={"help": "A Llama, Mistral, Qwen2 or Qwen3: folder or Hub name."}
    )
    gguf_file: str | None = field(default=None, metadata={"help": "File in that folder, of a model stored as GGUF."})
    output_dir: str = field(default="runs/distilled", metadata={"help": "Where the hybrid goes."})
    report: str | None = field(default=None, metadata={"help": "JSON file for what was measured."})
    memory: str = field(default="yaad", metadata={"help": "Type of the memories, or fields of their config as JSON."})
    layers: list[int] | None = field(
        default=None, metadata={"help": "Layers that become memories; by default every fourth, from the second."}
    )
    train_files: list[str] | None = field(
        default=None, metadata={"help": "Text, files or globs, every tenth held out; by default Python's own source."}
    )
    block_size: int = field(default=256, metadata={"help": "Tokens in one row."})
    batch_size: int = field(default=4, metadata={"help": "Rows per step."})
    stage1_steps: int = field(default=100, metadata={"help": "Steps of alignment."})
    stage1_rate: float = field(default=1e-3, metadata={"help": "Peak rate of alignment."})
    stage2_steps: int = field(default=50, metadata={"help": "Steps of distillation."})
    stage2_rate: float = field(default=1e-4, metadata={"help": "Peak rate of memories in distillation."})
    body_rate: float = field(default=7e-6, metadata={"help": "Rate of all else in distillation."})
    eval_rows: int = field(default=32, metadata={"help": "Rows of held-out text that are measured."})
    prompts: list[str] = field(
        default_factory=lambda: ["def read_file(path):\n", "import os\n"], metadata={"help": "Texts to go on from."}
    )
    cache_lengths: list[int] = field(
        default_factory=lambda: [1024, 8192, 32768], metadata={"help": "Texts whose caches are compared, in tokens."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of everything."})
    smoke: bool = field(default=False, metadata={"help": "A tiny Llama, trained on the spot, for seconds."})


SMOKE = {
    "block_size": 64,
    "batch_size": 8,
    "stage1_steps": 16,
    "stage2_steps": 6,
    "eval_rows": 8,
    "stage1_rate": 3e-3,
    "stage2_rate": 1e-3,
    "cache_lengths": [64, 512],
    "layers": [1],
}


def rows(texts: list[str], tokenizer, block_size: int) -> Dataset:
    """Texts one after the other, each closed by eos, cut into rows of `block_size` ids."""
    encoded = tokenizer(texts, split_special_tokens=True, verbose=False)["input_ids"]
    ids = list(chain.from_iterable([*row, tokenizer.eos_token_id] for row in encoded))
    return Dataset.from_dict(
        {"input_ids": [ids[i : i + block_size] for i in range(0, len(ids) - block_size, block_size)]}
    )


def training(args: Arguments, name: str, steps: int, rate: float) -> TrainingArguments:
    return TrainingArguments(
        str(Path(args.output_dir) / name),
        max_steps=steps,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        logging_steps=max(1, steps // 5),
        save_strategy="no",
        seed=args.seed,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def small_llama(texts: list[str], args: Arguments) -> str:
    """A small Llama to learn from, trained for seconds."""
    tokenizer = miras_hf.MirasTokenizer.train_from_iterator(texts, vocab_size=512)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=math.sqrt(0.4 / 64),
        tie_word_embeddings=True,
    )
    train = training(args, "teacher", steps=40, rate=8e-3)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    model = AutoModelForCausalLM.from_config(config)
    trainer = Trainer(model, train, collator, rows(texts, tokenizer, 64).shuffle(seed=0), processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    return train.output_dir


@torch.no_grad()
def loss(model: PreTrainedModel, held_out: Dataset, batch_size: int) -> float:
    """Nats a token of held-out text."""
    model.eval()
    total = [
        model(ids, labels=ids, use_cache=False).loss * len(ids)
        for ids in torch.tensor(held_out["input_ids"][:], device=model.device).split(batch_size)
    ]
    return float(sum(total)) / len(held_out)


def cache_bytes(model: PreTrainedModel, lengths: list[int]) -> dict[str, int]:
    """Size of a text's cache: keys and values that grow, and all else that does not, from a text of 32 tokens."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.ones(1, 32, dtype=torch.long, device=model.device), **{CACHE_NAME: cache})
    growing = constant = 0
    for layer in cache.layers:
        if isinstance(layer, miras_hf.MirasLayer):
            constant += sum(x.nbytes for x in (*layer.memory.leaves(), layer.conv_tail))
        else:
            growing += (layer.keys.nbytes + layer.values.nbytes) // 32
    return {str(length): constant + growing * length for length in lengths}


def continuations(model: PreTrainedModel, tokenizer, prompts: list[str]) -> list[str]:
    said = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        ids = model.generate(
            inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=24, do_sample=False
        )
        said.append(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :]))
    return said


def main(argv: list[str] | None = None) -> dict:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(Arguments)
    if "--smoke" in argv:
        parser.set_defaults(**SMOKE)
    (args,) = parser.parse_args_into_dataclasses(argv)
    if args.teacher is None and not args.smoke:
        raise ValueError("--teacher is needed, a Llama-like model; or --smoke, which makes one.")
    set_seed(args.seed)
    start = time.perf_counter()

    stdlib = [str(path) for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))]
    files = sorted(chain.from_iterable(glob(p, recursive=True) for p in args.train_files or ())) or stdlib
    texts = [Path(file).read_text(encoding="utf-8", errors="replace") for file in files[: 60 if args.smoke else None]]
    source = args.teacher or small_llama(texts[1:], args)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=args.gguf_file)
    teacher = AutoModelForCausalLM.from_pretrained(source, gguf_file=args.gguf_file).eval()
    teacher = teacher.to("cuda" if torch.cuda.is_available() else "cpu")
    held_out = rows(texts[::10], tokenizer, args.block_size).shuffle(seed=0)
    held_out = held_out.select(range(min(len(held_out), args.eval_rows)))
    train = rows([text for i, text in enumerate(texts) if i % 10], tokenizer, args.block_size).shuffle(seed=0)

    layers = args.layers or list(range(1, teacher.config.num_hidden_layers, 4))
    memory = json.loads(args.memory) if args.memory.lstrip().startswith("{") else args.memory
    student = miras_hf.convert(teacher, layers, memory)
    print(f"{type(teacher).__name__} to {type(student).__name__}, layers {layers} are memories now")
    ladder, said, errors = {}, {}, {}

    def climb(step: str, model: PreTrainedModel) -> None:
        ladder[step], said[step] = (
            loss(model, held_out, args.batch_size),
            continuations(model, tokenizer, args.prompts),
        )
        if model is student:
            batches = torch.tensor(held_out["input_ids"][:]).split(args.batch_size)
            errors[step] = alignment_errors(student, teacher, ({"input_ids": ids} for ids in batches))

    collator = None if tokenizer.pad_token_id is None else DataCollatorForLanguageModeling(tokenizer, mlm=False)
    if collator is None:  # rows have one length: there is nothing to pad
        train = train.map(lambda row: {"labels": row["input_ids"]})
    climb("teacher", teacher)
    climb("converted", student)
    if args.stage1_steps:
        options = training(args, "stage1", args.stage1_steps, args.stage1_rate)
        AlignmentTrainer(student, teacher, args=options, train_dataset=train, data_collator=collator).train()
        climb("stage 1", student)
    if args.stage2_steps:
        options = training(args, "stage2", args.stage2_steps, args.stage2_rate)
        DistillationTrainer(
            student, teacher, args.body_rate, args=options, train_dataset=train, data_collator=collator
        ).train()
        climb("stage 2", student)
    student.config.use_cache = True
    student.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)

    sizes = {name: cache_bytes(m, args.cache_lengths) for name, m in (("teacher", teacher), ("hybrid", student))}
    print("\n| step | nats a token | perplexity | " + " | ".join(f"layer {i}" for i in layers) + " |")
    print("| --- |" + " --- |" * (2 + len(layers)))
    for step, nats in ladder.items():
        of_layers = [f"{errors[step][i]:.3f}" if step in errors else "" for i in layers]
        print(f"| {step} | {nats:.3f} | {math.exp(nats):.2f} | " + " | ".join(of_layers) + " |")
    last = [*errors][-1]
    print(
        f"\nFrom the easiest layer to replace, by the alignment error after {last}: {', '.join(map(str, errors[last]))}"
    )
    for length in map(str, args.cache_lengths):
        theirs, ours = sizes["teacher"][length], sizes["hybrid"][length]
        print(
            f"Cache of {length} tokens: {theirs / 2**20:.2f} MiB of the teacher, {ours / 2**20:.2f} MiB of the hybrid"
        )
    for step, continued in said.items():
        print(f"\n{step}: {args.prompts[0]!r} goes on {continued[0]!r}")
    result = {
        "command": shlex.join(["python", "examples/distil.py", *argv]),
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": versions(),
        "seconds": time.perf_counter() - start,
        "layers": layers,
        "tokens": {f"stage {i}": n * args.batch_size * args.block_size for i, n in ((1, args.stage1_steps), (2, args.stage2_steps))},
        "held_out_tokens": len(held_out) * args.block_size,
        "nats_per_token": ladder,
        "alignment_errors": {step: {str(i): error for i, error in found.items()} for step, found in errors.items()},
        "cache_bytes": sizes,
        "prompts": args.prompts,
        "continuations": said,
    }  # fmt: skip
    if args.report:
        Path(args.report).parent.mkdir(parents=True, exist_ok=True)
        Path(args.report).write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main()
