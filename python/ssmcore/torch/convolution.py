"""The causal convolution with gradients, and its step on running sequences."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import ops
from ._operands import cast, cast_weight, check_no_gradient, check_tensors, empty_like
from ._operators import count_as_written, fake, operator


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
    *,
    cu_seqlens: Tensor | None = None,
) -> Any:
    """The causal depthwise convolution, as `ssmcore.ops.causal_conv1d`, with gradients.

    Args:
        x: (B, D, L).
        weight: (D, W).
        bias: (D,).
        seq_idx: (B, L), int32: the number of the sequence each step belongs to.
        initial_states: (B, D, W - 1): the inputs before x.
        return_final_states: also return the last W - 1 inputs.
        final_states_out: (B, D, W - 1): where to write them.
        activation: None, "silu" or "swish".
        cu_seqlens: (S + 1,), int32: packed sequences, states then (S, D, W - 1).

    Returns:
        out, (B, D, L) like x; or (out, final_states).

    Raises:
        RuntimeError: final_states_out requires grad, or a tensor is on another device.
        TypeError, ssmcore.InvalidArgumentError: as for `selective_scan_fn`.
    """
    op = "causal_conv1d_fn"
    check_tensors(
        op,
        x=x,
        weight=weight,
        bias=bias,
        seq_idx=seq_idx,
        initial_states=initial_states,
        final_states_out=final_states_out,
        cu_seqlens=cu_seqlens,
    )
    check_no_gradient(op, "final_states_out", final_states_out=final_states_out)
    out, final_states = _causal_conv1d(
        x,
        cast_weight(weight, x),
        cast_weight(bias, x),
        activation,
        cast(initial_states, x.dtype),
        cu_seqlens,
        seq_idx,
        return_final_states,
    )
    if not return_final_states:
        return out
    if final_states_out is not None:
        final_states = final_states_out.copy_(final_states)
    return out, final_states


@operator("causal_conv1d")
def _causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    return_final_state: bool,
) -> tuple[Tensor, Tensor]:
    """(out, final_state), which is empty where it is not asked for."""
    results = ops.causal_conv1d(
        x,
        weight,
        bias,
        activation,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        seq_idx=seq_idx,
        return_final_state=return_final_state,
    )
    return results if return_final_state else (results, x.new_empty(0))


@fake("causal_conv1d")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    return_final_state: bool,
) -> tuple[Tensor, Tensor]:
    if not return_final_state:
        return empty_like(x), x.new_empty(0)
    state_len = weight.shape[1] - 1 if initial_state is None else initial_state.shape[2]
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return empty_like(x), x.new_empty((rows, x.shape[1], state_len))


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """The convolution for the next tokens, updating `conv_state` in place; no gradients.

    Args:
        x: (B, D) for one token, (B, D, T) for T.
        conv_state: (B, D, S), S ≥ W - 1, x's type; (slots, D, S) with `conv_state_indices`.
        weight: (D, W).
        bias: (D,).
        activation: None, "silu" or "swish".
        cache_seqlens: (B,), int32: tokens each row has seen; the state is then circular.
        conv_state_indices: (B,), int32: the slot of each row; negative: none.

    Returns:
        Like x.

    Raises:
        RuntimeError: a tensor requires grad outside no_grad, or is on another device.
        TypeError, ssmcore.InvalidArgumentError: as for `selective_scan_fn`.
    """
    op = "causal_conv1d_update"
    read = {"weight": weight, "bias": bias}
    indices = {"cache_seqlens": cache_seqlens, "conv_state_indices": conv_state_indices}
    check_tensors(op, x=x, conv_state=conv_state, **read, **indices)
    check_no_gradient(op, "conv_state", x=x, conv_state=conv_state, **read)
    out: Tensor = _causal_conv1d_update(
        x,
        conv_state,
        cast_weight(weight, x),
        cast_weight(bias, x),
        activation,
        cache_seqlens,
        conv_state_indices,
    )
    count_as_written(conv_state)
    return out


@operator("causal_conv1d_update", writes=("conv_state",))
def _causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    cache_seqlens: Tensor | None,
    state_indices: Tensor | None,
) -> Tensor:
    out: Tensor = ops.causal_conv1d_update(
        x,
        conv_state,
        weight,
        bias,
        activation,
        cache_seqlens=cache_seqlens,
        state_indices=state_indices,
    )
    return out


@fake("causal_conv1d_update")
def _(x: Tensor, *_: Any) -> Tensor:
    return empty_like(x)
