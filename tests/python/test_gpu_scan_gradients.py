"""The scan's backward on a GPU: into memory that is there already, from states in slots, and in
more steps than are kept at a time."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import reference_gradients
from backends import BACKENDS, Backend, require_cuda
from cases import ScanCase
from gradients import random_like
from helpers import assert_close, assert_only_poison_around, assert_same_bits, place, refuses
from scan_gradients import (
    Arrays,
    assert_all_close,
    backward,
    output_gradients,
    saved_states,
    tolerance,
)
from sequences import boundaries, scan_steps

import ssmcore
from ssmcore import _core, ops
from ssmcore._outputs import library_of

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def cuda() -> Backend:
    require_cuda()
    return BACKENDS["cuda"]


def arguments_of(case: ScanCase) -> Arrays:
    return {**case.inputs(), **output_gradients(case)}


def written(
    cuda: Backend, arguments: Arrays, outputs: Arrays, accumulate: Collection[str] = ()
) -> Arrays:
    """What the backward leaves in gradients that hold `outputs`."""
    moved, gradients = (
        {n: cuda.to_device(v) if isinstance(v, np.ndarray) else v for n, v in arrays.items()}
        for arrays in (arguments, outputs)
    )
    on = library_of(moved["u"]).on()
    _core.selective_scan_bwd(
        on=on, chunk_size=0, **moved, **gradients, accumulate=tuple(accumulate)
    )
    ssmcore.synchronize(moved["u"])
    return {name: cuda.to_numpy(gradient) for name, gradient in gradients.items()}


# --- Memory that is there already -----------------------------------------------------------------


@pytest.mark.parametrize("layout", ["padded", "token-major padded", "spread"])
@pytest.mark.parametrize(
    "case",
    [
        ScanCase(),
        ScanCase(dtype="bfloat16", dim=150),
        ScanCase(A="complex", C="constant"),
        ScanCase(dtype="float64", B="constant"),
        ScanCase(dstate=100, B="3 groups"),
    ],
)
def test_writes_every_element_and_nothing_else(cuda: Backend, case: ScanCase, layout: str) -> None:
    arguments = arguments_of(case)
    expected = backward(cuda, **arguments)
    poisoned = {name: place(np.full_like(g, np.nan), layout) for name, g in expected.items()}
    for name, gradient in written(cuda, arguments, poisoned).items():
        assert np.array_equal(gradient, expected[name]), name
        assert_only_poison_around(gradient)


@pytest.mark.parametrize("layout", ["contiguous", "token-major", "spread"])
@pytest.mark.parametrize("A", ["real", "complex"])
@pytest.mark.parametrize("form", ["constant", "shared", "3 groups"])
def test_adds_where_asked(cuda: Backend, form: str, A: str, layout: str) -> None:
    case = ScanCase(A=A, B=form, C=form)
    arguments = arguments_of(case)
    expected = backward(cuda, **arguments)
    there = {n: random_like(g, seed=2, layout=layout) for n, g in expected.items()}
    for added in ({*expected}, {"dA", "du", "dB"}, {"dC", "dinitial_state", "dD"}):
        for name, gradient in written(cuda, arguments, there, added).items():
            before = there[name] if name in added else 0
            assert_close(gradient, expected[name] + before, "float32")


# --- Slots ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_states_in_slots(cuda: Backend, packed: bool, dtype: str) -> None:
    """Row b uses slot slots[b] of all states; a negative one begins and ends with nothing."""
    slots = np.array([3, -1, 0], np.int32)
    case = ScanCase(batch=1 if packed else 3, dtype=dtype)
    arguments = arguments_of(case)
    if packed:
        arguments["cu_seqlens"] = np.array([0, 20, 50, 67], np.int32)
    generator = np.random.default_rng(3)
    many = generator.standard_normal((2, 5, case.dim, case.dstate)).astype(dtype)
    own = many[:, slots]
    own[:, 1] = 0
    arguments.update(initial_state=own[0], dlast_state=own[1])
    expected = backward(cuda, **arguments)

    outputs = {name: np.full_like(gradient, np.nan) for name, gradient in expected.items()}
    outputs["dinitial_state"] = np.full_like(many[0], np.nan)
    arguments.update(initial_state=many[0], dlast_state=many[1], state_indices=slots)
    gradients = written(cuda, arguments, outputs)
    of_slots = gradients.pop("dinitial_state")
    assert_same_bits(of_slots[[3, 0]], expected["dinitial_state"][[0, 2]])
    assert np.isnan(of_slots[[1, 2, 4]]).all()
    for name, gradient in gradients.items():
        assert_same_bits(gradient, expected[name])


@pytest.mark.parametrize("slots", [[0, 5], [3, 3]])
@pytest.mark.parametrize("state", ["initial_state", "dlast_state"])
def test_bad_slots(cuda: Backend, state: str, slots: list[int]) -> None:
    arguments = arguments_of(ScanCase())
    arguments.update(initial_state=None, dlast_state=None)
    arguments[state] = np.ones((5, 24, 16), np.float32)
    arguments["state_indices"] = np.array(slots, np.int32)
    with refuses("state_indices"):
        written(cuda, arguments, {"du": np.zeros_like(arguments["u"])})


@pytest.mark.parametrize("cu_seqlens", [[0, 70, 67], [1, 20, 67], [0, 30, 20, 67], [0, 20, 60]])
def test_bad_boundaries(cuda: Backend, cu_seqlens: list[int]) -> None:
    arguments = arguments_of(ScanCase(batch=1, initial_state=False))
    arguments.update(dlast_state=None, cu_seqlens=np.array(cu_seqlens, np.int32))
    with refuses("cu_seqlens"):
        backward(cuda, **arguments)


# --- More steps than are kept at a time -----------------------------------------------------------

# With so many states a few hundred steps are more than one segment.
MANY = {
    "real": ScanCase(batch=1, dim=512, seqlen=300, dstate=256),
    "complex": ScanCase(batch=1, dim=256, seqlen=300, dstate=256, A="complex"),
}


@pytest.mark.parametrize("chunk_size", [None, 32, 33])
@pytest.mark.parametrize("A", ["real", "complex"])
def test_segments(cuda: Backend, A: str, chunk_size: int | None) -> None:
    inputs = MANY[A].inputs()
    saved = saved_states(cuda, inputs, chunk_size)
    inputs.update(output_gradients(MANY[A]))
    expected = reference_gradients.selective_scan_bwd(**inputs)
    assert_all_close(backward(cuda, **inputs, **saved), expected, inputs)


@pytest.mark.parametrize("lengths", [[100, 0, 37, 1, 162], [240, 60], [0, 128, 0, 172], [1, 299]])
@pytest.mark.parametrize("A", ["real", "complex"])
def test_packed_in_segments(cuda: Backend, A: str, lengths: list[int]) -> None:
    several = replace(MANY[A], batch=len(lengths))
    inputs, outputs = MANY[A].inputs(), output_gradients(MANY[A])
    inputs["initial_state"] = states = several.inputs()["initial_state"]
    outputs["dlast_state"] = output_gradients(several)["dlast_state"]
    cu_seqlens = boundaries(lengths)
    packed = backward(cuda, **inputs, **outputs, cu_seqlens=cu_seqlens)
    sums: dict[str, Any] = {"dA": 0, "dD": 0, "ddelta_bias": 0}
    for s, (begin, end) in enumerate(pairwise(cu_seqlens)):
        row = slice(s, s + 1)
        if begin == end:
            assert_same_bits(packed["dinitial_state"][row], outputs["dlast_state"][row])
            continue
        steps = {**scan_steps(inputs, begin, end), "initial_state": states[row]}
        steps.update(dout=outputs["dout"][..., begin:end], dlast_state=outputs["dlast_state"][row])
        alone = backward(cuda, **steps)
        assert_same_bits(alone["dinitial_state"], packed["dinitial_state"][row])
        for name in ("du", "ddelta", "dB", "dC", "dz"):
            parts = alone[name].shape[-1] // (end - begin)
            mine = packed[name][..., parts * begin : parts * end]
            assert np.array_equal(mine, alone[name]), name
        for name in sums:
            sums[name] = sums[name] + alone[name]
    for name, total in sums.items():
        assert_close(packed[name], total, tolerance(packed[name].dtype, packed["du"].dtype))


def test_too_many_states(cuda: Backend) -> None:
    with pytest.raises(ssmcore.BackendError, match="selective_scan_bwd: dstate is 257"):
        cuda.call(ops.selective_scan_bwd, **arguments_of(ScanCase(dim=3, seqlen=2, dstate=257)))
