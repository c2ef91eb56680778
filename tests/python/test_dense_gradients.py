"""The backwards of norms, matrix products and embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
import reference_gradients
from backends import Backend
from cases import (
    FLOAT64_NORM_CASES,
    GATED_NORM_CASES,
    LINEAR_CASES,
    NORM_CASES,
    LinearCase,
    NormCase,
)
from gradients import (
    Arrays,
    assert_adds_and_overwrites,
    assert_derivatives,
    assert_gradients,
    assert_same_for_any_threads,
    backward,
    random_like,
)
from helpers import (
    DTYPES,
    LAYOUTS,
    assert_close,
    assert_only_poison_around,
    assert_same_bits,
    place,
    refuses,
)

from ssmcore import _core, ops


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


def arrays_of(inputs: Arrays) -> dict[str, np.ndarray]:
    return {name: value for name, value in inputs.items() if isinstance(value, np.ndarray)}


# --- Norms ----------------------------------------------------------------------------------------


def norm_arguments(case: NormCase) -> Arrays:
    """Of the backward: random gradients with respect to out and, with a residual, r."""
    inputs = case.inputs()
    inputs["eps"] = float(np.float32(inputs["eps"]))
    residual = inputs["residual"]
    dr = None if residual is None else random_like(residual, seed=2)
    return {**inputs, "dout": random_like(inputs["x"]), "dresidual_out": dr}


@pytest.mark.parametrize("case", [*NORM_CASES, *GATED_NORM_CASES, *FLOAT64_NORM_CASES])
def test_norm_agrees_with_reference(backend: Backend, case: NormCase) -> None:
    arguments = norm_arguments(case)
    expected = reference_gradients.rms_norm_bwd(**arguments)
    actual = backward(backend, ops.rms_norm_bwd, **arguments)
    assert_gradients(actual, expected, arguments)


@pytest.mark.parametrize("rows", [16, 17, 2000])
def test_norm_sums_over_many_rows(backend: Backend, rows: int) -> None:
    arguments = norm_arguments(NormCase(shape=(rows, 33)))
    expected = reference_gradients.rms_norm_bwd(**arguments)
    actual = backward(backend, ops.rms_norm_bwd, **arguments)
    assert_gradients(actual, expected, arguments)


@pytest.mark.parametrize("case", FLOAT64_NORM_CASES)
@pytest.mark.parametrize("forward", [reference.rms_norm, ops.rms_norm])
def test_norm_agrees_with_finite_differences(
    backend: Backend, forward: Callable[..., Any], case: NormCase
) -> None:
    arguments = norm_arguments(case)
    inputs = {n: v for n, v in arguments.items() if n not in ("dout", "dresidual_out")}

    def loss() -> float:
        result = forward(**inputs)
        if not isinstance(result, tuple):
            return float((arguments["dout"] * result).sum())
        out, r = result
        of_r = 0 if inputs["residual"] is None else (arguments["dresidual_out"] * r).sum()
        return float((arguments["dout"] * out).sum() + of_r)

    gradients = backward(backend, ops.rms_norm_bwd, **arguments)
    assert_derivatives(loss, arrays_of(inputs), gradients)


@pytest.mark.parametrize("case", FLOAT64_NORM_CASES)
def test_norm_in_float64(backend: Backend, case: NormCase) -> None:
    inputs = {n: v for n, v in norm_arguments(case).items() if not n.startswith("d")}
    expected_out, expected_r = reference.rms_norm(**inputs)
    result = backend.call(ops.rms_norm, **inputs)
    out, r = result if isinstance(result, tuple) else (result, expected_r)
    assert_close(out, expected_out, "float64")
    assert_close(r, expected_r, "float64")


def test_r_stands_for_x_and_residual(backend: Backend) -> None:
    arguments = norm_arguments(NormCase())
    expected = backward(backend, ops.rms_norm_bwd, **arguments)
    arguments["x"] = arguments["x"] + arguments["residual"]
    arguments["residual"] = None
    gradients = backward(backend, ops.rms_norm_bwd, **arguments)
    for name in ("dx", "dweight"):
        assert_same_bits(gradients[name], expected[name])


def core_arguments(arguments: Arrays) -> Arrays:
    return {**arguments, "group_size": arguments["group_size"] or 0}


def test_gradient_of_r_in_two_dtypes_and_in_place() -> None:
    """As a model's layers hand it on: in float32, where it came from, and for the block below."""
    arguments = norm_arguments(NormCase(dtype="bfloat16"))
    expected = ops.rms_norm_bwd(**arguments)
    core = core_arguments(arguments)
    core["residual"] = None
    core["x"] = reference.fp64(arguments["x"]) + reference.fp64(arguments["residual"])
    core["x"] = core["x"].astype(np.float32)
    dr, dx = core["dresidual_out"], core["dout"]
    _core.rms_norm_bwd(on=None, **core, dresidual=dr, dx=dx)
    assert_same_bits(dr, expected.dresidual)
    assert_same_bits(dx, expected.dx)


@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
@pytest.mark.parametrize("layout", ["contiguous", "padded", "spread"])
def test_norm_adds_and_overwrites(dtype: str, layout: str) -> None:
    case = NormCase(dtype=dtype, weight_dtype=dtype, residual_dtype=dtype, z_dtype=dtype)
    arguments = norm_arguments(case)
    gradients = ops.rms_norm_bwd(**arguments)._asdict()
    assert_adds_and_overwrites("rms_norm_bwd", core_arguments(arguments), gradients, layout)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_threads_do_not_change_a_bit(
    backend: Backend, set_num_threads: Any, dtype: str
) -> None:
    arguments = norm_arguments(NormCase(shape=(1501, 257), dtype=dtype, z_dtype=dtype))
    assert_same_for_any_threads(
        set_num_threads, lambda: backward(backend, ops.rms_norm_bwd, **arguments)
    )


def test_norm_rows_are_independent(backend: Backend) -> None:
    arguments = norm_arguments(NormCase(shape=(7, 129)))
    clean = backward(backend, ops.rms_norm_bwd, **arguments)
    arguments["x"][3, 100] = np.nan
    gradients = backward(backend, ops.rms_norm_bwd, **arguments)
    others = np.arange(7) != 3
    assert np.isnan(gradients["dx"][3]).all() and np.isnan(gradients["dweight"]).all()
    assert_same_bits(gradients["dx"][others], clean["dx"][others])


@pytest.mark.parametrize("layout", ["padded", "spread"])
def test_norm_inputs_and_what_lies_around_them_stay(backend: Backend, layout: str) -> None:
    arguments = norm_arguments(NormCase(layout=layout, z_dtype="float32"))
    inputs = {n: v for n, v in arrays_of(arguments).items() if not n.startswith("d")}
    before = {name: value.copy() for name, value in inputs.items()}
    backward(backend, ops.rms_norm_bwd, **arguments)
    for name, array in inputs.items():
        assert_same_bits(array, before[name])
        assert_only_poison_around(array)


@pytest.mark.parametrize("name", ["x", "weight", "residual", "z", "dout", "dresidual_out"])
def test_norm_zero_strides(backend: Backend, name: str) -> None:
    arguments = norm_arguments(NormCase(z_dtype="float32"))
    shape = arguments[name].shape
    for axis in range(len(shape)):
        repeated = np.broadcast_to(arguments[name].take([0], axis=axis), shape)
        changed = {**arguments, name: repeated}
        expected = reference_gradients.rms_norm_bwd(**changed)
        assert_gradients(backward(backend, ops.rms_norm_bwd, **changed), expected, changed)


@pytest.mark.parametrize(
    ("name", "bad", "words"),
    [
        ("dout", zeros(5, 95), ["95", "96"]),
        ("dout", zeros(5, 96, dtype=np.float64), ["float64"]),
        ("dresidual_out", zeros(4, 96), ["4", "5"]),
        ("x", zeros(5, 96, dtype=np.int32), ["int32"]),
        ("weight", zeros(95), ["95", "96"]),
        ("z", zeros(5, 95), ["95", "96"]),
        ("group_size", 7, ["7", "96"]),
        ("group_size", 0, ["0"]),
        ("eps", -1.0, ["-1"]),
        ("needs", ["dx"], ["dx"]),
    ],
)
def test_norm_bad_argument(backend: Backend, name: str, bad: Any, words: list[str]) -> None:
    arguments = {**norm_arguments(NormCase(z_dtype="float32")), name: bad}
    with refuses("rms_norm_bwd", name, *words):
        backward(backend, ops.rms_norm_bwd, **arguments)


@pytest.mark.parametrize(
    ("name", "bad", "words"),
    [
        ("dx", zeros(5, 95), ["95", "96"]),
        ("dx", zeros(5, 96, dtype=np.float64), ["float64"]),
        ("dresidual", np.broadcast_to(zeros(96), (5, 96)), []),
        ("dz", zeros(5, 96), ["z"]),
        ("dweight", zeros(95), ["95", "96"]),
    ],
)
def test_norm_bad_gradient(name: str, bad: np.ndarray, words: list[str]) -> None:
    arguments = core_arguments(norm_arguments(NormCase()))
    with refuses("rms_norm_bwd", name, *words):
        _core.rms_norm_bwd(on=None, **arguments, **{name: bad})


@pytest.mark.parametrize(
    ("name", "other"), [("dx", "x"), ("dx", "residual"), ("dresidual", "dout"), ("dz", "dout")]
)
def test_norm_gradient_that_overlaps_an_input(name: str, other: str) -> None:
    arguments = core_arguments(norm_arguments(NormCase(z_dtype="float32")))
    with refuses("rms_norm_bwd", name, other):
        _core.rms_norm_bwd(on=None, **arguments, **{name: arguments[other]})


# --- Matrix products ------------------------------------------------------------------------------


def linear_arguments(case: LinearCase) -> Arrays:
    inputs = case.inputs()
    shape = (*case.rows, case.out_features)
    return {**inputs, "dout": random_like(np.empty(shape, inputs["x"].dtype))}


FLOAT64_LINEAR = LinearCase(dtype="float64", weight_dtype="float64", bias_dtype="float64")


@pytest.mark.parametrize("case", [*LINEAR_CASES, FLOAT64_LINEAR])
def test_linear_agrees_with_reference(backend: Backend, case: LinearCase) -> None:
    arguments = linear_arguments(case)
    expected = reference_gradients.linear_bwd(**arguments)
    assert_gradients(backward(backend, ops.linear_bwd, **arguments), expected, arguments)


@pytest.mark.parametrize("rows", [1, 130, 500])
@pytest.mark.parametrize(("in_features", "out_features"), [(16, 200), (33, 900), (770, 48)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_tiles(
    backend: Backend, rows: int, in_features: int, out_features: int, dtype: str
) -> None:
    arguments = linear_arguments(
        LinearCase((rows,), in_features, out_features, dtype, dtype, bias_dtype=dtype)
    )
    expected = reference_gradients.linear_bwd(**arguments)
    assert_gradients(backward(backend, ops.linear_bwd, **arguments), expected, arguments)


@pytest.mark.parametrize("forward", [reference.linear, ops.linear])
def test_linear_agrees_with_finite_differences(
    backend: Backend, forward: Callable[..., Any]
) -> None:
    arguments = linear_arguments(FLOAT64_LINEAR)
    inputs = {n: v for n, v in arguments.items() if n != "dout"}

    def loss() -> float:
        return float((arguments["dout"] * forward(**inputs)).sum())

    gradients = backward(backend, ops.linear_bwd, **arguments)
    assert_derivatives(loss, arrays_of(inputs), gradients)


def core_linear(arguments: Arrays) -> Arrays:
    return {name: arguments[name] for name in ("dout", "x", "weight")}


@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
@pytest.mark.parametrize("layout", ["contiguous", "padded", "spread"])
def test_linear_adds_and_overwrites(dtype: str, layout: str) -> None:
    arguments = linear_arguments(
        LinearCase((67,), dtype=dtype, weight_dtype=dtype, bias_dtype=dtype)
    )
    gradients = ops.linear_bwd(**arguments)._asdict()
    assert_adds_and_overwrites("linear_bwd", core_linear(arguments), gradients, layout)


def test_linear_takes_only_what_it_needs() -> None:
    arguments = linear_arguments(LinearCase())
    expected = ops.linear_bwd(**arguments)
    dout, x, weight = arguments["dout"], arguments["x"], arguments["weight"]
    dx, dweight, dbias = (np.full_like(gradient, np.nan) for gradient in expected)
    _core.linear_bwd(on=None, dout=dout, weight=weight, dx=dx)
    _core.linear_bwd(on=None, dout=dout, x=x, dweight=dweight)
    _core.linear_bwd(on=None, dout=dout, dbias=dbias)
    for actual, gradient in zip((dx, dweight, dbias), expected, strict=True):
        assert_same_bits(actual, gradient)
    with refuses("linear_bwd", "weight", "missing"):
        _core.linear_bwd(on=None, dout=dout, x=x, dx=dx)
    with refuses("linear_bwd", "x", "missing"):
        _core.linear_bwd(on=None, dout=dout, weight=weight, dweight=dweight)


@pytest.mark.parametrize("shape", [(200, 300, 501), (2000, 16, 48), (3, 1000, 20)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_threads_do_not_change_a_bit(
    backend: Backend, set_num_threads: Any, shape: tuple[int, int, int], dtype: str
) -> None:
    """Nor how the result is then divided into tiles."""
    rows, *features = shape
    arguments = linear_arguments(LinearCase((rows,), *features, dtype))
    assert_same_for_any_threads(
        set_num_threads, lambda: backward(backend, ops.linear_bwd, **arguments)
    )


def test_linear_rows_do_not_depend_on_the_batch(backend: Backend) -> None:
    arguments = linear_arguments(LinearCase((300,)))
    whole = backward(backend, ops.linear_bwd, **arguments, needs=["x"])["dx"]
    for rows in (1, 5, 100):
        part = slice(7, 7 + rows)
        some = {**arguments, "x": arguments["x"][part], "dout": arguments["dout"][part]}
        dx = backward(backend, ops.linear_bwd, **some, needs=["x"])["dx"]
        assert_same_bits(dx, whole[part])


@pytest.mark.parametrize("name", ["x", "weight", "dout"])
def test_linear_zero_strides(backend: Backend, name: str) -> None:
    arguments = linear_arguments(LinearCase())
    shape = arguments[name].shape
    for axis in range(len(shape)):
        repeated = np.broadcast_to(arguments[name].take([0], axis=axis), shape)
        changed = {**arguments, name: repeated}
        expected = reference_gradients.linear_bwd(**changed)
        assert_gradients(backward(backend, ops.linear_bwd, **changed), expected, changed)


@pytest.mark.parametrize("layout", ["padded", "spread"])
def test_linear_inputs_and_what_lies_around_them_stay(backend: Backend, layout: str) -> None:
    arguments = linear_arguments(LinearCase(layout=layout))
    arguments["dout"] = place(arguments["dout"], layout)
    before = {name: value.copy() for name, value in arguments.items()}
    backward(backend, ops.linear_bwd, **arguments)
    for name, array in arguments.items():
        assert_same_bits(array, before[name])
        assert_only_poison_around(array)


@pytest.mark.parametrize(
    ("name", "bad", "words"),
    [
        ("dout", zeros(5, 69), ["69", "70"]),
        ("dout", zeros(4, 70), ["4", "5"]),
        ("dout", zeros(5, 70, dtype=np.int32), ["int32"]),
        ("x", zeros(5, 95), ["95", "96"]),
        ("weight", zeros(70, 96, dtype=np.float64), ["float64"]),
        ("needs", ["z"], ["z"]),
    ],
)
def test_linear_bad_argument(backend: Backend, name: str, bad: Any, words: list[str]) -> None:
    arguments = {**linear_arguments(LinearCase()), name: bad}
    with refuses("linear_bwd", name, *words):
        backward(backend, ops.linear_bwd, **arguments)


@pytest.mark.parametrize(
    ("name", "bad", "words"),
    [
        ("dx", zeros(5, 95), ["95", "96"]),
        ("dweight", zeros(70, 96, dtype=np.float64), ["float64"]),
        ("dweight", np.broadcast_to(zeros(96), (70, 96)), []),
        ("dbias", zeros(69), ["69", "70"]),
    ],
)
def test_linear_bad_gradient(name: str, bad: np.ndarray, words: list[str]) -> None:
    with refuses("linear_bwd", name, *words):
        _core.linear_bwd(on=None, **core_linear(linear_arguments(LinearCase())), **{name: bad})


def test_linear_gradient_that_overlaps_an_input() -> None:
    arguments = core_linear(linear_arguments(LinearCase()))
    with refuses("linear_bwd", "dweight", "weight"):
        _core.linear_bwd(on=None, **arguments, dweight=arguments["weight"])


# --- Embeddings -----------------------------------------------------------------------------------


def embedding_arguments(
    *, shape: tuple[int, ...] = (3, 40), dtype: str = "float32", id_dtype: str = "int64"
) -> Arrays:
    token_ids = np.random.default_rng(0).integers(0, 11, shape).astype(id_dtype)
    like = np.empty((*shape, 19), DTYPES.get(dtype, dtype))
    return {"token_ids": token_ids, "dout": random_like(like), "vocab_size": 13}


@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
@pytest.mark.parametrize("id_dtype", ["int32", "int64"])
@pytest.mark.parametrize("shape", [(1,), (3, 40), (500,)])
def test_embedding_agrees_with_reference(
    backend: Backend, shape: tuple[int, ...], dtype: str, id_dtype: str
) -> None:
    arguments = embedding_arguments(shape=shape, dtype=dtype, id_dtype=id_dtype)
    dweight = backend.call(ops.embedding_bwd, **arguments)
    assert_close(dweight, reference_gradients.embedding_bwd(**arguments), dtype)
    assert not np.any(dweight[11:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_gradient_in_another_dtype(backend: Backend, dtype: str) -> None:
    arguments = embedding_arguments(dtype="bfloat16")
    dweight = backend.call(ops.embedding_bwd, **arguments, dtype=dtype)
    assert dweight.dtype == DTYPES[dtype]
    assert_close(dweight, reference_gradients.embedding_bwd(**arguments), dtype)


def test_embedding_in_float64(backend: Backend) -> None:
    weight = np.random.default_rng(0).standard_normal((11, 19))
    token_ids = np.array([[3, 0], [10, 3]])
    out = backend.call(ops.embedding, token_ids=token_ids, weight=weight)
    assert_same_bits(out, weight[token_ids])


@pytest.mark.parametrize("layout", ["contiguous", *LAYOUTS])
@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
def test_embedding_adds_and_overwrites(dtype: str, layout: str) -> None:
    arguments = embedding_arguments(shape=(120,), dtype=dtype)
    expected = {"dweight": ops.embedding_bwd(**arguments)}
    arguments["dout"] = place(arguments["dout"], layout)
    del arguments["vocab_size"]
    assert_adds_and_overwrites("embedding_bwd", arguments, expected, layout)


def test_embedding_threads_do_not_change_a_bit(backend: Backend, set_num_threads: Any) -> None:
    arguments = embedding_arguments(shape=(30000,))
    assert_same_for_any_threads(
        set_num_threads,
        lambda: {"dweight": backend.call(ops.embedding_bwd, **arguments)},
    )


@pytest.mark.parametrize(
    ("name", "bad", "words"),
    [
        ("token_ids", np.full((3, 40), 13), ["13", "12"]),
        ("token_ids", np.full((3, 40), -1, np.int32), ["-1"]),
        ("token_ids", zeros(3, 40), ["float32"]),
        ("token_ids", np.zeros((3, 39), np.int64), ["39"]),
        ("dout", zeros(3, 40, 19, dtype=np.int32), ["int32"]),
        ("vocab_size", 0, ["0"]),
    ],
)
def test_embedding_bad_argument(backend: Backend, name: str, bad: Any, words: list[str]) -> None:
    arguments = {**embedding_arguments(), name: bad}
    with refuses("embedding_bwd", name, *words):
        backend.call(ops.embedding_bwd, **arguments)
