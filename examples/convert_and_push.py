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
"""Turn a pretrained Llama into a Miras hybrid, train what is new for a while, save it or push it to the Hub.

What one learns: a Miras model is a Llama whose attention blocks are, in some layers, memories. Embeddings, norms, MLPs
and the projections of queries, keys, values and outputs mean the same in both and are copied; the layers that stay
attention give exactly what they gave. Convolutions, gates and memories are new, and start so that their layers add
little: these layers' mixers must be trained, here for a while and with all the rest frozen.

    python examples/convert_and_push.py --source HuggingFaceTB/SmolLM2-135M --memory_layers 2 8 14 20 26
    python examples/convert_and_push.py --source my-llama --train_files 'books/*.txt' --max_steps 1000
    python examples/convert_and_push.py --source my-llama --push_to_hub --hub_model_id me/my-yaad
    python examples/convert_and_push.py --smoke                          # converts a tiny Llama trained on the spot

Any model with Llama's parameter names will do (Mistral, SmolLM); a parameter that has no place in a Miras model is an
error, nothing is dropped in silence.
"""

import math
import sys
import sysconfig
from dataclasses import dataclass, field
from glob import glob
from itertools import chain
from pathlib import Path

import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    LlamaConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

import miras_hf


@dataclass
class Arguments:
    source: str | None = field(default=None, metadata={"help": "The Llama-like model, a folder or a name on the Hub."})
    model_type: str = field(default="yaad", metadata={"help": "What the memories are: yaad, moneta, memora or miras."})
    memory_layers: list[int] | None = field(
        default=None, metadata={"help": "Layers that become memories; by default every fourth, from the second."}
    )
    sliding_window: int | None = field(
        default=None,
        metadata={"help": "Window of the attention that stays; by default all that the source could see."},
    )
    train_files: list[str] | None = field(
        default=None,
        metadata={"help": "Text to train and measure on, files or globs; by default Python's own source."},
    )
    block_size: int = field(default=256, metadata={"help": "Tokens in one row."})
    smoke: bool = field(default=False, metadata={"help": "Convert a tiny Llama that is trained on the spot."})


@dataclass
class RecoveryArguments(TrainingArguments):
    output_dir: str = field(default="runs/converted", metadata={"help": "Where the converted model goes."})
    max_steps: int = field(default=200, metadata={"help": "Steps of training what is new; 0 for none."})
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Rows per step and device."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Peak learning rate."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Warmup: steps, or a share of them if below 1."})
    logging_steps: float = field(default=20, metadata={"help": "Steps between two training losses."})
    save_strategy: str = field(default="no", metadata={"help": "The model is saved at the end."})
    dataloader_pin_memory: bool = field(default=torch.cuda.is_available(), metadata={"help": "Where there is a GPU."})


SMOKE = {
    "max_steps": 30,
    "block_size": 64,
    "per_device_train_batch_size": 8,
    "memory_layers": [1],
    "logging_steps": 10,
}


def convert(
    llama: PreTrainedModel, memory_layers: list[int], model_type: str = "yaad", sliding_window: int | None = None
) -> tuple[PreTrainedModel, list[str]]:
    """
    A Miras hybrid with a Llama's weights.

    Args:
        llama (`PreTrainedModel`): A causal language model with Llama's parameter names.
        memory_layers (`list[int]`): Indices of the layers that become memories.
        model_type (`str`, *optional*, defaults to `"yaad"`): Which of the Miras models.
        sliding_window (`int`, *optional*): Window of the attention layers; by default as long as Llama's positions.

    Returns:
        `tuple(PreTrainedModel, list[str])`: The model, and the names of its parameters that are new.

    Raises:
        `ValueError`: for layers that do not exist, and for parameters that have no place in a Miras model.
    """
    old = llama.config
    layers = old.num_hidden_layers
    if not memory_layers or not all(0 <= i < layers for i in memory_layers):
        raise ValueError(f"`memory_layers` must be indices below {layers}, at least one, got {memory_layers}.")
    shared = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
        "hidden_act max_position_embeddings initializer_range rms_norm_eps pad_token_id bos_token_id eos_token_id "
        "tie_word_embeddings rope_parameters attention_bias"
    )
    values = {name: getattr(old, name) for name in shared.split() if hasattr(old, name)}
    values["layer_types"] = ["miras_memory" if i in memory_layers else "sliding_attention" for i in range(layers)]
    if "sliding_attention" in values["layer_types"]:
        window = sliding_window or getattr(old, "sliding_window", None) or old.max_position_embeddings
        values["sliding_window"] = window
    else:  # every memory has keys and values of its own
        values.pop("num_key_value_heads", None)
    config = AutoConfig.for_model(model_type, **values)
    model = AutoModelForCausalLM.from_config(config, dtype=llama.dtype)
    new = dict(model.named_parameters())
    missing = []
    for name, weight in llama.named_parameters():
        index = int(name.split(".")[2]) if name.startswith("model.layers.") else None
        target = name.replace("self_attn", "mixer") if index in memory_layers else name
        if index in memory_layers and (".k_proj." in name or ".v_proj." in name):
            # heads that shared keys and values get a copy each
            groups = config.num_attention_heads * config.head_dim // weight.shape[0]
            weight = weight.unflatten(0, (-1, config.head_dim)).repeat_interleave(groups, 0).flatten(0, 1)
        if target not in new or new[target].shape != weight.shape:
            missing.append(name)
            continue
        with torch.no_grad():
            new.pop(target).copy_(weight)
    if missing:
        raise ValueError(f"`llama` has parameters without a place in a Miras model: {', '.join(missing[:6])}.")
    return model, list(new)


def rows(texts: list[str], tokenizer, block_size: int) -> Dataset:
    """Texts one after the other, each closed by eos, cut into rows of `block_size` ids."""
    encoded = tokenizer(texts, split_special_tokens=True, verbose=False)["input_ids"]
    ids = list(chain.from_iterable([*row, tokenizer.eos_token_id] for row in encoded))
    return Dataset.from_dict(
        {"input_ids": [ids[i : i + block_size] for i in range(0, len(ids) - block_size, block_size)]}
    )


def small_llama(texts: list[str], folder: str) -> str:
    """A small Llama to convert, trained for seconds."""
    tokenizer = miras_hf.MirasTokenizer.train_from_iterator(texts, vocab_size=512)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=math.sqrt(0.4 / 64),
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config)
    args = TrainingArguments(
        folder,
        max_steps=60,
        per_device_train_batch_size=16,
        learning_rate=8e-3,
        warmup_steps=10,
        save_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(model, args, collator, rows(texts, tokenizer, 64).shuffle(seed=0), processing_class=tokenizer)
    trainer.train()
    trainer.save_model(folder)
    return folder


def main(argv: list[str] | None = None) -> dict[str, float]:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser((Arguments, RecoveryArguments))
    if "--smoke" in argv:
        parser.set_defaults(**SMOKE)
    args, training = parser.parse_args_into_dataclasses(argv)
    if args.source is None and not args.smoke:
        raise ValueError("--source is needed, a Llama-like model; or --smoke, which makes one.")
    set_seed(training.seed)

    stdlib = [str(path) for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))]
    files = (
        sorted(chain.from_iterable(glob(p, recursive=True) for p in args.train_files)) if args.train_files else stdlib
    )
    files = files[: 60 if args.smoke else None]
    texts = [Path(file).read_text(encoding="utf-8", errors="replace") for file in files]
    source = args.source or small_llama(texts[1:], str(Path(training.output_dir) / "llama"))
    tokenizer = AutoTokenizer.from_pretrained(source)
    llama = AutoModelForCausalLM.from_pretrained(source)
    # whole files are held out, every tenth
    held_out = rows(texts[::10], tokenizer, args.block_size)
    held_out = held_out.select(range(min(len(held_out), 32 if args.smoke else 128)))
    train = rows([text for i, text in enumerate(texts) if i % 10], tokenizer, args.block_size).shuffle(seed=0)

    chosen = args.memory_layers or list(range(1, llama.config.num_hidden_layers, 4))
    model, new = convert(llama, chosen, args.model_type, args.sliding_window)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    fresh = sum(sizes[name] for name in new)
    print(f"{type(llama).__name__} to {type(model).__name__}, layers {chosen} are memories now")
    print(f"copied: {sum(sizes.values()) - fresh:,} parameters; new: {fresh:,}, in these modules:")
    print("  " + ", ".join(sorted({name.split("mixer.")[1].split(".")[0] for name in new})))

    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    measure = Trainer(llama, training, collator, eval_dataset=held_out, processing_class=tokenizer)
    losses = {"source": measure.evaluate()["eval_loss"]}
    trainer = Trainer(model, training, collator, train, held_out, processing_class=tokenizer)
    losses["converted"] = trainer.evaluate()["eval_loss"]
    if training.max_steps > 0:
        # the mixers as a whole: what was copied into them served another layer
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("mixer." in name)
        trainer.train()
        losses["trained"] = trainer.evaluate()["eval_loss"]
        model.requires_grad_(True)
    model.config.use_cache = True
    trainer.save_model()
    if training.push_to_hub:
        trainer.push_to_hub()
    print(
        "\nLoss on held-out text, nats per token: " + ", ".join(f"{loss:.3f} {name}" for name, loss in losses.items())
    )
    print(f"Saved in {training.output_dir}.")
    return losses


if __name__ == "__main__":
    main()
