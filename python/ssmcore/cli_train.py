"""`ssmcore train`."""

from __future__ import annotations

import argparse
from typing import Any

import ssmcore
from ssmcore.train import Run, RunSettings

_SETTINGS = {
    "d_model": ("N", "width of the model"),
    "layers": ("N", "of the model"),
    "batch": ("B", "windows of text in a step"),
    "length": ("N", "tokens of a window"),
    "steps": ("N", "to take"),
    "lr": ("X", "AdamW's learning rate at its peak"),
    "warmup": ("N", "steps over which it rises; it then falls along a cosine"),
    "final_lr": ("X", "part of the peak at the last step"),
    "weight_decay": ("X", "of matrices"),
    "beta1": ("X", "AdamW's"),
    "beta2": ("X", "AdamW's"),
    "clip": ("X", "norm that the gradients are clipped to; 0: never"),
    "micro_batch": ("B", "windows whose gradients are computed at a time; 0: all"),
    "seed": ("S", "of the weights and of the order of the windows"),
    "dtype": ("T", "of activations, and of matrices on a GPU: fp32 (auto), bf16 or fp16"),
}


def add_train(commands: Any) -> None:
    """Adds the command to those of the command line."""
    parser = commands.add_parser("train", help="train a new model on texts")
    parser.set_defaults(run=_train)
    parser.add_argument("--text", nargs="+", metavar="FILE", help="UTF-8 texts to train on")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the model")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the folder's last checkpoint, if there is one, with its settings",
    )
    parser.add_argument(
        "--validation",
        nargs="+",
        metavar="FILE",
        help="UTF-8 texts to score (default: the last twentieth of each text, held out)",
    )
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="a tokenizer.json (default: one token a byte)"
    )
    for name, (metavar, text) in _SETTINGS.items():
        default = getattr(RunSettings(), name)
        parser.add_argument(
            "--" + name.replace("_", "-"),
            type=type(default),
            metavar=metavar,
            help=f"{text} (default: {default})",
        )
    parser.add_argument(
        "--recompute-layers",
        action="store_true",
        help="compute layers again instead of keeping them: less memory, more time",
    )
    for name, what in (("save", "a checkpoint"), ("eval", "a score of the held-out texts")):
        parser.add_argument(
            f"--{name}-every",
            type=int,
            default=100,
            metavar="N",
            help=f"steps to {what}; 0: only at the end (default: 100)",
        )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N or auto")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _train(args: argparse.Namespace) -> None:
    if args.threads is not None:
        ssmcore.set_num_threads(args.threads)
    given = {name: getattr(args, name) for name in _SETTINGS}
    run = Run(
        args.out,
        args.text,
        validation=args.validation,
        tokenizer=args.tokenizer,
        resume=args.resume,
        given={name: value for name, value in given.items() if value is not None},
        recompute_layers=args.recompute_layers,
        device=args.device,
    )
    run.train(args.save_every, args.eval_every, progress=not args.quiet)
    print(run.summary())
