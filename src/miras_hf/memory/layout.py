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
"""Where tokens sit on the chunk grid: batches, padding, packs, and continuations in the middle of a chunk.

The grid belongs to the sequence: it starts at each sequence's first real token. Every sequence is a row of slots,
`chunk_size` slots a step; a row that continues a state leaves its first `phase` slots to the tokens read before, and
pad tokens have no slot. Chunks are laid out step by step, so that the loop over chunks reads contiguous memory:

    [chunks, heads, chunk_size, features]      chunks = sum over steps of the rows still alive at that step
"""

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .vjp import can_look_at


@dataclass
class ChunkLayout:
    """The slots of a call's tokens.

    Args:
        batch, tokens (`int`): leading axes of the call's tensors.
        rows (`int`): number of sequences: `batch`, or those of a pack.
        chunk_size (`int`): slots per chunk.
        active (`list` of `int`): rows alive at each step; rows are in `row_order`, so the living ones come first.
        row_order (`torch.Tensor`, *optional*): rows by decreasing number of steps; `None` if all have the same.
        slot_of_token (`torch.Tensor` of shape `[batch * tokens]`, *optional*):
            Slot of every token, one past the last for a pad; `None` if tokens fill the rows' slots in order.
        used (`torch.Tensor` of shape `[rows]`): slots taken in every row, those of the state included, in `row_order`.
        full_steps (`int`, *optional*): number of full chunks if every row has the same, else `None`.
    """

    batch: int
    tokens: int
    rows: int
    chunk_size: int
    active: list[int]
    row_order: Tensor | None
    slot_of_token: Tensor | None
    used: Tensor
    full_steps: int | None

    @property
    def offsets(self) -> list[int]:
        """First chunk of every step, and the number of chunks."""
        return [0, *itertools.accumulate(self.active)]

    def to_groups(self, x: Tensor, borders: list[int]) -> tuple[Tensor, ...]:
        """`[batch, tokens, heads, f]`, cut at steps, to a tensor for each group of steps between two borders.

        Its axes before `[chunk_size, f]` are those of `[chunks, heads]`, three of them, for `merge_chunks`. Where tokens
        fill the slots in order it is a view: what must be copied is copied group by group, and not kept. Slots without a
        token are zero.
        """
        heads, features = x.shape[2:]
        size, steps = self.chunk_size, len(self.active)
        if self.slot_of_token is None:
            if steps * size != self.tokens:  # padding by nothing would copy
                x = F.pad(x, (0, 0, 0, 0, 0, steps * size - self.tokens))
            x = x.view(self.batch, steps, size, heads, features).permute(1, 0, 3, 2, 4)
        else:
            chunks = self.offsets[-1]
            slots = x.new_zeros(chunks * size + 1, heads, features)
            # every token has its own slot, but pads share the one past the end, which is cut off
            slots = slots.index_copy(0, self.slot_of_token, x.reshape(-1, heads, features))[:-1]
            x = slots.view(chunks, 1, size, heads, features).transpose(2, 3)
            borders = [self.offsets[border] for border in borders]
        # split, not sliced group by group: the gradients of the pieces are put together once
        return x.split([last - first for first, last in itertools.pairwise(borders)])

    def from_groups(self, outputs: list[Tensor], heads: int) -> Tensor:
        """The inverse of `to_groups` and `merge_chunks`, zeros at pads."""
        size, features = outputs[0].shape[1:]
        if self.batch == 0:
            return outputs[0].new_zeros(0, self.tokens, heads, features)
        if self.slot_of_token is None:
            outputs = [y.view(-1, self.batch, heads, size, features).permute(1, 0, 3, 2, 4) for y in outputs]
            x = torch.cat(outputs, dim=1)
            return x.reshape(self.batch, -1, heads, features)[:, : self.tokens]
        x = torch.cat(outputs).view(-1, heads, size, features).transpose(1, 2).reshape(-1, heads, features)
        x = torch.cat((x, x.new_zeros(1, heads, features)))
        return x.index_select(0, self.slot_of_token).view(self.batch, self.tokens, heads, features)


def merge_chunks(x: Tensor) -> Tensor:
    """A group of `to_groups` as `[chunks * heads, chunk_size, f]`."""
    return x.flatten(0, 2)


def build_layout(
    batch: int,
    tokens: int,
    chunk_size: int,
    device: torch.device,
    *,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
    phase: Tensor | None = None,
) -> ChunkLayout:
    """Lays tokens out on the grid.

    Args:
        cu_seqlens (`torch.Tensor` of shape `[sequences + 1]`, *optional*): borders of a pack; read on the host.
        lengths (`torch.Tensor` of shape `[batch]`, *optional*): real tokens of every row, before its pads.
        phase (`torch.Tensor` of shape `[rows]`, *optional*): slots of the first chunk that a state has filled.
    """
    if cu_seqlens is None and lengths is None and phase is None:
        used = torch.full((batch,), tokens, device=device)
        steps = -(-tokens // chunk_size)
        return ChunkLayout(
            batch, tokens, batch, chunk_size, [batch] * steps, None, None, used, full_steps=tokens // chunk_size
        )

    extra = 0 if phase is None else chunk_size - 1  # phases stay on the device: room for the largest
    if cu_seqlens is None:
        rows, row_order = batch, None
        row_of_token = torch.arange(batch, device=device).repeat_interleave(tokens)
        rank = torch.arange(tokens, device=device).repeat(batch)
        taken = torch.full((batch,), tokens, device=device) if lengths is None else lengths.long()
        steps_of_row = [-(-(tokens + extra) // chunk_size)] * batch
    else:
        taken = cu_seqlens.diff().to(device=device, dtype=torch.long)
        rows = taken.shape[0]
        row_of_token = torch.arange(rows, device=device).repeat_interleave(taken, output_size=tokens)
        rank = torch.arange(tokens, device=device) - cu_seqlens.to(device=device, dtype=torch.long)[row_of_token]
        steps_of_row = [-(-(length + extra) // chunk_size) for length in taken.tolist()]
        row_order = torch.tensor(
            sorted(range(rows), key=lambda row: -steps_of_row[row]), device=device, dtype=torch.long
        )

    most = max(steps_of_row, default=0)
    active = [sum(steps > step for steps in steps_of_row) for step in range(most)]
    offsets = torch.tensor([0, *itertools.accumulate(active)], device=device)

    slot = rank if phase is None else rank + phase[row_of_token]
    used = taken if phase is None else taken + phase
    position = row_of_token
    if row_order is not None:
        position = torch.argsort(row_order)[row_of_token]
        used = used[row_order]
    slot_of_token = (offsets[:-1][slot // chunk_size] + position) * chunk_size + slot % chunk_size
    if lengths is not None:
        slot_of_token = torch.where(rank < taken[row_of_token], slot_of_token, sum(active) * chunk_size)
    return ChunkLayout(batch, tokens, rows, chunk_size, active, row_order, slot_of_token, used, full_steps=None)


def check_layout_arguments(batch: int, tokens: int, cu_seqlens: Tensor | None, lengths: Tensor | None) -> None:
    """Raises a `ValueError` that names the argument, for packs that do not cover the tokens and lengths that do not fit."""
    if lengths is not None:
        if cu_seqlens is not None:
            raise ValueError("`lengths` and `cu_seqlens` exclude each other: a pack has no pad tokens.")
        if lengths.shape != (batch,) or lengths.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"`lengths` must be an int32 or int64 tensor of shape {(batch,)}, got {lengths.dtype} "
                f"{tuple(lengths.shape)}."
            )
        if can_look_at(lengths) and bool(((lengths < 0) | (lengths > tokens)).any()):
            raise ValueError(
                f"`lengths` must lie between 0 and {tokens}, the tokens of a row, got {_abbreviated(lengths.tolist())}."
            )
    if cu_seqlens is not None:
        if batch != 1:
            raise ValueError(f"`cu_seqlens` needs a batch of one packed row, got a batch of {batch}.")
        if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point() or cu_seqlens.numel() < 2:
            raise ValueError(
                "`cu_seqlens` must be an integer tensor of shape [sequences + 1], got "
                f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}."
            )
        borders = cu_seqlens.tolist()
        if borders[0] != 0 or borders[-1] != tokens or any(b < a for a, b in itertools.pairwise(borders)):
            raise ValueError(
                f"`cu_seqlens` must rise from 0 to the number of tokens, {tokens}, got {_abbreviated(borders)}."
            )


def is_token(lengths: Tensor, tokens: int) -> Tensor:
    """Which slots of `[rows, tokens]` hold a token: the first `lengths`, `[rows]`, of every row."""
    return torch.arange(tokens, device=lengths.device) < lengths[:, None]


def _abbreviated(numbers: list[int]) -> str:
    return str(numbers) if len(numbers) <= 8 else f"[{', '.join(map(str, numbers[:4]))}, ..., {numbers[-1]}]"
