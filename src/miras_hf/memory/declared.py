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
"""What a choice takes is declared once, by the fields of its class: name, default, what is allowed, and the config's word.

Everything else follows from that: how a config is checked and stored, how a rule is built from it, what kernels are told,
and what cards and documents say.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any


@dataclass(frozen=True)
class Parameter:
    """A number, or one of a few words, that a choice takes.

    Args:
        key (`str`): the config's name for it.
        default (`float`, `int` or `str`): what it is unless given.
        low, above (`float`, *optional*): `low <= value`, or `above < value`.
        high (`float`, *optional*): largest value of a config, whose models compute in float32.
        one_of (`tuple` of `str`, *optional*): the words that are allowed.
        optional (`bool`): whether it may be `None`, for nothing.
        only_with (`dict`): values of other keys of the choice, or ranges of them, without which it means nothing.
        symbol (`str`, *optional*): the paper's letter for it.
    """

    key: str
    default: Any
    low: float | None = None
    high: float | None = None
    above: float | None = None
    one_of: tuple[str, ...] | None = None
    optional: bool = False
    only_with: Mapping[str, Any] = field(default_factory=dict)
    symbol: str | None = None

    @property
    def allowed(self) -> str:
        """In words, behind "must be"."""
        if self.one_of is not None:
            return f"one of {', '.join(map(repr, self.one_of))}"
        least = f"above {self.above:g}" if self.low is None else f"at least {self.low:g}"
        most = "" if self.high == math.inf else f" and at most {self.high:g}"
        return least + most + (", or None" if self.optional else "")

    def refusal(self, value: Any) -> str | None:
        """Why a config must not have a value, `None` if it may. NaN is within no bounds."""
        if self.one_of is not None:
            fits = value in self.one_of
        elif value is None:
            fits = self.optional
        else:
            fits = (self.above < value if self.low is None else self.low <= value) and value <= self.high
        return None if fits else f"must be {self.allowed}, got {value}"

    def without_limit(self) -> "Parameter":
        """For the mathematics, which float64 follows further than float32."""
        return self if self.high is None else replace(self, high=math.inf)

    def read(self, value: Any) -> Any:
        """A config's value, which may be an integer where the choice takes any number."""
        return float(value) if isinstance(self.default, float) and value is not None else value


def parameter(key: str, default: Any, low: float | None = None, high: float | None = None, **declared) -> Any:
    """A field of a choice. Arguments are those of [`Parameter`]."""
    return field(default=default, metadata={"parameter": Parameter(key, default, low, high, **declared)})


def is_made(value: Any, wanted: Any) -> bool:
    """Whether a config's value is the one that something means anything with, or one of a range."""
    return value in wanted if isinstance(wanted, range) else value == wanted


@dataclass(frozen=True)
class Choice:
    """Base class of the four choices: a frozen dataclass whose fields are all made by [`parameter`].

    Raises:
        `ValueError`: for a value that is not allowed, naming the field.
    """

    def __post_init__(self):
        for name, declared in self.parameters().items():
            refusal = declared.without_limit().refusal(getattr(self, name))
            if refusal is not None:
                raise ValueError(f"`{name}` {refusal}.")

    @classmethod
    def parameters(cls) -> dict[str, Parameter]:
        """What it takes, by the names of its fields."""
        return {f.name: f.metadata["parameter"] for f in fields(cls)}

    @classmethod
    def of_config(cls, config: Any) -> "Choice":
        """Built from the fields of a config."""
        return cls(**{name: p.read(getattr(config, p.key)) for name, p in cls.parameters().items()})

    def meaningful(self) -> dict[str, Any]:
        """What it takes and what that is here, by the paper's letters or the config's names, without what means nothing."""
        keys = self.keys()
        return {
            declared.symbol or f"`{declared.key}`": keys[declared.key]
            for declared in self.parameters().values()
            if all(is_made(keys.get(name, value), value) for name, value in declared.only_with.items())
        }

    def keys(self) -> dict[str, Any]:
        """Its values by the config's names."""
        return {declared.key: getattr(self, name) for name, declared in self.parameters().items()}
