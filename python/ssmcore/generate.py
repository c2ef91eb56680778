"""Generation: from a prompt to its continuation, token by token, for one row or many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ssmcore.continuation import Continuation, IdContinuation, TextContinuation
from ssmcore.decoder import Decoder
from ssmcore.errors import InvalidArgumentError
from ssmcore.tokenizer import Tokenizer, as_token_ids

if TYPE_CHECKING:
    from ssmcore import _core


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How to choose tokens, and when to stop. `Model.generate` says what each means."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | Sequence[int] = 0
    stop: str | Sequence[str] | None = None
    ignore_eos: bool = False

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class Generation:
    """One run from prompts to their continuations. Iterating it, once, generates.

    Every item is one chosen token: the row it belongs to, and the piece of that row's continuation
    which can be passed on since, a str or a list of ids, possibly empty. A row's pieces join to
    its continuation.

    `op` names the caller in errors. The prompts follow what `state` has read; once the iteration
    has ended, it has read them and every chosen token too. Raises InvalidArgumentError at once for
    a prompt that is no text or token ids or has no tokens, for text without a tokenizer, for a
    state of another number of rows, and for bad settings.
    """

    def __init__(
        self,
        language_model: _core.LanguageModel,
        tokenizer: Tokenizer | None,
        prompt: Any,
        settings: GenerationSettings,
        op: str,
        state: _core.ModelState | None = None,
    ):
        self._language_model = language_model
        self._settings = settings
        self._state = state
        _check_settings(settings, op)

        self.is_batch = _is_batch(prompt, op)
        self.is_text = isinstance(prompt, str) or (self.is_batch and _are_strings(prompt))
        rows = list(prompt) if self.is_batch else [prompt]
        if state is not None and state.num_slots != len(rows):
            raise InvalidArgumentError(
                f"{op}: state has {state.num_slots} slots, expected one for each of "
                f"{len(rows)} prompts"
            )
        stop = settings.stop_strings
        if tokenizer is None and (self.is_text or stop):
            what = "a prompt that is text" if self.is_text else "stop"
            raise InvalidArgumentError(f"{op}: {what} needs a tokenizer, and this model has none")
        self._continuations: list[Continuation]
        if self.is_text:
            assert tokenizer is not None  # or it has been refused
            # Tokens that begin a text have no place within one.
            begins = [state is None or state.is_at_start(row) for row in range(len(rows))]
            rows = [tokenizer.encode(*row) for row in zip(rows, begins, strict=True)]
            self._continuations = [TextContinuation(tokenizer, stop) for _ in rows]
        else:
            self._continuations = [IdContinuation(tokenizer, stop) for _ in rows]
        self.prompts = [as_token_ids(row, op, "prompt", ranks=(1,)) for row in rows]
        self._seeds = _seeds(settings.seed, len(rows), op)

    def collect(self) -> Any:
        """Runs to the end and returns the continuations, in the prompt's kind."""
        pieces: list[list[Any]] = [[] for _ in self.prompts]
        for row, piece in self:
            pieces[row].extend(piece)
        texts = ["".join(row) for row in pieces] if self.is_text else pieces
        return texts if self.is_batch else texts[0]

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        model, settings = self._language_model, self._settings
        state = self._state or model.new_state(len(self.prompts))
        if settings.max_new_tokens == 0:
            self._read_prompts(state)
            return
        eos_token_ids = set() if settings.ignore_eos else set(model.config.eos_token_ids)
        decoder = Decoder(model.new_decoder(state))
        rows = np.arange(len(self.prompts))  # which go on; a row is also the slot of its state
        decoder.admit(
            rows,
            self.prompts,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            min_p=settings.min_p,
            repetition_penalty=settings.repetition_penalty,
            seed=self._seeds,
        )
        launched = [rows]  # the rows of what has not been taken: some may have ended since
        for position in range(settings.max_new_tokens):
            is_last = position + 1 == settings.max_new_tokens
            # A caller's state is for the caller to stop at any token, and then has not read it.
            runs_ahead = decoder.runs_ahead and not is_last and self._state is None
            if runs_ahead:
                decoder.step(rows)
                launched.append(rows)
            going_on = set(rows.tolist())
            ended = []
            for row, token_id in zip(launched.pop(0).tolist(), decoder.take(), strict=True):
                if row not in going_on:
                    continue
                continuation = self._continuations[row]
                is_eos = token_id in eos_token_ids
                piece = continuation.close() if is_eos else continuation.push(token_id)
                if is_last and not is_eos:
                    piece += continuation.close()
                if is_last or is_eos or continuation.stopped:
                    ended.append(row)
                yield row, piece
            if self._state is not None and ended:
                # What is read next is no longer for this run to know, but follows all of it.
                decoder.read(ended)
            rows = np.setdiff1d(rows, ended)
            if not rows.size:
                return
            if not runs_ahead:
                decoder.step(rows)
                launched.append(rows)

    def _read_prompts(self, state: _core.ModelState) -> None:
        """Reads all prompts in one pass."""
        token_ids = np.concatenate(self.prompts)[np.newaxis]
        cu_seqlens = None
        if len(self.prompts) > 1:
            cu_seqlens = np.cumsum([0, *map(len, self.prompts)], dtype=np.int32)
        self._language_model.forward(token_ids, None, state, None, cu_seqlens)


def _check_settings(settings: GenerationSettings, op: str) -> None:
    """Checks what the operators do not see."""
    limit = settings.max_new_tokens
    if not isinstance(limit, int | np.integer) or limit < 0:
        raise InvalidArgumentError(
            f"{op}: max_new_tokens should be an integer of at least 0, got {limit!r}"
        )
    stop = settings.stop
    is_known = stop is None or isinstance(stop, str) or _are_strings(stop)
    if not is_known or "" in settings.stop_strings:
        raise InvalidArgumentError(
            f"{op}: stop should be a str or a list of str, none of them empty, got {stop!r}"
        )


def _seeds(seed: Any, num_rows: int, op: str) -> np.ndarray:
    """The seed of each row: `seed` itself counted up, or its items."""
    is_list = isinstance(seed, list | tuple | np.ndarray)
    seeds = list(seed) if is_list else [seed]
    if not all(isinstance(s, int | np.integer) and -(2**63) <= s < 2**63 for s in seeds):
        raise InvalidArgumentError(
            f"{op}: seed should be an integer of 64 bits, or one for each row, got {seed!r}"
        )
    if not is_list:
        return np.int64(seed) + np.arange(num_rows)
    if len(seeds) != num_rows:
        raise InvalidArgumentError(
            f"{op}: seed has {len(seeds)} items, expected one for each of {num_rows} prompts"
        )
    return np.array(seeds, np.int64)


def _are_strings(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)


def _is_batch(prompt: Any, op: str) -> bool:
    """Whether `prompt` is many prompts: a list of str, or token ids of rank 2."""
    if isinstance(prompt, str):
        return False
    try:
        return len(prompt) > 0 and (isinstance(prompt[0], str) or np.ndim(prompt[0]) > 0)
    except (TypeError, KeyError):
        raise InvalidArgumentError(
            f"{op}: prompt should be a str, token ids, or a list of either, "
            f"got {type(prompt).__name__}"
        ) from None
