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
"""What a model is called with: every combination gives one answer or a named error."""

import copy
import itertools
import logging

import pytest
import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from test_generation_miras import CONFIGS, TOLERANCE, build
from transformers import DynamicCache, Trainer, TrainingArguments

import miras_hf
from miras_hf.compat import CACHE_NAME
from miras_hf.sequences import Sequences, logger


LENGTHS = (5, 1, 4)
TOKENS = sum(LENGTHS)
BORDERS = torch.tensor([0, 5, 6, 10], dtype=torch.int32)
# every way of saying that a row holds sequences of 5, 1 and 4 tokens
WAYS = {
    "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None],
    "cu_seq_lens_q": BORDERS,
    "seq_idx": torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))[None].int(),
}
EXTRAS = {"cu_seq_lens_k": BORDERS, "max_length_q": 5, "max_length_k": 5}


@pytest.fixture(scope="module", params=[("yaad", True), ("moneta", False)], ids=str)
def model(request):
    return build(*request.param, initializer_range=0.3)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 99, (2, TOKENS), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def alone(model, ids):
    """Logits of the three sequences of row 0, each read alone."""
    with torch.no_grad():
        return torch.cat([model(part[None]).logits[0] for part in ids[0].split(LENGTHS)])


COMBINATIONS = [ways for n in (1, 2, 3) for ways in itertools.combinations(WAYS, n)]


@pytest.mark.parametrize("mask", [None, "ones"])
@pytest.mark.parametrize("ways", COMBINATIONS, ids="+".join)
@torch.no_grad()
def test_every_way_of_packing_gives_one_answer(model, ids, alone, ways, mask):
    options = {way: WAYS[way] for way in ways}
    if mask:
        options["attention_mask"] = torch.ones(1, TOKENS, dtype=torch.long)
    torch.testing.assert_close(model(ids[:1], **options).logits[0], alone, **TOLERANCE)
    if "cu_seq_lens_q" in ways:
        torch.testing.assert_close(model(ids[:1], **options, **EXTRAS).logits[0], alone, **TOLERANCE)


@torch.no_grad()
def test_positions_of_a_pack_may_start_anywhere(ids):
    """Rotary embeddings are relative: positions shifted within a sequence say the same, to attention layers as well."""
    model = build("yaad", True, initializer_range=0.3, use_rope=False)
    shifted = WAYS["position_ids"] + 7 * WAYS["seq_idx"]
    expected = model(ids[:1], position_ids=WAYS["position_ids"]).logits
    torch.testing.assert_close(model(ids[:1], position_ids=shifted).logits, expected, **TOLERANCE)


ON = torch.arange(TOKENS)[None]
CONTRADICTIONS = {
    "positions_go_on": {"cu_seq_lens_q": BORDERS, "position_ids": ON},
    "positions_restart_elsewhere": {"cu_seq_lens_q": BORDERS, "position_ids": ON % 3},
    "seq_idx_elsewhere": {"seq_idx": torch.zeros(1, TOKENS).int(), "position_ids": WAYS["position_ids"]},
    "seq_idx_and_borders": {"seq_idx": (ON > 3).int(), "cu_seq_lens_q": BORDERS},
}


@pytest.mark.parametrize("options", CONTRADICTIONS.values(), ids=CONTRADICTIONS)
@pytest.mark.parametrize("mask", [None, torch.ones(1, TOKENS)], ids=["none", "ones"])
def test_contradictions_are_refused(model, ids, options, mask):
    with pytest.raises(ValueError, match="must begin sequences at the same tokens: they disagree at token [1-9]"):
        model(ids[:1], attention_mask=mask, **options)


def test_what_goes_with_the_borders_is_checked(model, ids):
    for wrong, message in (
        ({"cu_seq_lens_k": torch.tensor([0, 10])}, "`cu_seq_lens_k` must equal"),
        ({"max_length_q": 4}, "`max_length_q` must be at least the length of the longest sequence, 5, got 4"),
        ({"max_length_k": 1}, "`max_length_k` must be at least"),
    ):
        with pytest.raises(ValueError, match=message):
            model(ids[:1], **{"cu_seq_lens_q": BORDERS, **EXTRAS, **wrong})
    with pytest.raises(ValueError, match="`max_length_q` goes with `cu_seq_lens_q`"):
        model(ids[:1], max_length_q=10)


def test_packs_have_no_pads_and_no_cache(model, ids):
    mask = torch.ones(1, TOKENS, dtype=torch.long)
    mask[0, 0] = 0
    for way, value in WAYS.items():
        with pytest.raises(ValueError, match="`attention_mask` must not have pads where"):
            model(ids[:1], attention_mask=mask, **{way: value})
        with pytest.raises(ValueError, match="`cache` cannot be used with packed sequences"):
            model(ids[:1], cache=DynamicCache(config=model.config), **{way: value})


@torch.no_grad()
def test_positions_of_padded_rows_are_no_pack(model, ids):
    """`generate()` gives pads a position of their own, which restarts nothing."""
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, :4] = 0
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    logits = model(ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(logits[1, 4:], model(ids[1:, 4:]).logits[0], **TOLERANCE)


INT = torch.zeros(2, TOKENS, dtype=torch.long)
WRONG = {
    "no_rows": ({"input_ids": INT[:0]}, "`input_ids` must hold at least one row and one token"),
    "no_tokens": ({"input_ids": INT[:, :0]}, "`input_ids` must hold at least one row and one token"),
    "ids_of_one_dimension": ({"input_ids": INT[0]}, "`input_ids` must be int64 or int32 of shape"),
    "ids_are_floats": ({"input_ids": INT.float()}, "got float32 of shape"),
    "ids_are_a_list": ({"input_ids": [[1, 2]]}, "got list"),
    "ids_below": ({"input_ids": INT - 1}, "at least 0 and below `vocab_size` \\(99\\), got ids from -1 to -1"),
    "ids_above": ({"input_ids": INT + 99}, "got ids from 99 to 99"),
    "embeds_of_another_width": ({"inputs_embeds": torch.zeros(2, 3, 31)}, "\\[batch, tokens, 32\\]"),
    "embeds_are_integers": ({"inputs_embeds": torch.zeros(2, 3, 32).long()}, "must be floating point"),
    "embeds_of_no_tokens": ({"inputs_embeds": torch.zeros(2, 0, 32)}, "`inputs_embeds` must hold at least one row"),
    "nothing": ({}, "exactly one of input_ids or inputs_embeds"),
    "both": ({"input_ids": INT, "inputs_embeds": torch.zeros(2, TOKENS, 32)}, "exactly one of"),
    "positions_of_three_dimensions": (
        {"input_ids": INT, "position_ids": INT[None]},
        "`position_ids` must be integers",
    ),
    "positions_too_short": (
        {"input_ids": INT, "position_ids": INT[:, 1:]},
        "`position_ids` must be integers of shape",
    ),
    "positions_are_floats": ({"input_ids": INT, "position_ids": INT.float()}, "`position_ids` must be integers"),
    "use_cache_is_a_word": ({"input_ids": INT, "use_cache": "yes"}, "`use_cache` must be true or false"),
    "cache_is_a_tuple": ({"input_ids": INT, "cache": ((INT, INT),)}, "`cache` must be a `Cache`.* got tuple"),
    "cache_of_nobody": ({"input_ids": INT, "cache": DynamicCache()}, "`cache` must be made for this model"),
    "no_borders": ({"input_ids": INT[:1], "cu_seq_lens_q": BORDERS[:0]}, "`cu_seq_lens_q` must be integers of shape"),
    "one_border": ({"input_ids": INT[:1], "cu_seq_lens_q": BORDERS[:1]}, "`cu_seq_lens_q` must be integers of shape"),
    "borders_fall": ({"input_ids": INT[:1], "cu_seq_lens_q": torch.tensor([0, 6, 5, 10])}, "must rise from 0"),
    "borders_beyond": ({"input_ids": INT[:1], "cu_seq_lens_q": torch.tensor([0, 25])}, "must rise from 0"),
    "borders_are_floats": ({"input_ids": INT[:1], "cu_seq_lens_q": BORDERS.float()}, "must be integers"),
    "borders_of_rows": ({"input_ids": INT[:1], "cu_seq_lens_q": BORDERS[None]}, "must be integers"),
    "seq_idx_is_short": ({"input_ids": INT, "seq_idx": INT[:, 1:]}, "`seq_idx` must be integers of shape"),
    "seq_idx_is_float": ({"input_ids": INT, "seq_idx": INT.float()}, "`seq_idx` must be integers"),
    "labels_are_short": ({"input_ids": INT, "labels": INT[:, 1:]}, "`labels` must have the shape of the logits"),
    "logits_to_keep": ({"input_ids": INT, "logits_to_keep": -1}, "`logits_to_keep` must be zero"),
}


@pytest.mark.parametrize("options, message", WRONG.values(), ids=WRONG)
def test_wrong_inputs_are_named(model, options, message):
    with pytest.raises(ValueError, match=message):
        model(**options)


@pytest.mark.parametrize("head", ["Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification"])
@torch.no_grad()
def test_ids_of_both_integer_types_give_one_answer(model, ids, head):
    """Against embeddings that are looked up by hand, which know no type of ids."""
    family = type(model).__name__.removesuffix("ForCausalLM")
    torch.manual_seed(0)
    wide = getattr(miras_hf, family + head)(copy.deepcopy(model.config)).eval()
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    embeds = wide.get_input_embeddings().weight[ids]
    expected = wide(inputs_embeds=embeds, attention_mask=mask)[0]
    for dtype in (torch.int64, torch.int32):
        assert torch.equal(wide(ids.to(dtype), attention_mask=mask)[0], expected)
        labels = {"Model": {}, "ForSequenceClassification": {"labels": torch.tensor([0, 1])}}
        labels = labels.get(head, {"labels": ids.to(dtype) % 2})
        labels = {name: value.to(dtype) for name, value in labels.items()}
        answer = wide(ids.to(dtype), attention_mask=mask, **labels)
        if labels:
            logits = answer.logits.flatten(0, -2)
            targets = labels["labels"]
            if head == "ForCausalLM":
                predicts = mask[:, :-1] == 1  # no pad does
                logits, targets = answer.logits[:, :-1][predicts], targets[:, 1:][predicts]
                following = F.pad(labels["labels"], (0, 1), value=-100)[:, 1:]  # a view with gaps
                shifted = wide(ids, attention_mask=mask, shift_labels=following)
                torch.testing.assert_close(shifted.loss, answer.loss)
            # by hand: minus the log probability of the target
            by_hand = -logits.double().log_softmax(-1)[torch.arange(targets.numel()), targets.flatten().long()].mean()
            torch.testing.assert_close(answer.loss.double(), by_hand, rtol=1e-5, atol=1e-6)
    if head == "ForSequenceClassification":
        wide.config.pad_token_id = 0
        padded = torch.where(mask == 1, ids, 0).flip(1)
        # the last token that is no pad, found by hand
        alone = torch.cat([wide(row[row != 0][None])[0] for row in padded])
        torch.testing.assert_close(wide(padded.int())[0], alone, **TOLERANCE)


@torch.no_grad()
def test_generation_from_int32(model, ids):
    for options in ({}, {"num_beams": 2}, {"do_sample": True}, {"prompt_lookup_num_tokens": 2}):
        answers = []
        for dtype in (torch.int64, torch.int32):
            torch.manual_seed(0)
            row = ids[:1].to(dtype)
            answers.append(model.generate(row, max_new_tokens=5, min_new_tokens=5, use_cache=True, **options))
        assert answers[0].shape == (1, TOKENS + 5) and torch.equal(*answers), options
    # greedy, by the whole text's logits
    text = ids[:1]
    for _ in range(5):
        logits = model(text).logits[:, -1]
        if model.generation_config.eos_token_id is not None:
            logits[:, model.generation_config.eos_token_id] = -torch.inf
        text = torch.cat([text, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(model.generate(ids[:1].int(), max_new_tokens=5, min_new_tokens=5), text)


@torch.no_grad()
def test_a_cache_of_other_rows_is_named(model, ids):
    cache = DynamicCache(config=model.config)
    model(ids, cache=cache)
    with pytest.raises(ValueError, match="`cache` has read 2 rows and cannot go on with 1"):
        model(ids[:1], cache=cache)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_padded_rows_loss_is_that_of_the_row_alone(model, ids, side):
    pads = {"left": (4, 0), "right": (0, 4)}[side]
    padded = F.pad(ids[:1], pads, value=7)  # no pad token of anybody's
    mask = F.pad(torch.ones_like(ids[:1]), pads)
    labels = padded.masked_fill(mask == 0, -100)
    alone = model(ids[:1], labels=ids[:1]).loss
    torch.testing.assert_close(model(padded, attention_mask=mask, labels=labels).loss, alone, **TOLERANCE)
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    both = {"labels": labels, "shift_labels": shifted}
    torch.testing.assert_close(model(padded, attention_mask=mask, **both).loss, alone, **TOLERANCE)


@torch.no_grad()
def test_a_loss_after_a_cache_is_that_of_the_new_tokens(model, ids):
    cache = DynamicCache(config=model.config)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    model(ids[:, :6], attention_mask=mask[:, :6], cache=cache)
    found = model(ids[:, 6:], attention_mask=mask, cache=cache, labels=ids[:, 6:]).loss
    logits = model(ids, attention_mask=mask).logits[:, 6:-1]
    torch.testing.assert_close(found, F.cross_entropy(logits.flatten(0, 1), ids[:, 7:].flatten()), **TOLERANCE)


# -- the second turn of a conversation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("with_mask", [False, True])
def test_new_ids_alone_go_on_from_a_cache(model, ids, with_mask):
    """The natural second turn: `generate(new_ids, cache=cache)` says what the whole text says."""
    greedy = {"max_new_tokens": 6, "do_sample": False}
    first, new = ids[:, :7], ids[:, 7:]
    expected = model.generate(ids, **greedy)[:, TOKENS:]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(first, cache=cache)
    options = {"attention_mask": torch.ones_like(new)} if with_mask else {}
    answer = model.generate(new, cache=cache, **options, **greedy)
    assert torch.equal(answer[:, new.shape[1] :], expected)
    # the whole text with its mask is the other way, and goes on saying the same
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(first, cache=cache)
    assert torch.equal(
        model.generate(ids, attention_mask=torch.ones_like(ids), cache=cache, **greedy)[:, TOKENS:], expected
    )


def test_more_new_ids_than_were_read_are_told_apart_by_the_mask(model, ids, caplog, monkeypatch):
    """More ids than that are the whole text, as everywhere in Transformers: said, unless a mask says it."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    logger.warning_once.cache_clear()
    first, new = ids[:, :3], ids[:, 3:]
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)[:, TOKENS:]

    def answer(**options):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(first, cache=cache)
        return model.generate(new, cache=cache, max_new_tokens=4, do_sample=False, **options)[:, new.shape[1] :]

    assert torch.equal(answer(attention_mask=torch.ones_like(ids)), expected) and not caplog.text
    assert answer().shape == expected.shape
    assert "7 input ids after a cache that has read 3 tokens" in caplog.text and "mask` of 10 columns" in caplog.text


def test_new_ids_alone_after_pads_are_refused(model, ids):
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, :2] = 0
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :7], attention_mask=mask, cache=cache)
    with pytest.raises(ValueError, match=r"must cover the whole text, 7 tokens .* its rows have \[7, 5\] real tokens"):
        model.generate(ids[:, 7:], cache=copy.deepcopy(cache), max_new_tokens=2)
    with pytest.raises(ValueError, match=r"must cover the whole text.*got shape \(2, 5\)"):
        model.generate(ids[:, 7:], attention_mask=mask[:, :5], cache=cache, max_new_tokens=2)


@pytest.mark.parametrize("layers", [{}, {"layer_types": ["full_attention", "miras_memory"], "sliding_window": 2048}])
@pytest.mark.parametrize("cuts", [(7, 3), (6, 1, 1, 2)])
@torch.no_grad()
def test_a_mask_of_the_new_tokens_goes_on_from_a_cache(ids, layers, cuts):
    """In hybrids, too, whose attention takes the first column of a mask for the first token of the text."""
    model = build("yaad", True, initializer_range=0.3, **layers)
    whole = model(ids).logits
    for mask_of in (lambda part: torch.ones_like(part), lambda part: None):
        cache = DynamicCache(config=model.config)
        parts = [model(part, attention_mask=mask_of(part), cache=cache).logits for part in ids.split(cuts, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, **TOLERANCE)


@torch.no_grad()
def test_attention_goes_on_after_pads_with_the_whole_mask_alone(ids):
    model = build("yaad", True, initializer_range=0.3)
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, :2] = 0
    cache = DynamicCache(config=model.config)
    model(ids[:, :7], attention_mask=mask[:, :7], cache=cache)
    for given in (None, mask[:, 7:]):
        with pytest.raises(
            ValueError, match=r"must cover the whole text, 7 tokens .* its rows have \[7, 5\] real tokens"
        ):
            model(ids[:, 7:], attention_mask=given, cache=cache)
    later = model(ids[:, 7:], attention_mask=mask, cache=cache).logits[1]
    torch.testing.assert_close(later, model(ids[1:, 2:]).logits[0, 5:], **TOLERANCE)
    # memories have counted what they read, and need no mask of it
    memories = build("moneta", initializer_range=0.3)
    cache = DynamicCache(config=memories.config)
    memories(ids[:, :7], attention_mask=mask[:, :7], cache=cache)
    later = memories(ids[:, 7:], cache=cache).logits[1]
    torch.testing.assert_close(later, memories(ids[1:, 2:]).logits[0, 5:], **TOLERANCE)


@torch.no_grad()
def test_attention_alone_has_counted_no_pads(ids):
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = miras_hf.MirasConfig(**sizes, layer_types=["full_attention"] * 2, initializer_range=0.3)
    model = miras_hf.MirasForCausalLM(config).eval()
    cache = DynamicCache(config=model.config)
    model(ids[:, :7], cache=cache)
    with pytest.raises(ValueError, match=r"must cover the whole text.* without memory layers.* Got shape \(2, 3\)"):
        model(ids[:, 7:], attention_mask=torch.ones(2, 3), cache=cache)
    later = model(ids[:, 7:], attention_mask=torch.ones(2, TOKENS), cache=cache).logits
    torch.testing.assert_close(later, model(ids).logits[:, 7:], **TOLERANCE)


def test_checkpointed_layers_get_no_cache_in_training(ids):
    model = build("yaad", True)
    model.gradient_checkpointing_enable()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, cache=cache)  # in evaluation nothing is checkpointed
    with pytest.raises(ValueError, match="`cache` cannot be used with activation checkpointing in training"):
        model.train()(ids, cache=cache)


def test_sequences_follow_a_layer_to_its_device():
    """Accelerate sends a layer's arguments to the layer's device, and what has no `to` stays where it was."""
    for made in (Sequences(mask=torch.tensor([[False, True]])), Sequences(cu_seqlens=BORDERS)):
        there = send_to_device(made, "meta")
        tensors = {name: value for name, value in vars(made).items() if value is not None}
        assert len(tensors) > 1 and all(getattr(there, name).device.type == "meta" for name in tensors)
        assert all(value.device.type == "cpu" for value in tensors.values())
        assert vars(there).keys() == vars(made).keys()


def test_embeddings_after_a_cache_are_those_of_the_whole_text(model, ids):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, cache=cache)
    with pytest.raises(ValueError, match="`inputs_embeds` must be those of the whole text"):
        model.generate(inputs_embeds=torch.zeros(2, 3, 32), cache=cache, max_new_tokens=2)


# -- heads --------------------------------------------------------------------------------------------------------------


def classifier(kind, **options):
    torch.manual_seed(0)
    config = CONFIGS["yaad"](**{**build("yaad", True).config.to_diff_dict(), "num_labels": 3, **options})
    return getattr(miras_hf, f"YaadFor{kind}Classification")(config).eval()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("given", ["input_ids", "inputs_embeds"])
@torch.no_grad()
def test_a_classifier_looks_at_the_last_real_token(ids, side, given):
    model = classifier("Sequence")
    mask = torch.ones_like(ids)
    mask[1, slice(0, 3) if side == "left" else slice(TOKENS - 3, None)] = 0
    inputs = ids if given == "input_ids" else model.model.embed_tokens(ids)
    logits = model(**{given: inputs}, attention_mask=mask).logits
    alone = model(ids[1:, mask[1].bool()], attention_mask=torch.ones(1, TOKENS - 3)).logits
    torch.testing.assert_close(logits[1:], alone, **TOLERANCE)
    torch.testing.assert_close(logits[:1], model(ids[:1]).logits, **TOLERANCE)


@torch.no_grad()
def test_a_classifier_believes_the_mask_where_pads_look_like_text(ids):
    """With the end of text as pad token, a real last token has the pad's id."""
    model = classifier("Sequence")
    text = torch.cat((ids[:1], torch.tensor([[model.config.pad_token_id]])), dim=1)
    expected = model.score(model.model(text).last_hidden_state[:, -1])
    torch.testing.assert_close(model(text, attention_mask=torch.ones_like(text)).logits, expected, **TOLERANCE)


def test_a_classifier_refuses_what_it_cannot_tell(ids):
    model = classifier("Sequence")
    with pytest.raises(ValueError, match="Every row must have a real token"):
        model(ids, attention_mask=torch.tensor([[1] * TOKENS, [0] * TOKENS]))
    for way in WAYS:
        for mask in (None, torch.ones(1, TOKENS)):
            with pytest.raises(ValueError, match="one sequence a row"):
                model(ids[:1], attention_mask=mask, **{way: WAYS[way]})
    with pytest.raises(ValueError, match="`attention_mask` must be given for several rows"):
        classifier("Sequence", pad_token_id=None)(ids)


@pytest.mark.parametrize("kind", ["Sequence", "Token"])
def test_accumulated_batches_of_a_classifier_have_one_gradient(ids, kind, tmp_path):
    """Two batches accumulated move the weights as one batch of both does."""
    rows = [{"input_ids": row, "labels": row % 3 if kind == "Token" else row[0] % 3} for row in ids]
    heads = []
    for batch, accumulation in ((2, 1), (1, 2)):
        model = classifier(kind)
        args = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            learning_rate=0.1,
            optim="sgd",
            max_grad_norm=0.0,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        Trainer(model=model, args=args, train_dataset=rows).train()
        heads.append(model.score.weight.detach())
    torch.testing.assert_close(heads[0], heads[1], rtol=1e-4, atol=1e-6)


def test_training_makes_no_cache(ids, tmp_path, monkeypatch):
    """`Trainer` turns the cache off for its forwards, and outputs hold none."""
    model = build("yaad", True)
    caches = []
    forward = type(model).forward

    def spy(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        caches.append(getattr(outputs, CACHE_NAME))
        return outputs

    monkeypatch.setattr(type(model), "forward", spy)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = Trainer(model=model, args=args, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    trainer.evaluate()
    assert caches and all(cache is None for cache in caches)


def test_what_generate_consumes_reaches_no_forward(model, ids):
    """`generate()` hands its `tokenizer` on to every step, which knows no such keyword."""
    expected = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False, tokenizer=object()), expected)


@pytest.mark.parametrize("family", ["Moneta", "Yaad", "Memora"])
def test_gradients_of_spikes_are_numbers_over_a_long_text(family):
    torch.manual_seed(0)
    config = getattr(miras_hf, f"{family}Config")(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=64, chunk_size=16
    )
    model = getattr(miras_hf, f"{family}ForCausalLM")(config)
    embeds = torch.randn(1, 2048, 32)
    embeds[0, 100] *= 1e30
    embeds[0, 900, 3] = 1e30
    embeds.requires_grad_()
    model(inputs_embeds=embeds, labels=torch.zeros(1, 2048, dtype=torch.long), use_cache=False).loss.backward()
    found = [embeds.grad, *(p.grad for p in model.parameters() if p.grad is not None)]
    assert len(found) > 20 and all(x.isfinite().all() and x.abs().amax() > 0 for x in found)
