"""Where operators run, and how arrays get there and back."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from helpers import DTYPES

import ssmcore


@dataclass(frozen=True)
class Backend:
    """One device, seen from NumPy."""

    name: str
    to_device: Callable[[np.ndarray], Any]
    to_numpy: Callable[[Any], np.ndarray]

    @property
    def sees_values(self) -> bool:
        """Whether values, of indices say, are looked at before anything runs."""
        return self.name == "cpu"

    def require_dtype(self, dtype: str) -> None:
        """Skips a test of a dtype that operators do not have here."""
        if dtype == "float64" and self.name != "cpu":
            pytest.skip("float64 is for checking on the CPU")

    def call(self, operator: Callable[..., Any], **arguments: Any) -> Any:
        """`operator` on NumPy arguments, with its results as NumPy arrays.

        An argument that is changed in place must come from `to_device`.
        """
        results = operator(**self.moved(arguments))
        # What a kernel has found wrong is raised here, as elsewhere what the host has.
        several = isinstance(results, tuple)
        ssmcore.synchronize(next(r for r in results if r is not None) if several else results)
        if several:
            return tuple(None if r is None else self.to_numpy(r) for r in results)
        return self.to_numpy(results)

    def moved(self, value: Any) -> Any:
        """`value` with its arrays on the device: an argument, or several by name."""
        if isinstance(value, dict):
            return {name: self.moved(entry) for name, entry in value.items()}
        return self.to_device(value) if isinstance(value, np.ndarray) else value


def _to_cuda(array: np.ndarray) -> Any:
    """A torch tensor on the GPU with the strides of `array`, and the memory around its elements."""
    import torch

    # What torch.empty gives, and so every output, is then NaN until it is written.
    torch.use_deterministic_algorithms(True)
    if min(array.strides, default=0) < 0:
        pytest.skip("torch has no negative strides")
    around = array
    while isinstance(around.base, np.ndarray):
        around = around.base
    begin, end = np.lib.array_utils.byte_bounds(around)
    memory = np.frombuffer((ctypes.c_uint8 * (end - begin)).from_address(begin), np.uint8)
    flat = torch.tensor(memory, device="cuda").view(getattr(torch, array.dtype.name))
    offset = (array.ctypes.data - begin) // array.itemsize
    strides = [stride // array.itemsize for stride in array.strides]
    return torch.as_strided(flat, array.shape, strides, offset)


def _from_cuda(tensor: Any) -> np.ndarray:
    """A view with the strides of `tensor`, into a copy of all the memory that the tensor is in."""
    import torch

    storage = torch.empty(0, dtype=torch.uint8, device="cuda").set_(tensor.untyped_storage())
    name = str(tensor.dtype).rpartition(".")[2]
    dtype = DTYPES.get(name, np.dtype(name))
    memory = storage.cpu().numpy().view(dtype).copy()  # what the view's base is then
    strides = [stride * dtype.itemsize for stride in tensor.stride()]
    offset = tensor.storage_offset() * dtype.itemsize
    return np.ndarray(tuple(tensor.shape), dtype, memory, offset, strides)


BACKENDS = {
    "cpu": Backend("cpu", to_device=lambda array: array, to_numpy=lambda array: array),
    "cuda": Backend("cuda", to_device=_to_cuda, to_numpy=_from_cuda),
}


def require_cuda() -> None:
    """Skips a test where nothing can run on a GPU, and says why."""
    if ssmcore.cuda_device_count() == 0:
        pytest.skip("no CUDA device, or ssmcore was built without CUDA")
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch has no CUDA device to put tensors on")
