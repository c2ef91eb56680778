"""What the tests of the scan's backward share."""

from __future__ import annotations

from typing import Any

import numpy as np
import reference_gradients
from backends import Backend
from cases import ScanCase
from helpers import DTYPES, assert_close

from ssmcore import ops

Arrays = dict[str, Any]


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
        assert_close(mine, gradient, tolerance(of.dtype, inputs["u"].dtype))


def tolerance(dtype: np.dtype, activations: np.dtype) -> str:
    """Of bfloat16 activations a GPU keeps the states of a sum over time as float16."""
    if activations.name == "bfloat16":
        return "bfloat16"
    return "float32" if dtype == np.complex64 else dtype.name


def assert_agrees(backend: Backend, case: ScanCase) -> None:
    inputs = {**case.inputs(), **output_gradients(case)}
    expected = reference_gradients.selective_scan_bwd(**inputs)
    assert_all_close(backward(backend, **inputs), expected, inputs)


def saved_states(backend: Backend, inputs: Arrays, chunk_size: int | None) -> Arrays:
    if chunk_size is None:
        return {}
    *_, states = backend.call(ops.selective_scan, **inputs, chunk_size=chunk_size)
    return {"chunk_states": states, "chunk_size": chunk_size}
