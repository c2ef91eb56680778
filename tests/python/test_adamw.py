"""The optimiser's step, and the sum of squares by which gradients are clipped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
import torch
from backends import Backend
from helpers import DTYPES, assert_close, assert_same_bits, refuses

from ssmcore import ops

SHAPES = [(1,), (7,), (3, 5), (4, 1, 4), (33, 129), (5, 8192)]
SETTINGS: dict[str, Any] = {
    "step": 3,
    "lr": 2e-2,
    "betas": (0.9, 0.95),
    "eps": 1e-8,
    "weight_decay": 0.1,
}


def tensors(shape: tuple[int, ...], dtype: str = "float32") -> dict[str, Any]:
    """Those of a step that is not the first."""
    random = np.random.default_rng(0)
    weight = random.standard_normal(shape, np.float32)
    return {
        "parameter": weight.astype(DTYPES[dtype]),
        "gradient": random.standard_normal(shape, np.float32),
        "exp_avg": 0.3 * random.standard_normal(shape, np.float32),
        "exp_avg_sq": random.random(shape, np.float32),
        **({} if dtype == "float32" else {"master": weight}),
    }


def step(backend: Backend, arrays: dict[str, Any], **settings: Any) -> dict[str, np.ndarray]:
    """What `adamw` leaves of copies of the arrays."""
    moved = {name: backend.to_device(array.copy()) for name, array in arrays.items()}
    ops.adamw(**moved, **{**SETTINGS, **settings})
    return {name: backend.to_numpy(array) for name, array in moved.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("clipped", [False, True])
def test_agrees_with_reference(
    backend: Backend, shape: tuple[int, ...], dtype: str, clipped: bool
) -> None:
    arrays = tensors(shape, dtype)
    clip: dict[str, Any] = {}
    if clipped:
        arrays["sum_of_squares"] = np.array((arrays["gradient"].astype(np.float64) ** 2).sum())
        clip["max_norm"] = 0.5 * np.sqrt(arrays["sum_of_squares"])
    actual = step(backend, arrays, **clip)
    scale = 0.5 if clipped else 1.0
    weight = arrays.get("master", arrays["parameter"])
    expected = reference.adamw(
        weight, scale * arrays["gradient"], arrays["exp_avg"], arrays["exp_avg_sq"], **SETTINGS
    )
    updated = actual["parameter" if dtype == "float32" else "master"]
    for result, wanted in zip(
        (updated, actual["exp_avg"], actual["exp_avg_sq"]), expected, strict=True
    ):
        assert_close(result, wanted, "float32")
    if dtype != "float32":
        assert_same_bits(actual["parameter"], updated.astype(DTYPES[dtype]))
    assert_same_bits(actual["gradient"], arrays["gradient"])


def test_steps_are_those_of_torch(backend: Backend) -> None:
    weight = tensors((17, 9))["parameter"]
    theirs = torch.nn.Parameter(torch.from_numpy(weight.copy()))
    optimizer = torch.optim.AdamW(
        [theirs], lr=2e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False
    )
    ours = {
        name: backend.to_device(array)
        for name, array in (
            ("parameter", weight.copy()),
            ("exp_avg", np.zeros_like(weight)),
            ("exp_avg_sq", np.zeros_like(weight)),
        )
    }
    random = np.random.default_rng(1)
    for number in range(1, 21):
        gradient = (10.0 ** random.integers(-6, 3)) * random.standard_normal((17, 9), np.float32)
        theirs.grad = torch.from_numpy(gradient.astype(np.float32))
        torch.nn.utils.clip_grad_norm_([theirs], 1.0)
        optimizer.step()
        gradient = backend.to_device(gradient.astype(np.float32))
        ops.adamw(
            **ours,
            gradient=gradient,
            sum_of_squares=ops.sum_of_squares(gradient),
            max_norm=1.0,
            **{**SETTINGS, "step": number},
        )
    assert_close(backend.to_numpy(ours["parameter"]), theirs.detach().numpy(), "float32")


def test_gradients_below_the_norm_are_not_scaled(backend: Backend) -> None:
    arrays = tensors((5, 5))
    expected = step(backend, arrays)
    arrays["sum_of_squares"] = np.array(4.0)
    actual = step(backend, arrays, max_norm=2.1)
    assert_same_bits(actual["parameter"], expected["parameter"])


@pytest.mark.parametrize("total", [np.nan, np.inf])
def test_nothing_is_updated_where_the_norm_is_not_finite(backend: Backend, total: float) -> None:
    arrays = {**tensors((40, 3), "bfloat16"), "sum_of_squares": np.array(total)}
    for name, array in step(backend, arrays, max_norm=1.0).items():
        assert_same_bits(array, arrays[name])


@pytest.mark.parametrize("numel", [1, 15, 16, 1000, 1 << 14, (1 << 14) + 1, 100_003])
def test_sum_of_squares(backend: Backend, numel: int) -> None:
    x = np.random.default_rng(0).standard_normal(numel, np.float32)
    total = backend.call(ops.sum_of_squares, x=x)
    assert total.shape == () and total.dtype == np.float64
    assert float(total) == pytest.approx((x.astype(np.float64) ** 2).sum(), rel=1e-13)


def test_sums_of_large_numbers_are_finite(backend: Backend) -> None:
    x = np.full((3, 100), 3e38, np.float32)
    assert float(backend.call(ops.sum_of_squares, x=x)) == pytest.approx(300 * 9e76, rel=1e-6)
    x[2, 50] = np.inf
    assert not np.isfinite(backend.call(ops.sum_of_squares, x=x))


def test_threads_do_not_change_a_bit(set_num_threads: Callable[[int], None]) -> None:
    arrays = tensors((700, 333))

    def run() -> list[np.ndarray]:
        copies = {name: array.copy() for name, array in arrays.items()}
        total = ops.sum_of_squares(copies["gradient"])
        ops.adamw(**copies, sum_of_squares=total, max_norm=1.0, **SETTINGS)
        return [total, *copies.values()]

    set_num_threads(1)
    once = run()
    for threads in (2, 3):
        set_num_threads(threads)
        for again, first in zip(run(), once, strict=True):
            assert_same_bits(again, first)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"gradient": np.zeros((3, 4), np.float32)}, ("gradient", "4", "5")),
        ({"gradient": np.zeros((3, 5))}, ("gradient", "float64", "float32")),
        ({"exp_avg": np.zeros((3, 10), np.float32)[:, ::2]}, ("exp_avg", "contiguous")),
        ({"parameter": np.zeros((3, 5), DTYPES["bfloat16"])}, ("master", "missing")),
        ({"master": np.zeros((3, 5), np.float32)}, ("master", "float32")),
        ({"gradient": [1.0]}, ("gradient", "list")),
        ({"max_norm": 1.0}, ("max_norm", "sum_of_squares")),
        ({"sum_of_squares": np.zeros((), np.float32)}, ("sum_of_squares", "float64")),
        ({"step": 0}, ("step", "0")),
        ({"lr": -1.0}, ("lr",)),
        ({"lr": float("nan")}, ("lr", "nan")),
        ({"betas": (1.0, 0.9)}, ("beta1",)),
        ({"betas": (0.9, -0.1)}, ("beta2",)),
        ({"weight_decay": -1.0}, ("weight_decay",)),
    ],
)
def test_refuses(changes: dict[str, Any], words: tuple[str, ...]) -> None:
    with refuses("adamw", *words):
        ops.adamw(**{**tensors((3, 5)), **SETTINGS, **changes})


def test_refuses_memory_that_overlaps() -> None:
    arrays = tensors((3, 5))
    with refuses("adamw", "exp_avg", "gradient"):
        ops.adamw(**{**arrays, "exp_avg": arrays["gradient"]}, **SETTINGS)


def test_refuses_read_only_memory() -> None:
    arrays = tensors((3, 5))
    arrays["parameter"].flags.writeable = False
    with refuses("adamw", "parameter", "read-only"):
        ops.adamw(**arrays, **SETTINGS)
