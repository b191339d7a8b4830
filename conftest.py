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
"""Of all tests here: those marked `slow` run with `RUN_SLOW=1`, as in Transformers; `make test-slow` does that."""

import os

import pytest


def pytest_collection_modifyitems(items):
    if os.environ.get("RUN_SLOW", "0").lower() in ("1", "true", "yes"):
        return
    for item in items:
        if marker := item.get_closest_marker("slow"):
            why = marker.kwargs.get("reason", "others cover the same code with fewer combinations")
            item.add_marker(pytest.mark.skip(reason=f"slow ({why}): RUN_SLOW=1 runs it"))
