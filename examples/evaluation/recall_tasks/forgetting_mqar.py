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
"""MQAR whose keys are reassigned, so that the newest value counts (`forgetting_mqar` of repository
HazyResearch/zoology).

As in `mqar.py`, but after the pairs some of the keys come again with other values. A query asks for the last value
that its key was given. Memories that only add up hold both values; retention, or a step that replaces, is what the
task asks for.

**Published protocol**: that of MQAR with 4 keys reassigned, trained on 64/4, 128/9, 256/16, 256/25 and 256/36 and
tested on 64/4, 64/9, 128/16, 256/36, 512/64, 1024/144 and 2048/256. No figures have been published with it.
"""

from .mqar import PUBLISHED_RATES, mqar, parts
from .task import Protocol, Task


TASK = Task(
    name="forgetting-mqar",
    says="newest values of keys",
    generate=mqar,
    answers=lambda vocabulary: vocabulary // 2,
    protocols={
        "cpu": Protocol(
            vocabulary=64,
            train=parts((32, 4), reassigned=2, random_rest=False),
            tests=parts((32, 4), (64, 4), (64, 8), reassigned=2, random_rest=False),
            steps=800,
            convolution=True,
        ),
        "full": Protocol(
            vocabulary=8192,
            train=parts((64, 4, 391), (128, 9, 78), (256, 16, 78), (256, 25, 78), (256, 36, 78), reassigned=4),
            tests=parts((64, 4), (64, 9), (128, 16), (256, 36), (512, 64), (1024, 144), (2048, 256), reassigned=4),
            batch=256,
            steps=32 * 703,
            learning_rates=PUBLISHED_RATES,
            widths=(64, 128, 256),
            distinct_batches=703,
            convolution=True,
            test_examples=1000,
        ),
        "smoke": Protocol(
            vocabulary=16,
            train=parts((16, 2), reassigned=1),
            batch=4,
            steps=3,
            learning_rates=(1e-2,),
            widths=(32,),
            test_examples=4,
        ),
    },
)
