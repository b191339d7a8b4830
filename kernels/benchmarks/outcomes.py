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
"""The three outcomes of what the GPU script looks at, and what a whole run says of itself."""

RIGHT, WRONG, NOT_CHECKED = "right", "wrong", "not checked"

# of the process: everything right; something wrong, or a step that died; nothing wrong, but parts not looked at
EXIT_CODES = {RIGHT: 0, WRONG: 1, NOT_CHECKED: 3}


class NotChecked(Exception):
    """Says why something could not be looked at: a tool that is not there, a path that is not installed."""


def worst(outcomes: list[str]) -> str:
    """Wrong before not checked before right; of nothing at all, not checked."""
    found = [outcome for outcome in (WRONG, NOT_CHECKED, RIGHT) if outcome in outcomes]
    return found[0] if found else NOT_CHECKED


def count(rows: list[dict]) -> str:
    """`"12 right, 1 wrong"`: how many rows had which outcome."""
    numbers = {outcome: sum(row["outcome"] == outcome for row in rows) for outcome in EXIT_CODES}
    return ", ".join(f"{number} {outcome}" for outcome, number in numbers.items() if number) or "nothing"


def listed(rows: list[dict]) -> list[str]:
    """Lines of a report: each row with its outcome and all that it found."""
    lines = []
    for row in rows:
        found = {key: value for key, value in row.items() if key not in ("what", "outcome", "took_s")}
        lines.append(
            f"- {row['what']}: {row['outcome']}" + "".join(f"; {key} {value}" for key, value in found.items())
        )
    return lines
