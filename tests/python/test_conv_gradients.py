"""The backward of the causal convolution, against a sequential fp64 reference, finite differences,
the published CUDA operator's gradients, and itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import reference
import reference_gradients
from backends import BACKENDS, Backend, require_cuda
from cases import CONV_CASES, FLOAT64_CONV_CASES, ConvCase, rows
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
)
from hypothesis import assume, given
from hypothesis import strategies as st
from sequences import boundaries, conv_steps
from test_golden_ops import CONVOLUTIONS, load, select
from test_seq_idx import inputs_of as numbered_inputs
from test_seq_idx import numbers

from ssmcore import _core, ops

CPU = BACKENDS["cpu"]
PER_CHANNEL = ("dweight", "dbias")


def with_outputs(inputs: Arrays, *, final_state: bool = True) -> Arrays:
    """The arguments of a backward, with random gradients with respect to what the forward gave."""
    state = inputs.get("initial_state")
    if state is None:
        (batch, dim, _), width = inputs["x"].shape, inputs["weight"].shape[1]
        state = np.zeros((batch, dim, width - 1), inputs["x"].dtype)
    return {
        **inputs,
        "dout": random_like(inputs["x"]),
        "dfinal_state": random_like(state, seed=2) if final_state else None,
    }


def assert_agrees(backend: Backend, arguments: Arrays) -> None:
    expected = reference_gradients.causal_conv1d_bwd(**arguments)
    assert_gradients(backward(backend, ops.causal_conv1d_bwd, **arguments), expected, arguments)


@pytest.mark.parametrize("case", [*CONV_CASES, *FLOAT64_CONV_CASES])
def test_agrees_with_reference(backend: Backend, case: ConvCase) -> None:
    backend.require_dtype(case.dtype)
    assert_agrees(backend, with_outputs(case.inputs()))


# What vectors of channels or steps, and several tiles of a row, come to see.
TILES = [
    *rows(
        ConvCase(batch=1, dim=16, seqlen=1064, dtype="bfloat16"),
        dim=(1, 8, 200),
        batch=(3,),
        seqlen=(8, 264, 1061),
        width=(2, 3),
        dtype=("float32", "float16"),
        weight_dtype=("float32",),
        bias=(False,),
        activation=(None,),
        state_len=(None, 9),
    )
]


@pytest.mark.parametrize("layout", ["contiguous", "padded", "token-major", "token-major padded"])
@pytest.mark.parametrize("case", TILES)
def test_tiles_agree_with_reference(backend: Backend, case: ConvCase, layout: str) -> None:
    """Where everything lies alike, as in a model: also rows that begin between vectors."""
    arguments = with_outputs(replace(case, layout=layout).inputs())
    arguments["dout"] = place(arguments["dout"], layout)
    expected = reference_gradients.causal_conv1d_bwd(**arguments)
    there = {
        name: backend.to_device(
            place(np.full(gradient.shape, np.nan, arguments[name[1:]].dtype), layout)
        )
        for name, gradient in expected.items()
        if arguments[name[1:]] is not None
    }
    call_core(backend, "causal_conv1d_bwd", **backend.moved(arguments), **there)
    actual = {name: backend.to_numpy(gradient) for name, gradient in there.items()}
    assert_gradients(actual, {name: expected[name] for name in actual}, arguments)
    if layout.endswith("padded"):
        for gradient in actual.values():
            assert_only_poison_around(gradient)


@pytest.mark.parametrize("layout", ["contiguous", "token-major"])
def test_many_rows_agree_with_reference(backend: Backend, layout: str) -> None:
    """More than a GPU has room for at a time, several of which share their sums."""
    case = ConvCase(batch=1200, dim=2048, seqlen=8, dtype="bfloat16", layout=layout)
    arguments = with_outputs(case.inputs(), final_state=False)
    assert_agrees(backend, {**arguments, "dout": place(arguments["dout"], layout)})


@pytest.mark.parametrize("layout", ["contiguous", "token-major"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_agrees_with_reference(backend: Backend, layout: str, dtype: str) -> None:
    """Sequences that are empty, shorter than the width, and longer than a tile."""
    lengths = [0, 1, 0, 2, 3, 500, 0, 64, 32, 4, 700, 1, 5, 0]
    case = ConvCase(1, 40, sum(lengths), dtype=dtype, state_len=None, layout=layout)
    states = ConvCase(len(lengths), 40, 1, dtype=dtype, state_len=5, layout=layout).inputs()
    inputs = {**case.inputs(), "initial_state": states["initial_state"]}
    inputs["dout"] = random_like(inputs["x"], layout=layout)
    inputs["dfinal_state"] = random_like(inputs["initial_state"], seed=2, layout=layout)
    cu_seqlens = boundaries(lengths)
    expected = {name: np.zeros(inputs[name[1:]].shape) for name in ("dx", *PER_CHANNEL)}
    expected["dinitial_state"] = reference.fp64(inputs["dfinal_state"])
    for s, (begin, end) in enumerate(pairwise(cu_seqlens)):
        if begin == end:
            continue
        steps, row = slice(begin, end), slice(s, s + 1)
        alone = {name: inputs[name][..., steps] for name in ("x", "dout")}
        alone |= {name: inputs[name][row] for name in ("initial_state", "dfinal_state")}
        gradients = reference_gradients.causal_conv1d_bwd(**{**inputs, **alone})
        expected["dx"][..., steps] = gradients["dx"]
        expected["dinitial_state"][row] = gradients["dinitial_state"]
        for name in PER_CHANNEL:
            expected[name] += gradients[name]
    actual = backward(backend, ops.causal_conv1d_bwd, **inputs, cu_seqlens=cu_seqlens)
    assert_gradients(actual, expected, inputs)


@pytest.mark.cuda
def test_cuda_has_no_float64() -> None:
    require_cuda()
    with refuses("causal_conv1d_bwd", "x", "float64"):
        backward(
            BACKENDS["cuda"],
            ops.causal_conv1d_bwd,
            **with_outputs(ConvCase(dtype="float64").inputs()),
        )


@pytest.mark.parametrize("case", FLOAT64_CONV_CASES)
def test_forward_in_float64(case: ConvCase) -> None:
    inputs = case.inputs()
    out, final_state = ops.causal_conv1d(**inputs, return_final_state=True)
    expected_out, expected_state = reference.causal_conv1d(**inputs)
    assert_close(out, expected_out, "float64")
    assert_close(final_state, expected_state, "float64")


@pytest.mark.parametrize("width", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("seqlen", [1, 3, 67, 300])
@pytest.mark.parametrize("layout", ["contiguous", "token-major", "spread"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_numbered_agrees_with_reference(
    backend: Backend, width: int, seqlen: int, layout: str, dtype: str
) -> None:
    backend.require_dtype(dtype)
    inputs = numbered_inputs(width=width, seqlen=seqlen, layout=layout, dtype=dtype)
    seq_idx = numbers(2, seqlen)
    seq_idx[:, 0] = 3  # a gradient other than 0, at least
    arguments = {**inputs, "dout": random_like(inputs["x"]), "seq_idx": place(seq_idx, layout)}
    # What belongs to no sequence may hold anything.
    skipped = np.broadcast_to(seq_idx[:, None] < 0, inputs["x"].shape)
    expected = reference_gradients.causal_conv1d_bwd(**arguments)
    for name in ("x", "dout"):
        arguments[name][skipped] = np.nan
    actual = backward(backend, ops.causal_conv1d_bwd, **arguments)
    assert_gradients(actual, expected, arguments)
    assert not np.any(actual["dx"][skipped])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_numbered_in_narrow_types(backend: Backend, dtype: str, activation: str | None) -> None:
    inputs = numbered_inputs(dtype=dtype, activation=activation)
    assert_agrees(backend, {**inputs, "dout": random_like(inputs["x"]), "seq_idx": numbers(2, 67)})


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(("seqlen", "state_len"), [(9, 3), (2, 6), (9, None)])
@pytest.mark.parametrize("forward", [reference.causal_conv1d, ops.causal_conv1d])
def test_agrees_with_finite_differences(
    forward: Callable[..., Any],
    activation: str | None,
    seqlen: int,
    state_len: int | None,
) -> None:
    case = ConvCase(2, 3, seqlen, dtype="float64", activation=activation, state_len=state_len)
    inputs = case.inputs()
    arguments = with_outputs(inputs)
    more = {"return_final_state": True} if forward is ops.causal_conv1d else {}

    def loss() -> float:
        out, final_state = forward(**inputs, **more)
        dout, dfinal_state = arguments["dout"], arguments["dfinal_state"]
        return float((dout * out).sum() + (dfinal_state * final_state).sum())

    arrays = {n: value for n, value in inputs.items() if isinstance(value, np.ndarray)}
    gradients = backward(CPU, ops.causal_conv1d_bwd, **arguments)
    assert_derivatives(loss, arrays, gradients)


def test_numbered_agrees_with_finite_differences() -> None:
    inputs = numbered_inputs(dim=3, seqlen=30, dtype="float64")
    inputs["seq_idx"] = numbers(2, 30)
    dout = random_like(inputs["x"])

    def loss() -> float:
        return float((dout * reference.causal_conv1d_numbered(**inputs)).sum())

    arrays = {name: inputs[name] for name in ("x", "weight", "bias")}
    gradients = backward(CPU, ops.causal_conv1d_bwd, **inputs, dout=dout)
    assert_derivatives(loss, arrays, gradients)


@pytest.mark.parametrize("case", [*CONVOLUTIONS, "conv_seq_idx"])
def test_agrees_with_published_gradients(backend: Backend, case: str) -> None:
    tensors = load(case)
    activation = str(tensors["activation"])
    arguments = {
        **select(tensors, "x", "weight", "bias", "seq_idx"),
        "activation": None if activation == "None" else activation,
        "initial_state": tensors.get("initial_states"),
    }
    arguments["dout"] = tensors["dout"].astype(arguments["x"].dtype)
    gradients = backward(backend, ops.causal_conv1d_bwd, **arguments)
    published = {"dinitial_state": "dinitial_states"}
    for name, gradient in gradients.items():
        expected = tensors[published.get(name, name)]
        assert_close(gradient, expected, str(tensors["dtype"]), rounded=True)


# --- Properties -----------------------------------------------------------------------------------


@given(
    seqlen=st.integers(2, 40),
    split_at=st.floats(0, 1),
    width=st.integers(2, 8),
    state_len=st.sampled_from([None, 3, 9]),
    dtype=st.sampled_from(["float32", "float64"]),
    layout=st.sampled_from(["contiguous", *LAYOUTS]),
)
def test_two_halves_are_the_whole(
    backend: Backend, seqlen: int, split_at: float, **fields: Any
) -> None:
    """With the state handed forward and its gradient handed back."""
    assume(backend is CPU or fields["dtype"] != "float64")
    inputs = ConvCase(seqlen=seqlen, dim=5, **fields).inputs()
    arguments = with_outputs(inputs)
    whole = backward(backend, ops.causal_conv1d_bwd, **arguments)
    middle = 1 + round(split_at * (seqlen - 2))
    first, second = conv_steps(inputs, 0, middle), conv_steps(inputs, middle, seqlen)
    _, state = backend.call(ops.causal_conv1d, **first, return_final_state=True)
    second.update(initial_state=state, dfinal_state=arguments["dfinal_state"])
    late = backward(backend, ops.causal_conv1d_bwd, **second, dout=arguments["dout"][..., middle:])
    early = backward(
        backend,
        ops.causal_conv1d_bwd,
        **first,
        dout=arguments["dout"][..., :middle],
        dfinal_state=late["dinitial_state"],
    )
    joined = {**early, "dx": np.concatenate([early["dx"], late["dx"]], axis=-1)}
    joined.update({name: early[name] + late[name] for name in PER_CHANNEL})
    assert_gradients(joined, {n: reference.fp64(g) for n, g in whole.items()}, inputs)


@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 3, 7, 60]), min_size=1, max_size=40).filter(any),
    width=st.sampled_from([2, 4, 7]),
    state_len=st.sampled_from([6, 9]),
    dtype=st.sampled_from(["float32", "float64"]),
)
def test_packed_is_separate(
    backend: Backend, lengths: list[int], state_len: int, **fields: Any
) -> None:
    assume(backend is CPU or fields["dtype"] != "float64")
    case = ConvCase(batch=1, seqlen=sum(lengths), state_len=None, **fields)
    inputs = {**case.inputs(), "dout": random_like(case.inputs()["x"])}
    states = replace(case, batch=len(lengths), state_len=state_len).inputs()["initial_state"]
    inputs["initial_state"], dstates = states, random_like(states, seed=2)
    cu_seqlens = boundaries(lengths)
    packed = backward(
        backend,
        ops.causal_conv1d_bwd,
        **inputs,
        dfinal_state=dstates,
        cu_seqlens=cu_seqlens,
    )
    sums = {name: np.zeros(packed[name].shape) for name in PER_CHANNEL}
    for s, (begin, end) in enumerate(pairwise(cu_seqlens)):
        row = slice(s, s + 1)
        if begin == end:
            assert_same_bits(packed["dinitial_state"][row], dstates[row])
            continue
        alone = backward(
            backend,
            ops.causal_conv1d_bwd,
            **{
                **conv_steps(inputs, begin, end),
                "dout": inputs["dout"][..., begin:end],
                "initial_state": states[row],
                "dfinal_state": dstates[row],
            },
        )
        assert_same_bits(packed["dinitial_state"][row], alone["dinitial_state"])
        assert np.array_equal(packed["dx"][..., begin:end], alone["dx"])
        for name in PER_CHANNEL:
            sums[name] += reference.fp64(alone[name])
    for name, total in sums.items():
        assert_close(packed[name], total, case.dtype)


def test_packed_borders_and_the_tail_pass_no_gradient(backend: Backend) -> None:
    """dout of one sequence alone reaches nothing of the others."""
    inputs = ConvCase(batch=1, seqlen=30, state_len=None).inputs()
    dout = np.zeros_like(inputs["x"])
    dout[..., 10:20] = random_like(dout[..., 10:20])
    gradients = backward(
        backend,
        ops.causal_conv1d_bwd,
        **inputs,
        dout=dout,
        cu_seqlens=boundaries([10, 10, 10]),
    )
    assert np.all(gradients["dx"][..., 10:20] != 0)
    assert not np.any(gradients["dx"][..., :10]) and not np.any(gradients["dx"][..., 20:])


@pytest.mark.parametrize("dtype", [*DTYPES])
@pytest.mark.parametrize("batch", [1, 40])
def test_threads_do_not_change_a_bit(set_num_threads: Any, dtype: str, batch: int) -> None:
    case = ConvCase(batch=batch, dim=201, seqlen=600 // batch, dtype=dtype)
    arguments = with_outputs(case.inputs())
    assert_same_for_any_threads(
        set_num_threads, lambda: backward(CPU, ops.causal_conv1d_bwd, **arguments)
    )


@pytest.mark.parametrize("dtype", [*DTYPES])
@pytest.mark.parametrize("layout", ["contiguous", "token-major", "spread"])
@pytest.mark.parametrize("batch", [1, 40])
def test_again_to_the_bit(backend: Backend, dtype: str, layout: str, batch: int) -> None:
    case = ConvCase(batch=batch, dim=200, seqlen=1600 // batch, dtype=dtype, layout=layout)
    arguments = with_outputs(case.inputs())
    assert_same_bits_again(lambda: backward(backend, ops.causal_conv1d_bwd, **arguments))


def test_rows_do_not_depend_on_the_batch(backend: Backend) -> None:
    arguments = with_outputs(ConvCase(batch=5).inputs())
    whole = backward(backend, ops.causal_conv1d_bwd, **arguments)
    for name in ("x", "initial_state", "dout", "dfinal_state"):
        arguments[name] = arguments[name][2:3]
    alone = backward(backend, ops.causal_conv1d_bwd, **arguments)
    for name in ("dx", "dinitial_state"):
        assert_same_bits(alone[name], np.ascontiguousarray(whole[name][2:3]))


# --- Memory, and what is asked for ----------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "token-major padded", "spread"])
@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
def test_adds_and_overwrites(backend: Backend, dtype: str, layout: str) -> None:
    backend.require_dtype(dtype)
    arguments = with_outputs(ConvCase(seqlen=300, state_len=9, dtype=dtype).inputs())
    gradients = backward(backend, ops.causal_conv1d_bwd, **arguments)
    assert_adds_and_overwrites("causal_conv1d_bwd", arguments, gradients, layout, backend)


@pytest.mark.parametrize("layout", ["contiguous", "token-major"])
@pytest.mark.parametrize("state_len", [3, 9])
def test_narrow_inputs_with_wide_gradients(backend: Backend, layout: str, state_len: int) -> None:
    case = ConvCase(seqlen=72, dtype="bfloat16", state_len=state_len, layout=layout)
    arguments = with_outputs(case.inputs())
    expected = reference_gradients.causal_conv1d_bwd(**arguments)
    for name, gradient in expected.items():
        wide = backend.to_device(place(np.full(gradient.shape, np.nan, np.float32), layout))
        call_core(backend, "causal_conv1d_bwd", **backend.moved(arguments), **{name: wide})
        assert_close(backend.to_numpy(wide), gradient, "float32")


def test_initial_state_of_zeros_has_a_gradient(backend: Backend) -> None:
    arguments = with_outputs(ConvCase(seqlen=2).inputs())
    arguments["initial_state"] = np.zeros_like(arguments["initial_state"])
    expected = backward(backend, ops.causal_conv1d_bwd, **arguments)["dinitial_state"]
    there = backend.to_device(np.full_like(expected, np.nan))
    arguments["initial_state"] = None
    call_core(backend, "causal_conv1d_bwd", **backend.moved(arguments), dinitial_state=there)
    assert_same_bits(backend.to_numpy(there), expected)


@pytest.mark.parametrize("indices", [(4, 0), (-1, 2), (-1, -1)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_state_indices(backend: Backend, indices: tuple[int, int], dtype: str) -> None:
    backend.require_dtype(dtype)
    inputs = ConvCase(dtype=dtype).inputs()
    slots = ConvCase(batch=5, dtype=dtype).inputs()["initial_state"]
    dslots = random_like(slots, seed=2)
    named = [i >= 0 for i in indices]
    states, dstates = (
        np.stack([s[i] if i >= 0 else np.zeros_like(s[0]) for i in indices])
        for s in (slots, dslots)
    )
    inputs["dout"] = random_like(inputs["x"])
    expected = backward(
        backend,
        ops.causal_conv1d_bwd,
        **{**inputs, "initial_state": states},
        dfinal_state=dstates,
    )
    there = {
        name: backend.to_device(np.full_like(gradient, np.nan))
        for name, gradient in {**expected, "dinitial_state": slots}.items()
    }
    inputs.update(initial_state=slots, dfinal_state=dslots)
    call_core(
        backend,
        "causal_conv1d_bwd",
        **backend.moved(inputs),
        state_indices=backend.to_device(np.array(indices, np.int32)),
        **there,
    )
    actual = {name: backend.to_numpy(gradient) for name, gradient in there.items()}
    for name in ("dx", *PER_CHANNEL):
        assert_same_bits(actual[name], expected[name])
    for row, slot in enumerate(indices):
        if slot >= 0:
            assert_same_bits(actual["dinitial_state"][slot], expected["dinitial_state"][row])
    others = np.setdiff1d(np.arange(5), np.array(indices)[named])
    assert np.isnan(actual["dinitial_state"][others]).all()


@pytest.mark.parametrize("layout", ["padded", "token-major padded", "spread"])
def test_inputs_and_what_lies_around_them_stay(backend: Backend, layout: str) -> None:
    inputs = ConvCase(layout=layout).inputs()
    arrays = {name: value for name, value in inputs.items() if isinstance(value, np.ndarray)}
    before = {name: value.copy() for name, value in arrays.items()}
    backward(backend, ops.causal_conv1d_bwd, **with_outputs(inputs))
    for name, array in arrays.items():
        assert_same_bits(array, before[name])
        assert_only_poison_around(array)


@pytest.mark.parametrize("name", ["x", "weight", "bias", "initial_state", "dout", "dfinal_state"])
def test_zero_strides(backend: Backend, name: str) -> None:
    inputs = with_outputs(ConvCase().inputs())
    shape = inputs[name].shape
    for axis in range(len(shape)):
        repeated = np.broadcast_to(inputs[name].take([0], axis=axis), shape)
        assert_agrees(backend, {**inputs, name: repeated})


def test_only_what_is_needed(backend: Backend) -> None:
    arguments = with_outputs(ConvCase().inputs())
    everything = backward(backend, ops.causal_conv1d_bwd, **arguments)
    for name, gradient in everything.items():
        only = backward(backend, ops.causal_conv1d_bwd, **arguments, needs=[name.removeprefix("d")])
        assert only.keys() == {name}
        assert_same_bits(only[name], gradient)


# --- Bad input ------------------------------------------------------------------------------------


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("name", "bad", "words"),
    [
        ("x", zeros(24, 67), []),
        ("weight", zeros(24, 9), ["9", "2", "8"]),
        ("bias", zeros(23), ["23", "24"]),
        ("initial_state", zeros(2, 24, 2), ["2", "3"]),
        ("dout", zeros(2, 24, 66), ["66", "67"]),
        ("dout", zeros(2, 24, 67, dtype=np.float16), ["float16", "float32"]),
        ("dfinal_state", zeros(2, 24, 4), ["4", "3"]),
        ("dfinal_state", zeros(2, 24, 3, dtype=np.float64), ["float64", "float32"]),
        ("activation", "relu", ["relu", "silu"]),
        ("needs", ["y"], ["y"]),
        ("seq_idx", zeros(2, 67, dtype=np.int32), ["initial_state"]),
        ("cu_seqlens", np.array([0, 67], np.int32), ["2"]),
    ],
)
def test_bad_argument(backend: Backend, name: str, bad: Any, words: list[str]) -> None:
    arguments = {**with_outputs(ConvCase().inputs()), name: bad}
    with refuses("causal_conv1d_bwd", name, *words):
        backward(backend, ops.causal_conv1d_bwd, **arguments)


@pytest.mark.parametrize(
    ("name", "bad", "words"),
    [
        ("dx", zeros(2, 24, 66), ["66", "67"]),
        ("dx", zeros(2, 24, 67, dtype=np.float16), ["float16", "float32"]),
        ("dx", np.broadcast_to(zeros(1, 24, 67), (2, 24, 67)), []),
        ("dweight", zeros(24, 3), ["3", "4"]),
        ("dbias", zeros(25), ["25", "24"]),
        ("dinitial_state", zeros(2, 24, 5), ["5", "3"]),
    ],
)
def test_bad_gradient(name: str, bad: np.ndarray, words: list[str]) -> None:
    arguments = with_outputs(ConvCase().inputs())
    with refuses("causal_conv1d_bwd", name, *words):
        _core.causal_conv1d_bwd(on=None, **arguments, **{name: bad})


@pytest.mark.parametrize("other", ["x", "dout"])
def test_gradient_that_overlaps_an_input(other: str) -> None:
    arguments = with_outputs(ConvCase().inputs())
    with refuses("causal_conv1d_bwd", "dx", other):
        _core.causal_conv1d_bwd(on=None, **arguments, dx=arguments[other])


def test_gradient_of_a_missing_bias() -> None:
    arguments = with_outputs(ConvCase(bias=False).inputs())
    with refuses("causal_conv1d_bwd", "dbias", "bias"):
        _core.causal_conv1d_bwd(on=None, **arguments, dbias=zeros(24))
