"""How fast a model reads prompts and generates, by batch size: what `ssmcore bench` runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import ssmcore
from ssmcore import _core
from ssmcore._cublaslt import find_cublaslt
from ssmcore.errors import InvalidArgumentError
from ssmcore.model import Model
from ssmcore.random_model import SHAPES, random_checkpoint

if TYPE_CHECKING:
    from ssmcore.decoder import Decoder

_SECONDS = 1.0  # of repeats of one measurement
_REPEATS = 20
_WARM_STEPS = 4


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One batch size: `batch` prompts of `prompt` tokens, then `new` more for each."""

    batch: int
    prompt: int
    new: int
    prefill_seconds: float  # of all prompts
    step_seconds: float  # of one more token for each
    memory_bytes: int  # beyond what was used before the model was loaded

    @property
    def prompt_tokens_per_second(self) -> float:
        return self.batch * self.prompt / self.prefill_seconds

    @property
    def new_tokens_per_second(self) -> float:
        """With the prompts read in between, as the paper counts."""
        seconds = self.prefill_seconds + self.new * self.step_seconds
        return self.batch * self.new / seconds


def random_model(shape: str, device: str, dtype: str | None) -> Model:
    """A model of one of the published shapes, with random weights of its activations' type."""
    if shape not in SHAPES:
        raise InvalidArgumentError(f"bench: shape should be one of {', '.join(SHAPES)}: {shape!r}")
    stored = dtype or ("float32" if device == "cpu" else "bfloat16")
    find_cublaslt()
    checkpoint = random_checkpoint(shape, stored)
    return Model(_core.LanguageModel(checkpoint, stored, device=device), None)


def memory_in_use(device: str) -> int:
    """The bytes of a GPU that anybody uses; of the CPU those that this process has used at most."""
    if device == "cpu":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    free, total = _core.device_memory(device)
    return total - free


def measure(model: Model, batch: int, prompt: int, new: int, memory_before: int) -> Measurement:
    """Times `batch` prompts of random tokens, and steps of greedy decoding."""
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (batch, prompt))
    state = model.new_state(batch)

    def prefill() -> None:
        model.forward(ids, state, "last")

    prefill_seconds = _median_seconds(prefill)
    decoder = model.new_decoder(state)
    decoder.admit(range(batch), ids[:, :1])
    decoder.take()
    _run_steps(decoder, batch, _WARM_STEPS)
    steps_seconds = _median_seconds(lambda: _run_steps(decoder, batch, new))
    return Measurement(
        batch=batch,
        prompt=prompt,
        new=new,
        prefill_seconds=prefill_seconds,
        step_seconds=steps_seconds / new,
        memory_bytes=memory_in_use(model.device) - memory_before,
    )


def table(rows: Sequence[Measurement]) -> str:
    lines = [
        "| batch | prompt | new | prefill, ms | prefill, tok/s | a token, ms | tok/s | GiB |",
        "|---" * 8 + "|",
    ]
    lines += [
        f"| {row.batch} | {row.prompt} | {row.new} | {row.prefill_seconds * 1e3:.2f} | "
        f"{row.prompt_tokens_per_second:.0f} | {row.step_seconds * 1e3:.3f} | "
        f"{row.new_tokens_per_second:.0f} | {row.memory_bytes / 2**30:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


def as_json(model: Model, name: str, rows: Sequence[Measurement]) -> dict[str, Any]:
    return {
        "ssmcore": ssmcore.__version__,
        "model": name,
        "device": model.device,
        "dtype": model.dtype,
        "parameters": model.num_parameters,
        "measurements": [
            {
                **asdict(row),
                "prompt_tokens_per_second": row.prompt_tokens_per_second,
                "new_tokens_per_second": row.new_tokens_per_second,
            }
            for row in rows
        ],
    }


def plot(path: Path, name: str, rows: Sequence[Measurement]) -> None:
    """Throughput against batch size. Needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InvalidArgumentError("bench: --plot needs matplotlib") from None
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.add_subplot()
    axis.plot([row.batch for row in rows], [row.new_tokens_per_second for row in rows], marker="o")
    axis.set_xscale("log", base=2)
    axis.set_xlabel("batch size")
    axis.set_ylabel("new tokens a second")
    axis.set_title(f"{name}: prompts of {rows[0].prompt} tokens, {rows[0].new} new")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _run_steps(decoder: Decoder, batch: int, count: int) -> None:
    """Steps as generation runs them: on a GPU one ahead of the tokens that are taken."""
    slots = np.arange(batch)
    decoder.step(slots)
    for _ in range(count - 1):
        if decoder.runs_ahead:
            decoder.step(slots)
            decoder.take()
        else:
            decoder.take()
            decoder.step(slots)
    decoder.take()


def _median_seconds(call: Callable[[], None]) -> float:
    """The time of one call; the first warms up, unless it takes long."""
    seconds: list[float] = []
    while len(seconds) <= _REPEATS and sum(seconds) < _SECONDS:
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:] or seconds)
