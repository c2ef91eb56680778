"""The selective scan with gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..ops._arguments import count_chunks, require_rank
from ._calls import (
    Array,
    Arrays,
    as_arrays,
    call,
    cast,
    conjugate,
    cotangents,
    gradients_like,
    like,
    most_chunks,
    parameter_dtype,
    shaped,
)
from ._vmap import foldable

# Steps between two states that the forward keeps for the backward.
_CHUNK_SIZE = 32


def selective_scan(
    u: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    z: Array | None = None,
    delta_bias: Array | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Array | None = None,
    cu_seqlens: Array | None = None,
) -> Any:
    """The selective scan, as `ssmcore.ops.selective_scan` computes it, with gradients.

    Everything but `cu_seqlens` has a gradient, `initial_state` included, and `last_state` passes
    one on: a sequence may be trained in pieces. A, D and delta_bias are taken in any floating type.

    `vmap` is one call over more channels: what is not mapped over is repeated for each, A, B and C
    included. Where `cu_seqlens` is mapped over, it is a loop.

    Args:
        u, delta, z: (B, D, L), float32, bfloat16 or float16; on the CPU also float64.
        A: (D, N), real or complex.
        B, C: (D, N), (B, N, L) or (B, G, N, L); with complex A (B, G, N, 2L) where they vary.
        D, delta_bias: (D,).
        delta_softplus: apply softplus to delta + delta_bias.
        return_last_state: also return the state after the last step.
        initial_state: (B, D, N), A's type; default zeros.
        cu_seqlens: (S + 1,), int32: packed sequences, states then (S, D, N). What is in it is
            checked when the program runs.

    Returns:
        out, (B, D, L) like u; or (out, last_state).

    Raises:
        ssmcore.InvalidArgumentError (a ValueError): a shape or type that does not fit.
    """
    op = "selective_scan"
    arrays = as_arrays(
        op,
        u=u,
        delta=delta,
        A=A,
        B=B,
        C=C,
        D=D,
        z=z,
        delta_bias=delta_bias,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
    )
    u = arrays["u"]
    require_rank(u, f"{op}: u", 3, "(batch, dim, seqlen)")
    require_rank(arrays["A"], f"{op}: A", 2, "(dim, dstate)")
    if cu_seqlens is not None:
        require_rank(arrays["cu_seqlens"], f"{op}: cu_seqlens", 1, "(sequences + 1,)")
    for name in ("A", "D", "delta_bias", "initial_state"):
        arrays[name] = cast(arrays[name], parameter_dtype(u))
    arrays["B"], arrays["C"] = _with_groups(arrays["B"], arrays["C"])
    out: Array
    out, last_state = _scan(bool(delta_softplus), arrays)
    return (out, last_state) if return_last_state else out


def _with_groups(B: Array, C: Array) -> tuple[Array, Array]:
    """B and C with an axis of groups, where they vary, of one size."""
    B, C = (x[:, None] if x.ndim == 3 else x for x in (B, C))
    if B.ndim == C.ndim == 4 and 1 in (B.shape[1], C.shape[1]):
        ngroups = max(B.shape[1], C.shape[1])
        B, C = (jnp.broadcast_to(x, (x.shape[0], ngroups, *x.shape[2:])) for x in (B, C))
    return B, C


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(delta_softplus: bool, arrays: Arrays) -> tuple[Array, Array]:
    results = _forward(delta_softplus, keep=False)(arrays)
    return results["out"], results["last_state"]


def _scan_fwd(delta_softplus: bool, arrays: Arrays) -> tuple[tuple[Array, Array], Any]:
    results = _forward(delta_softplus, keep=True)(arrays)
    return (results["out"], results["last_state"]), (arrays, results["chunk_states"])


def _scan_bwd(
    delta_softplus: bool, saved: tuple[Arrays, Array], gradients: tuple[Array, Array]
) -> tuple[Arrays]:
    arrays, chunk_states = saved
    dout, dlast_state = gradients
    given = {"dout": dout, "dlast_state": conjugate(dlast_state), "chunk_states": chunk_states}
    return (cotangents(_backward(delta_softplus)({**arrays, **given}), arrays),)


_scan.defvjp(_scan_fwd, _scan_bwd)


@functools.cache
def _forward(delta_softplus: bool, keep: bool) -> Callable[[Arrays], Arrays]:
    """With the states for the backward, if they are to be kept."""

    def forward(arrays: Arrays) -> Arrays:
        u, A, cu_seqlens = arrays["u"], arrays["A"], arrays.get("cu_seqlens")
        batch, dim, seqlen = u.shape
        state = (dim, A.shape[1])
        rows, boundaries = batch, None
        if cu_seqlens is not None:
            rows = max(cu_seqlens.shape[0] - 1, 0)
            boundaries = most_chunks(cu_seqlens.shape[0], seqlen)
        results = {"out": like(u), "last_state": shaped((rows, *state), A.dtype)}
        if keep:
            chunks = count_chunks(seqlen, boundaries, _CHUNK_SIZE)
            results["chunk_states"] = shaped((batch, chunks, *state), A.dtype)
        options = {"delta_softplus": delta_softplus, "chunk_size": _CHUNK_SIZE if keep else 0}
        return call("selective_scan", arrays, results, **options)

    return foldable(forward, _channel_axis)


@functools.cache
def _backward(delta_softplus: bool) -> Callable[[Arrays], Arrays]:
    def backward(arrays: Arrays) -> Arrays:
        results = gradients_like({name: arrays.get(name) for name in _INPUTS})
        options = {"delta_softplus": delta_softplus, "chunk_size": _CHUNK_SIZE}
        return call("selective_scan_bwd", arrays, results, **options)

    return foldable(backward, _channel_axis)


_INPUTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
_CHANNEL_AXIS = {
    **dict.fromkeys(("A", "D", "delta_bias"), 0),
    **dict.fromkeys(("u", "delta", "z", "out", "initial_state", "last_state"), 1),
    "chunk_states": 2,
}


def _channel_axis(name: str, ndim: int) -> int | None:
    """That of channels, or of groups of them."""
    own = name if name in _CHANNEL_AXIS or name in ("B", "C") else name.removeprefix("d")
    return (0 if ndim == 2 else 1) if own in ("B", "C") else _CHANNEL_AXIS.get(own)
