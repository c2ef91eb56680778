"""What ssmcore asks of arrays, whatever their library.

A library is only looked at once the caller has imported it, so importing ssmcore stays light.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from .errors import InvalidArgumentError

# DLPack's numbers for the memory of a GPU: CUDA, and CUDA's managed memory.
_GPU_CODES = (2, 13)


def numpy_dtype(name: str) -> np.dtype:
    """NumPy's dtype of this name; bfloat16 is ml_dtypes'."""
    if name == "bfloat16":
        import ml_dtypes

        bfloat16: np.dtype = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    return np.dtype(name)


def module_of(array: Any) -> Any:
    """The module with the functions for arrays like this one."""
    if hasattr(array, "__array_namespace__"):
        return array.__array_namespace__()
    return sys.modules.get(type(array).__module__.partition(".")[0])


def is_jax(array: Any) -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(array, jax.Array)


def gpu_of(array: Any) -> int | None:
    """The index of the GPU whose memory an array is in; None for the memory of the host."""
    if not hasattr(array, "__dlpack_device__"):
        return None
    try:
        code, index = array.__dlpack_device__()
    except Exception:  # a device without memory, as torch's "meta": refused where it is borrowed
        return None
    return int(index) if code in _GPU_CODES else None


def is_token_major(array: Any) -> bool:
    """Whether a (B, D, L) array that has strides and can be transposed lies (B, L, D) in memory."""
    if not hasattr(array, "swapaxes"):
        return False
    strides = array.stride() if hasattr(array, "stride") else getattr(array, "strides", None)
    return strides is not None and array.shape[2] > 1 and 0 < strides[1] < strides[2]


def dtype_name(array: Any) -> str:
    """The dtype of an array by name, whatever its library: "float32", "bfloat16", "int64"."""
    return getattr(array.dtype, "name", None) or str(array.dtype).rpartition(".")[2]


def reshaped(array: Any, *shape: int) -> Any:
    """`array` in another shape, by its method or, as the array API standard has it, a function."""
    if hasattr(array, "reshape"):
        return array.reshape(shape)
    return module_of(array).reshape(array, shape)


def require_mutable(array: Any, what: str, instead: str) -> None:
    """Raises InvalidArgumentError if `array`, named `what`, can never change; `instead` says what
    to call. (Other arrays that are read-only say so themselves when they are borrowed.)
    """
    if is_jax(array):
        raise InvalidArgumentError(
            f"{what} is a JAX array, which cannot be changed in place: {instead}"
        )
