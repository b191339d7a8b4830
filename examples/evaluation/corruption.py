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
"""Corrupted text: what a memory makes of values that are noise and of tokens that stand there by chance.

Two kinds. Of `"values"`, the value vectors of some tokens are replaced in every memory of every layer by normal noise,
each of `scale` times the root mean square of what it replaces; keys, queries and gates stay, so that the memories alone
are told something wrong. Of `"tokens"`, the ids of some tokens are replaced by random ones. Which tokens, and the noise,
follow from a seed and are the same for every model. The measure is the loss at the other tokens: at positions whose own
value or id was left alone, and, where ids are replaced, about a next token that was.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from bridge_models import ChangedTokens
from torch import Tensor, nn

from miras_hf.modeling_miras import MirasMemory


KINDS = ("values", "tokens")


@dataclass(frozen=True)
class Corruption:
    """What is replaced, and by how much.

    Args:
        kind (`str`): `"values"` or `"tokens"`.
        share (`float`): probability of each token to be replaced, above 0 and below 1.
        scale (`float`): of the noise in place of values, in root mean squares.

    Raises:
        `ValueError`: naming what is out of range, or a `scale` of tokens.
    """

    kind: str
    share: float
    scale: float = 1.0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"`kind` must be one of {KINDS}, got {self.kind!r}.")
        if not 0.0 < self.share < 1.0:
            raise ValueError(f"`share` must be above 0 and below 1, got {self.share}.")
        if not self.scale > 0.0 or self.kind == "tokens" and self.scale != 1.0:
            raise ValueError(f"`scale` must be positive, and 1 for tokens, which have none, got {self.scale}.")

    @property
    def name(self) -> str:
        return f"{self.share:.0%} of {self.kind}" + (f", noise of {self.scale:g} rms" if self.kind == "values" else "")


CORRUPTIONS = (
    Corruption("values", 0.02),
    Corruption("values", 0.02, 8.0),
    Corruption("values", 0.1),
    Corruption("values", 0.1, 8.0),
    Corruption("tokens", 0.02),
    Corruption("tokens", 0.1),
)
"""What trained models are tried with."""


@contextmanager
def corrupted(
    model: nn.Module, ids: Tensor, corruption: Corruption, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inside, one call of the model reads corrupted text.

    Args:
        ids (`torch.Tensor` of shape `[rows, tokens]`): the text.
        generator (`torch.Generator`): on the CPU, so that every device meets the same noise.

    Yields:
        the ids to read, and which tokens were left alone, `[rows, tokens]`, bool.
    """
    here = (torch.rand(ids.shape, generator=generator) < corruption.share).to(ids.device)
    if corruption.kind == "tokens":
        others = torch.randint(model.config.vocab_size, ids.shape, generator=generator).to(ids)
        yield torch.where(here, others, ids), ~here
        return

    def with_noise(q: Tensor, k: Tensor, v: Tensor, *gates: Tensor | None) -> tuple[Tensor | None, ...]:
        noise = torch.randn(v.shape, generator=generator).to(v.device)
        rms = v.detach().float().square().mean(-1, keepdim=True).sqrt()
        noise = (corruption.scale * rms * noise).to(v.dtype)
        return q, k, torch.where(here[:, :, None, None], noise, v), *gates

    def replace_values(memory: MirasMemory, inputs: tuple) -> tuple:
        tokens, *others = inputs
        return ChangedTokens(tokens, with_noise), *others

    memories = [module for module in model.modules() if isinstance(module, MirasMemory)]
    if not memories:
        raise ValueError(f"`model` must have memories whose values can be replaced, got a {type(model).__name__}.")
    hooks = [memory.register_forward_pre_hook(replace_values) for memory in memories]
    try:
        yield ids, ~here
    finally:
        for hook in hooks:
            hook.remove()


def token_losses(model: nn.Module, arguments: Callable[[Tensor], dict[str, Any]], ids: Tensor, read: Tensor) -> Tensor:
    """Nats of every next token of `ids`, `[rows, tokens - 1]`, for a model that reads `read` in their place."""
    logits = model(read, **arguments(read)).logits[:, :-1].float()
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")


def counted(kept: Tensor, corruption: Corruption) -> Tensor:
    """The positions of `token_losses` that count, of tokens that were left alone."""
    return kept[:, :-1] & kept[:, 1:] if corruption.kind == "tokens" else kept[:, :-1]


def corrupted_loss(corruption: Corruption, seed: int) -> Callable:
    """A training's loss under corruption: the mean over the tokens that were left alone, as `bridge_training.Loss`."""

    def loss(model: nn.Module, arguments: Callable, ids: Tensor, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        with corrupted(model, ids, corruption, generator) as (read, kept):
            return token_losses(model, arguments, ids, read)[counted(kept, corruption)].mean()

    return loss


@torch.no_grad()
def under_corruption(trained: Any, corruption: Corruption, seed: int = 0) -> dict[str, float]:
    """The validation loss of a trained model at the tokens that were left alone: `clean`, of the text as it is, and
    `corrupted`.

    Args:
        trained (`bridge_training.Trained`): the model and its text.
    """
    generator = torch.Generator().manual_seed(seed)
    sums, tokens = {"clean": 0.0, "corrupted": 0.0}, 0
    for ids in trained.rows.split(trained.at_once):
        with trained.precision(), corrupted(trained.model, ids, corruption, generator) as (read, kept):
            at = {"corrupted": token_losses(trained.model, trained.arguments, ids, read)}
        with trained.precision():
            at["clean"] = token_losses(trained.model, trained.arguments, ids, ids)
        here = counted(kept, corruption)
        tokens += int(here.sum())
        for name, losses in at.items():
            sums[name] += losses[here].double().sum().item()
    if not tokens:
        raise ValueError(f"No token is left alone by {corruption.name} of {tuple(trained.rows.shape)} tokens.")
    return {**{name: total / tokens for name, total in sums.items()}, "tokens": tokens}


__all__ = [
    "CORRUPTIONS",
    "KINDS",
    "Corruption",
    "corrupted",
    "corrupted_loss",
    "counted",
    "token_losses",
    "under_corruption",
]
