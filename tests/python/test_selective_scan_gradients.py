"""The backward of the selective scan, against a sequential fp64 reference, finite differences, the
published CUDA operators' gradients, and itself."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import reference
import reference_gradients
from backends import BACKENDS, Backend, require_cuda
from cases import COMPLEX_SCAN_CASES, FLOAT64_SCAN_CASES, SCAN_CASES, ScanCase
from finite_differences import numerical_gradient
from helpers import (
    DTYPES,
    LAYOUTS,
    assert_close,
    assert_only_poison_around,
    assert_same_bits,
    refuses,
    relative_error,
)
from hypothesis import given
from hypothesis import strategies as st
from sequences import boundaries, scan_steps
from test_golden_ops import COMPLEX_SCANS, REAL_SCANS, load, scan_inputs

import ssmcore
from ssmcore import ops

Arrays = dict[str, Any]

FORMS = ("constant", "shared", "1 group", "3 groups")
OPTIONS = ("D", "z", "delta_bias", "delta_softplus", "initial_state")
# Gradients that every step has its own of, and so every sequence.
PER_STEP = ("du", "ddelta", "dB", "dC", "dz")


def output_gradients(case: ScanCase) -> Arrays:
    """Random gradients with respect to what a scan of the case returns."""
    generator = np.random.default_rng(1)
    dstate = generator.standard_normal((case.batch, case.dim, case.dstate))
    if case.A == "complex":
        dstate = dstate + 1j * generator.standard_normal(dstate.shape)
    dout = generator.standard_normal((case.batch, case.dim, case.seqlen))
    return {
        "dout": dout.astype(DTYPES.get(case.dtype, case.dtype)),
        "dlast_state": dstate.astype(case.state_dtype),
    }


def backward(backend: Backend, **arguments: Any) -> dict[str, np.ndarray]:
    """The gradients that there are, by name."""
    gradients = backend.call(ops.selective_scan_bwd, **arguments)
    names = ops.SelectiveScanGradients._fields
    return {n: g for n, g in zip(names, gradients, strict=True) if g is not None}


def assert_all_close(actual: Arrays, expected: Arrays, inputs: Arrays) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        of = inputs[name.removeprefix("d")]
        assert actual[name].dtype == of.dtype
        mine = actual[name]
        if name == "ddelta_bias":
            # Sums that cancel, on the scale of what they sum up.
            mine = np.append(mine, expected["ddelta"])
            gradient = np.append(gradient, expected["ddelta"])
        assert_close(mine, gradient, _tolerance(of.dtype))


def _tolerance(dtype: np.dtype) -> str:
    return "float32" if dtype == np.complex64 else dtype.name


def assert_agrees(backend: Backend, case: ScanCase) -> None:
    inputs = {**case.inputs(), **output_gradients(case)}
    expected = reference_gradients.selective_scan_bwd(**inputs)
    assert_all_close(backward(backend, **inputs), expected, inputs)


@pytest.mark.parametrize("case", [*SCAN_CASES, *FLOAT64_SCAN_CASES, *COMPLEX_SCAN_CASES])
def test_agrees_with_reference(gradient_backend: Backend, case: ScanCase) -> None:
    assert_agrees(gradient_backend, case)


@pytest.mark.parametrize(("B", "C"), list(product(FORMS, FORMS)))
@pytest.mark.parametrize("A", ["real", "complex"])
@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
def test_every_form_of_B_and_C(
    gradient_backend: Backend, B: str, C: str, A: str, dtype: str
) -> None:
    case = ScanCase(B=B, C=C, A=A if dtype != "float64" else "real", dtype=dtype)
    assert_agrees(gradient_backend, case)


@pytest.mark.parametrize("options", list(product([False, True], repeat=len(OPTIONS))))
@pytest.mark.parametrize("form", ["constant", "3 groups"])
def test_every_choice_of_options(
    gradient_backend: Backend, form: str, options: tuple[bool, ...]
) -> None:
    chosen = dict(zip(OPTIONS, options, strict=True))
    assert_agrees(gradient_backend, ScanCase(B=form, C=form, seqlen=20, **chosen))


@pytest.mark.parametrize("dim", [256, 700])
@pytest.mark.parametrize("batch", [1, 11])
def test_sums_over_many_channels_and_rows(gradient_backend: Backend, dim: int, batch: int) -> None:
    assert_agrees(gradient_backend, ScanCase(batch=batch, dim=dim, dstate=5, seqlen=70))


# --- Finite differences ---------------------------------------------------------------------------

SMALL = ScanCase(batch=2, dim=6, seqlen=5, dstate=2, dtype="float64")


@pytest.mark.parametrize("scan", [reference.selective_scan, ops.selective_scan])
@pytest.mark.parametrize("delta_softplus", [False, True])
@pytest.mark.parametrize(("B", "C"), [("constant", "3 groups"), ("3 groups", "1 group")])
def test_agrees_with_finite_differences(
    gradient_backend: Backend, scan: Any, delta_softplus: bool, B: str, C: str
) -> None:
    case = replace(SMALL, B=B, C=C, delta_softplus=delta_softplus)
    inputs, outputs = case.inputs(), output_gradients(case)
    gradients = backward(gradient_backend, **inputs, **outputs)
    assert_is_gradient(scan, inputs, outputs, gradients)


@pytest.mark.parametrize(("B", "C"), [("constant", "3 groups"), ("3 groups", "constant")])
def test_complex_reference_agrees_with_finite_differences(B: str, C: str) -> None:
    case = replace(SMALL, dtype="float32", A="complex", B=B, C=C)
    inputs = {
        name: reference.fp64(value) if isinstance(value, np.ndarray) else value
        for name, value in case.inputs().items()
    }
    outputs = output_gradients(case)
    gradients = reference_gradients.selective_scan_bwd(**inputs, **outputs)
    assert_is_gradient(reference.selective_scan, inputs, outputs, gradients)


def assert_is_gradient(scan: Any, inputs: Arrays, outputs: Arrays, gradients: Arrays) -> None:
    """`gradients` are those of what weighs the scan's results with `outputs`."""

    def loss() -> float:
        out, last_state = scan(**inputs)
        of_state = (np.conj(outputs["dlast_state"]) * last_state).real.sum()
        return float((outputs["dout"] * out).sum() + of_state)

    arrays = {f"d{n}": value for n, value in inputs.items() if isinstance(value, np.ndarray)}
    assert gradients.keys() == arrays.keys()
    for name, array in arrays.items():
        reals = array.view(np.float64)
        expected = numerical_gradient(loss, reals, np.arange(reals.size))
        actual = np.ascontiguousarray(gradients[name]).view(np.float64).reshape(-1)
        assert relative_error(actual, expected) < 1e-8, name


# --- The published operators ----------------------------------------------------------------------


@pytest.mark.parametrize("case", [*REAL_SCANS, *COMPLEX_SCANS])
def test_agrees_with_published_gradients(gradient_backend: Backend, case: str) -> None:
    tensors = load(case)
    inputs = scan_inputs(tensors)
    dout = tensors["dout"].astype(inputs["u"].dtype)
    for gradients in (
        backward(gradient_backend, **inputs, dout=dout),
        reference_gradients.selective_scan_bwd(**inputs, dout=dout),
    ):
        assert gradients.keys() == {f"d{n}" for n in inputs if n != "delta_softplus"}
        for name, gradient in gradients.items():
            assert_close(gradient, tensors[name], str(tensors["dtype"]), rounded=True)


# --- Properties -----------------------------------------------------------------------------------


@given(
    seqlen=st.integers(1, 150),
    chunk_size=st.integers(1, 160),
    dim=st.sampled_from([1, 3, 24, 39]),
    dstate=st.sampled_from([1, 5, 16, 70]),
    dtype=st.sampled_from([*DTYPES, "float64"]),
    A=st.sampled_from(["real", "complex"]),
    B=st.sampled_from(["constant", "shared", "1 group"]),
    layout=st.sampled_from(["contiguous", *LAYOUTS]),
)
def test_saved_states_spare_computing_them(
    gradient_backend: Backend, chunk_size: int, dtype: str, A: str, **fields: Any
) -> None:
    case = ScanCase(dtype=dtype, A="real" if dtype == "float64" else A, **fields)
    inputs = case.inputs()
    *_, states = gradient_backend.call(ops.selective_scan, **inputs, chunk_size=chunk_size)
    inputs.update(output_gradients(case))
    expected = backward(gradient_backend, **inputs)
    saved = {"chunk_states": states, "chunk_size": chunk_size}
    assert_all_close(backward(gradient_backend, **inputs, **saved), expected, inputs)


@given(
    seqlen=st.integers(2, 150),
    split_at=st.floats(0, 1),
    dim=st.integers(1, 40),
    dstate=st.integers(1, 20),
    dtype=st.sampled_from([*DTYPES, "float64"]),
    A=st.sampled_from(["real", "complex"]),
    layout=st.sampled_from(["contiguous", *LAYOUTS]),
)
def test_two_halves_are_the_whole(
    gradient_backend: Backend, seqlen: int, split_at: float, dtype: str, A: str, **fields: Any
) -> None:
    """With the state handed forward and its gradient handed back."""
    A = "real" if dtype == "float64" else A
    case = ScanCase(seqlen=seqlen, dtype=dtype, A=A, **fields)
    inputs, outputs = case.inputs(), output_gradients(case)
    middle = 1 + round(split_at * (seqlen - 2))
    whole = backward(gradient_backend, **inputs, **outputs)

    first, second = scan_steps(inputs, 0, middle), scan_steps(inputs, middle, seqlen)
    _, second["initial_state"] = gradient_backend.call(ops.selective_scan, **first)
    late = backward(
        gradient_backend, **{**outputs, "dout": outputs["dout"][..., middle:]}, **second
    )
    early = backward(
        gradient_backend,
        **first,
        dout=outputs["dout"][..., :middle],
        dlast_state=late["dinitial_state"],
    )
    joined = {
        name: np.concatenate([early[name], late[name]], axis=-1)
        if name in PER_STEP
        else early[name] + late[name]
        for name in whole
    }
    joined["dinitial_state"] = early["dinitial_state"]
    assert_all_close(joined, whole, inputs)


@given(
    lengths=st.lists(
        st.one_of(st.just(0), st.just(1), st.integers(2, 90)), min_size=1, max_size=12
    ).filter(any),
    chunk_size=st.one_of(st.none(), st.integers(1, 100)),
    A=st.sampled_from(["real", "complex"]),
    B=st.sampled_from(["constant", "shared", "3 groups"]),
    dtype=st.sampled_from([*DTYPES, "float64"]),
)
def test_packed_is_separate(
    gradient_backend: Backend,
    lengths: list[int],
    chunk_size: int | None,
    A: str,
    B: str,
    dtype: str,
) -> None:
    A = "real" if dtype == "float64" else A
    case = ScanCase(batch=1, seqlen=sum(lengths), A=A, B=B, dtype=dtype, initial_state=False)
    inputs, outputs = case.inputs(), output_gradients(replace(case, batch=len(lengths)))
    outputs["dout"] = outputs["dout"][:1]
    states = replace(case, batch=len(lengths), initial_state=True).inputs()["initial_state"]
    inputs["initial_state"] = states
    cu_seqlens = boundaries(lengths)
    saved = saved_states(gradient_backend, {**inputs, "cu_seqlens": cu_seqlens}, chunk_size)
    packed = backward(gradient_backend, **inputs, **outputs, **saved, cu_seqlens=cu_seqlens)

    sums = {name: np.zeros_like(packed[name]) for name in packed}
    for s, (begin, end) in enumerate(pairwise(cu_seqlens)):
        row = slice(s, s + 1)
        if begin == end:
            assert_same_bits(packed["dinitial_state"][row], outputs["dlast_state"][row])
            continue
        steps = {**scan_steps(inputs, begin, end), "initial_state": states[row]}
        saved = saved_states(gradient_backend, steps, chunk_size)
        steps["dout"], steps["dlast_state"] = (
            outputs["dout"][..., begin:end],
            outputs["dlast_state"][row],
        )
        alone = backward(gradient_backend, **steps, **saved)
        assert_same_bits(packed["dinitial_state"][row], alone["dinitial_state"])
        for name, gradient in alone.items():
            if name in PER_STEP and not (name == "dB" and B == "constant"):
                parts = gradient.shape[-1] // (end - begin)
                mine = packed[name][..., parts * begin : parts * end]
                assert np.array_equal(mine, gradient), name
            elif name != "dinitial_state":
                sums[name] += gradient
    for name in packed.keys() - {*PER_STEP, "dinitial_state"}:
        assert_close(packed[name], sums[name], _tolerance(packed[name].dtype))


def saved_states(backend: Backend, inputs: Arrays, chunk_size: int | None) -> Arrays:
    if chunk_size is None:
        return {}
    *_, states = backend.call(ops.selective_scan, **inputs, chunk_size=chunk_size)
    return {"chunk_states": states, "chunk_size": chunk_size}


@pytest.mark.parametrize("A", ["real", "complex"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B", ["shared", "constant", "3 groups"])
def test_threads_do_not_change_a_bit(
    gradient_backend: Backend, set_num_threads: Any, dtype: str, A: str, B: str
) -> None:
    case = ScanCase(batch=3, dim=201, seqlen=130, dstate=7, dtype=dtype, A=A, B=B)
    arguments = {**case.inputs(), **output_gradients(case)}
    set_num_threads(1)
    once = backward(gradient_backend, **arguments)
    for threads in (1, 2, 3, 5):
        set_num_threads(threads)
        again = backward(gradient_backend, **arguments)
        for name, gradient in once.items():
            assert_same_bits(again[name], gradient)


def test_rows_do_not_depend_on_the_batch(gradient_backend: Backend) -> None:
    case = ScanCase(batch=5, dim=150)
    arguments = {**case.inputs(), **output_gradients(case)}
    whole = backward(gradient_backend, **arguments)
    per_row = ("u", "delta", "z", "B", "C", "initial_state", "dout", "dlast_state")
    alone = backward(
        gradient_backend, **{**arguments, **{name: arguments[name][2:3] for name in per_row}}
    )
    for name in (*PER_STEP, "dinitial_state"):
        assert_same_bits(alone[name], np.ascontiguousarray(whole[name][2:3]))


# --- Memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name",
    ["u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state", "dout", "dlast_state"],
)
def test_zero_strides(gradient_backend: Backend, name: str, dtype: str) -> None:
    case = ScanCase(dtype=dtype)
    inputs = {**case.inputs(), **output_gradients(case)}
    shape = inputs[name].shape
    for axis in range(len(shape)):
        repeated = np.broadcast_to(inputs[name].take([0], axis=axis), shape)
        arguments = {**inputs, name: repeated}
        expected = reference_gradients.selective_scan_bwd(**arguments)
        assert_all_close(backward(gradient_backend, **arguments), expected, inputs)


@pytest.mark.parametrize("layout", ["padded", "token-major padded", "spread"])
def test_inputs_and_what_lies_around_them_stay(gradient_backend: Backend, layout: str) -> None:
    case = ScanCase(layout=layout)
    inputs = case.inputs()
    arrays = {name: value for name, value in inputs.items() if isinstance(value, np.ndarray)}
    before = {name: value.copy() for name, value in arrays.items()}
    backward(gradient_backend, **inputs, **output_gradients(case))
    for name, array in arrays.items():
        assert_same_bits(array, before[name])
        assert_only_poison_around(array)


def test_nan_in_one_channel_stays_there(gradient_backend: Backend) -> None:
    case = ScanCase(dim=37)
    arguments = {**case.inputs(), **output_gradients(case)}
    clean = backward(gradient_backend, **arguments)
    arguments["u"][1, 5, 20] = np.nan
    spoilt = backward(gradient_backend, **arguments)
    # h is NaN from there on, and so is what is multiplied with it; du is not.
    assert np.isnan(spoilt["dA"][5]).all() and np.isnan(spoilt["ddelta"][1, 5, 20:]).all()
    assert np.isnan(spoilt["dB"][1, :, 20]).all() and np.isnan(spoilt["dC"][1, :, 20:]).all()
    assert_same_bits(spoilt["du"], clean["du"])
    assert_same_bits(spoilt["dinitial_state"], clean["dinitial_state"])
    spoilt["dA"][5] = clean["dA"][5]
    spoilt["dB"][1, :, 20], spoilt["dC"][1, :, 20:] = clean["dB"][1, :, 20], clean["dC"][1, :, 20:]
    spoilt["ddelta"][1, 5, 20:] = clean["ddelta"][1, 5, 20:]
    for name in ("dA", "dB", "dC", "ddelta"):
        assert_same_bits(spoilt[name], clean[name])


# --- Numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high"),
    [
        pytest.param(-40, -15, id="softplus-without-cancellation"),
        pytest.param(-2, 2, id="softplus-around-zero"),
        pytest.param(19, 21, id="softplus-threshold"),
        pytest.param(50, 1000, id="state-decays-at-once"),
    ],
)
def test_range_of_delta(gradient_backend: Backend, low: float, high: float) -> None:
    case = ScanCase(D=False, delta_bias=False)
    inputs = {**case.inputs(), **output_gradients(case)}
    delta = np.random.default_rng(1).uniform(low, high, inputs["delta"].shape)
    inputs["delta"] = delta.astype(np.float32)
    expected = reference_gradients.selective_scan_bwd(**inputs)
    assert_all_close(backward(gradient_backend, **inputs), expected, inputs)


def test_gate_saturates(gradient_backend: Backend) -> None:
    case = ScanCase()
    inputs = {**case.inputs(), **output_gradients(case), "dlast_state": None}
    shut = np.full_like(inputs["z"], -1e4)
    for gradient in backward(gradient_backend, **{**inputs, "z": shut}).values():
        assert np.abs(gradient).max() < 1e-30
    # A gate of z as good as multiplies by z.
    wide = np.full_like(inputs["z"], 64)
    open_ = backward(gradient_backend, **{**inputs, "z": wide})
    scaled = backward(gradient_backend, **{**inputs, "z": None, "dout": 64 * inputs["dout"]})
    for name, gradient in scaled.items():
        assert_close(open_[name], gradient, "float32")


# --- What is asked for ----------------------------------------------------------------------------


def test_only_what_is_needed(gradient_backend: Backend) -> None:
    case = ScanCase()
    arguments = {**case.inputs(), **output_gradients(case)}
    everything = backward(gradient_backend, **arguments)
    for name, gradient in everything.items():
        only = backward(gradient_backend, **arguments, needs=[name.removeprefix("d")])
        assert only.keys() == {name}
        assert_same_bits(only[name], gradient)


def test_without_a_gradient_of_the_state(gradient_backend: Backend) -> None:
    case = ScanCase()
    arguments = {**case.inputs(), **output_gradients(case)}
    zeros = np.zeros_like(arguments.pop("dlast_state"))
    with_zeros = backward(gradient_backend, **arguments, dlast_state=zeros)
    for name, gradient in backward(gradient_backend, **arguments).items():
        assert_same_bits(gradient, with_zeros[name])


# --- Bad input ------------------------------------------------------------------------------------


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("name", "bad", "words"),
    [
        ("u", zeros(24, 67), []),
        ("delta", zeros(2, 24, 66), ["66", "67"]),
        ("A", zeros(23, 16), ["23", "24"]),
        ("B", zeros(2, 15, 67), ["15", "16"]),
        ("C", zeros(2, 5, 16, 67), ["5", "24"]),
        ("z", zeros(2, 23, 67), ["23", "24"]),
        ("dout", zeros(2, 24, 66), ["66", "67"]),
        ("dout", zeros(2, 24, 67, dtype=np.float16), ["float16", "float32"]),
        ("dlast_state", zeros(2, 24, 15), ["15", "16"]),
        ("dlast_state", zeros(2, 24, 16, dtype=np.complex64), ["complex64", "float32"]),
        ("initial_state", zeros(1, 24, 16), ["1", "2"]),
        ("chunk_states", zeros(2, 2, 24, 16), ["2", "3"]),
        ("chunk_states", zeros(2, 3, 24, 16, dtype=np.float64), ["float64", "float32"]),
        ("chunk_size", 0, ["1"]),
        ("chunk_size", 2.5, ["1"]),
        ("needs", ["x"], ["'x'"]),
    ],
)
def test_bad_argument(gradient_backend: Backend, name: str, bad: Any, words: list[str]) -> None:
    case = ScanCase()
    saved = {"chunk_states": zeros(2, 3, 24, 16), "chunk_size": 30}
    arguments = {**case.inputs(), **output_gradients(case), **saved, name: bad}
    with refuses("selective_scan_bwd", name, *words):
        gradient_backend.call(ops.selective_scan_bwd, **arguments)


@pytest.mark.cuda
def test_no_gradients_on_a_gpu() -> None:
    require_cuda()
    case = ScanCase()
    with pytest.raises(ssmcore.BackendError, match="selective_scan_bwd: there are no gradients"):
        BACKENDS["cuda"].call(ops.selective_scan_bwd, **case.inputs(), **output_gradients(case))
