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
"""`examples/evaluation/stability.py` measures what it says, once, and says where forms part."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_model
from test_probe_example import folder  # noqa: F401, a saved model
from transformers import AutoTokenizer

from miras_hf import YaadConfig, YaadForCausalLM


STUDY = Path(__file__).resolve().parent.parent / "examples" / "evaluation"


@pytest.fixture(scope="module")
def stability():
    import importlib.util
    import sys

    spec = importlib.util.spec_from_file_location("evaluation_stability", STUDY / "stability.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_a_deviation_is_that_of_its_window(stability):
    generator = torch.Generator().manual_seed(0)
    expected = torch.randn(2500, 3, generator=generator)
    found = expected.clone()
    found[1200] += torch.tensor([3.0, 0.0, 4.0])
    by_hand = 5.0 / math.sqrt(sum(x * x for x in expected[1000:2000].flatten().tolist()))
    assert stability.deviations(found, expected) == pytest.approx([0.0, by_hand, 0.0], rel=1e-6)


@pytest.mark.parametrize("piece, backend", [(7, None), (1, None), (1, "aot_eager")])
def test_pieces_go_on_from_each_other(stability, piece, backend):
    torch.manual_seed(0)
    config = YaadConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64, chunk_size=8)
    model = YaadForCausalLM(config).eval()
    ids = torch.arange(20)[None] % 64
    whole = stability.hidden_states(model, ids, None)
    assert whole.shape == (20, 32)
    torch.testing.assert_close(stability.hidden_states(model, ids, piece, backend), whole, rtol=1e-4, atol=1e-5)
    # a model that began every piece anew would be far from that
    alone = torch.cat([stability.hidden_states(model, part, None) for part in ids.split(piece, dim=1)])
    assert (alone - whole).norm() > 0.01 * whole.norm()


def test_one_process_compiles_many_models(stability):
    ids = torch.arange(10)[None]
    with torch._dynamo.config.patch(recompile_limit=1):
        for chunk_size in (4, 8):
            config = YaadConfig(
                hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64, chunk_size=chunk_size
            )
            assert stability.hidden_states(YaadForCausalLM(config), ids, 1, "aot_eager").shape == (10, 32)


def test_a_checkpoint_is_measured_once(stability, folder, tmp_path, capsys):  # noqa: F811
    flags = ["--checkpoint", str(folder), "--tokens", "2000", "--cuts", "pieces", "--out", str(tmp_path)]
    (result,) = stability.main(flags)
    assert result["read"] == 2000 and len(result["deviation"]) == 2 and result["chunk_size"] == 8
    assert all(0 < x < 0.1 for x in result["deviation"])
    (file,) = tmp_path.glob("*.json")
    file.write_text(json.dumps(result | {"deviation": [1e-6, None]}))
    capsys.readouterr()
    stability.main(flags)
    said = capsys.readouterr().out
    assert "| pieces of 777 | 2,000 | 1.0e-06 | not a number | above 0.001 |" in said
    assert said.strip() == (tmp_path / "report.md").read_text().strip()


def test_a_training_is_read_with_its_weights_and_tokenizer(stability, folder, tmp_path, capsys):  # noqa: F811
    from ablation_models import build_model, point_of
    from ablation_points import ABLATIONS
    from bridge_training import SIZES

    size = SIZES["smoke"]
    model, _ = build_model(ABLATIONS["yaad"], size.shape, 5)
    job = {"rung": "yaad", "learning_rate": 0.01, "seed": 3}
    file = tmp_path / "yaad-lr0.01-seed3.json"
    file.write_text(json.dumps({"job": job, "point": point_of("yaad", size.shape), "size": {"name": "smoke"}}))
    save_model(model, file.with_suffix(".safetensors"))
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "tokenizer")
    out = tmp_path / "out"
    (result,) = stability.main(["--checkpoint", str(file), "--tokens", "2000", "--cuts", "pieces", "--out", str(out)])
    ids = stability.text_ids(AutoTokenizer.from_pretrained(folder), None, 2000)
    whole = stability.hidden_states(model, ids, None)
    assert result["deviation"] == pytest.approx(
        stability.deviations(stability.hidden_states(model, ids, 777), whole), rel=1e-3
    )
    assert (out / "yaad-lr0.01-seed3-pieces-2000.json").exists()
    assert "| yaad-lr0.01-seed3 | 16 |" in capsys.readouterr().out
    # another training of that name, in another folder or later in this one
    model.model.norm.weight.data.mul_(1.5)
    save_model(model, file.with_suffix(".safetensors"))
    with pytest.raises(ValueError, match="seed3-pieces-2000.json is of other weights: move it away, or take another"):
        stability.main(["--checkpoint", str(file), "--tokens", "2000", "--cuts", "pieces", "--out", str(out)])


def test_a_result_of_other_defaults_is_refused(stability, tmp_path):
    job = stability.Job("memora", "tiny", 16, "pieces", 2000)
    config = stability.config_fields(stability.config_of(job))
    file = tmp_path / "result.json"
    result = {"job": stability.asdict(job), "config": config}
    file.write_text(json.dumps(result))
    assert stability.read_results(tmp_path)[0]["config"]["eta_max"] == config["eta_max"]
    file.write_text(json.dumps(result | {"config": config | {"eta_max": 2 * config["eta_max"]}}))
    with pytest.raises(ValueError, match=r"result\.json is of a model with other defaults than today's"):
        stability.read_results(tmp_path)
    # a trained model keeps its own
    trained = stability.Job("runs/memora", "", 0, "pieces", 2000)
    file.write_text(json.dumps({"job": stability.asdict(trained), "config": config | {"eta_max": 1.0}}))
    assert stability.read_results(tmp_path)[0]["config"]["eta_max"] == 1.0


def test_new_models_have_the_preset_s_heads(stability):
    text = Path(stability.stdlib_files()[0]).read_bytes()
    for size, head_dim in {"tiny": 32, "170m": 48, "340m": 64}.items():
        job = stability.Job("memora", size, 16, "pieces", 2000)
        model, ids = stability.new_model(job)
        assert (model.config.model_type, model.config.head_dim, model.config.chunk_size) == ("memora", head_dim, 16)
        assert ids.shape == (1, 2000) and bytes(ids[0, :50].tolist()) == text[:50]
    with pytest.raises(SystemExit):
        stability.arguments(["--tokens", "100"])
    for flag in (["--models", "memora"], ["--sizes", "340m"], ["--chunks", "16"], ["--seed", "0"]):
        with pytest.raises(SystemExit):
            stability.arguments(["--checkpoint", "runs/demo", *flag])
