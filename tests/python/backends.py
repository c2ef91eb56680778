"""Where operators run, and how arrays get there and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import ssmcore


@dataclass(frozen=True)
class Backend:
    """One device, seen from NumPy."""

    name: str
    to_device: Callable[[np.ndarray], Any]
    to_numpy: Callable[[Any], np.ndarray]

    def call(self, operator: Callable[..., Any], **arguments: Any) -> Any:
        """`operator` on NumPy arguments, with its results as NumPy arrays.

        An argument that is changed in place must come from `to_device`.
        """
        results = operator(**{name: self._moved(value) for name, value in arguments.items()})
        if isinstance(results, tuple):
            return tuple(self.to_numpy(result) for result in results)
        return self.to_numpy(results)

    def _moved(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: self._moved(entry) for name, entry in value.items()}
        return self.to_device(value) if isinstance(value, np.ndarray) else value


def _to_cuda(array: np.ndarray) -> Any:
    """A torch tensor on the GPU with the strides of `array`, and the memory around its elements."""
    import torch

    # What torch.empty gives, and so every output, is then NaN until it is written.
    torch.use_deterministic_algorithms(True)
    base = array
    while isinstance(base.base, np.ndarray):
        base = base.base
    memory = base if base.flags.c_contiguous else base.T  # every array of the tests is one of them
    assert memory.flags.c_contiguous
    flat = torch.tensor(memory.reshape(-1).view(np.uint8), device="cuda")
    offset = (array.ctypes.data - memory.ctypes.data) // array.itemsize
    strides = [stride // array.itemsize for stride in array.strides]
    typed = flat.view(getattr(torch, array.dtype.name))
    return torch.as_strided(typed, array.shape, strides, offset)


def _from_cuda(tensor: Any) -> np.ndarray:
    import torch

    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return tensor.contiguous().view(torch.int16).cpu().numpy().view(ml_dtypes.bfloat16)
    return tensor.cpu().numpy()


BACKENDS = {
    "cpu": Backend("cpu", to_device=lambda array: array, to_numpy=lambda array: array),
    "cuda": Backend("cuda", to_device=_to_cuda, to_numpy=_from_cuda),
}


def why_no_cuda() -> str | None:
    """Why nothing can run on a GPU here; None if it can."""
    if ssmcore.cuda_device_count() == 0:
        return "no CUDA device, or ssmcore was built without CUDA"
    torch = pytest.importorskip("torch")
    return None if torch.cuda.is_available() else "torch has no CUDA device to put tensors on"
