"""The cross entropy and its backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
import reference_gradients
from backends import Backend
from cases import FLOAT64_LOSS_CASES, LOSS_CASES, LossCase
from gradients import (
    Arrays,
    assert_adds_and_overwrites,
    assert_derivatives,
    assert_same_for_any_threads,
    random_like,
)
from helpers import (
    DTYPES,
    assert_close,
    assert_only_poison_around,
    assert_same_bits,
    place,
    refuses,
)

from ssmcore import _core, ops

CASES = [*LOSS_CASES, *FLOAT64_LOSS_CASES]


def wide(case: LossCase) -> str:
    """Of losses."""
    return "float64" if case.dtype == "float64" else "float32"


def backward_arguments(case: LossCase, reduction: str) -> Arrays:
    inputs = case.inputs()
    _, lse = ops.cross_entropy(**inputs, return_lse=True)
    like = lse if reduction == "none" else np.empty((), lse.dtype)
    return {**inputs, "lse": lse, "dloss": random_like(like), "reduction": reduction}


def expected_gradient(arguments: Arrays) -> np.ndarray:
    targets, ignore_index = arguments["targets"], arguments["ignore_index"]
    dloss = arguments["dloss"]
    if arguments["reduction"] == "mean":
        dloss = np.broadcast_to(dloss / (targets != ignore_index).sum(), targets.shape)
    return reference_gradients.cross_entropy_bwd(
        dloss, arguments["logits"], targets, ignore_index=ignore_index
    )


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_reference(backend: Backend, case: LossCase) -> None:
    inputs = case.inputs()
    expected_loss, expected_lse = reference.cross_entropy(**inputs)
    loss, lse = backend.call(ops.cross_entropy, **inputs, reduction="none", return_lse=True)
    assert loss.dtype == lse.dtype == wide(case)
    assert_close(loss, expected_loss, wide(case))
    assert_close(lse, expected_lse, wide(case))
    counts = inputs["targets"] != case.ignore_index
    if np.any(counts):
        mean = backend.call(ops.cross_entropy, **inputs)
        assert_close(mean, np.array(expected_loss[counts].mean()), wide(case))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("case", [c for c in CASES if c.id != "rows=(1,)"])
def test_gradient_agrees_with_reference(backend: Backend, case: LossCase, reduction: str) -> None:
    arguments = backward_arguments(case, reduction)
    dlogits = backend.call(ops.cross_entropy_bwd, **arguments)
    assert dlogits.dtype == arguments["logits"].dtype
    assert_close(dlogits, expected_gradient(arguments), case.dtype)
    assert not np.any(dlogits[arguments["targets"] == case.ignore_index])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("own", [False, True])
def test_gradient_agrees_with_finite_differences(
    backend: Backend, reduction: str, own: bool
) -> None:
    arguments = backward_arguments(LossCase((3, 2), 5, "float64"), reduction)
    logits, targets, dloss = (arguments[name] for name in ("logits", "targets", "dloss"))
    forward: Callable[..., Any] = ops.cross_entropy

    def losses() -> np.ndarray:
        if own:
            return forward(logits, targets, reduction=reduction)
        of_rows, _ = reference.cross_entropy(logits, targets)
        return of_rows if reduction == "none" else of_rows[targets >= 0].mean()

    dlogits = backend.call(ops.cross_entropy_bwd, **arguments)
    assert_derivatives(
        lambda: float((dloss * losses()).sum()), {"logits": logits}, {"dlogits": dlogits}
    )


def test_rows_that_do_not_count_may_hold_anything(backend: Backend) -> None:
    inputs = LossCase().inputs()
    expected = backend.call(ops.cross_entropy, **inputs)
    arguments = backward_arguments(LossCase(), "mean")
    gradient = backend.call(ops.cross_entropy_bwd, **arguments)
    for array in (inputs["logits"], arguments["logits"], arguments["lse"]):
        array[inputs["targets"] == -100] = np.nan
    assert_same_bits(backend.call(ops.cross_entropy, **inputs), expected)
    assert_same_bits(backend.call(ops.cross_entropy_bwd, **arguments), gradient)


def test_no_row_counts(backend: Backend) -> None:
    inputs = {**LossCase().inputs(), "targets": np.full(7, -100)}
    assert np.isnan(backend.call(ops.cross_entropy, **inputs))
    assert not np.any(backend.call(ops.cross_entropy, **inputs, reduction="none"))


def test_logits_of_minus_infinity_have_no_share(backend: Backend) -> None:
    logits = np.array([[0, -np.inf, 1, -np.inf]], np.float32)
    targets = np.array([2])
    loss, lse = backend.call(ops.cross_entropy, logits=logits, targets=targets, return_lse=True)
    assert_close(loss, np.array(np.log(1 + np.exp(-1))), "float32")
    dlogits = backend.call(
        ops.cross_entropy_bwd,
        dloss=np.ones((), np.float32),
        logits=logits,
        targets=targets,
        lse=lse,
    )
    share = 1 / (1 + np.e)
    assert_close(dlogits, np.array([[share, 0, -share, 0]]), "float32")


def test_logits_whose_exponentials_overflow(backend: Backend) -> None:
    logits = np.array([[3e4, 3e4, -3e4]], np.float32)
    loss = backend.call(ops.cross_entropy, logits=logits, targets=np.array([0]))
    assert_close(loss, np.array(np.log(2)), "float32")


@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_in_place(dtype: str, reduction: str) -> None:
    arguments = backward_arguments(LossCase(dtype=dtype), reduction)
    expected = ops.cross_entropy_bwd(**arguments)
    logits = arguments["logits"]
    assert ops.cross_entropy_bwd(**arguments, dlogits=logits) is logits
    assert_same_bits(logits, expected)


def core_arguments(arguments: Arrays) -> Arrays:
    """As `_core` takes them, of losses of rows."""
    return {n: value for n, value in arguments.items() if n != "reduction"}


@pytest.mark.parametrize("layout", ["contiguous", "padded", "spread"])
@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
def test_adds_and_overwrites(dtype: str, layout: str) -> None:
    arguments = backward_arguments(LossCase(dtype=dtype), "none")
    gradients = {"dlogits": ops.cross_entropy_bwd(**arguments)}
    assert_adds_and_overwrites("cross_entropy_bwd", core_arguments(arguments), gradients, layout)


def test_parts_of_rows_are_the_whole(backend: Backend) -> None:
    """The mean over rows that are done in parts."""
    arguments = backward_arguments(LossCase(rows=(301,)), "mean")
    whole = backend.call(ops.cross_entropy_bwd, **arguments)
    count = np.float32((arguments["targets"] != -100).sum())
    arguments["reduction"] = "none"
    arguments["dloss"] = np.broadcast_to(arguments["dloss"] / count, 301)
    for begin in range(0, 301, 100):
        part = slice(begin, begin + 100)
        names = ("dloss", "logits", "targets", "lse")
        some = {**arguments, **{name: arguments[name][part] for name in names}}
        dlogits = backend.call(ops.cross_entropy_bwd, **some)
        assert_same_bits(dlogits, whole[part])


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_a_bit(backend: Backend, set_num_threads: Any, dtype: str) -> None:
    arguments = backward_arguments(LossCase(rows=(301,), dtype=dtype), "mean")
    inputs = {name: arguments[name] for name in ("logits", "targets", "ignore_index")}

    def call() -> dict[str, np.ndarray]:
        loss, lse = backend.call(ops.cross_entropy, **inputs, return_lse=True)
        dlogits = backend.call(ops.cross_entropy_bwd, **arguments)
        return {"loss": loss, "lse": lse, "dlogits": dlogits}

    assert_same_for_any_threads(set_num_threads, call)


@pytest.mark.parametrize("layout", ["padded", "spread"])
def test_inputs_and_what_lies_around_them_stay(backend: Backend, layout: str) -> None:
    arguments = backward_arguments(LossCase(layout=layout), "none")
    arguments["lse"] = place(arguments["lse"], layout)
    names = ("logits", "targets", "lse")
    before = {name: arguments[name].copy() for name in names}
    backend.call(ops.cross_entropy_bwd, **arguments)
    backend.call(ops.cross_entropy, logits=arguments["logits"], targets=arguments["targets"])
    for name in names:
        assert_same_bits(arguments[name], before[name])
    for name in ("logits", "lse"):
        assert_only_poison_around(arguments[name])


@pytest.mark.parametrize(
    ("name", "bad", "words"),
    [
        ("logits", np.zeros((7, 257), np.int32), ["int32"]),
        ("targets", np.zeros(6, np.int64), ["6", "7"]),
        ("targets", np.zeros(7, np.float32), ["float32"]),
        ("targets", np.full(7, 257), ["257", "256", "-100"]),
        ("targets", np.full(7, -1, np.int32), ["-1"]),
        ("reduction", "sum", ["sum"]),
    ],
)
def test_bad_argument(backend: Backend, name: str, bad: Any, words: list[str]) -> None:
    with refuses("cross_entropy", name, *words):
        backend.call(ops.cross_entropy, **{**LossCase().inputs(), name: bad})
    arguments = {**backward_arguments(LossCase(), "mean"), name: bad}
    with refuses("cross_entropy_bwd", name, *words):
        backend.call(ops.cross_entropy_bwd, **arguments)


@pytest.mark.parametrize(
    ("name", "bad", "words"),
    [
        ("lse", np.zeros(6, np.float32), ["6", "7"]),
        ("lse", np.zeros(7, np.float16), ["float16", "float32"]),
        ("dloss", np.zeros(6, np.float32), ["6", "7"]),
        ("dloss", np.zeros(7, np.float64), ["float64", "float32"]),
        ("lse", np.zeros((7, 1), np.float32), ["(7, 1)", "(7,)"]),
        ("dlogits", np.zeros((7, 256), np.float32), ["256", "257"]),
        ("dlogits", np.zeros((7, 257), np.int64), ["int64"]),
    ],
)
def test_bad_argument_of_the_gradient(name: str, bad: np.ndarray, words: list[str]) -> None:
    arguments = {**backward_arguments(LossCase(), "none"), name: bad}
    with refuses("cross_entropy_bwd", name, *words):
        ops.cross_entropy_bwd(**arguments)


def test_refuses_rows_that_it_could_only_write_in_a_copy() -> None:
    logits, targets = np.ones((2, 4, 5), np.float32), np.zeros((2, 4), np.int64)
    loss, lse = ops.cross_entropy(logits, targets, return_lse=True)
    with refuses("cross_entropy_bwd", "dlogits", "evenly spaced"):
        ops.cross_entropy_bwd(
            np.ones_like(loss),
            logits,
            targets,
            lse,
            dlogits=np.empty((2, 5, 5), np.float32)[:, :-1],
        )


def test_refuses_to_add_to_the_logits() -> None:
    arguments = core_arguments(backward_arguments(LossCase(), "none"))
    with refuses("cross_entropy_bwd", "dlogits", "logits"):
        _core.cross_entropy_bwd(
            on=None, **arguments, dlogits=arguments["logits"], accumulate=("dlogits",)
        )


def test_wants_one_gradient_of_the_loss() -> None:
    arguments = core_arguments(backward_arguments(LossCase(), "none"))
    dlogits = np.empty_like(arguments["logits"])
    with refuses("cross_entropy_bwd", "dmean_loss", "both"):
        _core.cross_entropy_bwd(
            on=None, **arguments, dmean_loss=np.ones(1, np.float32), dlogits=dlogits
        )
    del arguments["dloss"]
    with refuses("cross_entropy_bwd", "dloss", "missing"):
        _core.cross_entropy_bwd(on=None, **arguments, dlogits=dlogits)
