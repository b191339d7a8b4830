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
"""Output projections by least squares: the solution by another way, of the texts alone, and what it leaves alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_convert import make_teacher, text

import miras_hf
from miras_hf.distillation import Alignment, alignment_errors, sequences_of
from miras_hf.output_fit import fit_outputs


LAYERS = [0, 2]


def make_pair(name="llama3-with-biases"):
    teacher = make_teacher(name)
    return miras_hf.convert(teacher, LAYERS, {"chunk_size": 4}), teacher


def read_and_returned(student, teacher, ids, layer, first):
    """What a memory's projection reads and its attention returns, of rows without pads, from the token `first` on."""
    alignment = Alignment(student, teacher)
    sequences, position = sequences_of(ids, None, None)
    hidden, positions, expected = alignment.attention(ids, None, sequences, position)[str(layer)]
    mixer, read = student.model.layers[layer].mixer, []
    with mixer.o_proj.register_forward_hook(lambda _, args, output: read.append(args[0])):
        mixer(hidden, position_embeddings=positions)
    return (x[:, first:].flatten(0, 1).double() for x in (read[0], expected))


@pytest.mark.parametrize("name", ["smollm", "llama3-with-biases"])
@torch.no_grad()
def test_projections_are_the_solution_of_least_squares(name):
    student, teacher = make_pair(name)
    before, ids = copy.deepcopy(student), text(40, rows=6)
    errors = fit_outputs(
        student, teacher, [{"input_ids": ids[:4], "labels": ids[:4]}, {"input_ids": ids[4:]}], 20.0, 3
    )
    for layer in LAYERS:
        projection = before.model.layers[layer].mixer.o_proj
        x, y = read_and_returned(before, teacher, ids, layer, first=3)
        bias = 0.0 if projection.bias is None else projection.bias.double()
        assert (projection.bias is None) == (name == "smollm")
        inherited = x @ projection.weight.double().T
        scale = torch.linalg.lstsq(inherited.flatten()[:, None], (y - bias).flatten()[:, None]).solution.item()
        # tokens that nobody wrote stand for what the projection was
        pull = (20.0 * x.square().mean()).sqrt() * torch.eye(x.shape[1], dtype=x.dtype)
        rows, wanted = torch.cat((x, pull)), torch.cat((y - bias, scale * pull @ projection.weight.double().T))
        expected = torch.linalg.lstsq(rows, wanted).solution.T
        found = student.model.layers[layer].mixer.o_proj
        torch.testing.assert_close(found.weight.double(), expected, rtol=1e-4, atol=1e-5)
        left = (x @ expected.T + bias - y).norm() / (y - bias).norm()
        assert errors[layer] == pytest.approx(left.item(), rel=1e-4)
        assert left < 0.9 * (inherited + bias - y).norm() / (y - bias).norm()
    changed = {name for name, p in student.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    assert changed == {f"model.layers.{i}.mixer.o_proj.weight" for i in LAYERS}
    errors_of = [alignment_errors(m, teacher, [{"input_ids": ids}]) for m in (before, student)]
    assert all(errors_of[1][i] < errors_of[0][i] for i in LAYERS)


def test_few_tokens_and_a_strong_prior_only_say_less():
    student, teacher = make_pair()
    before = student.model.layers[2].mixer.o_proj.weight.detach().clone()
    fit_outputs(student, teacher, [{"input_ids": text(7)}], prior_tokens=1e9)
    ratio = student.model.layers[2].mixer.o_proj.weight.detach() / before
    assert ratio.std() < 1e-3 * ratio.mean().abs() and ratio.mean() != pytest.approx(1.0, abs=1e-2)


@pytest.mark.parametrize("how", ["padded", "packed"])
def test_texts_count_however_they_lie(how):
    rows = [text(13, rows=1), text(9, rows=1, seed=1)]
    if how == "packed":
        places = torch.cat((torch.arange(13), torch.arange(9)))[None]
        batch = {"input_ids": torch.cat(rows, dim=1), "position_ids": places}
    else:
        mask = torch.tensor([[1] * 13, [0] * 4 + [1] * 9])
        batch = {"input_ids": torch.cat((rows[0], F.pad(rows[1], (4, 0), value=5))), "attention_mask": mask}
    weights = []
    for batches in ([batch], [{"input_ids": row} for row in rows]):
        student, teacher = make_pair("smollm")
        teacher.train()
        fit_outputs(student.train(), teacher, batches)
        assert student.training and teacher.training
        weights.append(student.model.layers[2].mixer.o_proj.weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)


def test_what_cannot_be_fitted_is_named():
    student, teacher = make_pair("smollm")
    for prior in (0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"`prior_tokens` must be positive and finite, got {prior}"):
            fit_outputs(student, teacher, [{"input_ids": text(9)}], prior)
    for batches in ([], [{"input_ids": text(4)}]):
        with pytest.raises(ValueError, match="at least one text longer than `sink_tokens`, got none"):
            fit_outputs(student, teacher, batches)
    with pytest.raises(ValueError, match="must be a MirasForCausalLM with memories"):
        fit_outputs(teacher, teacher, [])
