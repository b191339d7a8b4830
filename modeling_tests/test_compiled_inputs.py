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
"""Packs and masks in a compiled call mean what they mean in an eager one, or the graph raises: nothing is dropped because a
graph is being made."""

from functools import partial

import pytest
import torch
from test_generation_miras import TOLERANCE, build
from test_inputs import LENGTHS, TOKENS, WAYS
from transformers import DataCollatorWithFlattening, StaticCache, Trainer, TrainingArguments

from miras_hf.compat import CACHE_NAME


@pytest.fixture(autouse=True)
def fresh_graphs():
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 99, (2, TOKENS), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("kind, way", [(("moneta", False), "position_ids"), *((("yaad", True), way) for way in WAYS)])
@torch.no_grad()
def test_a_pack_is_several_sequences(ids, kind, way):
    model = build(*kind, initializer_range=0.3)
    alone = torch.cat([model(part[None]).logits[0] for part in ids[0].split(LENGTHS)])
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(ids[:1], **{way: WAYS[way]}).logits[0], alone, **TOLERANCE)
    # and positions that go up are one sequence, of which another graph is made
    whole = model(ids[:1]).logits
    torch.testing.assert_close(compiled(ids[:1], position_ids=torch.arange(TOKENS)[None]).logits, whole, **TOLERANCE)


def test_training_on_packs_has_the_same_losses(ids, tmp_path):
    """What Trainer's own collator of packs gives: positions that begin again."""
    rows = [{"input_ids": part.tolist()} for part in ids[0].split(LENGTHS)]
    losses = []
    for compiled in (False, True):
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=3,
            learning_rate=1e-2,
            logging_steps=1,
            torch_compile=compiled,
            torch_compile_backend="eager" if compiled else None,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        model = build("yaad", True, initializer_range=0.3)
        trainer = Trainer(model, arguments, train_dataset=rows, data_collator=DataCollatorWithFlattening())
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def mask_of(*pads: int) -> torch.Tensor:
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[0, list(pads)] = 0
    return mask


@torch.no_grad()
def test_a_whole_graph_asserts_what_it_cannot_look_at(ids):
    model = build("yaad", True, initializer_range=0.3, sliding_window=4)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    left = mask_of(0, 1, 2)
    torch.testing.assert_close(
        compiled(ids, attention_mask=left).logits[left.bool()],
        model(ids, attention_mask=left).logits[left.bool()],
        **TOLERANCE,
    )
    for wrong, message in ((mask_of(5, 6), "must not have pads between real tokens"), (2 * left, "0 and 1 only")):
        with pytest.raises(ValueError, match=message):
            model(ids, attention_mask=wrong)
        with pytest.raises(RuntimeError, match=message):
            compiled(ids, attention_mask=wrong)


@torch.no_grad()
def test_a_hybrid_decodes_in_a_whole_graph_and_asserts_that_no_pads_were_read(ids):
    """A step over a static cache, whose length is a tensor, without a mask."""
    model = build("yaad", True, initializer_range=0.3)
    whole = model(ids).logits
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for mask, message in ((None, None), (mask_of(0, 1)[:, :6], "must cover the whole text: what was read has pads")):
        cache = StaticCache(config=model.config, max_cache_len=TOKENS)
        model(ids[:, :6], attention_mask=mask, **{CACHE_NAME: cache})
        step = partial(compiled, ids[:, 6:7], use_cache=True, **{CACHE_NAME: cache})
        if message is None:
            torch.testing.assert_close(step().logits, whole[:, 6:7], **TOLERANCE)
        else:
            with pytest.raises(RuntimeError, match=message):
                step()


@torch.no_grad()
def test_an_exported_graph_refuses_packs(ids):
    model = build("moneta", initializer_range=0.3)

    class Logits(torch.nn.Module):
        def forward(self, ids, positions):
            return model(ids, position_ids=positions, use_cache=False).logits

    ordinary = torch.arange(TOKENS)[None]
    exported = torch.export.export(Logits(), (ids[:1], ordinary)).module()
    torch.testing.assert_close(exported(ids[:1], ordinary), model(ids[:1]).logits, **TOLERANCE)
    with pytest.raises(RuntimeError, match="a pack's sequences cannot be exported"):
        exported(ids[:1], WAYS["position_ids"])
