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
"""Settings of the kernels' tests: on a machine without a GPU they run in Triton's interpreter.

It is chosen when Triton is imported, for the whole process: `python -m pytest kernels/tests` runs them on their own.
"""

import os
import sys
from pathlib import Path

import torch


if not torch.cuda.is_available():
    assert "triton" not in sys.modules or os.environ.get("TRITON_INTERPRET") == "1", "Triton was imported before."
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT / "src", ROOT / "kernels", ROOT / "kernels" / "torch-ext"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import quick_interpreter  # noqa: E402, F401
