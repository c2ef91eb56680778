"""The backwards of norms, matrix products and embeddings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import reference
import reference_gradients
from backends import BACKENDS, Backend, require_cuda
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
    assert_same_bits_again,
    assert_same_for_any_threads,
    backward,
    call_core,
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
    refuses_value,
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
    backend.require_dtype(case.dtype)
    arguments = norm_arguments(case)
    expected = reference_gradients.rms_norm_bwd(**arguments)
    actual = backward(backend, ops.rms_norm_bwd, **arguments)
    assert_gradients(actual, expected, arguments)


@pytest.mark.parametrize("dim", [33, 256, 2560])
@pytest.mark.parametrize("rows", [16, 17, 2000])
def test_norm_sums_over_many_rows(backend: Backend, rows: int, dim: int) -> None:
    arguments = norm_arguments(NormCase(shape=(rows, dim), residual_dtype=None))
    arguments["dresidual_out"] = random_like(arguments["x"], seed=2)
    expected = reference_gradients.rms_norm_bwd(**arguments)
    actual = backward(backend, ops.rms_norm_bwd, **arguments)
    assert_gradients(actual, expected, arguments)


@pytest.mark.parametrize(("dim", "group_size"), [(8200, None), (16384, 8192), (1024, 64), (72, 24)])
@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_wide_rows_and_groups(
    backend: Backend, dim: int, group_size: int | None, norm_before_gate: bool, dtype: str
) -> None:
    """In mixed dtypes, with more rows than a GPU takes at a time of some."""
    case = NormCase((300, dim), dtype, "bfloat16", "float32", "float16", group_size)
    arguments = norm_arguments(replace(case, norm_before_gate=norm_before_gate))
    expected = reference_gradients.rms_norm_bwd(**arguments)
    actual = backward(backend, ops.rms_norm_bwd, **arguments)
    assert_gradients(actual, expected, arguments)


@pytest.mark.parametrize("case", FLOAT64_NORM_CASES)
@pytest.mark.parametrize("forward", [reference.rms_norm, ops.rms_norm])
def test_norm_agrees_with_finite_differences(
    backend: Backend, forward: Callable[..., Any], case: NormCase
) -> None:
    backend.require_dtype("float64")
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
    backend.require_dtype("float64")
    inputs = {n: v for n, v in norm_arguments(case).items() if not n.startswith("d")}
    expected_out, expected_r = reference.rms_norm(**inputs)
    result = backend.call(ops.rms_norm, **inputs)
    out, r = result if isinstance(result, tuple) else (result, expected_r)
    assert_close(out, expected_out, "float64")
    assert_close(r, expected_r, "float64")


def assert_same_norm(backend: Backend, actual: np.ndarray, expected: np.ndarray) -> None:
    """To the bit on the CPU; a GPU without a residual has another kernel."""
    if backend.name == "cpu":
        assert_same_bits(actual, expected)
    else:
        assert_close(actual, expected, expected.dtype.name, rounded=True)


def test_r_stands_for_x_and_residual(backend: Backend) -> None:
    arguments = norm_arguments(NormCase())
    expected = backward(backend, ops.rms_norm_bwd, **arguments)
    arguments["x"] = arguments["x"] + arguments["residual"]
    arguments["residual"] = None
    gradients = backward(backend, ops.rms_norm_bwd, **arguments)
    for name in ("dx", "dweight"):
        assert_same_norm(backend, gradients[name], expected[name])


def core_arguments(arguments: Arrays) -> Arrays:
    return {**arguments, "group_size": arguments["group_size"] or 0}


def test_gradient_of_r_in_two_dtypes_and_in_place(backend: Backend) -> None:
    """As a model's layers hand it on: in float32, where it came from, and for the block below."""
    arguments = norm_arguments(NormCase(dtype="bfloat16"))
    expected = backward(backend, ops.rms_norm_bwd, **arguments)
    core = core_arguments(arguments)
    core["residual"] = None
    core["x"] = reference.fp64(arguments["x"]) + reference.fp64(arguments["residual"])
    core["x"] = core["x"].astype(np.float32)
    core = backend.moved(core)
    dr, dx = core["dresidual_out"], core["dout"]
    call_core(backend, "rms_norm_bwd", **core, dresidual=dr, dx=dx)
    assert_same_norm(backend, backend.to_numpy(dr), expected["dresidual"])
    assert_same_norm(backend, backend.to_numpy(dx), expected["dx"])


@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
@pytest.mark.parametrize("layout", ["contiguous", "padded", "spread"])
def test_norm_adds_and_overwrites(backend: Backend, dtype: str, layout: str) -> None:
    backend.require_dtype(dtype)
    case = NormCase(dtype=dtype, weight_dtype=dtype, residual_dtype=dtype, z_dtype=dtype)
    arguments = norm_arguments(case)
    gradients = backward(backend, ops.rms_norm_bwd, **arguments)
    arguments = core_arguments(arguments)
    assert_adds_and_overwrites("rms_norm_bwd", arguments, gradients, layout, backend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_threads_do_not_change_a_bit(set_num_threads: Any, dtype: str) -> None:
    arguments = norm_arguments(NormCase(shape=(1501, 257), dtype=dtype, z_dtype=dtype))
    assert_same_for_any_threads(
        set_num_threads, lambda: backward(BACKENDS["cpu"], ops.rms_norm_bwd, **arguments)
    )


@pytest.mark.parametrize("dim", [257, 256, 2560])
def test_norm_same_call_same_bits(backend: Backend, dim: int) -> None:
    arguments = norm_arguments(NormCase(shape=(1501, dim), dtype="bfloat16"))
    assert_same_bits_again(lambda: backward(backend, ops.rms_norm_bwd, **arguments))


@pytest.mark.parametrize("dim", [129, 2560])
def test_norm_rows_do_not_depend_on_the_batch(backend: Backend, dim: int) -> None:
    arguments = norm_arguments(NormCase(shape=(700, dim), z_dtype="float32"))
    whole = backward(backend, ops.rms_norm_bwd, **arguments)
    for rows in (1, 5, 300):
        of_rows = ("x", "residual", "z", "dout", "dresidual_out")
        some = {n: v[7 : 7 + rows] if n in of_rows else v for n, v in arguments.items()}
        gradients = backward(backend, ops.rms_norm_bwd, **some)
        for name in ("dx", "dresidual", "dz"):
            assert_same_bits(gradients[name], whole[name][7 : 7 + rows])


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


@pytest.mark.cuda
def test_float64_is_refused_on_a_gpu() -> None:
    require_cuda()
    arguments = norm_arguments(NormCase(dtype="float64"))
    with refuses("rms_norm_bwd", "x", "float64"):
        backward(BACKENDS["cuda"], ops.rms_norm_bwd, **arguments)


# --- Matrix products ------------------------------------------------------------------------------


def linear_arguments(case: LinearCase) -> Arrays:
    inputs = case.inputs()
    shape = (*case.rows, case.out_features)
    return {**inputs, "dout": random_like(np.empty(shape, inputs["x"].dtype))}


FLOAT64_LINEAR = LinearCase(dtype="float64", weight_dtype="float64", bias_dtype="float64")


@pytest.mark.parametrize("case", [*LINEAR_CASES, FLOAT64_LINEAR])
def test_linear_agrees_with_reference(backend: Backend, case: LinearCase) -> None:
    backend.require_dtype(case.dtype)
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
    backend.require_dtype("float64")
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
def test_linear_adds_and_overwrites(backend: Backend, dtype: str, layout: str) -> None:
    backend.require_dtype(dtype)
    arguments = linear_arguments(
        LinearCase((67,), dtype=dtype, weight_dtype=dtype, bias_dtype=dtype)
    )
    gradients = backward(backend, ops.linear_bwd, **arguments)
    assert_adds_and_overwrites("linear_bwd", core_linear(arguments), gradients, layout, backend)


def test_linear_takes_only_what_it_needs(backend: Backend) -> None:
    arguments = linear_arguments(LinearCase())
    expected = backward(backend, ops.linear_bwd, **arguments)
    moved = backend.moved(core_linear(arguments))
    dout, x, weight = moved["dout"], moved["x"], moved["weight"]
    gradients = backend.moved({n: np.full_like(g, np.nan) for n, g in expected.items()})
    dx, dweight, dbias = gradients["dx"], gradients["dweight"], gradients["dbias"]
    call_core(backend, "linear_bwd", dout=dout, weight=weight, dx=dx)
    call_core(backend, "linear_bwd", dout=dout, x=x, dweight=dweight)
    call_core(backend, "linear_bwd", dout=dout, dbias=dbias)
    for name, gradient in expected.items():
        assert_same_bits(backend.to_numpy(gradients[name]), gradient)
    with refuses("linear_bwd", "weight", "missing"):
        call_core(backend, "linear_bwd", dout=dout, x=x, dx=dx)
    with refuses("linear_bwd", "x", "missing"):
        call_core(backend, "linear_bwd", dout=dout, weight=weight, dweight=dweight)


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16")])
@pytest.mark.parametrize("which", ["dx", "dweight", "dbias"])
def test_linear_gradient_in_another_dtype(
    backend: Backend, which: str, dtypes: tuple[str, str]
) -> None:
    """Of operands that are slices of wider matrices, as a block has them."""
    dtype, of_gradient = dtypes
    case = LinearCase((200,), 64, 96, dtype, dtype)
    arguments = core_linear(linear_arguments(replace(case, layout="contiguous")))
    expected = reference_gradients.linear_bwd(**arguments, bias=None) | {
        "dbias": reference.fp64(arguments["dout"]).sum(axis=0)
    }
    for name in ("dout", "x"):
        wider = np.full((200, 192), np.nan, DTYPES[dtype])
        wider[:, 32 : 32 + arguments[name].shape[1]] = arguments[name]
        arguments[name] = wider[:, 32 : 32 + arguments[name].shape[1]]
    gradient = backend.to_device(np.full(expected[which].shape, np.nan, DTYPES[of_gradient]))
    call_core(backend, "linear_bwd", **backend.moved(arguments), **{which: gradient})
    assert_close(backend.to_numpy(gradient), expected[which], of_gradient)


@pytest.mark.parametrize(("in_features", "out_features"), [(192, 72), (160, 512), (7, 33)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_long_sums_in_the_same_order(
    backend: Backend, in_features: int, out_features: int, dtype: str
) -> None:
    """Few outputs, each of many rows: worth splitting, in a fixed order."""
    arguments = linear_arguments(LinearCase((6000,), in_features, out_features, dtype, dtype))
    expected = reference_gradients.linear_bwd(**arguments)
    assert_gradients(backward(backend, ops.linear_bwd, **arguments), expected, arguments)
    assert_same_bits_again(lambda: backward(backend, ops.linear_bwd, **arguments))


@pytest.mark.parametrize("shape", [(200, 300, 501), (2000, 16, 48), (3, 1000, 20)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_threads_do_not_change_a_bit(
    set_num_threads: Any, shape: tuple[int, int, int], dtype: str
) -> None:
    """Nor how the result is then divided into tiles."""
    rows, *features = shape
    arguments = linear_arguments(LinearCase((rows,), *features, dtype))
    assert_same_for_any_threads(
        set_num_threads, lambda: backward(BACKENDS["cpu"], ops.linear_bwd, **arguments)
    )


@pytest.mark.parametrize(("in_features", "out_features"), [(96, 70), (160, 320)])
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_rows_do_not_depend_on_the_batch(
    backend: Backend, dtype: str, weight_dtype: str, in_features: int, out_features: int
) -> None:
    case = LinearCase((300,), in_features, out_features, dtype, weight_dtype)
    arguments = linear_arguments(case)

    def dx_of(part: slice) -> np.ndarray:
        some = {**arguments, "x": arguments["x"][part], "dout": arguments["dout"][part]}
        wanted = {"needs": ["x"], "batch_invariant": True}
        return backward(backend, ops.linear_bwd, **some, **wanted)["dx"]

    whole = dx_of(slice(None))
    for rows in (1, 5, 100):
        part = slice(7, 7 + rows)
        assert_same_bits(dx_of(part), whole[part])


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
    *,
    shape: tuple[int, ...] = (3, 40),
    d_model: int = 19,
    dtype: str = "float32",
    id_dtype: str = "int64",
) -> Arrays:
    token_ids = np.random.default_rng(0).integers(0, 11, shape).astype(id_dtype)
    like = np.empty((*shape, d_model), DTYPES.get(dtype, dtype))
    return {"token_ids": token_ids, "dout": random_like(like), "vocab_size": 13}


@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
@pytest.mark.parametrize("id_dtype", ["int32", "int64"])
@pytest.mark.parametrize("d_model", [19, 24, 2104])
@pytest.mark.parametrize("shape", [(1,), (3, 40), (500,)])
def test_embedding_agrees_with_reference(
    backend: Backend, shape: tuple[int, ...], d_model: int, dtype: str, id_dtype: str
) -> None:
    backend.require_dtype(dtype)
    arguments = embedding_arguments(shape=shape, d_model=d_model, dtype=dtype, id_dtype=id_dtype)
    dweight = backend.call(ops.embedding_bwd, **arguments)
    assert_close(dweight, reference_gradients.embedding_bwd(**arguments), dtype)
    assert not np.any(dweight[11:])


@pytest.mark.parametrize("d_model", [1, 24])
@pytest.mark.parametrize("vocab_size", [1, 5, 256, 70000])
@pytest.mark.parametrize("skew", [1, 8])
def test_embedding_ids_of_many_rows(
    backend: Backend, vocab_size: int, skew: int, d_model: int
) -> None:
    """With a skew the first ids have most of the rows."""
    random = np.random.default_rng(0)
    token_ids = (vocab_size * random.random(3001) ** skew).astype(np.int64)
    dout = random.standard_normal((3001, d_model)).astype(np.float32)
    arguments = {"token_ids": token_ids, "dout": dout, "vocab_size": vocab_size}
    dweight = backend.call(ops.embedding_bwd, **arguments)
    assert_close(dweight, reference_gradients.embedding_bwd(**arguments), "float32")
    assert_same_bits_again(lambda: {"dweight": backend.call(ops.embedding_bwd, **arguments)})


def test_embedding_of_one_id_and_all_of_its_neighbours(backend: Backend) -> None:
    """Rows of an id that begin and end anywhere in a chunk of sorted rows."""
    for before in (0, 1, 63, 64, 65):
        for count in (1, 63, 64, 65, 200):
            token_ids = np.repeat([0, 1, 2], [before, count, 70])
            dout = random_like(np.empty((before + count + 70, 8), np.float32))
            arguments = {"token_ids": token_ids, "dout": dout, "vocab_size": 4}
            dweight = backend.call(ops.embedding_bwd, **arguments)
            assert_close(dweight, reference_gradients.embedding_bwd(**arguments), "float32")


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_gradient_in_another_dtype(backend: Backend, dtype: str) -> None:
    arguments = embedding_arguments(dtype="bfloat16")
    dweight = backend.call(ops.embedding_bwd, **arguments, dtype=dtype)
    assert dweight.dtype == DTYPES[dtype]
    assert_close(dweight, reference_gradients.embedding_bwd(**arguments), dtype)


def test_embedding_in_float64(backend: Backend) -> None:
    backend.require_dtype("float64")
    weight = np.random.default_rng(0).standard_normal((11, 19))
    token_ids = np.array([[3, 0], [10, 3]])
    out = backend.call(ops.embedding, token_ids=token_ids, weight=weight)
    assert_same_bits(out, weight[token_ids])


@pytest.mark.parametrize("layout", ["contiguous", *LAYOUTS])
@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
@pytest.mark.parametrize("d_model", [19, 24])
def test_embedding_adds_and_overwrites(
    backend: Backend, d_model: int, dtype: str, layout: str
) -> None:
    backend.require_dtype(dtype)
    arguments = embedding_arguments(shape=(1200,), d_model=d_model, dtype=dtype)
    expected = {"dweight": backend.call(ops.embedding_bwd, **arguments)}
    arguments["dout"] = place(arguments["dout"], layout)
    del arguments["vocab_size"]
    assert_adds_and_overwrites("embedding_bwd", arguments, expected, layout, backend)


def test_embedding_threads_do_not_change_a_bit(set_num_threads: Any) -> None:
    arguments = embedding_arguments(shape=(30000,))
    assert_same_for_any_threads(
        set_num_threads, lambda: {"dweight": ops.embedding_bwd(**arguments)}
    )


@pytest.mark.parametrize(
    ("token_id", "id_dtype"), [(13, np.int32), (-1, np.int32), (2**40, np.int64), (-1, np.int64)]
)
def test_embedding_id_out_of_range(
    backend: Backend, token_id: int, id_dtype: type[np.integer]
) -> None:
    arguments = embedding_arguments()
    arguments["token_ids"] = arguments["token_ids"].astype(id_dtype)
    arguments["token_ids"][1, 7] = token_id
    with refuses_value(backend, "embedding_bwd", "token_ids", str(token_id), "12"):
        backend.call(ops.embedding_bwd, **arguments)


@pytest.mark.parametrize(
    ("name", "bad", "words"),
    [
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
