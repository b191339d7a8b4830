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
"""What modules took from a config when they were built, so that a later edit of the config is not taken for theirs."""

import copy
from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig

from .config_choices import own_parameters
from .configuration_miras import MirasConfig


# Those that a model reads when it runs, or that say nothing about how it runs. Transformers resizes the vocabulary of
# config and modules together, and drafts that exit early set the number of layers for a while.
READ_WHEN_RUN = frozenset(
    {
        "base_model",
        "bos_token_id",
        "eos_token_id",
        "initializer_range",
        "license",
        "num_hidden_layers",
        "pad_token_id",
        "tie_word_embeddings",
        "use_cache",
        "vocab_size",
    }
)


def built_values(config: MirasConfig) -> dict[str, Any]:
    """The values that the modules of a model hold, copied."""
    inherited = {field.name for field in fields(PreTrainedConfig)} - {"chunk_size_feed_forward"}
    names = {field.name for field in fields(config)} - inherited - READ_WHEN_RUN
    if config.rope_parameters["rope_type"] == "default":
        names.discard("max_position_embeddings")
    return {name: copy.deepcopy(getattr(config, name)) for name in sorted(names | own_parameters(config).keys())}


def check_as_built(config: MirasConfig, built: dict[str, Any]) -> None:
    """
    Check that a config still says what a model was built with.

    Raises:
        `ValueError`: for a field that was assigned since, naming it and both values. Modules have copies of it, so the
            model would compute one thing, and its `config.json` say another.
    """
    # past the `__getattribute__` of Transformers' configs, which a decoded token would feel
    now = vars(config)
    for name, value in built.items():
        if now[name] is not value and now[name] != value:
            raise ValueError(
                f"`config.{name}` is {now[name]!r}, and the model was built with {value!r}, which it goes on with: set it "
                f"back, and build a model anew for another value, with `from_pretrained(path, {name}={now[name]!r})` or "
                "`from_config(config)`."
            )
