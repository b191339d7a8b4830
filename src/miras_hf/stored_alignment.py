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
"""Stage 1 without the teacher: what its attention layers read and return, stored once, trains memories one by one.

Layers of stage 1 do not depend on each other, so each has a file of its own, which `datasets` maps into memory: another
machine, or another kind of memory, trains on the same one. It holds texts without pads, one in each row.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from .configuration_miras import MEMORY_LAYER
from .distillation import Alignment, ErrorsTrainer, errors_of, norms, sequences_of, sums_of_rows
from .modeling_miras import MirasForCausalLM
from .sequences import padded_sequences


COLUMNS = ("hidden_states", "attention_output")
_DTYPES = ("float32", "float16")


@torch.no_grad()
def store_activations(
    student: MirasForCausalLM,
    teacher: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    folder: str | os.PathLike,
    dtype: str = "float16",
) -> dict[int, Path]:
    """
    Writes what the attention layers read and return that memories replace, a file of `datasets` for each.

    Args:
        student (`MirasForCausalLM`): A hybrid that [`~miras_hf.convert`] made of the teacher; it only names the layers.
        teacher (`PreTrainedModel`): The model that was converted.
        batches: Inputs of [`Alignment`], pads and packs included; labels are not used.
        folder (`str` or `os.PathLike`): Where the files go, `layer_0.arrow` and so on. A token takes two vectors of
            `hidden_size` numbers.
        dtype (`str`, *optional*, defaults to `"float16"`): Of the numbers there, or `"float32"`.

    Returns:
        The files, by their layers; each is one for `datasets.Dataset.from_file`.

    Raises:
        `ValueError`: for models that are not a hybrid with memories and its teacher, without batches, and for numbers
            that `dtype` cannot hold.
    """
    from datasets import Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    if dtype not in _DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(_DTYPES)}, got {dtype!r}.")
    alignment, was_training = Alignment(student, teacher), teacher.training
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = {int(i): folder / f"layer_{i}.arrow" for i in alignment.mixers}
    # complete, or not under their names
    unfinished = {i: path.with_suffix(".unfinished") for i, path in files.items()}
    features = Features({name: List(Value(dtype)) for name in COLUMNS})
    writers = {i: ArrowWriter(features=features, path=str(path)) for i, path in unfinished.items()}
    teacher.eval()
    texts = 0
    try:
        for batch in batches:
            inputs = {name: value.to(teacher.device) for name, value in batch.items() if name != "labels"}
            sequences, position = sequences_of(
                inputs["input_ids"], inputs.get("attention_mask"), inputs.get("position_ids")
            )
            seen = alignment.attention(inputs["input_ids"], inputs.get("attention_mask"), sequences, position)
            # a text begins at its first token, and ends where the next begins; pads have no place
            real = position.flatten() >= 0
            lengths = _lengths(position.flatten()[real])
            texts += len(lengths)
            for i, (hidden_states, _, expected) in seen.items():
                of_texts = [
                    x.flatten(0, 1)[real].to(getattr(torch, dtype)).cpu().split(lengths)
                    for x in (hidden_states, expected)
                ]
                for row in zip(*of_texts, strict=True):
                    if not all(bool(x.isfinite().all()) for x in row):
                        raise ValueError(f"`dtype` must hold what layer {i} reads and returns, {dtype} cannot.")
                    writers[int(i)].write({n: x.flatten().numpy() for n, x in zip(COLUMNS, row, strict=True)})
        if not texts:
            raise ValueError("`batches` must hold at least one text, got none.")
        for i, writer in writers.items():
            writer.finalize()
            os.replace(unfinished[i], files[i])
    finally:
        teacher.train(was_training)
        for path in unfinished.values():
            path.unlink(missing_ok=True)
    return files


def _lengths(position: Tensor) -> list[int]:
    starts = (position == 0).nonzero().flatten().tolist()
    return [end - start for start, end in zip(starts, [*starts[1:], len(position)], strict=True)]


class StoredAlignment(nn.Module):
    """
    One memory of a hybrid, as a model whose loss is how far it is from what its teacher's attention layer returned.

    Args:
        student (`MirasForCausalLM`): The hybrid.
        layer (`int`): Index of one of its memory layers.
        sink_tokens (`int`, *optional*, defaults to 4): As in [`Alignment`].

    Raises:
        `ValueError`: for a layer that is no memory.
    """

    def __init__(self, student: MirasForCausalLM, layer: int, sink_tokens: int = 4):
        super().__init__()
        memories = [i for i, kind in enumerate(student.config.layer_types) if kind == MEMORY_LAYER]
        if type(layer) is not int or layer not in memories:
            raise ValueError(f"`layer` must be a memory layer, one of {memories}, got {layer!r}.")
        if type(sink_tokens) is not int or sink_tokens < 0:
            raise ValueError(f"`sink_tokens` must be an integer of at least 0, got {sink_tokens!r}.")
        self.mixers = nn.ModuleDict({str(layer): student.model.layers[layer].mixer})
        self.sink_tokens = sink_tokens
        self._student = (student,)  # no module of this one: its other layers do not learn

    @property
    def student(self) -> MirasForCausalLM:
        return self._student[0]

    def forward(
        self, hidden_states: Tensor, attention_output: Tensor, lengths: Tensor, return_loss: bool = True
    ) -> dict[str, Tensor]:
        """
        Args:
            hidden_states, attention_output (`torch.Tensor` of shape `[texts, tokens, hidden_size]`): what the attention
                layer read and returned, each row's text first, whatever behind it.
            lengths (`torch.Tensor` of shape `[texts]`): tokens of each text.
            return_loss (`bool`): what `Trainer` looks for before it evaluates without labels.

        Returns:
            As [`Alignment`].
        """
        (mixer,) = self.mixers.values()
        position = torch.arange(hidden_states.shape[1], device=hidden_states.device)[None]
        real = position < lengths[:, None]
        counts = real & (position >= self.sink_tokens)
        if not counts.any():
            raise ValueError(
                f"`lengths` must hold one of more than `sink_tokens` ({self.sink_tokens}), got {lengths.tolist()}."
            )
        hidden_states = hidden_states.to(mixer.q_proj.weight.dtype)
        positions = self.student.model.rotary_emb.to(hidden_states.device)(hidden_states, position)
        sequences = padded_sequences(real.long(), *real.shape, 0)
        output, _ = mixer(hidden_states, position_embeddings=positions, sequences=sequences)
        return errors_of(sums_of_rows(output, attention_output, counts)[..., None])

    @torch.no_grad()
    def teacher_sizes(
        self, hidden_states: Tensor, attention_output: Tensor, lengths: Tensor, return_loss: bool = True
    ) -> Tensor:
        """`sizes` of [`~StoredAlignment.forward`]."""
        position = torch.arange(attention_output.shape[1], device=attention_output.device)
        counts = (position < lengths[:, None]) & (position >= self.sink_tokens)
        return norms(attention_output, counts).sum()[None]


class StoredAlignmentTrainer(ErrorsTrainer):
    """
    Stage 1 of one layer, from what [`store_activations`] wrote: an [`~miras_hf.distillation.AlignmentTrainer`] that needs no
    teacher.

    Args:
        student, layer, sink_tokens: As in [`StoredAlignment`].
        train_dataset (`datasets.Dataset`): `Dataset.from_file` of that layer's file.
        args, and the others: as in `Trainer`.
    """

    def __init__(self, student: MirasForCausalLM, layer: int, sink_tokens: int = 4, **kwargs):
        width = student.config.hidden_size
        kwargs.setdefault("data_collator", lambda rows: collate_activations(rows, width))
        super().__init__(StoredAlignment(student, layer, sink_tokens), **kwargs)


def collate_activations(rows: Sequence[Mapping[str, Any]], hidden_size: int) -> dict[str, Tensor]:
    """Rows of a stored file as arguments of [`StoredAlignment`], zeros behind the texts."""
    texts = {name: [torch.as_tensor(row[name]).view(-1, hidden_size).float() for row in rows] for name in COLUMNS}
    lengths = torch.tensor([len(text) for text in texts[COLUMNS[0]]])
    return {name: pad_sequence(x, batch_first=True) for name, x in texts.items()} | {"lengths": lengths}


__all__ = ["StoredAlignment", "StoredAlignmentTrainer", "collate_activations", "store_activations"]
