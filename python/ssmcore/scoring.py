"""How well a model predicts a text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ssmcore.errors import InvalidArgumentError

if TYPE_CHECKING:
    from ssmcore import _core

_MAX_LOGITS = 2**23  # values held at once: 32 MiB
_MAX_POSITIONS = 4096


@dataclass(frozen=True)
class Score:
    """A model's loss on a text.

    `tokens` were scored, standing for `bytes` bytes of UTF-8 text, and `nats` is the sum of their
    negative log-likelihoods.
    """

    tokens: int
    bytes: int
    nats: float

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes

    @property
    def perplexity(self) -> float:
        """exp of the mean loss of a token."""
        return math.exp(self.nats / self.tokens)


def windows_of(token_ids: np.ndarray, window: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and next tokens, each (windows, window): consecutive, an incomplete last one left out.

    Without a window, the whole of `token_ids` is one.
    """
    num_next = max(0, len(token_ids) - 1)
    if window is None:
        window = max(1, num_next)
    if not isinstance(window, int) or window < 1:
        raise InvalidArgumentError(f"score: window should be an integer of at least 1: {window!r}")
    if num_next < window:
        raise InvalidArgumentError(
            f"score: expected a text of at least {window + 1} tokens, got {len(token_ids)}"
        )
    end = num_next // window * window
    return token_ids[:end].reshape(-1, window), token_ids[1 : end + 1].reshape(-1, window)


def sum_nats(
    language_model: _core.LanguageModel,
    inputs: np.ndarray,
    targets: np.ndarray,
    progress: Callable[[int, int], object] | None,
) -> float:
    """The loss of `targets` given `inputs`, both (windows, window), each window from the start.

    Runs in pieces, so that memory does not grow with the text; `progress(done, total)` is called
    with tokens after each.
    """
    num_windows, window = inputs.shape
    vocab_size = language_model.config.vocab_size
    positions = max(1, min(_MAX_POSITIONS, _MAX_LOGITS // vocab_size))
    rows, columns = max(1, positions // window), min(window, positions)
    nats, done = 0.0, 0
    for first_row in range(0, num_windows, rows):
        batch = slice(first_row, min(first_row + rows, num_windows))
        state = language_model.new_state(batch.stop - batch.start)
        for first_column in range(0, window, columns):
            piece = (batch, slice(first_column, first_column + columns))
            token_ids = np.ascontiguousarray(inputs[piece])
            logits = np.empty((*token_ids.shape, vocab_size), np.float32)
            language_model.forward(token_ids, logits, state)
            nats += _cross_entropy(logits.reshape(-1, vocab_size), targets[piece].reshape(-1))
            done += token_ids.size
            if progress is not None:
                progress(done, inputs.size)
    return nats


def _cross_entropy(logits: np.ndarray, targets: np.ndarray) -> float:
    """Sum over rows of -log softmax(logits)[target]; overwrites `logits`."""
    logits -= logits.max(axis=1, keepdims=True)
    chosen = logits[np.arange(len(targets)), targets].sum(dtype=np.float64)
    np.exp(logits, out=logits)
    return float(np.log(logits.sum(axis=1, dtype=np.float64)).sum() - chosen)
