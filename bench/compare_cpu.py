"""Measures ssmcore, llama.cpp and transformers on the CPU, in turns, with bandwidth probes between.

    python bench/compare_cpu.py [--threads N] [--rounds N] [--only NAME ...] [--out FOLDER]

A 130m-shaped model of random weights reads a prompt of 512 tokens and then makes 64 tokens, one
sequence at a time. Every engine runs in a process of its own, and all of them in every round, since
memory bandwidth varies from minute to minute: compare within a round. llama-cpp-python, gguf and
transformers are used where they are installed. Prints a table of medians and writes results.json,
and, with matplotlib, comparison.png.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

PROMPT, NEW = 512, 64
HERE = Path(__file__).parent
ENGINES = {
    "ssmcore": "ssmcore",
    "llama.cpp": "llama_cpp",
    "transformers": "transformers",
}


def read_bandwidth(threads: int) -> float:
    """GB/s that this many threads read at, the best of a few passes over 512 MiB."""
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "probe.so"
        source = HERE / "read_bandwidth.c"
        flags = ["-O3", "-march=native", "-shared", "-fPIC"]
        subprocess.run(["cc", *flags, "-o", library, source], check=True)
        read_words = ctypes.CDLL(str(library)).read_words
    read_words.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    words = np.ones(2**26, np.uint64)
    share = words.size // threads
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(6):
            start = time.perf_counter()
            list(
                pool.map(
                    lambda i: read_words(words[i * share :].ctypes.data, share), range(threads)
                )
            )
            best = max(best, words.nbytes / (time.perf_counter() - start) / 1e9)
    return best


def drop_from_cache(path: Path) -> None:
    """So that it is next read from the disk, as after a start of the machine.

    What has just been written lies in small pages of the system's cache; what is read can come in
    huge ones, which memory reads faster.
    """
    for file in path.rglob("*") if path.is_dir() else [path]:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def peak_memory() -> float:
    """MiB this process has had in memory at most (getrusage counts the parent's before exec)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def measure_ssmcore(folder: Path, precision: str, threads: int) -> dict[str, float]:
    import numpy as np

    import ssmcore

    ssmcore.set_num_threads(threads)
    model = ssmcore.load(folder, dtype=precision)
    prompt = np.arange(PROMPT)[np.newaxis] % model.config.vocab_size

    def run(batch: int) -> tuple[float, float]:
        state = model.new_state(batch)
        start = time.perf_counter()
        model.forward(np.repeat(prompt, batch, 0), state, "last")
        middle = time.perf_counter()
        token_ids = np.ones(batch, np.int64)
        for _ in range(NEW):
            token_ids = model.step(token_ids, state).argmax(-1)
        return middle - start, time.perf_counter() - middle

    run(1)
    peak = peak_memory()
    prefill, decode = run(1)
    _, decode_8 = run(8)
    return {
        "prefill": PROMPT / prefill,
        "decode": NEW / decode,
        "decode batch 8": 8 * NEW / decode_8,
        "peak MiB": peak,
    }


def measure_llama_cpp(path: Path, precision: str, threads: int) -> dict[str, float]:
    import llama_cpp

    model = llama_cpp.Llama(
        str(path),
        n_ctx=PROMPT + NEW + 1,
        n_threads=threads,
        n_threads_batch=threads,
        n_batch=PROMPT,
        n_ubatch=PROMPT,
        verbose=False,
    )

    def run() -> tuple[float, float]:
        model.reset()
        model._ctx.kv_cache_clear()
        start = time.perf_counter()
        model.eval(list(range(PROMPT)))
        middle = time.perf_counter()
        for token_id in range(NEW):
            model.eval([token_id])
        return middle - start, time.perf_counter() - middle

    run()
    prefill, decode = run()
    peak = peak_memory()
    return {"prefill": PROMPT / prefill, "decode": NEW / decode, "peak MiB": peak}


def measure_transformers(folder: Path, precision: str, threads: int) -> dict[str, float]:
    import torch
    import transformers

    torch.set_num_threads(threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)

    @torch.inference_mode()
    def run() -> tuple[float, float]:
        start = time.perf_counter()
        out = model(torch.arange(PROMPT)[None], use_cache=True, logits_to_keep=1)
        middle = time.perf_counter()
        for _ in range(NEW):
            token_id = out.logits[:, -1:].argmax(-1)
            out = model(token_id, cache_params=out.cache_params, use_cache=True)
        return middle - start, time.perf_counter() - middle

    run()
    prefill, decode = run()
    peak = peak_memory()
    return {"prefill": PROMPT / prefill, "decode": NEW / decode, "peak MiB": peak}


def measure_in_process(engine: str, model: Path, precision: str, threads: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--threads", str(threads)]
    command += ["--worker", engine, str(model), precision]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(result.stdout.splitlines()[-1])


def worker(engine: str, model: str, precision: str, threads: int) -> None:
    measure = {
        "ssmcore": measure_ssmcore,
        "llama.cpp": measure_llama_cpp,
        "transformers": measure_transformers,
    }[engine]
    print(json.dumps(measure(Path(model), precision, threads)))


def weight_bytes(model: Path) -> int:
    return (model / "model.safetensors" if model.is_dir() else model).stat().st_size


def print_table(rows: list[dict[str, Any]]) -> None:
    """One line an engine and precision: medians over the rounds."""
    print(f"{'engine':24}{'prefill':>10}{'decode':>10}{'batch 8':>10}{'peak MiB':>10}{'read':>8}")
    for key in dict.fromkeys((row["engine"], row["precision"]) for row in rows):
        group = [row for row in rows if (row["engine"], row["precision"]) == key]

        def median(name: str, group: list[dict[str, Any]] = group) -> str:
            values = [row[name] for row in group if name in row]
            return f"{statistics.median(values):.1f}" if values else "-"

        share = statistics.median(row["share of bandwidth"] for row in group)
        print(
            f"{' '.join(key):24}{median('prefill'):>10}{median('decode'):>10}"
            f"{median('decode batch 8'):>10}{median('peak MiB'):>10}{share:>8.0%}"
        )
    print("prefill, decode, batch 8: tokens per second; read: decode's weights over the bandwidth")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    keys = list(dict.fromkeys((row["engine"], row["precision"]) for row in rows))
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, name in zip(axes, ("prefill", "decode"), strict=True):
        values = [
            statistics.median(r[name] for r in rows if (r["engine"], r["precision"]) == key)
            for key in keys
        ]
        bars = axis.barh([" ".join(key) for key in keys], values)
        axis.bar_label(bars, fmt="%.0f", padding=3)
        axis.invert_yaxis()
        axis.set_title(f"{name}, tokens per second")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--out", type=Path, default=Path("bench-results"))
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return worker(*arguments.worker, arguments.threads)

    engines = [name for name in arguments.only if importlib.util.find_spec(ENGINES[name])]
    for name in set(arguments.only) - set(engines):
        print(f"{name} is not installed and left out", file=sys.stderr)
    sys.path.insert(0, str(HERE))
    import random_model

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        models = {}
        for precision in ("fp32", "bf16"):
            models["folder", precision] = random_model.save_transformers(
                Path(folder) / precision, precision
            )
            if "llama.cpp" in engines:
                models["gguf", precision] = random_model.save_gguf(
                    Path(folder) / f"{precision}.gguf", precision
                )
        for path in models.values():
            drop_from_cache(path)
        for number in range(arguments.rounds):
            for precision in ("fp32", "bf16"):
                for engine in engines:
                    model = models["gguf" if engine == "llama.cpp" else "folder", precision]
                    before = read_bandwidth(arguments.threads)
                    row = measure_in_process(engine, model, precision, arguments.threads)
                    bandwidth = max(before, read_bandwidth(arguments.threads))
                    row |= {"engine": engine, "precision": precision, "bandwidth": bandwidth}
                    row["share of bandwidth"] = (
                        row["decode"] * weight_bytes(model) / 1e9 / bandwidth
                    )
                    rows.append(row)
                    print(f"round {number + 1}: {json.dumps(row)}", file=sys.stderr)
    print_table(rows)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "results.json").write_text(json.dumps(rows, indent=1))
    if importlib.util.find_spec("matplotlib"):
        plot(rows, arguments.out / "comparison.png")


if __name__ == "__main__":
    main()
