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
"""Write the cards of the paper's sizes, from the presets and `paper_size.md.jinja`.

python model_cards/make_cards.py            # after a change of presets, defaults or the template
python model_cards/make_cards.py --check    # only say which cards are out of date
"""

import argparse
import sys
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData

import miras_hf
from miras_hf.model_card import four_choices


HERE = Path(__file__).resolve().parent
FAMILIES = {
    "moneta": (miras_hf.MonetaConfig, miras_hf.MonetaForCausalLM),
    "yaad": (miras_hf.YaadConfig, miras_hf.YaadForCausalLM),
    "memora": (miras_hf.MemoraConfig, miras_hf.MemoraForCausalLM),
}
TABLE_5 = "table 5 of arXiv 2504.13173"
# name in the paper, source of the shape, learning rate and its source, billions of tokens
SIZES = {
    "170m": ("170M", TABLE_5, "3e-3", TABLE_5, None),
    "340m": ("340M", TABLE_5, "1.5e-3", TABLE_5, 15),
    "760m": ("760M", TABLE_5, "1.25e-3", TABLE_5, 30),
    "1.3b": ("1.3B", "ours: the paper does not give it", "7e-4", "of a later paper of the group", 100),
}
# table 2
REPORTED = {
    ("moneta", "340m"): (26.19, 29.31, 46.45),
    ("yaad", "340m"): (26.61, 29.11, 45.94),
    ("memora", "340m"): (27.16, 30.44, 45.51),
    ("moneta", "760m"): (21.18, 21.94, 52.13),
    ("yaad", "760m"): (20.99, 21.57, 52.42),
    ("memora", "760m"): (22.28, 22.31, 51.53),
    ("moneta", "1.3b"): (15.52, 11.47, 56.53),
    ("yaad", "1.3b"): (15.18, 11.89, 56.29),
    ("memora", "1.3b"): (15.90, 12.04, 55.77),
}
TOKENS_A_STEP = 8 * 4 * 4 * 4096


def training_command(config: miras_hf.MirasConfig, learning_rate: str, tokens: float, name: str) -> str:
    lines = [
        "torchrun --nproc-per-node 8 examples/pretrain.py --bf16",
        f"--model_type {config.model_type} --hidden_size {config.hidden_size} "
        f"--num_hidden_layers {config.num_hidden_layers} --num_attention_heads {config.num_attention_heads}",
        f"--intermediate_size {config.intermediate_size} --vocab_size {config.vocab_size} --no_tie_word_embeddings "
        f"--initializer_range {config.initializer_range}",
        "--dataset_name HuggingFaceFW/fineweb-edu --dataset_config_name sample-100BT --streaming --block_size 4096",
        "--per_device_train_batch_size 4 --gradient_accumulation_steps 4",
        f"--learning_rate {learning_rate} --max_steps {round(tokens * 1e9 / TOKENS_A_STEP)} --output_dir runs/{name}",
    ]
    return " \\\n    ".join(lines)


def make_card(family: str, preset: str) -> ModelCard:
    """The card of one model at one size."""
    config_class, model_class = FAMILIES[family]
    config = config_class.from_preset(preset)
    with torch.device("meta"):
        model = model_class(config)
    size, source, learning_rate, rate_source, tokens = SIZES[preset]
    name = f"{family}-{preset}"
    return ModelCard.from_template(
        ModelCardData(
            library_name="transformers",
            pipeline_tag="text-generation",
            tags=["miras-hf", family, "arxiv:2504.13173", "no-weights"],
        ),
        template_path=str(HERE / "paper_size.md.jinja"),
        name=name,
        family=config_class.__name__.removesuffix("Config"),
        preset=preset,
        size=size,
        config=config,
        choices=four_choices(config),
        parameters=model.num_parameters(),
        memory_bytes=4 * sum(p.numel() for key, p in model.named_parameters() if ".memory.initial_state." in key),
        kv_bytes=2 * 2 * config.num_hidden_layers * config.hidden_size,
        source=source,
        learning_rate=learning_rate,
        rate_source=rate_source,
        tokens=tokens,
        tokens_note=f"this size sees {tokens} billion tokens"
        if tokens
        else "the paper gives no number of tokens for this size, 15 billion stand in",
        command=training_command(config, learning_rate, tokens or 15, name),
        reported=REPORTED.get((family, preset)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 if a card is out of date")
    check = parser.parse_args().check
    changed = []
    for family in FAMILIES:
        for preset in SIZES:
            path, text = HERE / f"{family}-{preset}.md", str(make_card(family, preset)) + "\n"
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                changed.append(path.name)
                if not check:
                    path.write_text(text, encoding="utf-8")
    print("\n".join(changed) or "All cards are up to date.")
    sys.exit(1 if check and changed else 0)


if __name__ == "__main__":
    main()
