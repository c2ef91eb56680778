"""A whole Mamba block as one operator with gradients."""

from __future__ import annotations

from itertools import compress
from typing import Any

import torch
from torch import Tensor

from .. import _core, ops
from ._block_parameters import NAMES, PARAMETERS, block_parameters, by_name
from ._operands import cast, cast_weight, is_autocast, parameter_dtype
from ._operators import differentiable, fake, operator, spread

# What autocast brings to its type, as it does for torch's own products.
_PRODUCTS = (
    "in_proj.weight",
    "in_proj.bias",
    "x_proj.weight",
    "dt_proj.weight",
    "out_proj.weight",
    "out_proj.bias",
)


def mamba_block_fn(
    mixer: Any, hidden_states: Tensor, dt_B_C_norm_eps: float = 0.0
) -> Tensor | None:
    """The block on whole sequences from their start, with gradients.

    Args:
        mixer: a module with the published parameters of a Mamba block.
        hidden_states: (B, L, d_model).
        dt_B_C_norm_eps: as for `ssmcore.ops.mamba_block`; 0: no norms.

    Returns:
        (B, L, d_model), like hidden_states or of autocast's type; None where the matrices are of
        another type than hidden_states, which torch's products decide about.
    """
    x, is_cast = hidden_states, is_autocast(hidden_states)
    if is_cast:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    named = dict(zip(NAMES, block_parameters(mixer, parameter_dtype(x)), strict=True))
    if is_cast:
        named |= {name: cast(named[name], x.dtype) for name in _PRODUCTS}
    if any(p is not None and p.dtype != x.dtype for p in (named[name] for name in _PRODUCTS)):
        return None
    for name in ("conv1d.weight", "conv1d.bias"):
        named[name] = cast_weight(named[name], x)
    inputs = (x.contiguous(), *named.values())
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    out: Tensor = _mamba_block_train(*inputs, dt_B_C_norm_eps, keep)[0]
    return out


_ARGUMENTS = f"Tensor x, {PARAMETERS}, float dt_B_C_norm_eps"
# delta is computed again: a small product, for much memory.
_SAVED = ("xz", "delta_B_C", "y", "chunk_states", "u")
_INPUTS = ("x", *NAMES)


@operator(
    f"mamba_block_train({_ARGUMENTS}, bool keep) -> "
    f"(Tensor out, {', '.join(f'Tensor {name}' for name in _SAVED)})"
)
def _mamba_block_train(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """What the backward needs is empty unless it is to be kept."""
    *parameters, eps, keep = arguments
    weights = by_name(*parameters)
    if not keep:
        out = ops.mamba_block(x, weights, dt_B_C_norm_eps=eps or None)
        return (out, *(x.new_empty(0) for _ in _SAVED))
    out, saved = ops.mamba_block_train_fwd(x, weights, dt_B_C_norm_eps=eps or None, keep=["u"])
    return (out, *(saved.arrays()[name] for name in _SAVED))


@fake("mamba_block_train")
def _(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *parameters, _, keep = arguments
    if not keep:
        return (x.new_empty(x.shape), *(x.new_empty(0) for _ in _SAVED))
    named = dict(zip(NAMES, parameters, strict=True))
    batch, seqlen, _ = x.shape
    dim, dstate = named["A_log"].shape
    chunks = -(-seqlen // _core.MAMBA_BLOCK_CHUNK_SIZE)

    def activation(size: int) -> Tensor:
        return x.new_empty((batch, seqlen, size))

    return (
        x.new_empty(x.shape),
        activation(2 * dim),
        activation(named["x_proj.weight"].shape[0]),
        activation(dim),
        named["A_log"].new_empty((batch, chunks, dim, dstate)),
        activation(dim),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, *parameters, ctx.eps, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, *parameters, *output[1:])


def _backward(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[: len(_INPUTS)]
    if dout is None:
        return (*(None for _ in _INPUTS), None, None)
    tensors = ctx.saved_tensors
    inputs, saved = tensors[: len(_INPUTS)], tensors[len(_INPUTS) :]
    gradients = _mamba_block_train_bwd(dout, *inputs, ctx.eps, *saved, needs)
    return (*spread(gradients, needs), None, None)


@operator(
    f"mamba_block_train_bwd(Tensor dout, {_ARGUMENTS}, "
    f"{', '.join(f'Tensor {name}' for name in _SAVED)}, bool[] needs) -> Tensor[]"
)
def _mamba_block_train_bwd(dout: Tensor, x: Tensor, *arguments: Any) -> list[Tensor]:
    parameters, (eps, *saved, needs) = arguments[: len(NAMES)], arguments[len(NAMES) :]
    gradients = ops.mamba_block_bwd(
        dout.contiguous(),
        x,
        by_name(*parameters),
        ops.MambaBlockSaved(**dict(zip(_SAVED, saved, strict=True))),
        dt_B_C_norm_eps=eps or None,
        needs=list(compress(_INPUTS, needs)),
    )
    named = {"x": gradients.dx, **gradients.dweights}
    return [named[name] for name in compress(_INPUTS, needs)]


@fake("mamba_block_train_bwd")
def _(dout: Tensor, *arguments: Any) -> list[Tensor]:
    return [
        tensor.new_empty(tensor.shape)
        for tensor in compress(arguments[: len(_INPUTS)], arguments[-1])
    ]


differentiable("mamba_block_train", _backward, _setup_context)
