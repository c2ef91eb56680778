"""Induction heads (Gu & Dao, arXiv 2312.00752, section 4.1.2): a trigger is followed by a token,
and must call it up when it comes again, at the end. Trained on short sequences, tested on long.

    python python/examples/induction_heads.py --out induction --device cuda

In the paper's setting (256 positions, 16 kinds of tokens, 2 layers of width 64, batch 8, 204,800
steps at a learning rate of 1e-3 without weight decay) the published model is right on all sequences
up to 1,048,576 positions. The loss is that of the answer alone.
"""

from __future__ import annotations

import time

import numpy as np
from task import FRESH, NOT_ASKED, Batch, Settings, Training, new_model, options_of, report

import ssmcore

SETTINGS: Settings = {
    "length": (256, "positions in training"),
    "vocab": (16, "kinds of tokens, the trigger included"),
    "d_model": (64, "width of the model"),
    "layers": (2, "of the model"),
    "batch": (8, "sequences in a step"),
    "steps": (
        204_800,
        "at most; it stops when no answer of 2,048 fresh sequences is wrong, three times",
    ),
    "lr": (1e-3, "learning rate, the same throughout"),
    "longest": (2**20, "positions to test, from 64 on in powers of 2"),
    "seed": (0, "of weights and data"),
    "dtype": ("auto", "of activations"),
}
CHECK_EVERY = 2000  # steps
SEQUENCES, LEAST, TOKENS = 512, 16, 2**24  # to test a length on: the first, but no more tokens
AT_A_TIME = 2**18  # tokens


def batch(seed: int, number: int, rows: int, length: int, vocab: int) -> Batch:
    """The trigger is the last kind of token. The target is that of the last position alone."""
    generator = np.random.default_rng([seed, number])
    ids = generator.integers(0, vocab - 1, (rows, length))
    place = generator.integers(0, length - 2, (rows, 1))
    answer = np.take_along_axis(ids, place + 1, axis=1)
    np.put_along_axis(ids, place, vocab - 1, axis=1)
    ids[:, -1] = vocab - 1
    targets = np.full_like(ids, NOT_ASKED)
    targets[:, -1:] = answer
    return ids, targets


def accuracy(model: ssmcore.Model, seed: int, length: int, vocab: int, sequences: int) -> float:
    """The part of fresh sequences whose answer is the model's likeliest token."""
    rows = max(1, min(sequences, AT_A_TIME // length))
    right = done = 0
    while done < sequences:
        count = min(rows, sequences - done)
        ids, targets = batch(seed, FRESH * length + done, count, length, vocab)
        chosen = model.forward(ids, logits="last")[0].argmax(-1)
        right += int((chosen == targets[:, -1]).sum())
        done += count
    return right / sequences


def main() -> None:
    options = options_of(__doc__.partition("\n\n")[0], SETTINGS)
    settings = {name: getattr(options, name) for name in SETTINGS}
    seed, length, vocab = options.seed, options.length, options.vocab
    model = new_model(options, vocab)
    training = Training(
        options.out,
        settings,
        ssmcore.Trainer(model, lr=options.lr, weight_decay=0),
        resume=options.resume,
        deadline=time.monotonic() + 60 * options.minutes,
    )
    in_a_row = 0

    def is_perfect() -> bool:
        nonlocal in_a_row
        in_a_row = in_a_row + 1 if accuracy(model, seed, length, vocab, 2048) == 1 else 0
        return in_a_row == 3

    is_done = training.run(
        lambda number: batch(seed, number, options.batch, length, vocab),
        options.steps,
        check=is_perfect,
        every=CHECK_EVERY,
    )
    rows = []
    tested = 64
    while is_done and tested <= options.longest:
        sequences = min(SEQUENCES, max(LEAST, TOKENS // tested))
        rows.append(
            {
                "length": tested,
                "accuracy": accuracy(model, seed, tested, vocab, sequences),
                "of sequences": sequences,
                "steps": training.trainer.steps_taken,
            }
        )
        tested *= 2
    if rows:
        report(options.out, settings, rows)
    if not is_done:
        print(f"not done yet: go on with --resume --out {options.out}")


if __name__ == "__main__":
    main()
