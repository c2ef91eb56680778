"""Induction heads (Gu & Dao, arXiv 2312.00752, section 4.1.2): a trigger is followed by a token,
and must call it up when it comes again, at the end. Trained on short sequences, tested on long.

    python python/examples/induction_heads.py --out induction --device cuda

In the paper's setting (256 positions, 16 kinds of tokens, 2 layers of width 64, batch 8, 204,800
steps at a learning rate of 1e-3 without weight decay) the published model is right on all sequences
up to 1,048,576 positions. The loss is that of the answer alone.

Soon no answer is wrong at 256 positions. What carries to long sequences is learnt after that: the
gradients that are left still tell the model to forget less, and Adam follows them if its ε, by
default 1e-8, is small beside them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from task import (
    CHECKED,
    MEASURED,
    NOT_ASKED,
    Batch,
    Results,
    Settings,
    Training,
    new_model,
    options_of,
    report,
)

import ssmcore

SETTINGS: Settings = {
    "length": (256, "positions in training"),
    "vocab": (16, "kinds of tokens, the trigger included"),
    "d_model": (64, "width of the model"),
    "layers": (2, "of the model"),
    "batch": (8, "sequences in a step"),
    "steps": (
        204_800,
        "at most; it stops when no answer of 2,048 fresh sequences is wrong, 15 times in a row",
    ),
    "lr": (1e-3, "learning rate, the same throughout"),
    "longest": (2**20, "positions to test, from 64 on in powers of 2"),
    "seed": (0, "of weights and data"),
    "dtype": ("auto", "of activations"),
}
CHECK_EVERY, CHECK_SEQUENCES, CHECKS = 2000, 2048, 15
EPS = 1e-15
# A length is tested on so many tokens, but no more sequences nor fewer than
TOKENS, MOST, LEAST = 2**25, 8192, 64
AT_A_TIME = 2**22  # tokens


def batch(seed: int, number: int, rows: int, length: int, vocab: int) -> Batch:
    """The trigger is the last kind of token: anywhere, but for the last two places before the end,
    and at the end. The target is that of the last position alone."""
    generator = np.random.default_rng([seed, number])
    ids = generator.integers(0, vocab - 1, (rows, length), dtype=np.min_scalar_type(vocab - 1))
    place = generator.integers(0, length - 3, (rows, 1))
    answer = np.take_along_axis(ids, place + 1, axis=1)
    np.put_along_axis(ids, place, vocab - 1, axis=1)
    ids[:, -1] = vocab - 1
    targets = np.full(ids.shape, NOT_ASKED, np.int16)
    targets[:, -1:] = answer
    return ids, targets


def accuracy(model: ssmcore.Model, data: Batch) -> float:
    """The part of sequences whose answer is the model's likeliest token. Long ones are read in
    pieces, from state to state."""
    ids, targets = data
    rows, length = ids.shape
    state, piece = model.new_state(rows), max(1, AT_A_TIME // rows)
    for begin in range(0, length, piece):
        logits, state = model.forward(ids[:, begin : begin + piece], state, logits="last")
    return float((logits.argmax(-1) == targets[:, -1]).mean())


def main() -> None:
    options, settings = options_of(__doc__.partition("\n\n")[0], SETTINGS)
    seed, length, vocab = options.seed, options.length, options.vocab
    model = new_model(options, vocab)
    training = Training(
        options.out,
        settings,
        ssmcore.Trainer(model, lr=options.lr, betas=(0.9, 0.999), eps=EPS, weight_decay=0),
        resume=options.resume,
        deadline=options.deadline,
    )
    is_done = training.run(
        lambda number: batch(seed, number, options.batch, length, vocab),
        options.steps,
        check=lambda step: accuracy(
            model, batch(seed, CHECKED + step, CHECK_SEQUENCES, length, vocab)
        ),
        every=CHECK_EVERY,
        in_a_row=CHECKS,
    )
    results = Results(options.out / "accuracies.json", options.deadline)
    lengths = [2**n for n in range(6, options.longest.bit_length())]
    rows: list[dict[str, Any]] = []
    for tested in lengths if is_done else ():
        sequences = min(MOST, max(LEAST, TOKENS // tested))
        found = results.find(
            str(tested),
            lambda tested=tested, sequences=sequences: accuracy(  # type: ignore[misc]
                model, batch(seed, MEASURED + tested, sequences, tested, vocab)
            ),
        )
        if found is None:
            break
        rows.append(
            {
                "length": tested,
                "accuracy": found,
                "sequences": sequences,
                "steps": training.trainer.steps_taken,
                "seconds": round(training.seconds),
            }
        )
    report(options.out, settings, rows, is_done=len(rows) == len(lengths))


if __name__ == "__main__":
    main()
