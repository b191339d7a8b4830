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
"""`examples/evaluation/probe.py` writes what the memories of a checkpoint do, and names what it cannot probe."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from miras_hf import MirasTokenizer, YaadConfig, YaadForCausalLM


STUDY = Path(__file__).resolve().parent.parent / "examples" / "evaluation"


def load_probe():
    spec = importlib.util.spec_from_file_location("evaluation_probe", STUDY / "probe.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


probe = load_probe()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    text = Path(os.__file__).read_text(encoding="utf-8")[:4000]
    (folder / "text.txt").write_text(text)
    tokenizer = MirasTokenizer.train_from_iterator([text], vocab_size=280)
    torch.manual_seed(0)
    config = YaadConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=280, chunk_size=8)
    YaadForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_checkpoint_is_probed_on_a_text(folder, tmp_path, capsys):
    flags = ["--text", str(folder / "text.txt"), "--tokens", "96", "--out", str(tmp_path)]
    probe.main([str(folder), *flags])
    report = json.loads((tmp_path / "probe.json").read_text())
    assert report["tokens"] == 96 and list(report["layers"]) == ["0", "1"]
    model = YaadForCausalLM.from_pretrained(folder).eval()
    tokenizer = MirasTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer((folder / "text.txt").read_text())["input_ids"][:96]])
    seen = {}
    for layer in (0, 1):
        conv = model.model.layers[layer].mixer.v_conv
        conv.register_forward_hook(lambda m, i, out, layer=layer: seen.update({layer: out.detach()}))
    with torch.no_grad():
        model(ids, use_cache=False)
    for layer, values in seen.items():
        found = report["layers"][str(layer)]
        values = values.unflatten(-1, (2, 16))
        values = 4.0 * values / (values.square().sum(-1, keepdim=True) + 1e-6).sqrt()
        rms = values.square().mean((0, 1, 3)).sqrt()
        assert found["value_rms"] == pytest.approx(rms.mean().item(), rel=1e-4)
        assert found["recall_60"] is not None and found["recall_200"] is None
        # sixteen channels of two heads, in order; the differences of eleven chunks after the first
        half_lives = found["curves"]["half_lives"]
        assert len(half_lives) == 32 and half_lives == sorted(half_lives)
        assert found["curves"]["growth_tokens"] == list(range(16, 97, 8)) and len(found["curves"]["growth"]) == 11
        assert found["lyapunov"] * 88 == pytest.approx(found["curves"]["growth"][-1], rel=1e-4)
    assert (tmp_path / "probe.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert f"{report['layers']['1']['write_share']:.3g}" in printed


def test_a_training_of_the_bridge_is_probed_at_its_start_and_not_without_weights(tmp_path):
    sys.path[:0] = [str(STUDY), str(STUDY.parent), str(STUDY.parent.parent / "benchmarks")]
    from bridge_models import build_model
    from bridge_points import RUNGS
    from bridge_training import SIZES

    file = tmp_path / "mlp-lr0.01-seed3.json"
    job = {"rung": "mlp", "learning_rate": 0.01, "seed": 3}
    file.write_text(json.dumps({"job": job, "point": RUNGS["yaad"].point.as_dict(), "size": {"name": "smoke"}}))
    rows = torch.arange(96, dtype=torch.int32).view(3, 32)
    torch.save({"rows": {"validation": rows}}, tmp_path / "data.pt")
    model, ids = probe.of_training(file, tokens=70, at_start=True)
    expected, _ = build_model(RUNGS["yaad"].point, SIZES["smoke"].shape, seed=3)
    assert ids.tolist() == [list(range(70))]
    for (name, one), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other), name
    with pytest.raises(ValueError, match="train with --keep-weights, or probe --at-start"):
        probe.of_training(file, tokens=70, at_start=False)


def test_mistakes_are_named(folder, tmp_path, capsys):
    llama = LlamaConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1, intermediate_size=8, vocab_size=280)
    LlamaForCausalLM(llama).save_pretrained(tmp_path)
    MirasTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    text = ["--text", str(folder / "text.txt")]
    for flags, complaint in (
        ([str(tmp_path), *text], "is a LlamaForCausalLM, which has no memories"),
        ([str(folder), "--at-start"], "--at-start is for trainings of bridge.py"),
        ([str(tmp_path / "a.json"), *text], "--text is for saved models"),
        ([str(folder), "--tokens", "0"], "--tokens must be at least 1, got 0"),
    ):
        with pytest.raises(SystemExit):
            probe.main(flags)
        assert complaint in capsys.readouterr().err
