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
"""Classify text with a Miras model: which package of Python's standard library does a piece of source come from?

What one learns: `AutoModelForSequenceClassification` puts a head on the last real token of any Miras model, `Trainer`
trains it with `compute_metrics`, rows of different lengths are padded, which memories ignore exactly, and the saved
folder works in `pipeline("text-classification")`.

    python examples/classify.py                                          # a minute on two cores
    python examples/classify.py --model_name_or_path runs/moneta-stdlib  # start from a pretrained model
    python examples/classify.py --smoke

Pieces to test on are from files that training has not seen. Beside the accuracy stands what naming one and the same
package always would give: no more than that means that nothing was learned.
"""

import random
import sys
import sysconfig
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)

import miras_hf


@dataclass
class Arguments:
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A pretrained model with its tokenizer; by default a new small Yaad hybrid."}
    )
    packages: int = field(default=5, metadata={"help": "How many packages, those with most source."})
    max_length: int = field(default=128, metadata={"help": "Tokens of a piece that the model reads at most."})
    lines: int = field(default=12, metadata={"help": "Lines of source in a piece."})
    smoke: bool = field(default=False, metadata={"help": "Fewer packages, shorter pieces, few steps."})


@dataclass
class ClassificationArguments(TrainingArguments):
    output_dir: str = field(default="runs/classify", metadata={"help": "Where the model goes."})
    max_steps: int = field(default=300, metadata={"help": "Optimizer steps."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Pieces per step and device."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Pieces per evaluation step and device."})
    learning_rate: float = field(default=5e-3, metadata={"help": "Peak learning rate."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Warmup: steps, or a share of them if below 1."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule after the warmup."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate during training."})
    eval_steps: float | None = field(default=0.25, metadata={"help": "Steps between, or a share of all if below 1."})
    logging_steps: float = field(default=25, metadata={"help": "Steps between two training losses."})
    save_strategy: str = field(default="no", metadata={"help": "The model is saved at the end."})
    dataloader_pin_memory: bool = field(default=torch.cuda.is_available(), metadata={"help": "Where there is a GPU."})


SMOKE = {"packages": 3, "lines": 6, "max_length": 64, "max_steps": 50, "eval_steps": 0.5, "logging_steps": 20}


def pieces(packages: int, lines: int, most: int = 2000) -> tuple[Dataset, Dataset]:
    """Pieces of source (`text`) and the package they come from (`label`), as many of each; whole files are held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "lib2to3"}
    found: dict[str, tuple[list[str], list[str]]] = {}
    for path in sorted(root.rglob("*.py")):
        package, *inner = path.relative_to(root).parts
        if not inner or skipped & {package, *inner}:
            continue
        source = path.read_text(encoding="utf-8", errors="replace").splitlines()
        cut = ("\n".join(source[start : start + lines]).strip() for start in range(0, len(source), lines))
        # every fourth file, by a number that does not change when others come or go
        found.setdefault(package, ([], []))[zlib.crc32(path.name.encode()) % 4 == 0].extend(
            t for t in cut if len(t) > 40
        )

    largest = sorted(found, key=lambda name: min(len(found[name][0]), 3 * len(found[name][1])), reverse=True)
    names = sorted(largest[:packages])
    label = ClassLabel(names=names)
    splits = []
    for split in (0, 1):
        number = min(most // (1 + 3 * split), *(len(found[name][split]) for name in names))
        rows = [
            {"text": text, "label": name}
            for name in names
            for text in random.Random(0).sample(found[name][split], number)
        ]
        splits.append(Dataset.from_list(rows).cast_column("label", label).shuffle(seed=0))
    return splits[0], splits[1]


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((np.argmax(prediction.predictions, axis=-1) == prediction.label_ids).mean())}


def main(argv: list[str] | None = None) -> dict[str, float]:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser((Arguments, ClassificationArguments))
    if "--smoke" in argv:
        parser.set_defaults(**SMOKE)
    args, training = parser.parse_args_into_dataclasses(argv)
    set_seed(training.seed)
    train, test = pieces(args.packages, args.lines, most=400 if args.smoke else 2000)
    names = train.features["label"].names
    labels = {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {n: i for i, n in enumerate(names)},
    }

    if args.model_name_or_path:
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
        model = AutoModelForSequenceClassification.from_pretrained(args.model_name_or_path, **labels)
    else:
        tokenizer = miras_hf.MirasTokenizer.train_from_iterator(train["text"][:3000], vocab_size=1024)
        # a hybrid: without pretraining, a window of attention under the memory finds what words mean much sooner
        config = miras_hf.YaadConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            num_hidden_layers=2,
            layer_types=["sliding_attention", "miras_memory"],
            sliding_window=32,
            num_attention_heads=4,
            chunk_size=16,
            pad_token_id=tokenizer.pad_token_id,
            **labels,
        )
        model = AutoModelForSequenceClassification.from_config(config)
    # `max_length` is a property of the tokenizer that is saved, so that the pipeline cuts as training did
    tokenizer.model_max_length = args.max_length

    def tokenize(batch: dict) -> dict:
        return tokenizer(batch["text"], truncation=True, split_special_tokens=True)

    trainer = Trainer(
        model,
        training,
        DataCollatorWithPadding(tokenizer),
        train.map(tokenize, batched=True, remove_columns="text"),
        test.map(tokenize, batched=True, remove_columns="text"),
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )
    trainer.train()
    result = trainer.evaluate()["eval_accuracy"]
    model.config.use_cache = True
    trainer.save_model()

    # what a user of the saved folder does
    classify = pipeline("text-classification", training.output_dir)
    for row in test.select(range(3)):
        answer = classify(row["text"], truncation=True)[0]
        print(f"\n{row['text'][:160]}\n--> {answer['label']} ({answer['score']:.0%}), in truth {names[row['label']]}")
    baseline = max(np.bincount(test["label"])) / len(test)
    print(f"\nAccuracy on {len(test)} pieces of unseen files: {result:.3f}; naming one package always: {baseline:.3f}")
    print(f"Saved in {training.output_dir}.")
    return {"accuracy": result, "baseline": baseline}


if __name__ == "__main__":
    main()
