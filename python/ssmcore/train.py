"""Training runs on texts: what `ssmcore train` does."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmcore._files import write_atomically
from ssmcore._interrupt import deferred_interrupts
from ssmcore.corpus import Corpus, read_text
from ssmcore.errors import InvalidArgumentError, NotFiniteError
from ssmcore.initialization import create
from ssmcore.loading import BUNDLED, save
from ssmcore.ops._arguments import require_size
from ssmcore.tokenizer import FileTokenizer
from ssmcore.trainer import Trainer
from ssmcore.training_log import TrainingLog

if TYPE_CHECKING:
    from tqdm import tqdm

_RUN = "training.json"  # how the run was begun
_STATE = "trainer.safetensors"
_MODEL = "model.safetensors"
_LOG = "log.jsonl"
_PLOT = "loss.png"  # where Matplotlib is installed
_HELD_OUT = 0.05


@dataclass(frozen=True)
class RunSettings:
    """What the weights that come out of a run depend on, besides its texts and its tokenizer."""

    d_model: int = 256
    layers: int = 8
    batch: int = 8
    length: int = 512
    steps: int = 1000
    lr: float = 3e-3
    warmup: int = 100
    final_lr: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    micro_batch: int = 0
    seed: int = 0
    dtype: str = "auto"


@dataclass(frozen=True)
class RunFiles:
    """The files of a run, by absolute path; without a tokenizer each byte is a token."""

    text: tuple[str, ...]
    validation: tuple[str, ...] = ()
    tokenizer: str | None = None


class Run:
    """A training run and its folder.

    The folder is a model folder like any other, as of the last checkpoint, with the state of the
    training beside it. Each file appears whole or not at all, and all that going on needs is in
    one of them, so that a run that is killed at any moment goes on from its last checkpoint.

    Args:
        folder: made if need be. One that holds a run already is refused unless `resume`.
        text: UTF-8 files to train on. None: those the run was begun with.
        validation: UTF-8 files to be scored. None: those the run was begun with; where it had none,
            the last twentieth of each text, which is then not trained on.
        tokenizer: a tokenizer.json. None: that the run was begun with, or one token a byte.
        resume: go on from the last checkpoint, or begin where there is none.
        given: settings by name that are not the defaults or, of a run that goes on, not to be read
            from it: raises InvalidArgumentError where they differ.
        recompute_layers: less memory for more time, with the same result.
        device: as in `ssmcore.load`.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        text: Sequence[str | os.PathLike[str]] | None,
        *,
        validation: Sequence[str | os.PathLike[str]] | None = None,
        tokenizer: str | os.PathLike[str] | None = None,
        resume: bool = False,
        given: Mapping[str, Any] | None = None,
        recompute_layers: bool = False,
        device: str = "auto",
    ):
        self.folder = Path(folder).expanduser()
        begun = self._begun(resume)
        files = {
            "text": None if text is None else _absolute(text),
            "validation": None if validation is None else _absolute(validation),
            "tokenizer": None if tokenizer is None else os.path.abspath(tokenizer),
        }
        if begun is None and text is None:
            missing = "text to train on" if not resume else f"run to go on with in {self.folder}"
            raise InvalidArgumentError(f"train: there is no {missing}")
        self.settings, self.files = _merged(begun, dict(given or {}), files)
        for name in ("batch", "length", "steps"):
            require_size(getattr(self.settings, name), f"train: {name}")
        self._read_texts()
        self._check_text(begun)
        settings = self.settings
        model = create(
            settings.d_model,
            settings.layers,
            self._vocab_size,
            seed=settings.seed,
            device=device,
            dtype=settings.dtype,
            tokenizer=self._tokenizer,
        )
        self.model = model
        self.trainer = Trainer(
            model,
            lr=settings.lr,
            warmup_steps=settings.warmup,
            total_steps=settings.steps,
            final_lr=settings.final_lr,
            betas=(settings.beta1, settings.beta2),
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.clip,
            micro_batch=settings.micro_batch,
            recompute_layers=recompute_layers,
        )
        self._is_new = begun is None
        self.log = TrainingLog()
        self._saved_step = 0
        if (self.folder / _STATE).exists():
            self.trainer.load(self.folder / _STATE)
            self._saved_step = self.trainer.steps_taken
            self.log = TrainingLog.read(self.folder / _LOG, self._saved_step)

    def train(self, save_every: int, eval_every: int, *, progress: bool = True) -> None:
        """Takes the steps that are left, with a checkpoint every `save_every` and at the end, and a
        score of the held-out texts every `eval_every` and at the end; 0: only then.

        A checkpoint that cannot be written is reported and costs no more than itself; the last one
        raises InvalidArgumentError. What is interrupted by Ctrl-C is saved.

        Raises:
            NotFiniteError: for a loss, a gradient or a score that is infinite or NaN. The last
                checkpoint is kept.
            BackendError: for a batch that does not fit in memory.
        """
        from tqdm import tqdm

        settings, trainer = self.settings, self.trainer
        with (
            self._locked(),
            tqdm(
                desc=f"{self.model.num_parameters:,} parameters",
                total=settings.steps,
                initial=trainer.steps_taken,
                unit="step",
                disable=not progress,
            ) as bar,
            deferred_interrupts() as check_interrupt,
        ):
            try:
                # Ctrl-C may have come before it.
                is_new = self._evaluate_if_due(eval_every, check_interrupt)
                while trainer.steps_taken < settings.steps:
                    self._step(bar)
                    check_interrupt()
                    step = trainer.steps_taken
                    self._evaluate_if_due(eval_every, check_interrupt)
                    if step < settings.steps and _is_due(step, save_every, settings.steps):
                        self._try_to_save(bar)
            except NotFiniteError as error:
                raise NotFiniteError(f"{error}; {self._kept()}") from error
            except KeyboardInterrupt:
                self.save()
                raise
            if is_new or self._saved_step < settings.steps:
                self.save()

    def save(self) -> None:
        """Writes a checkpoint over the one before."""
        write_atomically(self.folder / _LOG, self.log.to_bytes(), "train")
        save(self.model, self.folder)
        self.trainer.save(self.folder / _STATE)
        self._saved_step = self.trainer.steps_taken
        plot = self.log.plot()
        if plot is not None:
            write_atomically(self.folder / _PLOT, plot, "train")

    def summary(self) -> str:
        """What the last step found, and the last scores of the held-out texts."""
        taken = f"step {self.trainer.steps_taken} of {self.settings.steps}"
        return f"{self.folder}: {taken}, {self.log.summary()}"

    def _step(self, bar: tqdm[Any]) -> None:
        settings = self.settings
        begin = time.perf_counter()
        ids = self._corpus.batch(settings.batch, settings.seed, self.trainer.steps_taken + 1)
        step = self.trainer.step(ids[:, :-1], ids[:, 1:])
        rate = settings.batch * settings.length / (time.perf_counter() - begin)
        self.log.add_step(step, rate)
        bar.update()
        bar.set_postfix_str(f"loss {step.loss:.4f}, {rate:,.0f} tok/s")

    def _evaluate_if_due(self, every: int, check_interrupt: Callable[[], None]) -> bool:
        """Whether there is a new score."""
        step, scores = self.trainer.steps_taken, self.log.scores
        is_known = step == 0 or (bool(scores) and scores[-1]["step"] == step)
        if is_known or not _is_due(step, every, self.settings.steps):
            return False
        bits = {
            name: self.model.score(
                text, self.settings.length, lambda *_: check_interrupt()
            ).bits_per_byte
            for name, text in self._held_out.items()
        }
        for name, value in bits.items():
            if not math.isfinite(value):
                raise NotFiniteError(f"train: after step {step} the score of {name} is {value}")
        self.log.add_scores(step, bits)
        return True

    def _try_to_save(self, bar: tqdm[Any]) -> None:
        try:
            self.save()
        except InvalidArgumentError as error:
            step = self.trainer.steps_taken
            bar.write(
                f"step {step}: {error}; {self._kept()}, and training goes on", file=sys.stderr
            )

    def _kept(self) -> str:
        if self._saved_step == 0:
            return f"there is no checkpoint in {self.folder} yet"
        return f"the checkpoint of step {self._saved_step} in {self.folder} is kept"

    def _begun(self, resume: bool) -> dict[str, Any] | None:
        """How a run in the folder was begun."""
        path = self.folder / _RUN
        if not path.exists():
            if (self.folder / _MODEL).exists():
                raise InvalidArgumentError(
                    f"train: {self.folder} holds a model that is of no run; name another folder"
                )
            return None
        if not resume and not (self.folder / _STATE).exists():
            return None  # one that came to no checkpoint
        if not resume:
            raise InvalidArgumentError(
                f"train: {self.folder} holds a run already; go on with it (--resume) or name "
                "another folder"
            )
        try:
            begun: dict[str, Any] = json.loads(path.read_bytes())
            RunSettings(**begun["settings"])
            RunFiles(**begun["files"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InvalidArgumentError(f"train: {path} cannot be read: {error}") from error
        return begun

    def _read_texts(self) -> None:
        """What is trained on, and what is held out, by name."""
        tokenizer = FileTokenizer(self.files.tokenizer or BUNDLED / "tokenizer.json")
        texts = {file: read_text(file, "train") for file in self.files.text}
        held_out = {file: read_text(file, "train") for file in self.files.validation}
        if not held_out:
            for file, text in texts.items():
                end = len(text) - math.ceil(_HELD_OUT * len(text))
                texts[file], held_out[file] = text[:end], text[end:]
        self._tokenizer = tokenizer
        self._vocab_size = tokenizer.vocab_size
        length = self.settings.length
        self._corpus = Corpus(list(texts.values()), tokenizer, self._vocab_size, length)
        self._digest = hashlib.sha256(self._corpus.tokens.tobytes()).hexdigest()
        names = [Path(file).name for file in held_out]
        are_unique = len(set(names)) == len(names)
        self._held_out = dict(
            zip(names if are_unique else held_out, held_out.values(), strict=True)
        )
        for file, text in held_out.items():
            num_tokens = len(tokenizer.encode(text, add_special_tokens=False))
            if num_tokens <= length:
                raise InvalidArgumentError(
                    f"train: what is held out of {file} has {num_tokens} tokens, expected at least "
                    f"{length + 1}: a window of {length} and the next"
                )

    def _check_text(self, begun: dict[str, Any] | None) -> None:
        if begun is not None and begun.get("tokens_sha256") != self._digest:
            raise InvalidArgumentError(
                f"train: {self.folder} was begun with other text, another tokenizer or other text "
                f"held out: the tokens of {', '.join(self.files.text)} are not those of then"
            )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """No other run writes to the folder meanwhile. What one that was killed was writing is
        cleared away, and how a new one begins is noted."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder, os.O_RDONLY)
        except OSError as error:
            raise InvalidArgumentError(f"train: {self.folder}: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for unfinished in self.folder.glob("*.tmp-*"):
                unfinished.unlink()
            if self._is_new:
                self._begun(resume=False)
                self._note_beginning()
                self._is_new = False
            yield
        except BlockingIOError as error:
            raise InvalidArgumentError(f"train: another run is using {self.folder}") from error
        finally:
            os.close(descriptor)

    def _note_beginning(self) -> None:
        begun = {
            "settings": asdict(self.settings),
            "files": asdict(self.files),
            "tokens_sha256": self._digest,
        }
        text = json.dumps(begun, indent=1) + "\n"
        write_atomically(self.folder / _RUN, text.encode(), "train")


def _absolute(files: Sequence[str | os.PathLike[str]]) -> tuple[str, ...]:
    return tuple(os.path.abspath(file) for file in files)


def _merged(
    begun: dict[str, Any] | None, given: dict[str, Any], files: dict[str, Any]
) -> tuple[RunSettings, RunFiles]:
    """Settings and files of a new run, or of one that goes on: what is given must be the same."""
    known = {field.name for field in fields(RunSettings)}
    if unknown := set(given) - known:
        raise InvalidArgumentError(f"train: there is no setting {min(unknown)!r}")
    given_files = {name: value for name, value in files.items() if value is not None}
    if begun is None:
        return RunSettings(**given), RunFiles(**given_files)
    differing = [
        f"{name} {begun['settings'][name]!r}, not {value!r}"
        for name, value in given.items()
        if begun["settings"][name] != value
    ]
    if differing:
        raise InvalidArgumentError(f"train: the run was begun with {'; '.join(differing)}")
    begun_files = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in begun["files"].items()
    }
    return RunSettings(**begun["settings"]), RunFiles(**{**begun_files, **given_files})


def _is_due(step: int, every: int, steps: int) -> bool:
    return step == steps or (every > 0 and step % every == 0)
