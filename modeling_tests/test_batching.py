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
"""Batches as they come: rows of different lengths that end at different times say what each says alone."""

import copy

import pytest
import torch
from test_generation_miras import CONFIGS, build, padded

import miras_hf


PAD = 0
GREEDY = {"max_new_tokens": 14, "do_sample": False, "suppress_tokens": [PAD]}
LENGTHS = (13, 8, 2)


@pytest.fixture(scope="module", params=[(name, hybrid) for name in CONFIGS for hybrid in (False, True)], ids=str)
def model(request):
    return build(*request.param, initializer_range=0.3)


@pytest.fixture(scope="module")
def rows():
    texts = torch.randint(1, 99, (len(LENGTHS), 21), generator=torch.Generator().manual_seed(0))
    return [text[:length] for text, length in zip(texts, LENGTHS, strict=True)]


@torch.no_grad()
def read(model, ids, mask):
    return model(ids, attention_mask=mask, use_cache=True).past_key_values


def answers_alone(model, rows, **options):
    """Without a cache, since two answers from a broken one may agree."""
    return [model.generate(row[None], use_cache=False, **options)[:, len(row) :] for row in rows]


def ends(model, rows):
    """Tokens at which the first two rows end, early and later; and what the rows say, ended."""
    free = [answer[0].tolist() for answer in answers_alone(model, rows, **GREEDY)]
    eos = [free[0][2], free[1][7]]
    alone = answers_alone(model, rows, eos_token_id=eos, **GREEDY)
    lengths = [answer.shape[1] for answer in alone]
    assert len(set(lengths)) > 1
    return eos, alone, lengths


def test_rows_end_at_different_times(model, rows):
    ids, mask = padded(rows, "left", length=max(LENGTHS))
    eos, alone, lengths = ends(model, rows)
    batch = model.generate(ids, attention_mask=mask, eos_token_id=eos, **GREEDY)[:, ids.shape[1] :]
    assert batch.shape[1] == max(lengths)
    for answer, expected, length in zip(batch, alone, lengths, strict=True):
        assert torch.equal(answer[:length], expected[0])
        assert (answer[length:] == PAD).all()


@pytest.mark.parametrize("options", [{"num_beams": 3, "num_return_sequences": 2}, {"num_beams": 4}], ids=str)
def test_beams_of_padded_rows(model, rows, options):
    ids, mask = padded(rows, "left", length=max(LENGTHS))
    options = GREEDY | {"max_new_tokens": 8} | options
    batch = model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]
    assert torch.equal(batch, torch.cat(answers_alone(model, rows, **options)))


def test_samples_of_padded_rows_are_drawn_from_their_own_scores(model, rows):
    ids, mask = padded(rows, "left", length=max(LENGTHS))
    options = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 6, "suppress_tokens": [PAD]}
    torch.manual_seed(0)
    output = model.generate(ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **options)
    drawn = output.sequences[:, ids.shape[1] :]
    assert not torch.equal(drawn[0], drawn[1])
    with torch.no_grad():
        for i, answer in enumerate(drawn):
            row = rows[i // 2]
            logits = model(torch.cat((row, answer))[None]).logits[0, len(row) - 1 : -1]
            got = torch.stack([step[i] for step in output.logits])
            assert (got - logits).norm() <= 1e-4 * logits.norm()


def test_a_padded_prompt_is_read_once(model, rows):
    """Its cache goes on with the whole text or with what is new, for one answer a row or several."""
    ids, mask = padded(rows, "left", length=max(LENGTHS))
    cache = read(model, ids, mask)
    new = torch.randint(1, 99, (3, 4), generator=torch.Generator().manual_seed(1))
    mask = torch.cat((mask, torch.ones_like(new)), dim=1)
    alone = torch.cat(answers_alone(model, [torch.cat(pair) for pair in zip(rows, new, strict=True)], **GREEDY))
    for given in (torch.cat((ids, new), dim=1), new):
        reused = copy.deepcopy(cache)
        output = model.generate(given, attention_mask=mask, past_key_values=reused, **GREEDY)
        assert torch.equal(output[:, given.shape[1] :], alone)
    cache.batch_repeat_interleave(2)
    twice = {"num_beams": 2, "num_return_sequences": 2, **GREEDY}
    whole = torch.cat((ids, new), dim=1)
    output = model.generate(whole, attention_mask=mask, past_key_values=cache, **twice)
    assert torch.equal(output, model.generate(whole, attention_mask=mask, use_cache=False, **twice))


def test_a_batch_goes_on_after_rows_have_ended(model, rows):
    """What memories have read cannot become pads afterwards: refused; from a snapshot it is exact."""
    ids, mask = padded(rows, "left", length=max(LENGTHS))
    eos, alone, lengths = ends(model, rows)
    cache = read(model, ids[:, :-1], mask[:, :-1])
    before = miras_hf.snapshot(cache)
    said = model.generate(ids, attention_mask=mask, past_key_values=cache, eos_token_id=eos, **GREEDY)
    new = torch.randint(1, 99, (3, 4), generator=torch.Generator().manual_seed(1))
    text = torch.cat((said, new), dim=1)
    answered = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    mask = torch.cat((mask, answered.long(), torch.ones_like(new)), dim=1)
    with pytest.raises(ValueError, match=r"have read \[.*miras_hf.snapshot"):
        model.generate(text, attention_mask=mask, past_key_values=cache, **GREEDY)

    miras_hf.restore(cache, before)
    output = model.generate(text, attention_mask=mask, past_key_values=cache, **GREEDY)[:, text.shape[1] :]
    turns = [torch.cat((row, a[0], n)) for row, a, n in zip(rows, alone, new, strict=True)]
    assert torch.equal(output, torch.cat(answers_alone(model, turns, **GREEDY)))
