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
"""Test-time-memory language models for Hugging Face Transformers.

Importing this package registers Miras, Moneta, Yaad and Memora with the Auto classes.
"""

from .cache import MirasLayer
from .configuration_miras import MemoraConfig, MirasConfig, MonetaConfig, YaadConfig
from .convert import convert
from .modeling_miras import (
    MemoraForCausalLM,
    MemoraForSequenceClassification,
    MemoraForTokenClassification,
    MemoraModel,
    MirasForCausalLM,
    MirasForSequenceClassification,
    MirasForTokenClassification,
    MirasModel,
    MirasPreTrainedModel,
    MonetaForCausalLM,
    MonetaForSequenceClassification,
    MonetaForTokenClassification,
    MonetaModel,
    YaadForCausalLM,
    YaadForSequenceClassification,
    YaadForTokenClassification,
    YaadModel,
)
from .registration import register
from .rollback import detach, restore, snapshot
from .saved_memory import load_memory, save_memory
from .tokenization_miras import MirasTokenizer


__version__ = "0.1.0.dev0"


register()


__all__ = [
    "MemoraConfig",
    "MemoraForCausalLM",
    "MemoraForSequenceClassification",
    "MemoraForTokenClassification",
    "MemoraModel",
    "MirasConfig",
    "MirasForCausalLM",
    "MirasForSequenceClassification",
    "MirasForTokenClassification",
    "MirasLayer",
    "MirasModel",
    "MirasPreTrainedModel",
    "MirasTokenizer",
    "MonetaConfig",
    "MonetaForCausalLM",
    "MonetaForSequenceClassification",
    "MonetaForTokenClassification",
    "MonetaModel",
    "YaadConfig",
    "YaadForCausalLM",
    "YaadForSequenceClassification",
    "YaadForTokenClassification",
    "YaadModel",
    "convert",
    "detach",
    "load_memory",
    "restore",
    "save_memory",
    "snapshot",
]
