"""Comparing with a reference, placing arrays in memory, and expecting refusals."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from reference import fp64

import ssmcore

if TYPE_CHECKING:
    from backends import Backend

DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}

# Largest max|actual - expected| / max|expected| of a tensor: against an fp64 reference on the same
# rounded inputs, and against results that have been rounded to the dtype themselves.
TOLERANCE = {"float64": 1e-12, "float32": 2e-5, "bfloat16": 4e-3, "float16": 1e-3}
TOLERANCE_OF_ROUNDED = {"float32": 2e-5, "bfloat16": 8e-3, "float16": 2e-3}


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """max|actual - expected| / max|expected|; NaN if either holds a NaN."""
    actual, expected = fp64(actual), fp64(expected)
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def assert_close(
    actual: np.ndarray, expected: np.ndarray, dtype: str, *, rounded: bool = False
) -> None:
    """`actual` has the shape of `expected`, and its error is within the tolerance of `dtype`.

    `rounded`: `expected` is not an fp64 reference but a result that was rounded to `dtype` too.
    """
    assert actual.shape == expected.shape
    assert np.any(expected), "an expected result of zeros has no relative error"
    error = relative_error(actual, expected)
    assert error <= (TOLERANCE_OF_ROUNDED if rounded else TOLERANCE)[dtype], f"error {error:.3g}"


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert actual.tobytes() == expected.tobytes()


# --- Memory ---------------------------------------------------------------------------------------

LAYOUTS = ("token-major", "padded", "token-major padded", "spread")


def place(array: np.ndarray, layout: str) -> np.ndarray:
    """A view with the values of `array`, laid out in memory of its own as `layout` says.

    - "contiguous": in C order.
    - "token-major": (batch, seqlen, ...) in memory for a logical (batch, ..., seqlen).
    - "padded", "token-major padded": the same, with poison before and after every row.
    - "spread": with poison also between any two elements.

    Poison is NaN, or the most negative integer.
    """
    token_major = layout.startswith("token-major") and array.ndim > 2
    if token_major:
        array = np.moveaxis(array, -1, 1)
    if layout.endswith("padded"):
        placed = _in_poison(array, step=1)
    elif layout == "spread":
        placed = _in_poison(array, step=2)
    else:
        placed = array.copy(order="C")
    return np.moveaxis(placed, 1, -1) if token_major else placed


def with_adjacent(array: np.ndarray, axis: int) -> np.ndarray:
    """A copy of `array` in memory in which the elements along `axis` are adjacent."""
    return np.moveaxis(np.moveaxis(array, axis, -1).copy(order="C"), -1, axis)


def _in_poison(array: np.ndarray, step: int) -> np.ndarray:
    memory = np.full([step * n + 3 for n in array.shape], _poison(array.dtype), array.dtype)
    view = memory[tuple(slice(1, 1 + step * n, step) for n in array.shape)]
    view[...] = array
    return view


def _poison(dtype: np.dtype) -> Any:
    if np.issubdtype(dtype, np.integer):
        return np.iinfo(dtype).min
    return complex(np.nan, np.nan) if dtype.kind == "c" else np.nan


def assert_only_poison_around(view: np.ndarray) -> None:
    """Nothing has been written around or between the elements of a view that `place` made."""
    assert view.base is not None and view.base.size > view.size
    values = view.copy()
    view[...] = _poison(view.dtype)
    assert np.isnan(fp64(view.base)).all()
    view[...] = values


# --- Errors ---------------------------------------------------------------------------------------


@contextmanager
def refuses_value(backend: Backend, operator: str, argument: str, *words: str) -> Iterator[None]:
    """`refuses`, where the message of a GPU, which looks at values while it runs, names less."""
    with refuses(operator, argument, *words) if backend.sees_values else refuses(argument):
        yield


@contextmanager
def refuses(*words: str) -> Iterator[None]:
    """The block raises InvalidArgumentError with a message that holds each of `words` as a word.

    The first ones are the operator and the argument.
    """
    with pytest.raises(ssmcore.InvalidArgumentError) as caught:
        yield
    assert isinstance(caught.value, ssmcore.Error)
    assert isinstance(caught.value, ValueError)
    message = str(caught.value)
    for word in words:
        assert re.search(rf"(?<!\w){re.escape(word)}(?!\w)", message), f"no {word!r} in {message!r}"
