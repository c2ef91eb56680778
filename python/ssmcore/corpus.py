"""Texts as training sees them: batches of windows, drawn by seed and step."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ssmcore.errors import InvalidArgumentError
from ssmcore.tokenizer import Tokenizer

_PIECE = 2**20  # characters that are tokenized at a time


def read_text(file: str | os.PathLike[str], op: str) -> str:
    """The text of a file; raises InvalidArgumentError, beginning with `op`, for none."""
    try:
        text = Path(file).read_bytes().decode()
    except OSError as error:
        raise InvalidArgumentError(f"{op}: cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(f"{op}: {file} is not UTF-8 text: {error}") from error
    if not text:
        raise InvalidArgumentError(f"{op}: {file} is empty")
    return text


class Corpus:
    """Texts, one after another, as token ids.

    Raises InvalidArgumentError for texts too short for a window of `length` tokens and the next.
    """

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer, vocab_size: int, length: int):
        dtype = np.min_scalar_type(vocab_size - 1)
        self.tokens = np.concatenate(
            [
                np.asarray(tokenizer.encode(piece, add_special_tokens=False)).astype(dtype)
                for text in texts
                for piece in _pieces(text)
            ]
            or [np.empty(0, dtype)]
        )
        if len(self.tokens) <= length:
            raise InvalidArgumentError(
                f"train: the text has {len(self.tokens)} tokens, expected at least {length + 1}: "
                f"a window of {length} and the next"
            )
        self._length = length
        self._epoch = -1, -1  # a seed and an epoch: where that is cut, and the order of its windows
        self._cut, self._order = 0, np.empty(0, np.int64)

    def batch(self, rows: int, seed: int, step: int) -> np.ndarray:
        """(rows, length + 1) token ids, which depend on `seed` and `step` alone, counted from 1.

        An epoch after the other the text, a circle, is cut into windows anywhere, and each of them
        comes once, in random order: all tokens come equally often, as far as they can.
        """
        windows = np.empty((rows, self._length + 1), self.tokens.dtype)
        steps = np.arange(self._length + 1)
        for row in range(rows):
            start = self._start(seed, (step - 1) * rows + row)
            windows[row] = self.tokens.take(start + steps, mode="wrap")
        return windows

    def _start(self, seed: int, number: int) -> int:
        """Where the window of that number begins, of all that training sees."""
        count = len(self.tokens) // self._length
        epoch, place = divmod(number, count)
        if self._epoch != (seed, epoch):
            self._epoch = seed, epoch
            random = np.random.Philox(key=seed, counter=[0, epoch, 0, 0])
            self._cut = int(random.random_raw() % np.uint64(len(self.tokens)))
            self._order = random.random_raw(count).argsort(kind="stable")
        return self._cut + int(self._order[place]) * self._length


def _pieces(text: str) -> Iterator[str]:
    """A text in pieces that end with a line where they can: its ids as a list take much memory."""
    begin = 0
    while begin < len(text):
        end = min(begin + _PIECE, len(text))
        line = text.rfind("\n", begin, end) + 1
        if end < len(text) and line > begin:
            end = line
        yield text[begin:end]
        begin = end
