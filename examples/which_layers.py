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
"""Which attention layers of a pretrained Transformer to convert, and into which memories: two tables, measured briefly.

What one learns: `--table layers` makes memories of all candidates, aligns them for a few steps, or only fits their
output projections (`--fit_rows 12 --steps 0`, no gradients), and restores the attention of one at a time: its alignment
error says how well a memory imitates it, the divergence that is left says how much the model needs it. Convert those
with a small gain. `--table receivers` stores what some layers read and return, and aligns memories of several kinds
with the same activations: how close does each come, at which size of its state.

    python examples/which_layers.py --teacher my-llama --table layers --report layers.json
    python examples/which_layers.py --teacher my-llama --table receivers --layers 2 9 16 23
    python examples/which_layers.py --smoke --table receivers                  # a tiny Llama trained on the spot

Text is Python's own source unless `--train_files` name others. A command that was stopped goes on where it was.
"""

import math
import shlex
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import distil
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    HfArgumentParser,
    PreTrainedModel,
    default_data_collator,
    set_seed,
)

import miras_hf
from miras_hf.compat import CACHE_NAME
from miras_hf.configuration_miras import MEMORY_LAYER
from miras_hf.distillation import AlignmentTrainer, alignment_errors
from miras_hf.layer_ranking import restored_divergences
from miras_hf.model_card import machine, versions
from miras_hf.stored_alignment import StoredAlignmentTrainer, store_activations


@dataclass
class Arguments:
    table: str = field(default="layers", metadata={"help": "layers or receivers."})
    teacher: str | None = field(
        default=None, metadata={"help": "A Llama, Mistral, Qwen2 or Qwen3: folder or Hub name."}
    )
    gguf_file: str | None = field(default=None, metadata={"help": "File in that folder, of a model stored as GGUF."})
    output_dir: str = field(default="runs/which_layers", metadata={"help": "Where activations and progress go."})
    report: str | None = field(default=None, metadata={"help": "JSON file for the table, with a .md beside it."})
    layers: list[int] | None = field(
        default=None, metadata={"help": "Candidates; by default all, for receivers four from all depths."}
    )
    hybrid: str | None = field(
        default=None,
        metadata={"help": "For --table layers, a converted and aligned model of that teacher: its layers."},
    )
    memory: str = field(default="yaad", metadata={"help": "Type of the memories of `--table layers`."})
    train_files: list[str] | None = field(
        default=None, metadata={"help": "Text, files or globs, every tenth held out; by default Python's own source."}
    )
    block_size: int = field(default=256, metadata={"help": "Tokens in one row."})
    batch_size: int = field(default=4, metadata={"help": "Rows per step."})
    fit_rows: int = field(
        default=0,
        metadata={"help": "For --table layers, rows to which output projections are fitted first; --steps 0 then."},
    )
    steps: int = field(default=16, metadata={"help": "Steps of alignment."})
    rate: float = field(default=1e-3, metadata={"help": "Peak rate of alignment."})
    eval_rows: int = field(default=4, metadata={"help": "Rows of held-out text that are measured."})
    seed: int = field(default=0, metadata={"help": "Seed of everything."})
    size: str = field(default="cpu", metadata={"help": "smoke, or cpu, by which the texts are chosen, see distil.py."})
    smoke: bool = field(default=False, metadata={"help": "A tiny Llama, trained on the spot, for seconds."})


SMOKE = {"size": "smoke", "block_size": 64, "batch_size": 8, "steps": 8, "rate": 3e-3, "eval_rows": 8}

# a state per head of d^2 or 2 d^2 numbers, whatever the receiver, d the width of a head
_MLP = {"memory_architecture": "mlp", "memory_expansion": 1}
RECEIVERS: dict[str, dict[str, Any]] = {
    "matrix, l2": {"model_type": "miras", "memory_architecture": "matrix", "attentional_bias": "l2"},
    "MLP, l2, its last weight written": {
        "model_type": "miras",
        **_MLP,
        "attentional_bias": "l2",
        "update_layers": "last",
    },
    "matrix, l2, momentum": {
        "model_type": "miras",
        "memory_architecture": "matrix",
        "attentional_bias": "l2",
        "learning_algorithm": "momentum",
        "gate_granularity": "head",
    },
    "MLP, l2": {"model_type": "miras", **_MLP, "attentional_bias": "l2"},
    "Yaad": {"model_type": "yaad", **_MLP},
    "Moneta": {"model_type": "moneta", **_MLP},
    "Memora": {"model_type": "memora", **_MLP},
}


@torch.no_grad()
def state_numbers(student: PreTrainedModel, layer: int) -> int:
    """Numbers in the state of one head of a memory, without what waits for the end of a chunk."""
    cache = DynamicCache(config=student.config)
    student.model(torch.ones(1, 2, dtype=torch.long, device=student.device), **{CACHE_NAME: cache})
    state = cache.layers[layer].memory
    return sum(x[0, 0].numel() for x in (*state.dual, *state.momentum))


def aligned(teacher: PreTrainedModel, train: Dataset, args: Arguments, progress: distil.Progress) -> PreTrainedModel:
    """A hybrid with memories in all candidates, after stage 1."""
    if args.hybrid is not None:
        return AutoModelForCausalLM.from_pretrained(args.hybrid).to(teacher.device).eval()
    set_seed(args.seed)
    student = miras_hf.convert(teacher, args.layers, args.memory)
    if args.fit_rows:
        ids = torch.tensor(train[: args.fit_rows]["input_ids"])
        path = Path(args.output_dir, "fitted.safetensors")
        path.parent.mkdir(parents=True, exist_ok=True)
        distil.fit(student, teacher, ids, path, args.batch_size, progress)
    if not args.steps:
        return student
    done = Path(args.output_dir, "aligned.safetensors")
    mixers = {f"{i}.{n}": p for i in args.layers for n, p in student.model.layers[i].mixer.named_parameters()}
    if not done.exists():
        saves = {"save_strategy": "steps", "save_steps": max(1, args.steps // 4), "save_total_limit": 1}
        options = distil.training(args, "stage1", args.steps, args.rate, **saves)
        rows = train.map(lambda row: {"labels": row["input_ids"]})
        trainer = AlignmentTrainer(
            student, teacher, args=options, train_dataset=rows, data_collator=default_data_collator
        )
        distil.train_stage(trainer, lambda: save_file(mixers, done), math.inf, progress)
    with torch.no_grad():
        for name, weight in load_file(done, device=str(teacher.device)).items():
            mixers[name].copy_(weight)
    return student


def table_of_layers(
    teacher: PreTrainedModel, train: Dataset, held_out: torch.Tensor, args: Arguments, progress: distil.Progress
) -> list[dict[str, Any]]:
    """A row for every candidate: its alignment error, and what its attention brings back."""
    student = aligned(teacher, train, args, progress)

    def once(what: str, measure) -> Any:
        return progress.once("layers", what, measure)

    batches = [{"input_ids": row[None]} for row in held_out]
    errors = once("errors", lambda: {str(i): e for i, e in alignment_errors(student, teacher, batches).items()})
    of_rows = []
    for n, batch in enumerate(batches):

        def measure(batch=batch) -> dict[str, float]:
            start = time.perf_counter()
            found = {str(i): x for i, x in restored_divergences(student, teacher, [batch]).items()}
            progress.add_seconds(time.perf_counter() - start)
            return found

        of_rows.append(once(f"row {n}", measure))
        print(f"row {n + 1} of {len(batches)}: {of_rows[-1]['None']:.3f} nats from the teacher", flush=True)
    means = {name: sum(row[name] for row in of_rows) / len(of_rows) for name in of_rows[0]}
    whole = means.pop("None")
    found = [
        {"layer": int(i), "alignment_error": errors[i], "divergence": whole, "restored": rest, "gain": whole - rest}
        for i, rest in means.items()
    ]
    return sorted(found, key=lambda row: -row["gain"])


def table_of_receivers(
    teacher: PreTrainedModel, train: Dataset, held_out: torch.Tensor, args: Arguments, progress: distil.Progress
) -> list[dict[str, Any]]:
    """A row for every receiver: the size of its state, and its alignment error in every layer."""
    files = {}
    for name, ids in (
        ("train", torch.tensor(train[: args.steps * args.batch_size]["input_ids"])),
        ("held_out", held_out),
    ):
        folder = Path(args.output_dir, name)
        files[name] = {i: folder / f"layer_{i}.arrow" for i in args.layers}
        if not all(path.exists() for path in files[name].values()):
            start = time.perf_counter()
            batches = ({"input_ids": part} for part in ids.split(args.batch_size))
            store_activations(miras_hf.convert(teacher, args.layers), teacher, batches, folder)
            progress.add_seconds(time.perf_counter() - start)
    rows = []
    for receiver, fields_of in RECEIVERS.items():
        missing = [i for i in args.layers if f"{receiver}, layer {i}" not in progress.found.get("receivers", {})]
        if missing:
            set_seed(args.seed)
            student = miras_hf.convert(teacher, args.layers, fields_of)
            size = state_numbers(student, args.layers[0])
        for i in missing:

            def measure(i=i, student=student, size=size) -> dict[str, float]:
                start = time.perf_counter()
                options = distil.training(args, "receiver", args.steps, args.rate)
                datasets = {name: Dataset.from_file(str(of[i])) for name, of in files.items()}
                trainer = StoredAlignmentTrainer(
                    student, i, args=options, train_dataset=datasets["train"], eval_dataset=datasets["held_out"]
                )
                before = trainer.evaluate()["eval_loss"]
                trainer.train()
                found = {"before": before, "after": trainer.evaluate()["eval_loss"], "state": size}
                progress.add_seconds(time.perf_counter() - start)
                return found

            found = progress.once("receivers", f"{receiver}, layer {i}", measure)
            print(f"{receiver}, layer {i}: {found['before']:.3f} to {found['after']:.3f}", flush=True)
        of_layers = {str(i): progress.found["receivers"][f"{receiver}, layer {i}"] for i in args.layers}
        rows.append(
            {
                "receiver": receiver,
                "fields": fields_of,
                "state_numbers_per_head": next(iter(of_layers.values()))["state"],
                "before": {i: found["before"] for i, found in of_layers.items()},
                "alignment_errors": {i: found["after"] for i, found in of_layers.items()},
                "mean": sum(found["after"] for found in of_layers.values()) / len(of_layers),
            }
        )
    return rows


def markdown(result: dict[str, Any]) -> str:
    """The table as Markdown."""
    rows = result["rows"]
    if result["table"] == "layers":
        lines = ["| layer | alignment error | KL with its attention restored | gain |", "|---|---|---|---|"]
        for row in rows:
            lines.append(
                f"| {row['layer']} | {row['alignment_error']:.3f} | {row['restored']:.3f} | {row['gain']:.3f} |"
            )
        return "\n".join(lines)
    layers = [*rows[0]["alignment_errors"]]
    lines = [f"| receiver | numbers a head | {' | '.join(f'layer {i}' for i in layers)} | mean |"]
    lines.append("|---" * (3 + len(layers)) + "|")
    for row in rows:
        errors = [f"{row['alignment_errors'][i]:.3f}" for i in layers]
        lines.append(
            f"| {row['receiver']} | {row['state_numbers_per_head']:,} | {' | '.join(errors)} | {row['mean']:.3f} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(Arguments)
    if "--smoke" in argv:
        parser.set_defaults(**SMOKE)
    (args,) = parser.parse_args_into_dataclasses(argv)
    if args.table not in ("layers", "receivers"):
        raise ValueError(f"--table must be layers or receivers, got {args.table!r}.")
    if args.fit_rows < 0 or (args.fit_rows and (args.table != "layers" or args.hybrid is not None)):
        raise ValueError(
            f"--fit_rows must be at least 0, and goes with --table layers without --hybrid, got {args.fit_rows}."
        )
    if args.teacher is None and not args.smoke:
        raise ValueError("--teacher is needed, a Llama-like model; or --smoke, which makes one.")
    set_seed(args.seed)
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in distil.text_files(args)]
    source = args.teacher or distil.small_llama(texts[1:], args)
    tokenizer, teacher = distil.load_teacher(source, args.gguf_file)
    number = teacher.config.num_hidden_layers
    if args.hybrid is not None:
        if args.layers is not None or args.table != "layers":
            raise ValueError("--hybrid goes with --table layers, and has its own layers: leave --layers out.")
        types = AutoConfig.from_pretrained(args.hybrid).layer_types
        args.layers, args.steps = [i for i, kind in enumerate(types) if kind == MEMORY_LAYER], 0
    if args.layers is None:
        every = max(1, number // 4)
        args.layers = list(range(number)) if args.table == "layers" else list(range(every // 2, number, every))[:4]
    settings = {f.name: getattr(args, f.name) for f in fields(args) if f.name not in ("output_dir", "report")}
    progress = distil.Progress(Path(args.output_dir), settings)
    held_out = distil.rows(texts[::10], tokenizer, args.block_size).shuffle(seed=0)[: args.eval_rows]["input_ids"]
    held_out = torch.tensor(held_out, device=teacher.device)
    train = distil.rows([text for i, text in enumerate(texts) if i % 10], tokenizer, args.block_size).shuffle(seed=0)
    make = table_of_layers if args.table == "layers" else table_of_receivers
    found = make(teacher, train, held_out, args, progress)
    result = {
        "command": shlex.join(["python", "examples/which_layers.py", *argv]),
        "table": args.table,
        "settings": {n: value for n, value in asdict(args).items() if n not in ("output_dir", "report", "teacher")},
        "tokens": args.steps * args.batch_size * args.block_size,
        "fitted_tokens": args.fit_rows * args.block_size,
        "held_out_tokens": held_out.numel(),
        "machine": machine(),
        "versions": versions(),
        "seconds": progress.found.get("seconds", 0.0),
        "rows": found,
    }
    print(f"\n{markdown(result)}")
    if args.report:
        distil.write_report(Path(args.report), result, markdown(result))
    return result


if __name__ == "__main__":
    main()
