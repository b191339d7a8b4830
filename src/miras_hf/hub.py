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
"""How a saved folder finds its code: `auto_map`, and the one file it points to.

A checkpoint carries no copy of the models' code. `config.json` names a module beside it that imports the installed
package: with `miras_hf` imported nobody looks at it, and `trust_remote_code=True` runs it for people who have not. Where
the package is not installed, Transformers answers with the line to install it.
"""

from pathlib import Path


SHIM_MODULE = "require_miras_hf"

_AUTO_CLASSES = {
    "AutoConfig": "Config",
    "AutoModel": "Model",
    "AutoModelForCausalLM": "ForCausalLM",
    "AutoModelForSequenceClassification": "ForSequenceClassification",
    "AutoModelForTokenClassification": "ForTokenClassification",
}

_SHIM = '''\
"""The classes of this checkpoint are those of the installed package: pip install miras-hf"""

from miras_hf import (
    {names},
)


__all__ = [
    {strings},
]
'''


def _class_names(family: str) -> list[str]:
    return sorted(family + suffix for suffix in _AUTO_CLASSES.values())


def auto_map(family: str) -> dict[str, str]:
    """What `config.json` tells the Auto classes.

    Args:
        family (`str`): what the class names begin with, for instance `"Moneta"`.
    """
    return {auto_class: f"{SHIM_MODULE}.{family}{suffix}" for auto_class, suffix in _AUTO_CLASSES.items()}


def write_shim(folder: str | Path, family: str) -> None:
    """Writes the module that `auto_map` points to."""
    names = _class_names(family)
    text = _SHIM.format(names=",\n    ".join(names), strings=",\n    ".join(f'"{name}"' for name in names))
    (Path(folder) / f"{SHIM_MODULE}.py").write_text(text, encoding="utf-8")
