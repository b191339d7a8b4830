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
"""The point of the Miras design space that a kernel is compiled for, in plain numbers and words."""

import math
from dataclasses import dataclass
from numbers import Real


MEMORIES = ("mlp", "matrix")
ATTENTIONAL_BIASES = ("l2", "lp", "huber_coordinate", "huber_norm", "huber_mixture")
# which of them take a threshold for each token, and whether it is a number for each head or may be one for each channel
THRESHOLDS = {"huber_coordinate": "channel", "huber_norm": "head", "huber_mixture": "head"}
RETENTION_GATES = ("decay", "lq", "lq_mirror", "kl")
LEARNING_ALGORITHMS = ("gradient_descent", "delta_rule", "implicit")
HEAD_DIMS = (32, 48, 64, 96, 128)
CHUNK_SIZES = (16, 32, 64)
# a chunk's gates are taken relative to the middle of its decay: exp(80) leaves float32 room for what it multiplies
LARGEST_CHUNK_LOG_DECAY = 160.0
# the smallest value of each number, and whether it has to be above it
_BOUNDS = {
    "expansion": (1, False),
    "norm_eps": (0, True),
    "residual_clip": (0, True),
    "lp_power": (1, False),
    "lp_sharpness": (0, True),
    "lp_error_cap": (0, True),
    "lq_power": (2, False),
    "lq_norm_floor": (0, True),
    "weight_cap": (0, True),
    "simplex_mass": (0, True),
}


@dataclass(frozen=True)
class Choices:
    """What a memory is and how it learns while it reads (arXiv 2504.13173).

    Args:
        memory (`str`): `"mlp"`, `x + LN(gelu(x W1) W2)`, or `"matrix"`, `x W`.
        attentional_bias (`str`): one of `ATTENTIONAL_BIASES`.
        retention (`str`): one of `RETENTION_GATES`.
        chunk_size (`int`): tokens whose gradients are taken at the same weights, one of `CHUNK_SIZES`.
        decay_target (`str`, *optional*, defaults to `"init"`): `"init"` or `"zero"`.
        min_log_alpha (`float`, *optional*, defaults to -2.5): lower bound of a token's log retention.
        expansion (`int`, *optional*, defaults to 4): hidden units of an MLP memory over the head's width.
        norm_eps (`float`, *optional*, defaults to 0.1): epsilon of its layer norm.
        residual_clip (`float`, *optional*, defaults to 3.0): largest root mean square of a token's residual.
        lp_power, lp_smooth_sign, lp_sharpness, lp_error_cap (*optional*): of the lp loss.
        lq_power, lq_norm_floor (`float`, *optional*, default to 4.0 and 0.01): of both lq maps.
        weight_cap (`float`, *optional*): largest root mean square of the weights, `None` for no cap; not used with KL.
        simplex_mass (`float`, *optional*, defaults to 2.0): KL's c over `hidden / sqrt(fan_in)`.
        update_layers (`str`, *optional*, defaults to `"all"`):
            The weights of an MLP memory that a text writes: `"all"`, or the `"last"` alone. The first one then stays the
            learned initial one, and has no part in states.
        learning_algorithm (`str`, *optional*, defaults to `"gradient_descent"`):
            Where a token's gradient is taken: `"gradient_descent"` at its chunk's start; `"delta_rule"` at its own time, after
            the decay, with steps of at most `2 / |k|^2`; or `"implicit"`, at the memory after the step, which is the delta
            rule with steps of `eta / (1 + eta |k|^2)`. The last two take a matrix memory with l2 loss, whose residuals they
            leave as long as they are, and decay.

    Raises:
        `ValueError`: for values that no kernel serves, naming the argument and what is allowed.
    """

    memory: str = "mlp"
    attentional_bias: str = "l2"
    retention: str = "decay"
    chunk_size: int = 64
    decay_target: str = "init"
    min_log_alpha: float = -2.5
    expansion: int = 4
    norm_eps: float = 0.1
    residual_clip: float = 3.0
    lp_power: float = 3.0
    lp_smooth_sign: bool = False
    lp_sharpness: float = 10.0
    lp_error_cap: float = 4.0
    lq_power: float = 4.0
    lq_norm_floor: float = 0.01
    weight_cap: float | None = 2.0
    simplex_mass: float = 2.0
    update_layers: str = "all"
    learning_algorithm: str = "gradient_descent"

    def __post_init__(self):
        allowed = {
            "memory": MEMORIES,
            "attentional_bias": ATTENTIONAL_BIASES,
            "retention": RETENTION_GATES,
            "chunk_size": CHUNK_SIZES,
            "decay_target": ("init", "zero"),
            "update_layers": ("all", "last") if self.memory == "mlp" else ("all",),
            "learning_algorithm": LEARNING_ALGORITHMS,
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"`{name}` must be one of {values}, got {getattr(self, name)!r}.")
        if self.learning_algorithm != "gradient_descent":
            for name, value in (("memory", "matrix"), ("attentional_bias", "l2"), ("retention", "decay")):
                if getattr(self, name) != value:
                    raise ValueError(
                        f"`{name}` must be {value!r} with `learning_algorithm={self.learning_algorithm!r}`, got "
                        f"{getattr(self, name)!r}."
                    )
        for name, (smallest, strict) in _BOUNDS.items():
            value = getattr(self, name)
            if name == "weight_cap" and value is None:
                continue
            # NaN compares with nothing
            fits = isinstance(value, Real) and not isinstance(value, bool) and smallest <= value < math.inf
            if not fits or (strict and value == smallest):
                raise ValueError(
                    f"`{name}` must be a finite number {'above' if strict else 'of at least'} {smallest}, got {value!r}."
                )
        if not isinstance(self.expansion, int):
            raise ValueError(f"`expansion` must be an integer, got {self.expansion!r}.")
        if not isinstance(self.lp_smooth_sign, bool):
            raise ValueError(f"`lp_smooth_sign` must be a bool, got {self.lp_smooth_sign!r}.")
        lowest = -LARGEST_CHUNK_LOG_DECAY / self.chunk_size
        if not isinstance(self.min_log_alpha, Real) or not lowest <= self.min_log_alpha <= 0:
            raise ValueError(f"`min_log_alpha` must lie between {lowest:g} and 0, got {self.min_log_alpha!r}.")

    @property
    def family(self) -> str:
        """What the names of its kernels begin with: `"mlp"` and `"matrix"`, or `"delta"` for gradients token by token."""
        return self.memory if self.learning_algorithm == "gradient_descent" else "delta"

    @property
    def threshold(self) -> str | None:
        """What the attentional bias's threshold `delta` may be a number for: `"head"`, `"channel"` (or head), `None` for a
        bias that has no threshold."""
        return THRESHOLDS.get(self.attentional_bias)

    def weight_shapes(self, head_dim: int) -> tuple[tuple[int, int], ...]:
        """Shapes `[in, out]` of the memory's weights."""
        if self.memory == "matrix":
            return ((head_dim, head_dim),)
        hidden = self.expansion * head_dim
        return (head_dim, hidden), (hidden, head_dim)

    @property
    def fixed(self) -> int:
        """How many of the weights, the first ones, no text writes."""
        return 1 if self.update_layers == "last" else 0


def padded(head_dim: int) -> int:
    """Channels of a tile that holds a head's."""
    return max(16, 1 << (head_dim - 1).bit_length())
