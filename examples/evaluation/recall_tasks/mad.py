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
"""What MAD's six tasks have in common: their training (arXiv 2403.17844; repository athms/mad-lab).

**Published protocol**: width 128; mixer, SwiGLU, mixer, SwiGLU; 12,800 training sequences (256 for memorisation), 200
epochs of batches of 128, 1,280 test sequences; AdamW, cosine, the best of learning rates 1e-4, 5e-4, 1e-3 and weight
decays 0, 0.1; recurrent states of 4,096 numbers. MAD's score of a task is a mean over variations of difficulty; what
is here is the baseline of each, as in the tables that are compared with.
"""

from .task import Part, Protocol


def protocols(
    vocabulary: int,
    settings: dict,
    cpu: dict,
    cpu_vocabulary: int,
    smoke: dict,
    smoke_vocabulary: int,
    batches: int = 100,
    cpu_steps: int = 400,
) -> dict[str, Protocol]:
    """The three sizes of a task of MAD, `batches` of 128 being the published training set; `cpu_steps` are as many as some
    neighbour needs."""
    return {
        "cpu": Protocol(
            vocabulary=cpu_vocabulary,
            train=(Part("baseline", cpu),),
            steps=cpu_steps,
            chunk=4 if cpu["length"] < 32 else None,
        ),
        "full": Protocol(
            vocabulary=vocabulary,
            train=(Part("baseline", settings),),
            batch=128,
            steps=200 * batches,
            learning_rates=(1e-4, 5e-4, 1e-3),
            weight_decays=(0.0, 0.1),
            widths=(128,),
            distinct_batches=batches,
            test_examples=1280,
        ),
        "smoke": Protocol(
            vocabulary=smoke_vocabulary,
            train=(Part("baseline", smoke),),
            batch=4,
            steps=3,
            learning_rates=(1e-2,),
            widths=(32,),
            test_examples=4,
        ),
    }


__all__ = ["protocols"]
