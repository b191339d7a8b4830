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

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import logging
from transformers.utils.import_utils import is_tracing


logger = logging.get_logger(__name__)


@dataclass
class Sequences:
    """How the tokens of a call fall into sequences; made by `padded_sequences` or `packed_sequences`.

    A memory reads a sequence's real tokens only, one after the other. `gather` brings the rows of a call into that
    form (real tokens first, `lengths` of them in each row, pads behind them; or one packed row), `scatter` undoes it.

    Args:
        mask (`torch.Tensor` of shape `[batch, tokens]`, bool, *optional*): true at real tokens, before `gather`.
        cu_seqlens (`torch.Tensor` of shape `[sequences + 1]`, *optional*): borders of a pack, after `gather`.
    """

    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None

    def __post_init__(self):
        self.token_order = self.lengths = self.position = None
        if self.mask is not None:
            self.lengths = self.mask.sum(-1, dtype=torch.int32)
            self.token_order = torch.argsort(~self.mask, dim=-1, stable=True)
        if self.cu_seqlens is not None:
            total = self.cu_seqlens[-1]
            tokens = torch.arange(total, device=self.cu_seqlens.device)
            starts = self.cu_seqlens[torch.searchsorted(self.cu_seqlens, tokens, right=True) - 1]
            self.position = (tokens - starts)[None]

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "Sequences":
        """The same on another device: Accelerate brings a layer's arguments to where the layer is."""
        moved = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(moved, name, value.to(device, non_blocking=non_blocking))
        return moved

    def gather(self, x: Tensor) -> Tensor:
        """`[batch, tokens, features]` in the order in which memories read."""
        if self.cu_seqlens is not None:
            return x.reshape(1, -1, x.shape[-1])
        if self.mask is None:
            return x
        return x.gather(1, self.token_order[..., None].expand_as(x))

    def of_writes(self, writes: int) -> dict[str, Tensor | None]:
        """`cu_seqlens` and `lengths` as memories take them, of tokens that write so many times each."""
        return {
            name: value if value is None or writes == 1 else value * writes
            for name, value in (("cu_seqlens", self.cu_seqlens), ("lengths", self.lengths))
        }

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
    other = (attention_mask != mask.to(attention_mask.dtype)).any()
    if is_tracing(attention_mask):
        refuse_in_graph(other, "`attention_mask` must hold 0 and 1 only.")
    else:
        if bool(other):
            values = sorted(set(attention_mask.flatten().tolist()))[:5]
            raise ValueError(f"`attention_mask` must hold 0 and 1 only, got values {values}.")
        if bool(mask.all()):
            return Sequences()
    return Sequences(mask=mask)


def refuse_in_graph(refused: Tensor, message: str) -> None:
    """Leaves an assertion in the graph that `torch.compile` or `torch.export` makes of a call: values cannot be looked at
    while it is made, and a graph that does not look at them says something else in silence. It raises a `RuntimeError`
    when it runs.

    Args:
        refused (`torch.Tensor`, one bool): whether a call is refused.
    """
    if torch.compiler.is_compiling():
        torch._assert_async(~refused, message)


def check_text_read(attention_mask: Tensor, tokens: int, read: Tensor | int) -> None:
    """Raises a `ValueError` if the mask calls pads what a memory has read.

    Args:
        attention_mask (`torch.Tensor` of shape `[batch, past + tokens]`): 1 at real tokens, 0 at pads.
        tokens (`int`): length of what is read now; one token was generated, and is not looked at.
        read (`torch.Tensor` of shape `[batch]`): tokens that the memories of every row have read; 0 for none.
    """
    if tokens < 2 or not isinstance(read, Tensor):
        return
    real = attention_mask[:, :-tokens].sum(-1)
    fewer = (real < read.to(real.device)).any()
    if is_tracing(attention_mask):
        refuse_in_graph(fewer, "`attention_mask` calls pads what memories have read.")
    elif bool(fewer):
        raise ValueError(
            f"`attention_mask` has {real.tolist()} real tokens in the text that was read, and the memories have read "
            f"{read.tolist()}. In `generate()`, rows that end before others read pads until all have ended, and a memory "
            "cannot forget them: take a `miras_hf.snapshot` before, `miras_hf.restore` it, and read the answers together "
            "with what comes next, under this mask."
        )


def check_window(attention_mask: Tensor, window: int) -> None:
    """Raises a `ValueError` if a mask of shape `[batch, past + tokens]` that is longer than a sliding window has a pad between
    real tokens, which the window would count."""
    if attention_mask.shape[-1] <= window:
        return
    real = attention_mask.bool()
    before = real.long().cumsum(-1) > 0
    after = real.long().flip(-1).cumsum(-1).flip(-1) > 0
    inner = (before & after & ~real).any()
    if is_tracing(attention_mask):
        refuse_in_graph(
            inner, "`attention_mask` must not have pads between real tokens once it is longer than the window."
        )
    elif bool(inner):
        raise ValueError(
            f"`attention_mask` must not have pads between real tokens once it is longer than `sliding_window` ({window}), "
            f"got length {attention_mask.shape[-1]}: the window of attention layers counts pads. Pad on the left to "
            "continue a batch."
        )


def packed_sequences(
    position_ids: Tensor | None,
    batch: int,
    tokens: int,
    *,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
    mask: Tensor | None = None,
) -> Sequences | None:
    """Sequences of a pack, or `None` where every row is one sequence.

    There are three ways to say where sequences begin: `cu_seqlens` (`cu_seq_lens_q` of the flattening collators),
    `seq_idx` that changes, and `position_ids` that do not go up by one. All that are given must say the same. A batch of
    packed rows is read as one row.

    Args:
        position_ids (`torch.Tensor` of shape `[1 or batch, tokens]`, *optional*): positions.
        cu_seqlens (`torch.Tensor` of shape `[sequences + 1]`, *optional*): rises from 0 to `tokens` of the only row.
        seq_idx (`torch.Tensor` of shape `[batch, tokens]`, *optional*): number of each token's sequence.
        mask (`torch.Tensor` of shape `[batch, tokens]`, bool, *optional*): false at pads, whose positions mean nothing.

    Raises:
        `ValueError`: for shapes and values that say nothing, for sources that disagree, and for packs with pads.
    """
    if cu_seqlens is None and seq_idx is None and (position_ids is None or tokens < 2):
        return None
    return _packed_by_values(position_ids, batch, tokens, cu_seqlens, seq_idx, mask)


# `torch.compile` breaks its graph here and goes on. Within it, a frame that is given up runs as it is, and what it calls is
# compiled on its own and takes itself for a part of the graph.
@torch.compiler.disable(reason="where the sequences of a pack begin is told by values")
def _packed_by_values(
    position_ids: Tensor | None,
    batch: int,
    tokens: int,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    mask: Tensor | None,
) -> Sequences | None:
    sources = {}
    if cu_seqlens is not None:
        sources["cu_seq_lens_q"] = _starts_of_cu_seqlens(cu_seqlens, batch, tokens)
    if seq_idx is not None:
        if not isinstance(seq_idx, Tensor) or seq_idx.shape != (batch, tokens) or seq_idx.is_floating_point():
            raise ValueError(f"`seq_idx` must be integers of shape {(batch, tokens)}, got {describe(seq_idx)}.")
        sources["seq_idx"] = seq_idx[:, 1:] != seq_idx[:, :-1]
    if position_ids is not None and tokens > 1:
        starts = (position_ids[:, 1:] != position_ids[:, :-1] + 1).expand(batch, -1)
        starts = starts if mask is None else starts & mask[:, 1:] & mask[:, :-1]
        if is_tracing(position_ids):  # for an exported graph, which has no breaks
            refuse_in_graph(starts.any(), "`position_ids` must go up by one: a pack's sequences cannot be exported.")
        else:
            sources["position_ids"] = starts
    if not sources:
        return None
    name, starts = next(iter(sources.items()))
    for other, others in sources.items():
        wrong = (starts.to(others.device) != others).nonzero()
        if len(wrong):
            row, token = wrong[0].tolist()
            raise ValueError(
                f"`{name}` and `{other}` must begin sequences at the same tokens: they disagree at token {token + 1} of "
                f"row {row}, which begins a sequence for `{name if bool(starts[row, token]) else other}` only. "
                "`position_ids` begin one where they do not go up by one."
            )
    if not bool(starts.any()):
        return None
    if mask is not None:
        raise ValueError(
            f"`attention_mask` must not have pads where `{name}` packs several sequences into a row: leave it out, a mask "
            "of ones is the same, or give every sequence a row of its own."
        )
    starts = F.pad(starts, (1, 0), value=True).flatten().nonzero().flatten()
    return Sequences(cu_seqlens=torch.cat((starts, starts.new_tensor([batch * tokens]))))


def _starts_of_cu_seqlens(cu_seqlens: Tensor, batch: int, tokens: int) -> Tensor:
    """Which tokens but the first begin a sequence, `[1, tokens - 1]`."""
    ok = isinstance(cu_seqlens, Tensor) and cu_seqlens.dim() == 1 and len(cu_seqlens) > 1
    if not ok or cu_seqlens.is_floating_point():
        raise ValueError(f"`cu_seq_lens_q` must be integers of shape [sequences + 1], got {describe(cu_seqlens)}.")
    cu_seqlens = cu_seqlens.long()
    borders = cu_seqlens.tolist()
    if batch != 1 or borders[0] != 0 or borders[-1] != tokens or any(b < a for a, b in zip(borders, borders[1:])):
        raise ValueError(
            f"`cu_seq_lens_q` must rise from 0 to the number of tokens of one packed row, got {borders[:4]} to "
            f"{borders[-1]} for a batch of shape {(batch, tokens)}."
        )
    starts = torch.zeros(1, tokens + 1, dtype=torch.bool, device=cu_seqlens.device)
    starts[:, cu_seqlens] = True
    return starts[:, 1:-1]


def check_kernel_arguments(kwargs: Mapping[str, Any], cu_seqlens: Tensor | None) -> None:
    """Checks what flattening collators add to `cu_seq_lens_q` for attention kernels: it must say the same.

    Raises:
        `ValueError`: for `cu_seq_lens_k` of other sequences, and for a `max_length_q` or `max_length_k` that is shorter
            than the longest one.
    """
    given = [name for name in ("cu_seq_lens_k", "max_length_q", "max_length_k") if kwargs.get(name) is not None]
    if given and cu_seqlens is None:
        raise ValueError(
            f"`{given[0]}` goes with `cu_seq_lens_q`, which says where sequences begin and was not given."
        )
    for name in given:
        value = kwargs[name]
        if name == "cu_seq_lens_k":
            if not isinstance(value, Tensor) or value.tolist() != cu_seqlens.tolist():
                raise ValueError("`cu_seq_lens_k` must equal `cu_seq_lens_q`: keys and queries are the same tokens.")
        elif int(value) < (longest := int(cu_seqlens.diff().max())):
            raise ValueError(f"`{name}` must be at least the length of the longest sequence, {longest}, got {value}.")


def mask_of_whole_text(
    attention_mask: Tensor | None, batch: int, tokens: int, past: int, read: Tensor | int, device: torch.device
) -> Tensor | None:
    """The mask with which `generate()` goes on after `past` tokens, for `tokens` input ids.

    Transformers takes as many ids as the mask is long for the whole text, read tokens included. So many ids cannot be
    the whole text if they are not more than were read: they are new, and the mask is completed by what was read.

    Args:
        read (`torch.Tensor` of shape `[rows]`, or `int`): real tokens that every row has read.

    Raises:
        `ValueError`: for a mask of another length, or if what was read has pads, which only the caller knows.
    """
    if attention_mask is not None and attention_mask.shape[1] not in (tokens, past + tokens):
        raise ValueError(
            f"`attention_mask` must cover the whole text, {past} tokens that were read and {tokens} new ones, got shape "
            f"{tuple(attention_mask.shape)}."
        )
    if tokens > past or (attention_mask is not None and attention_mask.shape[1] == past + tokens):
        if attention_mask is None:
            logger.warning_once(
                f"`generate()` got {tokens} input ids after a cache that has read {past} tokens, and takes them for the whole "
                f"text: the first {past} are not read again. If all of them are new, pass an `attention_mask` of "
                f"{past + tokens} columns."
            )
        return attention_mask
    check_no_pads_read(tokens, past, read)
    if attention_mask is None:
        attention_mask = torch.ones(batch, tokens, dtype=torch.long, device=device)
    return F.pad(attention_mask, (past, 0), value=1)


def learned_labels(labels: Tensor | None, attention_mask: Tensor | None, shifted: bool = False) -> Tensor | None:
    """Labels without those that a pad would have to predict, so that a row padded on the left learns what it learns alone.

    Args:
        labels (`torch.Tensor` of shape `[batch, tokens]`, *optional*): ids, -100 where nothing is learned.
        attention_mask (`torch.Tensor` of shape `[batch, tokens]` or `[batch, past + tokens]`, *optional*): zero at pads.
        shifted (`bool`): whether a label stands at the token that predicts it, not at its own.
    """
    if labels is None or attention_mask is None:
        return labels
    pads = attention_mask[:, attention_mask.shape[1] - labels.shape[1] :] == 0
    return labels.masked_fill(pads if shifted else F.pad(pads[:, :-1], (1, 0), value=False), -100)


def mask_of_attention(attention_mask: Tensor, tokens: int, past: int, read: Tensor | int, counted: bool) -> Tensor:
    """The mask under which attention goes on after `past` tokens. Memories know what they have read; attention takes the
    first column of a mask for the first token of the text.

    Args:
        attention_mask (`torch.Tensor` of shape `[batch, tokens]` or `[batch, past + tokens]`): as given.
        read (`torch.Tensor` of shape `[rows]`, or `int`): real tokens that every row has read.
        counted (`bool`): whether a memory has counted them; without any, nobody has.

    Raises:
        `ValueError`: for a mask that leaves out what was read, where that has or may have pads.
    """
    if attention_mask.shape[1] == past + tokens:
        return attention_mask
    check_no_pads_read(tokens, past, read)
    if not counted:
        raise ValueError(
            f"`attention_mask` must cover the whole text, {past} tokens that were read and {tokens} new ones, in a model "
            f"without memory layers: it does not know which tokens were pads. Got shape {tuple(attention_mask.shape)}."
        )
    return F.pad(attention_mask, (past, 0), value=1)


def check_no_pads_read(tokens: int, past: int, read: Tensor | int) -> None:
    """Raises a `ValueError` if what was read has pads, so that only a mask of the whole text says which."""
    if not isinstance(read, Tensor):
        return
    pads = (read != past).any()
    if is_tracing(read):
        refuse_in_graph(pads, "`attention_mask` must cover the whole text: what was read has pads.")
    elif bool(pads):
        raise ValueError(
            f"`attention_mask` must cover the whole text, {past} tokens that were read and {tokens} new ones, because "
            f"what was read has pads: its rows have {read.tolist()} real tokens."
        )


def last_tokens(mask: Tensor) -> Tensor:
    """Index of every row's last real token, of a mask of shape `[batch, tokens]`.

    Raises:
        `ValueError`: if a row has none.
    """
    empty = ~mask.any(-1).all()
    if is_tracing(mask):
        refuse_in_graph(empty, "Every row must have a real token to be classified.")
    elif bool(empty):
        raise ValueError(
            f"Every row must have a real token to be classified, got rows with {mask.sum(-1).tolist()} of them."
        )
    return mask.shape[1] - 1 - mask.flip(-1).int().argmax(-1)


def describe(value: Any) -> str:
    """A value in an error: shape and dtype of a tensor, the type of anything else."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    return type(value).__name__
