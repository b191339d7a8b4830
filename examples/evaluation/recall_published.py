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
"""What others have published about the tasks of the recall study, for the neighbours that it trains."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """A published accuracy.

    Args:
        task, model (`str`): of the study.
        value (`float`): the accuracy, in this study's terms.
        source (`str`): whose it is, of which model.
        part (`str`): of the task's tests; `"mean"` for the mean over them.
        scaled (`bool`): whether a guess is 0 instead of chance.
    """

    task: str
    model: str
    value: float
    source: str
    part: str = "baseline"
    scaled: bool = False


_MAD = "github.com/HassanJbara/lin-attn-bench, one harness for all"
_STATE = "arXiv 2411.12537"


def _mad(
    model: str, name: str, compression: float, fuzzy: float, recall: float, memory: float, noisy: float, copy: float
):
    values = {
        "compression": (32 * compression - 1) / 31,  # without the token that is always the same
        "fuzzy-recall": fuzzy,
        "in-context-recall": recall,
        "memorisation": memory,
        "noisy-recall": noisy,
        "selective-copying": copy,
    }
    return [Figure(task, model, value, f"{name}, {_MAD}") for task, value in values.items()]


PUBLISHED = [
    *_mad("llama", "Transformer", 0.432, 0.565, 0.905, 0.788, 0.897, 0.998),
    *_mad("gated-deltanet", "Gated DeltaNet", 0.435, 0.286, 0.999, 0.552, 0.999, 0.997),
    *_mad("mamba2", "Mamba, the first", 0.491, 0.123, 0.993, 0.896, 0.997, 0.887),
    Figure("parity", "llama", 0.022, f"Transformer, {_STATE}", "40-256", True),
    Figure("parity", "gated-deltanet", 0.017, f"DeltaNet, steps up to 1, {_STATE}", "40-256", True),
    Figure("modular-arithmetic", "llama", 0.031, f"Transformer, {_STATE}", "40-256", True),
    Figure("modular-arithmetic", "gated-deltanet", 0.314, f"DeltaNet, steps up to 1, {_STATE}", "40-256", True),
]

WITHOUT = {
    "mqar": "published as plots (arXiv 2312.04927, 2402.18668), of models with other layers",
    "forgetting-mqar": "no figure has been published",
    "needle": "no figure has been published for random tokens",
}
"""Tasks without a number to hold a neighbour against, and why."""


__all__ = ["PUBLISHED", "WITHOUT", "Figure"]
