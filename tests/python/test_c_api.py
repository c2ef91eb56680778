"""The C interface, called through ctypes: the operators and the model give what Python gives."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import c_interface as c
import numpy as np
import pytest
import reference
from cases import (
    BlockCase,
    ConvCase,
    ConvUpdateCase,
    LinearCase,
    NormCase,
    ScanCase,
    StateUpdateCase,
)
from helpers import assert_close, assert_same_bits
from model_fixtures import BUNDLED, golden

import ssmcore
from ssmcore import ops

CU_SEQLENS = np.array([0, 20, 20, 67], np.int32)


@pytest.fixture(scope="module")
def context() -> Iterator[ctypes.c_void_p]:
    handle = c.create("context_create", None)
    yield handle
    c.LIBRARY.ssmcore_context_destroy(handle)


@pytest.fixture(scope="module")
def model(context: ctypes.c_void_p) -> Iterator[ctypes.c_void_p]:
    handle = c.create("model_load", context, str(BUNDLED).encode(), None)
    yield handle
    c.LIBRARY.ssmcore_model_free(handle)


@pytest.fixture
def state(model: ctypes.c_void_p) -> Iterator[ctypes.c_void_p]:
    handle = c.create("state_create", model, ctypes.c_int64(1), None)
    yield handle
    c.LIBRARY.ssmcore_state_free(handle)


def test_version() -> None:
    assert c.LIBRARY.ssmcore_version().decode() == ssmcore.__version__


# --- Operators ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "token-major padded", "spread"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_scan_agrees_with_reference(context: ctypes.c_void_p, dtype: str, layout: str) -> None:
    inputs = ScanCase(dtype=dtype, layout=layout).inputs()
    out, last_state = np.empty_like(inputs["u"]), np.empty_like(inputs["initial_state"])
    c.call("selective_scan_fwd", context, **inputs, out=out, last_state=last_state)
    expected_out, expected_state = reference.selective_scan(**inputs)
    assert_close(out, expected_out, dtype)
    assert_close(last_state, expected_state, dtype)


def test_scan_with_slots(context: ctypes.c_void_p) -> None:
    inputs = ScanCase().inputs()
    expected_out, expected_state = ops.selective_scan(**inputs)
    states = inputs["initial_state"][::-1].copy()
    out, indices = np.empty_like(inputs["u"]), np.array([1, 0], np.int32)
    inputs["initial_state"] = states
    c.call(
        "selective_scan_fwd",
        context,
        **inputs,
        last_state=states,
        state_indices=indices,
        out=out,
    )
    assert_same_bits(out, expected_out)
    assert_same_bits(states[::-1], expected_state)


def test_packed_scan_with_chunk_states(context: ctypes.c_void_p) -> None:
    inputs = ScanCase(batch=1, initial_state=False).inputs()
    inputs["cu_seqlens"] = CU_SEQLENS
    expected = ops.selective_scan(**inputs, chunk_size=16, return_delta_sum=True)
    results = [np.empty_like(array) for array in expected]
    names = ("out", "last_state", "chunk_states", "delta_sum")
    outputs = dict(zip(names, results, strict=True))
    c.call("selective_scan_fwd", context, **inputs, **outputs, chunk_size=16)
    for result, array in zip(results, expected, strict=True):
        assert_same_bits(result, array)


@pytest.mark.parametrize("dtype", ["float64", "complex64"])
def test_scan_in_other_types(context: ctypes.c_void_p, dtype: str) -> None:
    inputs = ScanCase(B="constant", C="constant", initial_state=False).inputs()
    parameters = ("A", "B", "C") if dtype == "complex64" else tuple(inputs)
    for name in parameters:
        if isinstance(inputs[name], np.ndarray):
            inputs[name] = inputs[name].astype(dtype)
    out = np.empty_like(inputs["u"])
    c.call("selective_scan_fwd", context, **inputs, out=out)
    assert_same_bits(out, ops.selective_scan(**inputs, return_last_state=False))


def test_selective_state_update(context: ctypes.c_void_p) -> None:
    inputs = StateUpdateCase(state_indices=(4, -1, 2)).inputs()
    state, out = inputs["state"].copy(), np.empty_like(inputs["x"])
    c.call("selective_state_update", context, **{**inputs, "state": state}, out=out)
    assert_same_bits(out, ops.selective_state_update(**inputs))
    assert_same_bits(state, inputs["state"])


@pytest.mark.parametrize("sequences", ["rows", "packed", "numbered"])
def test_causal_conv1d(context: ctypes.c_void_p, sequences: str) -> None:
    case = ConvCase() if sequences == "rows" else ConvCase(batch=1, state_len=None)
    inputs = case.inputs()
    if sequences == "packed":
        inputs["cu_seqlens"] = CU_SEQLENS
    if sequences == "numbered":
        inputs["seq_idx"] = np.repeat(np.array([[0, -1, 5]], np.int32), (20, 7, 40), axis=1)
    expected = ops.causal_conv1d(**inputs)
    out = np.empty_like(expected)
    c.call("causal_conv1d_fwd", context, **{**inputs, "activation": 1}, out=out)
    assert_same_bits(out, expected)


def test_causal_conv1d_with_slots(context: ctypes.c_void_p) -> None:
    inputs = {**ConvCase().inputs(), "activation": None}
    expected, final_state = ops.causal_conv1d(**inputs, return_final_state=True)
    states = inputs["initial_state"][::-1].copy()
    out, indices = np.empty_like(expected), np.array([1, 0], np.int32)
    inputs |= {"initial_state": states, "final_state": states, "state_indices": indices}
    c.call("causal_conv1d_fwd", context, **inputs, out=out)
    assert_same_bits(out, expected)
    assert_same_bits(states[::-1], final_state)


@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_causal_conv1d_update(
    context: ctypes.c_void_p, circular: bool, activation: str | None
) -> None:
    case = ConvUpdateCase(tokens=2, state_len=5, activation=activation, state_indices=(4, 0, 2))
    inputs = case.inputs()
    if circular:
        inputs["cache_seqlens"] = np.array([3, 9, 0], np.int32)
    state, out = inputs["conv_state"].copy(), np.empty_like(inputs["x"])
    arguments = {**inputs, "conv_state": state, "activation": int(activation == "silu")}
    c.call("causal_conv1d_update", context, **arguments, out=out)
    assert_same_bits(out, ops.causal_conv1d_update(**inputs))
    assert_same_bits(state, inputs["conv_state"])


@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_rms_norm(context: ctypes.c_void_p, norm_before_gate: bool) -> None:
    inputs = NormCase(eps=0.25).inputs()
    inputs["z"] = inputs["residual"] * 0.5 + 1
    inputs |= {"group_size": 12, "norm_before_gate": norm_before_gate}
    out, residual_out = np.empty_like(inputs["x"]), np.empty_like(inputs["residual"])
    c.call("rms_norm_fwd", context, **inputs, out=out, residual_out=residual_out)
    expected_out, expected_residual = ops.rms_norm(**inputs)
    assert_same_bits(out, expected_out)
    assert_same_bits(residual_out, expected_residual)


def test_rms_norm_with_default_eps(context: ctypes.c_void_p) -> None:
    inputs = NormCase(residual_dtype=None, scale=1e-3).inputs()
    out = np.empty_like(inputs["x"])
    c.call("rms_norm_fwd", context, x=inputs["x"], weight=inputs["weight"], out=out)
    assert_same_bits(out, ops.rms_norm(inputs["x"], inputs["weight"], eps=1e-5))


def test_linear(context: ctypes.c_void_p) -> None:
    inputs = LinearCase().inputs()
    expected = ops.linear(**inputs)
    out = np.empty_like(expected)
    c.call("linear", context, **inputs, out=out)
    assert_same_bits(out, expected)


def test_embedding(context: ctypes.c_void_p) -> None:
    weight = np.arange(12, dtype=np.float32).reshape(4, 3)
    token_ids, out = np.array([3, 0, 3]), np.empty((3, 3), np.float32)
    c.call("embedding", context, token_ids=token_ids, weight=weight, out=out)
    assert_same_bits(out, weight[token_ids])


# Where a setting were mistaken for another, some row would draw another token.
SAMPLE_SETTINGS: dict[str, Any] = {
    "repetition_penalty": np.linspace(0.5, 4, 64, dtype=np.float32),
    "temperature": np.linspace(0.5, 2, 64, dtype=np.float32),
    "top_k": np.arange(64, dtype=np.int32),
    "top_p": np.linspace(1, 0.5, 64, dtype=np.float32),
    "min_p": np.linspace(0, 0.2, 64, dtype=np.float32),
    "seed": np.arange(64) * 3 + 1,
    "position": np.arange(64)[::-1].copy(),
    "history": np.arange(64 * 5).reshape(64, 5) % 40,
}


@pytest.mark.parametrize("names", [tuple(SAMPLE_SETTINGS), *((name,) for name in SAMPLE_SETTINGS)])
def test_sample(context: ctypes.c_void_p, names: tuple[str, ...]) -> None:
    logits = np.random.default_rng(0).normal(scale=2, size=(64, 40)).astype(np.float32)
    settings = {name: SAMPLE_SETTINGS[name] for name in names}
    out = np.empty(64, np.int64)
    c.call("sample", context, logits=logits, **settings, out=out)
    assert_same_bits(out, ops.sample(logits, **settings))


def block_arguments(case: BlockCase) -> tuple[np.ndarray, ctypes.Structure]:
    """A block's input, and its weights under the names of the C interface."""
    inputs = case.inputs()
    weights = inputs["weights"]
    renamed = {
        "in_proj": weights["in_proj.weight"],
        "in_proj_bias": weights["in_proj.bias"],
        "conv_weight": weights["conv1d.weight"][:, 0],
        "conv_bias": weights["conv1d.bias"],
        "x_proj": weights["x_proj.weight"],
        "dt_proj": weights["dt_proj.weight"],
        "dt_bias": weights["dt_proj.bias"],
        "A": -np.exp(weights["A_log"]),
        "D": weights["D"],
        "out_proj": weights["out_proj.weight"],
        "out_proj_bias": weights["out_proj.bias"],
    }
    struct = c.struct("mamba_block_weights", **renamed)
    struct.kept.append(renamed)
    return inputs["x"], struct


def test_mamba_block(context: ctypes.c_void_p) -> None:
    case = BlockCase(proj_bias=True)
    x, weights = block_arguments(case)
    states, expected_states = case.states(), case.states()
    expected = ops.mamba_block(**case.inputs(), **expected_states)
    slots = {name: state[::-1].copy() for name, state in states.items()}
    out, indices = np.empty_like(expected), np.array([1, 0], np.int32)
    arguments = {"weights": weights, "x": x, "out": out, "state_indices": indices, **slots}
    c.call("mamba_block_fwd", context, **arguments)
    assert_same_bits(out, expected)
    for name, state in slots.items():
        assert_same_bits(state[::-1], expected_states[name])


@pytest.mark.parametrize("dt_B_C_norm_eps", [0, 1e-6])
def test_packed_mamba_block(context: ctypes.c_void_p, dt_B_C_norm_eps: float) -> None:
    """Each packed sequence gives what it gives alone; the norms on Δ, B and C change it."""
    x, weights = block_arguments(BlockCase(batch=1, seqlen=67, proj_bias=True))
    packed, plain = np.empty_like(x), np.empty_like(x)
    c.call("mamba_block_fwd", context, weights=weights, x=x, out=plain)
    weights.dt_B_C_norm_eps = dt_B_C_norm_eps
    c.call("mamba_block_fwd", context, weights=weights, x=x, out=packed, cu_seqlens=CU_SEQLENS)
    for begin, end in ((0, 20), (20, 67)):
        alone = np.empty((1, end - begin, x.shape[2]), np.float32)
        c.call("mamba_block_fwd", context, weights=weights, x=x[:, begin:end].copy(), out=alone)
        assert_close(packed[:, begin:end], alone, "float32")
    assert np.allclose(packed[:, :20], plain[:, :20], rtol=1e-3) == (dt_B_C_norm_eps == 0)


def test_takes_a_dltensor(context: ctypes.c_void_p) -> None:
    """What NumPy exports over DLPack begins with a DLTensor, which is an ssmcore_tensor."""
    x = np.arange(12, dtype=np.float32).reshape(4, 3).T
    capsule = x.__dlpack__()
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    address = get_pointer(capsule, b"dltensor")
    weight, out = np.eye(4, dtype=np.float32), np.empty((3, 4), np.float32)
    dltensor = c.STRUCTS["ssmcore_tensor"].from_address(address)
    c.call("linear", context, x=dltensor, weight=weight, out=out)
    assert_same_bits(out, np.ascontiguousarray(x))


# --- The model ------------------------------------------------------------------------------------


def test_golden_text(
    context: ctypes.c_void_p, model: ctypes.c_void_p, state: ctypes.c_void_p
) -> None:
    prompt, greedy = golden()["prompt"].astype(np.int64), golden()["greedy"]
    all_logits = np.empty((1, len(prompt), 256), np.float32)
    c.call("model_prefill", model, token_ids=prompt[None], state=state, logits=all_logits)
    assert np.abs(all_logits[0] - golden()["logits_transformers"]).max() <= 5e-5

    logits = all_logits[:, -1].copy()
    temperature, token = np.zeros(1, np.float32), np.empty(1, np.int32)
    for expected in greedy:
        c.call("sample", context, logits=logits, temperature=temperature, out=token)
        assert token[0] == expected
        c.call("model_step", model, token_ids=token, state=state, logits=logits)


def test_logits_of_the_last_position_or_none(model: ctypes.c_void_p) -> None:
    prompts = np.stack([golden()["prompt"], golden()["prompt"][::-1]]).astype(np.int32)
    every, last, after = (np.empty((2, *n, 256), np.float32) for n in ((74,), (), ()))
    slots = np.array([2, 0], np.int32)
    states = [c.create("state_create", model, ctypes.c_int64(3), None) for _ in range(2)]
    arguments = {"token_ids": prompts, "state_indices": slots}
    c.call("model_prefill", model, **arguments, state=states[0], logits=every)
    c.call("model_prefill", model, **arguments, state=states[1])
    step = {"token_ids": prompts[:, 0].copy(), "state_indices": slots}
    for state, logits in zip(states, (last, after), strict=True):
        c.call("model_step", model, **step, state=state, logits=logits)
    assert_same_bits(last, after)
    assert not np.array_equal(last[0], last[1])

    c.LIBRARY.ssmcore_state_reset_slot(states[0], ctypes.c_int64(0), None)
    c.LIBRARY.ssmcore_state_reset_slot(states[0], ctypes.c_int64(2), None)
    c.call("model_prefill", model, **arguments, state=states[0], logits=last)
    assert_close(last, every[:, -1], "float32")
    for state in states:
        c.LIBRARY.ssmcore_state_free(state)


def test_packed_prompts(model: ctypes.c_void_p) -> None:
    prompt = golden()["prompt"].astype(np.int32)
    state = c.create("state_create", model, ctypes.c_int64(2), None)
    cu_seqlens, slots = np.array([0, 30, 74], np.int32), np.array([1, 0], np.int32)
    logits = np.empty((2, 256), np.float32)
    packed = {"token_ids": prompt[None], "cu_seqlens": cu_seqlens, "state_indices": slots}
    c.call("model_prefill", model, **packed, state=state, logits=logits)
    c.LIBRARY.ssmcore_state_free(state)
    for row, sequence in enumerate(np.split(prompt, [30])):
        alone, only = (
            np.empty((1, 256), np.float32),
            c.create("state_create", model, ctypes.c_int64(1), None),
        )
        c.call("model_prefill", model, token_ids=sequence[None], state=only, logits=alone)
        assert_close(logits[row], alone[0], "float32")
        c.LIBRARY.ssmcore_state_free(only)


def test_info(model: ctypes.c_void_p) -> None:
    info = c.struct("model_info")
    c.check(c.LIBRARY.ssmcore_model_get_info(model, ctypes.byref(info)))
    expected = ssmcore.load(device="cpu")
    assert info.num_parameters == expected.num_parameters
    for name in ("vocab_size", "d_model", "n_layer", "dim", "dstate"):
        assert getattr(info, name) == getattr(expected.config, name)
    assert ctypes.string_at(info.model_type) == b"mamba"


# --- What is refused ------------------------------------------------------------------------------


def test_refuses_operands_that_do_not_fit(context: ctypes.c_void_p) -> None:
    inputs = replace(ScanCase(), z=False).inputs()
    out = np.empty_like(inputs["u"])
    inputs["C"] = inputs["C"][:, :8]
    with c.fails(c.Status.INVALID_ARGUMENT, "selective_scan: C has dstate 8"):
        c.call("selective_scan_fwd", context, **inputs, out=out)
    with c.fails(c.Status.INVALID_ARGUMENT, "selective_scan: context is NULL"):
        c.call("selective_scan_fwd", ctypes.c_void_p(), **inputs, out=out)


def test_refuses_unknown_activation(context: ctypes.c_void_p) -> None:
    inputs = {**ConvCase().inputs(), "activation": 7}
    with c.fails(c.Status.INVALID_ARGUMENT, "causal_conv1d: activation is 7, expected 0"):
        c.call("causal_conv1d_fwd", context, **inputs, out=np.empty_like(inputs["x"]))


@pytest.mark.parametrize(
    ("name", "handle", "struct"),
    [
        (name[len("ssmcore_") : -len("_args")], "model" if "_model_" in name else "context", name)
        for name in c.STRUCTS
        if name.endswith("_args")
    ],
)
def test_every_call_refuses_no_arguments(
    request: pytest.FixtureRequest, name: str, handle: str, struct: str
) -> None:
    function = c.LIBRARY[f"ssmcore_{name}"]
    size_of = c.LIBRARY[f"ssmcore_{name}_workspace_size"]
    size = ctypes.c_size_t()
    owner = request.getfixturevalue(handle)
    empty = c.STRUCTS[struct](struct_size=ctypes.sizeof(c.STRUCTS[struct]))
    without_size = c.STRUCTS[struct]()
    for handle_given, args, words in (
        (None, ctypes.byref(empty), f"{handle} is NULL"),
        (owner, None, "args is NULL"),
        (owner, ctypes.byref(without_size), "args has struct_size 0"),
        (owner, ctypes.byref(empty), ""),
    ):
        with c.fails(c.Status.INVALID_ARGUMENT, words):
            c.check(function(handle_given, args, None, ctypes.c_size_t(0), None))
        if words:
            with c.fails(c.Status.INVALID_ARGUMENT, words):
                c.check(size_of(handle_given, args, ctypes.byref(size)))


def test_refuses_what_is_no_checkpoint(context: ctypes.c_void_p, tmp_path: Any) -> None:
    with c.fails(c.Status.NOT_FOUND, "nowhere"):
        c.create("model_load", context, str(tmp_path / "nowhere").encode(), None)
    (tmp_path / "config.json").write_text("[1, 2")
    with c.fails(c.Status.INVALID_CHECKPOINT, "config.json"):
        c.create("model_load", context, str(tmp_path).encode(), None)


def test_each_thread_has_its_own_error(context: ctypes.c_void_p) -> None:
    failed, compared = threading.Barrier(2), threading.Barrier(2)
    messages: dict[int, bytes] = {}

    def fail(count: int) -> None:
        c.LIBRARY.ssmcore_context_set_num_threads(context, ctypes.c_int32(count))
        failed.wait(10)
        messages[count] = c.LIBRARY.ssmcore_last_error()
        compared.wait(10)

    threads = [threading.Thread(target=fail, args=(count,)) for count in (-1, -2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert b"-1" in messages[-1]
    assert b"-2" in messages[-2]
