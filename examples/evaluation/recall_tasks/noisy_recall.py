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
"""MAD's noisy in-context recall (arXiv 2403.17844): in-context recall with pairs of noise between.

A fifth of the pairs are two tokens of a vocabulary of their own, which say nothing and are to be left alone.

**Published protocol**: 32 tokens, 16 of them noise, length 128, a fifth noise, see `mad.py` for the training.
"""

from .in_context_recall import in_context_recall
from .mad import protocols
from .task import Task


def _settings(length: int, noise_vocabulary: int) -> dict:
    return {"length": length, "noise": 0.2, "noise_vocabulary": noise_vocabulary}


def _task() -> Task:
    published, smoke = 16, 4
    sizes = protocols(32, _settings(128, published), _settings(64, published), 32, _settings(16, smoke), 12)
    noise = {p.vocabulary: p.train[0].settings["noise_vocabulary"] for p in sizes.values()}

    def answers(vocabulary: int) -> int:
        tokens = vocabulary - noise[vocabulary]
        return tokens - tokens // 2

    return Task(
        name="noisy-recall",
        says="the same with noise between (MAD)",
        generate=in_context_recall,
        answers=answers,
        protocols=sizes,
        default=False,
    )


TASK = _task()
