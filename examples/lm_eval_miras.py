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
"""lm-evaluation-harness on Miras models: its own command line, after the import that makes the Auto classes know them.

What one learns: nothing else is needed to evaluate with the standard harness. Tasks of the Hub need a network; local
tasks (a YAML file and a jsonl file, `--include_path`) do not.

    python examples/lm_eval_miras.py --model hf --model_args pretrained=runs/moneta-stdlib --tasks wikitext,lambada_openai
    python examples/lm_eval_miras.py --help

The harness puts bos before every text of a perplexity task, and our tokenizer does so itself: with `add_bos_token=False`
among the `--model_args` of such tasks there is one. Leave it out for multiple choice, where the harness adds none.

For a repository on the Hub, `lm_eval --model hf --model_args pretrained=...,trust_remote_code=True` does without this file.
"""

from lm_eval.__main__ import cli_evaluate

import miras_hf  # noqa: F401


if __name__ == "__main__":
    cli_evaluate()
