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
"""The four choices by the names that a config gives them, and how a choice of your own gets a name."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from .architecture import MEMORY_ARCHITECTURES, MemoryArchitecture
from .attentional_bias import ATTENTIONAL_BIASES, AttentionalBias
from .declared import Choice, Parameter
from .delta_rule import DeltaRule, Implicit
from .exact import Exact
from .learning import GradientDescent, LearningAlgorithm, Momentum
from .retention import RETENTION_GATES, RetentionGate


LEARNING_ALGORITHMS: dict[str, type[LearningAlgorithm]] = {
    "gradient_descent": GradientDescent,
    "momentum": Momentum,
    "delta_rule": DeltaRule,
    "implicit": Implicit,
    "exact": Exact,
}

CHOICES: dict[str, dict[str, Any]] = {
    "memory_architecture": MEMORY_ARCHITECTURES,
    "attentional_bias": ATTENTIONAL_BIASES,
    "retention": RETENTION_GATES,
    "learning_algorithm": LEARNING_ALGORITHMS,
}
"""The config's field of each choice, and its classes by name."""

REGISTERED_BY = {
    "memory_architecture": "register_memory_architecture",
    "attentional_bias": "register_attentional_bias",
    "retention": "register_retention_gate",
}
"""What gives a class of your own a name in that field; algorithms share the layout of the state with all forms."""

_OF_THE_LIBRARY = {field: frozenset(table) for field, table in CHOICES.items()}
_ITS_KEYS = frozenset(p.key for table in CHOICES.values() for cls in table.values() for p in cls.parameters().values())


def chosen(config: Any, field: str) -> Any:
    """The class that a config chooses."""
    # the two maps of lq retention are two classes
    return CHOICES[field][getattr(config, "retention_gate" if field == "retention" else field)]


def choice_of(config: Any, field: str) -> Any:
    """A config's choice, with what the config says about it."""
    return chosen(config, field).of_config(config)


def declared_keys() -> dict[str, Parameter]:
    """All that choices take, by the config's names."""
    return {p.key: p for table in CHOICES.values() for cls in table.values() for p in cls.parameters().values()}


def register_attentional_bias(name: str) -> Callable[[type[AttentionalBias]], type[AttentionalBias]]:
    """A decorator that gives a loss of your own a name, by which configs choose it.

    The class is a frozen dataclass and has `gradient`; its fields are made by [`parameter`], whose keys begin with the name
    and become keywords of configs. Models with it run on PyTorch, differentiated by autograd. Register it before a
    checkpoint that uses it is loaded.

    Raises:
        `TypeError`: for a class that is none of these.
        `ValueError`: for a name that the library uses, and for a key that does not begin with the name.
    """
    return _register("attentional_bias", name, AttentionalBias, ("gradient",))


def register_retention_gate(name: str) -> Callable[[type[RetentionGate]], type[RetentionGate]]:
    """As [`register_attentional_bias`], for a link with `link`, `at_chunk_start` and `inverse`."""
    return _register("retention", name, RetentionGate, ("link", "at_chunk_start", "inverse"))


def register_memory_architecture(name: str) -> Callable[[type[MemoryArchitecture]], type[MemoryArchitecture]]:
    """As [`register_attentional_bias`], for a memory of one or two layers with `weight_shapes`, `read`, `write` and
    `gate_axes`. Configs with it give `eta_max`: nobody has derived a default."""
    return _register("memory_architecture", name, MemoryArchitecture, ("weight_shapes", "read", "write", "gate_axes"))


def _register(field: str, name: str, base: type[Choice], wanted: tuple[str, ...]) -> Callable[[Any], Any]:
    def register(cls: Any) -> Any:
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"`name` must be a word that could name a variable, got {name!r}.")
        if name in _OF_THE_LIBRARY[field]:
            raise ValueError(f"`name` must be none of the library's, {sorted(_OF_THE_LIBRARY[field])}, got {name!r}.")
        if not (isinstance(cls, type) and issubclass(cls, base)):
            raise TypeError(f"{cls!r} must be a class derived from `{base.__name__}`.")
        params = cls.__dict__.get("__dataclass_params__")
        if params is None or not params.frozen:
            raise TypeError(f"`{cls.__name__}` must be decorated by `dataclass(frozen=True)`.")
        missing = [part for part in wanted if getattr(cls, part, None) is getattr(base, part, None)]
        if missing:
            raise TypeError(f"`{cls.__name__}` must have {', '.join(f'`{part}`' for part in missing)}.")
        plain = [f.name for f in fields(cls) if "parameter" not in f.metadata]
        if plain:
            raise TypeError(f"The fields {plain} of `{cls.__name__}` must be made by `parameter`.")
        for declared in cls.parameters().values():
            if declared.key not in _ITS_KEYS and not declared.key.startswith(f"{name}_"):
                raise ValueError(f"`key` must begin with '{name}_', got {declared.key!r}.")
        # those derived from an architecture of the library may have its property
        axes = () if isinstance(getattr(cls, "gate_axes", ()), property) else getattr(cls, "gate_axes", None)
        if field == "memory_architecture" and axes != () and (len(axes) > 2 or {*axes} - {"input", "output"}):
            raise TypeError(
                f"`gate_axes` of `{cls.__name__}` must be one or two of 'input' and 'output', got {cls.gate_axes}."
            )
        CHOICES[field][name] = cls
        return cls

    return register
