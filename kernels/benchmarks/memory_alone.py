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
"""Lets a step import `miras_hf.memory` and `miras_hf.backend` without all else that `import miras_hf` brings.

That is Transformers' models: seconds of every step, of a run that has few. To be imported first, by steps without models.
"""

import sys
import types
from pathlib import Path


sys.path[:0] = [str(Path(__file__).resolve().parents[1])]  # scripts, not a package
import own_packages  # noqa: E402


if "miras_hf" not in sys.modules:
    package = types.ModuleType("miras_hf")
    package.__path__ = [str(own_packages.ROOT / "src" / "miras_hf")]
    sys.modules["miras_hf"] = package
