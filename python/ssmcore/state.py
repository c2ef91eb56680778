"""The memory of running sequences."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ssmcore._files import write_atomically
from ssmcore.errors import InvalidArgumentError

if TYPE_CHECKING:
    from ssmcore import _core


class State:
    """What a model remembers of the sequences it is reading, in one slot each.

    `Model.new_state` makes it, `Model.forward`, `step` and `generate` read and update it. It
    belongs to the model that made it, and one thread may use it at a time. Slots out of range
    raise InvalidArgumentError.
    """

    def __init__(self, native: _core.ModelState):
        self.native = native

    def __repr__(self) -> str:
        return f"<ssmcore.State of {self.num_slots} slots, {self.nbytes:,} bytes>"

    @property
    def num_slots(self) -> int:
        """How many sequences it holds."""
        return self.native.num_slots

    @property
    def nbytes(self) -> int:
        """The memory it takes, however long the sequences are."""
        return self.native.nbytes

    def is_at_start(self, slot: int) -> bool:
        """Whether a slot has read nothing yet."""
        return self.native.is_at_start(slot)

    def clone(self) -> State:
        """A copy of every slot."""
        return State(self.native.clone())

    def copy_slot(self, src: int, dst: int) -> None:
        """Makes slot `dst` remember what slot `src` does, as when a sequence forks."""
        self.native.copy_slot(src, dst)

    def reset_slot(self, slot: int) -> None:
        """Puts a slot back to the start of a sequence."""
        self.native.reset_slot(slot)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes all slots to a file, which appears whole or not at all.

        Raises InvalidArgumentError if it cannot be written.
        """
        write_atomically(path, self.native.save(), "save")

    def load(self, path: str | os.PathLike[str]) -> None:
        """Reads all slots from a file that `save` wrote.

        Raises InvalidArgumentError, and leaves the state as it was, if the file cannot be read, is
        damaged, or was written from a model of another shape or another number of slots. That the
        weights are the same is for the caller to know.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise InvalidArgumentError(f"load: cannot read {path}: {error.strerror}") from error
        self.native.load(data)
