"""The causal convolution with gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from ..ops._arguments import require_rank
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
    shaped,
)
from ._vmap import foldable


def causal_conv1d(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    activation: str | None = None,
    *,
    initial_state: Array | None = None,
    cu_seqlens: Array | None = None,
    seq_idx: Array | None = None,
    return_final_state: bool = False,
) -> Any:
    """The causal depthwise convolution, as `ssmcore.ops.causal_conv1d`, with gradients.

    `vmap` is one call over more channels: what is not mapped over is repeated for each, weight and
    bias included. Where `cu_seqlens` or `seq_idx` is mapped over, it is a loop.

    Args:
        x: (B, D, L), float32, bfloat16 or float16; on the CPU also float64.
        weight: (D, W), W from 2 to 8.
        bias: (D,).
        activation: None, "silu" or "swish" (the same).
        initial_state: (B, D, S), S ≥ W - 1 (by default W - 1 zeros): the inputs before x.
        cu_seqlens: (S + 1,), int32: packed sequences. What is in it is checked when the program
            runs.
        seq_idx: (B, L), int32: a number for every step, which sees those before it of the same
            number; a negative one gives 0. Excludes states and `cu_seqlens`.
        return_final_state: also return the last inputs, as `initial_state` takes them.

    Returns:
        out, (B, D, L) like x; or (out, final_state).

    Raises:
        ssmcore.InvalidArgumentError (a ValueError): a shape or type that does not fit.
    """
    op = "causal_conv1d"
    arrays = as_arrays(
        op,
        x=x,
        weight=weight,
        bias=bias,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        seq_idx=seq_idx,
    )
    x = arrays["x"]
    require_rank(x, f"{op}: x", 3, "(batch, dim, seqlen)")
    require_rank(arrays["weight"], f"{op}: weight", 2, "(dim, width)")
    if initial_state is not None:
        require_rank(arrays["initial_state"], f"{op}: initial_state", 3, "(batch, dim, state_len)")
    if cu_seqlens is not None:
        require_rank(arrays["cu_seqlens"], f"{op}: cu_seqlens", 1, "(sequences + 1,)")
    arrays["weight"] = cast_weight(arrays["weight"], x)
    arrays["bias"] = cast_weight(arrays["bias"], x)
    arrays["initial_state"] = cast(arrays["initial_state"], x.dtype)
    results = _convolution(activation, bool(return_final_state), arrays)
    return (results["out"], results["final_state"]) if return_final_state else results["out"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _convolution(activation: str | None, return_final_state: bool, arrays: Arrays) -> Arrays:
    return _forward(activation, return_final_state)(arrays)


def _convolution_fwd(
    activation: str | None, return_final_state: bool, arrays: Arrays
) -> tuple[Arrays, Arrays]:
    return _forward(activation, return_final_state)(arrays), arrays


def _convolution_bwd(
    activation: str | None, return_final_state: bool, arrays: Arrays, gradients: Arrays
) -> tuple[Arrays]:
    given = {f"d{name}": gradient for name, gradient in gradients.items()}
    return (cotangents(_backward(activation)({**arrays, **given}), arrays),)


_convolution.defvjp(_convolution_fwd, _convolution_bwd)


@functools.cache
def _forward(activation: str | None, return_final_state: bool) -> Callable[[Arrays], Arrays]:
    def forward(arrays: Arrays) -> Arrays:
        x = arrays["x"]
        initial_state, cu_seqlens = arrays.get("initial_state"), arrays.get("cu_seqlens")
        results = {"out": like(x)}
        if return_final_state:
            width = arrays["weight"].shape[1]
            state_len = width - 1 if initial_state is None else initial_state.shape[2]
            rows = x.shape[0] if cu_seqlens is None else max(cu_seqlens.shape[0] - 1, 0)
            shape = (rows, x.shape[1], state_len)
            results["final_state"] = shaped(shape, x.dtype)
        return call("causal_conv1d", arrays, results, activation=activation)

    return foldable(forward, _channel_axis)


@functools.cache
def _backward(activation: str | None) -> Callable[[Arrays], Arrays]:
    def backward(arrays: Arrays) -> Arrays:
        inputs = {name: arrays.get(name) for name in ("x", "weight", "bias", "initial_state")}
        results = gradients_like(inputs)
        return call("causal_conv1d_bwd", arrays, results, activation=activation)

    return foldable(backward, _channel_axis)


_CHANNEL_AXIS = {
    **dict.fromkeys(("weight", "bias"), 0),
    **dict.fromkeys(("x", "out", "initial_state", "final_state"), 1),
}


def _channel_axis(name: str, ndim: int) -> int | None:
    return _CHANNEL_AXIS.get(name, _CHANNEL_AXIS.get(name.removeprefix("d")))
