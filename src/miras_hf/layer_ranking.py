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
"""Which layers of a Transformer should stay attention: what each of them, restored in a hybrid, brings back.

An alignment error says how well a memory imitates its layer, and not how much the model needs what is missing. So each
memory in turn gives its place back to the teacher's attention, and the divergence from the teacher says what that is worth.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .configuration_miras import MEMORY_LAYER
from .convert import attention_window
from .distillation import check_batch, check_pair, chunked_divergence, counted_tokens, sequences_of
from .modeling_miras import MirasForCausalLM
from .sequences import Sequences


class RestoredAttention(nn.Module):
    """A teacher's attention in the place of a memory, for calls without a cache.

    Args:
        attention (`nn.Module`): the teacher's layer.
        rotary (`nn.Module`): the teacher's rotary embedding.
    """

    def __init__(self, attention: nn.Module, rotary: nn.Module):
        super().__init__()
        self._attention = (attention, rotary)  # the teacher's, and no modules of the student

    def forward(self, hidden_states: Tensor, sequences: Sequences | None = None, **kwargs: Any) -> tuple[Tensor, None]:
        attention, rotary = self._attention
        batch, tokens, _ = hidden_states.shape
        place = torch.arange(tokens, device=hidden_states.device)
        visible = (place[:, None] >= place).expand(batch, -1, -1)
        position = place.expand(batch, -1)
        if sequences is not None and sequences.cu_seqlens is not None:
            position = sequences.position.view(batch, tokens)
            # a text of a pack begins where positions do
            number = (position == 0).long().cumsum(-1)
            visible = visible & (number[:, :, None] == number[:, None])
        elif sequences is not None and sequences.mask is not None:
            position = (sequences.mask.long().cumsum(-1) - 1).clamp(min=0)
            visible = visible & sequences.mask[:, None]
        window = attention_window(attention.config, attention.layer_idx)
        if window is not None:
            visible = visible & (place[:, None] - place < window)
        visible = visible | torch.eye(tokens, dtype=torch.bool, device=visible.device)  # a pad sees itself
        mask = hidden_states.new_zeros(visible.shape).masked_fill(~visible, torch.finfo(hidden_states.dtype).min)
        output = attention(
            hidden_states, position_embeddings=rotary(hidden_states, position), attention_mask=mask[:, None]
        )
        return output[0], None


@torch.no_grad()
def restored_divergences(
    student: MirasForCausalLM,
    teacher: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    chunk_tokens: int = 256,
) -> dict[int | None, float]:
    """
    How far a hybrid's next token is from its teacher's, in nats a token, as it is and with one layer's attention restored.

    Args:
        student (`MirasForCausalLM`): A hybrid that [`~miras_hf.convert`] made of the teacher, aligned.
        teacher (`PreTrainedModel`): The model that was converted, with eager or SDPA attention.
        batches: Inputs of the student, texts, padded or packed; labels, if there, say which tokens count.
        chunk_tokens (`int`, *optional*, defaults to 256): Tokens whose logits stand in memory at once.

    Returns:
        The divergence of the student under `None`, and of the student with the attention of a layer under its index, the
        layer first that brings back the most.

    Raises:
        `ValueError`: for models that are not a hybrid with memories and its teacher, for another attention, and without
            batches.
    """
    check_pair(student, teacher)
    implementation = teacher.config._attn_implementation
    if implementation not in ("eager", "sdpa"):
        raise ValueError(f"`teacher` must have eager or SDPA attention, which take masks, got {implementation!r}.")
    layers: list[int | None] = [i for i, kind in enumerate(student.config.layer_types) if kind == MEMORY_LAYER]
    totals, tokens = dict.fromkeys([None, *layers], 0.0), 0
    modes = student.training, teacher.training
    student.eval()
    teacher.eval()
    try:
        for batch in batches:
            check_batch(batch)
            inputs = {name: value.to(teacher.device) for name, value in batch.items()}
            labels, ids = inputs.pop("labels", None), inputs["input_ids"]
            sequences, position = sequences_of(ids, inputs.pop("attention_mask", None), inputs.get("position_ids"))
            inputs |= {"position_ids": position.clamp(min=0), "use_cache": False}
            if sequences.mask is not None:
                inputs["attention_mask"] = sequences.mask.long()
            counts = counted_tokens(labels, position)
            expected = teacher.model(**inputs)[0][counts]
            tokens += len(expected)
            for layer in totals:
                found = _with_attention(student, teacher, layer, inputs)[counts]
                heads = (student.lm_head, teacher.lm_head, chunk_tokens)
                totals[layer] += float(chunked_divergence(found, expected, *heads))
    finally:
        student.train(modes[0])
        teacher.train(modes[1])
    if not tokens:
        raise ValueError("`batches` must hold at least one token that counts, got none.")
    means = {layer: total / tokens for layer, total in totals.items()}
    return {None: means.pop(None), **dict(sorted(means.items(), key=lambda pair: pair[1]))}


def _with_attention(
    student: MirasForCausalLM, teacher: PreTrainedModel, layer: int | None, inputs: dict[str, Any]
) -> Tensor:
    """Last hidden states of the student, one of its memories replaced for the call."""
    if layer is None:
        return student.model(**inputs)[0]
    block = student.model.layers[layer]
    mixer = block.mixer
    block.mixer = RestoredAttention(teacher.model.layers[layer].self_attn, teacher.model.rotary_emb)
    try:
        return student.model(**inputs)[0]
    finally:
        block.mixer = mixer


__all__ = ["RestoredAttention", "restored_divergences"]
