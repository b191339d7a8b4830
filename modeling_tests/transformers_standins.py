# Copyright 2026 The miras-hf authors.
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
"""Stand-ins for the companions of Transformers' common tests that its source distribution leaves out.

`transformers_suite.py` puts them where the common tests import them from:

- `GenerationTesterMixin` for `tests/generation/test_utils.py`: what `generate()` and a cache owe each other, written as
  identities (cached = uncached, padded = alone, two halves = one go, beams = reordered states) instead of shapes alone;
- `ExportTesterMixin` for `tests/exporters/test_export.py`: `torch.export` through Transformers' own exporter;
- `run_distributed` and companions for `tests/distributed_testing_utils.py`: ranks as CPU processes over gloo;
- `config_common_kwargs` for `tests/utils/test_configuration_utils.py`.

None of this is specific to our models. It does not import the common tests, which import it.
"""

import copy
import os
import time

import torch
import torch.distributed as dist
import torch.multiprocessing
from parameterized import parameterized
from transformers import GenerationMixin, set_seed
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter
from transformers.exporters.utils import decompose_for_generation, get_leaf_tensors
from transformers.generation.streamers import BaseStreamer
from transformers.testing_utils import (
    set_config_for_less_flaky_test,
    set_model_for_less_flaky_test,
    torch_device,
)


__all__ = [
    "ExportTesterMixin",
    "GenerationTesterMixin",
    "_get_distributed_backend",
    "_get_distributed_device_type",
    "_get_rank_device",
    "_set_rank_device",
    "_start_rank_processes",
    "config_common_kwargs",
    "run_distributed",
]


# One value, other than the default, for each field that every configuration has.
config_common_kwargs = {
    "architectures": ["SomeModel"],
    "chunk_size_feed_forward": 5,
    "dtype": "float16",
    "id2label": {0: "none", 1: "some", 2: "all"},
    "label2id": {"none": 0, "some": 1, "all": 2},
    "output_attentions": True,
    "output_hidden_states": True,
    "problem_type": "regression",
    "return_dict": False,
}


# ---------------------------------------------------------------------------------------------------------------------
# ranks as processes


def _get_distributed_device_type():
    return "cpu"


def _get_distributed_backend():
    return "gloo"


def _get_rank_device(rank):
    return torch.device("cpu")


def _set_rank_device(rank):
    # the ranks share the cores of one machine, and none of them should start a thread for every core
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("WORLD_SIZE", "1"))))


def _start_rank_processes(fn, args, nprocs):
    """`fn(rank, *args)` in `nprocs` processes. Raises what a rank raised."""
    # A server that has imported the slow packages, and nothing more, forks the ranks: safe (unlike a fork of a process
    # that has run parallel torch code) and much quicker than one fresh interpreter for each rank of each test.
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch.distributed.fsdp", "transformers.testing_utils", "transformers.generation.utils"]
    )
    torch.multiprocessing.start_processes(fn, args=args, nprocs=nprocs, start_method="forkserver")


def _rank_main(rank, world_size, host, port, fn, args, kwargs):
    os.environ.update(WORLD_SIZE=str(world_size), RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR=host, MASTER_PORT=str(port))
    _set_rank_device(rank)
    store = dist.TCPStore(host, port, world_size=None, is_master=False)
    dist.init_process_group(_get_distributed_backend(), store=store, rank=rank, world_size=world_size)
    try:
        fn(rank, *args, **kwargs)
    finally:
        dist.destroy_process_group()


def run_distributed(world_size):
    """`run_distributed(n)(fn)(*args)` calls `fn(rank, *args)` on each of `n` ranks of one process group."""

    def bind(fn):
        def call(*args, **kwargs):
            # the store lives here, so the port is taken before the first rank starts
            store = dist.TCPStore("localhost", 0, world_size=None, is_master=True, wait_for_workers=False)
            _start_rank_processes(
                _rank_main, args=(world_size, store.host, store.port, fn, args, kwargs), nprocs=world_size
            )

        return call

    return bind


# ---------------------------------------------------------------------------------------------------------------------
# torch.export


def _runnable(exported):
    # older exporters return torch's ExportedProgram, which holds a module; newer ones an object that is called itself
    return exported.module() if isinstance(exported, torch.export.ExportedProgram) else exported


class ExportTesterMixin:
    """Every model class goes through `torch.export` and gives the same outputs as in eager mode."""

    test_torch_exportable = True

    @property
    def exported_model_classes(self):
        return self.all_model_classes

    def test_torch_export(self):
        """With every axis dynamic that the model leaves dynamic; fixed shapes are exported below."""
        if not self.test_torch_exportable:
            self.skipTest("The architecture is not exportable")
        for model_class in self.exported_model_classes:
            with self.subTest(model_class.__name__):
                config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
                inputs = {k: v for k, v in self._prepare_for_class(inputs, model_class).items() if v is not None}
                model = model_class(config).eval().to(torch_device)
                with torch.no_grad():
                    expected = get_leaf_tensors(model(**copy.deepcopy(inputs)))
                    exported = DynamoExporter().export(model, inputs, config=DynamoConfig(dynamic=True))
                    actual = get_leaf_tensors(_runnable(exported)(**copy.deepcopy(inputs)))
                self.assertTrue(expected)
                torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)

    def test_torch_export_generate(self):
        """The two calls that `generate()` is made of, reading the prompt and one more token, with the cache in and out."""
        if not self.test_torch_exportable:
            self.skipTest("The architecture is not exportable")
        for model_class in self.all_generative_model_classes:
            config, inputs = self.prepare_config_and_inputs_for_generate()
            model = model_class(config).eval().to(torch_device)
            inputs = {"input_ids": inputs["input_ids"], "attention_mask": torch.ones_like(inputs["input_ids"])}
            for stage, (module, stage_inputs) in decompose_for_generation(model, inputs).items():
                with self.subTest(f"{model_class.__name__}, {stage}"):
                    with torch.no_grad():
                        expected = get_leaf_tensors(module(**copy.deepcopy(stage_inputs)))
                        exported = DynamoExporter().export(module, stage_inputs, config=DynamoConfig())
                        actual = get_leaf_tensors(_runnable(exported)(**copy.deepcopy(stage_inputs)))
                    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# generate()


class _Recorder(BaseStreamer):
    """Keeps what a streamer is given."""

    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens.append(value.clone().reshape(-1))

    def end(self):
        self.ended = True


DECODING = {
    "greedy": {},
    "sample": {"do_sample": True, "top_k": 10, "temperature": 0.7},
    "beam": {"num_beams": 2, "length_penalty": 2.0},
    "beam_sample": {"num_beams": 2, "do_sample": True, "top_k": 10},
}


class GenerationTesterMixin:
    """What `generate()` owes the user, for each class in `all_generative_model_classes`.

    Beside a model tester it needs nothing. A model with a cache of its own overrides `_check_past_key_values_for_generate`,
    one whose attentions have another shape `_check_attentions_for_generate`.
    """

    max_new_tokens = 5
    generation_atol = 1e-4  # on logits
    generation_rtol = 1e-4

    # ---- helpers

    def prepare_config_and_inputs_for_generate(self, batch_size=2):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        inputs = {k: v[:batch_size] if isinstance(v, torch.Tensor) else v for k, v in inputs.items() if k != "labels"}
        # no early end, since most tests count tokens
        text_config = config.get_text_config(decoder=True)
        text_config.eos_token_id = None
        set_config_for_less_flaky_test(config)
        return config, inputs

    def _generative_models(self, batch_size=2):
        """Model, input_ids and attention mask (all ones) for each class."""
        for model_class in self.all_generative_model_classes:
            set_seed(42)
            config, inputs = self.prepare_config_and_inputs_for_generate(batch_size)
            model = model_class(config).to(torch_device).eval()
            set_model_for_less_flaky_test(model)
            yield model, inputs["input_ids"], torch.ones_like(inputs["input_ids"])

    def _generate(self, model, input_ids=None, **kwargs):
        """Greedy by default, with everything reported."""
        kwargs = {"do_sample": False, "max_new_tokens": self.max_new_tokens, **kwargs}
        set_seed(0)  # for the decodings that draw
        return model.generate(
            input_ids, return_dict_in_generate=True, output_scores=True, output_logits=True, **kwargs
        )

    def _assert_same_tokens(self, actual, expected, new_tokens=None):
        """The generated tokens agree - up to the first place, if any, where the logits were a tie within rounding."""
        n = new_tokens or len(expected.logits)
        rows_a, rows_e = actual.sequences[:, -len(actual.logits) :], expected.sequences[:, -len(expected.logits) :]
        self.assertEqual(len(rows_a), len(rows_e))
        for row in range(len(rows_e)):
            for step in range(n):
                torch.testing.assert_close(
                    actual.logits[step][row],
                    expected.logits[step][row],
                    atol=self.generation_atol,
                    rtol=self.generation_rtol,
                    msg=lambda text, row=row, step=step: f"logits of row {row} at step {step}: {text}",
                )
                if rows_a[row, step] != rows_e[row, step]:
                    break  # a tie: from here on the two have read different texts

    def _uncached_greedy(self, model, input_ids, attention_mask=None, max_new_tokens=None):
        """Greedy decoding by calling the model on the whole text at each step: no `generate()`, no cache."""
        logits = []
        for _ in range(max_new_tokens or self.max_new_tokens):
            with torch.no_grad():
                output = model(input_ids, attention_mask=attention_mask, use_cache=False)
            logits.append(output.logits[:, -1])
            input_ids = torch.cat([input_ids, logits[-1].argmax(-1, keepdim=True)], dim=1)
            if attention_mask is not None:
                attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(attention_mask), 1)], dim=1)
        return type("Generated", (), {"sequences": input_ids, "logits": tuple(logits)})

    def _check_hidden_states_for_generate(
        self, batch_size, hidden_states, prompt_length, output_length, config, use_cache
    ):
        self.assertEqual(len(hidden_states), output_length - prompt_length)
        for step, per_layer in enumerate(hidden_states):
            length = 1 if use_cache and step > 0 else prompt_length + step
            for layer in per_layer:
                self.assertEqual(tuple(layer.shape), (batch_size, length, config.hidden_size))

    def _check_attentions_for_generate(self, batch_size, attentions, prompt_length, output_length, config, use_cache):
        self.assertEqual(len(attentions), output_length - prompt_length)
        for step, per_layer in enumerate(attentions):
            keys = prompt_length + step
            queries = 1 if use_cache and step > 0 else keys
            for layer in per_layer:
                self.assertEqual(tuple(layer.shape), (batch_size, config.num_attention_heads, queries, keys))

    def _check_past_key_values_for_generate(self, batch_size, past_key_values, seq_length, config):
        self.assertIsInstance(past_key_values, Cache)
        heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.assertEqual(len(past_key_values.layers), config.num_hidden_layers)
        for layer in past_key_values.layers:
            self.assertEqual(tuple(layer.keys.shape), (batch_size, heads, seq_length, head_dim))
            self.assertEqual(tuple(layer.values.shape), (batch_size, heads, seq_length, head_dim))

    # ---- what comes back

    def test_inherits_generation_mixin(self):
        for model_class in self.all_generative_model_classes:
            self.assertTrue(issubclass(model_class, GenerationMixin))

    @parameterized.expand([(name, use_cache) for name in DECODING for use_cache in (True, False)])
    def test_generate_dict_outputs(self, name, use_cache):
        """Lengths and shapes of all that `generate()` can return, for every way of decoding."""
        for model, input_ids, mask in self._generative_models():
            if self.has_attentions:
                model.set_attn_implementation("eager")
            output = self._generate(
                model,
                input_ids,
                attention_mask=mask,
                use_cache=use_cache,
                output_hidden_states=True,
                output_attentions=self.has_attentions,
                **DECODING[name],
            )
            config, (batch, prompt) = model.config, input_ids.shape
            self.assertEqual(tuple(output.sequences.shape), (batch, prompt + self.max_new_tokens))
            self.assertTrue(torch.equal(output.sequences[:, :prompt], input_ids))
            rows = batch * DECODING[name].get("num_beams", 1)
            for logits in (output.logits, output.scores):
                self.assertEqual(len(logits), self.max_new_tokens)
                self.assertEqual({tuple(step.shape) for step in logits}, {(rows, config.vocab_size)})
            length = prompt + self.max_new_tokens
            self._check_hidden_states_for_generate(rows, output.hidden_states, prompt, length, config, use_cache)
            if self.has_attentions:
                self._check_attentions_for_generate(rows, output.attentions, prompt, length, config, use_cache)
            if use_cache:
                # the last token has been produced, but not read
                self._check_past_key_values_for_generate(rows, output.past_key_values, length - 1, config)
                self.assertEqual(output.past_key_values.get_seq_length(), length - 1)
            else:
                self.assertIsNone(output.past_key_values)

    # ---- cached = uncached

    def test_greedy_generate_matches_uncached_forward(self):
        for model, input_ids, mask in self._generative_models():
            actual = self._generate(model, input_ids, attention_mask=mask)
            self._assert_same_tokens(actual, self._uncached_greedy(model, input_ids))

    @parameterized.expand([(name,) for name in DECODING])
    def test_generate_with_and_without_cache(self, name):
        for model, input_ids, mask in self._generative_models():
            if "beam" in name:  # more beams than rows, so that the states must really be reordered
                kwargs = {**DECODING[name], "num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 8}
            else:
                kwargs = {**DECODING[name], "num_return_sequences": 2} if name == "sample" else DECODING[name]
            cached = self._generate(model, input_ids, attention_mask=mask, use_cache=True, **kwargs)
            uncached = self._generate(model, input_ids, attention_mask=mask, use_cache=False, **kwargs)
            if "beam" in name:
                torch.testing.assert_close(cached.sequences, uncached.sequences)
                torch.testing.assert_close(cached.sequences_scores, uncached.sequences_scores, atol=1e-4, rtol=1e-4)
            else:
                self._assert_same_tokens(cached, uncached)

    @parameterized.expand([("static",), ("dynamic",)])
    def test_generate_with_named_cache_implementation(self, name):
        for model, input_ids, mask in self._generative_models():
            expected = self._generate(model, input_ids, attention_mask=mask)
            actual = self._generate(model, input_ids, attention_mask=mask, cache_implementation=name)
            self._assert_same_tokens(actual, expected)

    def test_generate_with_cache_from_config(self):
        """A cache that the user made is used, filled, and returned."""
        for model, input_ids, mask in self._generative_models():
            cache = DynamicCache(config=model.config)
            actual = self._generate(model, input_ids, attention_mask=mask, past_key_values=cache)
            self.assertIs(actual.past_key_values, cache)
            self._assert_same_tokens(actual, self._generate(model, input_ids, attention_mask=mask))

    @parameterized.expand([(1,), (3,)])
    def test_generate_with_chunked_prefill(self, size):
        for model, input_ids, mask in self._generative_models():
            expected = self._generate(model, input_ids, attention_mask=mask)
            actual = self._generate(model, input_ids, attention_mask=mask, prefill_chunk_size=size)
            self._assert_same_tokens(actual, expected)

    # ---- two halves = one go

    @parameterized.expand([("with_full_text", True), ("with_new_tokens_only", False)])
    def test_generate_continue_from_past_key_values(self, _, full_text):
        """Stop, come back with the cache and some tokens of the user's own, go on: the same as one text from the start."""
        for model, input_ids, mask in self._generative_models():
            first = self._generate(model, input_ids, attention_mask=mask, max_new_tokens=3)
            text = torch.cat([first.sequences, input_ids[:, :4]], dim=1)
            expected = self._uncached_greedy(model, text, max_new_tokens=3)
            cache = first.past_key_values
            new = text if full_text else text[:, cache.get_seq_length() :]
            actual = self._generate(
                model, new, attention_mask=torch.ones_like(text), past_key_values=cache, max_new_tokens=3
            )
            self._assert_same_tokens(actual, expected)

    def test_prompt_cache_is_reusable(self):
        """A prompt is read once; copies of its cache serve several continuations and stay apart."""
        for model, input_ids, _ in self._generative_models():
            prompt_cache = DynamicCache(config=model.config)
            with torch.no_grad():
                model(input_ids, past_key_values=prompt_cache, use_cache=True)
            for shift in (1, 2):
                text = torch.cat([input_ids, (input_ids[:, :3] + shift) % model.config.vocab_size], dim=1)
                mask = torch.ones_like(text)  # or else tokens that happen to be the pad token would be masked
                actual = self._generate(model, text, attention_mask=mask, past_key_values=copy.deepcopy(prompt_cache))
                self._assert_same_tokens(actual, self._uncached_greedy(model, text))
            self.assertEqual(prompt_cache.get_seq_length(), input_ids.shape[1])

    def test_prompt_cache_with_several_samples(self):
        """`batch_repeat_interleave` prepares a prompt's cache for beams and for several samples."""
        for model, input_ids, mask in self._generative_models():
            kwargs = {"num_beams": 3, "num_return_sequences": 2}
            expected = self._generate(model, input_ids, attention_mask=mask, **kwargs)
            cache = DynamicCache(config=model.config)
            with torch.no_grad():
                model(input_ids[:, :-1], past_key_values=cache, use_cache=True)
            cache.batch_repeat_interleave(3)
            actual = self._generate(model, input_ids, attention_mask=mask, past_key_values=cache, **kwargs)
            torch.testing.assert_close(actual.sequences, expected.sequences)
            torch.testing.assert_close(actual.sequences_scores, expected.sequences_scores, atol=1e-4, rtol=1e-4)

    @parameterized.expand([("reorder_cache",), ("batch_select_indices",)])
    def test_cache_rows_follow_their_sequences(self, method):
        """After the rows of the cache are permuted the model goes on with the permuted texts."""
        for model, input_ids, _ in self._generative_models(batch_size=3):
            order = torch.tensor([2, 0, 1], device=input_ids.device)
            cache = DynamicCache(config=model.config)
            with torch.no_grad():
                expected = model(input_ids, use_cache=False).logits[order, -1]
                model(input_ids[:, :-1], past_key_values=cache, use_cache=True)
                getattr(cache, method)(order)
                actual = model(input_ids[order, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
            torch.testing.assert_close(actual, expected, atol=self.generation_atol, rtol=self.generation_rtol)

    def test_cache_reset(self):
        layer = DynamicLayer()
        layer.update(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))
        layer.reset()
        for model, input_ids, mask in self._generative_models():
            cache = DynamicCache(config=model.config)
            if layer.get_seq_length() and any(isinstance(x, DynamicLayer) for x in cache.layers):
                self.skipTest("In this version of Transformers keys and values stay in a cache that is reset")
            first = self._generate(model, input_ids, attention_mask=mask, past_key_values=cache)
            cache.reset()
            self.assertEqual(cache.get_seq_length(), 0)
            second = self._generate(model, input_ids, attention_mask=mask, past_key_values=cache)
            self._assert_same_tokens(second, first)

    # ---- padded = alone

    def test_left_padding_compatibility(self):
        """Logits and generated tokens do not depend on padding on the left, whatever the pad tokens are."""
        for model, input_ids, mask in self._generative_models():
            expected = self._generate(model, input_ids, attention_mask=mask)
            pads = torch.randint_like(input_ids[:, :5], model.config.vocab_size)
            padded, padded_mask = torch.cat([pads, input_ids], 1), torch.cat([torch.zeros_like(pads), mask], 1)
            self._assert_same_tokens(self._generate(model, padded, attention_mask=padded_mask), expected)
            with torch.no_grad():
                alone = model(input_ids).logits
                beside = model(padded, attention_mask=padded_mask).logits[:, pads.shape[1] :]
            torch.testing.assert_close(beside, alone, atol=self.generation_atol, rtol=self.generation_rtol)

    def test_ragged_batch_matches_single_sequences(self):
        for model, input_ids, mask in self._generative_models(batch_size=3):
            lengths = [input_ids.shape[1], input_ids.shape[1] // 2, 1]
            for row, length in enumerate(lengths):
                mask[row, :-length] = 0 if length < mask.shape[1] else 1
            batch = self._generate(model, input_ids, attention_mask=mask)
            for row, length in enumerate(lengths):
                alone = self._uncached_greedy(model, input_ids[row : row + 1, -length:])
                picked = {
                    "sequences": batch.sequences[row : row + 1],
                    "logits": [x[row : row + 1] for x in batch.logits],
                }
                self._assert_same_tokens(type("Row", (), picked), alone)

    # ---- other ways in and out

    @parameterized.expand([("greedy",), ("beam",)])
    def test_generate_from_inputs_embeds(self, name):
        for model, input_ids, mask in self._generative_models():
            expected = self._generate(model, input_ids, attention_mask=mask, **DECODING[name])
            embeds = model.get_input_embeddings()(input_ids)
            actual = self._generate(model, inputs_embeds=embeds, attention_mask=mask, **DECODING[name])
            # without input_ids only the new tokens are returned
            self.assertEqual(actual.sequences.shape[1], self.max_new_tokens)
            self.assertTrue(torch.equal(actual.sequences, expected.sequences[:, input_ids.shape[1] :]))
            other = self._generate(
                model, inputs_embeds=torch.randn_like(embeds), attention_mask=mask, **DECODING[name]
            )
            self.assertFalse(torch.equal(other.logits[0], actual.logits[0]))

    def test_generate_without_input_ids(self):
        for model, _, _ in self._generative_models():
            model.generation_config.bos_token_id = 1
            output = model.generate(do_sample=False, max_new_tokens=self.max_new_tokens)
            self.assertEqual(tuple(output.shape), (1, 1 + self.max_new_tokens))

    def test_generate_methods_with_logits_to_keep(self):
        """`logits_to_keep` leaves out rows of the logits, and `generate()` asks for the last one alone."""
        for model, input_ids, mask in self._generative_models():
            with torch.no_grad():
                full = model(input_ids).logits
                torch.testing.assert_close(model(input_ids, logits_to_keep=1).logits, full[:, -1:])
                picked = torch.tensor([0, 2], device=input_ids.device)
                torch.testing.assert_close(model(input_ids, logits_to_keep=picked).logits, full[:, picked])
            expected = self._generate(model, input_ids, attention_mask=mask)
            actual = self._generate(model, input_ids, attention_mask=mask, logits_to_keep=0)
            self._assert_same_tokens(actual, expected)

    def test_generate_stops_at_eos(self):
        """A row that is done is filled up with pad tokens while the others go on."""
        for model, input_ids, mask in self._generative_models(batch_size=1):
            free = self._generate(model, input_ids, attention_mask=mask).sequences[0, input_ids.shape[1] :].tolist()
            eos = free[-1]
            output = self._generate(model, input_ids, attention_mask=mask, eos_token_id=eos, pad_token_id=0)
            expected = free[: free.index(eos) + 1]
            self.assertEqual(output.sequences[0, input_ids.shape[1] :].tolist(), expected)

    def test_streamer_gets_every_token(self):
        for model, input_ids, mask in self._generative_models(batch_size=1):
            recorder = _Recorder()
            output = self._generate(model, input_ids, attention_mask=mask, streamer=recorder)
            self.assertTrue(recorder.ended)
            self.assertTrue(torch.equal(torch.cat(recorder.tokens).cpu(), output.sequences[0].cpu()))

    def test_generate_respects_time_limit(self):
        for model, input_ids, mask in self._generative_models(batch_size=1):
            start = time.perf_counter()
            output = self._generate(model, input_ids, attention_mask=mask, max_new_tokens=10_000, max_time=0.2)
            self.assertLess(time.perf_counter() - start, 10)
            self.assertGreater(len(output.logits), 0)

    @parameterized.expand([("bfloat16",), ("float16",)])
    def test_generate_in_half_precision(self, dtype):
        for model, input_ids, mask in self._generative_models():
            output = self._generate(model.to(getattr(torch, dtype)), input_ids, attention_mask=mask)
            self.assertEqual(output.sequences.shape[1], input_ids.shape[1] + self.max_new_tokens)
            for logits in output.logits:
                self.assertTrue(torch.isfinite(logits).all())

    # ---- what needs a cache that can forget

    def _stateful_models(self, stateful):
        for model, input_ids, mask in self._generative_models(batch_size=1):
            if model._is_stateful == stateful:
                yield model, input_ids, mask

    def test_prompt_lookup_and_assistant_match_greedy_or_are_refused(self):
        """Speculative decoding takes back tokens. A stateful model cannot, and must be refused, not silently wrong."""
        for model, input_ids, mask in self._stateful_models(False):
            expected = self._generate(model, input_ids, attention_mask=mask)
            for kwargs in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": model}):
                actual = self._generate(model, input_ids, attention_mask=mask, **kwargs)
                self._assert_same_tokens(actual, expected)
        for model, input_ids, mask in self._stateful_models(True):
            for kwargs in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": model}):
                with self.assertRaisesRegex(ValueError, "stateful"):
                    self._generate(model, input_ids, attention_mask=mask, **kwargs)
