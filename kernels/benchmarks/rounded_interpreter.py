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
"""Triton's interpreter rounds to bfloat16 as devices do, to the nearest number, once this is imported.

By itself it cuts bits off: each number is off twice as far, and all to one side, which adds up in a state.
"""

import os

import numpy as np


def nearest(x: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16 numbers, the even one of two, of float32."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    # a NaN must not be carried over into another number
    return np.where(np.isnan(x), (bits >> np.uint32(16)) | np.uint32(0x40), rounded).astype(np.uint16)


if os.environ.get("TRITON_INTERPRET") == "1":
    import triton.language as tl
    from triton.runtime import interpreter

    _usual = interpreter._convert_float

    def _convert_float(x, input_dtype, output_dtype, rounding_mode):
        if input_dtype == tl.float32 and output_dtype == tl.bfloat16:
            return nearest(x)
        return _usual(x, input_dtype, output_dtype, rounding_mode)

    interpreter._convert_float = _convert_float
