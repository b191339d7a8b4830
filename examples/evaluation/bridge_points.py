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
"""The rungs of the bridge: from Gated DeltaNet's layer to Yaad's, one change at a time.

A rung is a `Point`, the settings of a layer, and the rung that it differs from. Those of `PATH` lead in single changes
from Gated DeltaNet to Yaad as it was first shipped (the study changed the defaults since); the others are single changes
beside it, or that model with one thing changed back. A table of costs is all that follows from them: a rung's loss less its parent's.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any


NO_WRITE = 1e-9
"""Steps that leave the initial memory as it is, as far as float32 can tell."""


@dataclass(frozen=True)
class Point:
    """What stands at one place of the bridge; the defaults, and what is called shipped, are those of the first Yaad.

    Args:
        model (`str`): `"bridge"` for the layers below in our shell, or a whole model of Transformers, `"llama"` or
            `"gated-deltanet"` (Qwen3-Next with linear layers alone), of which nothing else is set but `published_gates`.
        rule (`str`): `"delta"`, the gated delta rule of Transformers, or a memory of ours, `"matrix"` or `"mlp"`.
        loss (`str`): attentional bias of our memories.
        retention (`str`): retention gate of our memories.
        chunk (`int`): tokens whose gradients are taken at the same weights.
        granularity (`str`): gates a `"channel"` or a `"head"`.
        eta_max (`float`, *optional*): largest step of a token; `None` for the shipped one.
        eta_start (`float`): the step's share of `eta_max` at the start.
        step (`str`): `"plain"`, or `"unit"` for gradients divided by what one of them moves the read at its own key,
            so that a step of one moves it all the way.
        half_lives (`tuple`, *optional*): of the heads or channels at the start, log-uniform; `None` for those of
            Gated DeltaNet, `A` uniform in (0.01, 16) and `dt_bias` 1, where most heads forget within a token.
        caps (`bool`): whether residuals, weights and the log retention of a token are bounded as shipped.
        conv_std (`float`, *optional*): deviation of the convolutions' normal start; `None` for uniform as shipped.
        rope (`bool`): rotary embedding of queries and keys.
        query_scale (`bool`): whether queries are divided by the root of head_dim, as Gated DeltaNet's are, which
            matters for the epsilon of the norm after the memory.
        value_norm (`bool`): whether values have a root mean square of 1 in every head.
        read_residual (`bool`): whether an MLP memory returns its input besides, `x + LN(...)`.
        norm_eps (`float`, *optional*): epsilon of an MLP memory's layer norm; `None` for the shipped one.
        output_eps (`float`, *optional*): epsilon of the norm after the memory; `None` for the shipped one. Where it is
            large against what memories return, a head that finds little says little.
        last_layer (`float`): factor on the initial weights of the memory's last layer; a matrix that starts at zero
            (factor 0) stays there, as Gated DeltaNet's does. KL retention knows no factor: its weights have one mass.
        train_initial (`bool`): whether the initial memory is trained.
        decay_target (`str`): `"init"` or `"zero"`.
        published_gates (`bool`): whether Transformers' Gated DeltaNet has its gates as its authors have them, see
            `bridge_models.gates_as_published`.
        write (`bool`): False for steps of nearly zero.
    """

    model: str = "bridge"
    rule: str = "mlp"
    loss: str = "huber_mixture"
    retention: str = "decay"
    chunk: int = 64
    granularity: str = "channel"
    eta_max: float | None = None
    eta_start: float = 1 / 3
    step: str = "plain"
    half_lives: tuple[float, float] | None = (32.0, 32768.0)
    caps: bool = True
    conv_std: float | None = None
    rope: bool = True
    query_scale: bool = False
    value_norm: bool = False
    read_residual: bool = True
    norm_eps: float | None = None
    output_eps: float | None = None
    last_layer: float = 1.0
    train_initial: bool = True
    decay_target: str = "init"
    published_gates: bool = False
    write: bool = True

    def __post_init__(self):
        allowed = {
            "model": ("bridge", "llama", "gated-deltanet"),
            "rule": ("delta", "matrix", "mlp"),
            "step": ("plain", "unit"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"`{name}` must be one of {values}, got {getattr(self, name)!r}.")
        if self.published_gates and self.model != "gated-deltanet":
            raise ValueError(f"`published_gates` are of `model` 'gated-deltanet', got {self.model!r}.")
        if self.rule == "delta" and self.granularity != "head":
            raise ValueError(f"`granularity` must be 'head' with the delta rule, got {self.granularity!r}.")
        if self.rule != "mlp" and not (self.read_residual and self.step == "plain" and self.norm_eps is None):
            raise ValueError(f"`read_residual`, `step` and `norm_eps` are of MLP memories, got `rule` {self.rule!r}.")
        if self.retention == "kl" and self.last_layer != 1.0 or self.retention == "lq" and self.last_layer == 0.0:
            raise ValueError(f"`last_layer` cannot be {self.last_layer} with `retention` {self.retention!r}.")
        if self.rule == "mlp" and self.last_layer == 0.0 and self.decay_target == "zero":
            raise ValueError("`last_layer` must not be 0 with `decay_target` 'zero': that MLP has no gradients.")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def changes_from(self, other: "Point") -> dict[str, Any]:
        """The settings that differ, with this point's values."""
        before = other.as_dict()
        return {name: value for name, value in self.as_dict().items() if value != before[name]}


@dataclass(frozen=True)
class Rung:
    """A named point, the rung it is compared with, and what is different in words.

    Args:
        default (`bool`): whether it runs unless named; those that do not take hours on a CPU.
    """

    name: str
    point: Point
    parent: str | None
    says: str
    default: bool = True


RUNGS: dict[str, Rung] = {}
PATH: list[str] = []
ENDS = ("gated-deltanet", "llama", "yaad")


def _add(name: str, parent: str | None, says: str, default: bool = True, point: Point | None = None, **changes) -> str:
    point = replace(RUNGS[parent].point, **changes) if point is None else point
    RUNGS[name] = Rung(name, point, parent, says, default)
    return name


def _path(*names: str) -> None:
    PATH.extend(names)


def _fill() -> None:
    _add("llama", None, "a Transformer", point=Point(model="llama"))
    _path(_add("gated-deltanet", None, "Qwen3-Next of Transformers", point=Point(model="gated-deltanet")))
    _add("gated-deltanet-gates", "gated-deltanet", "gates as its authors have them", published_gates=True)

    # Gated DeltaNet's layer out of our modules: with the same weights it gives what theirs gives
    delta = Point(
        rule="delta",
        loss="l2",
        granularity="head",
        eta_max=1.0,
        eta_start=0.5,
        half_lives=None,
        caps=False,
        conv_std=0.02,
        rope=False,
        query_scale=True,
        last_layer=0.0,
        decay_target="zero",
    )
    _path(_add("delta", "gated-deltanet", "the same layer in our block", point=delta))
    _add("delta-conv", "delta", "convolutions start uniform in +-0.5", conv_std=None)
    _add("delta-rope", "delta", "rotary embedding", rope=True)
    _add("delta-gates", "delta", "half-lives 32-32,768 at the start", half_lives=(32.0, 32768.0))
    _add("delta-values", "delta", "values of rms 1 in every head", value_norm=True)
    _path(_add("delta-queries", "delta", "queries of norm 1, not of 1/sqrt(d)", query_scale=False))

    _path(_add("matrix", "delta-queries", "gradients at the start of chunks of 16", rule="matrix", chunk=16))
    _add("matrix-1", "matrix", "chunks of 1", default=False, chunk=1)
    _add("matrix-4", "matrix", "chunks of 4", chunk=4)
    _add("matrix-64", "matrix", "chunks of 64", chunk=64)
    _add("matrix-conv", "matrix", "convolutions start uniform in +-0.5", conv_std=None)
    _add("matrix-rope", "matrix", "rotary embedding", rope=True)
    _add("matrix-gates", "matrix", "half-lives 32-32,768 at the start", half_lives=(32.0, 32768.0))
    _add("matrix-channel", "matrix", "gates a channel", granularity="channel")
    _add("matrix-caps", "matrix", "caps of residual, weights and decay", caps=True)
    _add("matrix-random", "matrix", "a learned initial memory, as shipped", last_layer=1.0, decay_target="init")
    _add("matrix-eta", "matrix", "steps up to 0.3", eta_max=0.3)
    _add("matrix-huber", "matrix", "Huber loss of the norm", loss="huber_norm")
    _add("matrix-mixture", "matrix", "the mixture", loss="huber_mixture")
    _add("matrix-no-write", "matrix", "no writes", write=False)

    start = {"last_layer": 0.1, "decay_target": "init"}
    # values that come as they are have an rms of about 0.005 at the start, so that the usual epsilon of the norm behind the
    # memory is as large as the read's mean square; of values of rms 1 it is nothing
    _add("delta-values-eps", "delta-values", "epsilon of the norm after the memory 1", output_eps=1.0)
    _path(
        _add("matrix-values", "matrix", "values of rms 1 in every head", value_norm=True),
        _add("matrix-start", "matrix-values", "a learned initial memory, small", **start),
        # a step of 0.003 moves an MLP's read at its own key by about as much as one of 0.1 moves a matrix's
        _add("mlp", "matrix-start", "an MLP memory, steps up to 0.003", rule="mlp", eta_max=0.003),
    )
    _add("matrix-values-eps", "matrix-values", "epsilon of the norm after the memory 1", output_eps=1.0)
    _add("matrix-start-eps", "matrix-start", "epsilon of the norm after the memory 1", output_eps=1.0)
    for eta in (0.001, 0.01, 0.03, 0.09):
        _add(f"mlp-eta-{eta:g}", "mlp", f"steps up to {eta:g}", eta_max=eta)
    for eta in (0.1, 0.3, 1.0):
        _add(f"mlp-unit-{eta:g}", "mlp", f"steps up to {eta:g} of the read", step="unit", eta_max=eta)
    _add("mlp-no-write", "mlp", "no writes", write=False)
    _add("mlp-4", "mlp", "chunks of 4", default=False, chunk=4)
    _add("mlp-values", "mlp", "values as they come", value_norm=False)
    _add("mlp-residual", "mlp", "the read without its query", read_residual=False)
    _add("mlp-norm-eps", "mlp", "epsilon of the memory's norm 1e-3", norm_eps=1e-3)
    _add("mlp-conv", "mlp", "convolutions start uniform in +-0.5", conv_std=None)
    _add("mlp-rope", "mlp", "rotary embedding", rope=True)
    _add("mlp-zero", "mlp", "second layer starts at zero", last_layer=0.0)
    _add("mlp-huber", "mlp", "Huber loss of the norm", loss="huber_norm")

    # memories that store from the first step: half-lives that reach as far as a text, writes that take a third of the
    # error away at their own key, caps as shipped; and the other two models with all of that
    _add("mlp-half-lives", "mlp", "half-lives 1-512 at the start", half_lives=(1.0, 512.0))
    _add("mlp-steps", "mlp-half-lives", "steps up to 0.02", eta_max=0.02)
    _add("store", "mlp-steps", "caps of residual, weights and decay", caps=True)
    _add("store-no-write", "store", "no writes", write=False)
    _add("store-64", "store", "chunks of 64", chunk=64)
    _add("store-channel", "store", "gates a channel", granularity="channel")
    _add("store-rope", "store", "rotary embedding", rope=True)
    _add("store-small", "store", "steps up to 0.003", eta_max=0.003)
    _add("store-large", "store", "steps up to 0.06", eta_max=0.06)
    _add("store-yaad", "store", "Huber loss of the norm", loss="huber_norm")
    _add("store-random", "store", "second layer as shipped", last_layer=1.0)
    _add("store-eps", "store", "epsilon of the norm after the memory 1", output_eps=1.0)
    _add("store-eps-no-write", "store-eps", "no writes", write=False)
    _add("eps-residual", "store-eps", "the read without its query", read_residual=False)
    _add("eps-gates", "store-eps", "half-lives of Gated DeltaNet at the start", half_lives=None)
    _add("eps-large", "store-eps", "epsilon of the norm after the memory 10", output_eps=10.0)
    _add("eps-small", "store-eps", "epsilon of the norm after the memory 0.1", output_eps=0.1)
    _add("eps-channel", "store-eps", "gates a channel", granularity="channel")
    _add("eps-rope", "store-eps", "rotary embedding", rope=True)
    _add("eps-64", "store-eps", "chunks of 64", chunk=64)
    _add("eps-values", "store-eps", "values as they come", value_norm=False)
    _add("eps-conv", "store-eps", "convolutions start uniform in +-0.5", conv_std=None)
    _add("eps-yaad", "store-eps", "Huber loss of the norm", loss="huber_norm")
    _add("eps-random", "store-eps", "second layer as shipped", last_layer=1.0)
    _add("eps-tiny", "store-eps", "second layer ten times smaller", last_layer=0.01)
    fixed = _add("store-fixed", "store", "the initial memory is not trained", train_initial=False)
    _add("fixed-residual", fixed, "the read without its query", read_residual=False)
    _add("fixed-random", fixed, "second layer as shipped", last_layer=1.0)
    lp = {"loss": "lp", "retention": "lq", "eta_max": 2e-3}
    _add("store-moneta", "store-random", "lp loss, lq retention, steps up to 0.002", **lp)
    _add("store-moneta-no-write", "store-moneta", "no writes", write=False)
    _add("store-memora", "store-random", "KL retention, steps up to 0.04", retention="kl", eta_max=0.04)
    _add("store-memora-no-write", "store-memora", "no writes", write=False)
    for name in ("moneta", "memora"):
        _add(f"eps-{name}", f"store-{name}", "epsilon of the norm after the memory 1", output_eps=1.0)
        _add(f"eps-{name}-no-write", f"eps-{name}", "no writes", write=False)

    # the rest of the way: what stands around the memory in Yaad as shipped, one after the other
    _path(
        _add("mlp-mixture", "mlp", "the mixture", loss="huber_mixture"),
        _add("mlp-channel", "mlp-mixture", "gates a channel", granularity="channel"),
        _add("mlp-caps", "mlp-channel", "caps of residual, weights and decay", caps=True),
        _add("mlp-gates", "mlp-caps", "half-lives 32-32,768 at the start", half_lives=(32.0, 32768.0)),
        _add("mlp-random", "mlp-gates", "second layer as shipped", last_layer=1.0),
        _add("mlp-plain-values", "mlp-random", "values as they come", value_norm=False),
        _add("mlp-shipped-eta", "mlp-plain-values", "steps as shipped", eta_max=None, eta_start=1 / 3),
        _add("mlp-64", "mlp-shipped-eta", "chunks of 64", chunk=64),
        _add("mlp-with-rope", "mlp-64", "rotary embedding", rope=True),
        _add("yaad", "mlp-with-rope", "convolutions start uniform in +-0.5: the first Yaad", conv_std=None),
    )
    _add("yaad-no-write", "yaad", "no writes", write=False)
    _add("yaad-l2", "yaad", "l2 loss", loss="l2")
    _add("yaad-unit", "yaad-l2", "steps up to 0.3 of the read", step="unit", eta_max=0.3)


_fill()
