"""Training steps on a GPU, beside those on the CPU."""

import numpy as np
import pytest
import torch
from backends import require_cuda
from helpers import assert_same_bits, relative_error
from model_fixtures import DATA
from transformers_models import make_falcon, make_model, random_ids

import ssmcore

pytestmark = pytest.mark.cuda

IGNORED = -100
TOLERANCE = {"float32": 1e-4, "bfloat16": 6e-2, "float16": 1e-2}


@pytest.fixture(autouse=True)
def _gpu():
    require_cuda()


@pytest.fixture(scope="module")
def batch():
    """(2, 300) bytes of held-out prose, and what follows each; some of it not asked."""
    text = np.frombuffer((DATA / "val_austen.txt").read_bytes()[:602], np.uint8)
    windows = text.reshape(2, 301).astype(np.int64)
    targets = windows[:, 1:].copy()
    targets[0, 5:20] = IGNORED
    return np.ascontiguousarray(windows[:, :-1]), targets


def as_numpy(gradients):
    return {name: np.asarray(gradient.numpy()) for name, gradient in gradients.items()}


def assert_agrees(actual, expected, tolerance=1e-4):
    loss, gradients = actual
    expected_loss, expected_gradients = expected
    assert loss == pytest.approx(expected_loss, rel=tolerance)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        error = relative_error(np.asarray(gradients[name].numpy()), gradient)
        assert error <= tolerance, f"{name}: error {error:.3g}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("recompute_layers", [False, True])
def test_gradients_are_those_of_the_cpu(batch, dtype, recompute_layers):
    expected = ssmcore.load(device="cpu").loss_and_gradients(*batch)
    model = ssmcore.load(device="cuda", dtype=dtype, trainable=True)
    actual = model.loss_and_gradients(*batch, recompute_layers=recompute_layers)
    assert_agrees(actual, expected, TOLERANCE[dtype])


VARIATIONS = [
    {},
    {"hidden_size": 33, "expand": 3},
    {"use_bias": True},
    {"use_conv_bias": False},
    {"tie_word_embeddings": False},
]


@pytest.mark.parametrize("changes", VARIATIONS, ids=str)
@pytest.mark.parametrize("make", [make_model, make_falcon], ids=["mamba", "falcon_mamba"])
def test_every_kind_of_model(tmp_path, make, changes):
    model = make(**changes)
    model.save_pretrained(tmp_path)
    ids = random_ids(model, 2, 21).numpy()
    inputs, targets = ids[:, :-1].copy(), ids[:, 1:].copy()
    expected = ssmcore.load(tmp_path, device="cpu").loss_and_gradients(inputs, targets)
    for trainable in (False, True):
        on_gpu = ssmcore.load(tmp_path, device="cuda", dtype="float32", trainable=trainable)
        assert_agrees(on_gpu.loss_and_gradients(inputs, targets), expected)


def test_ids_of_the_gpu_and_gradients_of_torch(batch):
    model = ssmcore.load(device="cuda", dtype="float32")
    expected = model.loss_and_gradients(*batch)
    inputs, targets = (torch.from_numpy(array).cuda() for array in batch)
    actual = model.loss_and_gradients(inputs, targets)
    assert actual[0] == expected[0]
    for name, gradient in as_numpy(expected[1]).items():
        assert_same_bits(as_numpy(actual[1])[name], gradient)
    there = {name: torch.ones(g.shape, device="cuda") for name, g in expected[1].items()}
    model.loss_and_gradients(inputs, targets, gradients=there)
    for name, gradient in as_numpy(expected[1]).items():
        assert relative_error(there[name].cpu().numpy(), gradient + 1) < 2e-5, name


def test_runs_are_the_same_to_the_bit(batch):
    model = ssmcore.load(device="cuda", dtype="bfloat16", trainable=True)
    (loss, once), (loss_again, again) = (model.loss_and_gradients(*batch) for _ in range(2))
    assert loss == loss_again
    for name, gradient in as_numpy(once).items():
        assert_same_bits(as_numpy(again)[name], gradient)


def test_packed_sequences_are_separate_ones(batch):
    inputs, targets = (array.reshape(-1) for array in batch)
    ends = [0, 17, 17, 300, 600]
    model = ssmcore.load(device="cuda", dtype="float32")
    actual = model.loss_and_gradients(inputs, targets, cu_seqlens=ends)
    expected = ssmcore.load(device="cpu").loss_and_gradients(inputs, targets, cu_seqlens=ends)
    assert_agrees(actual, expected)


def test_parts_of_a_batch_add_up(batch):
    inputs, targets = batch
    model = ssmcore.load(device="cuda", dtype="float32")
    loss, whole = model.loss_and_gradients(inputs, targets)
    asked = int(np.count_nonzero(targets != IGNORED))
    parts = {name: torch.zeros(g.shape, device="cuda") for name, g in whole.items()}
    losses = [
        model.loss_and_gradients(
            inputs[b : b + 1], targets[b : b + 1], gradients=parts, num_targets=asked
        )[0]
        for b in range(2)
    ]
    assert sum(losses) == pytest.approx(loss, rel=1e-5)
    for name, gradient in as_numpy(whole).items():
        assert relative_error(parts[name].cpu().numpy(), gradient) < 2e-5, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_follows_what_is_written_and_saves_it(tmp_path, batch, dtype):
    model = ssmcore.load(device="cuda", dtype=dtype, trainable=True)
    loss, gradients = model.loss_and_gradients(*batch)
    for name, parameter in model.parameters.items():
        torch.from_dlpack(parameter).sub_(torch.from_dlpack(gradients[name]), alpha=0.02)
    model.refresh()
    better = model.loss_and_gradients(*batch)[0]
    assert better < loss - 1e-3
    ssmcore.save(model, tmp_path)
    again = ssmcore.load(tmp_path, device="cuda", dtype=dtype, trainable=True)
    assert again.loss_and_gradients(*batch)[0] == better
    assert ssmcore.load(tmp_path, device="cpu").loss_and_gradients(*batch)[0] == pytest.approx(
        better, rel=TOLERANCE[dtype]
    )


def test_bad_ids_of_the_gpu_are_reported(batch):
    model = ssmcore.load(device="cuda", dtype="float32")
    inputs, targets = (torch.from_numpy(array).cuda() for array in batch)
    inputs[1, 7] = 256
    with pytest.raises(ssmcore.InvalidArgumentError, match="token_ids"):
        model.loss_and_gradients(inputs, targets)
    inputs[1, 7] = 0
    targets[0, 3] = -7
    with pytest.raises(ssmcore.InvalidArgumentError, match="targets"):
        model.loss_and_gradients(inputs, targets)
    targets[0, 3] = 0
    assert np.isfinite(model.loss_and_gradients(inputs, targets)[0])


def test_refuses_memory_of_another_place(batch):
    model = ssmcore.load(device="cuda", dtype="float32")
    gradients = {"backbone.norm_f.weight": np.zeros(model.config.d_model, np.float32)}
    with pytest.raises(ssmcore.InvalidArgumentError, match=r"norm_f.*no memory on cuda"):
        model.loss_and_gradients(*batch, gradients=gradients)
    inputs = torch.from_numpy(batch[0]).cuda().T.contiguous().T
    with pytest.raises(ssmcore.InvalidArgumentError, match=r"token_ids.*not contiguous"):
        model.loss_and_gradients(inputs, batch[1])
