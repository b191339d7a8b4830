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
"""Which modules PEFT's methods adapt when a user names none, so that `LoraConfig()` is enough; and what they cannot adapt."""

import sys
from collections.abc import Callable

from packaging.version import Version

from .compat import CACHE_NAME


MODEL_TYPES = ("miras", "moneta", "yaad", "memora")

# Where Llama's default is queries and values only. A memory writes keys and values, reads with queries, passes what it reads
# through a gate, and may have erase keys: its mixer learns little when one of them stands still.
MIXER_MODULES = ["q_proj", "k_proj", "v_proj", "e_proj", "g_proj", "o_proj"]


def register_peft_defaults() -> None:
    """Enters the Miras model types into PEFT's tables of default modules, if PEFT is loaded; never imports it.

    PEFT has no other way to learn defaults. Entries that are there already stay. Called by `MirasConfig.to_dict`, which
    is what PEFT calls right before it looks a model type up.
    """
    constants = sys.modules.get("peft.utils.constants")
    for name, table in list(vars(constants).items()) if constants is not None else ():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("_MODULES_MAPPING") and "llama" in table:
            for model_type in MODEL_TYPES:
                table.setdefault(model_type, _miras_modules(table["llama"]))


def _miras_modules(llama: list[str]) -> list[str]:
    if set(llama) == {"q_proj", "v_proj"}:
        return list(MIXER_MODULES)
    # the gates of a mixer have projections of the same names
    of_mlp = ("gate_proj", "up_proj", "down_proj")
    return [f"mlp.{name}" if name in of_mlp else name for name in llama]


def check_prompt_learning(prepare_inputs_for_generation: Callable) -> None:
    """
    Called by `generate()`, with the model's method that PEFT replaces by its own for prompt learning.

    Raises:
        `ValueError`: for prefix tuning, and for a PEFT that knows the cache of the installed Transformers by its old name
            only: it would put the prompt before every generated token, in silence.
    """
    adapted = getattr(prepare_inputs_for_generation, "__self__", None)
    config = getattr(adapted, "active_peft_config", None)
    if not getattr(config, "is_prompt_learning", False):
        return
    if config.peft_type == "PREFIX_TUNING":
        raise ValueError(
            "Generation with prefix tuning is not possible with Miras models: a memory has no keys and values to put "
            "before a text. Prompt tuning and LoRA are."
        )
    version = sys.modules["peft"].__version__
    if CACHE_NAME == "cache" and Version(version) < Version("0.22"):
        raise ValueError(
            f"Generation with prompt tuning needs PEFT 0.22 or newer with this version of Transformers, got {version}, "
            "which would put the prompt before every generated token. Transformers 5.23 and older go with it."
        )


class NotByParameter:
    """Mixed into modules whose bare parameters LoRA's `target_parameters` cannot adapt.

    PEFT wraps such a module for the length of its call, with one tensor that goes in. A memory is asked for more than
    that: for its initial state without any, and for what it computes with before it is called.
    """

    @property
    def is_transposed(self) -> bool:
        """What PEFT asks for when it is about to wrap a parameter, and nobody else. Raises a `ValueError`."""
        raise ValueError(
            "`target_parameters` must not name parameters of a memory (`initial_state`, `norm_weight`, `norm_bias`): "
            'LoRA cannot adapt them. `modules_to_save=["memory"]` trains them in full, beside adapters of other modules.'
        )
