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
"""A start for converted memories that needs no gradient: their output projections, by least squares.

A memory that inherits its attention's projections returns as much as that does, and something else: worse than nothing. What
it reads is not wrong, how it is read out is. That is linear, so the best readout of some text is the solution of a linear
system, and costs a forward pass of every memory.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .distillation import Alignment, instead_of, sequences_of
from .modeling_miras import MirasForCausalLM


@torch.no_grad()
def fit_outputs(
    student: MirasForCausalLM,
    teacher: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    prior_tokens: float | None = None,
    sink_tokens: int = 4,
) -> dict[int, float]:
    """
    Gives every memory of a hybrid the output projection with which it is nearest to the attention that it replaces.

    With what the projection reads (x, of all heads together) and what attention returned (y, without the projection's bias),
    of the tokens t of the batches, it becomes

    ```
    argmin_W  sum_t |W x_t - y_t|^2 + prior_tokens * mean(x^2) * |W - a W_0|^2
    ```

    where W_0 is what it was, and a the number by which W_0 alone is nearest, the fallback of few tokens. Nothing else
    changes. It is a start for stage 1.

    Args:
        student (`MirasForCausalLM`): A hybrid that [`~miras_hf.convert`] made of the teacher.
        teacher (`PreTrainedModel`): The model that was converted.
        batches: Inputs of [`~miras_hf.distillation.Alignment`], some thousand tokens, pads and packs included; labels are
            not used.
        prior_tokens (`float`, *optional*): How many tokens of text weigh as much as what the projection was, by default as
            many as the projection has inputs.
        sink_tokens (`int`, *optional*, defaults to 4): As in [`~miras_hf.distillation.Alignment`].

    Returns:
        For every memory layer the error that is left on these very tokens, `sqrt(sum_t |W x_t - y_t|^2 / sum_t |y_t|^2)`.

    Raises:
        `ValueError`: for models that are not a hybrid with memories and its teacher, numbers out of range, and without
            tokens that count.

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from miras_hf import convert

    >>> teacher = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=4, num_attention_heads=4))
    >>> student = convert(teacher, layers=[1, 3])
    >>> errors = fit_outputs(student, teacher, [{"input_ids": ids} for ids in segments])
    ```"""
    if prior_tokens is not None and not (0 < prior_tokens < math.inf):
        raise ValueError(f"`prior_tokens` must be positive and finite, got {prior_tokens!r}.")
    alignment = Alignment(student, teacher, sink_tokens)
    sums: dict[str, list[Tensor]] = {}
    modes = student.training, teacher.training
    student.eval()
    teacher.eval()
    tokens = 0
    try:
        for batch in batches:
            inputs = {name: value.to(teacher.device) for name, value in batch.items() if name != "labels"}
            sequences, position = sequences_of(
                inputs["input_ids"], inputs.get("attention_mask"), inputs.get("position_ids")
            )
            counts = position >= sink_tokens
            tokens += int(counts.sum())
            seen = alignment.attention(inputs["input_ids"], inputs.get("attention_mask"), sequences, position)
            for name, (hidden_states, positions, expected) in seen.items():
                mixer = alignment.mixers[name]
                # in the order of the tokens, which the projection itself may see in another
                with instead_of(mixer.o_proj, lambda x, _: x):
                    read, _ = mixer(hidden_states, position_embeddings=positions, sequences=sequences)
                bias = mixer.o_proj.bias
                x = read[counts].float()
                y = (expected if bias is None else expected - bias)[counts].float()
                # of one batch in its own precision, of all of them in one that loses nothing
                products = [product.double() for product in (x.T @ x, x.T @ y, y.square().sum())]
                sums[name] = [a + b for a, b in zip(sums[name], products, strict=True)] if name in sums else products
    finally:
        student.train(modes[0])
        teacher.train(modes[1])
    if not tokens:
        raise ValueError("`batches` must hold at least one text longer than `sink_tokens`, got none.")
    errors = {}
    for name, (xx, xy, yy) in sums.items():
        weight = alignment.mixers[name].o_proj.weight
        before = weight.double()
        scale = (xy.T * before).sum() / ((before @ xx) * before).sum()
        prior = (len(xx) if prior_tokens is None else prior_tokens) * xx.diagonal().mean() / tokens
        fitted = torch.linalg.solve(
            xx + prior * torch.eye(len(xx), dtype=xx.dtype, device=xx.device), xy + prior * scale * before.T
        ).T
        weight.copy_(fitted)
        left = ((fitted @ xx) * fitted).sum() - 2 * (fitted * xy.T).sum() + yy
        errors[int(name)] = float((left.clamp(min=0) / yy).sqrt())
    return errors


__all__ = ["fit_outputs"]
