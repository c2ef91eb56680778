"""Arrays of no framework, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import _core
from ._arrays import dtype_name, gpu_of
from ._core import Array
from .errors import InvalidArgumentError

__all__ = ["Array", "array", "cuda_device_count", "empty", "synchronize"]

cuda_device_count = _core.cuda_device_count


def empty(shape: int | Sequence[int], dtype: Any = "float32", device: str = "cpu") -> Array:
    """An array whose memory is not initialised.

    Args:
        shape: 1 to 6 sizes.
        dtype: float32, float64, bfloat16, float16, int32, int64 or complex64, as a name or a dtype.
        device: "cpu", "cuda" (the first GPU) or "cuda:" and a number.

    Raises:
        InvalidArgumentError: a shape, dtype or device that is none of these.
        BackendError: no such device, or no memory left on it.
    """
    sizes = [shape] if isinstance(shape, int) else [int(size) for size in shape]
    return _core.empty(sizes, dtype if isinstance(dtype, str) else np.dtype(dtype).name, device)


def array(source: Any, device: str = "cpu") -> Array:
    """A copy of an array of any library, or of nested lists, on a device.

    What NumPy makes of lists counts: float64 for numbers with a point, int64 for whole ones.
    """
    if not hasattr(source, "__dlpack__"):
        source = np.asarray(source)
    if len(source.shape) == 0:
        raise InvalidArgumentError("array: source has no dimensions, expected 1 to 6")
    copied = empty(tuple(source.shape), dtype_name(source), device)
    copied.copy_from(source)
    return copied


def synchronize(array: Any) -> None:
    """Waits for the calls on the GPU of `array`, those of its library's current stream.

    Raises InvalidArgumentError if one of them has met an index that is out of range, and
    BackendError if the device failed. An array on the CPU has nothing to wait for.
    """
    index = gpu_of(array)
    if index is not None:
        from ._gpu_outputs import gpu_library_of

        _core.synchronize(index, gpu_library_of(array, index).stream())
