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
"""MAD's compression (arXiv 2403.17844): a whole sequence is to be said from the output at its last token.

Random tokens, and at the end one that stands for all of them. An MLP reads what the model says there with a position's
sines and cosines added, and must give the token of that position; `recall_models.py` has it.

**Published protocol**: 16 tokens, length 32, see `mad.py` for the training. There the last token, which is always the
same, is asked for, too: a published accuracy p is (32 p - 1) / 31 here.
"""

import numpy as np

from .mad import protocols
from .task import UNSCORED, Examples, Task


def compression(rng: np.random.Generator, count: int, vocabulary: int, training: bool, *, length: int) -> Examples:
    """`count` sequences of `length` tokens, of which all but the last are asked for."""
    ids = rng.integers(vocabulary - 1, size=(count, length))
    ids[:, -1] = vocabulary - 1
    labels = ids.copy()
    labels[:, -1] = UNSCORED
    return Examples(ids, labels)


TASK = Task(
    name="compression",
    says="a sequence from its last state (MAD)",
    generate=compression,
    answers=lambda vocabulary: vocabulary - 1,
    protocols=protocols(16, {"length": 32}, {"length": 8}, 16, {"length": 8}, 8, cpu_steps=1600),
    reads_last_state=True,
    default=False,
)
