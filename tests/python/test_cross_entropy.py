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
    assert_same_bits_again,
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
    refuses_value,
)

import ssmcore
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
    backend.require_dtype(case.dtype)
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
    backend.require_dtype(case.dtype)
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
    backend.require_dtype("float64")
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


@pytest.mark.parametrize("largest", [-3e4, 3e4])
def test_all_but_one_logit_of_minus_infinity(backend: Backend, largest: float) -> None:
    logits = np.full((2, 5000), -np.inf, np.float32)
    logits[[0, 1], [4999, 3]] = largest
    targets = np.array([4999, 3])
    loss, lse = backend.call(
        ops.cross_entropy, logits=logits, targets=targets, reduction="none", return_lse=True
    )
    assert_same_bits(loss, np.zeros(2, np.float32))
    assert_same_bits(lse, np.full(2, largest, np.float32))


def test_logits_whose_exponentials_overflow(backend: Backend) -> None:
    logits = np.array([[3e4, 3e4, -3e4]], np.float32)
    loss = backend.call(ops.cross_entropy, logits=logits, targets=np.array([0]))
    assert_close(loss, np.array(np.log(2)), "float32")


@pytest.mark.parametrize("vocab_size", [257, 4096])
@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_in_place(backend: Backend, dtype: str, reduction: str, vocab_size: int) -> None:
    backend.require_dtype(dtype)
    arguments = backward_arguments(LossCase(dtype=dtype, vocab_size=vocab_size), reduction)
    expected = backend.call(ops.cross_entropy_bwd, **arguments)
    moved = backend.moved(arguments)
    logits = moved["logits"]
    assert ops.cross_entropy_bwd(**moved, dlogits=logits) is logits
    ssmcore.synchronize(logits)
    assert_same_bits(backend.to_numpy(logits), expected)


def core_arguments(arguments: Arrays) -> Arrays:
    """As `_core` takes them, of losses of rows."""
    return {n: value for n, value in arguments.items() if n != "reduction"}


@pytest.mark.parametrize("layout", ["contiguous", "padded", "spread"])
@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
@pytest.mark.parametrize("vocab_size", [257, 4096])
def test_adds_and_overwrites(backend: Backend, dtype: str, layout: str, vocab_size: int) -> None:
    backend.require_dtype(dtype)
    arguments = backward_arguments(LossCase(dtype=dtype, vocab_size=vocab_size), "none")
    gradients = {"dlogits": backend.call(ops.cross_entropy_bwd, **arguments)}
    arguments = core_arguments(arguments)
    assert_adds_and_overwrites("cross_entropy_bwd", arguments, gradients, layout, backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab_size"), [(5, 50280), (5000, 256), (2500, 5)])
def test_many_rows_and_large_vocabularies(
    backend: Backend, rows: int, vocab_size: int, dtype: str
) -> None:
    arguments = backward_arguments(LossCase((rows,), vocab_size, dtype), "mean")
    inputs = {name: arguments[name] for name in ("logits", "targets", "ignore_index")}
    expected_loss, expected_lse = reference.cross_entropy(**inputs)
    counts = arguments["targets"] != -100

    def call() -> dict[str, np.ndarray]:
        loss, lse = backend.call(ops.cross_entropy, **inputs, return_lse=True)
        dlogits = backend.call(ops.cross_entropy_bwd, **arguments)
        return {"loss": loss, "lse": lse, "dlogits": dlogits}

    results = call()
    assert_close(results["loss"], np.array(expected_loss[counts].mean()), "float32")
    assert_close(results["lse"], expected_lse, "float32")
    assert_close(results["dlogits"], expected_gradient(arguments), dtype)
    assert_same_bits_again(call)


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
def test_threads_do_not_change_a_bit(set_num_threads: Any, dtype: str) -> None:
    arguments = backward_arguments(LossCase(rows=(301,), dtype=dtype), "mean")
    inputs = {name: arguments[name] for name in ("logits", "targets", "ignore_index")}

    def call() -> dict[str, np.ndarray]:
        loss, lse = ops.cross_entropy(**inputs, return_lse=True)
        dlogits = ops.cross_entropy_bwd(**arguments)
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
    ("target", "dtype"), [(257, np.int64), (-1, np.int32), (2**40, np.int64), (-99, np.int64)]
)
def test_target_out_of_range(backend: Backend, target: int, dtype: type[np.integer]) -> None:
    targets = np.array([0, 1, -100, target, 256, 2, 3], dtype)
    with refuses_value(backend, "cross_entropy", "targets", str(target), "256", "-100"):
        backend.call(ops.cross_entropy, **{**LossCase().inputs(), "targets": targets})
    arguments = {**backward_arguments(LossCase(), "mean"), "targets": targets}
    with refuses_value(backend, "cross_entropy_bwd", "targets", str(target), "256", "-100"):
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
