"""What the tasks share: a model trained in a folder, in runs of bounded time that go on exactly."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import ssmcore

Batch = tuple[np.ndarray, np.ndarray]  # token ids and targets, (B, T)
NOT_ASKED = -100  # as a target
SAVE_SECONDS = 60  # a kill costs no more
# Batches are drawn by number. Those trained on count from 1, those on which it is decided when to
# stop, and those of the results, from
CHECKED, MEASURED = 2**40, 2**41


Settings = dict[str, tuple[Any, str]]  # by name: the default, and what it is


def options_of(description: str, settings: Settings) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The command line: where, for how long, and the settings, which are also given by name;
    `deadline` is when to stop, as `time.monotonic()` counts."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on with the run of the folder")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 …")
    parser.add_argument(
        "--minutes", type=float, default=9, help="stop and save after so many (default: 9)"
    )
    for name, (default, text) in settings.items():
        parser.add_argument(
            "--" + name.replace("_", "-"),
            type=type(default),
            default=default,
            help=f"{text} (default: {default})",
        )
    options = parser.parse_args()
    options.deadline = time.monotonic() + 60 * options.minutes
    return options, {name: getattr(options, name) for name in settings}


def new_model(options: argparse.Namespace, vocab_size: int) -> ssmcore.Model:
    """With the sizes, the seed, the device and the dtype of the command line."""
    return ssmcore.create(
        options.d_model,
        options.layers,
        vocab_size,
        seed=options.seed,
        device=options.device,
        dtype=options.dtype,
    )


class Training:
    """The steps of one model. Its folder is a model folder like any other, with the state of the
    training beside the model.

    Args:
        folder: made if need be. One that holds a run is refused unless `resume`, and then must have
            been begun with the same settings.
        settings: all that the result depends on.
        trainer: of the model, not trained yet.
        resume: whether the folder may hold a run.
        deadline: when to stop and save.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        trainer: ssmcore.Trainer,
        *,
        resume: bool,
        deadline: float,
    ):
        self.folder, self.trainer, self.deadline = folder, trainer, deadline
        self.seconds = 0.0  # of training, in all runs
        self.checks: list[tuple[int, float]] = []  # steps, and what was found after them
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "settings.json"
        if not path.exists():
            write_json(path, settings)
        elif not resume:
            raise SystemExit(f"{folder} holds a run already: --resume it, or name another folder")
        elif (begun := json.loads(path.read_text())) != settings:
            differing = sorted(k for k in settings if begun.get(k) != settings[k])
            raise SystemExit(f"{folder} was begun with another {', '.join(differing)}")
        if self._state.exists():
            trainer.load(self._state)
            progress = json.loads(self._progress.read_text())
            self.seconds = progress["seconds"]
            # Of a run that was killed between two files it may be ahead.
            taken = trainer.steps_taken
            self.checks = [(step, found) for step, found in progress["checks"] if step <= taken]

    def run(
        self,
        batch: Callable[[int], Batch],
        steps: int,
        *,
        check: Callable[[int], float] | None = None,
        every: int = 0,
        goal: float = 1,
        in_a_row: int = 1,
    ) -> bool:
        """Trains up to `steps`, or until `check`, called with the step every `every` steps, has
        come to `goal` at least, as many times in a row as said.

        `batch(number)` gives the batch of a step. Returns whether that is done; not if the time ran
        out before. Either way a checkpoint is written.
        """
        trainer = self.trainer
        begin, before = time.monotonic(), self.seconds
        next_save = begin + SAVE_SECONDS

        def is_reached() -> bool:
            last = [found for _, found in self.checks[-in_a_row:]]
            return len(last) == in_a_row and min(last) >= goal

        # The next batch is drawn while a step runs.
        with (
            ThreadPoolExecutor(1) as pool,
            tqdm(initial=trainer.steps_taken, total=steps, unit="step", mininterval=1) as bar,
        ):
            upcoming = pool.submit(batch, trainer.steps_taken + 1)
            while trainer.steps_taken < steps and not is_reached():
                now = time.monotonic()
                self.seconds = before + now - begin
                if now > self.deadline:
                    self.save()
                    return False
                if now > next_save:
                    self.save()
                    next_save = now + SAVE_SECONDS
                ids, targets = upcoming.result()
                upcoming = pool.submit(batch, trainer.steps_taken + 2)
                step = trainer.step(ids, targets)
                bar.update()
                bar.set_postfix_str(f"loss {step.loss:.4f}", refresh=False)
                if check and step.step % every == 0:
                    found = check(step.step)
                    self.checks.append((step.step, found))
                    bar.write(f"step {step.step}: loss {step.loss:.5f}, check {found:.5f}")
        self.seconds = before + time.monotonic() - begin
        self.save()
        return True

    def save(self) -> None:
        ssmcore.save(self.trainer.model, self.folder)
        write_json(self._progress, {"seconds": self.seconds, "checks": self.checks})
        self.trainer.save(self._state)

    @property
    def _state(self) -> Path:
        return self.folder / "trainer.safetensors"

    @property
    def _progress(self) -> Path:
        return self.folder / "progress.json"


class Results:
    """Numbers by name, each found once: they are kept in a file.

    Args:
        path: of the file.
        deadline: from then on nothing is looked for.
    """

    def __init__(self, path: Path, deadline: float):
        self.path, self.deadline = path, deadline
        self._found: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

    def find(self, name: str, look: Callable[[], float]) -> float | None:
        """What `look` gives, or gave; None where the time ran out before."""
        if name not in self._found and time.monotonic() < self.deadline:
            self._found[name] = look()
            write_json(self.path, self._found)
        return self._found.get(name)


def write_json(path: Path, content: Any) -> None:
    """The file appears whole or not at all."""
    new = path.with_name(path.name + ".tmp")
    new.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(new, path)


def report(
    folder: Path, settings: dict[str, Any], rows: list[dict[str, Any]], *, is_done: bool
) -> None:
    """Prints a table in Markdown, if there is one yet, and writes result.json."""
    if rows:
        print(f"| {' | '.join(rows[0])} |")
        print("|---" * len(rows[0]) + "|")
        for row in rows:
            cells = (f"{v:.4f}" if isinstance(v, float) else f"{v:,}" for v in row.values())
            print(f"| {' | '.join(cells)} |")
        write_json(folder / "result.json", {"settings": settings, "rows": rows})
    if not is_done:
        print(f"not done yet: go on with --resume --out {folder}")
