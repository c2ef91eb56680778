"""Measures ssmcore on a GPU beside mamba_ssm and causal_conv1d, and the scan beside attention.

    python bench/compare_gpu.py [--quick] [--out FOLDER]

Inputs are random torch tensors; mamba_ssm and causal_conv1d are measured where they are installed.
A time is the median of 20 calls by CUDA events, on a cold L2 and launched while the GPU still
waits, so that the host's part does not count; all packages take turns. Prints tables in Markdown
and writes results.json with every sample and, with matplotlib, crossover.png and crossover.svg:
time against sequence length. --quick leaves out what takes longest.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import ssmcore

Call = Callable[[], Any]

REPEATS = 20
SECONDS = 2.0  # for one point of the crossover, where that allows fewer calls
L_FIRST, D_FIRST, N_FIRST = "L contiguous", "D contiguous", "N contiguous"
# The scan (D 1024, N 16) by sequence length, in ms: upstream, H100, 2026-11.
UPSTREAM_SCAN = {512: 0.025, 2048: 0.050, 8192: 0.194, 32768: 0.729, 65536: 1.457}


@dataclass(frozen=True)
class Work:
    """What is measured, in one layout. Times are in ms.

    `upstream` is of mamba-ssm 2.3.2 or causal-conv1d 1.6.1 on an H100, 2026-11; upstream's scan
    takes L contiguous and copies what is not, and its time is without that.
    """

    name: str
    layout: str
    calls: Callable[..., dict[str, Call]]
    sizes: dict[str, Any]
    upstream: float
    target: float


def works() -> list[Work]:
    """The operators and the block of the project's targets, each in its layouts."""
    scans = [
        (8, 4096, 2048, 16, torch.bfloat16, 1.169, 0.39),
        (8, 5120, 2048, 16, torch.bfloat16, 1.447, 0.48),
        (1, 4096, 2048, 16, torch.bfloat16, 0.163, 0.065),
        (1, 1024, 65536, 16, torch.bfloat16, 1.498, 0.55),
        (1, 2048, 524288, 16, torch.bfloat16, 23.4, 8.5),
        (8, 4096, 2048, 64, torch.bfloat16, 3.892, 1.5),
        (8, 4096, 2048, 16, torch.float32, 2.281, 0.60),
    ]
    result = []
    for batch, dim, seqlen, dstate, dtype, upstream, target in scans:
        name = f"scan, B{batch} D{dim} L{seqlen}"
        name += f" N{dstate}" * (dstate != 16) + " fp32" * (dtype == torch.float32)
        sizes = {"batch": batch, "dim": dim, "seqlen": seqlen, "dstate": dstate, "dtype": dtype}
        for layout in (L_FIRST, D_FIRST):
            result.append(Work(name, layout, scan, sizes, upstream, target))
    backwards = [
        (8, 4096, 2048, torch.bfloat16, 4.786, 1.60),
        (8, 5120, 2048, torch.bfloat16, 6.000, 2.0),
        (1, 4096, 2048, torch.bfloat16, 0.725, 0.26),
        (1, 1024, 65536, torch.bfloat16, 5.717, 1.9),
    ]
    for batch, dim, seqlen, dtype, upstream, target in backwards:
        name = f"scan backward, B{batch} D{dim} L{seqlen}"
        sizes = {"batch": batch, "dim": dim, "seqlen": seqlen, "dstate": 16, "dtype": dtype}
        for layout in (L_FIRST, D_FIRST):
            result.append(Work(name, layout, scan_backward, sizes, upstream, target))
    sizes = {"batch": 8, "dim": 4096, "seqlen": 2048}
    for layout, upstream in ((L_FIRST, 0.098), (D_FIRST, 0.109)):
        name = "conv1d + SiLU, B8 D4096 L2048"
        result.append(Work(name, layout, convolution, sizes, upstream, 0.094))
    for layout, upstream in ((L_FIRST, 0.270), (D_FIRST, 0.234)):
        name = "conv1d + SiLU backward, B8 D4096 L2048"
        result.append(Work(name, layout, convolution_backward, sizes, upstream, 0.150))
    sizes = {"batch": 256, "dim": 5120, "dstate": 16}
    for layout in (N_FIRST, D_FIRST):
        name = "state update, B256 D5120"
        result.append(Work(name, layout, state_update, sizes, 0.0665, 0.062))
    sizes = {"batch": 8, "seqlen": 2048, "d_model": 2560}
    result.append(Work("block, d_model 2560, B8 L2048", D_FIRST, block, sizes, 3.446, 2.55))
    return result


def uniform(least: float, most: float, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda").uniform_(least, most)


def scan_inputs(
    layout: str, batch: int, dim: int, seqlen: int, dstate: int, dtype: torch.dtype
) -> dict[str, Any]:
    def sequence(least: float, most: float, rows: int) -> torch.Tensor:
        if layout == L_FIRST:
            return uniform(least, most, batch, rows, seqlen, dtype=dtype)
        return uniform(least, most, batch, seqlen, rows, dtype=dtype).transpose(1, 2)

    # Ranges of a trained model: A from -16 to -1, Δ around 0.01.
    return {
        "u": sequence(-1, 1, dim),
        "delta": sequence(-1, 1, dim),
        "A": uniform(-16, -1, dim, dstate, dtype=torch.float32),
        "B": sequence(-1, 1, dstate),
        "C": sequence(-1, 1, dstate),
        "D": uniform(-1, 1, dim, dtype=torch.float32),
        "z": sequence(-2, 2, dim),
        "delta_bias": uniform(-6, -3, dim, dtype=torch.float32),
        "delta_softplus": True,
    }


def scan(layout: str, **sizes: Any) -> dict[str, Call]:
    parameters = scan_inputs(layout, **sizes)
    calls = {"ssmcore": lambda: ssmcore.ops.selective_scan(**parameters, return_last_state=False)}
    if importlib.util.find_spec("mamba_ssm"):
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        calls["upstream"] = lambda: selective_scan_fn(**parameters)
    return calls


def scan_backward(layout: str, **sizes: Any) -> dict[str, Call]:
    """All gradients, from the states that the forward saves every 32 steps."""
    parameters = scan_inputs(layout, **sizes)
    dout = torch.empty_like(parameters["u"]).uniform_(-1, 1)
    *_, states = ssmcore.ops.selective_scan(**parameters, chunk_size=32)
    saved = {"dout": dout, "chunk_states": states, "chunk_size": 32}
    calls = {"ssmcore": lambda: ssmcore.ops.selective_scan_bwd(**parameters, **saved)}
    if importlib.util.find_spec("mamba_ssm"):
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        with torch.inference_mode(False), torch.enable_grad():
            leaves = {
                name: value.clone().requires_grad_() if torch.is_tensor(value) else value
                for name, value in parameters.items()
            }
            out, of_out = selective_scan_fn(**leaves), dout.clone()
        inputs = [value for value in leaves.values() if torch.is_tensor(value)]

        def upstream() -> Any:
            with torch.inference_mode(False), torch.enable_grad():
                return torch.autograd.grad(out, inputs, of_out, retain_graph=True)

        calls["upstream"] = upstream
    return calls


def convolution_inputs(layout: str, batch: int, dim: int, seqlen: int) -> list[torch.Tensor]:
    """x, weight and bias."""
    dtype = torch.bfloat16
    if layout == L_FIRST:
        x = uniform(-1, 1, batch, dim, seqlen, dtype=dtype)
    else:
        x = uniform(-1, 1, batch, seqlen, dim, dtype=dtype).transpose(1, 2)
    return [x, uniform(-1, 1, dim, 4, dtype=dtype), uniform(-1, 1, dim, dtype=dtype)]


def convolution(layout: str, batch: int, dim: int, seqlen: int) -> dict[str, Call]:
    x, weight, bias = convolution_inputs(layout, batch, dim, seqlen)
    calls = {"ssmcore": lambda: ssmcore.ops.causal_conv1d(x, weight, bias, "silu")}
    if importlib.util.find_spec("causal_conv1d"):
        from causal_conv1d import causal_conv1d_fn

        calls["upstream"] = lambda: causal_conv1d_fn(x, weight, bias, activation="silu")
    return calls


def convolution_backward(layout: str, batch: int, dim: int, seqlen: int) -> dict[str, Call]:
    x, weight, bias = convolution_inputs(layout, batch, dim, seqlen)
    dout = torch.empty_like(x).uniform_(-1, 1)
    calls = {"ssmcore": lambda: ssmcore.ops.causal_conv1d_bwd(dout, x, weight, bias, "silu")}
    if importlib.util.find_spec("causal_conv1d"):
        from causal_conv1d.cpp_functions import causal_conv1d_bwd_function

        calls["upstream"] = lambda: causal_conv1d_bwd_function(
            x, weight, bias, dout, None, None, None, None, False, True
        )
    return calls


def state_update(layout: str, batch: int, dim: int, dstate: int) -> dict[str, Call]:
    def rows(least: float, most: float, length: int) -> torch.Tensor:
        return uniform(least, most, batch, length, dtype=torch.bfloat16)

    def by_state(least: float, most: float, *leading: int) -> torch.Tensor:
        """(…, dim, dstate)"""
        if layout == N_FIRST:
            return uniform(least, most, *leading, dim, dstate, dtype=torch.float32)
        return uniform(least, most, *leading, dstate, dim, dtype=torch.float32).mT

    parameters = {
        "state": by_state(-1, 1, batch),
        "x": rows(-1, 1, dim),
        "dt": rows(-1, 1, dim),
        "A": by_state(-16, -1),
        "B": rows(-1, 1, dstate),
        "C": rows(-1, 1, dstate),
        "D": uniform(-1, 1, dim, dtype=torch.float32),
        "z": rows(-2, 2, dim),
        "dt_bias": uniform(-6, -3, dim, dtype=torch.float32),
        "dt_softplus": True,
    }
    calls = {"ssmcore": lambda: ssmcore.ops.selective_state_update(**parameters)}
    if importlib.util.find_spec("mamba_ssm"):
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update

        calls["upstream"] = lambda: selective_state_update(**parameters)
    return calls


def block(layout: str, batch: int, seqlen: int, d_model: int) -> dict[str, Call]:
    dim, dstate, dt_rank, dtype = 2 * d_model, 16, d_model // 16, torch.bfloat16

    def matrix(rows: int, columns: int) -> torch.Tensor:
        bound = columns**-0.5
        return uniform(-bound, bound, rows, columns, dtype=dtype)

    x = uniform(-1, 1, batch, seqlen, d_model, dtype=dtype)
    weights = {
        "in_proj.weight": matrix(2 * dim, d_model),
        "conv1d.weight": uniform(-0.5, 0.5, dim, 1, 4, dtype=dtype),
        "conv1d.bias": uniform(-0.5, 0.5, dim, dtype=dtype),
        "x_proj.weight": matrix(dt_rank + 2 * dstate, dim),
        "dt_proj.weight": matrix(dim, dt_rank),
        "dt_proj.bias": uniform(-6, -3, dim, dtype=torch.float32),
        "A_log": torch.arange(1.0, dstate + 1, device="cuda").log().repeat(dim, 1),
        "D": uniform(-1, 1, dim, dtype=torch.float32),
        "out_proj.weight": matrix(d_model, dim),
    }
    calls = {"ssmcore": lambda: ssmcore.ops.mamba_block(x, weights)}
    if importlib.util.find_spec("mamba_ssm"):
        from mamba_ssm import Mamba

        module = Mamba(d_model, device="cuda", dtype=dtype)
        calls["upstream"] = lambda: module(x)
    return calls


def attention(seqlen: int) -> Call:
    """Causal attention of 16 heads of 64 by FlashAttention."""
    q, k, v = (uniform(-1, 1, 1, 16, seqlen, 64, dtype=torch.bfloat16) for _ in range(3))

    def call() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return call


class Timer:
    """Device times by CUDA events."""

    def __init__(self) -> None:
        self._source = uniform(-1, 1, 2**26, dtype=torch.float32)
        self._target = torch.empty_like(self._source)

    def _time(self, call: Call, cold: bool = True) -> float:
        """The ms of one call, on an L2 full of other data; not cold: as the call before left it."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for cycles in (1e6, 4e6, 16e6):
            if cold:
                # 256 MiB, more than any L2 holds, in part yet to be written to memory: what an
                # operator before would leave.
                self._target.copy_(self._source)
            torch.cuda._sleep(int(cycles))
            start.record()
            call()
            end.record()
            host_was_ahead = not start.query()
            end.synchronize()
            if host_was_ahead:
                break
        else:
            print("a time includes waiting for the host", file=sys.stderr)
        return start.elapsed_time(end)

    def samples(
        self, calls: dict[str, Call], seconds: float | None = None
    ) -> dict[str, list[float]]:
        """The ms of REPEATS calls each, in turns, fewer (at least 3) if they take `seconds`.

        What ssmcore does not have on this GPU is left out.
        """
        calls = dict(calls)
        repeats = REPEATS
        for name, call in list(calls.items()):
            try:
                self._time(call)
            except ssmcore.BackendError as error:
                print(f"left out: {error}", file=sys.stderr)
                del calls[name]
                continue
            warm = self._time(call)
            if seconds is not None:
                repeats = max(3, min(repeats, int(seconds * 1e3 / warm)))
        result: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(repeats):
            for name, call in calls.items():
                result[name].append(self._time(call))
        return result

    def repeated(self, call: Call) -> list[float]:
        """The ms of REPEATS calls after one another, with no other data in between."""
        return [self._time(call, cold=False) for _ in range(REPEATS + 1)][1:]


def copy_rate(timer: Timer) -> float:
    """GB/s, read and written."""
    source = uniform(-1, 1, 2**28, dtype=torch.float32)
    target = torch.empty_like(source)
    times = timer.samples({"copy": lambda: target.copy_(source)})["copy"]
    return 2 * source.nbytes / statistics.median(times) / 1e6


def measure_works(timer: Timer, quick: bool) -> list[dict[str, Any]]:
    rows = []
    for work in works():
        if quick and work.sizes.get("seqlen", 0) > 100_000:
            continue
        print(f"{work.name}, {work.layout}", file=sys.stderr)
        calls = work.calls(work.layout, **work.sizes)
        samples = timer.samples(calls)
        if "ssmcore" in samples:
            samples["repeated"] = timer.repeated(calls["ssmcore"])
        row = {"work": work.name, "layout": work.layout, "target": work.target}
        rows.append(row | {"upstream 2026-11": work.upstream, "samples": samples})
    return rows


def measure_crossover(timer: Timer, quick: bool) -> list[dict[str, Any]]:
    """Time against sequence length, of the scan and of attention, batch 1."""
    rows = []
    seqlen = 512
    while seqlen <= (65536 if quick else 524288):
        print(f"crossover, L{seqlen}", file=sys.stderr)
        sizes = {"batch": 1, "dim": 1024, "dstate": 16, "dtype": torch.bfloat16}
        calls = scan(L_FIRST, seqlen=seqlen, **sizes)
        calls["attention"] = attention(seqlen)
        rows.append({"seqlen": seqlen, "samples": timer.samples(calls, SECONDS)})
        seqlen *= 2
    return rows


def medians(row: dict[str, Any]) -> dict[str, float]:
    return {name: statistics.median(times) for name, times in row["samples"].items()}


def print_works(rows: list[dict[str, Any]]) -> None:
    print(
        "| work | layout | ssmcore, ms | repeated, ms | target, ms | of target | upstream, ms | "
        "times as fast |"
    )
    print("|---" * 8 + "|")
    for row in rows:
        times = medians(row)
        upstream = times.get("upstream", row["upstream 2026-11"])
        shown = f"{upstream:.4f}" if "upstream" in times else f"({upstream})"
        cells = ["-", "-", row["target"], "-", shown, "-"]
        if "ssmcore" in times:
            ours = times["ssmcore"]
            cells[0] = f"{ours:.4f}"
            cells[1] = f"{times['repeated']:.4f}"
            cells[3] = f"{ours / row['target']:.2f}"
            cells[5] = f"{upstream / ours:.2f}"
        print(f"| {row['work']} | {row['layout']} | {' | '.join(map(str, cells))} |")
    print("\nTargets are for an H100; in parentheses: upstream, H100, 2026-11, not measured now.\n")


def print_crossover(rows: list[dict[str, Any]]) -> None:
    names = [name for name in ("ssmcore", "upstream", "attention") if name in rows[0]["samples"]]
    print(f"| L | {' | '.join('scan, ' * (n != 'attention') + n + ', ms' for n in names)} |")
    print("|---" * (len(names) + 1) + "|")
    for row in rows:
        times = medians(row)
        print(f"| {row['seqlen']} | {' | '.join(f'{times[name]:.4f}' for name in names)} |")


def plot(rows: list[dict[str, Any]], device: str, folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 5), layout="constrained")
    labels = {
        "ssmcore": "scan, ssmcore",
        "upstream": "scan, mamba-ssm",
        "attention": "attention, FlashAttention",
    }
    for name, label in labels.items():
        points = [(row["seqlen"], medians(row).get(name)) for row in rows]
        if points[0][1] is not None:
            axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label=label)
    if "upstream" not in rows[0]["samples"]:
        label = "scan, mamba-ssm 2.3.2 (H100, 2026-11)"
        axis.plot(*zip(*UPSTREAM_SCAN.items(), strict=True), "x--", color="grey", label=label)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("sequence length")
    axis.set_ylabel("ms")
    axis.set_title(f"Scan of 1024 channels, causal attention of 16 heads of 64\nbf16, {device}")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"crossover.{suffix}", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("bench-results"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("torch has no CUDA device")
    for name in ("mamba_ssm", "causal_conv1d"):
        if not importlib.util.find_spec(name):
            print(f"{name} is not installed and left out", file=sys.stderr)

    timer = Timer()
    with torch.inference_mode():
        results: dict[str, Any] = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "ssmcore": ssmcore.__version__,
            "copy GB/s": copy_rate(timer),
            "works": measure_works(timer, arguments.quick),
            "crossover": measure_crossover(timer, arguments.quick),
        }
    print(f"{results['device']}, copy rate {results['copy GB/s']:.0f} GB/s\n")
    print_works(results["works"])
    print_crossover(results["crossover"])
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "results.json").write_text(json.dumps(results, indent=1))
    if importlib.util.find_spec("matplotlib"):
        plot(results["crossover"], results["device"], arguments.out)


if __name__ == "__main__":
    main()
