"""The scan's backward through the C interface, which has more forms of it than Python: gradients
that are added to, states in slots, and the caller's workspace."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import c_interface as c
import numpy as np
import pytest
from cases import ScanCase, rows
from helpers import LAYOUTS, assert_close, assert_only_poison_around, assert_same_bits, place
from scan_gradients import output_gradients

from ssmcore import ops

CASES = rows(
    ScanCase(),
    batch=(1, 9),
    dim=(1, 150),
    seqlen=(1, 130),
    dstate=(1, 5),
    dtype=("bfloat16", "float16", "float64"),
    A=("complex",),
    B=("constant", "3 groups"),
    C=("constant", "3 groups"),
    z=(False,),
    layout=LAYOUTS,
)


@pytest.fixture(scope="module")
def context() -> Iterator[ctypes.c_void_p]:
    handle = c.create("context_create", None)
    yield handle
    c.LIBRARY.ssmcore_context_destroy(handle)


def gradients_of(arguments: dict[str, Any]) -> dict[str, np.ndarray]:
    made = ops.selective_scan_bwd(**arguments)._asdict()
    return {name: gradient for name, gradient in made.items() if gradient is not None}


@pytest.mark.parametrize("case", CASES)
def test_writes_every_element_and_nothing_else(context: ctypes.c_void_p, case: ScanCase) -> None:
    """In poisoned outputs, with poison around them, and in a workspace of NaN."""
    arguments = {**case.inputs(), **output_gradients(case)}
    expected = gradients_of(arguments)
    layouts = {"contiguous": "padded", "token-major": "token-major padded"}
    layout = layouts.get(case.layout, case.layout)
    outputs = {name: place(np.full_like(g, np.nan), layout) for name, g in expected.items()}
    gradients = {name: c.gradient(output) for name, output in outputs.items()}
    c.call_in_poison("selective_scan_bwd", context, **arguments, **gradients)
    for name, output in outputs.items():
        assert np.array_equal(output, expected[name])
        assert_only_poison_around(output)


@pytest.mark.parametrize("case", CASES)
def test_adds_to_what_is_there(context: ctypes.c_void_p, case: ScanCase) -> None:
    arguments = {**case.inputs(), **output_gradients(case)}
    expected = gradients_of(arguments)
    generator = np.random.default_rng(2)
    there = {
        name: place(generator.standard_normal(g.shape).astype(g.dtype), case.layout)
        for name, g in expected.items()
    }
    outputs = {name: array.copy(order="K") for name, array in there.items()}
    gradients = {name: c.gradient(o, accumulate=True) for name, o in outputs.items()}
    c.call_in_poison("selective_scan_bwd", context, **arguments, **gradients)
    for name, gradient in expected.items():
        dtype = "float32" if gradient.dtype == np.complex64 else gradient.dtype.name
        wide = np.promote_types(gradient.dtype, np.float64 if dtype == "float64" else np.float32)
        total = gradient.astype(wide) + there[name].astype(wide)
        assert_close(outputs[name], total, dtype, rounded=dtype != "float64")


def test_adds_only_where_asked(context: ctypes.c_void_p) -> None:
    case = ScanCase()
    arguments = {**case.inputs(), **output_gradients(case)}
    expected = gradients_of(arguments)
    for added in expected:
        outputs = {name: np.ones_like(gradient) for name, gradient in expected.items()}
        gradients = {n: c.gradient(o, accumulate=n == added) for n, o in outputs.items()}
        c.call("selective_scan_bwd", context, **arguments, **gradients)
        for name, output in outputs.items():
            if name != added:
                assert_same_bits(output, expected[name])
        assert_close(outputs[added], expected[added] + np.float32(1), "float32")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_states_in_slots(context: ctypes.c_void_p, packed: bool, dtype: str) -> None:
    """Row b uses slot slots[b] of all states; a negative one begins and ends with nothing."""
    slots = np.array([3, -1, 0], np.int32)
    case = ScanCase(batch=1 if packed else 3, dtype=dtype)
    arguments = {**case.inputs(), **output_gradients(case)}
    if packed:
        arguments["cu_seqlens"] = np.array([0, 20, 50, 67], np.int32)
    generator = np.random.default_rng(3)
    many = generator.standard_normal((2, 5, case.dim, case.dstate)).astype(dtype)
    own = many[:, slots]
    own[:, 1] = 0
    arguments.update(initial_state=own[0], dlast_state=own[1])
    expected = gradients_of(arguments)

    outputs = {name: np.full_like(gradient, np.nan) for name, gradient in expected.items()}
    outputs["dinitial_state"] = np.full_like(many[0], np.nan)
    arguments.update(initial_state=many[0], dlast_state=many[1], state_indices=slots)
    gradients = {name: c.gradient(output) for name, output in outputs.items()}
    c.call_in_poison("selective_scan_bwd", context, **arguments, **gradients)
    of_slots = outputs.pop("dinitial_state")
    assert_same_bits(of_slots[[3, 0]], expected["dinitial_state"][[0, 2]])
    assert np.isnan(of_slots[[1, 2, 4]]).all()
    for name, output in outputs.items():
        assert_same_bits(output, expected[name])


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "words"),
    [
        ("du", (2, 24, 66), "float32", ["du", "66", "67"]),
        ("du", (2, 24), "float32", ["du", "(2, 24)", "seqlen 67"]),
        ("ddelta", (2, 24, 67), "float64", ["ddelta", "float64", "float32"]),
        ("dA", (24, 15), "float32", ["dA", "15", "16"]),
        ("dB", (2, 1, 16, 67), "float32", ["dB", "(2, 1, 16, 67)", "dstate 16"]),
        ("dC", (3, 16, 67), "float32", ["dC", "3", "2"]),
        ("dD", (24,), "float16", ["dD", "float16", "float32"]),
        ("dz", (2, 24, 67), "float32", ["dz", "z is missing"]),
        ("ddelta_bias", (25,), "float32", ["ddelta_bias", "25", "24"]),
        ("dinitial_state", (2, 24, 16), "complex64", ["dinitial_state", "complex64"]),
    ],
)
def test_bad_gradient(
    context: ctypes.c_void_p, name: str, shape: tuple[int, ...], dtype: str, words: list[str]
) -> None:
    case = ScanCase(z=False)
    arguments = {
        **case.inputs(),
        **output_gradients(case),
        name: c.gradient(np.zeros(shape, dtype)),
    }
    with c.fails(c.Status.INVALID_ARGUMENT, "selective_scan_bwd", *words):
        c.call("selective_scan_bwd", context, **arguments)


def test_gradients_overlap_nothing(context: ctypes.c_void_p) -> None:
    case = ScanCase()
    arguments = {**case.inputs(), **output_gradients(case)}
    with c.fails(c.Status.INVALID_ARGUMENT, "selective_scan_bwd", "du", "overlaps dout"):
        c.call("selective_scan_bwd", context, **arguments, du=c.gradient(arguments["dout"]))
    same = c.gradient(np.zeros_like(arguments["u"]))
    with c.fails(c.Status.INVALID_ARGUMENT, "selective_scan_bwd", "du", "overlaps ddelta"):
        c.call("selective_scan_bwd", context, **arguments, du=same, ddelta=same)
    broadcast = np.broadcast_to(np.zeros(1, np.float32), arguments["u"].shape)
    with c.fails(c.Status.INVALID_ARGUMENT, "selective_scan_bwd", "dz", "overlap"):
        c.call("selective_scan_bwd", context, **arguments, dz=c.gradient(broadcast))
