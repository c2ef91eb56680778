"""Measures training on a GPU: the Mamba block forward and backward, and steps of a byte model.

    python bench/compare_training.py [--out FILE]

The block (d_model 2560, bf16, B8 L2048) and the byte model (d_model 256, 8 layers, 3.57 million
parameters, 32 x 2048 bytes a step) are those of the project's targets. A step of the byte model is
forward, backward, clipping and AdamW, in bf16: of `ssmcore.torch` with autocast and torch's own
fused optimiser, of the same in a CUDA graph, and of `ssmcore.Trainer`. The text is that of
tests/data. Times are medians by CUDA events, of steps as they follow one another; memory is what
torch allocates at most, and ssmcore's workspace, above what stood before: parameters, input and the
output's gradient. Prints a table in Markdown and writes every sample.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import ssmcore
from ssmcore.torch import Mamba, MambaConfig, MambaLMHeadModel

ROOT = Path(__file__).parents[1]
REPEATS = 20
GIB = 2**30
# Of mamba-ssm 2.3.2 on an H100, 2026-11, and the targets.
UPSTREAM = {"block": 13.61, "block peak": 1.93, "block standing": 0.95, "byte model": 37.5}
TARGETS = {"block": 9.0, "block peak": 1.93, "block standing": 0.95, "byte model": 20.0}


def device_times(call: Callable[[], Any]) -> list[float]:
    """The ms of REPEATS calls, launched while the GPU still waits."""
    samples = []
    for _ in range(REPEATS + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(2e7))
        start.record()
        call()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end))
    return samples[3:]


def step_times(step: Callable[[], Any]) -> list[float]:
    """The ms from the end of a step to that of the next, of REPEATS steps one after another."""
    ends = []
    for _ in range(REPEATS + 4):
        step()
        ends.append(torch.cuda.Event(enable_timing=True))
        ends[-1].record()
    ends[-1].synchronize()
    return [a.elapsed_time(b) for a, b in pairwise(ends[3:])]


def measure_block() -> dict[str, Any]:
    torch.manual_seed(0)

    def make(d_model: int, batch: int) -> tuple[Mamba, torch.Tensor, torch.Tensor]:
        block = Mamba(d_model, device="cuda", dtype=torch.bfloat16)
        x = torch.randn(batch, 2048, d_model, device="cuda", dtype=torch.bfloat16)
        return block, x.requires_grad_(), torch.randn_like(x)

    def own_memory() -> int:
        """Of the GPU, that torch has not reserved."""
        free, total = torch.cuda.mem_get_info()
        return total - free - torch.cuda.memory_reserved()

    small, x, dout = make(128, 1)  # loads what is loaded once
    small(x).backward(dout)
    block, x, dout = make(2560, 8)
    torch.cuda.synchronize()
    before, own_before = torch.cuda.memory_allocated(), own_memory()
    torch.cuda.reset_peak_memory_stats()
    out = block(x)
    standing = torch.cuda.memory_allocated() - before
    out.backward(dout)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before + own_memory() - own_before
    del out

    def step() -> None:
        block.zero_grad(set_to_none=True)
        x.grad = None
        block(x).backward(dout)

    return {
        "block": device_times(step),
        "block peak": peak / GIB,
        "block standing": standing / GIB,
    }


def byte_batches(batch: int, seqlen: int) -> Callable[[], torch.Tensor]:
    """(batch, seqlen + 1) random windows of the text, on the GPU."""
    text = b"".join(
        (ROOT / "tests" / "data" / f"val_{name}.txt").read_bytes() for name in ("austen", "kjv")
    )
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).cuda()
    generator = torch.Generator().manual_seed(0)

    def next_batch() -> torch.Tensor:
        begin = torch.randint(len(tokens) - seqlen, (batch, 1), generator=generator).cuda()
        return tokens[begin + torch.arange(seqlen + 1, device="cuda")].long()

    return next_batch


def byte_model() -> MambaLMHeadModel:
    torch.manual_seed(0)
    config = MambaConfig(
        d_model=256,
        n_layer=8,
        vocab_size=256,
        rms_norm=True,
        residual_in_fp32=True,
        fused_add_norm=True,
        pad_vocab_size_multiple=1,
    )
    return MambaLMHeadModel(config, device="cuda")


def measure_torch(in_graph: bool) -> list[float]:
    model, next_batch = byte_model(), byte_batches(32, 2048)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True, capturable=in_graph
    )
    window = next_batch()

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(window[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=not in_graph)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    if not in_graph:
        return step_times(lambda: (window.copy_(next_batch()), step()))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return step_times(lambda: (window.copy_(next_batch()), graph.replay()))


def measure_trainer() -> list[float]:
    folder = ROOT / "bench-results" / "byte-model"
    byte_model().save_pretrained(folder)
    model = ssmcore.load(folder, device="cuda", dtype="bfloat16", trainable=True)
    trainer = ssmcore.Trainer(model, lr=1e-3)
    next_batch = byte_batches(32, 2048)

    def step() -> None:
        window = next_batch().cpu().numpy()
        trainer.step(window[:, :-1], window[:, 1:])

    return step_times(step)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("bench-results/training.json"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("torch has no CUDA device")
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), **measure_block()}
    results["byte model"] = measure_torch(in_graph=False)
    results["byte model, Trainer"] = measure_trainer()
    results["byte model, in a graph"] = measure_torch(in_graph=True)

    print(
        f"{results['device']}\n\n| work | ssmcore | target | upstream 2026-11 |\n|---|---|---|---|"
    )
    for name, value in results.items():
        if name == "device":
            continue
        shown = (
            f"{statistics.median(value):.2f} ms" if isinstance(value, list) else f"{value:.3f} GiB"
        )
        key = name.partition(",")[0]
        print(f"| {name} | {shown} | {TARGETS.get(key, '-')} | {UPSTREAM.get(key, '-')} |")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
