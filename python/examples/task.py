"""What the tasks share: a model trained in a folder, in runs of bounded time that go on exactly."""

from __future__ import annotations

import argparse
import json
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
FRESH = 2**40  # batches from this number on are never trained on


Settings = dict[str, tuple[Any, str]]  # by name: the default, and what it is


def options_of(description: str, settings: Settings) -> argparse.Namespace:
    """The command line: where, for how long, and the settings."""
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
    return parser.parse_args()


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
        deadline: when to stop and save, as `time.monotonic()` counts.
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
        self.reached: int | None = None  # the step at which a check was content
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "settings.json"
        if not path.exists():
            path.write_text(json.dumps(settings, indent=1) + "\n")
        elif not resume:
            raise SystemExit(f"{folder} holds a run already: --resume it, or name another folder")
        elif (begun := json.loads(path.read_text())) != settings:
            differing = sorted(k for k in settings if begun.get(k) != settings[k])
            raise SystemExit(f"{folder} was begun with another {', '.join(differing)}")
        if self._state.exists():
            trainer.load(self._state)
            # Of a run that was killed between two files it may be ahead.
            reached = json.loads(self._progress.read_text())["reached"]
            self.reached = reached if reached == trainer.steps_taken else None

    def run(
        self,
        batch: Callable[[int], Batch],
        steps: int,
        *,
        check: Callable[[], bool] | None = None,
        every: int = 0,
    ) -> bool:
        """Trains up to `steps`, or until `check`, called every `every` steps, is content.

        `batch(number)` gives the batch of a step. Returns whether that is done; not if the time ran
        out before. Either way a checkpoint is written.
        """
        trainer = self.trainer
        done = trainer.steps_taken
        next_save = time.monotonic() + SAVE_SECONDS
        # The next batch is drawn while a step runs.
        with ThreadPoolExecutor(1) as pool, tqdm(initial=done, total=steps, unit="step") as bar:
            upcoming = pool.submit(batch, done + 1)
            while self.reached is None and trainer.steps_taken < steps:
                now = time.monotonic()
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
                if check and step.step % every == 0 and check():
                    self.reached = step.step
        self.save()
        return True

    def save(self) -> None:
        ssmcore.save(self.trainer.model, self.folder)
        self._progress.write_text(json.dumps({"reached": self.reached}) + "\n")
        self.trainer.save(self._state)

    @property
    def _state(self) -> Path:
        return self.folder / "trainer.safetensors"

    @property
    def _progress(self) -> Path:
        return self.folder / "progress.json"


def report(folder: Path, settings: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Prints a table in Markdown, and writes result.json."""
    print(f"| {' | '.join(rows[0])} |")
    print("|---" * len(rows[0]) + "|")
    for row in rows:
        cells = (f"{v:.4f}" if isinstance(v, float) else f"{v:,}" for v in row.values())
        print(f"| {' | '.join(cells)} |")
    (folder / "result.json").write_text(json.dumps({"settings": settings, "rows": rows}, indent=1))
