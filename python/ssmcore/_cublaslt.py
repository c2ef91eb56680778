"""Where cuBLASLt is, which large products on a GPU run on."""

from __future__ import annotations

import functools
import importlib

from . import _core


@functools.cache
def find_cublaslt() -> None:
    """Tells `_core` where NVIDIA's Python package has cuBLASLt, if it is installed."""
    try:
        pathfinder = importlib.import_module("cuda.pathfinder")
        _core.set_cublaslt_path(pathfinder.load_nvidia_dynamic_lib("cublasLt").abs_path)
    except (ImportError, RuntimeError):
        pass  # a copy that is loaded already, or that the system has, will do
