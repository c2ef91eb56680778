"""Calls of the native operators in programs of XLA."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from .. import _core
from ..errors import BackendError
from ..ops._arguments import require_array

Array: TypeAlias = jax.Array
# Arrays by the names of the C++ fields; None where one is absent.
Arrays: TypeAlias = dict[str, Any]


def _register() -> None:
    """Tells JAX of the native handlers; raises BackendError where it would refuse them."""
    if not _core.XLA_TARGETS:
        raise BackendError(
            "ssmcore.jax: this ssmcore was built without jaxlib, whose headers its XLA calls take: "
            "build it again where jaxlib is installed"
        )
    header = Path(jax.ffi.include_dir(), "xla/ffi/api/c_api.h").read_text()
    defined = dict(re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", header))
    installed = (int(defined["MAJOR"]), int(defined["MINOR"]))
    if installed < _core.XLA_FFI_VERSION:
        ours, theirs = ("{}.{}".format(*v) for v in (_core.XLA_FFI_VERSION, installed))
        raise BackendError(
            f"ssmcore.jax: this ssmcore was built for XLA's calls of version {ours}, and jaxlib "
            f"here has {theirs}: build it again beside this jaxlib"
        )
    for op, handlers in _core.XLA_TARGETS.items():
        for platform, handler in handlers.items():
            jax.ffi.register_ffi_target(f"ssmcore_{op}", handler, platform=platform)


_register()


def call(
    op: str, operands: Mapping[str, Any], results: Mapping[str, Any], **options: Any
) -> Arrays:
    """The results of a native operator, by name.

    Shapes, dtypes and options are checked at once, as far as the CPU takes them.

    Args:
        operands: what it reads.
        results: what it writes, by shape and dtype; None: not wanted.
        options: its other arguments; None: the default.
    """
    read = {name: array for name, array in operands.items() if array is not None}
    written = {name: result for name, result in results.items() if result is not None}
    _check(op, {**read, **written}, options)
    attributes = {
        **{
            name: np.int64(place) for arrays in (read, written) for place, name in enumerate(arrays)
        },
        **{name: _attribute(value) for name, value in options.items() if value is not None},
    }
    program_call = jax.ffi.ffi_call(f"ssmcore_{op}", tuple(written.values()))
    return dict(zip(written, program_call(*read.values(), **attributes), strict=True))


def _check(op: str, arrays: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    shapes = {name: like(array) for name, array in arrays.items()}
    cu_seqlens = shapes.get("cu_seqlens")
    if cu_seqlens is not None and len(cu_seqlens.shape) == 1 and cu_seqlens.dtype == np.int32:
        # What is in it is only known when the program runs, and checked then.
        x = shapes["u" if "u" in shapes else "x"]
        seqlen = x.shape[1 if op.startswith("mamba_block") else 2]
        shapes["cu_seqlens"] = most_chunks(cu_seqlens.shape[0], seqlen)
    getattr(_core, op)(only_check=True, **shapes, **options)


def _attribute(value: Any) -> Any:
    """As the native side reads it."""
    if isinstance(value, (bool, str)):
        return value
    return np.int64(value) if isinstance(value, int) else np.float32(value)


def most_chunks(size: int, seqlen: int) -> np.ndarray:
    """The `cu_seqlens` of this size whose sequences have the most chunks, of whatever length."""
    boundaries = np.arange(size, dtype=np.int32)
    boundaries[min(max(size - 1, 1), seqlen) :] = seqlen
    return boundaries


def as_arrays(op: str, **given: Any) -> Arrays:
    """JAX arrays for what is given; raises InvalidArgumentError for what is no array."""
    for name, array in given.items():
        if array is not None:
            require_array(array, f"{op}: {name}")
    return {name: None if array is None else jnp.asarray(array) for name, array in given.items()}


def parameter_dtype(x: Array) -> Any:
    """The type of A, D, biases of delta and states beside activations like `x`."""
    return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


def cast(array: Array | None, dtype: Any) -> Array | None:
    """`array` in `dtype`; complex and integer ones as they are."""
    if array is None or not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    return array.astype(dtype)


def cast_weight(array: Array | None, x: Array) -> Array | None:
    """A weight that may have the type of `x` or float32, as one of these."""
    return array if array is None or array.dtype == x.dtype else cast(array, parameter_dtype(x))


def shaped(shape: tuple[int, ...], dtype: Any) -> Any:
    """What stands for an array of this shape and dtype."""
    return jax.ShapeDtypeStruct(shape, dtype)  # type: ignore[no-untyped-call]


def like(array: Array | None) -> Any:
    return None if array is None else shaped(array.shape, array.dtype)


def gradients_like(inputs: Mapping[str, Any]) -> Arrays:
    """The results that are gradients of these inputs, "d" + name."""
    return {f"d{name}": like(array) for name, array in inputs.items()}


def cotangents(gradients: Mapping[str, Any], arrays: Mapping[str, Any]) -> Arrays:
    """What JAX takes for the gradients of `arrays`, None for what has none.

    The native gradient of x + iy is dx + i dy, JAX's dx - i dy.
    """
    return {name: conjugate(gradients.get(f"d{name}")) for name in arrays}


def conjugate(array: Array | None) -> Array | None:
    return jnp.conj(array) if array is not None and jnp.iscomplexobj(array) else array
