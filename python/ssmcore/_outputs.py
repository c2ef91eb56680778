"""Where outputs come from: the library that an operator's first argument belongs to."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from . import _core
from ._arrays import gpu_of, is_jax, module_of, numpy_dtype

# Libraries take over memory of this alignment as it is; NumPy's own is 16 or 64.
_ALIGNMENT = 64


class Library(Protocol):
    """What an operator asks of the library, and the device, that its outputs belong to."""

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        """Memory for an output, which ssmcore can write."""

    def hand_over(self, output: Any) -> Any:
        """The array for the caller, once what `empty` made is written. Nothing is copied."""

    def from_host(self, array: np.ndarray) -> Any:
        """A NumPy array as something that a call can read beside arrays of the library."""

    def to_host(self, array: Any) -> np.ndarray:
        """The values of an array of the library."""

    def decay(self, A_log: Any) -> Any:
        """-exp(A_log), of an array of the library, as something a call can read."""

    def on(self, *, check: bool = False, batch_invariant: bool = False) -> Any:
        """What `_core` takes as `on`: the device and stream of a call."""

    def prepare_products(self) -> None:
        """Before the first call that multiplies matrices: finds what that takes."""


class _OnCpu:
    """Of libraries whose arrays are in the memory of the host."""

    def from_host(self, array: np.ndarray) -> np.ndarray:
        return array

    def to_host(self, array: Any) -> np.ndarray:
        return np.asarray(array) if hasattr(array, "__array__") else np.from_dlpack(array)

    def on(self, *, check: bool = False, batch_invariant: bool = False) -> None:
        return None

    def prepare_products(self) -> None:
        pass


class _NumPy(_OnCpu):
    """Outputs as NumPy arrays; bfloat16 is ml_dtypes'."""

    def empty(self, shape: Sequence[int], dtype: str) -> np.ndarray:
        return np.empty(shape, numpy_dtype(dtype))

    def hand_over(self, output: np.ndarray) -> np.ndarray:
        return output

    def decay(self, A_log: Any) -> Any:
        return -np.exp(A_log)


class _Torch(_OnCpu):
    """Outputs as torch tensors."""

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        torch = sys.modules["torch"]
        return torch.empty(tuple(shape), dtype=getattr(torch, dtype))

    def hand_over(self, output: Any) -> Any:
        return output

    def decay(self, A_log: Any) -> Any:
        return -sys.modules["torch"].exp(A_log)


class _Own(_OnCpu):
    """Outputs as ssmcore arrays on the CPU."""

    def empty(self, shape: Sequence[int], dtype: str) -> _core.Array:
        return _core.empty(shape, dtype, "cpu")

    def hand_over(self, output: _core.Array) -> _core.Array:
        return output

    def decay(self, A_log: _core.Array) -> Any:
        return -np.exp(A_log.numpy())


class _Foreign(_OnCpu):
    """Outputs as NumPy memory that another library takes over: `take` makes its array of it."""

    def __init__(self, take: Callable[[np.ndarray], Any]) -> None:
        self._take = take

    def empty(self, shape: Sequence[int], dtype: str) -> np.ndarray:
        kind = numpy_dtype(dtype)
        size = math.prod(shape) * kind.itemsize
        memory = np.empty(size + _ALIGNMENT, np.uint8)
        begin = -memory.ctypes.data % _ALIGNMENT
        return memory[begin : begin + size].view(kind).reshape(shape)

    def hand_over(self, output: np.ndarray) -> Any:
        return self._take(output)

    def decay(self, A_log: Any) -> Any:
        return -np.exp(np.from_dlpack(A_log))


def _jax_take(output: np.ndarray) -> Any:
    jax = sys.modules["jax"]
    return jax.device_put(output, jax.devices("cpu")[0], may_alias=True)


def _dlpack_take(from_dlpack: Callable[[Any], Any]) -> Callable[[np.ndarray], Any]:
    def take(output: np.ndarray) -> Any:
        # NumPy exports none of the dtypes that ml_dtypes adds.
        return output if output.dtype.name == "bfloat16" else from_dlpack(output)

    return take


def library_of(array: Any) -> Library:
    """The library and the device `array` belongs to.

    `dtype` in its methods is a name: "float32", "bfloat16", "int64". What exports DLPack but
    belongs to no module with a `from_dlpack` counts as NumPy.
    """
    if isinstance(array, np.ndarray):
        return _NumPy()
    index = gpu_of(array)
    if index is not None:
        from ._gpu_outputs import gpu_library_of

        return gpu_library_of(array, index)
    if isinstance(array, _core.Array):
        return _Own()
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        return _Torch()
    if is_jax(array):
        return _Foreign(_jax_take)
    from_dlpack = getattr(module_of(array), "from_dlpack", None)
    if hasattr(array, "__dlpack__") and from_dlpack is not None:
        return _Foreign(_dlpack_take(from_dlpack))
    return _NumPy()
