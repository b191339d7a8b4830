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
"""Pretrain a Miras language model with Trainer: from raw text to a saved model that the Auto classes load.

What one learns: a Miras model is trained like any causal language model of Transformers. The only line here that is
about Miras is `import miras_hf`; `--model_type llama` runs the same script with a Transformer for comparison.

The demo: with no arguments, a small Moneta learns to write Python from the Python standard library's own source (on
every machine, nothing is downloaded), in minutes on two CPU cores. It trains a tokenizer, shows the validation loss
before, during and after training, and leaves in `--output_dir` the model (safetensors), the tokenizer, a model card,
`loss.png` with its numbers in `loss.json`, and checkpoints to resume from. Last it loads the saved folder again and
prints text it generates.

    python examples/pretrain.py
    python examples/pretrain.py --smoke                                # half a minute, to see that everything works

Other models, sizes and data, every flag of TrainingArguments included (`--help` lists them all):

    python examples/pretrain.py --model_type yaad --hybrid --output_dir runs/yaad-hybrid
    python examples/pretrain.py --model_type llama --output_dir runs/llama
    python examples/pretrain.py --train_files 'books/*.txt' --validation_files 'held-out/*.txt'
    python examples/pretrain.py --config_overrides chunk_size=32,rms_norm_eps=1e-5 --learning_rate 1e-3
    python examples/pretrain.py --config run.yaml --max_steps 2000     # flags win over the file
    python examples/pretrain.py --resume_from_checkpoint runs/moneta-stdlib/checkpoint-1000 --max_steps 2000
    torchrun --nproc-per-node 8 examples/pretrain.py --bf16 --block_size 4096 \\
        --dataset_name HuggingFaceFW/fineweb-edu --dataset_config_name sample-10BT --streaming \\
        --hidden_size 1024 --num_hidden_layers 24 --num_attention_heads 16 --max_steps 30000
"""

import dataclasses
import difflib
import json
import math
import platform
import shlex
import sys
import sysconfig
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

import miras_hf
from miras_hf.model_card import ModelCardMixin, changed_fields, training_run


@dataclass
class ModelArguments:
    """Which model: a new one of `model_type`, or an existing one to continue."""

    model_type: str = field(
        default="moneta", metadata={"help": "moneta, yaad, memora, miras, or any type that AutoConfig knows (llama)."}
    )
    hybrid: bool = field(
        default=False, metadata={"help": "Alternate memory layers with sliding-window attention layers."}
    )
    hidden_size: int = field(default=128, metadata={"help": "Width of a new model."})
    num_hidden_layers: int = field(default=4, metadata={"help": "Layers of a new model."})
    num_attention_heads: int = field(default=8, metadata={"help": "Memories (or attention heads) in a layer."})
    intermediate_size: int | None = field(
        default=None, metadata={"help": "Width of the MLP; by default 8/3 of hidden_size, rounded to 32."}
    )
    initializer_range: float | None = field(
        default=None, metadata={"help": "Deviation of initial weights; by default sqrt(0.4 / hidden_size)."}
    )
    tie_word_embeddings: bool = field(
        default=True, metadata={"help": "One matrix for embedding and output, which suits small models."}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "More fields of the config: 'a=1,b=x', or a JSON object."}
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Continue from this model, and its tokenizer; no flags of a new one go with it."},
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "A ready tokenizer, instead of training one on the training text."}
    )
    vocab_size: int = field(default=2048, metadata={"help": "Vocabulary of the tokenizer that is trained."})


@dataclass
class DataArguments:
    """Which text: by default the Python standard library's source."""

    dataset_name: str | None = field(default=None, metadata={"help": "A dataset of the Hub, or a local folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_files: list[str] | None = field(
        default=None, metadata={"help": "Local files or globs, one document a file (txt, py, md...), or jsonl, csv..."}
    )
    validation_files: list[str] | None = field(
        default=None, metadata={"help": "The same for validation; by default documents held out from training."}
    )
    text_column: str | None = field(
        default=None, metadata={"help": "Column with the text; by default 'text', 'content' or the first of strings."}
    )
    sample_by: str = field(
        default="document",
        metadata={"help": "What a document is in text files: document (the file), paragraph, line."},
    )
    streaming: bool = field(default=False, metadata={"help": "Read the data while training, without a copy."})
    validation_fraction: float = field(
        default=0.05, metadata={"help": "Share of the documents held out where the data has no validation split."}
    )
    block_size: int = field(default=256, metadata={"help": "Tokens in one training row."})
    max_documents: int | None = field(default=None, metadata={"help": "Use only so many documents of each split."})
    max_eval_samples: int = field(default=64, metadata={"help": "Use only so many validation rows."})
    tokenizer_samples: int = field(default=20_000, metadata={"help": "Documents that the tokenizer is trained on."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})


@dataclass
class PretrainingArguments(TrainingArguments):
    """TrainingArguments with the demo's values as defaults."""

    output_dir: str | None = field(
        default=None, metadata={"help": "Where everything goes; by default runs/<model type>-<data>."}
    )
    max_steps: int = field(default=1000, metadata={"help": "Optimizer steps; -1: --num_train_epochs decides."})
    per_device_train_batch_size: int = field(default=2, metadata={"help": "Rows per step and device."})
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Rows per evaluation step and device."})
    learning_rate: float = field(default=4e-3, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule after the warmup."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Warmup: steps, or a share of them if below 1."})
    weight_decay: float = field(default=0.1, metadata={"help": "Decay of matrices, not of norms, biases, memories."})
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's beta2."})
    eval_on_start: bool = field(default=True, metadata={"help": "Validation loss before training."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate during training."})
    eval_steps: float | None = field(default=0.2, metadata={"help": "Steps between, or a share of all if below 1."})
    logging_steps: float = field(default=20, metadata={"help": "Steps between two training losses."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    dataloader_pin_memory: bool = field(
        default=torch.cuda.is_available(), metadata={"help": "Pinned memory, where there is a GPU to profit."}
    )
    include_num_input_tokens_seen: bool = field(default=True, metadata={"help": "Count the tokens."})


@dataclass
class RunArguments:
    """This run as a whole."""

    config: str | None = field(default=None, metadata={"help": "A JSON or YAML file with values of these flags."})
    smoke: bool = field(default=False, metadata={"help": "A tiny model, little data and few steps."})
    prompt: str = field(default="class ", metadata={"help": "What the sample at the end continues."})
    sample_tokens: int = field(default=200, metadata={"help": "Tokens to generate at the end."})
    report: str | None = field(default=None, metadata={"help": "Write losses, machine, versions, command as JSON."})
    license: str | None = field(default=None, metadata={"help": "License of the model, for its card."})


OF_A_NEW_MODEL = (
    "model_type",
    "hybrid",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "initializer_range",
    "tie_word_embeddings",
)
"""Flags that say what a new model is like."""

SMOKE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "per_device_train_batch_size": 8,
    "learning_rate": 8e-3,
    "vocab_size": 512,
    "block_size": 64,
    "max_documents": 60,
    "max_eval_samples": 16,
    "max_steps": 12,
    "logging_steps": 2,
    "sample_tokens": 20,
    "tokenizer_samples": 50,
}


def parse(argv: list[str]) -> tuple[ModelArguments, DataArguments, PretrainingArguments, RunArguments]:
    """Flags win over the `--config` file, the file over `--smoke`, and that over the defaults."""
    parser = HfArgumentParser((ModelArguments, DataArguments, PretrainingArguments, RunArguments))
    first, _ = parser.parse_known_args(argv)
    values = dict(SMOKE) if first.smoke else {}
    if first.config:
        # JSON is YAML, so one reader serves both.
        from_file = yaml.safe_load(Path(first.config).read_text())
        known = {f.name for kind in parser.dataclass_types for f in dataclasses.fields(kind) if f.init}
        _check_known(f"--config {first.config}", from_file, known)
        values |= from_file
    parser.set_defaults(**values)
    namespace, _ = parser.parse_known_args(argv)
    if namespace.output_dir is None:
        source = namespace.dataset_name or ("files" if namespace.train_files else "stdlib")
        parser.set_defaults(output_dir=f"runs/{namespace.model_type}-{Path(source).name}")
    model, data, training, run = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    if model.model_name_or_path:
        unset = {f.name: f.default for f in dataclasses.fields(model)} | (SMOKE if run.smoke else {})
        given = [f"--{name}" for name in OF_A_NEW_MODEL if getattr(model, name) != unset[name]]
        if given:
            raise ValueError(f"--model_name_or_path continues a model as it is, and takes no {', '.join(given)}.")
    return model, data, training, run


def _check_known(where: str, names: Iterable[str], known: set[str]) -> None:
    """Raise for a name that is not known, with the nearest ones that are."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known)
            raise ValueError(
                f"{where}: unknown name '{name}'" + (f"; did you mean {', '.join(near)}?" if near else ".")
            )


def _check_overrides(overrides: Iterable[str], config: PreTrainedConfig) -> None:
    _check_known("--config_overrides", overrides, {*config.to_dict(), *config.attribute_map, "layer_types"})


def stdlib_files() -> list[str]:
    """The standard library's modules: no tests, no installed packages, no generated tables."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
    return [str(path) for path in sorted(root.rglob("*.py")) if not skipped & set(path.relative_to(root).parts)]


def load_documents(data: DataArguments) -> DatasetDict | IterableDatasetDict:
    """Splits `train` and `validation` with the one column `text`, a row for each document, never one in both."""
    if data.dataset_name:
        source, options = data.dataset_name, {"name": data.dataset_config_name}
    else:
        files = {"train": data.train_files or stdlib_files()}
        if data.validation_files:
            files["validation"] = data.validation_files
        ending = Path(files["train"][0]).suffix.lstrip(".")
        source = {"jsonl": "json", "json": "json", "csv": "csv", "parquet": "parquet"}.get(ending, "text")
        # A few old files are not UTF-8; `replace` keeps the rest of them.
        options = {"sample_by": data.sample_by, "encoding_errors": "replace"} if source == "text" else {}
        options["data_files"] = files
    found = load_dataset(source, streaming=data.streaming, **options)
    raw = {name: found[name] for name in ("train", "validation") if name in found}
    if "train" not in raw:
        raise ValueError(f"{source} has no split 'train', but {', '.join(found)}.")
    if "validation" not in raw and data.streaming:
        raw = {"validation": raw["train"].take(1000), "train": raw["train"].skip(1000)}
    elif "validation" not in raw:
        if len(raw["train"]) < 2:
            raise ValueError("The data is one document: give --validation_files, or --sample_by paragraph or line.")
        held_out = raw["train"].train_test_split(test_size=data.validation_fraction, seed=0)
        raw = {"train": held_out["train"], "validation": held_out["test"]}

    row = next(iter(raw["train"]))
    strings = [name for name, value in row.items() if isinstance(value, str)]
    column = data.text_column or next((name for name in ("text", "content") if name in strings), (strings or [""])[0])
    if column not in strings:
        raise ValueError(f"--text_column '{column}' is not a column of strings; those are: {', '.join(strings)}.")
    kind = IterableDatasetDict if data.streaming else DatasetDict
    if column != "text":
        raw = {name: split.select_columns([column]).rename_column(column, "text") for name, split in raw.items()}
    if data.max_documents:
        raw = {name: split.take(data.max_documents) for name, split in raw.items()}
    return kind(raw).select_columns(["text"])


def get_tokenizer(
    model: ModelArguments, data: DataArguments, training: TrainingArguments, documents: DatasetDict
) -> PreTrainedTokenizerBase:
    """The tokenizer named by the arguments, or one trained by the first process and read by the others."""
    name = model.tokenizer_name or model.model_name_or_path
    if name is None:
        name = training.output_dir
        with training.main_process_first(desc="training the tokenizer"):
            if training.process_index == 0:
                texts = (row["text"] for row in islice(documents["train"], data.tokenizer_samples))
                trained = miras_hf.MirasTokenizer.train_from_iterator(texts, model.vocab_size, show_progress=True)
                trained.save_pretrained(name)
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"The tokenizer {name} has no eos token, which separates documents.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def get_model(model: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A new model with random weights, or the one to continue."""
    overrides = parse_overrides(model.config_overrides)
    if model.model_name_or_path:
        stored = AutoConfig.from_pretrained(model.model_name_or_path)
        _check_overrides(overrides, stored)
        config = AutoConfig.from_pretrained(model.model_name_or_path, **overrides)
        return AutoModelForCausalLM.from_pretrained(model.model_name_or_path, config=config)
    values: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size or 32 * round(model.hidden_size / 12),
        "num_hidden_layers": model.num_hidden_layers,
        "num_attention_heads": model.num_attention_heads,
        # The usual 0.02 is this rule (Nguyen and Salazar, 2019) at a width of 1,000: too little for small models.
        "initializer_range": model.initializer_range or math.sqrt(0.4 / model.hidden_size),
        "tie_word_embeddings": model.tie_word_embeddings,
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
    }
    if model.hybrid:
        pattern = ("miras_memory", "sliding_attention")
        values["layer_types"] = [pattern[layer % 2] for layer in range(model.num_hidden_layers)]
    _check_overrides(overrides, AutoConfig.for_model(model.model_type))
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model.model_type, **(values | overrides)))


def parse_overrides(text: str | None) -> dict[str, Any]:
    """`a=1,b=x` or a JSON object as a dict; values are JSON where they can be, else strings."""
    if not text:
        return {}
    if text.lstrip().startswith("{"):
        return json.loads(text)
    overrides = {}
    for item in text.split(","):
        name, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"--config_overrides must look like 'a=1,b=x', got '{item}'.")
        try:
            overrides[name.strip()] = json.loads(value)
        except json.JSONDecodeError:
            overrides[name.strip()] = value.strip()
    return overrides


def pack(
    documents: DatasetDict | IterableDatasetDict, tokenizer: PreTrainedTokenizerBase, data: DataArguments
) -> tuple[Dataset | IterableDataset, Dataset]:
    """Training and validation rows of `block_size` ids: documents one after the other, each closed by eos."""

    def encode_and_cut(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        # Text that looks like a special token stays text.
        encoded = tokenizer(batch["text"], split_special_tokens=True, return_attention_mask=False, verbose=False)
        ids = list(chain.from_iterable([*row, tokenizer.eos_token_id] for row in encoded["input_ids"]))
        full = len(ids) - len(ids) % data.block_size
        return {"input_ids": [ids[i : i + data.block_size] for i in range(0, full, data.block_size)]}

    options = {} if data.streaming else {"num_proc": data.preprocessing_num_workers, "desc": "tokenizing"}
    rows = documents.map(encode_and_cut, batched=True, remove_columns=["text"], **options)
    train, validation = rows["train"], rows["validation"]
    if isinstance(train, Dataset):
        train, validation = train.shuffle(seed=0), validation.shuffle(seed=0)
    # A list, as the stream is read before, during and after training.
    validation = Dataset.from_list(list(islice(validation, data.max_eval_samples)))
    if len(validation) == 0:
        raise ValueError(f"The validation text is shorter than one row of --block_size {data.block_size} tokens.")
    return train, validation


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """A batch of rows of one length, whose every token is learned: an eos too that the tokenizer pads with."""
    batch = default_data_collator(rows)
    return batch | {"labels": batch["input_ids"]}


class PretrainingTrainer(ModelCardMixin, Trainer):
    """Trainer whose checkpoints carry a model card."""


def loss_curves(log_history: list[dict[str, float]]) -> dict[str, list[list[float]]]:
    """`[step, loss]` pairs for `train` and `validation`."""
    names = {"train": "loss", "validation": "eval_loss"}
    return {name: [[row["step"], row[key]] for row in log_history if key in row] for name, key in names.items()}


def plot_loss(curves: dict[str, list[list[float]]], ax=None):
    """
    Draw the loss (nats per token) over the optimizer steps.

    Args:
        curves (`dict`): What [`loss_curves`] returns.
        ax (`matplotlib.axes.Axes`, *optional*): Where to draw; a new figure if not given.

    Returns:
        `matplotlib.axes.Axes`
    """
    from matplotlib.figure import Figure

    ax = ax or Figure(figsize=(6, 4), layout="constrained").subplots()
    for (name, points), style in zip(curves.items(), ("-", "o-"), strict=True):
        if points:
            ax.plot(*zip(*points, strict=True), style, markersize=4, linewidth=1.2, label=name)
    ax.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    ax.grid(alpha=0.3)
    ax.legend()
    return ax


def bytes_per_token(tokenizer: PreTrainedTokenizerBase, rows: Dataset) -> float:
    """UTF-8 bytes of text per token, which makes losses of different tokenizers comparable (bits per byte)."""
    ids = list(rows["input_ids"])
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return sum(len(text.encode()) for text in texts) / sum(map(len, ids))


def generate(folder: str, prompt: str, new_tokens: int, seed: int) -> str:
    """Load the saved folder with the Auto classes and continue the prompt."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).to("cuda" if torch.cuda.is_available() else "cpu")
    set_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    ids = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=True, temperature=0.7, top_p=0.95)
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def data_name(data: DataArguments) -> dict[str, str | None]:
    """Name of the data for people, its id on the Hub if it has one, and its language if that is known."""
    if data.dataset_name:
        name = " ".join(filter(None, (data.dataset_name, data.dataset_config_name)))
        return {"name": name, "id": None if Path(data.dataset_name).exists() else data.dataset_name, "language": None}
    if data.train_files:
        name = f"local files: {', '.join(Path(file).name for file in data.train_files)}"
        return {"name": name, "id": None, "language": None}
    return {"name": f"source of Python {platform.python_version()}'s standard library", "id": None, "language": "code"}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run everything; `argv` is `sys.argv[1:]` by default. Returns the report."""
    started = time.perf_counter()
    argv = list(sys.argv[1:] if argv is None else argv)
    model_args, data_args, args, run = parse(argv)
    transformers.utils.logging.set_verbosity(args.get_process_log_level())
    set_seed(args.seed)
    if data_args.streaming and args.max_steps <= 0:
        raise ValueError("--streaming needs --max_steps: the length of a stream is not known.")

    documents = load_documents(data_args)
    tokenizer = get_tokenizer(model_args, data_args, args, documents)
    with args.main_process_first(desc="tokenizing"):
        train, validation = pack(documents, tokenizer, data_args)
    model = get_model(model_args, tokenizer)
    trainer = PretrainingTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        data_collator=collate,
    )
    if trainer.is_world_process_zero():
        print(f"{type(model).__name__}, {model.num_parameters():,} parameters; output goes to {args.output_dir}")

    result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    after = trainer.evaluate()["eval_loss"]
    # Trainer switches the cache off for training; what is saved is for generation.
    model.config.use_cache = True
    trainer.save_model()
    trainer.save_state()
    if not trainer.is_world_process_zero():
        return {}

    folder = Path(args.output_dir)
    curves = loss_curves(trainer.state.log_history)
    (folder / "loss.json").write_text(json.dumps(curves, indent=2))
    plot_loss(curves).figure.savefig(folder / "loss.png", dpi=150)
    sample = generate(args.output_dir, run.prompt, run.sample_tokens, args.seed)

    scale = math.log(2) * bytes_per_token(tokenizer, validation)
    losses = {"before": curves["validation"][0][1] if args.eval_on_start else None, "after": after}
    report = training_run(trainer) | {
        "name": args.hub_model_id or folder.name,
        "command": shlex.join(["python", "examples/pretrain.py", *argv]),
        "model_type": model.config.model_type,
        "base_model": model_args.model_name_or_path,
        "parameters": model.num_parameters(),
        "config": changed_fields(model.config),
        "data": {
            **data_name(data_args),
            "train_rows": len(train) if isinstance(train, Dataset) else None,
            "validation_rows": len(validation),
            "block_size": data_args.block_size,
            "vocab_size": len(tokenizer),
        },
        "validation": {
            when: loss and {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": loss / scale}
            for when, loss in losses.items()
        },
        "seconds": {"training": result.metrics["train_runtime"], "total": time.perf_counter() - started},
        "prompt": run.prompt,
        "sample": sample,
    }
    trainer.run_details = model.training_run = report
    trainer.create_model_card(license=run.license)
    if args.push_to_hub:
        trainer.push_to_hub(license=run.license)
    if run.report:
        Path(run.report).parent.mkdir(parents=True, exist_ok=True)
        Path(run.report).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")

    print(f"\nValidation loss in nats per token: {losses['before'] or float('nan'):.3f} before, {after:.3f} after")
    print(
        f"{report['training']['tokens']:,} tokens, {report['seconds']['total']:.0f} s. Saved in {folder}. It writes:\n"
    )
    print(sample)
    return report


if __name__ == "__main__":
    main()
