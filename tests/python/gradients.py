"""What the tests of backwards share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from backends import BACKENDS, Backend
from finite_differences import numerical_gradient
from helpers import (
    assert_close,
    assert_only_poison_around,
    assert_same_bits,
    place,
    relative_error,
)

import ssmcore
from ssmcore import _core
from ssmcore._outputs import library_of

Arrays = dict[str, Any]


def random_like(array: np.ndarray, *, seed: int = 1, layout: str = "contiguous") -> np.ndarray:
    """Random numbers of the shape and dtype of `array`."""
    values = np.random.default_rng(seed).standard_normal(array.shape)
    return place(values.astype(array.dtype), layout)


def backward(
    backend: Backend, operator: Callable[..., Any], **arguments: Any
) -> dict[str, np.ndarray]:
    """The gradients that `operator` returns, by name."""
    fields: list[str] = []

    def call(**moved: Any) -> tuple[Any, ...]:
        gradients = operator(**moved)
        fields.extend(gradients._fields)
        return tuple(gradients)

    results = backend.call(call, **arguments)
    return {n: g for n, g in zip(fields, results, strict=True) if g is not None}


def call_core(backend: Backend, operator: str, **arguments: Any) -> None:
    """Calls `_core`'s `operator` on arrays of `backend`'s device, some of which it writes."""
    array = next(a for a in arguments.values() if hasattr(a, "shape"))
    library = library_of(array)
    library.prepare_products()
    getattr(_core, operator)(on=library.on(), **arguments)
    ssmcore.synchronize(array)


def assert_gradients(actual: Arrays, expected: Arrays, inputs: Arrays) -> None:
    """Each like its input, and within the tolerance of that one's dtype."""
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        of = inputs[name.removeprefix("d")]
        assert actual[name].dtype == of.dtype
        assert_close(actual[name], gradient, of.dtype.name)


def assert_derivatives(
    loss: Callable[[], float], arrays: dict[str, np.ndarray], gradients: Arrays
) -> None:
    """`gradients` are those of `loss()` by the fp64 arrays that it reads."""
    assert gradients.keys() == {f"d{name}" for name in arrays}
    for name, array in arrays.items():
        at = np.arange(array.size)
        if array.size > 60:
            at = np.random.default_rng(0).choice(array.size, 60, replace=False)
        expected = numerical_gradient(loss, array, at)
        assert relative_error(gradients[f"d{name}"].reshape(-1)[at], expected) < 1e-7, name


def assert_adds_and_overwrites(
    operator: str,
    arguments: Arrays,
    gradients: dict[str, np.ndarray],
    layout: str,
    backend: Backend = BACKENDS["cpu"],
) -> None:
    """Called with memory that is there already, `operator` overwrites NaN, or adds, each gradient
    on its own.

    To the bit on the CPU; on a GPU another layout may have another kernel.
    """
    moved = backend.moved(arguments)
    for name, expected in gradients.items():
        poisoned = backend.to_device(place(np.full(expected.shape, np.nan, expected.dtype), layout))
        call_core(backend, operator, **moved, **{name: poisoned})
        overwritten = backend.to_numpy(poisoned)
        if backend.name == "cpu":
            assert_same_bits(np.ascontiguousarray(overwritten), np.ascontiguousarray(expected))
        else:
            assert_close(overwritten, expected, expected.dtype.name, rounded=True)
        before = random_like(expected, seed=2, layout=layout)
        sum_of = before.astype(np.float64) + expected.astype(np.float64)
        there = backend.to_device(before)
        call_core(backend, operator, **moved, **{name: there}, accumulate=(name,))
        added = backend.to_numpy(there)
        rounded = expected.dtype.itemsize == 2
        assert_close(added, sum_of, _dtype_of_sum(expected), rounded=rounded)
        if layout.endswith(("padded", "spread")):
            assert_only_poison_around(overwritten)
            assert_only_poison_around(added)


def assert_same_bits_again(call: Callable[[], dict[str, np.ndarray]]) -> None:
    """The same call gives the same bits."""
    once = call()
    for _ in range(3):
        again = call()
        assert again.keys() == once.keys()
        for name, result in once.items():
            assert_same_bits(again[name], result)


def _dtype_of_sum(gradient: np.ndarray) -> str:
    """Of a sum that was rounded twice."""
    return {"float64": "float64", "float32": "float32"}.get(gradient.dtype.name, "bfloat16")


def assert_same_for_any_threads(
    set_num_threads: Callable[[int], None], call: Callable[[], dict[str, np.ndarray]]
) -> None:
    set_num_threads(1)
    once = call()
    for threads in (1, 2, 3, 5):
        set_num_threads(threads)
        again = call()
        assert again.keys() == once.keys()
        for name, gradient in once.items():
            assert_same_bits(again[name], gradient)
