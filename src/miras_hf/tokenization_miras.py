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
"""A byte-level BPE tokenizer that is trained from text and loads anywhere Transformers does.

The class adds no state of its own: everything that decides the ids (vocabulary, merges, splitting, special tokens,
post-processor) lives in `tokenizer.json`, so a saved folder gives the same ids to people who have `miras_hf` imported
(as [`MirasTokenizer`]) and to people who have not (as Transformers' own `TokenizersBackend`).
"""

import inspect
from collections.abc import Iterable, Iterator, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import TokenizersBackend

from .chat_template import CHAT_TEMPLATE


PAD_TOKEN = "<|pad|>"
BOS_TOKEN = "<|bos|>"
EOS_TOKEN = "<|eos|>"
TURN_TOKEN = "<|turn|>"
# The order is the order of the ids: bos 1 and eos 2 are what Llama-like configurations assume.
SPECIAL_TOKENS = (PAD_TOKEN, BOS_TOKEN, EOS_TOKEN, TURN_TOKEN)

SETTINGS = {
    "add_bos_token",
    "add_eos_token",
    "chat_template",
    "clean_up_tokenization_spaces",
    "model_input_names",
    "model_max_length",
    "padding_side",
    "response_template",
    "split_special_tokens",
    "truncation_side",
}

# Qwen3.5's pattern: words take one leading space or symbol, digits are single, line ends stick to the punctuation
# before them. No normalizer goes with it, as NFC would change bytes.
SPLIT_PATTERN = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def _byte_of_symbol() -> dict[str, int]:
    """The byte that each of the 256 symbols of the byte-level alphabet stands for (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF_SYMBOL = _byte_of_symbol()
SYMBOL_OF_BYTE = {byte: symbol for symbol, byte in BYTE_OF_SYMBOL.items()}


class MirasTokenizer(TokenizersBackend):
    """
    Byte-level BPE tokenizer of the Miras models: no unknown token, no normalization, every text comes back unchanged.

    Special tokens: `<|pad|>` (0), `<|bos|>` (1, put before every text), `<|eos|>` (2, ends a document and a chat turn)
    and `<|turn|>` (3, opens a chat turn and is followed by the role and a line end). Padding is on the left, as in
    Llama, Gemma and Cohere: `generate` continues the last position of every row, which must be a real token. Miras models
    ignore pads on either side, and in their losses no pad has to predict a token. (`Trainer` divides by a number of
    targets that has one too many for every row with pads on the left.)

    Made by [`~MirasTokenizer.train_from_iterator`] or `from_pretrained`.

    Example:

    ```python
    >>> from miras_hf import MirasTokenizer

    >>> tokenizer = MirasTokenizer.train_from_iterator(["to be or not to be"], vocab_size=300)
    >>> tokenizer.decode(tokenizer("to be")["input_ids"], skip_special_tokens=True)
    'to be'
    ```
    """

    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"
    model = BPE

    @classmethod
    def train_from_iterator(
        cls,
        iterator: Iterable[str | Sequence[str]],
        vocab_size: int = 8192,
        *,
        min_frequency: int = 2,
        extra_special_tokens: Sequence[str] = (),
        length: int | None = None,
        show_progress: bool = False,
        **kwargs,
    ) -> "MirasTokenizer":
        """
        Train a tokenizer on texts. The same texts in the same order give the same tokenizer.

        Args:
            iterator (`Iterable[str]` or `Iterable[list[str]]`):
                The texts, one by one or in batches (batches are faster). Read once, never held in memory.
            vocab_size (`int`, *optional*, defaults to 8192):
                Size aimed at, special tokens and the 256 byte symbols included. Little text may give fewer: use
                `len(tokenizer)` for the model's `vocab_size`.
            min_frequency (`int`, *optional*, defaults to 2):
                How often a pair must occur to be merged.
            extra_special_tokens (`Sequence[str]`, *optional*):
                Further special tokens; their ids come after the four built-in ones.
            length (`int`, *optional*):
                Number of items in `iterator`, for the progress bar only.
            show_progress (`bool`, *optional*, defaults to `False`):
                Whether to show the progress bars of `tokenizers`.
            kwargs:
                Settings of the tokenizer: `model_max_length`, `chat_template`, `padding_side`, `truncation_side`,
                `add_bos_token`, `add_eos_token`, `split_special_tokens`, `clean_up_tokenization_spaces`,
                `model_input_names` or `response_template`.

        Returns:
            [`MirasTokenizer`]

        Raises:
            TypeError: an argument or a text has the wrong type, or a setting is not one of those above.
            ValueError: `vocab_size` cannot hold the bytes and special tokens, or there is no text.
        """
        unknown = sorted(set(kwargs) - SETTINGS)
        if unknown:  # Transformers would keep it in the tokenizer's files, where nothing reads it
            raise TypeError(
                f"`train_from_iterator` got `{unknown[0]}`; settings of the tokenizer are {sorted(SETTINGS)}."
            )
        special_tokens = [*SPECIAL_TOKENS, *_checked_special_tokens(extra_special_tokens)]
        smallest = len(ALPHABET) + len(special_tokens)
        _check_int("vocab_size", vocab_size, smallest, f"256 bytes and {len(special_tokens)} special tokens")
        _check_int("min_frequency", min_frequency, 1, "a pair must occur to be merged")

        backend = Tokenizer(BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=min_frequency,
            special_tokens=[AddedToken(token, normalized=False, special=True) for token in special_tokens],
            initial_alphabet=ALPHABET,
            show_progress=show_progress,
        )
        backend.train_from_iterator(_checked_texts(iterator), trainer=trainer, length=length)

        defaults = {
            "pad_token": PAD_TOKEN,
            "bos_token": BOS_TOKEN,
            "eos_token": EOS_TOKEN,
            "extra_special_tokens": special_tokens[3:],
            "chat_template": CHAT_TEMPLATE,
            "add_bos_token": True,
            # Given here, though it is the class's default, so that it is saved for those who load without the class.
            "padding_side": cls.padding_side,
            "clean_up_tokenization_spaces": False,
        }
        return cls(tokenizer_object=backend, **(defaults | kwargs))

    def apply_chat_template(self, conversation, *args, **kwargs):
        """
        `apply_chat_template` of Transformers, which also passes what it does not know to the template. See
        `miras_hf.chat_template` for what that has words for.

        Raises:
            TypeError: for an argument that neither Transformers nor the template knows, unless it is false or `None`.
            jinja2.TemplateError: for conversations that the template has no words for.
        """
        known = inspect.signature(super().apply_chat_template).bind_partial(conversation, *args, **kwargs).arguments
        unknown = {name: value for name, value in known.get("kwargs", {}).items() if value}
        if unknown:
            template = self.get_chat_template(known.get("chat_template"), known.get("tools"))
            for name in unknown:
                if name not in template:
                    raise TypeError(
                        f"`apply_chat_template` got `{name}`={unknown[name]!r:.80}, which its template does not use. "
                        "Arguments of the tokenizer itself go into `tokenizer_kwargs`."
                    )
        return super().apply_chat_template(conversation, *args, **kwargs)

    def encode_bytes(self, data: bytes) -> list[int]:
        """
        Ids of any bytes, UTF-8 or not: no special token is added, and none is recognised in the data.

        Args:
            data (`bytes`): The bytes.

        Returns:
            `list[int]`: Ids with `decode_bytes(ids) == data`; for UTF-8 the same ids as the decoded text has.

        Raises:
            TypeError: `data` is not bytes.
        """
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"`data` must be bytes, got {type(data).__name__}: {data!r:.80}. Use `encode` for text.")
        ids: list[int] = []
        # A byte that is not UTF-8 becomes one lone surrogate, U+DC80 + (byte - 0x80): the only way it can occur here.
        text = bytes(data).decode("utf-8", errors="surrogateescape")
        start = 0
        for end in [i for i, char in enumerate(text) if "\udc80" <= char <= "\udcff"] + [len(text)]:
            if start < end:
                ids += self(text[start:end], add_special_tokens=False, split_special_tokens=True)["input_ids"]
            if end < len(text):
                ids += self.convert_tokens_to_ids([SYMBOL_OF_BYTE[ord(text[end]) - 0xDC00]])
            start = end + 1
        return ids

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """
        The exact bytes that ids stand for, also where they are not UTF-8 (a character cut in two, binary data).

        Args:
            ids (`Sequence[int]`): Ids of one row. Special tokens stand for no bytes and are skipped; other tokens that were
                added stand for their content in UTF-8.

        Returns:
            `bytes`

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        parts, added_tokens = [], self.added_tokens_decoder
        for i in map(int, ids):
            token = self.convert_ids_to_tokens(i)
            if token is None:
                raise ValueError(f"`ids` holds {i}, but the ids of this tokenizer are 0 to {len(self) - 1}.")
            if (added := added_tokens.get(i)) is None:
                parts.append(bytes(BYTE_OF_SYMBOL[symbol] for symbol in token))
            elif not added.special:
                parts.append(token.encode())
        return b"".join(parts)


def _checked_texts(iterator: Iterable[str | Sequence[str]]) -> Iterator[str | Sequence[str]]:
    """Pass items on; raise for what is not text, and at the end if there was none."""
    if isinstance(iterator, (str, bytes)) or not isinstance(iterator, Iterable):
        raise TypeError(
            f"`iterator` must be an iterable of strings, got {type(iterator).__name__}: {iterator!r:.80}. "
            "Put a single text into a list."
        )
    found = False
    for position, item in enumerate(iterator):
        texts = [item] if isinstance(item, str) else item
        if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
            raise TypeError(
                f"`iterator` must give strings or lists of strings, but item {position} is {type(item).__name__}: "
                f"{item!r:.80}."
            )
        found = found or any(texts)
        yield item
    if not found:
        raise ValueError("`iterator` gave no text: at least one non-empty string is needed to train a tokenizer.")


def _checked_special_tokens(tokens: Sequence[str]) -> list[str]:
    """The tokens as a list; raise unless they are distinct, non-empty and new."""
    if isinstance(tokens, str) or not all(isinstance(token, str) for token in tokens):
        raise TypeError(f"`extra_special_tokens` must be a list of strings, got {tokens!r}.")
    if "" in tokens or len({*tokens, *SPECIAL_TOKENS}) != len(tokens) + len(SPECIAL_TOKENS):
        raise ValueError(
            f"`extra_special_tokens` must be non-empty, distinct and other than {', '.join(SPECIAL_TOKENS)}, "
            f"got {list(tokens)}."
        )
    return list(tokens)


def _check_int(name: str, value: int, smallest: int, reason: str) -> None:
    """Raise unless `value` is an integer of at least `smallest`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an integer, got {type(value).__name__}: {value!r}.")
    if value < smallest:
        raise ValueError(f"`{name}` must be at least {smallest} ({reason}), got {value}.")


__all__ = ["MirasTokenizer"]
