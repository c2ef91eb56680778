"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import threading
from contextlib import suppress

from ssmcore.errors import InvalidArgumentError


def write_atomically(path: str | os.PathLike[str], data: bytes, op: str) -> None:
    """Writes a file under another name and then renames it, over what was there before.

    Raises InvalidArgumentError, its message beginning with `op`, if it cannot be written.
    """
    temporary = f"{os.fspath(path)}.tmp-{os.getpid()}-{threading.get_ident()}"
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            reason = error.strerror
            raise InvalidArgumentError(f"{op}: cannot write {path}: {reason}") from error
        raise
