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
"""Configs of ours in the JSON of a training, so that one whose defaults have changed since is not taken for today's."""

import math
from dataclasses import fields
from typing import Any

from study import plain
from transformers import AutoConfig, PreTrainedConfig

from miras_hf import MirasConfig
from miras_hf.config_meaning import ROUNDING


def config_fields(config: MirasConfig) -> dict[str, Any]:
    """The fields that are the library's own, but for the width of the MLP: it follows from the others, and to know it
    takes models."""
    inherited = {f.name for f in fields(PreTrainedConfig)}
    own = {f.name for f in fields(config)} - inherited - {"intermediate_size"}
    return {"model_type": config.model_type, **{field: getattr(config, field) for field in sorted(own)}}


def means_the_same(stored: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether two of `config_fields`, the first from a file, are of the same model.

    Fields that configs have since are as the library reads them of old checkpoints. Numbers may differ by rounding: some
    defaults are measured, and processors round otherwise.
    """
    values = {name: value for name, value in stored.items() if name != "model_type"}
    if not stored.keys() <= now.keys():
        return False
    read = AutoConfig.for_model(stored["model_type"]).from_dict(values | {"transformers_version": ""})
    then = {"model_type": stored["model_type"], **{name: getattr(read, name) for name in now if name != "model_type"}}
    return _same(plain(then), plain(now))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=ROUNDING)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)
    return a == b
