"""Training through the C interface: what it gives, and to the same bits, is what Python gives."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import c_interface as c
import numpy as np
import pytest
from helpers import assert_same_bits
from test_adamw import SETTINGS, tensors

import ssmcore
from ssmcore import ops

CONFIG = {
    "model_type": "mamba",
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "vocab_size": 256,
    "eos_token_id": None,
}


@pytest.fixture(scope="module")
def context() -> Iterator[ctypes.c_void_p]:
    handle = c.create("context_create", None)
    yield handle
    c.LIBRARY.ssmcore_context_destroy(handle)


def create_model(context: ctypes.c_void_p, seed: int = 5) -> ctypes.c_void_p:
    options = c.struct("model_options", trainable=1)
    config = json.dumps(CONFIG).encode()
    return c.create("model_create", context, config, ctypes.c_uint64(seed), ctypes.byref(options))


@pytest.fixture
def model(context: ctypes.c_void_p) -> Iterator[ctypes.c_void_p]:
    handle = create_model(context)
    yield handle
    c.LIBRARY.ssmcore_model_free(handle)


def create_trainer(model: ctypes.c_void_p, **options: Any) -> ctypes.c_void_p:
    given = c.struct("trainer_options", **options) if options else None
    return c.create("trainer_create", model, ctypes.byref(given) if given else None, None)


def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(step).integers(0, 50, (4, 17))
    return np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(ids[:, 1:].astype(np.int32))


def take_step(trainer: ctypes.c_void_p, step: int) -> ssmcore.TrainingStep:
    ids, targets = map(c.tensor, batch(step))
    result = c.struct("trainer_result")
    c.check(
        c.LIBRARY.ssmcore_trainer_step(
            trainer, ctypes.byref(ids), ctypes.byref(targets), ctypes.byref(result)
        )
    )
    return ssmcore.TrainingStep(result.step, result.loss, result.grad_norm, result.lr)


OPTIONS = [
    ({}, {}),
    (
        {"lr": 5e-3, "warmup_steps": 2, "total_steps": 4, "final_lr": 0.3, "micro_batch": 3},
        {"lr": 5e-3, "warmup_steps": 2, "total_steps": 4, "final_lr": 0.3, "micro_batch": 3},
    ),
    (
        {"weight_decay": -1.0, "max_grad_norm": -1.0, "beta1": 0.8, "beta2": 0.9, "eps": 1e-4},
        {"weight_decay": 0.0, "max_grad_norm": 0.0, "betas": (0.8, 0.9), "eps": 1e-4},
    ),
    ({"weight_decay": 0.5, "max_grad_norm": 0.2}, {"weight_decay": 0.5, "max_grad_norm": 0.2}),
]


@pytest.mark.parametrize("options, settings", OPTIONS)
def test_steps(
    tmp_path: Path, model: ctypes.c_void_p, options: dict[str, Any], settings: dict[str, Any]
) -> None:
    trainer = create_trainer(model, **options)
    expected = ssmcore.Trainer(ssmcore.create(24, 2, seed=5, device="cpu"), **settings)
    for step in range(1, 5):
        assert take_step(trainer, step) == expected.step(*batch(step))
    c.check(c.LIBRARY.ssmcore_model_save(model, str(tmp_path).encode()))
    c.LIBRARY.ssmcore_trainer_free(trainer)
    saved = ssmcore.load(tmp_path, trainable=True, device="cpu")
    for name, weight in expected.model.parameters.items():
        assert_same_bits(saved.parameters[name], weight)


def test_resumed_is_uninterrupted(tmp_path: Path, context: ctypes.c_void_p) -> None:
    models = [create_model(context, seed) for seed in (5, 6)]
    first, second = map(create_trainer, models)
    path = str(tmp_path / "state.safetensors").encode()
    take_step(first, 1)
    c.check(c.LIBRARY.ssmcore_trainer_save(first, path))
    c.check(c.LIBRARY.ssmcore_trainer_load(second, path))
    steps = ctypes.c_int64()
    c.check(c.LIBRARY.ssmcore_trainer_steps_taken(second, ctypes.byref(steps)))
    assert steps.value == 1
    for handle in models:  # which the trainers keep
        c.LIBRARY.ssmcore_model_free(handle)
    for step in (2, 3):
        assert take_step(second, step) == take_step(first, step)
    for handle in (first, second):
        c.LIBRARY.ssmcore_trainer_free(handle)


def test_what_fails(tmp_path: Path, model: ctypes.c_void_p, context: ctypes.c_void_p) -> None:
    with c.fails(c.Status.INVALID_ARGUMENT, "trainer: lr"):
        create_trainer(model, lr=-1.0)
    with c.fails(c.Status.INVALID_ARGUMENT, "trainer: model is NULL"):
        create_trainer(ctypes.c_void_p())
    with c.fails(c.Status.INVALID_CHECKPOINT, "hidden_size"):
        c.create("model_create", context, b'{"model_type": "mamba", "hidden_size": 0}', 0, None)
    trainer = create_trainer(model)
    with c.fails(c.Status.NOT_FOUND, "missing"):
        c.check(c.LIBRARY.ssmcore_trainer_load(trainer, str(tmp_path / "missing").encode()))
    with c.fails(c.Status.INVALID_ARGUMENT, "token_ids"):
        c.check(c.LIBRARY.ssmcore_trainer_step(trainer, None, None, None))
    parameter = c.struct("model_parameter")
    c.check(
        c.LIBRARY.ssmcore_model_get_parameter(model, ctypes.c_int64(0), ctypes.byref(parameter))
    )
    ctypes.cast(parameter.tensor.data, ctypes.POINTER(ctypes.c_float))[0] = float("nan")
    c.check(c.LIBRARY.ssmcore_model_refresh(model))
    with c.fails(
        c.Status.NOT_FINITE, "trainer: step 1: ", ctypes.string_at(parameter.name).decode()
    ):
        take_step(trainer, 1)
    c.LIBRARY.ssmcore_trainer_free(trainer)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_operators(context: ctypes.c_void_p, dtype: str) -> None:
    expected, actual = tensors((33, 7), dtype), tensors((33, 7), dtype)
    total = ops.sum_of_squares(expected["gradient"]).reshape(1)
    out = np.zeros(1)
    c.call_in_poison("sum_of_squares", context, x=actual["gradient"], out=out)
    assert_same_bits(out, total)
    ops.adamw(**expected, sum_of_squares=total, max_norm=1.0, **SETTINGS)
    settings = {**SETTINGS, "beta1": SETTINGS["betas"][0], "beta2": SETTINGS["betas"][1]}
    del settings["betas"]
    c.call("adamw", context, **actual, sum_of_squares=out, max_norm=1.0, **settings)
    for name, array in expected.items():
        assert_same_bits(actual[name], array)
