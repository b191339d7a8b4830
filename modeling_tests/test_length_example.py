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
"""`examples/evaluation/length.py`: losses by position are those of single calls, and four conditions what they say."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_model
from test_probe_example import folder  # noqa: F401, a saved model
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM


ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "examples" / "evaluation"), str(ROOT / "examples"), str(ROOT / "benchmarks")]

import length  # noqa: E402
from ablation_models import build_model, point_of  # noqa: E402
from ablation_points import ABLATIONS  # noqa: E402
from bridge_models import ChangedTokens  # noqa: E402
from bridge_models import build_model as build_rung  # noqa: E402
from bridge_points import RUNGS  # noqa: E402
from bridge_training import SIZES  # noqa: E402
from checkpoints import model_of_training, trained_model  # noqa: E402
from length_measures import (  # noqa: E402
    BUCKETS,
    CONDITIONS,
    PeakMemory,
    cache_bytes,
    frozen,
    held_out,
    memory_size,
    mixers_of,
    one_text,
    read_long_text,
    read_with_saved_memory,
    split_documents,
)

from miras_hf import MemoraConfig, MemoraForCausalLM, MirasConfig, MirasForCausalLM, YaadConfig, YaadForCausalLM  # noqa: E402
from miras_hf.compat import CACHE_NAME  # noqa: E402
from miras_hf.modeling_miras import MirasMemory  # noqa: E402
from miras_hf.presets import MODELS as PUBLISHED  # noqa: E402


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64, "chunk_size": 8}
KINDS = {
    "yaad": lambda: YaadForCausalLM(YaadConfig(**SMALL)),
    "memora": lambda: MemoraForCausalLM(MemoraConfig(**SMALL)),
    "momentum": lambda: MirasForCausalLM(
        MirasConfig(**SMALL, learning_algorithm="momentum", gate_granularity="head", use_rope=False)
    ),
    "hybrid": lambda: YaadForCausalLM(YaadConfig(**SMALL, attention_layers=[1], sliding_window=16)),
}


def new(kind: str):
    """A model whose memories write a good deal, and whose losses show it."""
    torch.manual_seed(0)
    model = KINDS[kind]().eval()
    with torch.no_grad():
        for mixer in mixers_of(model).values():
            mixer.eta.bias.add_(2.0)
        model.lm_head.weight.mul_(10.0)
    return model


def text(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 64, (tokens,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def nats(model, ids: torch.Tensor) -> torch.Tensor:
    """Of every token but the first, in one call."""
    logs = model(ids[None], use_cache=False).logits[0].log_softmax(-1)
    return -logs[:-1].gather(1, ids[1:, None])[:, 0]


@torch.no_grad()
def read(model, ids: torch.Tensor, cache: DynamicCache) -> DynamicCache:
    model(ids[None], use_cache=True, **{CACHE_NAME: cache})
    return cache


@pytest.mark.parametrize("kind", ["yaad", "hybrid"])
def test_losses_by_position_are_those_of_one_call_and_of_calls_that_begin_anew(kind):
    model, ids = new(kind), text(101)
    found = read_long_text(model, ids, piece=13, restart=24, device="cpu")
    whole = nats(model, ids)
    parts = torch.cat([nats(model, ids[start : start + 25]) for start in range(0, 100, 24)])
    rows = found["by_position"]
    assert [rows[0]["first"], rows[-1]["last"]] == [1, 100] and len(rows) <= BUCKETS + 1
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        assert after is None or after["first"] == row["last"] + 1
        for name, losses in (("loss", whole), ("restarted", parts)):
            expected = losses[row["first"] - 1 : row["last"]].mean().item()
            assert row[name] == pytest.approx(expected, abs=1e-4), row
    assert rows[-1]["loss"] != pytest.approx(rows[-1]["restarted"], abs=1e-4)
    tokens = [state["tokens"] for state in found["states"]]
    assert tokens[-1] == 100 and all(t % 13 == 0 for t in tokens[:-1]) and tokens == sorted(set(tokens))
    assert {tuple(state["memories"]) for state in found["states"]} == {tuple(mixers_of(model))}
    assert len({state["cache_mib"] for state in found["states"][1:]}) == 1  # a window fills in the first pieces
    assert all(state["peak_mib"] > 10 for state in found["states"])


@pytest.mark.parametrize("kind", ["yaad", "memora"])
def test_sizes_of_memories_are_those_of_their_weights(kind):
    model = new(kind)
    cache = read(model, text(40), DynamicCache(config=model.config))
    for i, mixer in mixers_of(model).items():
        first, second = mixer.memory.initial_state()
        weights = []
        for dual in (
            (first, second),
            [a + d[0] for a, d in zip((first, second), cache.layers[i].memory.dual, strict=True)],
        ):
            if kind == "memora":  # simplices along the hidden axis, of mass 2 n / sqrt(fan in), the last less its mean
                dual = 2.0 * 64 / 4.0 * dual[0].softmax(-1), 2.0 * 64 / 8.0 * (dual[1].softmax(-2) - 1 / 64)
            weights.append([torch.cat([w[head].flatten() for w in dual]).double() for head in range(2)])
        start, now = (torch.cat(heads) for heads in weights)
        found = memory_size(mixer, cache.layers[i].memory)
        assert found["moved"] == pytest.approx(((now - start).norm() / start.norm()).item(), rel=1e-5)
        assert found["rms"] == pytest.approx(now.square().mean().sqrt().item(), rel=1e-5)
        assert found["largest_head"] == pytest.approx(
            max(w.square().mean().sqrt().item() for w in weights[1]), rel=1e-5
        )
        assert found["moved"] > 1e-3


def test_bytes_are_those_of_everything_a_cache_carries():
    model = new("hybrid")
    cache = read(model, text(40), DynamicCache(config=model.config))
    heads, d, hidden, chunk = 2, 16, 64, 8
    memory = 2 * d * hidden + chunk * (d + hidden + hidden + d) + 2 * chunk * d
    window = 2 * 15 * d
    assert cache_bytes(cache) == 4 * (heads * memory + 3 * 3 * 32 + heads * window) + 8  # and the count, an int64


@pytest.mark.parametrize("kind", list(KINDS))
def test_four_conditions_are_single_calls_over_what_they_have_read(kind, tmp_path):
    model, earlier = new(kind), text(64, seed=1)
    documents = [text(31, seed) for seed in (2, 3, 4)]
    found = read_with_saved_memory(model, earlier, documents, 10, tmp_path / "memory.safetensors")["conditions"]

    def after(before: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return nats(model, torch.cat([before, ids]))[len(before) :]

    # a stream goes on from all but the last token of a document, which is predicted and not read
    streams = [torch.cat([earlier, *(ids[:-1] for ids in documents[:i])]) for i in range(3)]

    def later(gate: torch.Tensor, value: float) -> torch.Tensor:
        return torch.cat([gate[:, :64], torch.full_like(gate[:, 64:], value)], dim=1)

    def without(q, k, v, eta, log_alpha, delta, log_momentum, erase):
        log_momentum = None if log_momentum is None else later(log_momentum, -1e9)
        return q, k, v, later(eta, 0.0), later(log_alpha, 0.0), delta, log_momentum, erase

    def no_writes(memory: MirasMemory, inputs: tuple):
        tokens, *others = inputs
        return ChangedTokens(tokens, without), *others

    expected = {
        "fresh": [nats(model, ids) for ids in documents],
        "warm": [after(earlier, ids) for ids in documents],
        "stream": [after(before, ids) for before, ids in zip(streams, documents, strict=True)],
    }
    hooks = [m.register_forward_pre_hook(no_writes) for m in model.modules() if isinstance(m, MirasMemory)]
    expected["warm and frozen"] = [after(earlier, ids) for ids in documents]
    for hook in hooks:
        hook.remove()
    assert list(found) == list(CONDITIONS)
    fresh = torch.stack(expected["fresh"]).mean(1)
    for name, losses in expected.items():
        means = torch.stack(losses).mean(1)
        assert found[name]["loss"] == pytest.approx(means.mean().item(), abs=1e-4), name
        assert found[name]["difference"] == pytest.approx((means - fresh).mean().item(), abs=1e-4), name
        by_hand = math.sqrt((means - fresh).var().item() / 3)
        assert found[name]["difference_error"] == pytest.approx(by_hand, abs=1e-4), name
        last = found[name]["by_position"][-1]
        part = torch.stack([of_one[last["first"] - 1 :] for of_one in losses])
        assert last["last"] == 30 and last["loss"] == pytest.approx(part.mean().item(), abs=1e-4), name
    losses = [found[name]["loss"] for name in CONDITIONS]
    assert min(abs(a - b) for i, a in enumerate(losses) for b in losses[:i]) > 1e-4, losses


@pytest.mark.parametrize("kind", ["yaad", "memora", "momentum"])
def test_a_frozen_memory_is_where_it_was_and_thaws(kind):
    model = new(kind)
    cache = read(model, text(64), DynamicCache(config=model.config))
    before = [[t.clone() for t in layer.memory.dual] for layer in cache.layers]
    with frozen(model):
        read(model, text(32, seed=1), cache)
    for layer, duals in zip(cache.layers, before, strict=True):
        assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-8) for a, b in zip(layer.memory.dual, duals, strict=True))
    read(model, text(32, seed=1), cache)
    assert not torch.allclose(cache.layers[0].memory.dual[-1], before[0][-1], rtol=1e-3)
    assert isinstance(model.model.layers[0].mixer.eta, type(new(kind).model.layers[0].mixer.eta))


@pytest.mark.parametrize("preset", sorted(PUBLISHED))
def test_frozen_memories_of_published_models_stay_where_they_were(preset):
    """Gates that erase, and one that says step and retention at once, are silenced, too."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "chunk_size": 16, "vocab_size": 64}
    model = MirasForCausalLM(MirasConfig(**{**sizes, "intermediate_size": 64, **PUBLISHED[preset].fields})).eval()
    cache = read(model, text(64), DynamicCache(config=model.config))
    before = [[t.clone() for t in layer.memory.dual] for layer in cache.layers]
    with frozen(model):
        read(model, text(32, seed=1), cache)
    for layer, duals in zip(cache.layers, before, strict=True):
        assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-8) for a, b in zip(layer.memory.dual, duals, strict=True))


def test_a_dtype_is_that_of_the_parameters_as_when_loaded_in_it(folder):  # noqa: F811
    model, tokenizer = trained_model(str(folder), torch.bfloat16, "cpu")
    other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    ids = text(50)[None]
    assert model.dtype == torch.bfloat16 and model.model.rotary_emb.inv_freq.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(model(ids).logits, other(ids).logits)
    documents = held_out(tokenizer, ["import os", "x"])
    assert [ids[0].item() for ids in documents] == [tokenizer.eos_token_id] * 2
    # as in `pretrain.py`, where the separator stands behind the document before
    assert documents[0][1:].tolist() == tokenizer("import os")["input_ids"]
    assert tokenizer.decode(documents[0], skip_special_tokens=True) == "import os"


@pytest.mark.parametrize("name", ["yaad-keys", "moneta", "rung-eps-residual", "rung-mlp-unit-0.3"])
def test_trainings_are_read_with_their_weights(name, tmp_path):
    size, of_bridge = SIZES["smoke"], name.startswith("rung-")
    rung = name.removeprefix("rung-")
    build = (lambda seed: build_rung(RUNGS[rung].point, size.shape, seed)) if of_bridge else None
    build = build or (lambda seed: build_model(ABLATIONS[rung], size.shape, seed))
    model, _ = build(5)
    point = RUNGS[rung].point.as_dict() if of_bridge else point_of(rung, size.shape)
    file = tmp_path / f"{rung}-lr0.01-seed3.json"
    result = {"job": {"rung": rung, "learning_rate": 0.01, "seed": 3}, "point": point, "size": {"name": "smoke"}}
    file.write_text(json.dumps(result))
    with pytest.raises(ValueError, match="train with --keep-weights"):
        model_of_training(file)
    save_model(model, file.with_suffix(".safetensors"))
    ids = text(40)[None]
    with torch.no_grad():
        assert torch.equal(model_of_training(file).eval()(ids).logits, model.eval()(ids).logits)
        assert torch.equal(model_of_training(file, at_start=True).eval()(ids).logits, build(3)[0].eval()(ids).logits)
    # its memory is saved and read on like any other
    found = read_with_saved_memory(model, text(64), [text(20, 1), text(20, 2)], 16, tmp_path / "memory.safetensors")
    both = torch.cat([text(64), text(20, 1)])
    warm = [nats(model, torch.cat([text(64), text(20, seed)]))[64:].mean().item() for seed in (1, 2)]
    assert found["conditions"]["warm"]["loss"] == pytest.approx(sum(warm) / 2, abs=1e-4) and len(both) == 84
    if not of_bridge:
        point["config"]["max_half_life"] = 77.0
        file.write_text(json.dumps(result))
        with pytest.raises(ValueError, match="was trained as its name no longer says"):
            model_of_training(file)


def test_documents_are_parted_and_short_texts_refused():
    documents = [text(n, seed=n) for n in (30, 50, 20, 100, 60)]
    earlier, tests = split_documents(documents, earlier=70, count=5, tokens=59, chunk_size=8)
    assert torch.equal(earlier, torch.cat(documents[:2])[:64])
    assert len(tests) == 2 and all(map(torch.equal, tests, (documents[3][:60], documents[4])))
    assert len(split_documents(documents, 70, 1, 59, 8)[1]) == 1
    assert torch.equal(one_text(documents, 40), torch.cat(documents)[:40])
    with pytest.raises(ValueError, match="The text has 260 tokens, fewer than 261"):
        one_text(documents, 261)
    with pytest.raises(ValueError, match="`earlier` must be from `chunk_size` = 8 .* got 4"):
        split_documents(documents, 4, 1, 59, 8)
    with pytest.raises(ValueError, match="`earlier` must be .* 260 of 5 documents, got 999"):
        split_documents(documents, 999, 1, 59, 8)
    with pytest.raises(ValueError, match="None of the 3 documents behind the earlier text has 500 tokens"):
        split_documents(documents, 70, 1, 500, 8)


def test_peaks_are_of_the_time_since_the_last_look():
    peak = PeakMemory("cpu")
    if peak.method != "VmHWM":
        pytest.skip("this system cannot set the high-water mark back")
    quiet = peak.since_last()
    block = torch.ones(2**26)  # 256 MiB
    assert peak.since_last() > quiet + 200
    del block
    peak.since_last()
    assert peak.since_last() < quiet + 100


def test_a_checkpoint_is_measured_once_and_other_settings_are_refused(folder, tmp_path, capsys):  # noqa: F811
    for i, file in enumerate(("argparse", "ast", "bisect", "calendar")):
        (tmp_path / f"{i}.txt").write_text(Path(json.__file__).parents[1].joinpath(f"{file}.py").read_text()[:1500])
    out = tmp_path / "out"
    flags = [str(folder), "--text", str(tmp_path / "*.txt"), "--tokens", "600", "--restart", "100", "--piece", "64"]
    flags += ["--earlier", "200", "--document-tokens", "150", "--out", str(out)]
    length.main(flags)
    parts = {"long": "-restart100", "saved": ""}
    names = [f"{folder.name}-{part}-{dtype}{end}.json" for part, end in parts.items() for dtype in length.DTYPES]
    results = {name: json.loads((out / name).read_text()) for name in names}
    first = results[names[0]]
    assert first["by_position"][-1]["last"] == 600 and first["states"][-1]["tokens"] == 600
    # bfloat16 is another reading of the same text
    for row, other in zip(first["by_position"], results[names[1]]["by_position"], strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=0.1)
    assert first["by_position"] != results[names[1]]["by_position"]
    saved = results[names[2]]
    assert saved["earlier"] == 200 and saved["documents"] >= 2 and list(saved["conditions"]) == list(CONDITIONS)
    said = capsys.readouterr().out
    assert said.rstrip().endswith((out / "report.md").read_text().rstrip())
    assert "| 601 - " not in said and f"{saved['conditions']['stream']['difference']:+.3f} ± " in said
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")

    broken = first | {"by_position": [first["by_position"][0] | {"loss": None}]}
    (out / names[0]).write_text(json.dumps(broken))
    length.main(flags)
    said = capsys.readouterr().out
    assert "| 1 - 1 | not a number |" in said and "-float32: " not in said
    with pytest.raises(ValueError, match="was made with tokens 600, not 601: take another --out"):
        length.main([*flags, "--tokens", "601"])
    for change, words in (
        ({"weights": "0" * 16}, "is of other weights"),
        ({"weights": None}, "does not say of which"),
    ):
        (out / names[0]).write_text(json.dumps(first | change))
        with pytest.raises(ValueError, match=f"{words}.*take another --out"):
            length.main(flags)


def test_mistakes_are_named(tmp_path, folder, capsys):  # noqa: F811
    for flags, complaint in (
        ([], "name at least one checkpoint, or --report"),
        (["a", "--piece", "0"], "--piece must be at least 1, got 0"),
        (["a", "--document-tokens", "-1"], "--document-tokens must be at least 1, got -1"),
    ):
        with pytest.raises(SystemExit):
            length.main(flags)
        assert complaint in capsys.readouterr().err
    with pytest.raises(ValueError, match="names no file"):
        length.main([str(folder), "--text", str(tmp_path / "*.txt"), "--out", str(tmp_path)])
    with pytest.raises(ValueError, match="holds no measurement yet"):
        length.main(["--report", "--out", str(tmp_path)])
    llama = LlamaConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1, intermediate_size=8, vocab_size=280)
    LlamaForCausalLM(llama).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a LlamaForCausalLM, which has no memories"):
        trained_model(str(tmp_path), torch.float32, "cpu")
