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
"""Tables by which the ecosystem knows a model, and what stands in them for Miras models.

Filled here, by [`register`]:

| table | read by | decides |
|---|---|---|
| `AutoConfig`, `AutoTokenizer`, `AutoModel...` | everybody | which class loads a model type |
| `MODEL_FOR_CAUSAL_LM_MAPPING_NAMES` | `Trainer.compute_loss` | whether label smoothing shifts the labels |
| the same | model cards, `transformers serve` | the task, and what is listed as a language model |
| `MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES`, `..._TOKEN_...` | model cards | the task |
| `MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES` | `transformers serve` | that an Auto class loads the model |
| `MODEL_MAPPING_NAMES` | `Trainer` | filled for whom it asks, though it compares class names with model types |
| `ALL_LAYERNORM_LAYERS` | PEFT's LoRA+ | which modules are norms, whose weights do not decay |

Filled elsewhere, where what they hold is defined:

| table | filled in | decides |
|---|---|---|
| `DYNAMIC_LAYER_TYPE_MAPPING`, `STATIC_LAYER_TYPE_MAPPING` | `cache` | the cache layer of a layer type |
| names of layer types with `"linear_attention"` in them | `configuration_miras` | that sequences are not split |
| PEFT's `TRANSFORMERS_MODELS_TO_..._MODULES_MAPPING` | `peft` | which modules a method adapts |
| `ALL_PARALLEL_STYLES` | `parallel` | how tensor parallelism shards a memory |
| none; `Trainer.get_decay_parameter_names` is told | `weight_decay` | what decays |

Left alone on purpose: what stands in `CONFIG_MAPPING_NAMES` is imported from inside Transformers. `LOSS_MAPPING` matches
the ends of class names, which are the usual ones. `MODEL_FOR_QUESTION_ANSWERING` and `MODEL_FOR_PRETRAINING` have no
class of ours, and their Auto classes say so. Megatron's parsers and PEFT's adaption prompts refuse unknown model types by
name. PEFT's list of Mamba types forbids modules that we do not have, and the patches for quantisation, fusion and weight
conversion describe layers that we do not have.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS

from . import modeling_miras
from .configuration_miras import MemoraConfig, MirasConfig, MonetaConfig, YaadConfig
from .modeling_miras import MirasRMSNorm
from .tokenization_miras import MirasTokenizer


# Auto class, ending of our class names, and the table of names that goes with the Auto class: `register` of an Auto
# class fills the mapping of classes, and what asks for a name does not look there.
_AUTO_CLASSES = (
    (AutoModel, "Model", "MODEL_MAPPING_NAMES"),
    (AutoModelForCausalLM, "ForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    (AutoModelForMultimodalLM, "ForCausalLM", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES"),
    (
        AutoModelForSequenceClassification,
        "ForSequenceClassification",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    ),
    (AutoModelForTokenClassification, "ForTokenClassification", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES"),
)


def register() -> None:
    """Enters configurations, models, tokenizer and norms into the tables of Transformers. Called once, on import."""
    for config in (MirasConfig, MonetaConfig, YaadConfig, MemoraConfig):
        AutoConfig.register(config.model_type, config)
        AutoTokenizer.register(config, tokenizer_class=MirasTokenizer)
        family = config.__name__.removesuffix("Config")
        for auto_class, ending, table in _AUTO_CLASSES:
            model = getattr(modeling_miras, f"{family}{ending}")
            auto_class.register(config, model)
            getattr(modeling_auto, table)[config.model_type] = model.__name__
    ALL_LAYERNORM_LAYERS.append(MirasRMSNorm)
