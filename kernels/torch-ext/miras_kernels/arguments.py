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
"""What kernels are handed: records of tensors and of constants. A field that is `None` is not there.

Sizes that change from call to call, a row's length and the number of heads, are no fields: Triton makes other programs of
numbers in a record that are 1 or divisible by 16.
"""

import functools
import math
from typing import Any, NamedTuple

import triton.language as tl

from .choices import ATTENTIONAL_BIASES, LEARNING_ALGORITHMS, RETENTION_GATES, Choices, padded
from .configuration import INTERPRETED


class Tokens(NamedTuple):
    """Of all rows, [tokens, heads, ...]."""

    q: Any
    k: Any
    v: Any
    eta: Any
    log_alpha: Any
    delta: Any


class Rows(NamedTuple):
    """Where each row's tokens are: one after the other, pads behind them."""

    starts: Any
    lengths: Any
    phases: Any  # None: no row goes on in the middle of a chunk


class Slots(NamedTuple):
    """Factors and gates of a chunk that a call has begun, inputs and gradients of each weight."""

    inputs: Any
    gradients: Any
    eta: Any
    log_decay: Any


class Saved(NamedTuple):
    """Dual states at every so-manyth chunk's start, and the first slot of each row."""

    duals: Any
    of_row: Any


class Raw(NamedTuple):
    """What stands between a layer's projections and a token that is decoded: convolutions, rotary embedding, activations."""

    tail: Any
    weights: Any  # of queries, keys and values
    cos: Any
    sin: Any
    a_log: Any
    eta_max: Any
    K: tl.constexpr  # taps of a convolution, and the next power of two
    KP: tl.constexpr
    VALUE_SCALE: tl.constexpr  # 0: values keep their norm


class Norm(NamedTuple):
    """The layer norm of an MLP memory."""

    weight: Any
    bias: Any
    EPS: tl.constexpr


class Scratch(NamedTuple):
    """What a backward pass keeps for itself, of each program. A matrix memory has no hidden units."""

    hidden: Any  # [N, C], four of them
    weight_bar: Any  # of each weight, in its shape
    read_bar: Any  # [N, D]
    link_bar: Any  # of each weight: the adjoint of the initial memory's image, of the mirror map
    slope_bar: Any  # of each weight, [N]: that of its slope's means
    rows: Any  # of a chunk, as many places as `places` says


class Sizes(NamedTuple):
    """A chunk's tokens, a head's channels, the next power of two, the memory's hidden units; weights that no text writes;
    numbers of a gate and of a threshold; what products take."""

    C: tl.constexpr
    D: tl.constexpr
    BD: tl.constexpr
    N: tl.constexpr
    FIXED: tl.constexpr
    GATE_DIM: tl.constexpr
    DELTA_DIM: tl.constexpr
    PRECISION: tl.constexpr


class Loss(NamedTuple):
    KIND: tl.constexpr
    POWER: tl.constexpr
    SMOOTH_SIGN: tl.constexpr
    SHARPNESS: tl.constexpr
    ERROR_CAP: tl.constexpr
    CLIP: tl.constexpr
    STEP: tl.constexpr  # how `triangular.py` bounds steps


class Link(NamedTuple):
    KIND: tl.constexpr
    Q: tl.constexpr
    FLOOR: tl.constexpr
    CAP: tl.constexpr
    TOWARD_INIT: tl.constexpr
    masses: Any  # of each weight
    min_log_alpha: Any


@functools.lru_cache(maxsize=None, typed=True)
def constant(value: Any) -> Any:
    """A value that a program is compiled for. The interpreter takes numbers of a record for tensors, but not fractions, and
    would not find a tensor that stands behind a constant in a quotient or a product."""
    return value if INTERPRETED and isinstance(value, (float, str)) else tl.constexpr(value)


@functools.cache
def records_of(
    choices: Choices, head_dim: int, gate_dim: int, delta_dim: int, products: str
) -> tuple[Loss, Link, Sizes]:
    """The records that a rule and a call's sizes decide, once for each combination."""
    width = head_dim if choices.memory == "matrix" else choices.expansion * head_dim
    loss = Loss(
        KIND=constant(ATTENTIONAL_BIASES.index(choices.attentional_bias)),
        POWER=constant(float(choices.lp_power)),
        SMOOTH_SIGN=constant(choices.lp_smooth_sign),
        SHARPNESS=constant(float(choices.lp_sharpness)),
        ERROR_CAP=constant(float(choices.lp_error_cap)),
        CLIP=constant(choices.residual_clip * math.sqrt(head_dim)),
        STEP=constant(LEARNING_ALGORITHMS.index(choices.learning_algorithm)),
    )
    link = Link(
        KIND=constant(RETENTION_GATES.index(choices.retention)),
        Q=constant(float(choices.lq_power)),
        FLOOR=constant(float(choices.lq_norm_floor)),
        CAP=constant(float(choices.weight_cap or 0.0)),
        TOWARD_INIT=constant(choices.decay_target == "init"),
        masses=tuple(
            choices.simplex_mass * width / math.sqrt(fan_in) for fan_in, _ in choices.weight_shapes(head_dim)
        ),
        min_log_alpha=float(choices.min_log_alpha),
    )
    sizes = Sizes(
        C=constant(choices.chunk_size),
        D=constant(head_dim),
        BD=constant(padded(head_dim)),
        N=constant(width),
        FIXED=constant(choices.fixed),
        GATE_DIM=constant(gate_dim),
        DELTA_DIM=constant(delta_dim),
        PRECISION=constant(products),
    )
    return loss, link, sizes


def slots_of(factors: list[Any]) -> Slots | None:
    """A state's factors and gates, in its order; `None` of none."""
    if not factors:
        return None
    layers = len(factors) // 2 - 1
    return Slots(tuple(factors[:layers]), tuple(factors[layers : 2 * layers]), *factors[2 * layers :])
