"""Training runs: `ssmcore train`, checkpoints, and what goes wrong."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import refuses
from model_fixtures import DATA
from transformers import AutoModelForCausalLM, AutoTokenizer

import ssmcore
from ssmcore import cli
from ssmcore.corpus import Corpus
from ssmcore.loading import BUNDLED
from ssmcore.tokenizer import ByteTokenizer
from ssmcore.train import Run, RunSettings

SETTINGS: dict[str, Any] = {
    "d_model": 24,
    "layers": 2,
    "batch": 4,
    "length": 32,
    "steps": 8,
    "warmup": 2,
    "seed": 3,
}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes((DATA / "val_austen.txt").read_bytes()[:8000])
    return path


def begin(folder: Path, text: Path | None, **options: Any) -> Run:
    given = {**SETTINGS, **options.pop("given", {})}
    device = options.pop("device", "cpu")
    return Run(folder, None if text is None else [text], given=given, device=device, **options)


def go_on(folder: Path, device: str = "cpu", **options: Any) -> Run:
    return Run(folder, None, resume=True, device=device, **options)


def flags(settings: dict[str, Any]) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]


def files(folder: Path) -> dict[str, bytes]:
    """Those that are the same whenever the run is."""
    return {name: (folder / name).read_bytes() for name in ("model.safetensors", STATE)}


STATE = "trainer.safetensors"


def losses(folder: Path) -> list[tuple[int, float]]:
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]


def test_command(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trains, and everybody can use what it leaves."""
    folder = tmp_path / "model"
    arguments = ["--text", str(text), "--out", str(folder), "--device=cpu", *flags(SETTINGS)]
    assert cli.main(["train", *arguments, "--save-every=3", "--eval-every=4"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{folder}: step 8 of 8, loss ")
    assert "tok/s" in printed.err and "8/8" in printed.err
    assert [step for step, _ in losses(folder)] == list(range(1, 9))
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    scores = [entry for entry in entries if "bits_per_byte" in entry]
    assert [entry["step"] for entry in scores] == [4, 8]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")

    model = ssmcore.load(folder, device="cpu")
    assert cli.main(["generate", "-m", str(folder), "--device=cpu", "The ", "-n8", "--quiet"]) == 0
    assert capsys.readouterr().out == model.generate("The ", 8)
    held_out = text.read_text()[-400:]
    assert scores[-1]["bits_per_byte"] == {"text.txt": model.score(held_out, 32).bits_per_byte}
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(folder)("The end", return_tensors="pt").input_ids
    np.testing.assert_allclose(
        model.forward(ids.numpy())[0], theirs(ids).logits.detach().numpy(), atol=1e-4
    )


def test_same_run_twice_and_another_seed(tmp_path: Path, text: Path) -> None:
    for name, seed in (("once", 3), ("again", 3), ("other", 4)):
        begin(tmp_path / name, text, given={"seed": seed}).train(0, 0, progress=False)
    assert files(tmp_path / "once") == files(tmp_path / "again")
    assert losses(tmp_path / "once") == losses(tmp_path / "again")
    assert losses(tmp_path / "once") != losses(tmp_path / "other")


def test_resumed_is_uninterrupted(tmp_path: Path, text: Path, device: str) -> None:
    begin(tmp_path / "whole", text, device=device).train(3, 4, progress=False)
    run = begin(tmp_path / "parts", text, device=device)
    before_steps(run, interrupt_at(6))
    with pytest.raises(KeyboardInterrupt):
        run.train(3, 4, progress=False)
    assert losses(tmp_path / "parts")[-1][0] == 5  # Ctrl-C leaves a checkpoint
    go_on(tmp_path / "parts", device).train(3, 4, progress=False)
    assert files(tmp_path / "whole") == files(tmp_path / "parts")
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    before = files(tmp_path / "parts")
    go_on(tmp_path / "parts", device).train(3, 4, progress=False)  # which has nothing left to do
    assert files(tmp_path / "parts") == before


@pytest.mark.parametrize("step", [4, 8])
def test_interrupted_before_a_score(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    begin(tmp_path / "whole", text).train(0, 4, progress=False)
    run = begin(tmp_path / "parts", text)
    score = run.model.score

    def interrupted(*arguments: Any) -> Any:
        if run.trainer.steps_taken == step:
            raise KeyboardInterrupt
        return score(*arguments)

    monkeypatch.setattr(run.model, "score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.train(0, 4, progress=False)
    go_on(tmp_path / "parts").train(0, 4, progress=False)
    assert go_on(tmp_path / "parts").log.scores == go_on(tmp_path / "whole").log.scores


def before_steps(run: Run, act: Callable[[int], object]) -> None:
    """Calls `act` with the number of each step, before it is taken."""
    step = run.trainer.step

    def acting(*arguments: Any) -> ssmcore.TrainingStep:
        act(run.trainer.steps_taken + 1)
        return step(*arguments)

    run.trainer.step = acting  # type: ignore[method-assign]


def interrupt_at(number: int) -> Callable[[int], None]:
    def act(step: int) -> None:
        if step == number:
            raise KeyboardInterrupt

    return act


def test_interrupted_within_a_step(tmp_path: Path, text: Path) -> None:
    """The step is then in the log, as it is in the weights."""
    interrupted = begin(tmp_path / "interrupted", text)
    before_steps(interrupted, lambda step: step == 3 and os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        interrupted.train(0, 0, progress=False)
    assert [step for step, _ in losses(tmp_path / "interrupted")] == [1, 2, 3]
    go_on(tmp_path / "interrupted").train(0, 0, progress=False)
    begin(tmp_path / "whole", text).train(0, 0, progress=False)
    assert losses(tmp_path / "interrupted") == losses(tmp_path / "whole")


def test_killed_while_it_saves(tmp_path: Path, text: Path) -> None:
    """Time and again at whatever moment of writing: the last checkpoint is there, and training goes
    on to the same bits."""
    settings = {**SETTINGS, "steps": 40}
    begin(tmp_path / "whole", text, given=settings).train(0, 0, progress=False)
    folder = tmp_path / "killed"
    arguments = ["--out", str(folder), "--resume", "--device=cpu", "--quiet", "--save-every=1"]
    arguments += ["--text", str(text), *flags(settings)]
    command = [sys.executable, "-m", "ssmcore", "train", *arguments]
    moments = ["model.safetensors.tmp-*", f"{STATE}.tmp-*", "*.tmp-*"]
    steps = 0
    for moment in moments:
        with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
            before = set(folder.glob("*"))
            deadline = time.monotonic() + 60
            while process.poll() is None and time.monotonic() < deadline:
                if set(folder.glob(moment)) - before and (folder / STATE).exists():
                    break
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        ssmcore.load(folder, device="cpu")
        trainer = ssmcore.Trainer(ssmcore.create(24, 2, device="cpu"))
        trainer.load(folder / STATE)
        assert trainer.steps_taken >= max(1, steps)
        steps = trainer.steps_taken
    assert subprocess.run(command, timeout=60).returncode == 0
    assert not list(folder.glob("*.tmp-*"))
    assert files(folder) == files(tmp_path / "whole")
    assert losses(folder) == losses(tmp_path / "whole")


def limit_file_size(size: int | None) -> None:
    """What a disk that is full does to a file that grows beyond this."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size is None else size, hard))


@pytest.fixture
def any_file_size() -> Any:
    yield
    limit_file_size(None)


def test_disk_that_is_full_for_a_while(
    tmp_path: Path, text: Path, any_file_size: None, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(tmp_path / "whole", text).train(0, 0, progress=False)
    run = begin(tmp_path / "full", text)
    before_steps(run, lambda step: limit_file_size(4096 if 4 <= step < 6 else None))
    run.train(2, 0, progress=False)
    printed = capsys.readouterr().err
    assert printed.count("training goes on") == 1
    assert "step 4: save_checkpoint: " in printed
    assert "File too large; the checkpoint of step 2 in" in printed
    assert files(tmp_path / "full") == files(tmp_path / "whole")


def test_disk_that_stays_full(tmp_path: Path, text: Path, any_file_size: None) -> None:
    run = begin(tmp_path / "full", text)
    before_steps(run, lambda step: limit_file_size(4096 if step > 4 else None))
    with refuses("save_checkpoint", "large"):
        run.train(2, 0, progress=False)
    limit_file_size(None)
    assert not list((tmp_path / "full").glob("*.tmp-*"))
    ssmcore.load(tmp_path / "full", device="cpu")
    assert go_on(tmp_path / "full").trainer.steps_taken == 4


def test_loss_that_is_not_a_number(tmp_path: Path, text: Path) -> None:
    run = begin(tmp_path / "model", text)
    step = run.trainer.step

    def spoiled(*arguments: Any) -> Any:
        if run.trainer.steps_taken == 5:
            run.model.parameters["backbone.layers.0.mixer.D"][2] = np.inf
            run.model.refresh()
        return step(*arguments)

    run.trainer.step = spoiled  # type: ignore[method-assign]
    match = (
        r"step 6: backbone.layers.0.mixer.D is not finite.*; the checkpoint of step 4 in .* kept"
    )
    with pytest.raises(ssmcore.NotFiniteError, match=match):
        run.train(2, 0, progress=False)
    assert go_on(tmp_path / "model").trainer.steps_taken == 4


def test_last_step_that_spoils_the_model(tmp_path: Path, text: Path) -> None:
    given = {"lr": 1e20, "warmup": 0, "final_lr": 1.0, "steps": 1}
    with pytest.raises(ssmcore.NotFiniteError, match=r"after step 1 the score of text.txt is nan"):
        begin(tmp_path / "model", text, given=given).train(0, 0, progress=False)
    assert not (tmp_path / "model" / STATE).exists()


def test_batches_depend_on_seed_and_step_alone() -> None:
    corpus = Corpus(["abcdefgh" * 50, "ijkl" * 20], ByteTokenizer(), 256, 10)
    assert corpus.tokens.dtype == np.uint8 and len(corpus.tokens) == 480
    batch = corpus.batch(6, 1, 7)
    assert batch.shape == (6, 11)
    assert np.array_equal(corpus.batch(6, 1, 7), batch)
    again = Corpus(["abcdefgh" * 50, "ijkl" * 20], ByteTokenizer(), 256, 10)
    assert np.array_equal(again.batch(6, 1, 7), batch)
    assert np.array_equal(corpus.batch(3, 1, 13), batch[:3])  # windows 37 to 39 of all
    for others in (corpus.batch(6, 2, 7), corpus.batch(6, 1, 8)):
        assert not np.array_equal(others, batch)
    everything = 2 * corpus.tokens.tobytes()
    for row in batch:
        assert row.tobytes() in everything


def test_every_token_comes_once_an_epoch() -> None:
    """Of 26, in windows of 4: six of them, of which two are left out, others in each epoch."""
    text = bytes(range(65, 91))
    corpus = Corpus([text.decode()], ByteTokenizer(), 256, 4)
    cuts, orders, circle = set(), set(), 2 * text
    for epoch in range(40):
        windows = [corpus.batch(2, 0, 3 * epoch + step) for step in (1, 2, 3)]
        rows = np.concatenate(windows)
        assert len(np.unique(rows[:, :4])) == 24
        for row in rows:
            assert row.tobytes() in circle
        cuts.add(min(int(first) % 4 for first in rows[:, 0]))
        orders.add(tuple(np.argsort(rows[:, 0])))
    assert cuts == {0, 1, 2, 3}
    assert len(orders) > 30


def test_text_of_hardly_a_window() -> None:
    corpus = Corpus([bytes(range(65, 91)).decode()], ByteTokenizer(), 256, 25)
    firsts = [int(row[0]) for step in range(1, 101) for row in corpus.batch(8, 0, step)]
    counts = np.bincount(firsts, minlength=91)[65:]
    assert np.all(np.abs(counts - 800 / 26) < 25)


def test_tokenizer_of_the_caller(tmp_path: Path, text: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train([str(text)], trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    run = begin(tmp_path / "model", text, tokenizer=tmp_path / "tokenizer.json")
    run.train(0, 0, progress=False)
    model = ssmcore.load(tmp_path / "model", device="cpu")
    assert model.config.vocab_size == 300
    assert model.tokenizer is not None
    assert model.tokenizer.encode("Emma and ") == tokenizer.encode("Emma and ").ids
    assert go_on(tmp_path / "model").trainer.steps_taken == 8


def test_validation_texts(tmp_path: Path, text: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_bytes((DATA / "val_kjv.txt").read_bytes()[:300])
    run = begin(tmp_path / "model", text, validation=[other, text])
    run.train(0, 0, progress=False)
    assert len(run._corpus.tokens) == 8000  # nothing of it is held out then
    bits = run.log.scores[-1]["bits_per_byte"]
    assert bits == {
        path.name: run.model.score(path.read_text(), 32).bits_per_byte for path in (other, text)
    }


# Bad input.


@pytest.fixture
def begun(tmp_path: Path, text: Path) -> Path:
    run = begin(tmp_path / "begun", text)
    before_steps(run, interrupt_at(2))
    with pytest.raises(KeyboardInterrupt):
        run.train(0, 0, progress=False)
    return tmp_path / "begun"


def test_a_folder_with_a_run(begun: Path, text: Path) -> None:
    with refuses("train", "resume"):
        begin(begun, text)


def test_a_folder_without_a_checkpoint(tmp_path: Path, text: Path) -> None:
    """What failed before its first checkpoint may be begun in another way."""
    run = begin(tmp_path / "run", text)
    before_steps(run, interrupt_at(1))
    run.save = lambda: None  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run.train(0, 0, progress=False)
    assert (tmp_path / "run" / "training.json").exists()
    begin(tmp_path / "run", text, given={"micro_batch": 2}).train(0, 0, progress=False)


def test_a_folder_with_another_model(tmp_path: Path, text: Path) -> None:
    ssmcore.save(ssmcore.create(24, 1, device="cpu"), tmp_path / "model")
    with refuses("train", "model", "of no run"):
        begin(tmp_path / "model", text)


def test_other_settings(begun: Path, text: Path) -> None:
    with pytest.raises(
        ssmcore.InvalidArgumentError,
        match=r"^train: the run was begun with lr 0.003, not 0.01; length 32, not 64$",
    ):
        go_on(begun, given={"lr": 0.01, "length": 64, "batch": 4})
    with refuses("train", "momentum"):
        go_on(begun, given={"momentum": 0.9})
    assert go_on(begun, given=SETTINGS).settings == RunSettings(**SETTINGS)


def test_other_text(begun: Path, text: Path) -> None:
    text.write_text(text.read_text().replace("e", "o"))
    with refuses("train", "text", "begun"):
        go_on(begun)


def test_two_at_a_time(begun: Path) -> None:
    run, other = go_on(begun), go_on(begun)

    def refused(step: int) -> None:
        with refuses("train", "another", "using"):
            other.train(0, 0, progress=False)

    before_steps(run, refused)
    run.train(0, 0, progress=False)
    assert (run.trainer.steps_taken, other.trainer.steps_taken) == (8, 1)
    other.train(0, 0, progress=False)


def test_nothing_to_go_on_with(tmp_path: Path, text: Path) -> None:
    with refuses("train", "run"):
        go_on(tmp_path / "none")
    with refuses("train", "text"):
        begin(tmp_path / "none", None)
    assert begin(tmp_path / "new", text, resume=True).trainer.steps_taken == 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "training.json").write_text("{"),
        lambda folder: (folder / "training.json").write_text('{"settings": {"x": 1}}'),
        lambda folder: (folder / STATE).write_bytes(b"not a state"),
        lambda folder: (folder / "log.jsonl").write_text("step 1\n"),
    ],
)
def test_damaged_runs(begun: Path, damage: Callable[[Path], object]) -> None:
    damage(begun)
    with pytest.raises(ssmcore.InvalidArgumentError):
        go_on(begun)


def test_texts(tmp_path: Path, text: Path) -> None:
    with refuses("train", "read", "missing.txt"):
        begin(tmp_path / "model", tmp_path / "missing.txt")
    with refuses("train", "read"):
        begin(tmp_path / "model", tmp_path)
    (tmp_path / "empty.txt").touch()
    with refuses("train", "empty.txt", "empty"):
        begin(tmp_path / "model", tmp_path / "empty.txt")
    (tmp_path / "one.txt").write_text("x")  # which is held out
    with refuses("train", "0 tokens", "33"):
        begin(tmp_path / "model", tmp_path / "one.txt")
    (tmp_path / "latin.txt").write_bytes("Élan".encode("latin-1") * 100)
    with refuses("train", "latin.txt", "UTF-8"):
        begin(tmp_path / "model", tmp_path / "latin.txt")
    with refuses("train", "tokens", "9001"):
        begin(tmp_path / "model", text, given={"length": 9000})
    (tmp_path / "short.txt").write_text("short")
    with refuses("train", "short.txt", "5", "33"):
        begin(tmp_path / "model", text, validation=[tmp_path / "short.txt"])
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("name", ["d_model", "layers", "batch", "length", "steps"])
def test_sizes(tmp_path: Path, text: Path, name: str) -> None:
    with pytest.raises(ssmcore.InvalidArgumentError, match=r"is 0, expected a whole number"):
        begin(tmp_path / "model", text, given={name: 0})
    assert not (tmp_path / "model").exists()


def test_places_that_cannot_be_written(tmp_path: Path, text: Path) -> None:
    with refuses("train"):
        begin(text / "model", text).train(0, 0, progress=False)


def test_command_reports_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "--text", str(tmp_path / "none"), "--out", str(tmp_path / "model")]
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("ssmcore: error: train: cannot read ")


def test_command_reports_sizes_beyond_any_memory(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = flags({**SETTINGS, "batch": 10**12})
    assert cli.main(["train", "--text", str(text), "--out", str(tmp_path / "run"), *settings]) == 2
    assert "ssmcore: error: out of memory" in capsys.readouterr().err


def test_bundled_vocabulary_is_of_bytes() -> None:
    """What training without a tokenizer takes a text to be."""
    from ssmcore.tokenizer import FileTokenizer

    tokenizer = FileTokenizer(BUNDLED / "tokenizer.json")
    assert tokenizer.vocab_size == 256
    assert tokenizer.encode("Ångström") == list("Ångström".encode())
