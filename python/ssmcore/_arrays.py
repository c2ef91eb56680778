"""The array libraries ssmcore takes: how to recognise one, and how to make an output in it.

An operator's outputs are arrays of the library its first argument belongs to. A library is only
looked at once the caller has imported it, so importing ssmcore stays light.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np


def _numpy_dtype(name: str) -> np.dtype:
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


class _NumPy:
    """Outputs as NumPy arrays; bfloat16 is ml_dtypes'."""

    @staticmethod
    def empty(shape: Sequence[int], dtype: str) -> np.ndarray:
        return np.empty(shape, _numpy_dtype(dtype))

    @staticmethod
    def zeros(shape: Sequence[int], dtype: str) -> np.ndarray:
        return np.zeros(shape, _numpy_dtype(dtype))

    exp = staticmethod(np.exp)


class _Torch:
    """Outputs as torch tensors."""

    @staticmethod
    def empty(shape: Sequence[int], dtype: str) -> Any:
        torch = sys.modules["torch"]
        return torch.empty(tuple(shape), dtype=getattr(torch, dtype))

    @staticmethod
    def zeros(shape: Sequence[int], dtype: str) -> Any:
        torch = sys.modules["torch"]
        return torch.zeros(tuple(shape), dtype=getattr(torch, dtype))

    @staticmethod
    def exp(array: Any) -> Any:
        return sys.modules["torch"].exp(array)


def library_of(array: Any) -> type:
    """The library `array` belongs to: an object with `empty(shape, dtype)` and `zeros(...)`.

    `dtype` is a name: "float32", "bfloat16", "int64". Whatever is not a torch tensor counts as
    NumPy.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        return _Torch
    return _NumPy


def dtype_name(array: Any) -> str:
    """The dtype of a NumPy or torch array by name: "float32", "bfloat16", "int64"."""
    return str(array.dtype).removeprefix("torch.")
