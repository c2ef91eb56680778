"""Training steps: gradients, clipping, AdamW and its schedule."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from ssmcore import _core
from ssmcore.errors import InvalidArgumentError
from ssmcore.model import Model
from ssmcore.tokenizer import as_token_ids


@dataclass(frozen=True)
class TrainingStep:
    """What a step found: its number, from 1, the mean cross entropy in nats before the step, the
    norm of the gradients before clipping, and the learning rate."""

    step: int
    loss: float
    grad_norm: float
    lr: float


class Trainer:
    """Trains a model with AdamW (arXiv 1711.05101), its weights in place.

        trainer = ssmcore.Trainer(ssmcore.create(d_model=128, n_layer=2), lr=3e-3)
        for _ in range(100):
            ids = next_batch()  # (B, T + 1) integers
            print(trainer.step(ids[:, :-1], ids[:, 1:]).loss)

    Args:
        model: trainable, as `create` or `load(…, trainable=True)` makes it. Nothing else may use it
            during a step.
        lr: the learning rate at its peak, to which it rises linearly
        warmup_steps: at this step,
        total_steps: to fall along half a cosine until this one; 0: to stay
        final_lr: to this part of the peak.
        betas, eps: AdamW's.
        weight_decay: of matrices; A_log, D, biases and norms do not decay.
        max_grad_norm: all gradients together are clipped to this norm; 0: never.
        micro_batch: rows of a batch whose gradients are computed at a time and added up, which
            takes less memory; 0: all rows.
        recompute_layers: keep only what enters each layer, and compute it again: less memory for
            more time, with the same result.

    The same steps give the same bits, whatever the number of threads.

    Raises:
        InvalidArgumentError: for a model that is not trainable, or a number out of range.
    """

    def __init__(
        self,
        model: Model,
        *,
        lr: float = 1e-3,
        warmup_steps: int = 0,
        total_steps: int = 0,
        final_lr: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        max_grad_norm: float = 1.0,
        micro_batch: int = 0,
        recompute_layers: bool = False,
    ):
        if not isinstance(model, Model):
            raise InvalidArgumentError(f"trainer: model is a {type(model).__name__}")
        self._model = model
        self._native = _core.Trainer(
            model._language_model,
            lr=lr,
            warmup_steps=warmup_steps,
            total_steps=total_steps,
            final_lr=final_lr,
            beta1=betas[0],
            beta2=betas[1],
            eps=eps,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            micro_batch=micro_batch,
            recompute_layers=recompute_layers,
        )

    @property
    def model(self) -> Model:
        return self._model

    @property
    def steps_taken(self) -> int:
        return self._native.steps_taken

    def lr(self, step: int) -> float:
        """The learning rate of a step, counted from 1."""
        return self._native.lr(step)

    def step(self, token_ids: Any, targets: Any) -> TrainingStep:
        """Takes one step down the gradient of the mean cross entropy.

        Args:
            token_ids: (B, T) or (T,) integers below `model.config.vocab_size`.
            targets: of the same shape: what each position should predict; -100 where nothing is
                asked.

        Raises:
            NotFiniteError: for a loss or a gradient that is infinite or NaN; names the step and the
                tensor.
            BackendError: for a batch that does not fit in memory; says how much it takes.
            InvalidArgumentError: for ids or targets of another shape or out of range, or no target.

        The model and the trainer are then as they were.
        """
        ids = as_token_ids(token_ids, "trainer", "token_ids", ranks=(1, 2))
        expected = as_token_ids(targets, "trainer", "targets", ranks=(ids.ndim,))
        step = self._native.step(
            ids.reshape(-1, ids.shape[-1]), expected.reshape(-1, expected.shape[-1])
        )
        return TrainingStep(step.step, step.loss, step.grad_norm, step.lr)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes weights, moments and the number of steps to a safetensors file, which appears
        whole or not at all. Raises InvalidArgumentError where it cannot be written."""
        self._native.save(os.fspath(path))

    def load(self, path: str | os.PathLike[str]) -> None:
        """Takes over what `save` wrote: training then goes on to the same bits, if the settings and
        the batches are the same. Raises InvalidArgumentError for a file that is not there, damaged,
        or of another model; nothing has changed then."""
        self._native.load(os.fspath(path))
