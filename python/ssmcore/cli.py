"""The command line: `ssmcore generate`, `eval`, `train`, `info` and `bench`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import ssmcore
from ssmcore.cli_train import add_train
from ssmcore.generate import Generation, GenerationSettings

if TYPE_CHECKING:
    from ssmcore.model import Model
    from ssmcore.state import State

_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
_CLOSED_PIPE = 141  # 128 + SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 2 for an error, 130 after Ctrl-C."""
    try:
        args = _make_parser().parse_args(argv)
        args.run(args)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:
        # Whoever read has left; the interpreter's own flush at exit must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _CLOSED_PIPE
    except (ssmcore.Error, OSError) as error:
        return _report(error)
    except MemoryError as error:
        return _report(f"out of memory: {error}" if str(error) else "out of memory")
    except KeyboardInterrupt:
        return _INTERRUPTED


def _report(error: object) -> int:
    print("ssmcore: error:", " ".join(str(error).split()), file=sys.stderr)
    return 2


class _Parser(argparse.ArgumentParser):
    """Reports an error in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        sys.exit(_report(message))


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="ssmcore", description="Selective state space models (Mamba).")
    parser.add_argument("--version", action="version", version=f"ssmcore {ssmcore.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    common = _Parser(add_help=False)
    common.add_argument(
        "-m", "--model", help="model folder or Hugging Face hub id (default: the bundled model)"
    )
    common.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:N or auto, the first GPU if there is one (default: auto)",
    )
    common.add_argument(
        "--dtype", default="auto", help="of activations: auto, fp32, bf16 or fp16 (default: auto)"
    )
    common.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")

    generate = commands.add_parser("generate", parents=[common], help="continue a prompt")
    generate.set_defaults(run=_generate)
    generate.add_argument("prompt", nargs="?", metavar="PROMPT", help="text, or - to read stdin")
    generate.add_argument("-f", "--file", metavar="FILE", help="read the prompt from a file")
    generate.add_argument(
        "--state-in", metavar="FILE", help="go on after the text that --state-out has saved"
    )
    generate.add_argument(
        "--state-out",
        metavar="FILE",
        help="save the model's state after prompt and continuation (with -n 0: after the prompt)",
    )
    _add_settings(generate)
    generate.add_argument(
        "--json", action="store_true", help="print one JSON object with the text and the statistics"
    )
    generate.add_argument("--quiet", action="store_true", help="no statistics on stderr")

    evaluate = commands.add_parser("eval", parents=[common], help="score texts: bits per byte")
    evaluate.set_defaults(run=_eval)
    evaluate.add_argument("files", nargs="+", metavar="FILE", help="UTF-8 text, or - for stdin")
    evaluate.add_argument(
        "--window",
        type=int,
        metavar="N",
        help="score windows of N tokens, each from an empty state (default: a file as one)",
    )
    evaluate.add_argument("--quiet", action="store_true", help="no progress bar")

    add_train(commands)

    bench = commands.add_parser(
        "bench", parents=[common], help="measure reading and generating by batch size"
    )
    bench.set_defaults(run=_bench)
    bench.add_argument(
        "--shape", metavar="S", help="random weights of 130m, 370m, 790m, 1.4b or 2.8b instead"
    )
    bench.add_argument(
        "--batch", type=int, nargs="+", default=[1], metavar="B", help="sizes (default: 1)"
    )
    bench.add_argument(
        "--prompt", type=int, default=2048, metavar="N", help="tokens of each (default: 2048)"
    )
    bench.add_argument(
        "--new", type=int, default=128, metavar="N", help="more for each (default: 128)"
    )
    bench.add_argument("--json", metavar="FILE", help="write the measurements")
    bench.add_argument("--plot", metavar="FILE", help="draw throughput against batch size")

    info = commands.add_parser("info", parents=[common], help="describe a model and this build")
    info.set_defaults(run=_info)
    return parser


def _add_settings(generate: argparse.ArgumentParser) -> None:
    settings = (
        (("-n", "--max-new-tokens"), int, "N", "generate at most N tokens"),
        (("--temperature",), float, "T", "0 takes the likeliest token, more is more random"),
        (("--top-k",), int, "K", "choose among the K likeliest, 0: among all"),
        (("--top-p",), float, "P", "choose among the likeliest that together reach P"),
        (("--min-p",), float, "P", "choose among those of at least P times the likeliest"),
        (("--repetition-penalty",), float, "R", "above 1: repeat less"),
        (("--seed",), int, "S", "of the random choices"),
    )
    defaults = GenerationSettings()
    for flags, kind, metavar, text in settings:
        action = generate.add_argument(
            *flags, type=kind, metavar=metavar, help=f"{text} (default: %(default)s)"
        )
        action.default = getattr(defaults, action.dest)
    generate.add_argument(
        "--stop", action="append", metavar="TEXT", help="end before this text; may be repeated"
    )
    generate.add_argument(
        "--ignore-eos", action="store_true", help="go on after an end-of-sequence token"
    )


def _load(args: argparse.Namespace) -> Model:
    """The model, loaded behind a progress bar where it takes long and somebody looks on."""
    if args.threads is not None:
        ssmcore.set_num_threads(args.threads)
    from tqdm import tqdm

    quiet = getattr(args, "quiet", False) or not sys.stderr.isatty()
    with tqdm(
        desc="loading", unit="B", unit_scale=True, disable=quiet, leave=False, delay=0.5
    ) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return ssmcore.load(args.model, device=args.device, dtype=args.dtype, progress=show)


@dataclass(frozen=True)
class _Statistics:
    """What a run of generate took; a rate that nothing was measured for is None."""

    prompt_tokens: int
    generated_tokens: int
    prompt_tokens_per_second: float | None
    generation_tokens_per_second: float | None  # the first token counts to the prompt
    seconds_to_first_token: float | None
    peak_memory_bytes: int

    def __str__(self) -> str:
        parts = [
            f"prompt: {self.prompt_tokens} tokens{_at(self.prompt_tokens_per_second)}",
            f"generation: {self.generated_tokens} tokens{_at(self.generation_tokens_per_second)}",
        ]
        if self.seconds_to_first_token is not None:
            parts.append(f"first token after {self.seconds_to_first_token * 1e3:.1f} ms")
        parts.append(f"peak memory {self.peak_memory_bytes / 2**20:.0f} MiB")
        return " | ".join(parts)


def _at(rate: float | None) -> str:
    return "" if rate is None else f" at {rate:.1f} tok/s"


def _generate(args: argparse.Namespace) -> None:
    if (args.prompt is None) == (args.file is None):
        raise ssmcore.InvalidArgumentError("generate: expected a PROMPT, -f FILE, or - for stdin")
    if args.file is not None:
        prompt = _read_text(args.file)
    else:
        prompt = _read_text("-") if args.prompt == "-" else args.prompt
    names = GenerationSettings.__dataclass_fields__
    settings = GenerationSettings(**{name: getattr(args, name) for name in names})

    model = _load(args)
    state = _open_state(model, args)
    generation = model.start_generation(prompt, settings, state=state)
    pieces: list[str] = []
    statistics = _run(generation, pieces.append if args.json else _print_at_once)
    if state is not None and args.state_out is not None:
        state.save(args.state_out)
    if args.json:
        print(json.dumps({"text": "".join(pieces), **asdict(statistics)}))
        return
    if sys.stdout.isatty():
        print(flush=True)
    if not args.quiet:
        print(statistics, file=sys.stderr)


def _open_state(model: Model, args: argparse.Namespace) -> State | None:
    """The state to go on from and to save, if either is asked for."""
    if args.state_in is None and args.state_out is None:
        return None
    # Before the work is done, not after.
    if args.state_out is not None and not Path(args.state_out).absolute().parent.is_dir():
        raise ssmcore.InvalidArgumentError(
            f"generate: --state-out {args.state_out}: there is no such folder"
        )
    state = model.new_state()
    if args.state_in is not None:
        state.load(args.state_in)
    return state


def _run(generation: Generation, write: Callable[[str], object]) -> _Statistics:
    """Runs to the end, handing each piece of text to `write`."""
    times = [time.perf_counter()]
    for _, piece in generation:
        times.append(time.perf_counter())
        write(piece)
    num_prompt, num_generated = generation.prompts[0].size, len(times) - 1
    to_first = times[1] - times[0] if num_generated else None
    return _Statistics(
        prompt_tokens=num_prompt,
        generated_tokens=num_generated,
        prompt_tokens_per_second=num_prompt / to_first if to_first else None,
        generation_tokens_per_second=(
            (num_generated - 1) / (times[-1] - times[1]) if num_generated > 1 else None
        ),
        seconds_to_first_token=to_first,
        peak_memory_bytes=_peak_memory_bytes(),
    )


def _eval(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    texts = {file: _read_text(file) for file in args.files}
    model = _load(args)
    for file, text in texts.items():
        begin = time.perf_counter()
        with tqdm(desc=file, unit="tok", unit_scale=True, disable=args.quiet, leave=False) as bar:

            def show(done: int, total: int, bar: tqdm[Any] = bar) -> None:
                bar.total = total
                bar.update(done - bar.n)

            score = model.score(text, args.window, progress=show)
        rate = score.tokens / (time.perf_counter() - begin)
        print(
            f"{file}: {score.bits_per_byte:.4f} bits per byte, perplexity {score.perplexity:.4f}, "
            f"{score.tokens} tokens, {rate:.0f} tok/s",
            flush=True,
        )


def _bench(args: argparse.Namespace) -> None:
    from ssmcore import benchmark
    from ssmcore.loading import dtype_of, resolved_device

    if min(*args.batch, args.prompt, args.new) < 1:
        raise ssmcore.InvalidArgumentError("bench: expected sizes of at least 1")
    if args.shape is not None and args.model is not None:
        raise ssmcore.InvalidArgumentError("bench: expected a model or a shape, got both")
    device = resolved_device(args.device)
    memory_before = benchmark.memory_in_use(device)
    if args.shape is None:
        model, name = _load(args), args.model or "bundled (mamba1-prose)"
    else:
        model, name = benchmark.random_model(args.shape, device, dtype_of(args.dtype)), args.shape
    rows = [
        benchmark.measure(model, batch, args.prompt, args.new, memory_before)
        for batch in args.batch
    ]
    print(f"{name}, {model.num_parameters:,} parameters, {model.dtype}, on {model.device}\n")
    print(benchmark.table(rows))
    if args.json is not None:
        Path(args.json).write_text(json.dumps(benchmark.as_json(model, name, rows), indent=1))
    if args.plot is not None:
        benchmark.plot(Path(args.plot), name, rows)


def _info(args: argparse.Namespace) -> None:
    from ssmcore import _core

    model = _load(args)
    config = model.config
    eos = ", ".join(map(str, config.eos_token_ids)) or "none"
    rows = {
        "model": args.model or "bundled (mamba1-prose)",
        "type": f"{config.model_type}, in the format of {config.format}",
        "parameters": f"{model.num_parameters:,}",
        "layers": config.n_layer,
        "d_model": config.d_model,
        "dim": config.dim,
        "dstate": config.dstate,
        "width": config.width,
        "dt_rank": config.dt_rank,
        "vocabulary": f"{config.vocab_size} (end of sequence: {eos})",
        "head": "tied to the embedding" if config.tie_embeddings else "untied",
        "tokenizer": "none" if model.tokenizer is None else type(model.tokenizer).__name__,
        "state": f"{model.new_state(1).nbytes:,} bytes a sequence",
        "activations": model.dtype,
        "ssmcore": ssmcore.__version__,
        "device": model.device,
        "cpu": f"{_core.isa()}, {ssmcore.num_threads()} threads",
    }
    for name, value in rows.items():
        print(f"{name:<12}{value}")


def _read_text(file: str) -> str:
    """The text of a file, or of stdin for "-"."""
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return data.decode()
    except OSError as error:
        raise ssmcore.InvalidArgumentError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ssmcore.InvalidArgumentError(f"{file} is not UTF-8 text: {error}") from error


def _print_at_once(text: str) -> None:
    # Straight to the buffer: the text is UTF-8 whatever the locale says.
    sys.stdout.buffer.write(text.encode())
    sys.stdout.buffer.flush()


def _peak_memory_bytes() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
