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
"""Models and data that one process and two processes are compared on, see `test_distributed.py`."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

import miras_hf
from miras_hf.distillation import AlignmentTrainer, DistillationTrainer


SIZES = dict(
    vocab_size=99,  # odd, so that shards differ in size
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    chunk_size=4,
    initializer_range=0.1,  # with the usual 0.02 a tiny model is so close to constant that errors drown in tolerances
)
# of memories and gates, where they are no matrices and one number a head
INNER = dict(memory_expansion=2, gate_rank=4)
HYBRID = dict(layer_types=["miras_memory", "sliding_attention"], sliding_window=6)

# every kind of gate, memory and layer is in one of them
CONFIGS = {
    "moneta": miras_hf.MonetaConfig(**SIZES, **INNER),
    "yaad": miras_hf.YaadConfig(**SIZES, **INNER),
    "memora": miras_hf.MemoraConfig(**SIZES, **INNER),
    "hybrid": miras_hf.YaadConfig(
        **{**SIZES, **INNER, "vocab_size": 98},
        **HYBRID,
        num_key_value_heads=2,
        memory_num_key_value_heads=2,
        qk_norm=True,
        attention_bias=True,
        attention_output_bias=False,
        mlp_bias=True,
        tie_word_embeddings=True,
    ),
    "matrix": miras_hf.MirasConfig(
        **SIZES,
        memory_architecture="matrix",
        gate_granularity="head",
        attentional_bias="huber_norm",
        layer_types=["miras_memory", "full_attention"],
    ),
    "erasing": miras_hf.MirasConfig.from_preset(
        "gated-deltanet", **SIZES, erase_key="own", writes_per_token=2, memory_num_key_value_heads=2
    ),
    "mamba2": miras_hf.MirasConfig.from_preset("mamba2", **SIZES, output_norm_groups=2, memory_num_query_key_heads=2),
}
# of sizes that kernels know
BY_KERNEL = {
    "by-kernel": miras_hf.YaadConfig(
        **{**SIZES, **INNER, "num_hidden_layers": 1, "num_attention_heads": 1, "chunk_size": 16}
    )
}
INDIVISIBLE = {
    "three-heads": miras_hf.MonetaConfig(**{**SIZES, **INNER, "num_attention_heads": 3, "head_dim": 16}),
    "one-key-value-head": miras_hf.MonetaConfig(**SIZES, **INNER, **HYBRID, num_key_value_heads=1),
    "one-key-value-head-of-memories": miras_hf.MonetaConfig(**SIZES, **INNER, memory_num_key_value_heads=1),
    "one-norm-of-all-heads": miras_hf.MirasConfig.from_preset("mamba2", **SIZES, memory_num_query_key_heads=2),
    "one-query-key-head": miras_hf.MirasConfig.from_preset("mamba2", **SIZES, output_norm_groups=2),
    "tied-odd-vocabulary": miras_hf.MonetaConfig(**SIZES, **INNER, tie_word_embeddings=True),
}

TRAINER_ARGUMENTS = dict(
    use_cpu=True,
    max_steps=3,
    learning_rate=1e-2,
    adam_epsilon=1e-4,
    lr_scheduler_type="constant",
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    seed=0,
)


# what is learned is compared by how far weights move
PLAIN_STEPS = TRAINER_ARGUMENTS | dict(max_grad_norm=0.0, optim="sgd")
# with a state that checkpoints hold, and steps that are almost proportional to gradients
ALMOST_PLAIN_STEPS = TRAINER_ARGUMENTS | dict(max_grad_norm=0.0, adam_epsilon=0.1)


def token_ids(rows: int, tokens: int) -> torch.Tensor:
    # zero is the pad token, which `generate()` masks
    return torch.randint(1, 98, (rows, tokens), generator=torch.Generator().manual_seed(1))


def padded_examples() -> list[dict]:
    """Rows with as many labels as their number: ranks count different numbers of tokens."""
    examples = []
    for row, ids in enumerate(token_ids(16, 18)):
        real = torch.arange(18) < 3 + row
        examples.append(
            {
                "input_ids": ids.where(real, 0),
                "attention_mask": real.long(),
                "labels": ids.where(real, -100),
            }
        )
    return examples


def conversion_pair(tied: bool = False):
    """A hybrid of one memory layer and one of attention, and the Llama that it was made of."""
    set_seed(0)
    sizes = {name: SIZES[name] for name in SIZES if name != "chunk_size"}
    teacher = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=4, tie_word_embeddings=tied))
    return miras_hf.convert(teacher, layers=[0], memory={"chunk_size": 4}), teacher


def of_stage(stage: int):
    """The trainer of a stage of conversion, and its own arguments."""
    if stage == 1:
        return AlignmentTrainer, {"sink_tokens": 1}
    return DistillationTrainer, {"body_learning_rate": 1e-2}


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    # with the usual epsilon, gradients that are nothing but rounding would move weights as far as others do
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
