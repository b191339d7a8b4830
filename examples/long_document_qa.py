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
"""Read a long text once, keep the memory on disk, ask later: question answering without reading again.

What one learns: what a Miras model knows of a text is a state of constant size. `save_memory` writes it to one file,
`load_memory` brings it back in another process, and `generate()` goes on from a copy of it, one for every question.

    python examples/long_document_qa.py                              # train, read, ask: two minutes on two cores
    python examples/long_document_qa.py --do read                    # each part alone, from what the one before left
    python examples/long_document_qa.py --do ask --questions "Ada visits" "Kurt visits"
    python examples/long_document_qa.py --smoke

    python examples/long_document_qa.py --do read --model_name_or_path my-model --document book.txt
    python examples/long_document_qa.py --do ask --model_name_or_path my-model --questions "Who did it?"

So that answers are really right, `train` teaches a tiny model one thing only: to remember who visits what, in a text that
talks of other things for the most part. The document it then reads is many times longer than any in training. A model
of your own answers as well as it has learned to; one that was never trained gives nonsense.
"""

import copy
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import IterableDataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    HfArgumentParser,
    PreTrainedModel,
    TokenizersBackend,
    Trainer,
    TrainingArguments,
    set_seed,
)

import miras_hf
from miras_hf.saved_memory import load_memory, save_memory


PEOPLE = ["Ada", "Alan", "Barbara", "Claude", "Donald", "Edsger", "Emmy", "Grace", "John", "Kurt", "Radia", "Sophie"]
PLACES = ["Berlin", "Cairo", "Kyoto", "Lima", "Oslo", "Rome"]
OTHERS = [
    "a",
    "the",
    "wind",
    "rain",
    "slow",
    "old",
    "river",
    "stone",
    "turns",
    "sings",
    "under",
    "over",
    "one",
    "bright",
    "road",
    "green",
    "night",
    "far",
    "sea",
    "and",
]


@dataclass
class Arguments:
    do: list[str] = field(default_factory=lambda: ["train", "read", "ask"], metadata={"help": "train, read, ask."})
    folder: str = field(
        default="runs/long-document", metadata={"help": "Gets the model, document.txt and the memory."}
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A model of your own, instead of training."}
    )
    document: str | None = field(default=None, metadata={"help": "A text file of your own."})
    questions: list[str] | None = field(default=None, metadata={"help": "Questions of your own."})
    memory: str = field(default="memory.safetensors", metadata={"help": "File of the memory, in the folder."})
    sentences: int = field(default=600, metadata={"help": "Sentences of the document that say nothing."})
    facts: int = field(default=4, metadata={"help": "Sentences that do, in between."})
    steps: int = field(default=600, metadata={"help": "Training steps."})
    piece: int = field(default=4096, metadata={"help": "Tokens read in one forward."})
    max_new_tokens: int = field(default=1, metadata={"help": "Length of an answer."})
    smoke: bool = field(default=False, metadata={"help": "Fewer people, fewer places, shorter texts."})


SMOKE = {"sentences": 40, "facts": 3, "steps": 150, "folder": "runs/long-document-smoke"}


class Story:
    """Texts that say which places some people visit, with other sentences in between, and questions about them."""

    def __init__(self, smoke: bool):
        self.people, self.places = (PEOPLE[:8], PLACES[:4]) if smoke else (PEOPLE, PLACES)

    def tell(self, facts: int, sentences: int, rng: random.Random) -> tuple[str, dict[str, str]]:
        truth = {person: rng.choice(self.places) for person in rng.sample(self.people, facts)}
        told = [f"{person} visits {place} ." for person, place in truth.items()]
        told += [" ".join(rng.choices(OTHERS, k=4)) + " ." for _ in range(sentences)]
        rng.shuffle(told)
        return " ".join(told), truth

    def question(self, person: str) -> str:
        return f"{person} visits"

    def tokenizer(self) -> TokenizersBackend:
        """One id a word."""
        words = ["<pad>", "<eos>", "<unk>", ".", "visits", *self.people, *self.places, *OTHERS]
        backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
        return TokenizersBackend(tokenizer_object=backend, **names)


class Lessons(IterableDataset):
    """Texts with all their questions behind them; only the answers are learned. They grow longer as training goes on."""

    def __init__(self, story: Story, tokenizer: TokenizersBackend, facts: int, rows: int, lengths: list[int]):
        self.story, self.tokenizer, self.facts, self.rows, self.lengths = story, tokenizer, facts, rows, lengths

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        rng = random.Random(0)
        for row in range(self.rows):
            # a batch's rows have one length: no row needs pads
            text, truth = self.story.tell(self.facts, self.lengths[row * len(self.lengths) // self.rows], rng)
            asked = rng.sample(sorted(truth), self.facts)
            text += "".join(f" {self.story.question(person)} {truth[person]}" for person in asked)
            ids = torch.tensor(self.tokenizer(text)["input_ids"])
            labels = torch.full_like(ids, -100)
            answers = len(ids) - 1 - 3 * torch.arange(self.facts)
            labels[answers] = ids[answers]
            yield {"input_ids": ids, "labels": labels}


def train(args: Arguments, story: Story, folder: Path) -> None:
    tokenizer = story.tokenizer()
    config = miras_hf.MirasConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        # the smallest memory there is suits the smallest task: one matrix a head, from the key to the value
        memory_architecture="matrix",
        eta_max=1.0,
        min_half_life=2048.0,
        max_half_life=32768.0,
        # values, and what the norm after the memory makes of small reads, as this was tried out
        value_norm=False,
        output_norm_eps=None,
        conv_initializer_range=None,
        # where in the text something was said does not matter
        use_rope=False,
        chunk_size=16,
        gate_rank=8,
        initializer_range=(0.4 / 64) ** 0.5,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    batch = 16
    training = TrainingArguments(
        str(folder),
        max_steps=args.steps,
        per_device_train_batch_size=batch,
        learning_rate=1e-2,
        adam_beta2=0.95,
        weight_decay=0.01,
        warmup_steps=20,
        logging_steps=50,
        save_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    lengths = [2, 4] if args.smoke else [4, 8, 16, 24]
    lessons = Lessons(story, tokenizer, args.facts, batch * args.steps, lengths)
    model = AutoModelForCausalLM.from_config(config)
    trainer = Trainer(model, training, train_dataset=lessons, processing_class=tokenizer)
    trainer.train()
    model.config.use_cache = True
    trainer.save_model()


@torch.no_grad()
def read(model: PreTrainedModel, ids: torch.Tensor, piece: int) -> DynamicCache:
    """The cache after reading `ids` `[1, tokens]`, piece by piece: what is held at any time does not grow with them."""
    cache = DynamicCache(config=model.config)
    for part in ids.split(piece, dim=1):
        model(part, cache=cache, use_cache=True, logits_to_keep=1)
    return cache


def answer(model: PreTrainedModel, tokenizer, cache: DynamicCache, question: str, new_tokens: int) -> str:
    """What the model says after the question; the cache stays as it is."""
    ids = tokenizer(question, add_special_tokens=False, return_tensors="pt").input_ids.to(model.device)
    # a mask longer than the ids says that the ids are only what is new
    mask = torch.ones(1, cache.get_seq_length() + ids.shape[1], dtype=torch.long, device=model.device)
    output = model.generate(
        ids, attention_mask=mask, cache=copy.deepcopy(cache), max_new_tokens=new_tokens, do_sample=False
    )
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()


def main(argv: list[str] | None = None) -> dict[str, float]:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(Arguments)
    if "--smoke" in argv:
        parser.set_defaults(**SMOKE)
    (args,) = parser.parse_args_into_dataclasses(argv)
    unknown = set(args.do) - {"train", "read", "ask"}
    if unknown:
        raise ValueError(f"--do takes train, read and ask, got {', '.join(sorted(unknown))}.")
    set_seed(0)
    folder, story = Path(args.folder), Story(args.smoke)
    folder.mkdir(parents=True, exist_ok=True)
    document, memory = folder / "document.txt", folder / args.memory
    if "train" in args.do and args.model_name_or_path is None:
        train(args, story, folder)
    where = args.model_name_or_path or str(folder)
    report: dict[str, float] = {}

    if "read" in args.do:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(where), AutoTokenizer.from_pretrained(where)
        if args.document is None:
            document.write_text(story.tell(args.facts, args.sentences, random.Random(1))[0])
        text = Path(args.document or document).read_text(encoding="utf-8", errors="replace")
        ids = tokenizer(text, return_tensors="pt").input_ids.to(model.device)
        started = time.perf_counter()
        cache = read(model, ids, args.piece)
        report["seconds_reading"] = time.perf_counter() - started
        save_memory(cache, memory, model)
        report |= {"tokens": ids.shape[1], "bytes": memory.stat().st_size}
        print(f"\nRead {ids.shape[1]:,} tokens in {report['seconds_reading']:.2f} s.", end=" ")
        print(f"{memory} takes {report['bytes'] / 2**10:.0f} KiB, whatever the length of the text.")

    if "ask" in args.do:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(where), AutoTokenizer.from_pretrained(where)
        started = time.perf_counter()
        cache = load_memory(memory, model)
        report["seconds_loading"] = time.perf_counter() - started
        print(f"Loaded the memory of {cache.get_seq_length():,} tokens in {report['seconds_loading']:.2f} s.\n")
        if args.questions or args.document or args.model_name_or_path:
            for question in args.questions or ["In short,"]:
                print(f"{question}\n  {answer(model, tokenizer, cache, question, args.max_new_tokens)}")
            return report
        _, truth = story.tell(args.facts, args.sentences, random.Random(1))
        said = {person: answer(model, tokenizer, cache, story.question(person), 1) for person in truth}
        for person, place in said.items():
            print(f"{story.question(person)} {place}" + ("" if place == truth[person] else f" (no: {truth[person]})"))
        right, asked, documents = 0, 0, 8
        for seed in range(2, 2 + documents):  # more of the same kind, as a few questions say little
            text, truth = story.tell(args.facts, args.sentences, random.Random(seed))
            cache = read(model, tokenizer(text, return_tensors="pt").input_ids.to(model.device), args.piece)
            right += sum(answer(model, tokenizer, cache, story.question(p), 1) == place for p, place in truth.items())
            asked += len(truth)
        report |= {"accuracy": right / asked, "chance": 1 / len(story.places)}
        print(f"\nAccuracy on {documents} more documents: {report['accuracy']:.2f}", end=" ")
        print(f"of {asked} questions; guessing gives {report['chance']:.2f}")
    return report


if __name__ == "__main__":
    main()
