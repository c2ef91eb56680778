"""The causal convolution with gradients, and its step on running sequences."""

from __future__ import annotations

from itertools import compress
from typing import Any

from torch import Tensor

from .. import ops
from ._operands import (
    cast,
    cast_weight,
    check_no_gradient,
    check_tensors,
    empty_like,
    zeros_like,
)
from ._operators import count_as_written, differentiable, fake, operator, spread


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
        cast(initial_states, x.dtype),
        cu_seqlens,
        seq_idx,
        activation,
        return_final_states,
    )
    if not return_final_states:
        return out
    if final_states_out is not None:
        final_states = final_states_out.copy_(final_states)
    return out, final_states


_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? cu_seqlens, "
    "Tensor? seq_idx, str? activation"
)
_INPUTS = ("x", "weight", "bias", "initial_state")


@operator(
    f"causal_conv1d({_ARGUMENTS}, bool return_final_state) -> (Tensor out, Tensor final_state)"
)
def _causal_conv1d(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The final state is empty where it is not asked for."""
    x, weight, bias, initial_state, cu_seqlens, seq_idx, activation, has_final_state = arguments
    results = ops.causal_conv1d(
        x,
        weight,
        bias,
        activation,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        seq_idx=seq_idx,
        return_final_state=has_final_state,
    )
    return results if has_final_state else (results, x.new_empty(0))


@fake("causal_conv1d")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> tuple[Tensor, Tensor]:
    initial_state, cu_seqlens, _, _, has_final_state = others
    if not has_final_state:
        return empty_like(x), x.new_empty(0)
    state_len = weight.shape[1] - 1 if initial_state is None else initial_state.shape[2]
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return empty_like(x), x.new_empty((rows, x.shape[1], state_len))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.activation, has_final_state = inputs
    ctx.set_materialize_grads(False)
    if not has_final_state:
        ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors)


def _backward(
    ctx: Any, dout: Tensor | None, dfinal_state: Tensor | None
) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    needs = ctx.needs_input_grad[: len(_INPUTS)]
    if dout is None:
        dout = zeros_like(tensors[0])
    gradients = _causal_conv1d_bwd(dout, dfinal_state, *tensors, ctx.activation, needs)
    return (*spread(gradients, needs), None, None, None, None)


@operator(
    f"causal_conv1d_bwd(Tensor dout, Tensor? dfinal_state, {_ARGUMENTS}, bool[] needs) -> Tensor[]"
)
def _causal_conv1d_bwd(dout: Tensor, dfinal_state: Tensor | None, *arguments: Any) -> list[Tensor]:
    x, weight, bias, initial_state, cu_seqlens, seq_idx, activation, needs = arguments
    gradients = ops.causal_conv1d_bwd(
        dout,
        x,
        weight,
        bias,
        activation,
        dfinal_state=dfinal_state,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        seq_idx=seq_idx,
        needs=list(compress(_INPUTS, needs)),
    )
    return [gradient for gradient in gradients if gradient is not None]


@fake("causal_conv1d_bwd")
def _(dout: Tensor, dfinal_state: Tensor | None, *arguments: Any) -> list[Tensor]:
    return [empty_like(tensor) for tensor in compress(arguments, arguments[-1])]


differentiable("causal_conv1d", _backward, _setup_context)


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


@operator(
    "causal_conv1d_update(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, "
    "str? activation, Tensor? cache_seqlens, Tensor? state_indices) -> Tensor"
)
def _causal_conv1d_update(*arguments: Any) -> Tensor:
    *others, cache_seqlens, state_indices = arguments
    out: Tensor = ops.causal_conv1d_update(
        *others, cache_seqlens=cache_seqlens, state_indices=state_indices
    )
    return out


@fake("causal_conv1d_update")
def _(x: Tensor, *others: Any) -> Tensor:
    return empty_like(x)
