"""From the tokens of one row to what the caller gets: pieces of text or of ids, up to a stop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from ssmcore.tokenizer import IncrementalDecoder, Tokenizer


class StopFilter:
    """Passes text on up to a stop string, holding back what may be the beginning of one.

    Of several stop strings the one completed first counts, so that the result does not depend on
    how the text is cut into pieces.
    """

    def __init__(self, stop: Sequence[str]):
        self._stop = stop
        self.held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """What can be passed on of the text so far."""
        text = self.held + text
        begins = ((text.find(stop), stop) for stop in self._stop)
        matches = [(begin + len(stop), begin) for begin, stop in begins if begin >= 0]
        if matches:
            self.held = ""
            self.stopped = True
            return text[: min(matches)[1]]
        num_held = max((_overlap(text, stop) for stop in self._stop), default=0)
        end = len(text) - num_held
        self.held = text[end:]
        return text[:end]


class Continuation(Protocol):
    """The continuation of one row, in pieces that join to it: str, or lists of ids."""

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""

    def push(self, token_id: int) -> Any:
        """The piece that can be passed on now that `token_id` has come, possibly empty."""

    def close(self) -> Any:
        """The rest, once no more tokens come."""


class TextContinuation:
    """The continuation of one row, as text."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]):
        self._decoder = IncrementalDecoder(tokenizer)
        self._filter = StopFilter(stop)

    @property
    def stopped(self) -> bool:
        return self._filter.stopped

    @property
    def settled(self) -> bool:
        """Whether all tokens so far are in the text passed on."""
        return not (self._decoder.pending or self._filter.held)

    def push(self, token_id: int) -> str:
        return self._filter.push(self._decoder.push(token_id))

    def close(self) -> str:
        if self.stopped:
            return ""
        text = self._filter.push(self._decoder.flush())
        return text + self._filter.held


class IdContinuation:
    """The continuation of one row, as token ids: those whose text ends before a stop string."""

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str]):
        """`tokenizer` is needed only where there are stop strings."""
        self._tokenizer = tokenizer
        self._continuation = TextContinuation(tokenizer, stop) if tokenizer and stop else None
        self._text = ""
        self._ids: list[int] = []
        self._num_returned = 0

    @property
    def stopped(self) -> bool:
        return self._continuation is not None and self._continuation.stopped

    def push(self, token_id: int) -> list[int]:
        if self._continuation is None:
            return [token_id]
        self._ids.append(token_id)
        self._text += self._continuation.push(token_id)
        if self.stopped:
            return self._return_until(self._num_before_stop())
        return self._return_until(len(self._ids)) if self._continuation.settled else []

    def close(self) -> list[int]:
        if self._continuation is None or self.stopped:
            return []
        self._text += self._continuation.close()
        return self._return_until(self._num_before_stop() if self.stopped else len(self._ids))

    def _num_before_stop(self) -> int:
        assert self._tokenizer is not None  # as there is a stop string
        num_ids = len(self._ids)
        while not self._text.startswith(self._tokenizer.decode(self._ids[:num_ids])):
            num_ids -= 1
        return num_ids

    def _return_until(self, end: int) -> list[int]:
        piece = self._ids[self._num_returned : end]
        self._num_returned = end
        return piece


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are a beginning of `stop`, but not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
