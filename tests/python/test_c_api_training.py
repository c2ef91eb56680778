"""Training through the C interface gives what Python gives."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import c_interface as c
import numpy as np
import pytest
from helpers import assert_close, assert_same_bits
from model_fixtures import BUNDLED, DATA

import ssmcore


@pytest.fixture(scope="module")
def context() -> Iterator[ctypes.c_void_p]:
    handle = c.create("context_create", None)
    yield handle
    c.LIBRARY.ssmcore_context_destroy(handle)


@pytest.fixture
def model(context: ctypes.c_void_p) -> Iterator[ctypes.c_void_p]:
    options = c.struct("model_options", trainable=1)
    handle = c.create("model_load", context, str(BUNDLED).encode(), ctypes.byref(options))
    yield handle
    c.LIBRARY.ssmcore_model_free(handle)


@pytest.fixture(scope="module")
def step() -> dict[str, np.ndarray]:
    text = np.frombuffer((DATA / "val_kjv.txt").read_bytes()[:122], np.uint8).reshape(2, 61)
    return {"token_ids": text[:, :-1].astype(np.int64), "targets": text[:, 1:].astype(np.int32)}


def named(gradients: dict[str, tuple[np.ndarray, bool]]) -> dict[str, Any]:
    """The fields of the arguments that name gradients and whether they are added to."""
    kind = c.STRUCTS["ssmcore_named_gradient"]
    entries = (kind * len(gradients))()
    entries.kept = []  # what their pointers point to
    for entry, (name, (array, accumulate)) in zip(entries, gradients.items(), strict=True):
        text, tensor = ctypes.create_string_buffer(name.encode()), c.tensor(array)
        entries.kept += [text, tensor]
        entry.name, entry.tensor = ctypes.addressof(text), ctypes.pointer(tensor)
        entry.accumulate = accumulate
    return {"gradients": entries, "num_gradients": len(gradients)}


def parameter(model: ctypes.c_void_p, index: int) -> tuple[str, np.ndarray]:
    """Its name, and its memory as an array."""
    info = c.struct("model_parameter")
    get = c.LIBRARY.ssmcore_model_get_parameter
    c.check(get(model, ctypes.c_int64(index), ctypes.byref(info)))
    shape = ctypes.cast(info.tensor.shape, ctypes.POINTER(ctypes.c_int64))[: info.tensor.ndim]
    values = ctypes.cast(info.tensor.data, ctypes.POINTER(ctypes.c_float))
    return ctypes.string_at(info.name).decode(), np.ctypeslib.as_array(values, tuple(shape))


def parameters(model: ctypes.c_void_p) -> dict[str, np.ndarray]:
    count = ctypes.c_int64()
    c.check(c.LIBRARY.ssmcore_model_num_parameters(model, ctypes.byref(count)))
    return dict(parameter(model, index) for index in range(count.value))


def test_parameters(model: ctypes.c_void_p) -> None:
    expected = ssmcore.load(trainable=True).parameters
    given = parameters(model)
    assert set(given) == set(expected)
    for name, array in expected.items():
        assert_same_bits(given[name], array)
    for index in (-1, len(expected)):
        with c.fails(c.Status.INVALID_ARGUMENT, f"model_get_parameter: index is {index}"):
            parameter(model, index)


@pytest.mark.parametrize("recompute_layers", [0, 1])
def test_loss_and_gradients(
    model: ctypes.c_void_p, step: dict[str, np.ndarray], recompute_layers: int
) -> None:
    expected_loss, expected = ssmcore.load().loss_and_gradients(**step)
    loss = np.empty(1, np.float32)
    gradients = {name: (np.full_like(array, np.nan), False) for name, array in expected.items()}
    added = "backbone.layers.0.mixer.A_log"
    gradients[added] = (np.ones_like(expected[added]), True)
    c.call(
        "model_loss_and_gradients",
        model,
        **step,
        loss=loss,
        recompute_layers=recompute_layers,
        **named(gradients),
    )
    assert loss[0] == np.float32(expected_loss)
    for name, (array, accumulate) in gradients.items():
        if accumulate:
            assert_close(array, expected[name] + np.float32(1), "float32", rounded=True)
        else:
            assert_same_bits(array, expected[name])


def test_packed(model: ctypes.c_void_p, step: dict[str, np.ndarray]) -> None:
    packed = {name: array.reshape(1, -1) for name, array in step.items()}
    cu_seqlens = np.array([0, 60, 60, 120], np.int32)
    loss = np.empty(1, np.float32)
    c.call("model_loss_and_gradients", model, **packed, cu_seqlens=cu_seqlens, loss=loss)
    assert loss[0] == pytest.approx(ssmcore.load().loss_and_gradients(**step)[0], rel=1e-6)
    c.call(
        "model_loss_and_gradients",
        model,
        **packed,
        cu_seqlens=cu_seqlens,
        loss=loss,
        num_targets=240,
    )
    assert 2 * loss[0] == pytest.approx(ssmcore.load().loss_and_gradients(**step)[0], rel=1e-6)


def test_the_model_follows_its_parameters(
    model: ctypes.c_void_p, step: dict[str, np.ndarray]
) -> None:
    def loss() -> float:
        result = np.empty(1, np.float32)
        c.call("model_loss_and_gradients", model, **step, loss=result)
        return float(result[0])

    before = loss()
    scale = parameters(model)["backbone.norm_f.weight"]
    scale *= 0.5
    c.check(c.LIBRARY.ssmcore_model_refresh(model))
    other = ssmcore.load(trainable=True)
    other.parameters["backbone.norm_f.weight"][...] *= 0.5
    other.refresh()
    assert loss() == pytest.approx(other.loss_and_gradients(**step)[0], rel=1e-6)
    assert loss() > before + 0.1


def test_refuses_bad_gradients(model: ctypes.c_void_p, step: dict[str, np.ndarray]) -> None:
    loss = np.empty(1, np.float32)
    with c.fails(c.Status.INVALID_ARGUMENT, "loss_and_gradients: gradients is NULL"):
        c.call("model_loss_and_gradients", model, **step, loss=loss, num_gradients=1)
    with c.fails(c.Status.INVALID_ARGUMENT, "loss_and_gradients", "no.such"):
        gradients = named({"no.such": (np.empty(3, np.float32), False)})
        c.call("model_loss_and_gradients", model, **step, loss=loss, **gradients)
    with c.fails(c.Status.INVALID_ARGUMENT, "loss_and_gradients: loss is missing"):
        c.call("model_loss_and_gradients", model, **step)
