"""Predicting the next base of bacterial genomes at growing context.

    apt-get install ragout-examples
    python python/examples/genomes.py --out genomes --device cuda --dtype bf16

Trained on Escherichia coli K-12 MG1655, a model for each context, all on the same number of bases;
scored in bits per base on its last eighth, which is held out, on the strain DH1, most of which is
in what was trained on, and on another species, Vibrio cholerae O395. All are scored on the same
bases, as many as fill windows of the longest context: in windows of their own context one after
another, each from an empty state. The genomes are those of Debian's package ragout-examples.
"""

from __future__ import annotations

import gzip
import math
from pathlib import Path
from typing import Any

import numpy as np
from task import Batch, Results, Settings, Training, new_model, options_of, report

import ssmcore

SETTINGS: Settings = {
    "genomes": ("/usr/share/doc/ragout/examples", "folder of ragout's examples"),
    "shortest": (2**10, "context"),
    "longest": (2**17, "context, the shortest times a power of 2; all between are learnt too"),
    "tokens": (2**17, "bases in a step"),
    "d_model": (128, "width of the models"),
    "layers": (6, "of the models"),
    "steps": (500, "of each model"),
    "lr": (5e-3, "learning rate at its peak"),
    "seed": (0, "of weights and data"),
    "dtype": ("auto", "of activations"),
}
TRAINED = "E.Coli/references/MG1655-K12.fasta.gz"
SCORED = {
    "DH1": "E.Coli/references/DH1.fasta.gz",
    "V. cholerae": "V.Cholerae/references/O395.fasta.gz",
}
HELD_OUT = 1 / 8
BASES, OTHER = b"ACGT", 4  # a base that is not known, and the beginning of a sequence


def read_genome(path: Path) -> np.ndarray:
    """The bases of a FASTA file, gzipped or not, as 0 to 3 for A, C, G and T, else 4."""
    if not path.exists():
        raise SystemExit(f"{path} is not there: apt-get install ragout-examples, or --genomes DIR")
    code = np.full(256, OTHER, np.uint8)
    for value, base in enumerate(BASES):
        code[[base, base | 0x20]] = value
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    lines = [b"N" if line.startswith(b">") else line.strip() for line in content.splitlines()]
    bases: np.ndarray = code[np.frombuffer(b"".join(lines), np.uint8)]
    if not (bases < OTHER).any():
        raise SystemExit(f"{path} holds no bases")
    return bases


def batch(genome: np.ndarray, seed: int, number: int, rows: int, context: int) -> Batch:
    """Windows that begin anywhere, and what follows each base."""
    generator = np.random.default_rng([seed, number])
    starts = generator.integers(0, len(genome) - context, (rows, 1))
    windows = genome[starts + np.arange(context + 1)].astype(np.int64)
    return windows[:, :-1], windows[:, 1:]


def bits_per_base(model: ssmcore.Model, genome: np.ndarray, context: int, rows: int) -> float:
    """Over windows of a context one after another, each from an empty state; `rows` at a time."""
    count = (len(genome) - 1) // context
    nats = 0.0
    for first in range(0, count, rows):
        starts = context * np.arange(first, min(first + rows, count))[:, None]
        windows = genome[starts + np.arange(context + 1)].astype(np.int64)
        logits = model.forward(windows[:, :-1], logits="all")[0].astype(np.float64)
        largest = logits.max(-1, keepdims=True)
        normalizer = largest[..., 0] + np.log(np.exp(logits - largest).sum(-1))
        nats += float(
            (normalizer - np.take_along_axis(logits, windows[:, 1:, None], -1)[..., 0]).sum()
        )
    return nats / (count * context * math.log(2))


def whole_windows(name: str, genome: np.ndarray, longest: int) -> np.ndarray:
    """The bases that are in windows of the longest context, and the one after."""
    count = (len(genome) - 1) // longest
    if count == 0:
        raise SystemExit(f"{name}: {len(genome):,} bases hold no window of {longest:,}")
    return genome[: count * longest + 1]


def main() -> None:
    options, settings = options_of(__doc__.partition("\n\n")[0], SETTINGS)
    folder = Path(options.genomes)
    genome = read_genome(folder / TRAINED)
    end = len(genome) - int(HELD_OUT * len(genome))
    contexts = [options.shortest]
    while contexts[-1] < options.longest:
        contexts.append(2 * contexts[-1])
    scored = {"held out": genome[end:]}
    scored |= {name: read_genome(folder / file) for name, file in SCORED.items()}
    scored = {name: whole_windows(name, bases, contexts[-1]) for name, bases in scored.items()}
    for name, bases in scored.items():
        print(f"{name}: scored on {len(bases) - 1:,} bases")

    def row_of(context: int) -> dict[str, Any] | None:
        """None where the time runs out before."""
        model = new_model(options, OTHER + 1)
        training = Training(
            options.out / str(context),
            {**settings, "context": context},
            ssmcore.Trainer(
                model, lr=options.lr, warmup_steps=options.steps // 10, total_steps=options.steps
            ),
            resume=options.resume,
            deadline=options.deadline,
        )
        windows = max(1, options.tokens // context)
        if not training.run(
            lambda number: batch(genome[:end], options.seed, number, windows, context),
            options.steps,
        ):
            return None
        results = Results(training.folder / "bits_per_base.json", options.deadline)
        row: dict[str, Any] = {"context": context}
        for name, bases in scored.items():
            row[name] = results.find(
                name,
                lambda bases=bases: bits_per_base(  # type: ignore[misc]
                    model, bases, context, windows
                ),
            )
            if row[name] is None:
                return None
        return {**row, "steps": training.trainer.steps_taken, "seconds": round(training.seconds)}

    rows = []
    for context in contexts:
        row = row_of(context)
        if row is None:
            break
        rows.append(row)
    report(options.out, settings, rows, is_done=len(rows) == len(contexts))


if __name__ == "__main__":
    main()
