"""A Mamba block over a sequence, as one operator with gradients."""

from __future__ import annotations

from itertools import compress
from typing import Any

import torch
from torch import Tensor

from .. import _core, ops
from ._block_parameters import NAMES, PARAMETERS, block_parameters, by_name
from ._operands import check_tensors, is_autocast, parameter_dtype
from ._operators import differentiable, fake, operator, spread

# Steps between the states that the forward keeps.
_CHUNK_SIZE = _core.MAMBA_BLOCK_CHUNK_SIZE


def run_block(mixer: Any, hidden_states: Tensor, dt_B_C_norm_eps: float = 0.0) -> Tensor:
    """Runs the block on (B, L, d_model) from the start of a sequence.

    Args:
        mixer: a module with the published parameters of a Mamba block.
        dt_B_C_norm_eps: as for `ssmcore.ops.mamba_block`; 0: no norms.
    """
    check_tensors("Mamba", hidden_states=hidden_states, A_log=mixer.A_log)
    x = hidden_states
    if is_autocast(x):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    out: Tensor = _mamba_block_train(
        x.contiguous(), *block_parameters(mixer, parameter_dtype(x)), dt_B_C_norm_eps
    )[0]
    return out


@operator(
    f"mamba_block_train(Tensor x, {PARAMETERS}, float dt_B_C_norm_eps) "
    "-> (Tensor out, Tensor xz, Tensor delta_B_C, Tensor y, Tensor chunk_states)"
)
def _mamba_block_train(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """out, and what the backward needs."""
    *parameters, eps = arguments
    out, saved = ops.mamba_block_train_fwd(x, by_name(*parameters), dt_B_C_norm_eps=eps or None)
    return out, saved.xz, saved.delta_B_C, saved.y, saved.chunk_states


@fake("mamba_block_train")
def _(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    shapes = {name: tensor.shape for name, tensor in by_name(*arguments[:-1]).items()}
    batch, seqlen, _ = x.shape
    (dim, dstate), dt_rank = shapes["A_log"], shapes["dt_proj.weight"][1]
    chunks = -(-seqlen // _CHUNK_SIZE)
    return (
        x.new_empty(x.shape),
        x.new_empty((batch, seqlen, 2 * dim)),
        x.new_empty((batch, seqlen, dt_rank + 2 * dstate)),
        x.new_empty((batch, seqlen, dim)),
        x.new_empty((batch, chunks, dim, dstate), dtype=parameter_dtype(x)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.eps = inputs
    saved = output[1:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*saved)
    ctx.save_for_backward(*tensors, *saved)


def _backward(ctx: Any, dout: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:-1]
    gradients = _mamba_block_train_bwd(dout.contiguous(), *ctx.saved_tensors, ctx.eps, needs)
    return (*spread(gradients, needs), None)


@operator(
    f"mamba_block_train_bwd(Tensor dout, Tensor x, {PARAMETERS}, Tensor xz, Tensor delta_B_C, "
    "Tensor y, Tensor chunk_states, float dt_B_C_norm_eps, bool[] needs) -> Tensor[]"
)
def _mamba_block_train_bwd(dout: Tensor, x: Tensor, *arguments: Any) -> list[Tensor]:
    *parameters, xz, delta_B_C, y, chunk_states, eps, needs = arguments
    names = list(compress(("x", *NAMES), needs))
    gradients = ops.mamba_block_bwd(
        dout,
        x,
        by_name(*parameters),
        ops.MambaBlockSaved(xz=xz, delta_B_C=delta_B_C, y=y, chunk_states=chunk_states),
        dt_B_C_norm_eps=eps or None,
        needs=names,
    )
    return [gradients.dx if name == "x" else gradients.dweights[name] for name in names]


@fake("mamba_block_train_bwd")
def _(dout: Tensor, *arguments: Any) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in compress(arguments, arguments[-1])]


differentiable("mamba_block_train", _backward, _setup_context)
