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
"""Which tokens of a batch make a sequence: padding masks and packs, found once per forward for all memory layers."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils.import_utils import is_tracing


@dataclass
class Sequences:
    """How the tokens of a call fall into sequences; made by `padded_sequences` or `packed_sequences`.

    A memory reads a sequence's real tokens only, one after the other. `gather` brings the rows of a call into that
    form (real tokens first, pads behind them, or one packed row), `scatter` undoes it.

    Args:
        mask (`torch.Tensor` of shape `[batch, tokens]`, bool, *optional*): true at real tokens, before `gather`.
        cu_seqlens (`torch.Tensor` of shape `[sequences + 1]`, *optional*): borders of a pack, after `gather`.
    """

    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None

    def __post_init__(self):
        self.order = self.lengths = self.live = self.position = None
        if self.mask is not None:
            self.lengths = self.mask.sum(-1)
            self.order = torch.argsort(~self.mask, dim=-1, stable=True)
            self.live = torch.arange(self.mask.shape[1], device=self.mask.device) < self.lengths[:, None]
        if self.cu_seqlens is not None:
            total = self.cu_seqlens[-1]
            tokens = torch.arange(total, device=self.cu_seqlens.device)
            starts = self.cu_seqlens[torch.searchsorted(self.cu_seqlens, tokens, right=True) - 1]
            self.position = (tokens - starts)[None]

    def gather(self, x: Tensor) -> Tensor:
        """`[batch, tokens, features]` in the order in which memories read."""
        if self.cu_seqlens is not None:
            return x.reshape(1, -1, x.shape[-1])
        if self.mask is None:
            return x
        return x.gather(1, self.order[..., None].expand_as(x))

    def scatter(self, x: Tensor, batch: int) -> Tensor:
        """The inverse of `gather`, zeros at pads."""
        if self.cu_seqlens is not None:
            return x.reshape(batch, -1, x.shape[-1])
        if self.mask is None:
            return x
        rank = (self.mask.long().cumsum(-1) - 1).clamp(min=0)
        return torch.where(self.mask[..., None], x.gather(1, rank[..., None].expand_as(x)), 0.0)


def padded_sequences(attention_mask: Tensor | None, batch: int, tokens: int, past: int) -> Sequences:
    """Sequences of a padded batch.

    Args:
        attention_mask (`torch.Tensor` of shape `[batch, tokens]` or `[batch, past + tokens]`, *optional*):
            1 at real tokens and 0 at pads, anywhere in the row.

    Raises:
        `ValueError`: for a mask of another shape or with other values.
    """
    if attention_mask is None:
        return Sequences()
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        got = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ValueError(f"`attention_mask` must be a tensor of shape [batch, tokens] for memory layers, got {got}.")
    if attention_mask.shape[0] != batch or attention_mask.shape[1] not in (tokens, past + tokens):
        raise ValueError(
            f"`attention_mask` must have shape {(batch, tokens)}"
            + (f" or {(batch, past + tokens)}" if past else "")
            + f", got {tuple(attention_mask.shape)}."
        )
    attention_mask = attention_mask[:, -tokens:] if tokens else attention_mask[:, :0]
    mask = attention_mask.bool()
    if not is_tracing(attention_mask):
        if bool((attention_mask != mask.to(attention_mask.dtype)).any()):
            values = sorted(set(attention_mask.flatten().tolist()))[:5]
            raise ValueError(f"`attention_mask` must hold 0 and 1 only, got values {values}.")
        if bool(mask.all()):
            return Sequences()
    return Sequences(mask=mask)


def check_text_read(attention_mask: Tensor, tokens: int, read: Tensor | int) -> None:
    """Raises a `ValueError` if the mask calls pads what a memory has read.

    Args:
        attention_mask (`torch.Tensor` of shape `[batch, past + tokens]`): 1 at real tokens, 0 at pads.
        tokens (`int`): length of what is read now; one token was generated, and is not looked at.
        read (`torch.Tensor` of shape `[batch]`): tokens that the memories of every row have read; 0 for none.
    """
    if tokens < 2 or not isinstance(read, Tensor) or is_tracing(attention_mask):
        return
    real = attention_mask[:, :-tokens].sum(-1)
    if bool((real < read.to(real.device)).any()):
        raise ValueError(
            f"`attention_mask` has {real.tolist()} real tokens in the text that was read, and the memories have read "
            f"{read.tolist()}. In `generate()`, rows that end before others read pads until all have ended, and a memory "
            "cannot forget them: take a `miras_hf.snapshot` before, `miras_hf.restore` it, and read the answers together "
            "with what comes next, under this mask."
        )


def has_inner_pads(attention_mask: Tensor) -> bool:
    """Whether any row of `[batch, tokens]` has a pad between real tokens."""
    real = attention_mask.bool()
    before = real.long().cumsum(-1) > 0
    after = real.long().flip(-1).cumsum(-1).flip(-1) > 0
    return bool((before & after & ~real).any())


def packed_sequences(
    position_ids: Tensor | None, batch: int, tokens: int, *, cu_seqlens: Tensor | None, seq_idx: Tensor | None
) -> Sequences | None:
    """Sequences of a pack, or `None` if the call holds none.

    Borders come from `cu_seqlens` (`cu_seq_lens_q` of the flattening collators), else from `seq_idx`, else from
    `position_ids` that do not go up by one. A batch of packed rows is read as one row.
    """
    device = None if position_ids is None else position_ids.device
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.long()
        borders = cu_seqlens.tolist()
        if batch != 1 or borders[0] != 0 or borders[-1] != tokens or any(b < a for a, b in zip(borders, borders[1:])):
            raise ValueError(
                f"`cu_seq_lens_q` must rise from 0 to the number of tokens of one packed row, got {borders[:4]} to "
                f"{borders[-1]} for a batch of shape {(batch, tokens)}."
            )
        return Sequences(cu_seqlens=cu_seqlens)
    if seq_idx is not None:
        if seq_idx.shape != (batch, tokens):
            raise ValueError(f"`seq_idx` must have shape {(batch, tokens)}, got {tuple(seq_idx.shape)}.")
        starts, device = seq_idx[:, 1:] != seq_idx[:, :-1], seq_idx.device
    elif position_ids is not None and tokens > 1 and not is_tracing(position_ids):
        starts = (position_ids[:, 1:] != position_ids[:, :-1] + 1).expand(batch, -1)
        if not bool(starts.any()):
            return None
    else:
        return None
    starts = F.pad(starts, (1, 0), value=True).flatten().nonzero().flatten()
    return Sequences(cu_seqlens=torch.cat((starts, torch.tensor([batch * tokens], device=device))))
