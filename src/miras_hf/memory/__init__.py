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
"""The mathematics of Miras memories in pure PyTorch: the four choices, and one function per form of the recurrence.

`naive.py` is where to begin: one head that reads one text, in forty lines."""

from .architecture import (
    MEMORY_ARCHITECTURES,
    Factors,
    GatedMLPMemory,
    MatrixMemory,
    MemoryArchitecture,
    MLPMemory,
    VectorMemory,
)
from .attentional_bias import (
    ATTENTIONAL_BIASES,
    L1,
    L2,
    AttentionalBias,
    Dot,
    HuberCoordinate,
    HuberMixture,
    HuberNorm,
    Lp,
    Robust,
)
from .chunk import chunk_miras
from .declared import parameter
from .delta_rule import DeltaRule, Implicit
from .exact import Exact
from .fold_step import fold_step_, folds_at_once
from .learning import GradientDescent, Momentum
from .recurrent import recurrent_miras
from .registry import (
    LEARNING_ALGORITHMS,
    register_attentional_bias,
    register_memory_architecture,
    register_retention_gate,
)
from .retention import (
    KL,
    RETENTION_GATES,
    Bregman,
    ChiSquared,
    ChunkWeights,
    Decay,
    ElasticNet,
    ElasticNetDecay,
    Lq,
    LqMirror,
    NoRetention,
    RetentionGate,
)
from .rule import MirasRule
from .state import MemoryParameters, MemoryState, initial_memory_state
from .step import step_miras, step_miras_


__all__ = [
    "ATTENTIONAL_BIASES",
    "KL",
    "L1",
    "L2",
    "LEARNING_ALGORITHMS",
    "MEMORY_ARCHITECTURES",
    "RETENTION_GATES",
    "AttentionalBias",
    "Bregman",
    "ChiSquared",
    "ChunkWeights",
    "Decay",
    "ElasticNetDecay",
    "NoRetention",
    "DeltaRule",
    "Dot",
    "ElasticNet",
    "Exact",
    "Factors",
    "GatedMLPMemory",
    "GradientDescent",
    "HuberCoordinate",
    "HuberMixture",
    "HuberNorm",
    "Implicit",
    "Lp",
    "Lq",
    "LqMirror",
    "MLPMemory",
    "MatrixMemory",
    "MemoryArchitecture",
    "MemoryParameters",
    "MemoryState",
    "MirasRule",
    "Momentum",
    "RetentionGate",
    "Robust",
    "VectorMemory",
    "chunk_miras",
    "fold_step_",
    "folds_at_once",
    "initial_memory_state",
    "parameter",
    "recurrent_miras",
    "register_attentional_bias",
    "register_memory_architecture",
    "register_retention_gate",
    "step_miras",
    "step_miras_",
]
