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
"""Which kernels a process compiled, and which it found in Triton's cache: what it took its time for."""

from triton import knobs


def follow(facts: dict) -> None:
    """Keeps count in a step's facts: `"compiled"`, the seconds of each by a kernel's name, and `"loaded"`, how many."""
    compiled, loaded = facts.setdefault("compiled", {}), facts.setdefault("loaded", {})

    def listener(*, src, times, cache_hit, **_):
        name = getattr(src, "name", "") or getattr(getattr(src, "fn", None), "__name__", "a kernel")
        if cache_hit:
            loaded[name] = loaded.get(name, 0) + 1
        else:
            seconds = sum(each for _, each in times.lowering_stages) / 1e6
            compiled.setdefault(name, []).append(round(seconds, 1))

    knobs.compilation.listener = listener
