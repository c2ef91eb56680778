"""The selective scan with gradients, and its single step."""

from __future__ import annotations

import functools
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ._operands import (
    cast,
    check_no_gradient,
    check_tensors,
    empty_like,
    is_autocast,
    parameter_dtype,
    zeros_like,
)
from ._operators import count_as_written, differentiable, fake, operator, spread

# Steps between two states that the forward keeps for the backward: what is fastest.
_CHUNK_SIZE, _CPU_CHUNK_SIZE = 32, 64


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Any:
    """The selective scan, as `ssmcore.ops.selective_scan` computes it, with gradients.

    Everything but `cu_seqlens` has a gradient, `initial_state` included, and `last_state` passes
    one on: a sequence may be trained in pieces. A, D and delta_bias are taken in any floating type;
    under autocast delta, B, C and z follow u's type.

    Args:
        u, delta, z: (B, D, L).
        A: (D, N), real or complex.
        B, C: (D, N), (B, N, L) or (B, G, N, L); with complex A (B, G, N, 2L) where they vary.
        D, delta_bias: (D,).
        delta_softplus: apply softplus to delta + delta_bias.
        return_last_state: also return the state after the last step.
        initial_state: (B, D, N), A's type; default zeros.
        cu_seqlens: (S + 1,), int32: packed sequences, states then (S, D, N).

    Returns:
        out, (B, D, L) like u; or (out, last_state).

    Raises:
        TypeError, RuntimeError: something is no plain tensor, or on another device.
        ssmcore.InvalidArgumentError (a ValueError): a shape, type or value that does not fit.
    """
    check_tensors(
        "selective_scan_fn",
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
    parameter = parameter_dtype(u)
    A, D, delta_bias = cast(A, parameter), cast(D, parameter), cast(delta_bias, parameter)
    initial_state = cast(initial_state, parameter)
    if is_autocast(u):
        delta, z = cast(delta, u.dtype), cast(z, u.dtype)
        B = cast(B, u.dtype if B.dim() > 2 else parameter)
        C = cast(C, u.dtype if C.dim() > 2 else parameter)
    # Packed sequences have as many chunks as their boundaries say, which a traced program cannot
    # know: their states are computed again.
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    differentiable = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in inputs
    )
    chunk_size = 0
    if differentiable and cu_seqlens is None:
        chunk_size = _CHUNK_SIZE if u.is_cuda else _CPU_CHUNK_SIZE
    out, last_state, _ = _selective_scan(
        u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, chunk_size
    )
    return (out, last_state) if return_last_state else out


_ARGUMENTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? delta_bias, Tensor? initial_state, Tensor? cu_seqlens, bool delta_softplus, "
    "int chunk_size"
)
_INPUTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


@operator(f"selective_scan({_ARGUMENTS}) -> (Tensor out, Tensor last_state, Tensor chunk_states)")
def _selective_scan(*arguments: Any) -> tuple[Tensor, ...]:
    """No chunk states are kept if chunk_size is 0."""
    *tensors, initial_state, cu_seqlens, delta_softplus, chunk_size = arguments
    u, delta, A, B, C, D, z, delta_bias = tensors
    results: tuple[Tensor, ...] = ops.selective_scan(
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        delta_bias,
        delta_softplus,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        chunk_size=chunk_size or None,
    )
    return results if chunk_size else (*results, u.new_empty(0))


@fake("selective_scan")
def _(u: Tensor, delta: Tensor, A: Tensor, *others: Any) -> tuple[Tensor, ...]:
    *_, cu_seqlens, _, chunk_size = others
    batch, dim, seqlen = u.shape
    dstate = A.shape[1]
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if chunk_size:
        chunk_states = A.new_empty((batch, -(-seqlen // chunk_size), dim, dstate))
    else:
        chunk_states = u.new_empty(0)
    return empty_like(u), A.new_empty((rows, dim, dstate)), chunk_states


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.delta_softplus, ctx.chunk_size = inputs
    chunk_states = output[2]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(chunk_states)
    ctx.save_for_backward(*tensors, chunk_states)


def _backward(
    ctx: Any, dout: Tensor | None, dlast_state: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    *tensors, chunk_states = ctx.saved_tensors
    needs = ctx.needs_input_grad[: len(_INPUTS)]
    gradients = _selective_scan_bwd(
        zeros_like(tensors[0]) if dout is None else dout,
        dlast_state,
        *tensors,
        ctx.delta_softplus,
        ctx.chunk_size,
        chunk_states,
        needs,
    )
    return (*spread(gradients, needs), None, None, None)


@operator(
    f"selective_scan_bwd(Tensor dout, Tensor? dlast_state, {_ARGUMENTS}, Tensor chunk_states, "
    "bool[] needs) -> Tensor[]"
)
def _selective_scan_bwd(dout: Tensor, dlast_state: Tensor | None, *arguments: Any) -> list[Tensor]:
    *tensors, initial_state, cu_seqlens, delta_softplus, chunk_size, chunk_states, needs = arguments
    u, delta, A, B, C, D, z, delta_bias = tensors
    gradients = ops.selective_scan_bwd(
        dout,
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        delta_bias,
        delta_softplus,
        dlast_state=dlast_state,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        chunk_states=chunk_states if chunk_size else None,
        chunk_size=chunk_size or None,
        needs=list(compress(_INPUTS, needs)),
    )
    return [gradient for gradient in gradients if gradient is not None]


@fake("selective_scan_bwd")
def _(dout: Tensor, dlast_state: Tensor | None, *arguments: Any) -> list[Tensor]:
    return [empty_like(tensor) for tensor in compress(arguments, arguments[-1])]


differentiable("selective_scan", _backward, _setup_context)


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One step of the scan, updating `state` in place; no gradients.

    As `ssmcore.ops.selective_state_update`, by channel or by head. A state that is not float32 is
    computed in float32 and rounded.

    Args:
        state: (B, D, N) or (B, H, P, N); (slots, ...) with `state_batch_indices`.
        x, dt, z: (B, D) or (B, H, P).
        A: (D, N) or (H, P, N).
        B, C: (B, N) or (B, G, N).
        D, dt_bias: (D,) or (H, P).
        dt_softplus: apply softplus to dt + dt_bias.
        state_batch_indices: (B,), int32: the slot of each row; negative: none.

    Returns:
        Like x.

    Raises:
        RuntimeError: a tensor requires grad outside no_grad, or is on another device.
        TypeError, ssmcore.InvalidArgumentError: as for `selective_scan_fn`.
    """
    op = "selective_state_update"
    read = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
    check_tensors(op, state=state, **read, state_batch_indices=state_batch_indices)
    check_no_gradient(op, "state", state=state, **read)
    exact = cast(state, torch.float32)
    others = [tensor.dtype for tensor in (dt, B, C, z) if tensor is not None]
    # Complex ones go with a complex A.
    dtype = functools.reduce(
        torch.promote_types, [other for other in others if not other.is_complex], x.dtype
    )
    out: Tensor = _selective_state_update(
        exact,
        cast(x, dtype),
        cast(dt, dtype),
        cast(A, torch.float32),
        cast(B, dtype),
        cast(C, dtype),
        cast(D, torch.float32),
        cast(z, dtype),
        cast(dt_bias, torch.float32),
        dt_softplus,
        state_batch_indices,
    )
    if exact is state:
        count_as_written(state)
    else:
        state.copy_(exact)
    return cast(out, x.dtype)


@operator(
    "selective_state_update(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, "
    "Tensor? D, Tensor? z, Tensor? dt_bias, bool dt_softplus, Tensor? state_indices) -> Tensor"
)
def _selective_state_update(*arguments: Any) -> Tensor:
    *others, state_indices = arguments
    out: Tensor = ops.selective_state_update(*others, state_indices=state_indices)
    return out


@fake("selective_state_update")
def _(state: Tensor, x: Tensor, *others: Any) -> Tensor:
    return x.new_empty(x.shape)
