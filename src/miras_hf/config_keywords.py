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
"""Which keywords a config knows besides its fields, and which it leaves to others."""

from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import logging

from .memory.registry import declared_keys


logger = logging.get_logger(__name__)

# What Transformers passes to configs, or stores in config.json, beside the fields.
TRANSFORMERS_KEYWORDS = frozenset(
    {
        "_attn_implementation_internal",
        "_commit_hash",
        "_experts_implementation_internal",
        "_name_or_path",
        "attn_implementation",
        "auto_map",
        "base_model_ep_plan",
        "base_model_fsdp_plan",
        "base_model_pp_plan",
        "base_model_tp_plan",
        "custom_pipelines",
        "distributed_config",
        "layer_types",
        "loss_type",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "quantization_config",
        "rope_scaling",
        "rope_theta",
        "tie_last_hidden_states",
        "torch_dtype",
        "transformers_weights",
    }
)
# What Transformers' `from_pretrained` of models and tokenizers, pipelines and servers take, and hand to configs on their way.
LOADERS_KEYWORDS = frozenset(
    {
        *PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES,
        "_configuration_file",
        "_fast_init",
        "adapter_kwargs",
        "adapter_name",
        "added_tokens_decoder",
        "add_bos_token",
        "add_eos_token",
        "additional_special_tokens",
        "allow_all_kernels",
        "backend",
        "cache_dir",
        "chat_control_tokens",
        "chat_template",
        "clean_up_tokenization_spaces",
        "code_revision",
        "config",
        "device_map",
        "device_mesh",
        "disable_mmap",
        "distributed_config",
        "dtype",
        "extra_special_tokens",
        "force_download",
        "from_flax",
        "from_slow",
        "from_tf",
        "fusion_config",
        "generation_config",
        "gguf_file",
        "ignore_mismatched_sizes",
        "kernel_config",
        "key_mapping",
        "legacy",
        "local_files_only",
        "low_cpu_mem_usage",
        "max_len",
        "max_memory",
        "mirror",
        "model_input_names",
        "model_max_length",
        "offload_buffers",
        "offload_folder",
        "offload_state_dict",
        "output_loading_info",
        "padding_side",
        "processor_class",
        "proxies",
        "quantization_config",
        "response_schema",
        "response_template",
        "revision",
        "split_special_tokens",
        "state_dict",
        "subfolder",
        "token",
        "tokenizer_file",
        "tokenizer_type",
        "torch_dtype",
        "tp_plan",
        "tp_size",
        "tqdm_class",
        "truncation_side",
        "trust_remote_code",
        "use_fast",
        "use_kernels",
        "use_safetensors",
        "variant",
        "verbose",
        "weights_only",
    }
)
# Those that are the same as not given, and what they would ask for.
MEANINGLESS = {
    "experts_implementation": "there are no experts",
    "partial_rotary_factor": "all channels of a head are rotated",
    "per_layer_config": "all layers have the sizes of the config",
}


class UnexpectedKeywordError(TypeError, ValueError):
    """A keyword that nobody knows. `AutoTokenizer` and `AutoProcessor` hand all that is meant for them to a config by the
    way, and do without the config after a `ValueError`."""


def check_keywords(config: PreTrainedConfig, keywords: dict[str, Any]) -> None:
    """
    Check the keywords that are no fields of a config.

    Raises:
        `TypeError`: for a keyword that means nothing here, by name and with the nearest one that does.
    """
    name_of_class, known = type(config).__name__, _known_keywords(config)
    for name, value in keywords.items():
        if name in MEANINGLESS:
            if value is not None and value != 1:
                raise TypeError(f"`{name}` means nothing to {name_of_class}, got {value!r}: {MEANINGLESS[name]}.")
        elif name not in known:
            raise TypeError(f"{name_of_class} does not know `{name}` (got {value!r}): {_hint(name, known)}")


def refuse_unused(config: PreTrainedConfig, keywords: dict[str, Any]) -> None:
    """
    Refuse the keywords that are left when a config was loaded, which Transformers would drop without a word.

    Raises:
        `TypeError`: unless they are meant for those who load models or tokenizers, by name and with the nearest field.
    """
    names = {field.name for field in fields(config)}
    for name, value in keywords.items():
        if name not in LOADERS_KEYWORDS and not name.startswith("_"):
            raise UnexpectedKeywordError(
                f"{type(config).__name__} does not know `{name}` (got {value!r}) when it is loaded: {_hint(name, names)}"
            )


def refuse_model_keywords(model_class: type, config: Any, keywords: dict[str, Any]) -> None:
    """Raises a `TypeError` for a keyword of a model, which has none but its config, with the nearest field of that."""
    names = {field.name for field in fields(config)} if isinstance(config, PreTrainedConfig) else set()
    for name, value in keywords.items():
        hint = "it belongs into the config" if name in names else _hint(name, names)
        raise TypeError(f"{model_class.__name__} does not know `{name}` (got {value!r}): {hint}")


def without_unknown(config: PreTrainedConfig, values: dict[str, Any]) -> dict[str, Any]:
    """The values without those that a config of this class would refuse: attributes that somebody has put on it. A warning
    names them."""
    known = _known_keywords(config)
    unknown = sorted(name for name in values if name not in known and not name.startswith("_"))
    if unknown:
        logger.warning_once(
            f"{type(config).__name__} has attributes that are no fields of it, and does not store them: {unknown}."
        )
    return {name: value for name, value in values.items() if name in known}


def _hint(name: str, known: set[str]) -> str:
    if name in GenerationConfig._get_default_generation_params():
        return "it belongs into `model.generation_config`, or into the call of `generate()`"
    near = ["rope_parameters"] if name == "rope_theta" else get_close_matches(name, known, n=1)
    return f"did you mean `{near[0]}`?" if near else "it is no field of this version of miras-hf"


def _known_keywords(config: PreTrainedConfig) -> set[str]:
    # of configs derived elsewhere: other names for fields
    return {*(field.name for field in fields(config)), *declared_keys(), *TRANSFORMERS_KEYWORDS, *config.attribute_map}
