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
"""What is measured of a model over a long text, and of its saved memory: see `length.py`."""

import math
import resource
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pretrain
import torch
from memory_probe import reset_peak, status_kib
from perplexity_by_position import bucketed, edges_of, losses_of
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import DynamicCache, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from miras_hf import load_memory, save_memory
from miras_hf.cache import MirasLayer
from miras_hf.compat import CACHE_NAME
from miras_hf.memory import MemoryState
from miras_hf.modeling_miras import MirasMixer


BUCKETS = 16
CONDITIONS = {
    "fresh": "every document with a new memory",
    "warm": "every document from the memory of the earlier text, written on",
    "warm and frozen": "the same, and the memory stays as it was saved",
    "stream": "all documents in one stream after the earlier text",
}


def held_out(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str] | None) -> list[Tensor]:
    """Documents as ids, the token that separates documents before each: by default those of the standard library that
    `pretrain.py` holds out from training."""
    if texts is None:
        texts = pretrain.load_documents(pretrain.DataArguments())["validation"]["text"]
    # text that looks like a special token stays text
    rows = (tokenizer(text, split_special_tokens=True, verbose=False)["input_ids"] for text in texts)
    return [torch.tensor([tokenizer.eos_token_id, *row]) for row in rows]


def one_text(documents: list[Tensor], tokens: int) -> Tensor:
    """The documents one after the other, so many tokens.

    Raises:
        `ValueError`: if there are fewer.
    """
    ids = torch.cat(documents)
    if len(ids) < tokens:
        raise ValueError(f"The text has {len(ids):,} tokens, fewer than {tokens:,}: give more of it by --text.")
    return ids[:tokens]


def mixers_of(model: nn.Module) -> dict[int, MirasMixer]:
    return {module.layer_idx: module for module in model.modules() if isinstance(module, MirasMixer)}


# -- a long text --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def memory_size(mixer: MirasMixer, state: MemoryState) -> dict[str, float]:
    """How large a layer's memory is after whole chunks: `rms` of its weights over all heads, that of its `largest_head`,
    and how far they have `moved` from the initial ones, relative to those."""
    rule, now, start = mixer.memory.rule, [], []
    fixed = rule.architecture.fixed
    of_layers = zip(state.dual, mixer.memory.initial_state()[fixed:], strict=True)
    for layer, (dual, initial) in enumerate(of_layers, start=fixed):
        initial = initial.to(dual.dtype)
        dual = dual + initial if rule.decay_target == "init" else dual
        now.append(rule.retention.link(dual[0], rule.hidden_axis(layer)).flatten(1))
        start.append(rule.retention.link(initial, rule.hidden_axis(layer)).flatten(1))
    weights, initial = torch.cat(now, dim=1).double(), torch.cat(start, dim=1).double()
    of_heads = weights.square().mean(1)
    return {
        "rms": of_heads.mean().sqrt().item(),
        "largest_head": of_heads.max().sqrt().item(),
        "moved": ((weights - initial).norm() / initial.norm()).item(),
    }


def cache_bytes(cache: Cache) -> int:
    """Of all tensors that a cache carries from one call to the next."""
    total = 0
    for layer in cache.layers:
        tensors = (
            [*layer.memory.leaves(), layer.conv_tail] if isinstance(layer, MirasLayer) else [layer.keys, layer.values]
        )
        total += sum(t.numel() * t.element_size() for t in tensors)
    return total


class PeakMemory:
    """The largest memory in use since the last look, in MiB: of the GPU's tensors, or the process's resident set."""

    def __init__(self, device: str):
        self.device = device
        if device == "cuda":
            self.method = "largest allocation on the GPU"
        else:
            self.method = "VmHWM" if reset_peak() and status_kib("VmHWM") is not None else "ru_maxrss, never reset"
        self.since_last()

    def since_last(self) -> float:
        if self.device == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**20
            torch.cuda.reset_peak_memory_stats()
            return peak
        if self.method == "VmHWM":
            peak = status_kib("VmHWM")
            reset_peak()
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 1024


def read_long_text(model: nn.Module, ids: Tensor, piece: int, restart: int, device: str) -> dict[str, Any]:
    """Reads one text in pieces with the cache, and once more with a new memory every `restart` tokens.

    Returns:
        `by_position`: in buckets equally wide on a log scale, `first` and `last` position, `loss`, and the loss of the same
        tokens `restarted`. `states`: after the piece in which a bucket ends, the `tokens` read, `memories` by layer
        (`memory_size`), `cache_mib` and `peak_mib` since the entry before.
    """
    peak, states = PeakMemory(device), []
    mixers = mixers_of(model)
    waiting = edges_of(len(ids) - 1, BUCKETS)[1:]

    def after_piece(tokens: int, cache: Cache) -> None:
        if not waiting or tokens < waiting[0]:
            return
        while waiting and tokens >= waiting[0]:
            waiting.pop(0)
        memories = {i: memory_size(mixer, cache.layers[i].memory) for i, mixer in mixers.items()}
        state = {"tokens": tokens, "memories": memories, "cache_mib": cache_bytes(cache) / 2**20}
        states.append(state | {"peak_mib": peak.since_last()})

    losses = losses_of(model, ids, piece, after_piece=after_piece)
    parts = [ids[start : start + restart + 1] for start in range(0, len(ids) - 1, restart)]
    restarted = torch.cat([losses_of(model, part, restart) for part in parts])
    rows = zip(bucketed(losses[None], BUCKETS), bucketed(restarted[None], BUCKETS), strict=True)
    by_position = [
        {"first": row["first"], "last": row["last"], "loss": row["loss"], "restarted": anew["loss"]}
        for row, anew in rows
    ]
    return {"by_position": by_position, "states": states, "peak_method": peak.method}


# -- saved memory -------------------------------------------------------------------------------------------------------


class _Constant(nn.Module):
    """A gate that says the same to every token."""

    def __init__(self, gate: nn.Module, value: float):
        super().__init__()
        self.gate, self.value = gate, value

    def forward(self, hidden_states: Tensor) -> Tensor | tuple[Tensor, ...]:
        # a tied gate says step and retention at once
        return tree_map(lambda gate: torch.full_like(gate, self.value), self.gate(hidden_states))


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, the memories of a model are read, and neither written nor forgotten. Convolutions and attention layers go on
    as always. Its modules have other names meanwhile: memories are loaded before."""
    # no step, no log retention, nothing erased, and nothing left of a momentum
    silent = {"eta": 0.0, "alpha": 0.0, "erase": 0.0, "momentum": -1e9}
    before = [(mixer, {name: getattr(mixer, name) for name in silent}) for mixer in mixers_of(model).values()]
    for mixer, gates in before:
        for name, gate in gates.items():
            setattr(mixer, name, None if gate is None else _Constant(gate, silent[name]))
    try:
        yield
    finally:
        for mixer, gates in before:
            for name, gate in gates.items():
                setattr(mixer, name, gate)


def split_documents(
    documents: list[Tensor], earlier: int, count: int, tokens: int, chunk_size: int
) -> tuple[Tensor, list[Tensor]]:
    """The earlier text, whole chunks of about `earlier` tokens from the first documents, and at most `count` of the others,
    their first `tokens` tokens after the separator.

    Raises:
        `ValueError`: if there is less text, or no other document so long.
    """
    read, used = 0, 0
    while read < earlier and used < len(documents):
        read += len(documents[used])
        used += 1
    if read < earlier or earlier < chunk_size:
        raise ValueError(
            f"`earlier` must be from `chunk_size` = {chunk_size} tokens to those of the text, {read:,} of {used} documents, "
            f"got {earlier:,}."
        )
    tests = [document[: tokens + 1] for document in documents[used:] if len(document) > tokens][:count]
    if not tests:
        raise ValueError(
            f"None of the {len(documents) - used} documents behind the earlier text has {tokens:,} tokens: ask for fewer."
        )
    return torch.cat(documents[:used])[: earlier // chunk_size * chunk_size], tests


def read_with_saved_memory(
    model: nn.Module, earlier: Tensor, documents: list[Tensor], piece: int, file: Path
) -> dict[str, Any]:
    """Losses of the documents in each of `CONDITIONS`, by way of a memory file.

    Returns:
        by condition `loss` and `standard_error` over documents, `difference` to fresh and its `difference_error`, of pairs
        of documents, and `by_position` in the document.
    """
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        for part in earlier.split(piece):
            model.get_decoder()(part[None], use_cache=True, **{CACHE_NAME: cache})
    save_memory(cache, file, model)

    def frozen_losses(ids: Tensor) -> Tensor:
        cache = load_memory(file, model)
        with frozen(model):
            return losses_of(model, ids, piece, cache)

    stream = load_memory(file, model)
    found = {
        "fresh": [losses_of(model, ids, piece) for ids in documents],
        "warm": [losses_of(model, ids, piece, load_memory(file, model)) for ids in documents],
        "warm and frozen": [frozen_losses(ids) for ids in documents],
        "stream": [losses_of(model, ids, piece, stream) for ids in documents],
    }
    fresh = torch.stack(found["fresh"])
    conditions = {}
    for name in CONDITIONS:
        losses = torch.stack(found[name])
        loss, error = _mean_and_error(losses)
        difference, difference_error = _mean_and_error(losses - fresh)
        rows = bucketed(losses, BUCKETS)
        conditions[name] = {
            "loss": loss,
            "standard_error": error,
            "difference": difference,
            "difference_error": difference_error,
            "by_position": [{key: row[key] for key in ("first", "last", "loss")} for row in rows],
        }
    return {
        "earlier": len(earlier),
        "documents": len(documents),
        "document_tokens": len(documents[0]) - 1,
        "file_mib": file.stat().st_size / 2**20,
        "conditions": conditions,
    }


def _mean_and_error(losses: Tensor) -> tuple[float, float | None]:
    """Of `[documents, positions]`, the mean and its standard error over documents, `None` of a single one."""
    means = losses.mean(1)
    error = means.std().item() / math.sqrt(len(means)) if len(means) > 1 else None
    return means.mean().item(), error
