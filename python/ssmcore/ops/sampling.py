"""Drawing tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .. import _core
from .._arrays import gpu_of
from .._outputs import library_of
from ..errors import InvalidArgumentError
from ._arguments import Array, require_rank

# The range of each setting of `sample`, and how to say it: for a GPU, since on the CPU the call
# itself looks at them.
_SETTINGS: dict[str, tuple[Callable[[np.ndarray], Any], str]] = {
    "repetition_penalty": (lambda v: (v > 0) & np.isfinite(v), "a positive number"),
    "temperature": (lambda v: (v >= 0) & np.isfinite(v), "a finite number of at least 0"),
    "top_k": (lambda v: v >= 0, "at least 0 (0: off)"),
    "top_p": (lambda v: (v > 0) & (v <= 1), "more than 0 and at most 1"),
    "min_p": (lambda v: (v >= 0) & (v <= 1), "0 to 1"),
}


def sample(
    logits: Array,
    *,
    temperature: Any = 1.0,
    top_k: Any = 0,
    top_p: Any = 1.0,
    min_p: Any = 0.0,
    repetition_penalty: Any = 1.0,
    history: Array | None = None,
    seed: Any = None,
    position: Any = 0,
    check: bool = False,
) -> Array:
    """Draws a token a row: repetition penalty, temperature, top-k, top-p, min-p, in this order.

    A row's draw depends on its logits and settings, its seed and its position alone (Philox4x32-10,
    key = seed, counter = position). Settings are numbers or (B,) arrays.

    Args:
        logits: (B, V), float32, each row with a finite largest value and no NaN.
        temperature: ≥ 0; 0 takes the largest logit, the lowest id among equals.
        top_k: keep the k largest; 0 keeps all.
        top_p: keep the smallest set of largest probabilities that sums to at least this; in (0, 1].
        min_p: keep probabilities of at least this times the largest; in [0, 1].
        repetition_penalty: > 0: logits of ids in `history` are divided by it where positive and
            multiplied by it where negative.
        history: (B, H) ids; negative ones are padding.
        seed: number s, row b then uses s + b; (B,) array; or None, row b uses b.
        position: the draw's number in its sequence.

    Returns:
        (B,), int64 (in JAX its default integer, int32 unless x64 is enabled).
    """
    require_rank(logits, "sample: logits", 2, "(batch, vocab_size)")
    batch = logits.shape[0]
    library = library_of(logits)
    out = library.empty((batch,), "int64")
    on = library.on(check=check)

    def setting(name: str, value: Any, dtype: str) -> Any:
        if gpu_of(value) is not None:
            return value
        rows = per_row(name, value, dtype, batch)
        if on is not None and name in _SETTINGS:
            valid, expected = _SETTINGS[name]
            if not valid(rows).all():
                raise InvalidArgumentError(f"sample: {name} is {value!r}, expected {expected}")
        return library.from_host(rows)

    _core.sample(
        on=on,
        logits=logits,
        history=history,
        repetition_penalty=setting("repetition_penalty", repetition_penalty, "float32"),
        temperature=setting("temperature", temperature, "float32"),
        top_k=setting("top_k", top_k, "int32"),
        top_p=setting("top_p", top_p, "float32"),
        min_p=setting("min_p", min_p, "float32"),
        seed=setting("seed", 0 if seed is None else seed, "int64"),
        position=setting("position", position, "int64"),
        out=out,
    )
    return library.hand_over(out)


def per_row(name: str, value: Any, dtype: str, batch: int) -> np.ndarray:
    """A setting of `sample`, one number or one for each row, as a (batch,) array of `dtype`.

    A seed that is one number counts up with the rows. Raises InvalidArgumentError for what is
    neither.
    """
    try:
        given = np.asarray(value)
        if dtype == "int32":
            given = np.minimum(given, np.iinfo(np.int32).max)
        converted = given.astype(dtype, casting="same_kind")
        if given.dtype.kind in "iu" and not np.array_equal(converted, given):
            raise ValueError(f"beyond {dtype}")
        if name == "seed" and given.ndim == 0:
            converted = converted + np.arange(batch)
        rows: np.ndarray = np.broadcast_to(converted, (batch,))
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(
            f"sample: {name} is {value!r}, expected a number or {batch} of them"
        ) from error
    return rows
