"""Cutting the arguments of an operator in time, and packing sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np


def scan_steps(inputs: dict[str, Any], begin: int, end: int) -> dict[str, Any]:
    """The arguments of a scan for time steps [begin, end)."""
    cut = dict(inputs)
    for name in ("u", "delta", "z"):
        if cut[name] is not None:
            cut[name] = cut[name][..., begin:end]
    for name in ("B", "C"):
        if cut[name].ndim > 2:
            parts = 2 if np.iscomplexobj(cut["A"]) else 1
            cut[name] = cut[name][..., parts * begin : parts * end]
    return cut


def scan_step(inputs: dict[str, Any], t: int) -> dict[str, Any]:
    """The arguments of `selective_state_update`, but for the state, for time step t of a scan."""
    step = scan_steps(inputs, t, t + 1)
    names = {"u": "x", "delta": "dt", "z": "z"}
    arguments = {
        new: None if step[old] is None else step[old][..., 0] for old, new in names.items()
    }
    for name in ("B", "C"):
        varying = step[name]  # (..., dstate, 1), or in parts (..., dstate, 2)
        arguments[name] = varying if np.iscomplexobj(step["A"]) else varying[..., 0]
    return {
        **arguments,
        "A": step["A"],
        "D": step["D"],
        "dt_bias": step["delta_bias"],
        "dt_softplus": step["delta_softplus"],
    }


def conv_steps(inputs: dict[str, Any], begin: int, end: int) -> dict[str, Any]:
    """The arguments of a convolution for time steps [begin, end)."""
    return {**inputs, "x": inputs["x"][..., begin:end]}


def boundaries(lengths: Sequence[int]) -> np.ndarray:
    """cu_seqlens of sequences of the given lengths."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def separately(
    call: Callable[..., tuple[np.ndarray, ...]],
    inputs: dict[str, Any],
    lengths: Sequence[int],
    steps: Callable[[dict[str, Any], int, int], dict[str, Any]],
) -> list[tuple[np.ndarray, ...] | None]:
    """`call` on every sequence of a packed batch on its own; None for an empty one.

    An initial state of `inputs` is (sequences, ...).
    """
    cu_seqlens = boundaries(lengths)
    initial_state = inputs["initial_state"]
    results: list[tuple[np.ndarray, ...] | None] = []
    for s, (begin, end) in enumerate(pairwise(cu_seqlens)):
        if begin == end:
            results.append(None)
            continue
        arguments = steps(inputs, begin, end)
        if initial_state is not None:
            arguments["initial_state"] = initial_state[s : s + 1]
        results.append(call(**arguments))
    return results
