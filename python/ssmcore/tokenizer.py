"""Token ids: from text and back, at once or token by token, and from what a caller gives."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from ssmcore.errors import InvalidArgumentError

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what decoding gives for bytes that are no character


class Tokenizer(Protocol):
    """What ssmcore asks of a tokenizer."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`, with those its template adds unless `add_special_tokens` is false."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids`, special tokens left out, U+FFFD for broken characters."""

    def num_bytes(self, token_ids: Sequence[int]) -> int:
        """How many UTF-8 bytes the text has that begins with `token_ids`, as far as they go."""


class ByteTokenizer:
    """One token for each byte of the UTF-8 text, for models with a vocabulary of 256."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(_utf8(text))

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(token_ids).decode("utf-8", errors="replace")

    def num_bytes(self, token_ids: Sequence[int]) -> int:
        return len(token_ids)


class FileTokenizer:
    """A tokenizer.json of the `tokenizers` library.

    Raises InvalidArgumentError for a file that cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]):
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(os.fspath(path))
        except Exception as error:  # all that the library raises
            raise InvalidArgumentError(f"load: {path}: not a tokenizer.json: {error}") from error
        # A file may ask for either; both would falsify the text.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._byte_level = isinstance(self._tokenizer.decoder, tokenizers.decoders.ByteLevel)

    @property
    def vocab_size(self) -> int:
        """How many ids there are: one more than the largest."""
        return 1 + max(self._tokenizer.get_vocab().values(), default=-1)

    def to_json(self) -> str:
        """The text of a tokenizer.json."""
        return self._tokenizer.to_str(pretty=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        data = _utf8(text)
        if self._id_by_byte is not None:
            ids: list[int] = self._id_by_byte[np.frombuffer(data, np.uint8)].tolist()
            return ids
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids)

    def num_bytes(self, token_ids: Sequence[int]) -> int:
        if not self._byte_level:
            return len(self.decode(token_ids).encode())
        return int(self._bytes_by_id[np.asarray(token_ids, np.int64)].sum())

    @functools.cached_property
    def _id_by_byte(self) -> np.ndarray | None:
        """The id of each byte, where every token is one; None for other vocabularies.

        The library takes hundreds of bytes of memory for a token, which a long text cannot afford.
        """
        from tokenizers import models, pre_tokenizers

        tokenizer, model = self._tokenizer, self._tokenizer.model
        splits_into_bytes = (
            tokenizer.normalizer is None
            and tokenizer.post_processor is None
            and not tokenizer.get_added_tokens_decoder()
            and isinstance(tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel)
            and not tokenizer.pre_tokenizer.add_prefix_space
            and isinstance(model, models.BPE)
            and not (model.continuing_subword_prefix or model.end_of_word_suffix)
        )
        alphabet = set(pre_tokenizers.ByteLevel.alphabet())
        if not splits_into_bytes or tokenizer.get_vocab().keys() != alphabet:
            return None
        # Every byte that UTF-8 uses: all of one and two bytes, then each first byte of more.
        longer = (*range(0x800, 0xD800, 0x800), *range(0xE000, 0x110000, 0x1000))
        text = "".join(map(chr, (*range(0x800), *longer)))
        ids = np.zeros(256, np.int64)
        ids[np.frombuffer(text.encode(), np.uint8)] = tokenizer.encode(text).ids
        return ids

    @functools.cached_property
    def _bytes_by_id(self) -> np.ndarray:
        # Byte-level vocabularies write each byte as one character; only added tokens are text.
        vocab = self._tokenizer.get_vocab(with_added_tokens=False)
        added = self._tokenizer.get_added_tokens_decoder()
        counts = np.zeros(1 + max([*vocab.values(), *added], default=-1), np.int64)
        for token, token_id in vocab.items():
            counts[token_id] = len(token)
        for token_id, added_token in added.items():
            counts[token_id] = len(added_token.content.encode())
        return counts


class IncrementalDecoder:
    """Decodes a sequence token by token into pieces that join to the text of the whole.

    Bytes at the end that may yet become a character are held back. A window of the last few ids is
    decoded anew for each token: what a token means may depend on the one before it.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._num_context = 0  # ids at the window's begin whose text has long been returned
        self._num_returned = 0  # characters of the window's text that have been returned
        self.pending = False  # whether something is held back

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes."""
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        # An unfinished character has at most three bytes, so what has been broken for longer is so
        # for good.
        num_broken = len(text) - len(text.rstrip(_REPLACEMENT))
        if len(self._window) - self._num_context > 3:
            num_broken = min(3, num_broken)
        end = len(text) - num_broken
        piece = text[self._num_returned : end]
        self.pending = num_broken > 0
        if self.pending:
            self._num_returned = max(self._num_returned, end)
        elif piece or not self._num_context:
            del self._window[: self._num_context]
            self._num_context = len(self._window)
            self._num_returned = len(self._tokenizer.decode(self._window))
        else:  # an id without text
            del self._window[self._num_context :]
        return piece

    def flush(self) -> str:
        """The text still held back, at the end of the sequence."""
        return self._tokenizer.decode(self._window)[self._num_returned :]


def as_token_ids(ids: Any, op: str, name: str, ranks: tuple[int, ...]) -> np.ndarray:
    """The integers a caller gave as argument `name` of `op`, as contiguous int64.

    Raises InvalidArgumentError for no integers, another rank, or nothing at all.
    """
    try:
        array = np.asarray(ids)
    except ValueError as error:
        raise InvalidArgumentError(f"{op}: {name} is no array of token ids: {error}") from error
    if array.size == 0:
        raise InvalidArgumentError(f"{op}: {name} has no tokens, expected at least one")
    if array.ndim not in ranks or array.dtype.kind not in "iu":
        raise InvalidArgumentError(
            f"{op}: {name} should be integer token ids of rank {' or '.join(map(str, ranks))}, "
            f"got {array.dtype} of shape {array.shape}"
        )
    return np.ascontiguousarray(array, np.int64)


def as_int32(values: Any, op: str, name: str, at_least: int = 1) -> np.ndarray | None:
    """A list of integers a caller gave as argument `name` of `op`, as contiguous int32, or None.

    Raises InvalidArgumentError for what is no list of at least `at_least` integers of 32 bits.
    """
    if values is None:
        return None
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise InvalidArgumentError(f"{op}: {name} is no list of integers: {error}") from error
    if array.ndim != 1 or array.dtype.kind not in "iu" or array.size < at_least:
        raise InvalidArgumentError(
            f"{op}: {name} should be a list of at least {at_least} integers, "
            f"got {array.dtype} of shape {array.shape}"
        )
    limits = np.iinfo(np.int32)
    if array.min() < limits.min or array.max() > limits.max:
        raise InvalidArgumentError(f"{op}: {name} holds an integer of more than 32 bits")
    return np.ascontiguousarray(array, np.int32)


def _utf8(text: str) -> bytes:
    """`text` in UTF-8; raises InvalidArgumentError for what is not text."""
    if not isinstance(text, str):
        raise InvalidArgumentError(f"encode: text should be a str, got {type(text).__name__}")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(f"encode: text is not valid Unicode: {error}") from error
