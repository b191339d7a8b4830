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
"""What parity and modular arithmetic have in common: their training (arXiv 2411.12537).

**Published protocol**: sequences of 3 to 40 tokens in training and of 40 to 256 in tests, the answer included, which
is asked for at the token before it; accuracy is scaled so that a guess is 0. The configuration of parity in the
authors' repository has 20,000 steps of 256 new sequences, a learning rate of 1e-3 after a warm-up, cosine, and 8,192
test sequences.

At the size `cpu`, sequences are of 3 to 16 tokens in training and of 16 to 64 in tests: in 1,000 steps of 32 sequences of up to
40, a model that can follow a state has not begun to. Memories have chunks of 4, so that those sequences have several.
"""

from .task import Part, Protocol


TRAINED, LONGER = (3, 40), (40, 256)
SHORT, FOUR_TIMES = (3, 16), (16, 64)


def protocols(vocabulary: int) -> dict[str, Protocol]:
    """The three sizes."""

    def part(shortest: int, longest: int) -> Part:
        return Part(f"{shortest}-{longest}", {"shortest": shortest, "longest": longest})

    return {
        "cpu": Protocol(
            vocabulary=vocabulary,
            train=(part(*SHORT),),
            tests=(part(*SHORT), part(*FOUR_TIMES)),
            batch=64,
            chunk=4,
        ),
        "full": Protocol(
            vocabulary=vocabulary,
            train=(part(*TRAINED),),
            tests=(part(*TRAINED), part(*LONGER)),
            batch=256,
            steps=20_000,
            learning_rates=(1e-4, 1e-3, 1e-2),
            widths=(128,),
            test_examples=8192,
        ),
        "smoke": Protocol(
            vocabulary=vocabulary,
            train=(part(3, 9),),
            batch=4,
            steps=3,
            learning_rates=(1e-2,),
            widths=(32,),
            test_examples=4,
        ),
    }


__all__ = ["protocols"]
