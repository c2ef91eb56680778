"""Training and generation of the bundled model in PyTorch, beside transformers alone.

    python bench/compare_torch.py train ssmcore|patched|transformers [--steps N]
    python bench/compare_torch.py generate [--tokens N] [--rounds N] [--ssmcore-threads N]

A training step is forward, backward and torch's AdamW, in float32, on 4 sequences of 512 bytes of
tests/data: of ssmcore.torch's own model, of transformers' with `patch_transformers`, or of
transformers' alone, which takes minutes. Generation takes turns, with the patch and without, in one
process. Both print medians, and the process's peak memory.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import MambaForCausalLM

import ssmcore
from ssmcore.torch import MambaLMHeadModel, patch_transformers

ROOT = Path(__file__).parents[1]
BUNDLED = Path(ssmcore.__file__).parent / "assets" / "mamba1-prose"
BATCH, SEQLEN = 4, 512
PROMPT = b"It is a truth universally acknowledged, that a single man in possession of"


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def train(which: str, steps: int) -> None:
    model: Any
    if which == "ssmcore":
        model = MambaLMHeadModel.from_pretrained(BUNDLED)
    else:
        model = MambaForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32).train()
    if which == "patched":
        patch_transformers()
    text = (ROOT / "tests" / "data" / "val_austen.txt").read_bytes()
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(i: int) -> float:
        begin = i * BATCH * SEQLEN
        ids = tokens[begin : begin + BATCH * SEQLEN].view(BATCH, SEQLEN)
        logits = model(ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    warm_up = 0 if which == "transformers" else 2
    losses, times = [], []
    for i in range(warm_up + steps):
        taken = seconds(lambda i=i: losses.append(step(i)))
        if i >= warm_up:
            times.append(taken)
    print(
        f"{which}: {statistics.median(times):.3f} s a step, loss {losses[0]:.4f} at first, "
        f"peak memory {peak_mib()} MiB"
    )


def generate(tokens: int, rounds: int) -> None:
    model = MambaForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32)
    prompt = torch.tensor([list(PROMPT)])

    def run() -> torch.Tensor:
        return model.generate(prompt, max_new_tokens=tokens, do_sample=False, eos_token_id=None)

    def patched() -> torch.Tensor:
        with patch_transformers():
            return run()

    assert torch.equal(run(), patched())
    alone, with_patch = [], []
    for _ in range(rounds):
        alone.append(seconds(run))
        with_patch.append(seconds(patched))
    for name, times in (("transformers", alone), ("patched", with_patch)):
        print(f"{name}: {tokens / statistics.median(times):.0f} tokens/s")
    ratio = statistics.median(a / b for a, b in zip(alone, with_patch, strict=True))
    print(f"ratio {ratio:.2f}, peak memory {peak_mib()} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train")
    training.add_argument("which", choices=("ssmcore", "patched", "transformers"))
    training.add_argument("--steps", type=int, default=10)
    generation = commands.add_parser("generate")
    generation.add_argument("--tokens", type=int, default=200)
    generation.add_argument("--rounds", type=int, default=5)
    for command in (training, generation):
        command.add_argument("--threads", type=int, default=2, help="of torch")
        command.add_argument("--ssmcore-threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ssmcore.set_num_threads(options.ssmcore_threads)
    if options.command == "train":
        train(options.which, options.steps)
    else:
        generate(options.tokens, options.rounds)


if __name__ == "__main__":
    main()
