"""Outputs on a GPU, in the library of an operator's first argument, and the stream of the call."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from . import _core
from ._arrays import is_jax, module_of, numpy_dtype
from ._cublaslt import find_cublaslt
from ._outputs import Library

# DLPack's number, and CUDA's handle, for the default stream.
DEFAULT_STREAM = 1


class GpuLibrary(Library, Protocol):
    """A library whose arrays are in the memory of a GPU."""

    def stream(self) -> int:
        """The handle of its current stream there."""


class _OnGpu:
    """Of libraries whose arrays are in the memory of a GPU.

    A call runs on the library's current stream. Memory of arrays of `array_type` that are dropped
    is used again after that stream only; a call with other arrays ends when the stream has.
    """

    array_type: Any = None

    def __init__(self, index: int) -> None:
        self.index = index

    def stream(self) -> int:
        return _core.own_stream(self.index)

    def on(self, *, check: bool = False, batch_invariant: bool = False) -> Any:
        return (self.index, self.stream(), self.array_type, check, batch_invariant)

    def prepare_products(self) -> None:
        find_cublaslt()


class _Torch(_OnGpu):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        self._torch = sys.modules["torch"]
        self.array_type = self._torch.Tensor

    def stream(self) -> int:
        handle: int = self._torch.cuda.current_stream(self.index).cuda_stream
        return handle or DEFAULT_STREAM

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        return self._torch.empty(
            tuple(shape), dtype=getattr(self._torch, dtype), device=f"cuda:{self.index}"
        )

    def hand_over(self, output: Any) -> Any:
        return output

    def from_host(self, array: np.ndarray) -> Any:
        return self._torch.tensor(array, device=f"cuda:{self.index}")

    def to_host(self, array: Any) -> np.ndarray:
        values: np.ndarray = array.cpu().numpy()
        return values

    def decay(self, A_log: Any) -> Any:
        return -self._torch.exp(A_log)


class _CuPy(_OnGpu):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        self._cupy = sys.modules["cupy"]
        self.array_type = self._cupy.ndarray

    def stream(self) -> int:
        with self._cupy.cuda.Device(self.index):
            handle: int = self._cupy.cuda.get_current_stream().ptr
        return handle or DEFAULT_STREAM

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        with self._cupy.cuda.Device(self.index):
            return self._cupy.empty(tuple(shape), numpy_dtype(dtype))

    def hand_over(self, output: Any) -> Any:
        return output

    def from_host(self, array: np.ndarray) -> Any:
        with self._cupy.cuda.Device(self.index):
            return self._cupy.asarray(array)

    def to_host(self, array: Any) -> np.ndarray:
        values: np.ndarray = self._cupy.asnumpy(array)
        return values

    def decay(self, A_log: Any) -> Any:
        return -self._cupy.exp(A_log)


class _Own(_OnGpu):
    """Outputs as ssmcore arrays."""

    array_type: Any = _core.Array

    def empty(self, shape: Sequence[int], dtype: str) -> _core.Array:
        return _core.empty(shape, dtype, f"cuda:{self.index}")

    def hand_over(self, output: _core.Array) -> _core.Array:
        return output

    def from_host(self, array: np.ndarray) -> _core.Array:
        moved = self.empty(array.shape, array.dtype.name)
        moved.copy_from(array)
        return moved

    def to_host(self, array: _core.Array) -> np.ndarray:
        return array.numpy()

    def decay(self, A_log: _core.Array) -> _core.Array:
        return self.from_host(-np.exp(A_log.numpy()))


class _Foreign(_Own):
    """Outputs as ssmcore arrays that another library takes over, by its `from_dlpack`."""

    array_type = None

    def __init__(self, index: int, module: Any, from_dlpack: Callable[[Any], Any]) -> None:
        super().__init__(index)
        self._module = module
        self._take = from_dlpack

    def hand_over(self, output: _core.Array) -> Any:
        return self._take(output)

    def to_host(self, array: Any) -> np.ndarray:
        return np.asarray(array)

    def decay(self, A_log: Any) -> Any:
        return -self._module.exp(A_log)


def gpu_library_of(array: Any, index: int) -> GpuLibrary:
    """The library of an array on GPU `index`; what has no `from_dlpack` gets ssmcore arrays."""
    if isinstance(array, _core.Array):
        return _Own(index)
    for name, attribute, library in (("torch", "Tensor", _Torch), ("cupy", "ndarray", _CuPy)):
        module = sys.modules.get(name)
        if module is not None and isinstance(array, getattr(module, attribute)):
            return library(index)
    module = sys.modules["jax"].numpy if is_jax(array) else module_of(array)
    from_dlpack = getattr(module, "from_dlpack", None)
    return _Own(index) if from_dlpack is None else _Foreign(index, module, from_dlpack)
