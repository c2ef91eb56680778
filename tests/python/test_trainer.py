"""Training steps with AdamW: against torch, bit for bit again, saved and gone on from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_same_bits, refuses, relative_error
from model_fixtures import DATA
from transformers import AutoModelForCausalLM

import ssmcore

SETTINGS: dict[str, Any] = {"lr": 3e-3, "warmup_steps": 3, "total_steps": 12}


@pytest.fixture(scope="module")
def text() -> np.ndarray:
    return np.frombuffer((DATA / "val_austen.txt").read_bytes(), np.uint8).astype(np.int64)


def batch(text: np.ndarray, step: int, rows: int = 8, length: int = 32) -> tuple[np.ndarray, ...]:
    starts = np.random.default_rng(step).integers(0, len(text) - length, rows)
    ids = text[starts[:, None] + np.arange(length + 1)]
    return ids[:, :-1], ids[:, 1:]


def make(seed: int = 0, device: str = "cpu", **settings: Any) -> ssmcore.Trainer:
    model = ssmcore.create(24, 2, seed=seed, device=device)
    return ssmcore.Trainer(model, **{**SETTINGS, **settings})


def weights_of(model: ssmcore.Model) -> dict[str, np.ndarray]:
    """On the host."""
    arrays = model.parameters.items()
    return {name: a if isinstance(a, np.ndarray) else np.asarray(a.numpy()) for name, a in arrays}


def set_weight(model: ssmcore.Model, name: str, at: Any, value: float) -> None:
    weight = model.parameters[name]
    (weight if isinstance(weight, np.ndarray) else torch.from_dlpack(weight))[at] = float(value)
    model.refresh()


def run(trainer: ssmcore.Trainer, text: np.ndarray, until: int) -> list[ssmcore.TrainingStep]:
    found = []
    while trainer.steps_taken < until:
        found.append(trainer.step(*batch(text, trainer.steps_taken + 1)))
    return found


def assert_same_weights(a: ssmcore.Trainer, b: ssmcore.Trainer) -> None:
    assert a.steps_taken == b.steps_taken
    ours, theirs = weights_of(a.model), weights_of(b.model)
    for name, weight in ours.items():
        assert_same_bits(theirs[name], weight)


def test_steps_are_those_of_torch(tmp_path: Path, text: np.ndarray, device: str) -> None:
    """Of autograd, of torch's AdamW with the published groups, its clipping, and its schedules."""
    trainer = make(device=device, weight_decay=1.5, max_grad_norm=0.7)
    ssmcore.save(trainer.model, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        kept = ("A_log", ".D", ".bias", "norm.weight", "norm_f.weight")
        groups[not name.endswith(kept)].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": groups[True], "weight_decay": 1.5}, {"params": groups[False]}],
        lr=3e-3,
        betas=(0.9, 0.95),
        weight_decay=0.0,
    )
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 3, total_iters=2)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9, 3e-4)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, fall], [2])
    clipped = 0
    for step in range(1, 13):
        ids, targets = batch(text, step, rows=3, length=16)
        optimizer.zero_grad()
        logits = model(torch.from_numpy(ids)).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), torch.from_numpy(targets).flatten()
        )
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.7)
        clipped += norm.item() > 0.7
        found = trainer.step(ids, targets)
        assert found.step == step
        assert found.loss == pytest.approx(loss.item(), rel=1e-4)
        assert found.grad_norm == pytest.approx(norm.item(), rel=1e-3)
        assert found.lr == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-5)
        optimizer.step()
        schedule.step()
    assert clipped > 0
    weights = weights_of(trainer.model)
    for name, parameter in model.named_parameters():
        # Where a gradient is near 0, AdamW makes much of how it is rounded.
        assert relative_error(weights[name], parameter.detach().numpy()) < 2e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_learns(text: np.ndarray, device: str, dtype: str) -> None:
    """Letters by the one before: below what the frequencies of letters alone allow."""
    model = ssmcore.create(32, 2, device=device, dtype=dtype)
    trainer = ssmcore.Trainer(model, lr=1e-2, warmup_steps=5, total_steps=80)
    for step in range(1, 81):
        trainer.step(*batch(text, step, rows=8, length=64))
    counts = np.bincount(text, minlength=256)
    shares = counts[counts > 0] / len(text)
    by_frequency = -(shares * np.log(shares)).sum()
    losses = [model.loss_and_gradients(*batch(text, step, rows=8))[0] for step in (1000, 1001)]
    assert max(losses) < by_frequency - 0.3


def test_same_run_twice(text: np.ndarray, device: str) -> None:
    once, again = make(device=device), make(device=device)
    assert run(once, text, 6) == run(again, text, 6)
    assert_same_weights(once, again)


def test_threads_do_not_change_a_bit(
    text: np.ndarray, set_num_threads: Callable[[int], None]
) -> None:
    trainers = []
    for threads in (1, 2, 3):
        set_num_threads(threads)
        trainers.append(make())
        run(trainers[-1], text, 3)
    assert_same_weights(trainers[0], trainers[1])
    assert_same_weights(trainers[0], trainers[2])


def test_resumed_is_uninterrupted(tmp_path: Path, text: np.ndarray, device: str) -> None:
    whole = make(device=device)
    found = run(whole, text, 9)
    first = make(device=device)
    run(first, text, 5)
    first.save(tmp_path / "state.safetensors")
    second = make(seed=1, device=device)
    run(second, text, 2)  # of which nothing is to be left
    second.load(tmp_path / "state.safetensors")
    assert second.steps_taken == 5
    assert run(second, text, 9) == found[5:]
    assert_same_weights(whole, second)


def test_batches_of_changing_sizes(tmp_path: Path, text: np.ndarray, device: str) -> None:
    """As in trainers that have seen no other."""
    trainer = make(device=device)
    for rows, length in ((2, 8), (4, 40), (2, 8), (8, 20), (4, 40), (1, 1)):
        trainer.save(tmp_path / "state.safetensors")
        new = make(seed=1, device=device)
        new.load(tmp_path / "state.safetensors")
        step = batch(text, trainer.steps_taken, rows, length)
        assert trainer.step(*step) == new.step(*step)
        assert_same_weights(trainer, new)


def test_state_is_read_by_others(tmp_path: Path, text: np.ndarray, device: str) -> None:
    from safetensors.numpy import load_file

    trainer = make(device=device)
    run(trainer, text, 2)
    trainer.save(tmp_path / "state.safetensors")
    stored = load_file(tmp_path / "state.safetensors")
    assert stored["step"].tolist() == [2]
    for name, weight in weights_of(trainer.model).items():
        assert_same_bits(stored[f"weight.{name}"], weight)
        assert np.any(stored[f"exp_avg.{name}"]) and np.all(stored[f"exp_avg_sq.{name}"] >= 0)


@pytest.mark.parametrize("recompute_layers", [False, True])
def test_parts_of_a_batch_add_up(text: np.ndarray, device: str, recompute_layers: bool) -> None:
    whole = make(device=device)
    parts = make(device=device, micro_batch=3, recompute_layers=recompute_layers)
    for step in range(1, 5):
        ids, targets = batch(text, step)
        targets = np.where(np.arange(32) < 5 * (np.arange(8)[:, None] % 3), -100, targets)
        one, other = whole.step(ids, targets), parts.step(ids, targets)
        assert other.loss == pytest.approx(one.loss, rel=1e-5)
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)
    actual = weights_of(parts.model)
    for name, weight in weights_of(whole.model).items():
        assert relative_error(actual[name], weight) < 1e-3


def test_layers_computed_again_give_the_same_bits(text: np.ndarray) -> None:
    kept, again = make(), make(recompute_layers=True)
    assert run(kept, text, 3) == run(again, text, 3)
    assert_same_weights(kept, again)


def test_learning_rate() -> None:
    trainer = make(lr=1.0, warmup_steps=4, total_steps=14, final_lr=0.2)
    assert [trainer.lr(step) for step in (1, 2, 4)] == [0.25, 0.5, 1.0]
    assert trainer.lr(9) == pytest.approx(0.6)
    assert trainer.lr(14) == trainer.lr(20) == pytest.approx(0.2)
    constant = make(lr=1.0, warmup_steps=0, total_steps=0)
    assert constant.lr(1) == constant.lr(10**9) == 1.0
    assert make(lr=1.0, warmup_steps=3, total_steps=3).lr(3) == 1.0


def test_one_sequence(text: np.ndarray) -> None:
    one, row = make(), make()
    assert one.step(text[:20], text[1:21]) == row.step(text[None, :20], text[None, 1:21])


# Bad input.


def test_a_weight_that_is_not_finite(text: np.ndarray, device: str) -> None:
    trainer = make(device=device)
    run(trainer, text, 2)
    name = "backbone.layers.1.mixer.out_proj.weight"
    before = weights_of(trainer.model)[name][3, 4]
    set_weight(trainer.model, name, (3, 4), np.nan)
    with pytest.raises(ssmcore.NotFiniteError, match=rf"trainer: step 3: {name} is not finite"):
        trainer.step(*batch(text, 3))
    assert trainer.steps_taken == 2
    set_weight(trainer.model, name, (3, 4), before)
    other = make(device=device)
    run(other, text, 3)
    trainer.step(*batch(text, 3))
    assert_same_weights(trainer, other)


def test_a_gradient_that_is_not_finite(text: np.ndarray, device: str) -> None:
    trainer = make(device=device)
    # The norm's weight overflows the products, though it is a number itself.
    set_weight(trainer.model, "backbone.layers.0.norm.weight", ..., 1e38)
    with pytest.raises(ssmcore.NotFiniteError, match=r"step 1: the gradient of backbone.* is not"):
        trainer.step(*batch(text, 1))
    assert trainer.steps_taken == 0


def test_a_batch_that_does_not_fit() -> None:
    ids = np.broadcast_to(np.zeros(1, np.int64), (1 << 12, 1 << 10))
    trainer = ssmcore.Trainer(ssmcore.create(256, 8, device="cpu"))
    with pytest.raises(
        ssmcore.BackendError, match=r"4096 rows of 1024 tokens need \d+\.\d GiB .*micro_batch"
    ):
        trainer.step(ids, ids)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"lr": -1e-3}, ("lr",)),
        ({"lr": float("inf")}, ("lr",)),
        ({"final_lr": 1.5}, ("final_lr",)),
        ({"betas": (0.9, 1.0)}, ("beta2",)),
        ({"eps": -1.0}, ("eps",)),
        ({"weight_decay": -0.1}, ("weight_decay",)),
        ({"max_grad_norm": float("nan")}, ("max_grad_norm",)),
        ({"micro_batch": -1}, ("micro_batch",)),
        ({"warmup_steps": 13}, ("warmup_steps", "12")),
    ],
)
def test_refuses_settings(settings: dict[str, Any], words: tuple[str, ...]) -> None:
    with refuses("trainer", *words):
        make(**settings)


def test_refuses_models() -> None:
    with refuses("trainer", "trainable"):
        ssmcore.Trainer(ssmcore.load(device="cpu"))
    with refuses("trainer", "model", "str"):
        ssmcore.Trainer("a model")  # type: ignore[arg-type]


def test_refuses_batches(text: np.ndarray) -> None:
    trainer = make()
    ids = text[:20].reshape(2, 10)
    for arguments, words in (
        ((ids, ids[:, :5]), ("targets", "5", "10")),
        ((ids, ids[0]), ("targets",)),
        ((ids + 200, ids), ("token_ids",)),
        ((ids, ids + 200), ("targets",)),
        ((ids, np.full_like(ids, -100)), ("targets",)),
        ((ids.astype(np.float32), ids), ("token_ids", "float32")),
    ):
        with refuses("targets" if "targets" in words else "token_ids", *words):
            trainer.step(*arguments)
    assert trainer.steps_taken == 0


def test_refuses_states_of_others(tmp_path: Path, text: np.ndarray) -> None:
    path = tmp_path / "state.safetensors"
    trainer = make()
    with refuses("state"):
        trainer.load(path)
    ssmcore.Trainer(ssmcore.create(32, 2, device="cpu")).save(path)
    with refuses("trainer", "tensor", "expected"):
        trainer.load(path)
    ssmcore.Trainer(ssmcore.create(24, 3, device="cpu")).save(path)
    with refuses("trainer", "another"):
        trainer.load(path)
    trainer.save(path)
    path.write_bytes(path.read_bytes()[:-1])
    with refuses("bytes"):
        trainer.load(path)
    other = make()
    assert_same_weights(trainer, other)
    with refuses("trainer", "directory"):
        trainer.save(tmp_path / "no" / "such")
