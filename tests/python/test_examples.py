"""The paper's tasks: their data, and short runs of the programs in python/examples."""

from __future__ import annotations

import gzip
import itertools
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import ssmcore

EXAMPLES = Path(__file__).parents[2] / "python" / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a program, and gives a function that runs it with options."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(name: str) -> ModuleType:
        return __import__(name)

    return load


def run(
    monkeypatch: pytest.MonkeyPatch, program: ModuleType, folder: Path, *flags: str, **options: Any
) -> dict[str, Any] | None:
    """Its result, if it came to one."""
    named = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    arguments = [program.__name__, "--out", str(folder), "--device=cpu", *flags, *named]
    monkeypatch.setattr(sys, "argv", arguments)
    program.main()
    result = folder / "result.json"
    return json.loads(result.read_text()) if result.exists() else None


def test_data_of_selective_copying(example: Any) -> None:
    task = example("selective_copying")
    ids, targets = task.batch(3, 5, 7, 40, 4, 9)
    assert ids.shape == targets.shape == (7, 44)
    for row, asked in zip(ids, targets, strict=True):
        copied = [token for token in row[:40] if token != 0]
        assert len(copied) == 4
        assert set(copied) <= set(range(1, 8))
        assert list(row[40:]) == [8] * 4
        assert list(asked) == [-100] * 40 + copied
    assert np.array_equal(task.batch(3, 5, 7, 40, 4, 9)[0], ids)
    assert not np.array_equal(task.batch(3, 6, 7, 40, 4, 9)[0], ids)


def test_data_of_induction_heads(example: Any) -> None:
    task = example("induction_heads")
    ids, targets = task.batch(3, 5, 200, 12, 6)
    places = set()
    for row, asked in zip(ids, targets, strict=True):
        first, last = np.flatnonzero(row == 5)
        assert last == 11
        assert list(asked) == [-100] * 11 + [row[first + 1]]
        places.add(int(first))
    assert places == set(range(10))


def test_genomes_are_read(example: Any, tmp_path: Path) -> None:
    task = example("genomes")
    path = tmp_path / "genome.fasta.gz"
    path.write_bytes(gzip.compress(b">one\nACGT\nacNgt\n>two\nTT\n"))
    assert list(task.read_genome(path)) == [4, 0, 1, 2, 3, 0, 1, 4, 2, 3, 4, 3, 3]
    with pytest.raises(SystemExit, match="apt-get install ragout-examples"):
        task.read_genome(tmp_path / "none")
    (tmp_path / "empty.fasta").write_bytes(b">nothing\n")
    with pytest.raises(SystemExit, match="no bases"):
        task.read_genome(tmp_path / "empty.fasta")


def test_bits_per_base(example: Any) -> None:
    """Of a model that knows nothing: those of a uniform guess, nearly."""
    task = example("genomes")
    model = ssmcore.create(16, 1, 5, device="cpu")
    genome = np.random.default_rng(0).integers(0, 4, 500).astype(np.uint8)
    bits = task.bits_per_base(model, genome, 64, 3)
    assert bits == pytest.approx(np.log2(5), abs=0.1)
    logits = model.forward(genome[:448].reshape(7, 64).astype(np.int64))[0].astype(np.float64)
    chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    right = np.take_along_axis(chances, genome[1:449].reshape(7, 64, 1).astype(np.int64), -1)
    assert bits == pytest.approx(-np.log2(right).mean(), rel=1e-6)


SMALL = {
    "selective_copying": {"length": 20, "copied": 2, "vocab": 6, "d_model": 16, "batch": 4},
    "induction_heads": {"length": 16, "vocab": 5, "d_model": 16, "batch": 4, "longest": 128},
}


@pytest.mark.parametrize("name", SMALL)
def test_runs_that_stop_and_go_on(
    example: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    program, task = example(name), example("task")
    whole = run(monkeypatch, program, tmp_path / "whole", **SMALL[name], steps=6)
    assert whole is not None
    assert whole["rows"][0]["steps"] == 6
    assert "| accuracy |" in capsys.readouterr().out
    with monkeypatch.context() as patch:  # a clock on which each look takes a minute
        looks = itertools.count()
        patch.setattr(task.time, "monotonic", lambda: 60.0 * next(looks))
        run(patch, program, tmp_path / "parts", **SMALL[name], steps=6, minutes=5)
    assert "--resume" in capsys.readouterr().out
    begun = ssmcore.Trainer(ssmcore.load(tmp_path / "parts", device="cpu", trainable=True))
    begun.load(tmp_path / "parts" / "trainer.safetensors")
    assert 0 < begun.steps_taken < 6
    with pytest.raises(SystemExit, match="holds a run already"):
        run(monkeypatch, program, tmp_path / "parts", **SMALL[name], steps=6)
    with pytest.raises(SystemExit, match="begun with another lr"):
        run(monkeypatch, program, tmp_path / "parts", "--resume", **SMALL[name], steps=6, lr=1)
    taken = []
    step = ssmcore.Trainer.step
    monkeypatch.setattr(
        ssmcore.Trainer, "step", lambda *args: taken.append(step(*args)) or taken[-1]
    )
    run(monkeypatch, program, tmp_path / "parts", "--resume", **SMALL[name], steps=6)
    assert [s.step for s in taken] == list(range(begun.steps_taken + 1, 7))
    for file in ("model.safetensors", "trainer.safetensors"):
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_genomes_at_two_contexts(
    example: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A genome that repeats itself is learned, and one of chance is not."""
    program = example("genomes")
    generator = np.random.default_rng(0)
    bases = np.frombuffer(b"ACGT", np.uint8)
    repeated = np.tile(generator.choice(bases, 8), 500).tobytes()
    chance = generator.choice(bases, 2000).tobytes()
    for file, genome in (
        (program.TRAINED, repeated),
        *zip(program.SCORED.values(), (repeated, chance), strict=True),
    ):
        path = tmp_path / "genomes" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(b">g\n" + genome + b"\n"))
    sizes = {"shortest": 32, "longest": 64, "tokens": 256, "d_model": 16, "layers": 1}
    result = run(
        monkeypatch, program, tmp_path / "out", **sizes, steps=60, genomes=tmp_path / "genomes"
    )
    assert result is not None
    assert [row["context"] for row in result["rows"]] == [32, 64]
    for row in result["rows"]:
        assert row["held out"] < 1.2
        assert row["DH1"] < 1.2
        assert row["V. cholerae"] > 2


def test_induction_is_learned(example: Any) -> None:
    """In small: the answers that a guess would miss come right."""
    task = example("induction_heads")
    length, vocab = 12, 5
    model = ssmcore.create(32, 2, vocab, device="cpu")
    trainer = ssmcore.Trainer(model, lr=5e-3, weight_decay=0)
    before = task.accuracy(model, 0, length, vocab, 256)
    assert before < 0.5
    while trainer.steps_taken < 600:
        trainer.step(*task.batch(0, trainer.steps_taken + 1, 32, length, vocab))
        if trainer.steps_taken % 100 == 0 and task.accuracy(model, 0, length, vocab, 256) > 0.95:
            break
    assert task.accuracy(model, 0, length, vocab, 256) > 0.95
