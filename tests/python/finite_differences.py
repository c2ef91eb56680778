"""Gradients of the fp64 references, by central differences."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# In fp64, of functions whose derivatives are about 1: errors of about 1e-10 each from what the
# differences leave out and from rounding.
_STEP = 1e-5


def numerical_gradient(loss: Callable[[], float], array: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The gradient of `loss()` by the elements at flat indices `at` of an fp64 array it reads."""
    assert array.dtype == np.float64 and array.flags.c_contiguous
    flat = array.reshape(-1)
    gradient = np.empty(at.size)
    for k, index in enumerate(at):
        value = flat[index]
        flat[index] = value + _STEP
        above = loss()
        flat[index] = value - _STEP
        below = loss()
        flat[index] = value
        gradient[k] = (above - below) / (2 * _STEP)
    return gradient
