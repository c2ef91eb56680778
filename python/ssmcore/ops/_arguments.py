"""What the operators ask of their arguments."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from .._arrays import dtype_name, is_token_major, reshaped
from .._outputs import Library, library_of
from ..errors import InvalidArgumentError

Array = Any


def require_array(array: Any, what: str) -> None:
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        raise InvalidArgumentError(f"{what} is a {type(array).__name__}, expected an array")


def require_rank(array: Any, what: str, rank: int, dims: str) -> None:
    require_array(array, what)
    if len(array.shape) != rank:
        raise InvalidArgumentError(f"{what} has shape {tuple(array.shape)}, expected {dims}")


def require_size(value: Any, what: str) -> None:
    if not isinstance(value, (int, np.integer)) or value < 1:
        raise InvalidArgumentError(f"{what} is {value!r}, expected a whole number of at least 1")


def empty_like(library: Library, array: Array) -> Array:
    """Memory for an output like a (B, D, L) array: token-major where that is, which is faster."""
    if len(array.shape) == 3 and is_token_major(array):
        batch, dim, seqlen = array.shape
        return library.empty((batch, seqlen, dim), dtype_name(array)).swapaxes(1, 2)
    return library.empty(array.shape, dtype_name(array))


def gradients_of(
    library: Library,
    operator: str,
    inputs: Mapping[str, Array | None],
    needs: Collection[str] | None,
    *,
    contiguous: bool = False,
) -> dict[str, Array | None]:
    """Memory for the gradients of an operator's inputs, "d" + name; None for what is not needed.

    It lies as the inputs do, or is contiguous.
    """
    unknown = set(needs or ()) - set(inputs)
    if unknown:
        raise InvalidArgumentError(
            f"{operator}: needs holds {min(unknown)!r}, expected some of {', '.join(inputs)}"
        )
    gradients: dict[str, Array | None] = {}
    for name, array in inputs.items():
        gradients[f"d{name}"] = None
        if array is None or (needs is not None and name not in needs):
            continue
        require_array(array, f"{operator}: {name}")
        if contiguous:
            gradients[f"d{name}"] = library.empty(array.shape, dtype_name(array))
        else:
            gradients[f"d{name}"] = empty_like(library, array)
    return gradients


def count_chunks(seqlen: int, cu_seqlens: Array | None, chunk_size: int) -> int:
    """How many states a scan leaves for a row, or for all packed sequences together."""
    if cu_seqlens is None:
        return -(-seqlen // chunk_size)
    # Entries that are no boundaries are refused where the operator runs.
    lengths = np.clip(np.diff(library_of(cu_seqlens).to_host(cu_seqlens)), 0, seqlen)
    return int((-(-lengths // chunk_size)).sum())


def handed_over(library: Library, gradients: Mapping[str, Array | None]) -> dict[str, Array | None]:
    """What `gradients_of` made, once it is written, for the caller."""
    return {
        name: None if gradient is None else library.hand_over(gradient)
        for name, gradient in gradients.items()
    }


def rows(array: Array) -> Array:
    """(..., n) as (rows, n)."""
    return array if len(array.shape) == 2 else reshaped(array, -1, array.shape[-1])
