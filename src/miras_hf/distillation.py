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
"""How the memories of a converted Transformer learn from it: layer by layer first, then by what the whole model says.

Stage 1, [`AlignmentTrainer`]: every memory reads what its teacher's attention layer reads, and learns to return what that
returns. Stage 2, [`DistillationTrainer`]: the hybrid learns the distribution of its teacher's next token. After them it is
trained as any model.
"""

import copy
import dataclasses
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, Trainer

from .configuration_miras import MEMORY_LAYER
from .model_card import ModelCardMixin
from .modeling_miras import MirasForCausalLM, MirasMixer
from .sequences import Sequences, packed_sequences, padded_sequences
from .weight_decay import exempt_from_trainer


class Alignment(nn.Module):
    """
    The memories of a hybrid beside the attention layers that they replace, as a model whose loss is how far they are apart.

    The frozen teacher reads the text, and every memory what the attention layer in its place reads: no error and no
    gradient goes from layer to layer. Parameters are those of the memory layers alone.

    Args:
        student (`MirasForCausalLM`): A hybrid that [`~miras_hf.convert`] made of the teacher.
        teacher (`PreTrainedModel`): The model that was converted.
        sink_tokens (`int`, *optional*, defaults to 4):
            How many tokens at the start of a text do not count. Attention gives the first tokens weight that means
            nothing, and their errors would outweigh all others.

    Raises:
        `ValueError`: for models that are not a hybrid with memories and its teacher.
    """

    _no_split_modules = ["MirasMixer"]

    def __init__(self, student: MirasForCausalLM, teacher: PreTrainedModel, sink_tokens: int = 4):
        super().__init__()
        check_pair(student, teacher)
        if type(sink_tokens) is not int or sink_tokens < 0:
            raise ValueError(f"`sink_tokens` must be an integer of at least 0, got {sink_tokens!r}.")
        layers = enumerate(student.config.layer_types)
        self.mixers = nn.ModuleDict(
            {str(i): student.model.layers[i].mixer for i, kind in layers if kind == MEMORY_LAYER}
        )
        self.sink_tokens = sink_tokens
        self._teacher = (teacher,)  # no module of this one: neither trained nor saved
        self._student = (student,)

    @property
    def teacher(self) -> PreTrainedModel:
        return self._teacher[0]

    @property
    def student(self) -> MirasForCausalLM:
        return self._student[0]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool = True,
    ) -> dict[str, Tensor]:
        """
        Args:
            input_ids (`torch.Tensor` of shape `[batch, tokens]`): a text in every row, or several, one after the other.
            attention_mask (`torch.Tensor` of shape `[batch, tokens]`, *optional*): 1 at real tokens.
            position_ids (`torch.Tensor` of shape `[batch, tokens]`, *optional*): begin anew where a packed text begins.
            return_loss (`bool`): what `Trainer` looks for before it evaluates without labels.

        Returns:
            `loss`, the mean of the layers' errors; `errors` of shape `[memory layers]`: the norms of the difference, summed
            over tokens, over those of what the teacher returns; `sizes` of the same shape, the latter sums; and `rows` of
            shape `[batch, 2, memory layers]`, both sums of every row. An untrained memory that returns nothing has an error
            of 1.
        """
        sequences, position = sequences_of(input_ids, attention_mask, position_ids)
        counts = position >= self.sink_tokens
        if not counts.any():
            raise ValueError(
                f"`input_ids` must have texts longer than `sink_tokens` ({self.sink_tokens}), got shape "
                f"{tuple(input_ids.shape)}."
            )
        seen = self.attention(input_ids, attention_mask, sequences, position)
        rows = []
        for i, (hidden_states, positions, expected) in seen.items():
            output, _ = self.mixers[i](hidden_states, position_embeddings=positions, sequences=sequences)
            rows.append(sums_of_rows(output, expected, counts))
        return errors_of(torch.stack(rows, dim=-1))

    @torch.no_grad()
    def teacher_sizes(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool = True,
    ) -> Tensor:
        """`sizes` of [`~Alignment.forward`], of the same arguments, without a word from the memories."""
        sequences, position = sequences_of(input_ids, attention_mask, position_ids)
        seen, counts = self.attention(input_ids, attention_mask, sequences, position), position >= self.sink_tokens
        return torch.stack([norms(expected, counts).sum() for _, _, expected in seen.values()])

    @torch.no_grad()
    def attention(
        self, input_ids: Tensor, attention_mask: Tensor | None, sequences: Sequences, position: Tensor
    ) -> dict[str, tuple]:
        """Inputs, rotary embeddings and outputs of the attention layers that memories replace, by the layer's index."""
        attention_mask = None if sequences.mask is None else attention_mask  # with one, teachers see no packs
        seen: dict[str, tuple] = {}

        def keep(name: str):
            def hook(module, args, kwargs, output):
                hidden_states = args[0] if args else kwargs["hidden_states"]
                seen[name] = (hidden_states.detach(), kwargs["position_embeddings"], output[0].detach())

            return hook

        decoder = self.teacher.model
        hooks = [
            decoder.layers[int(i)].self_attn.register_forward_hook(keep(i), with_kwargs=True) for i in self.mixers
        ]
        try:
            decoder(input_ids, attention_mask=attention_mask, position_ids=position.clamp(min=0), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return seen


def norms(x: Tensor, counts: Tensor) -> Tensor:
    """Norms of tokens, summed in every row: of `[batch, tokens, hidden_size]`, where the bool `[batch, tokens]` says so."""
    return torch.where(counts[..., None], x.float(), 0.0).norm(dim=-1).sum(-1)


def sums_of_rows(output: Tensor, expected: Tensor, counts: Tensor) -> Tensor:
    """`[batch, 2]`: norms of the differences and of what was expected, summed over the tokens of a row that count."""
    expected = expected.float()
    return torch.stack((norms(output.float() - expected, counts), norms(expected, counts)), dim=-1)


def errors_of(rows: Tensor) -> dict[str, Tensor]:
    """What [`Alignment`] returns, from sums of shape `[batch, 2, memory layers]`."""
    differences, sizes = rows.sum(0)
    errors = differences / sizes
    return {"loss": errors.mean(), "errors": errors, "sizes": sizes.detach(), "rows": rows.detach()}


class RowsTrainer(ModelCardMixin, Trainer):
    """A `Trainer` that evaluates exactly and writes model cards: of the latter, see [`~miras_hf.model_card.ModelCardMixin`].
    Batches are made by [`collate_texts`] unless there is a `data_collator`, with no need of a pad token. In evaluation,
    sums of every row are gathered, and its metrics are made of their totals.

    Means of batches, which `Trainer` averages, depend on how rows fall into batches and processes. Subclasses call
    `add_rows` where they compute the loss of an evaluation, and turn the totals into metrics in `metrics_of`.
    """

    _rows: list[Tensor] | None = None

    def __init__(self, model: nn.Module, **kwargs):
        if kwargs.get("data_collator") is None:
            kwargs["data_collator"] = collate_texts
        super().__init__(model=model, **kwargs)
        if self.accelerator.is_fsdp2:
            # losses and sums that leave the model in bfloat16 would be rounded to two or three digits
            plugin = self.accelerator.state.fsdp_plugin
            policy = plugin.mixed_precision_policy
            plugin.mixed_precision_policy = policy and dataclasses.replace(policy, output_dtype=None)

    def add_rows(self, rows: Tensor) -> None:
        """Takes sums of shape `[batch, ...]`. Rows that another process repeats, to have as many, do not count."""
        if self._rows is not None:  # within an evaluation
            self._rows.append(self.accelerator.gather_for_metrics(rows.contiguous()).double())

    def metrics_of(self, totals: Tensor) -> dict[str, float]:
        raise NotImplementedError

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        self._rows = []
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
        )
        if self._rows:
            totals = torch.cat(self._rows).sum(0)
            output.metrics.update({f"{metric_key_prefix}_{n}": x for n, x in self.metrics_of(totals).items()})
        self._rows = None
        return output


class ErrorsTrainer(RowsTrainer):
    """`Trainer` of a model with `mixers` by their layers, that returns `errors` and `sizes` of them: [`Alignment`], for one."""

    def __init__(self, model: nn.Module, **kwargs):
        super().__init__(model=model, **kwargs)
        exempt_from_trainer()
        self._errors: list[Tensor] = []
        self._accumulated: Tensor | None = None
        self._learned = model.mixers
        if self.accelerator.is_fsdp2:
            # shards learn, and the student's own weights, which are whole in every process, are replaced in the end
            model.mixers = copy.deepcopy(model.mixers)
            plugin = self.accelerator.state.fsdp_plugin
            if plugin.transformer_cls_names_to_wrap is not None:  # those of a whole model, which is not here
                plugin.transformer_cls_names_to_wrap = model._no_split_modules

    def get_batch_samples(self, *args, **kwargs):
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        self._accumulated = None
        if len(batches) > 1:
            # gradients are averaged over batches, whose rows do not hold as many tokens
            alignment = self.accelerator.unwrap_model(self.model)
            inputs = ({n: x for n, x in self._prepare_inputs(batch).items() if n != "labels"} for batch in batches)
            with self.accelerator.autocast():
                self._accumulated = torch.stack([alignment.teacher_sizes(**batch) for batch in inputs]).mean(0)
        return batches, num_items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with self.accelerator.autocast():  # the teacher's part as well, where only weights that are trained are cast
            outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        loss = outputs["loss"]
        if not model.training:
            self.add_rows(outputs["rows"])
        else:
            errors = outputs["errors"]
            if self.accelerator.num_processes > 1 or self._accumulated is not None:
                # gradients are averaged over processes and batches, whose rows do not hold as many tokens
                mine = outputs["sizes"] if self._accumulated is None else self._accumulated
                errors = errors * (outputs["sizes"] / self.accelerator.reduce(mine, reduction="mean"))
                loss = errors.mean()
            self._errors.append(errors.detach())
        return (loss, outputs) if return_outputs else loss

    def train(self, *args, **kwargs):
        result = super().train(*args, **kwargs)
        if self.accelerator.is_fsdp2:
            self._gather_learned()
        self.record_run()  # the student is saved by itself
        return result

    @torch.no_grad()
    def _gather_learned(self) -> None:
        """Gives the student what shards have learned. All processes must call it."""
        learned = self.accelerator.unwrap_model(self.model).mixers.state_dict()
        for name, weight in self._learned.state_dict().items():
            found = learned[name]
            weight.copy_(found.full_tensor() if hasattr(found, "full_tensor") else found)

    def model_of_card(self) -> MirasForCausalLM:
        return self.accelerator.unwrap_model(self.model).student

    def metrics_of(self, totals: Tensor) -> dict[str, float]:
        errors = totals[0] / totals[1]
        return {"loss": errors.mean().item(), **self.of_layers(errors)}

    def of_layers(self, errors: Tensor) -> dict[str, float]:
        mixers = self.accelerator.unwrap_model(self.model).mixers
        return {f"alignment/layer_{i}": error for i, error in zip(mixers, errors.tolist(), strict=True)}

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        # collators look for them
        self._signature_columns = [*self._signature_columns, "labels"]

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if self._errors and "loss" in logs:
            # the parts of the loss, of all processes as it is
            errors = self.accelerator.reduce(torch.stack(self._errors).mean(0), reduction="mean")
            logs |= self.of_layers(errors)
            self._errors.clear()
        super().log(logs, *args, **kwargs)


class AlignmentTrainer(ErrorsTrainer):
    """
    Stage 1: `Trainer` of an [`Alignment`]. Logs the error of every layer as `alignment/layer_0` and so on, in
    evaluation as `eval_alignment/layer_0`, of the rows of all processes; its checkpoints hold the memory layers alone.
    Train with a rate like 1e-3; the student has learned when `train()` returns: save it by `student.save_pretrained`,
    with a card that says how it was trained.

    Errors are those of the rows of all processes and of all accumulated batches together, whatever their lengths; with
    `gradient_accumulation_steps` above 1 the teacher reads every batch once more, for that. Under FSDP2 the memories are
    sharded while they learn, teacher and student are whole in every process.

    Args:
        student, teacher, sink_tokens: as in [`Alignment`].
        args, train_dataset, and the others: as in `Trainer`.

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from miras_hf import convert

    >>> teacher = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=4, num_attention_heads=4))
    >>> student = convert(teacher, layers=[1, 3])
    >>> trainer = AlignmentTrainer(student, teacher, args=args, train_dataset=dataset)
    >>> result = trainer.train()
    ```"""

    def __init__(self, student: MirasForCausalLM, teacher: PreTrainedModel, sink_tokens: int = 4, **kwargs):
        super().__init__(Alignment(student, teacher, sink_tokens), **kwargs)
        teacher.to(self.args.device).eval()


@torch.no_grad()
def alignment_errors(
    student: MirasForCausalLM,
    teacher: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    sink_tokens: int = 4,
) -> dict[int, float]:
    """
    How far every memory is from the attention layer that it replaces, see [`Alignment`], the smallest error first: which
    layers are easily replaced.

    Args:
        batches: Inputs of [`Alignment`]; labels are not used.

    Raises:
        `ValueError`: if there are none.
    """
    alignment, sums = Alignment(student, teacher, sink_tokens), []
    modes = student.training, teacher.training
    student.eval()
    teacher.eval()
    try:
        for batch in batches:
            inputs = {name: value.to(teacher.device) for name, value in batch.items() if name != "labels"}
            sums.append(alignment(**inputs)["rows"].sum(0))
    finally:
        student.train(modes[0])
        teacher.train(modes[1])
    if not sums:
        raise ValueError("`batches` must hold at least one batch, got none.")
    differences, sizes = torch.stack(sums).sum(0)
    errors = zip(map(int, alignment.mixers), (differences / sizes).tolist(), strict=True)
    return dict(sorted(errors, key=lambda pair: pair[1]))


class DistillationTrainer(RowsTrainer):
    """
    Stage 2: a `Trainer` whose loss is the Kullback-Leibler divergence of the student's next token from the teacher's, in
    nats a token. Logits of both stand in memory for `chunk_tokens` tokens at a time, and are computed again for gradients.

    Tokens count where labels of their successors are not -100; without labels, where they are no pads. What an evaluation
    predicts is the divergence of every row. Under FSDP2 the student is sharded, the teacher is whole in every process, and
    `save_model` gathers what was learned.

    Args:
        model (`MirasForCausalLM`): The student.
        teacher (`PreTrainedModel`): The model that was converted.
        body_learning_rate (`float`, *optional*, defaults to 7e-6):
            Rate of all that is the teacher's: it knows already what it should. `args.learning_rate`, a rate like 1e-4, is
            that of memory layers. 0 for a body that stays as it is.
        chunk_tokens (`int`, *optional*, defaults to 256): Tokens whose logits stand in memory at once.
        args, train_dataset, and the others: as in `Trainer`.

    Raises:
        `ValueError`: for models that are not a hybrid with memories and its teacher, for numbers out of range, for label
            smoothing, which a divergence has not, and for an optimizer from outside.
    """

    def __init__(
        self,
        model: MirasForCausalLM,
        teacher: PreTrainedModel,
        body_learning_rate: float = 7e-6,
        chunk_tokens: int = 256,
        **kwargs,
    ):
        check_pair(getattr(model, "get_base_model", lambda: model)(), teacher)
        if not 0 <= body_learning_rate < 1:
            raise ValueError(f"`body_learning_rate` must be at least 0 and below 1, got {body_learning_rate}.")
        if type(chunk_tokens) is not int or chunk_tokens < 1:
            raise ValueError(f"`chunk_tokens` must be an integer of at least 1, got {chunk_tokens!r}.")
        for name in ("optimizers", "optimizer_cls_and_kwargs", "compute_loss_func"):
            if kwargs.get(name) not in (None, (None, None)):
                raise ValueError(f"`{name}` must be left out: rates and losses of this trainer are its own.")
        super().__init__(model=model, **kwargs)
        if self.args.label_smoothing_factor:
            raise ValueError(
                f"`label_smoothing_factor` must be 0, got {self.args.label_smoothing_factor}: the teacher smooths labels."
            )
        self.teacher = teacher.to(self.args.device).eval()
        self.body_learning_rate, self.chunk_tokens = body_learning_rate, chunk_tokens

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        if any("is_body" in group for group in optimizer.param_groups):
            return optimizer
        of_memories = {
            id(p)
            for module in self.accelerator.unwrap_model(self.model).modules()
            if isinstance(module, MirasMixer)
            for p in module.parameters()
        }
        groups = []
        for group in optimizer.param_groups:
            for is_body in (False, True):
                params = [p for p in group["params"] if (id(p) not in of_memories) == is_body]
                rate = self.body_learning_rate if is_body else self.args.learning_rate
                if params:
                    groups.append({**group, "params": params, "lr": rate, "is_body": is_body})
        optimizer.param_groups[:] = groups
        return optimizer

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        # what the loss counts, with labels and without them; a mean over processes, as their gradients are
        items = torch.zeros((), device=device)
        for batch in batches:
            check_batch(batch)
            _, position = sequences_of(batch["input_ids"], batch.get("attention_mask"), batch.get("position_ids"))
            items += counted_tokens(batch.get("labels"), position).sum().to(device)
        if self.args.average_tokens_across_devices:
            items = self.accelerator.reduce(items, reduction="mean")
        return batches, items.clamp(min=1.0)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        labels = inputs.pop("labels", None)
        check_batch(inputs)
        # the same positions for both, which begin their texts with another number where pads stand before
        sequences, position = sequences_of(
            inputs["input_ids"], inputs.pop("attention_mask", None), inputs.get("position_ids")
        )
        inputs |= {"position_ids": position.clamp(min=0), "use_cache": False}
        if sequences.mask is not None:  # with one of ones, teachers see no packs
            inputs["attention_mask"] = sequences.mask.long()
        with torch.no_grad(), self.accelerator.autocast():
            expected = self.teacher.model(**inputs)[0]
        counts = counted_tokens(labels, position)

        def divergences(hidden: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
            heads = (head, self.teacher.lm_head, self.chunk_tokens)
            if model.training:
                return chunked_divergence(hidden[counts], expected[counts], *heads)
            rows = zip(hidden, expected, counts, strict=True)
            return torch.stack([chunked_divergence(x[i], y[i], *heads) for x, y, i in rows])

        student = self.accelerator.unwrap_model(model)
        base = getattr(student, "get_base_model", lambda: student)()
        # through whatever wraps the model, and within it: weights may be whole nowhere else
        with instead_of(base.lm_head, divergences):
            outputs = model(**inputs)
        divergence = outputs.logits
        if not model.training:
            self.add_rows(torch.stack((divergence, counts.sum(-1).float()), dim=-1))
            divergence = divergence.sum()
        loss = divergence / (num_items_in_batch if num_items_in_batch is not None else counts.sum().clamp(min=1))
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if inputs.get("labels") is not None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        # without labels Trainer asks for no loss, and the teacher has one all the same
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        return loss.detach(), None if prediction_loss_only else outputs.logits, None

    def metrics_of(self, totals: Tensor) -> dict[str, float]:
        divergence, tokens = totals.tolist()
        return {"loss": divergence / max(tokens, 1.0)}


def collate_texts(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """
    Rows of ids as a batch. Where some are shorter, zeros stand behind them, which the mask hides and labels leave out: a
    tokenizer needs no pad token for that.

    Args:
        rows: each with `input_ids`, and perhaps `attention_mask`, `labels` and, for packs of one length, `position_ids`.

    Raises:
        `ValueError`: for rows without ids or with different columns, and packs of different lengths, which have no positions for pads.
    """
    names = {tuple(sorted(row)) for row in rows}
    if len(names) > 1 or "input_ids" not in rows[0]:
        raise ValueError(
            f"Rows must have `input_ids`, the ids of a text, and all of them the same columns, got {sorted(names)}."
        )
    columns = {name: [torch.as_tensor(row[name]) for row in rows] for name in rows[0]}
    if len({len(ids) for ids in columns["input_ids"]}) == 1:
        return {name: torch.stack(values) for name, values in columns.items()}
    if "position_ids" in columns:
        lengths = sorted({len(ids) for ids in columns["input_ids"]})
        raise ValueError(f"Rows with `position_ids`, which are packs of texts, must have one length, got {lengths}.")
    columns.setdefault("attention_mask", [torch.ones_like(ids) for ids in columns["input_ids"]])
    at_pads = {"labels": -100}
    return {
        name: pad_sequence(values, batch_first=True, padding_value=at_pads.get(name, 0))
        for name, values in columns.items()
    }


@contextmanager
def instead_of(module: nn.Module, call: Callable[..., Tensor]) -> Generator[None]:
    """For as long as it is open, a module returns what `call` returns of its input and of its own forward."""
    own, forward = module.__dict__.get("forward"), module.forward
    module.forward = lambda x: call(x, forward)
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def chunked_divergence(
    student: Tensor,
    teacher: Tensor,
    student_head: Callable[[Tensor], Tensor],
    teacher_head: Callable[[Tensor], Tensor],
    chunk_tokens: int,
) -> Tensor:
    """
    `sum_t KL(p_t || q_t)` of the teacher's distributions p and the student's q over the vocabulary, in float32.

    Args:
        student, teacher (`torch.Tensor` of shape `[tokens, hidden_size]`): last hidden states.
        student_head, teacher_head (callables): from there to logits.
        chunk_tokens (`int`): tokens whose logits stand in memory at once, in the backward pass as well.
    """

    def divergence(mine: Tensor, theirs: Tensor) -> Tensor:
        with torch.no_grad():
            log_p = F.log_softmax(teacher_head(theirs).float(), dim=-1)
        log_q = F.log_softmax(student_head(mine).float(), dim=-1)
        return F.kl_div(log_q, log_p, reduction="sum", log_target=True)

    total = student.new_zeros((), dtype=torch.float32)
    for mine, theirs in zip(student.split(chunk_tokens), teacher.split(chunk_tokens), strict=True):
        if torch.is_grad_enabled():
            total = total + checkpoint(divergence, mine, theirs, use_reentrant=False)
        else:
            total = total + divergence(mine, theirs)
    return total


def check_pair(student: Any, teacher: Any) -> None:
    """Raises a `ValueError` unless the one is a hybrid with memories that was made of a model like the other."""
    if not isinstance(student, MirasForCausalLM) or not student.config.has_memory:
        without = " without memory layers" if isinstance(student, MirasForCausalLM) else ""
        raise ValueError(
            f"The student must be a MirasForCausalLM with memories, got {type(student).__name__}{without}."
        )
    if not isinstance(teacher, PreTrainedModel) or not hasattr(getattr(teacher, "model", None), "layers"):
        raise ValueError(f"`teacher` must be a decoder with a language modelling head, got {type(teacher).__name__}.")
    for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
        theirs, ours = getattr(teacher.config, name), getattr(student.config, name)
        if theirs != ours:
            raise ValueError(f"`teacher` must have the student's `{name}`, {ours}, got {theirs}.")
    for i, kind in enumerate(student.config.layer_types):
        if kind == MEMORY_LAYER and not hasattr(teacher.model.layers[i], "self_attn"):
            raise ValueError(f"`teacher` must have attention in layer {i}, where the student has a memory.")


def check_batch(inputs: Mapping[str, Any]) -> None:
    strange = sorted(inputs.keys() - {"input_ids", "attention_mask", "position_ids", "labels"})
    if strange or "input_ids" not in inputs:
        raise ValueError(
            "Batches must hold `input_ids`, and besides them `attention_mask`, `position_ids` and `labels` alone, which the "
            f"teacher understands as well, got {strange or sorted(inputs)}."
        )


def counted_tokens(labels: Tensor | None, position: Tensor) -> Tensor:
    """The tokens whose next one is learned, bool of shape `[batch, tokens]`: all that are no pads, and where there are labels
    those of them whose next token is named."""
    tokens = position >= 0
    return tokens if labels is None else tokens & F.pad(labels[:, 1:] != -100, (0, 1), value=False)


def sequences_of(
    input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
) -> tuple[Sequences, Tensor]:
    """The sequences of a call, and the place of every token in its own, -1 at pads."""
    batch, tokens = input_ids.shape
    padded = padded_sequences(attention_mask, batch, tokens, 0)
    packed = packed_sequences(position_ids, batch, tokens, mask=padded.mask)
    if packed is not None:
        return packed, packed.position.view(batch, tokens)
    if padded.mask is None:
        return padded, torch.arange(tokens, device=input_ids.device).expand(batch, -1)
    return padded, torch.where(padded.mask, padded.mask.long().cumsum(-1) - 1, -1)


__all__ = ["Alignment", "AlignmentTrainer", "DistillationTrainer", "alignment_errors", "chunked_divergence"]
