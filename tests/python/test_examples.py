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


def test_any_places_are_copied_from(example: Any) -> None:
    """All ten pairs of five places, about equally often."""
    task = example("selective_copying")
    ids, _ = task.batch(0, 1, 20_000, 5, 2, 4)
    pairs, counts = np.unique(ids[:, :5] != 0, axis=0, return_counts=True)
    assert len(pairs) == 10
    assert counts.min() > 1800 and counts.max() < 2200
    ids, _ = task.batch(0, 1, 50, 5, 5, 4)
    assert (ids[:, :5] != 0).all()


def test_accuracy_of_selective_copying(example: Any) -> None:
    """That of the likeliest tokens where an answer is due, the whole sequence read at once."""
    task = example("selective_copying")
    model = ssmcore.create(16, 2, 6, device="cpu")
    trainer = ssmcore.Trainer(model, lr=1e-2)
    for number in range(1, 20):
        trainer.step(*task.batch(0, number, 40, 20, 3, 6))
    batches = [task.batch(0, number, 40, 20, 3, 6) for number in (101, 102)]
    right = [
        model.forward(ids)[0].argmax(-1)[:, 20:] == targets[:, 20:] for ids, targets in batches
    ]
    assert 0 < np.mean(right) < 1
    assert task.accuracy(model, 20, batches) == pytest.approx(np.mean(right))


def test_data_of_induction_heads(example: Any) -> None:
    task = example("induction_heads")
    ids, targets = task.batch(3, 5, 200, 12, 6)
    places = set()
    for row, asked in zip(ids, targets, strict=True):
        first, last = np.flatnonzero(row == 5)
        assert last == 11
        assert list(asked) == [-100] * 11 + [row[first + 1]]
        places.add(int(first))
    assert places == set(range(9))


@pytest.mark.parametrize("at_a_time", [1, 56, 10**6])
def test_accuracy_of_induction_heads(
    example: Any, monkeypatch: pytest.MonkeyPatch, at_a_time: int
) -> None:
    """Read in pieces as at once."""
    task = example("induction_heads")
    model = ssmcore.create(16, 2, 5, device="cpu")
    trainer = ssmcore.Trainer(model, lr=1e-2)
    for number in range(1, 20):
        trainer.step(*task.batch(0, number, 8, 33, 5))
    ids, targets = task.batch(0, 100, 8, 33, 5)
    right = model.forward(ids, logits="last")[0].argmax(-1) == targets[:, -1]
    assert 0 < right.sum() < 8
    monkeypatch.setattr(task, "AT_A_TIME", at_a_time)
    assert task.accuracy(model, (ids, targets)) == right.mean()


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


def test_all_contexts_are_scored_on_the_same_bases(example: Any) -> None:
    task = example("genomes")
    genome = np.arange(200) % 4
    assert np.array_equal(task.whole_windows("it", genome, 64), genome[:193])
    assert len(task.whole_windows("it", genome[:129], 64)) == 129
    assert len(task.whole_windows("it", genome[:128], 64)) == 65
    with pytest.raises(SystemExit, match=r"it: 64 bases hold no window of 64"):
        task.whole_windows("it", genome[:64], 64)


SMALL = {
    "selective_copying": {
        "length": 20,
        "copied": 2,
        "vocab": 6,
        "d_model": 16,
        "batch": 4,
        "warmup": 2,
    },
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


def test_scores_are_not_looked_for_again(
    example: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The time may also run out between the lengths that are tested."""
    program, task = example("induction_heads"), example("task")
    sizes = {**SMALL["induction_heads"], "steps": 2}
    calls = []
    accuracy = program.accuracy
    now = [0.0]

    def slow(model: Any, data: Any) -> float:
        calls.append(data[0].shape[1])
        now[0] += 100
        return accuracy(model, data)

    monkeypatch.setattr(program, "accuracy", slow)
    monkeypatch.setattr(task.time, "monotonic", lambda: now[0])
    result = run(monkeypatch, program, tmp_path, **sizes, minutes=1)
    assert result is not None and calls == [64]
    assert [row["length"] for row in result["rows"]] == [64]
    assert "--resume" in capsys.readouterr().out
    result = run(monkeypatch, program, tmp_path, "--resume", **sizes, minutes=1)
    assert result is not None and calls == [64, 128]
    assert [row["length"] for row in result["rows"]] == [64, 128]
    assert "--resume" not in capsys.readouterr().out
    again = run(monkeypatch, program, tmp_path, "--resume", **sizes, minutes=1)
    assert again == result and calls == [64, 128]


class Stopped(Exception):
    pass


def training_of(task: ModuleType, folder: Path, *, resume: bool, deadline: float = 1e30) -> Any:
    trainer = ssmcore.Trainer(ssmcore.create(8, 1, 4, device="cpu"))
    return task.Training(folder, {}, trainer, resume=resume, deadline=deadline)


@pytest.mark.parametrize("stop_at", [None, "between two files", 3, 7, 9, 11])
def test_checks_in_a_row_outlive_a_stop(
    example: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stop_at: Any
) -> None:
    """Steps 4, 10 and 12 are good, and two in a row are asked for: it stops at step 12, wherever a
    run was stopped before."""
    task = example("task")
    found = {2: 0.5, 4: 0.9, 6: 0.1, 8: 0.2, 10: 0.8, 12: 0.8, 14: 0.9, 16: 0.0}

    def run_to(training: Any, stop: int) -> bool:
        def batch(number: int) -> Any:
            return np.full((1, 4), number % 4), np.full((1, 4), number % 3)

        def check(step: int) -> float:
            if step > stop:
                raise Stopped
            return found[step]

        done: bool = training.run(batch, 16, check=check, every=2, goal=0.8, in_a_row=2)
        return done

    training = training_of(task, tmp_path, resume=False)
    if stop_at == "between two files":  # of a checkpoint: the trainer's is still the last one
        monkeypatch.setattr(task, "SAVE_SECONDS", 0)
        save = ssmcore.Trainer.save

        def killed(trainer: ssmcore.Trainer, path: Any) -> None:
            if trainer.steps_taken == 11:
                raise Stopped
            save(trainer, path)

        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(ssmcore.Trainer, "save", killed)
            run_to(training, 16)
    elif stop_at is not None:
        monkeypatch.setattr(task, "SAVE_SECONDS", 0)
        with pytest.raises(Stopped):
            run_to(training, stop_at)
    if stop_at is not None:
        training = training_of(task, tmp_path, resume=True)
        assert 0 < training.trainer.steps_taken < 12
    assert run_to(training, 16)
    assert training.trainer.steps_taken == 12
    progress = json.loads((tmp_path / "progress.json").read_text())
    assert progress["checks"] == [[step, found[step]] for step in range(2, 13, 2)]
    assert progress["seconds"] > 0
    # One that is done takes no more steps.
    training = training_of(task, tmp_path, resume=True)
    assert run_to(training, 16)
    assert training.trainer.steps_taken == 12


def test_results_outlive_a_kill(example: Any, tmp_path: Path) -> None:
    task = example("task")
    path = tmp_path / "results.json"
    assert task.Results(path, 1e30).find("a", lambda: 0.25) == 0.25
    assert task.Results(path, 1e30).find("a", lambda: 0.5) == 0.25
    assert task.Results(path, 0).find("a", lambda: 0.5) == 0.25
    assert task.Results(path, 0).find("b", lambda: 0.5) is None
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_induction_is_learned(example: Any) -> None:
    """In small: the answers that a guess would miss come right."""
    task = example("induction_heads")
    length, vocab = 12, 5
    model = ssmcore.create(32, 2, vocab, device="cpu")
    trainer = ssmcore.Trainer(model, lr=5e-3, weight_decay=0)
    fresh = task.batch(0, task.CHECKED, 256, length, vocab)
    assert task.accuracy(model, fresh) < 0.5
    while trainer.steps_taken < 600:
        trainer.step(*task.batch(0, trainer.steps_taken + 1, 32, length, vocab))
        if trainer.steps_taken % 100 == 0 and task.accuracy(model, fresh) > 0.95:
            break
    assert task.accuracy(model, fresh) > 0.95
