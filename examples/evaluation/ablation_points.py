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
"""The ablations: Moneta, Yaad and Memora at the library's defaults, and each with one thing changed.

Most changes are fields of the config. What the library has no switch for has the name of a change in
`ablation_models.py`. The losses of Yaad's memory, and its trainings on corrupted text, are changes like the others.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bridge_points import NO_WRITE
from corruption import Corruption


NO_FORGETTING = -1e-9
"""A bound of the log retention below which nothing is: a factor of 1 in float32."""

MODELS = ("moneta", "yaad", "memora")
CHANGES = ("ascent", "keys", "constant-delta", "constant-alpha", "fixed-start")
SERVED_AT = (4, 16, 64, 256)
"""Chunk sizes that some of the trained models are evaluated at, whatever they were trained at."""


@dataclass(frozen=True)
class Ablation:
    """A model, and what is changed of it.

    Args:
        model (`str`): of `MODELS`.
        parent (`str`, *optional*): the ablation it differs from by one thing; `None` for the three models themselves.
        says (`str`): the change in words.
        settings (`Mapping`): fields of the config that differ from the model's defaults.
        change (`str`, *optional*): of `CHANGES`, what no field can say.
        steps (`float`): the largest step in units of the default's.
        refitted (`bool`): whether the block's MLP is as wide as gives all models equal parameters, or as the model's own.
        trained_with (`Corruption`, *optional*): what corrupts the text that it is trained on.
        served (`bool`): whether it is evaluated at the chunk sizes of `SERVED_AT`, too.
        tried (`bool`): whether it is evaluated on corrupted text, too.
        default (`bool`): whether it runs unless named.
    """

    model: str
    parent: str | None
    says: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    change: str | None = None
    steps: float = 1.0
    refitted: bool = True
    trained_with: Corruption | None = None
    served: bool = False
    tried: bool = False
    default: bool = True

    def __post_init__(self):
        for name, value, allowed in (("model", self.model, MODELS), ("change", self.change, (None, *CHANGES))):
            if value not in allowed:
                raise ValueError(f"`{name}` must be one of {allowed}, got {value!r}.")


ABLATIONS: dict[str, Ablation] = {}


def _add(
    name: str, parent: str | None, says: str, *, steps: float = 1.0, change: str | None = None, **more: Any
) -> None:
    flags = {key: more.pop(key) for key in ("refitted", "trained_with", "served", "tried", "default") if key in more}
    if parent is None:
        ABLATIONS[name] = Ablation(name, None, says, **flags)
        return
    of = ABLATIONS[parent]
    settings, change = {**of.settings, **more}, of.change if change is None else change
    ABLATIONS[name] = Ablation(of.model, parent, says, settings, change, of.steps * steps, **flags)


def _fill() -> None:
    titles = {"moneta": "lp loss, lq retention", "yaad": "Huber loss, decay", "memora": "l2 loss, KL retention"}
    for model in MODELS:
        _add(model, None, f"the library's defaults: {titles[model]}", served=True, tried=True)
        # the paper's
        _add(f"{model}-no-retention", model, "no forgetting", change="constant-alpha", min_log_alpha=NO_FORGETTING)
        _add(f"{model}-linear", model, "a matrix in place of the MLP", memory_architecture="matrix")
        says = "a matrix in place of the MLP, fewer parameters and all else as it was"
        _add(f"{model}-linear-alone", model, says, refitted=False, memory_architecture="matrix")
        _add(f"{model}-head-gates", model, "one gate a head", gate_granularity="head")
        _add(f"{model}-rotary", model, "rotary embedding, as printed", use_rope=True)
        _add(
            f"{model}-rotary-head-gates",
            f"{model}-rotary",
            "and one gate a head",
            default=False,
            gate_granularity="head",
        )
        _add(f"{model}-to-zero", model, "decay toward zero", decay_target="zero")
        _add(f"{model}-full-start", model, "the initial memory's last layer at full size", initial_memory_scale=1.0)
        _add(f"{model}-fixed-start", model, "the initial memory is not trained", change="fixed-start")
        _add(f"{model}-plain-values", model, "values as they come, not of rms 1", value_norm=False)
        _add(f"{model}-usual-eps", model, "the usual epsilon of the norm behind the memory", output_norm_eps=None)
        for eps in (0.1, 10.0, 100.0):
            says = f"epsilon of the norm behind the memory {eps:g}"
            _add(f"{model}-eps-{eps:g}", model, says, output_norm_eps=eps)
        for scale in (4.0, 8.0):
            says = f"the initial memory's hidden layer {scale / 2.0:g} times as large"
            _add(f"{model}-hidden-{scale:g}", model, says, initial_hidden_scale=scale)
        _add(f"{model}-norm-eps-1", model, "epsilon of the memory's own norm 1", memory_norm_eps=1.0)
        _add(f"{model}-no-norm", model, "no norm in the memory", memory_norm=False)
        for chunk in (16, 256):
            _add(f"{model}-chunk-{chunk}", model, f"trained with chunks of {chunk}", served=True, chunk_size=chunk)
        for word, steps in (("quarter", 0.25), ("half", 0.5), ("double", 2.0)):
            _add(f"{model}-{word}-steps", model, f"largest steps of {steps:g} times the default's", steps=steps)
        # the reviewers'
        _add(f"{model}-no-write", model, "no writes", eta_max=NO_WRITE)
        _add(f"{model}-ascent", model, "writes up the gradient", change="ascent")
        _add(f"{model}-last-layer", model, "only the last layer is written", update_layers="last")
        _add(f"{model}-keys", model, "keys in place of queries", change="keys")

    # Memora's earlier defaults, and what led away from them
    for word, steps in (("quadruple", 4.0), ("octuple", 8.0)):
        _add(
            f"memora-{word}-steps",
            "memora",
            f"largest steps of {steps:g} times the default's",
            steps=steps,
            default=False,
        )
    before = "memora-earlier"
    says, flags = "its earlier default: epsilon of the memory's own norm 0.01", {"default": False}
    _add(before, "memora-quadruple-steps", says, memory_norm_eps=0.01, served=True, tried=True, **flags)
    for eps in (0.03, 0.3, 1.0):
        _add(f"{before}-norm-eps-{eps:g}", before, f"that epsilon {eps:g}", memory_norm_eps=eps, **flags)
    _add(f"{before}-double-steps", before, "largest steps of twice that", steps=2.0, **flags)
    says = "the initial memory's last layer 0.03 of its full size"
    _add(f"{before}-small-start", before, says, initial_memory_scale=0.03, **flags)
    _add(
        f"{before}-no-write", "memora-no-write", "epsilon of the memory's own norm 0.01", memory_norm_eps=0.01, **flags
    )

    _add("yaad-constant-delta", "yaad", "one threshold a head, whatever the text", change="constant-delta")
    for p in (1.5, 2.0, 4.0):
        _add(f"moneta-p-{p:g}", "moneta", f"p = {p:g}", lp_power=p)
    for q in (2.0, 3.0, 5.0):
        _add(f"moneta-q-{q:g}", "moneta", f"q = {q:g}, the map as printed", lq_power=q)
    _add("moneta-mirror", "moneta", "the mirror map, q = 4", lq_map="mirror")
    for q in (3.0, 5.0):  # at q = 2 both maps are the identity
        _add(f"moneta-mirror-q-{q:g}", "moneta-mirror", f"the mirror map, q = {q:g}", lq_power=q)

    # the same model with three losses. The guard that every loss has, a largest residual, is one against outliers, too
    _add("yaad-l2", "yaad", "l2 loss", tried=True, attentional_bias="l2")
    _add("yaad-lp", "yaad", "lp loss, p = 3", tried=True, attentional_bias="lp")
    _add("yaad-l2-unbounded", "yaad-l2", "residuals without a bound", tried=True, residual_clip=1e9)
    for name in ("yaad", "yaad-l2", "yaad-lp"):
        for kind, corruption in (("values", Corruption("values", 0.1, 8.0)), ("tokens", Corruption("tokens", 0.1))):
            says = f"trained on corrupted text, {corruption.name}"
            _add(f"{name}-noisy-{kind}", name, says, tried=True, default=False, trained_with=corruption)


_fill()
