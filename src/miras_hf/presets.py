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
"""Published models as points of the Miras design space: what a config of theirs says, and what their inputs are here.

A point is what stands in `MirasConfig`'s fields about the memory. It is proven to be the model's recurrence, on random inputs,
against code that is not ours (`modeling_tests/test_presets.py`). The layer around it is this library's: convolutions, queries
and keys of norm 1, the gated norm after it. `table()` is that of `docs/design_space.md`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A published model as a point of the design space.

    Args:
        title (`str`): its name and where it is published.
        recurrence (`str`): what it publishes, in rows: S is the state, `[key, value]`.
        inputs (`str`): what its numbers are here, the step eta and the retention alpha among them.
        differs (`str`): what the preset's model does in another way, or nothing.
        oracle (`str`): which of Transformers' models has code of it that the tests compare with, or nothing.
        fields (`dict`): the fields of its config.
    """

    title: str
    recurrence: str
    inputs: str
    differs: str
    oracle: str
    fields: Mapping[str, Any] = field(default_factory=dict)


# no guard, and nothing that the published recurrences do not have; a factor of one in float32 is no retention at all
_MATRIX = {
    "memory_architecture": "matrix",
    "residual_clip": None,
    "weight_cap": None,
    "decay_target": "zero",
    "initial_memory_scale": 0.0,
    "use_rope": False,
    "value_norm": False,
    "output_norm_eps": None,
}
# steps are those of heads of 64 channels, as all its models have
_TTT = {
    **_MATRIX,
    "memory_architecture": "mlp",
    "memory_norm_eps": 1e-6,
    "initial_memory_scale": 1.0,
    "chunk_size": 16,
    "gate_granularity": "head",
}
_TTT_DIFFERS = (
    "without biases, which it writes as well, and without the factor that it learns for a token's place in its mini-batch, "
    "with which a write counts differently for every later read; eta is that of heads of 64; weights start at a "
    "deviation of {start}, not 0.02; no rotary embedding"
)
_KEEPS_ALL = {"retention": "none"}
_HEBBIAN = {**_MATRIX, "attentional_bias": "dot", "eta_max": 1.0}
_DELTA = {**_MATRIX, "learning_algorithm": "delta_rule", "eta_max": 1.0}

MODELS: Mapping[str, Preset] = MappingProxyType(
    {
        "linear-attention": Preset(
            "Linear attention (arXiv 2006.16236)",
            "S = S + k^T v",
            "eta = 1, alpha = 1",
            "without its normaliser, as in later models",
            "minimax",
            {**_HEBBIAN, **_KEEPS_ALL, "learned_step": False, "gate_granularity": "head"},
        ),
        "retnet": Preset(
            "RetNet (arXiv 2307.08621)",
            "S = gamma_h S + k^T v",
            "eta = 1, alpha = gamma_h",
            "its gamma_h = 1 - 2^(-5-h) stand for half-lives of about 2^(5+h) ln 2, which are spread alike here",
            "",
            {
                **_HEBBIAN,
                "learned_step": False,
                "learned_retention": False,
                "gate_granularity": "head",
                "min_half_life": 22.0,
                "max_half_life": 726817.0,
                "use_rope": True,
            },
        ),
        "lightning": Preset(
            "Lightning attention, MiniMax (arXiv 2501.08313)",
            "S = exp(-s_h) S + k^T v",
            "eta = 1, log alpha = -s_h",
            "its slopes fall from layer to layer, which are the same in all layers here",
            "minimax",
            {
                **_HEBBIAN,
                "learned_step": False,
                "learned_retention": False,
                "gate_granularity": "head",
                "min_half_life": 1.0,
                "max_half_life": 177.0,
            },
        ),
        "gla": Preset(
            "Gated linear attention (arXiv 2312.06635)",
            "S = diag(alpha) S + k^T v",
            "eta = 1; its log alpha = logsigmoid(x) / 16 is `-exp(a_log) softplus(-x)` with `a_log = -log 16`",
            "`a_log` is learned",
            "",
            {**_HEBBIAN, "learned_step": False, "gate_granularity": "channel"},
        ),
        "hgrn2": Preset(
            "HGRN2 (arXiv 2404.07904)",
            "S = diag(f) S + (1 - f)^T v",
            "eta = 1, alpha = f, k = 1 - alpha (`tied_write_key`); its f = sigmoid(x) is `-exp(a_log) softplus(-x)` with "
            "`a_log = 0`",
            "its forget gates have a lower bound that grows from layer to layer, which here are cut at `min_log_alpha`; "
            "`a_log` is learned",
            "",
            {**_HEBBIAN, "learned_step": False, "gate_granularity": "channel", "tied_write_key": True},
        ),
        "mamba2": Preset(
            "Mamba2 (arXiv 2405.21060)",
            "S = exp(Delta a) S + Delta B^T x, y = C S + D x",
            "k = B, v = x, q = C, of any norm (`query_key_norm=False`), eta = Delta = softplus(.), log alpha = Delta a "
            "(`tied_step`); B and C are those of all heads (`memory_num_query_key_heads`), D x is `value_skip`, its norm takes all heads together, after the gate",
            "convolutions of B and C are every head's own; states are as wide as heads; a starts at -1, Delta from half-lives",
            "mamba2",
            {
                **_HEBBIAN,
                "gate_granularity": "head",
                "memory_num_query_key_heads": 1,
                "tied_step": True,
                # none, as far as a field can say so
                "eta_max": 1e3,
                "query_key_norm": False,
                "conv_bias": True,
                "value_skip": True,
                "output_gate_first": True,
                "output_norm_groups": 1,
            },
        ),
        "deltanet": Preset(
            "DeltaNet (arXiv 2406.06484)",
            "S = S - beta k^T (k S - v)",
            "eta = beta, alpha = 1",
            "",
            "qwen3_next",
            {**_DELTA, **_KEEPS_ALL, "gate_granularity": "head"},
        ),
        "gated-deltanet": Preset(
            "Gated DeltaNet (arXiv 2412.06464), Qwen3-Next",
            "S = alpha S, then S = S - beta k^T (k S - v)",
            "eta = beta, log alpha = g; a query over sqrt(d) is an epsilon times d in the norm after the memory",
            "",
            "qwen3_next",
            {**_DELTA, "gate_granularity": "head"},
        ),
        "kda": Preset(
            "Kimi Delta Attention (arXiv 2510.26692)",
            "S = diag(alpha) S, then S = S - beta k^T (k S - v)",
            "eta = beta, log alpha = g, one a channel of the key; queries as of Gated DeltaNet",
            "",
            "kimi_linear",
            {**_DELTA, "gate_granularity": "channel"},
        ),
        "delta-product": Preset(
            "Gated DeltaProduct (arXiv 2502.10297)",
            "S = alpha S, then S = S - beta_j k_j^T (k_j S - v_j) for j = 1 to n",
            "eta_j = beta_j, up to 2, log alpha = g; n is `writes_per_token`, and the memory reads n tokens for each of the "
            "text, the first with alpha; without alpha, that of `deltanet` with `writes_per_token`",
            "",
            "",
            {**_DELTA, "gate_granularity": "head", "eta_max": 2.0, "writes_per_token": 2},
        ),
        "rwkv-7": Preset(
            "RWKV-7's state update (arXiv 2503.14456)",
            "S = diag(w) S - (a o e)^T (e S') + k^T v, S' the state before",
            "e = kappa^, alpha = w, a = a, k = k~, eta = 1; the memory reads two tokens for each of the text, an erasure with alpha "
            "and a write without",
            "erase keys, keys and values have projections of their own, where RWKV-7 makes the first two of one; its w is at "
            "least exp(-0.61), which here is cut at `min_log_alpha`; no bonus of a token's own value",
            "",
            {
                **_DELTA,
                "gradient_at": "previous",
                "erase_key": "own",
                "gate_granularity": "channel",
                "learned_step": False,
            },
        ),
        "longhorn": Preset(
            "Longhorn (arXiv 2407.14207)",
            "S = argmin |S - S'|^2 + beta |k S - v|^2, S' the state before",
            "eta = beta, alpha = 1",
            "one beta a head, where Longhorn has one a channel of the value",
            "",
            {**_DELTA, **_KEEPS_ALL, "learning_algorithm": "implicit", "gate_granularity": "head"},
        ),
        "mesa": Preset(
            "Mesa layer (arXiv 2506.05233)",
            "H = alpha H + beta k^T k, G = alpha G + beta k^T v, y = q (H + Lambda)^(-1) G",
            "eta = beta, log alpha = log gamma; its gamma = sigmoid(x) is `-exp(a_log) softplus(-x)` with `a_log = 0`; Lambda is "
            "`ridge_floor + softplus(.)` of logits that are learned, one a channel of the key, and starts at 1",
            "the system is solved, where it takes up to 30 steps of conjugate gradients; values have a convolution; `a_log` is "
            "learned",
            "",
            {**_MATRIX, "learning_algorithm": "exact", "eta_max": 1.0, "gate_granularity": "head"},
        ),
        "ttt-linear": Preset(
            "TTT-Linear (arXiv 2407.04620)",
            "W = W - eta dloss(W')/dW', W' the one before the mini-batch, loss = |LN(k W') - (v - k)|^2 / 2, y = q + LN(q W)",
            "eta = sigmoid(.) / d, alpha = 1; mini-batches are chunks of 16",
            _TTT_DIFFERS.format(start="1 / sqrt(d)"),
            "",
            {**_TTT, **_KEEPS_ALL, "memory_depth": 1, "eta_max": 1.0 / 64},
        ),
        "ttt-mlp": Preset(
            "TTT-MLP (arXiv 2407.04620)",
            "the same of both weights, y = q + LN(gelu(q W1) W2)",
            "eta = 0.1 sigmoid(.) / d, alpha = 1; mini-batches are chunks of 16",
            _TTT_DIFFERS.format(start="2 / sqrt(d) and 1 / sqrt(4 d)"),
            "",
            {**_TTT, **_KEEPS_ALL, "eta_max": 0.1 / 64},
        ),
        "titans-lmm": Preset(
            "Titans, long-term memory (arXiv 2501.00663)",
            "S = theta S - eta dloss(M)/dM, M = alpha M + S",
            "eta, log momentum = log theta, alpha is its 1 - alpha; at `chunk_size=1` token by token, else at chunk starts",
            "one number a head for all three; the MLP is that of Miras, with layer norm and residual; `memory_depth` is its L_M",
            "",
            {
                "memory_architecture": "mlp",
                "attentional_bias": "l2",
                "residual_clip": None,
                "retention": "decay",
                "weight_cap": None,
                "decay_target": "zero",
                "learning_algorithm": "momentum",
                "gate_granularity": "head",
                "use_rope": False,
            },
        ),
    }
)
"""By the names that `MirasConfig.from_preset` takes besides sizes."""

NOT_EXPRESSED: Mapping[str, str] = MappingProxyType(
    {
        "Softmax attention": "it is no parametric memory: it keeps all keys and values",
        "Memory Caching (arXiv 2602.24281)": "a token reads a gated sum of memories as they were at the ends of segments: a layer "
        "here has one memory, and its cache one state; not built",
        "Atlas (arXiv 2505.23735)": "its loss is a sum over a window of tokens, and keys are polynomials; not built",
    }
)
"""Models of the paper's table 1 and its neighbours that are no points of this space, and why."""


def table() -> str:
    """`MODELS` and `NOT_EXPRESSED` in Markdown."""
    from .backend import kernel_choices
    from .configuration_miras import MirasConfig
    from .modeling_miras import memory_rule

    head = [
        "model",
        "architecture",
        "bias",
        "retention",
        "algorithm",
        "preset",
        "recurrence",
        "inputs",
        "the model differs",
        "proven with",
    ]
    rows = [[*head, "kernels"], ["---"] * (len(head) + 1)]
    for name, preset in MODELS.items():
        config = MirasConfig.from_preset(name)
        kernel = kernel_choices(memory_rule(config), config.writes_per_token)[1] or "yes"
        made = (config.memory_architecture, config.attentional_bias, config.retention, config.learning_algorithm)
        proof = "its equation" + (f", Transformers' `{preset.oracle}`" if preset.oracle else "")
        texts = (preset.recurrence, preset.inputs, preset.differs, proof)
        rows.append([preset.title, *map(_code, made), _code(name), *(_cell(text) for text in texts), kernel])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    others = [f"| {title} | {why} |" for title, why in NOT_EXPRESSED.items()]
    return "\n".join([*lines, "", "| no point | why |", "| --- | --- |", *others])


def _code(text: str) -> str:
    return f"`{text}`"


def _cell(text: str) -> str:
    # the bars of norms would end a cell
    return text.replace("|", "\\|")
