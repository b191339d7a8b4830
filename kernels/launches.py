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
"""Launch arguments put in place of the configured ones, where every operator looks them up, and which are worth trying."""

import contextlib
from collections.abc import Iterator
from unittest.mock import patch

from miras_kernels import decoding, ops


MOST = 7
"""How many launches `changed` gives at most, the configured one among them."""


def changed(launch: dict[str, int]) -> list[dict[str, int]]:
    """The launch of an MLP memory's kernel, and it with another number of stages or warps, other tiles, and two things at
    once where it may pay."""
    other_warps = 4 if launch["num_warps"] == 8 else 8
    changes = [{"num_stages": 2}, {"num_warps": other_warps}, {"TN": 2 * launch["TN"]}, {"TN": launch["TN"] // 2}]
    changes += [{"TN": 2 * launch["TN"], "num_stages": 2}, {"num_warps": other_warps, "TN": launch["TN"] // 2}]
    return [launch, *(launch | change for change in changes if change.get("TN", 16) >= 16)]


@contextlib.contextmanager
def launching(kernel: str, launch: dict[str, int]) -> Iterator[None]:
    """In here `kernel` is launched so; others, such as the forward pass before a backward one, as they are outside."""
    usual = ops.launch_configuration

    def chosen(name: str, **where) -> dict[str, int]:
        if name == kernel:
            return {"enable_fp_fusion": True, **launch}
        return usual(name, **where)

    # what was refused because no launch was configured may be asked for in here
    ops.known_reason.cache_clear()
    try:
        with patch.object(ops, "launch_configuration", chosen), patch.object(decoding, "launch_configuration", chosen):
            yield
    finally:
        ops.known_reason.cache_clear()
