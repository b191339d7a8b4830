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
"""`transformers serve` as it is, a process of its own that has never imported us, and its clients on the loopback."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import openai
import pytest
import torch
from huggingface_hub import InferenceClient

import miras_hf
from miras_hf.compat import CACHE_NAME


TRANSFORMERS = [sys.executable, "-m", "transformers.cli.transformers"]
FAMILIES = ("Moneta", "Yaad", "Memora")
TEXTS = ["to be or not to be, that is the question", "whether 'tis nobler in the mind to suffer", "to be"]
SAYS = ["to be?", "or not to be?", "that is the question"]
SIZE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "chunk_size": 4,
    "layer_types": ["miras_memory", "sliding_attention"],
    "sliding_window": 8,
    # answers of an untrained model must depend on the question, and not end before they are compared
    "initializer_range": 0.3,
    "eos_token_id": None,
}
TOKENS = 12
REVISION = "0" * 40


def folder(name):
    """Where the Hub's cache has a model."""
    return f"models--{name.replace('/', '--')}"


@pytest.fixture(scope="module")
def tokenizer():
    return miras_hf.MirasTokenizer.train_from_iterator(TEXTS, vocab_size=300)


@pytest.fixture(scope="module")
def models(tokenizer):
    torch.manual_seed(0)
    size = {**SIZE, "vocab_size": len(tokenizer), "pad_token_id": 0}
    models = {
        f"me/{family.lower()}": getattr(miras_hf, f"{family}ForCausalLM")(getattr(miras_hf, f"{family}Config")(**size))
        for family in FAMILIES
    }
    # bytes that are no text come out in another way one by one than together
    strange = [i for i in range(len(tokenizer)) if not re.fullmatch("[ a-z]+", tokenizer.decode([i]))]
    for model in models.values():
        model.generation_config.suppress_tokens = strange
    return models


@pytest.fixture(scope="module")
def hub_cache(models, tokenizer, tmp_path_factory):
    """What is on disk after the models were downloaded from the Hub."""
    root = tmp_path_factory.mktemp("hf") / "hub"
    for name, model in models.items():
        (root / folder(name) / "refs").mkdir(parents=True)
        (root / folder(name) / "refs" / "main").write_text(REVISION)
        for saved in (model, tokenizer):
            saved.save_pretrained(root / folder(name) / "snapshots" / REVISION)
    return root


@pytest.fixture(scope="module")
def environment(hub_cache):
    return os.environ | {
        "HF_HOME": str(hub_cache.parent),
        "HF_HUB_CACHE": str(hub_cache),
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }


@contextlib.contextmanager
def serve(environment, log, *arguments):
    """A server's address; its output goes to the file `log`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*TRANSFORMERS, "serve", *arguments, "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    with open(log, "w") as output:
        server = subprocess.Popen(command, env=environment | {"HF_HUB_OFFLINE": "1"}, stdout=output, stderr=output)
    try:
        for _ in range(1200):
            assert server.poll() is None, log.read_text()
            with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                break
            time.sleep(0.1)
        else:
            raise AssertionError(f"no answer from the server: {log.read_text()}")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(scope="module")
def server(environment, tmp_path_factory):
    with serve(environment, tmp_path_factory.mktemp("serve") / "log", "--trust-remote-code") as url:
        yield url


@torch.no_grad()
def answer(model, tokenizer, conversation):
    """What `generate()` says next in a conversation, greedily."""
    inputs = tokenizer.apply_chat_template(
        conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def talk(model, tokenizer, says):
    """A conversation with `generate()`."""
    conversation = []
    for content in says:
        conversation.append({"role": "user", "content": content})
        conversation.append({"role": "assistant", "content": answer(model, tokenizer, conversation)})
    return conversation


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_is_what_generate_says(server, models, tokenizer, family, stream):
    name = f"me/{family.lower()}"
    client, conversation = InferenceClient(base_url=server), []
    for content in SAYS:
        conversation.append({"role": "user", "content": content})
        reply = client.chat_completion(conversation, model=name, max_tokens=TOKENS, temperature=0.0, stream=stream)
        if stream:
            text = "".join(chunk.choices[0].delta.content or "" for chunk in reply)
        else:
            assert reply.usage.completion_tokens == TOKENS
            text = reply.choices[0].message.content
        conversation.append({"role": "assistant", "content": text})
    assert conversation == talk(models[name], tokenizer, SAYS)
    assert len({turn["content"] for turn in conversation[1::2]}) > 1


def test_completions(server, models, tokenizer):
    client = openai.OpenAI(base_url=server, api_key="none")
    for name, model in models.items():
        done = client.completions.create(model=name, prompt="to be or", max_tokens=TOKENS, temperature=0.0)
        inputs = tokenizer("to be or", return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert done.choices[0].text == tokenizer.decode(ids, skip_special_tokens=True)


def test_transformers_chat(server, environment, models, tokenizer, tmp_path):
    # after every reply that reaches the limit the client asks whether to go on
    says = [line for content in SAYS for line in (content, "n")]
    command = [*TRANSFORMERS, "chat", "me/yaad", server, f"max_new_tokens={TOKENS}", "do_sample=False"]
    done = subprocess.run(
        [*command, "--save-folder", str(tmp_path)],
        input="\n".join([*says, "!save", "!exit", ""]),
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (saved,) = (tmp_path / "me" / "yaad").glob("*.json")
    assert json.loads(saved.read_text())["chat_history"] == talk(models["me/yaad"], tokenizer, SAYS)


def test_a_preloaded_folder_and_continuous_batching(environment, hub_cache, tmp_path):
    saved = str(hub_cache / folder("me/moneta") / "snapshots" / REVISION)
    with serve(environment, tmp_path / "log", saved, "--trust-remote-code", "--continuous-batching") as url:
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        # the folder that is served, and before Transformers 5.24 what the cache holds
        cached = {f"me/{family.lower()}" for family in FAMILIES}
        assert {model.id for model in client.models.list()} == ({saved} if CACHE_NAME == "cache" else cached)
        with pytest.raises(openai.InternalServerError):
            client.chat.completions.create(model=saved, messages=[{"role": "user", "content": "to be?"}])
    assert "ValueError: Continuous batching" in (tmp_path / "log").read_text()


def test_continuous_batching_is_refused_by_name(models):
    model = models["me/yaad"]
    with pytest.raises(ValueError, match="`generate_batch`.* a memory has none"):
        model.generate_batch([[1, 2, 3]], max_new_tokens=2)
    with pytest.raises(ValueError, match="`cache_implementation='paged'`.* a memory has none"):
        model.generate(torch.tensor([[1, 2, 3]]), cache_implementation="paged", max_new_tokens=2)
    with pytest.raises(ValueError, match="Continuous batching"), model.continuous_batching_context_manager():
        pass
