"""The array libraries ssmcore takes: how to recognise one, and how to make an output in it.

An operator's outputs are arrays of the library its first argument belongs to. A library is only
looked at once the caller has imported it, so importing ssmcore stays light.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from .errors import InvalidArgumentError


class Library(Protocol):
    """What an operator asks of the library that its outputs belong to."""

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        """Memory for an output, which ssmcore can write."""

    def hand_over(self, output: Any) -> Any:
        """The array for the caller, once what `empty` made is written. Nothing is copied."""

    def exp(self, array: Any) -> Any:
        """The exponential of an array of the library, as something ssmcore can read."""


# Libraries take over memory of this alignment as it is; NumPy's own is 16 or 64.
_ALIGNMENT = 64


def _numpy_dtype(name: str) -> np.dtype:
    if name == "bfloat16":
        import ml_dtypes

        bfloat16: np.dtype = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    return np.dtype(name)


class _NumPy:
    """Outputs as NumPy arrays; bfloat16 is ml_dtypes'."""

    def empty(self, shape: Sequence[int], dtype: str) -> np.ndarray:
        return np.empty(shape, _numpy_dtype(dtype))

    def hand_over(self, output: np.ndarray) -> np.ndarray:
        return output

    def exp(self, array: Any) -> Any:
        return np.exp(array)


class _Torch:
    """Outputs as torch tensors."""

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        torch = sys.modules["torch"]
        return torch.empty(tuple(shape), dtype=getattr(torch, dtype))

    def hand_over(self, output: Any) -> Any:
        return output

    def exp(self, array: Any) -> Any:
        return sys.modules["torch"].exp(array)


class _Foreign:
    """Outputs as NumPy memory that another library takes over: `take` makes its array of it."""

    def __init__(self, take: Callable[[np.ndarray], Any]) -> None:
        self._take = take

    def empty(self, shape: Sequence[int], dtype: str) -> np.ndarray:
        kind = _numpy_dtype(dtype)
        size = math.prod(shape) * kind.itemsize
        memory = np.empty(size + _ALIGNMENT, np.uint8)
        begin = -memory.ctypes.data % _ALIGNMENT
        return memory[begin : begin + size].view(kind).reshape(shape)

    def hand_over(self, output: np.ndarray) -> Any:
        return self._take(output)

    def exp(self, array: Any) -> Any:
        return np.exp(np.from_dlpack(array))


def _jax_take(output: np.ndarray) -> Any:
    jax = sys.modules["jax"]
    return jax.device_put(output, jax.devices("cpu")[0], may_alias=True)


def _dlpack_take(from_dlpack: Callable[[Any], Any]) -> Callable[[np.ndarray], Any]:
    def take(output: np.ndarray) -> Any:
        # NumPy exports none of the dtypes that ml_dtypes adds.
        return output if output.dtype.name == "bfloat16" else from_dlpack(output)

    return take


def _module_of(array: Any) -> Any:
    """The module with the functions for arrays like this one."""
    if hasattr(array, "__array_namespace__"):
        return array.__array_namespace__()
    return sys.modules.get(type(array).__module__.partition(".")[0])


def _is_jax(array: Any) -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(array, jax.Array)


def library_of(array: Any) -> Library:
    """The library `array` belongs to.

    `dtype` in its methods is a name: "float32", "bfloat16", "int64". What exports DLPack but
    belongs to no module with a `from_dlpack` counts as NumPy.
    """
    if isinstance(array, np.ndarray):
        return _NumPy()
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        return _Torch()
    if _is_jax(array):
        return _Foreign(_jax_take)
    from_dlpack = getattr(_module_of(array), "from_dlpack", None)
    if hasattr(array, "__dlpack__") and from_dlpack is not None:
        return _Foreign(_dlpack_take(from_dlpack))
    return _NumPy()


def dtype_name(array: Any) -> str:
    """The dtype of an array by name, whatever its library: "float32", "bfloat16", "int64"."""
    return getattr(array.dtype, "name", None) or str(array.dtype).rpartition(".")[2]


def reshaped(array: Any, *shape: int) -> Any:
    """`array` in another shape, by its method or, as the array API standard has it, a function."""
    if hasattr(array, "reshape"):
        return array.reshape(shape)
    return _module_of(array).reshape(array, shape)


def require_mutable(array: Any, what: str, instead: str) -> None:
    """Raises InvalidArgumentError if `array`, named `what`, can never change; `instead` says what
    to call. (Other arrays that are read-only say so themselves when they are borrowed.)
    """
    if _is_jax(array):
        raise InvalidArgumentError(
            f"{what} is a JAX array, which cannot be changed in place: {instead}"
        )
