"""Sequences that go on together, one token a step, and join and leave in between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ssmcore.errors import InvalidArgumentError
from ssmcore.ops.sampling import per_row
from ssmcore.tokenizer import as_int32, as_token_ids

if TYPE_CHECKING:
    from ssmcore import _core

Slots: TypeAlias = Sequence[int] | np.ndarray


class Decoder:
    """Feeds the sequences in the slots of a state the tokens that it draws for them.

    `Model.new_decoder` makes it. Each sequence has its own settings, and draws by its own seed and
    count, so that its tokens do not depend on the others.

    On a GPU tokens stay there from step to step, a step of a number of rows that has come before
    is one CUDA graph, and nothing waits but `take`: call `step` before the `take` of the step
    before, and the GPU never waits for the host. One thread may use it, and its state, at a time.
    """

    def __init__(self, native: _core.Decoder):
        self._native = native

    @property
    def runs_ahead(self) -> bool:
        """Whether `step` returns before it is done: on a GPU."""
        return self._native.runs_ahead

    def admit(
        self,
        slots: Slots,
        prompts: Sequence[Any] | np.ndarray,
        *,
        temperature: Any = 0.0,
        top_k: Any = 0,
        top_p: Any = 1.0,
        min_p: Any = 0.0,
        repetition_penalty: Any = 1.0,
        seed: Any = 0,
    ) -> None:
        """Reads prompts, in one pass, and draws the token that follows each.

        Args:
            slots: where in the state each sequence is, all different. It goes on from what its
                slot has read; `State.reset_slot` is for a new one.
            prompts: token ids of any lengths, at least one each.
            temperature, top_k, top_p, min_p, repetition_penalty: of the draws, as for
                `ops.sample`: numbers, or one for each prompt. The penalty is over the prompt and
                what has been drawn.
            seed: number s, prompt i then draws by s + i; or one for each prompt.

        Raises:
            InvalidArgumentError: for a setting, an id or a slot out of range, a prompt of no
                tokens, and where two results wait to be taken.
            BackendError: out of memory, and what for.
        """
        rows = [as_token_ids(prompt, "admit", "prompt", ranks=(1,)) for prompt in prompts]
        if len(rows) != len(slots):
            raise InvalidArgumentError(f"admit: got {len(rows)} prompts for {len(slots)} slots")
        count = len(rows)
        self._native.admit(
            _as_slots(slots, "admit"),
            np.concatenate(rows) if rows else np.empty(0, np.int64),
            np.array([len(row) for row in rows], np.int64),
            per_row("temperature", temperature, "float32", count),
            per_row("top_k", top_k, "int32", count),
            per_row("top_p", top_p, "float32", count),
            per_row("min_p", min_p, "float32", count),
            per_row("repetition_penalty", repetition_penalty, "float32", count),
            per_row("seed", seed, "int64", count),
        )

    def step(self, slots: Slots) -> None:
        """Feeds the sequences in `slots` their last token, and draws the next.

        Raises InvalidArgumentError for a slot out of range, twice or that nothing was admitted
        to, more rows than slots, and where two results wait to be taken.
        """
        self._native.step(_as_slots(slots, "step"))

    def read(self, slots: Slots) -> None:
        """Feeds the sequences in `slots` their last token, and draws nothing.

        The state has then read everything. Raises InvalidArgumentError for slots as `step` does.
        """
        self._native.read(_as_slots(slots, "read"))

    def take(self) -> list[int]:
        """The tokens of the earliest `admit` or `step` not taken yet, one for each of its slots.

        Waits for them. Raises InvalidArgumentError where nothing waits to be taken.
        """
        return self._native.take()


def _as_slots(slots: Any, op: str) -> np.ndarray:
    array = as_int32(slots, op, "slots")
    assert array is not None  # only None gives None, which no caller passes
    return array
