"""What the tests of backwards share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from backends import Backend
from finite_differences import numerical_gradient
from helpers import assert_close, assert_same_bits, place, relative_error

from ssmcore import _core

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
    operator: str, arguments: Arrays, gradients: dict[str, np.ndarray], layout: str
) -> None:
    """Called on the CPU with memory that is there already, `operator` overwrites NaN, or adds, each
    gradient on its own."""
    for name, expected in gradients.items():
        poisoned = place(np.full(expected.shape, np.nan, expected.dtype), layout)
        getattr(_core, operator)(on=None, **arguments, **{name: poisoned})
        assert_same_bits(np.ascontiguousarray(poisoned), np.ascontiguousarray(expected))
        there = random_like(expected, seed=2, layout=layout)
        sum_of = there.astype(np.float64) + expected.astype(np.float64)
        getattr(_core, operator)(on=None, **arguments, **{name: there}, accumulate=(name,))
        assert_close(there, sum_of, _dtype_of_sum(expected))


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
