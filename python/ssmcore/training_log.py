"""What a training run has found so far."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

from ssmcore.errors import InvalidArgumentError
from ssmcore.trainer import TrainingStep


class TrainingLog:
    """Steps, and scores of held-out texts in bits per byte, in order: a file of JSON lines."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []

    @classmethod
    def read(cls, path: Path, last_step: int) -> TrainingLog:
        """What a file, if it is there, holds up to a step."""
        log = cls()
        try:
            lines = path.read_text().splitlines() if path.exists() else []
            entries = [json.loads(line) for line in lines]
            log.entries = [entry for entry in entries if entry["step"] <= last_step]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InvalidArgumentError(f"train: {path} cannot be read: {error}") from error
        return log

    def to_bytes(self) -> bytes:
        return "".join(json.dumps(entry) + "\n" for entry in self.entries).encode()

    def add_step(self, step: TrainingStep, tokens_per_second: float) -> None:
        self.entries.append(
            {
                "step": step.step,
                "loss": step.loss,
                "grad_norm": step.grad_norm,
                "lr": step.lr,
                "tokens_per_second": round(tokens_per_second, 1),
            }
        )

    def add_scores(self, step: int, bits_per_byte: dict[str, float]) -> None:
        """After a step, by the names of the texts."""
        self.entries.append({"step": step, "bits_per_byte": bits_per_byte})

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [entry for entry in self.entries if "loss" in entry]

    @property
    def scores(self) -> list[dict[str, Any]]:
        return [entry for entry in self.entries if "bits_per_byte" in entry]

    def summary(self) -> str:
        """The last loss and the last scores."""
        steps, scores = self.steps, self.scores
        parts = [f"loss {steps[-1]['loss']:.4f}"] if steps else []
        if scores:
            texts = scores[-1]["bits_per_byte"].items()
            parts += [f"{name} {bits:.4f} bits per byte" for name, bits in texts]
        return ", ".join(parts) or "no steps"

    def plot(self) -> bytes | None:
        """The losses as a PNG, where Matplotlib is installed."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return None
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axis = figure.add_subplot()
        steps, scores = self.steps, self.scores
        axis.plot(
            [entry["step"] for entry in steps],
            [entry["loss"] / math.log(2) for entry in steps],
            linewidth=0.8,
            label="training, bits per token",
        )
        for name in scores[-1]["bits_per_byte"] if scores else ():
            axis.plot(
                [entry["step"] for entry in scores],
                [entry["bits_per_byte"].get(name, math.nan) for entry in scores],
                marker="o",
                markersize=3,
                label=f"{name}, bits per byte",
            )
        axis.set_xlabel("step")
        axis.set_ylabel("loss")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=150)
        return png.getvalue()
