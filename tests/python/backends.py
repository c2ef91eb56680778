"""Where operators run, and how arrays get there and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


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


BACKENDS = {
    "cpu": Backend("cpu", to_device=lambda array: array, to_numpy=lambda array: array),
}
