# Copyright 2026 The miras-hf authors.
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
"""The tables of names by which others know a model: what stands in them for Llama stands in them for us."""

from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS

import miras_hf
from miras_hf.modeling_miras import MirasRMSNorm
from miras_hf.peft import MODEL_TYPES


FAMILIES = {"miras": "Miras", "moneta": "Moneta", "yaad": "Yaad", "memora": "Memora"}
# `CONFIG_MAPPING_NAMES` is not among them: what stands there is looked for inside Transformers
TABLES = {name: x for name, x in vars(modeling_auto).items() if name.startswith("MODEL_") and name.endswith("_NAMES")}
# tasks for which there is no class of ours; the Auto class says so
WITHOUT_A_CLASS = {"MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES"}


def test_every_table_of_models_that_knows_llama_knows_ours():
    of_llama = {name for name, table in TABLES.items() if "llama" in table}
    assert {"MODEL_MAPPING_NAMES", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"} <= of_llama
    for name in of_llama - WITHOUT_A_CLASS:
        for model_type, family in FAMILIES.items():
            expected = TABLES[name]["llama"].replace("Llama", family)
            assert TABLES[name].get(model_type) == expected, name
            assert hasattr(miras_hf, expected)


def test_no_table_names_a_class_that_is_not_there():
    for name, table in TABLES.items():
        for model_type in MODEL_TYPES:
            if model_type in table:
                assert hasattr(miras_hf, table[model_type]), name


def test_norms_are_known_as_norms():
    assert MirasRMSNorm in ALL_LAYERNORM_LAYERS
