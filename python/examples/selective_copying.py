"""Selective copying (Gu & Dao, arXiv 2312.00752, section 4.1.1): tokens scattered over noise, to be
repeated in order at the end. It takes a model that chooses what to remember.

    python python/examples/selective_copying.py --out copying --device cuda --dtype bf16

In the paper's setting (4,096 positions, 16 tokens of 14 kinds, 2 layers of width 64, batch 64) the
published model reaches 99.8 % of the tokens. Training stops at `--goal`.
"""

from __future__ import annotations

import time

import numpy as np
from task import FRESH, NOT_ASKED, Batch, Settings, Training, new_model, options_of, report

import ssmcore

SETTINGS: Settings = {
    "length": (4096, "positions before the answer"),
    "copied": (16, "tokens to copy"),
    "vocab": (16, "kinds of tokens, noise and marker included"),
    "d_model": (64, "width of the model"),
    "layers": (2, "of the model"),
    "batch": (64, "sequences in a step"),
    "steps": (400_000, "at most"),
    "lr": (1e-3, "learning rate, the same throughout"),
    "goal": (0.995, "part of fresh sequences' tokens at which to stop"),
    "seed": (0, "of weights and data"),
    "dtype": ("auto", "of activations"),
}
CHECK_EVERY = 500  # steps
FEW, MANY = 4, 32  # batches that a check, and the result, are made on


def batch(seed: int, number: int, rows: int, length: int, copied: int, vocab: int) -> Batch:
    """Noise is token 0, the marker under which an answer is due the last one."""
    generator = np.random.default_rng([seed, number])
    places = generator.random((rows, length)).argpartition(copied, axis=1)[:, :copied]
    data = generator.integers(1, vocab - 1, (rows, copied))
    ids = np.zeros((rows, length + copied), np.int64)
    np.put_along_axis(ids, np.sort(places, axis=1), data, axis=1)
    ids[:, length:] = vocab - 1
    targets = np.full_like(ids, NOT_ASKED)
    targets[:, length:] = data
    return ids, targets


def accuracy(model: ssmcore.Model, batches: list[Batch]) -> float:
    """The part of the tokens that is right, each the likeliest by the model."""
    right = total = 0
    for ids, targets in batches:
        asked = targets != NOT_ASKED
        chosen = model.forward(ids, logits="all")[0].argmax(-1)
        right += int((chosen == targets)[asked].sum())
        total += int(asked.sum())
    return right / total


def main() -> None:
    options = options_of(__doc__.partition("\n\n")[0], SETTINGS)
    settings = {name: getattr(options, name) for name in SETTINGS}
    sizes = (options.batch, options.length, options.copied, options.vocab)
    model = new_model(options, options.vocab)
    training = Training(
        options.out,
        settings,
        ssmcore.Trainer(model, lr=options.lr, weight_decay=0),
        resume=options.resume,
        deadline=time.monotonic() + 60 * options.minutes,
    )
    begin = time.monotonic()

    def fresh(count: int) -> list[Batch]:
        return [batch(options.seed, FRESH + i, *sizes) for i in range(count)]

    is_done = training.run(
        lambda number: batch(options.seed, number, *sizes),
        options.steps,
        check=lambda: (
            accuracy(model, fresh(FEW)) >= options.goal
            and accuracy(model, fresh(MANY)) >= options.goal
        ),
        every=CHECK_EVERY,
    )
    seconds = time.monotonic() - begin
    row = {
        "length": options.length,
        "accuracy": accuracy(model, fresh(MANY)),
        "of sequences": MANY * options.batch,
        "steps": training.trainer.steps_taken,
        "seconds of this run": round(seconds),
    }
    report(options.out, settings, [row])
    if not is_done:
        print(f"not done yet: go on with --resume --out {options.out}")


if __name__ == "__main__":
    main()
