"""The published CUDA operators' results on small cases (see tests/data/README.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from backends import Backend
from helpers import DTYPES, assert_close

from ssmcore import ops

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "upstream_mamba1_ops.npz")

REAL_SCANS = (
    "scan_fp32",
    "scan_fp32_groups",
    "scan_fp32_plain",
    "scan_fp32_constB",
    "scan_fp32_constC",
    "scan_fp32_constBC",
    "scan_fp32_long",
    "scan_bf16",
    "scan_fp16",
)
COMPLEX_SCANS = ("scan_complex", "scan_complex_constBC")
CONVOLUTIONS = ("conv_w2", "conv_w3", "conv_w4", "conv_linear_nobias", "conv_states", "conv_bf16")

SCAN_ARRAYS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
ACTIVATIONS = {"u", "delta", "z", "x"}  # as well as B and C where they vary in time


def load(case: str) -> dict[str, Any]:
    """The tensors of a case by name."""
    prefix = f"{case}/"
    return {key.removeprefix(prefix): GOLDEN[key] for key in GOLDEN.files if key.startswith(prefix)}


def select(tensors: dict[str, Any], *names: str) -> dict[str, Any]:
    """The arguments `names`, where the case has them; activations in the case's dtype."""
    dtype = DTYPES[str(tensors.get("dtype", "float32"))]
    varying = {name for name in ("B", "C") if name in tensors and tensors[name].ndim > 2}
    return {
        name: tensors[name].astype(dtype) if name in ACTIVATIONS | varying else tensors[name]
        for name in names
        if name in tensors
    }


def scan_inputs(tensors: dict[str, Any]) -> dict[str, Any]:
    softplus = bool(tensors["delta_softplus"])
    return {**select(tensors, *SCAN_ARRAYS), "delta_softplus": softplus}


def true_last_state(tensors: dict[str, Any]) -> np.ndarray:
    """The state h; where B is constant, the published one leaves out the factor B."""
    constant_B = tensors["B"].ndim == 2
    return tensors["last_state"] * (tensors["B"] if constant_B else 1)


@pytest.mark.parametrize("case", [*REAL_SCANS, *COMPLEX_SCANS])
def test_selective_scan(backend: Backend, case: str) -> None:
    tensors = load(case)
    out, last_state = backend.call(ops.selective_scan, **scan_inputs(tensors))
    assert_close(out, tensors["out"], str(tensors["dtype"]), rounded=True)
    assert_close(last_state, true_last_state(tensors), "float32", rounded=True)


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_causal_conv1d(backend: Backend, case: str) -> None:
    tensors = load(case)
    activation = str(tensors["activation"])
    out, final_state = backend.call(
        ops.causal_conv1d,
        **select(tensors, "x", "weight", "bias"),
        activation=None if activation == "None" else activation,
        initial_state=tensors.get("initial_states"),
        return_final_state=True,
    )
    assert_close(out, tensors["out"], str(tensors["dtype"]), rounded=True)
    memory = tensors["weight"].shape[1] - 1
    expected_state = tensors.get("final_states", tensors["x"][..., -memory:])
    assert np.array_equal(final_state.astype(np.float32), expected_state)


def test_causal_conv1d_with_seq_idx(backend: Backend) -> None:
    tensors = load("conv_seq_idx")
    inputs = select(tensors, "x", "weight", "bias", "seq_idx")
    out = backend.call(ops.causal_conv1d, **inputs, activation=str(tensors["activation"]))
    assert_close(out, tensors["out"], "float32", rounded=True)


def test_causal_conv1d_update(backend: Backend) -> None:
    tensors = load("conv_update")
    state = backend.to_device(tensors["conv_state"].copy())
    inputs = select(tensors, "x", "weight", "bias")
    out = backend.call(ops.causal_conv1d_update, **inputs, conv_state=state, activation="silu")
    assert_close(out, tensors["out"], "float32", rounded=True)
    assert np.array_equal(backend.to_numpy(state), tensors["conv_state_after"])


@pytest.mark.parametrize("case", ["state_update", "state_update_heads"])
def test_selective_state_update(backend: Backend, case: str) -> None:
    tensors = load(case)
    state = backend.to_device(tensors["state"].copy())
    inputs = select(tensors, "x", "dt", "A", "B", "C", "D", "z", "dt_bias")
    out = backend.call(ops.selective_state_update, **inputs, state=state, dt_softplus=True)
    assert_close(out, tensors["out"], "float32", rounded=True)
    assert_close(backend.to_numpy(state), tensors["state_after"], "float32", rounded=True)


def block_inputs(tensors: dict[str, Any]) -> dict[str, Any]:
    parameters = {k.removeprefix("p."): v for k, v in tensors.items() if k.startswith("p.")}
    return {"x": tensors["x"], "weights": parameters}


def test_mamba_block(backend: Backend) -> None:
    tensors = load("mamba_block")
    out = backend.call(ops.mamba_block, **block_inputs(tensors))
    assert_close(out, tensors["out"], "float32", rounded=True)


# --- The references themselves, which every other test relies on ----------------------------------


@pytest.mark.parametrize("case", [*REAL_SCANS, *COMPLEX_SCANS])
def test_reference_scan(case: str) -> None:
    tensors = load(case)
    out, last_state = reference.selective_scan(**scan_inputs(tensors))
    assert_close(out, tensors["out"], str(tensors["dtype"]), rounded=True)
    assert_close(last_state, true_last_state(tensors), "float32", rounded=True)


def test_reference_heads() -> None:
    tensors = load("state_update_heads")
    inputs = select(tensors, "state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")
    out, state = reference.selective_state_update(**inputs, dt_softplus=True)
    assert_close(out, tensors["out"], "float32", rounded=True)
    assert_close(state, tensors["state_after"], "float32", rounded=True)


def test_reference_convolution_with_seq_idx() -> None:
    tensors = load("conv_seq_idx")
    inputs = select(tensors, "x", "weight", "bias", "seq_idx")
    out = reference.causal_conv1d_numbered(**inputs, activation=str(tensors["activation"]))
    assert_close(out, tensors["out"], "float32", rounded=True)


def test_every_case_is_tested() -> None:
    cases = {key.split("/")[0] for key in GOLDEN.files}
    others = {"conv_seq_idx", "conv_update", "state_update", "state_update_heads", "mamba_block"}
    assert cases == {*REAL_SCANS, *COMPLEX_SCANS, *CONVOLUTIONS, *others}


def test_reference_block() -> None:
    tensors = load("mamba_block")
    out, _, _ = reference.mamba_block(**block_inputs(tensors))
    assert_close(out, tensors["out"], "float32", rounded=True)
