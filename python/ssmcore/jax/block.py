"""A whole Mamba block with gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .. import _core
from .._cublaslt import find_cublaslt
from ..ops._arguments import count_chunks, require_rank
from ..ops.block import NAMES, check_parameters
from ._calls import (
    Array,
    Arrays,
    as_arrays,
    call,
    cast,
    cast_weight,
    cotangents,
    gradients_like,
    like,
    most_chunks,
    parameter_dtype,
    shaped,
)
from ._vmap import foldable


def mamba_block(
    x: Array,
    weights: dict[str, Array],
    *,
    initial_conv_state: Array | None = None,
    initial_ssm_state: Array | None = None,
    cu_seqlens: Array | None = None,
    dt_B_C_norm_eps: float | None = None,
    return_states: bool = False,
) -> Any:
    """The Mamba block, as `ssmcore.ops.mamba_block` over whole sequences, with gradients.

    Everything but `cu_seqlens` has a gradient, the weights by their names. "dt_proj.bias", "A_log"
    and "D" are taken in any floating type.

    `vmap` of the block is one call over more rows where only x and the states are mapped over. With
    mapped weights or `cu_seqlens` it is a loop, and so is its gradient, which has weights for each:
    a batch that shares them is better an axis of x.

    Args:
        x: (B, L, d_model), float32, bfloat16 or float16; on the CPU also float64.
        weights: by published name, as for `ssmcore.ops.mamba_block`.
        initial_conv_state: (B, D, W - 1), x's type; packed (S, D, W - 1). Default zeros.
        initial_ssm_state: (B, D, N), float32; packed (S, D, N). Default zeros.
        cu_seqlens: (S + 1,), int32: packed sequences. What is in it is checked when the program
            runs.
        dt_B_C_norm_eps: as for `ssmcore.ops.mamba_block`.
        return_states: also return the states after the last step, of these shapes.

    Returns:
        out, (B, L, d_model) like x; or (out, final_conv_state, last_ssm_state).

    Raises:
        ssmcore.InvalidArgumentError (a ValueError): a shape, name or type that does not fit.
    """
    op = "mamba_block"
    x = as_arrays(op, x=x)["x"]
    require_rank(x, f"{op}: x", 3, "(batch, seqlen, d_model)")
    named = as_arrays(op, **{name: value for name, value in weights.items() if value is not None})
    check_parameters(op, named, dt_B_C_norm_eps)
    for name in ("A_log", "dt_proj.weight"):
        require_rank(named[name], f"{op}: {name}", 2, "(dim, …)")
    arrays = as_arrays(
        op,
        x=x,
        initial_conv_state=initial_conv_state,
        initial_ssm_state=initial_ssm_state,
        cu_seqlens=cu_seqlens,
    )
    if cu_seqlens is not None:
        require_rank(arrays["cu_seqlens"], f"{op}: cu_seqlens", 1, "(sequences + 1,)")
    arrays |= {key: named.get(name) for name, key in NAMES.items()}
    arrays["conv_weight"] = cast_weight(arrays["conv_weight"][:, 0, :], x)
    arrays["conv_bias"] = cast_weight(arrays["conv_bias"], x)
    arrays["initial_conv_state"] = cast(arrays["initial_conv_state"], x.dtype)
    for name in ("dt_bias", "A", "D", "initial_ssm_state"):
        arrays[name] = cast(arrays[name], parameter_dtype(x))
    arrays["A"] = -jnp.exp(arrays["A"])
    if _core.cuda_device_count() > 0:
        find_cublaslt()
    results = _block(float(dt_B_C_norm_eps or 0), arrays)
    if not return_states:
        return results["out"]
    return results["out"], results["final_conv_state"], results["last_ssm_state"]


_RESULTS = ("out", "final_conv_state", "last_ssm_state")
# delta is computed again: a small product, for much memory.
_SAVED = ("xz", "delta_B_C", "y", "chunk_states", "u")
_STATES = ("initial_conv_state", "initial_ssm_state")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _block(eps: float, arrays: Arrays) -> Arrays:
    results = _forward(eps, False, arrays["cu_seqlens"] is not None)(arrays)
    return {name: results[name] for name in _RESULTS}


def _block_fwd(eps: float, arrays: Arrays) -> tuple[Arrays, tuple[Arrays, Arrays]]:
    results = _forward(eps, True, arrays["cu_seqlens"] is not None)(arrays)
    saved = {name: results[name] for name in _SAVED}
    return {name: results[name] for name in _RESULTS}, (arrays, saved)


def _block_bwd(eps: float, residuals: tuple[Arrays, Arrays], gradients: Arrays) -> tuple[Arrays]:
    arrays, saved = residuals
    given = {f"d{name}": gradient for name, gradient in gradients.items()}
    return (cotangents(_backward(eps)({**arrays, **saved, **given}), arrays),)


_block.defvjp(_block_fwd, _block_bwd)


@functools.cache
def _forward(eps: float, keep: bool, packed: bool) -> Callable[[Arrays], Arrays]:
    """`keep`: also u, which the backward would compute again."""

    def forward(arrays: Arrays) -> Arrays:
        x, A, cu_seqlens = arrays["x"], arrays["A"], arrays.get("cu_seqlens")
        batch, seqlen = x.shape[:2]
        (dim, dstate), width = A.shape, arrays["conv_weight"].shape[1]
        rows, boundaries = batch, None
        if cu_seqlens is not None:
            rows = max(cu_seqlens.shape[0] - 1, 0)
            boundaries = most_chunks(cu_seqlens.shape[0], seqlen)
        chunks = count_chunks(seqlen, boundaries, _core.MAMBA_BLOCK_CHUNK_SIZE)

        def activation(size: int) -> Any:
            return shaped((batch, seqlen, size), x.dtype)

        results = {
            "out": like(x),
            "final_conv_state": shaped((rows, dim, width - 1), x.dtype),
            "last_ssm_state": shaped((rows, dim, dstate), A.dtype),
            "xz": activation(2 * dim),
            "delta_B_C": activation(arrays["dt_proj"].shape[1] + 2 * dstate),
            "y": activation(dim),
            "chunk_states": shaped((batch, chunks, dim, dstate), A.dtype),
            "u": activation(dim) if keep else None,
        }
        return call("mamba_block_train_fwd", arrays, results, **_options(eps))

    mapped = () if packed else ("x", *_STATES, *_RESULTS, *_SAVED)
    return foldable(forward, lambda name, _: 0 if name in mapped else None)


@functools.cache
def _backward(eps: float) -> Callable[[Arrays], Arrays]:
    inputs = ("x", *_STATES, *NAMES.values())

    def backward(arrays: Arrays) -> Arrays:
        results = gradients_like({name: arrays.get(name) for name in inputs})
        return call("mamba_block_bwd", arrays, results, **_options(eps))

    return foldable(backward, lambda name, _: None)


def _options(eps: float) -> dict[str, Any]:
    # The chunks' size is the block's own; the calls of XLA need to know it.
    return {"dt_B_C_norm_eps": eps, "chunk_size": _core.MAMBA_BLOCK_CHUNK_SIZE}
