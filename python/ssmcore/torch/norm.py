"""RMS norm with gradients: the function and the module."""

from __future__ import annotations

from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ._operands import cast, check_tensors, parameter_dtype, zeros_like
from ._operators import differentiable, fake, operator, spread


def rms_norm_fn(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """weight · r / sqrt(mean(r²) + eps) + bias over the last axis, r = x + residual.

    Args:
        x: (..., D).
        weight, bias: (D,); None: ones and zeros.
        residual: x's shape, any type.
        eps: added to the mean square.
        prenorm: also return r, in the residual's type, or without one in float32 if
            `residual_in_fp32` and else x's.
        x1, weight1, bias1, dropout_p, rowscale, return_dropout_mask: the published function's,
            refused if used.

    Returns:
        out, like x; or (out, r).

    Raises:
        NotImplementedError: for one of the arguments that are refused.
        TypeError, RuntimeError, ssmcore.InvalidArgumentError: as for `selective_scan_fn`.
    """
    unsupported = {"x1": x1, "weight1": weight1, "bias1": bias1, "rowscale": rowscale}
    for name, value in unsupported.items():
        if value is not None:
            raise NotImplementedError(f"rms_norm_fn: {name} is not supported, expected None")
    if dropout_p != 0 or return_dropout_mask:
        raise NotImplementedError("rms_norm_fn: dropout is not supported, expected dropout_p=0")
    check_tensors("rms_norm_fn", x=x, weight=weight, bias=bias, residual=residual)
    out, r = _rms_norm(x, weight, residual, eps)
    if bias is not None:
        out = out + bias.to(out.dtype)
    if not prenorm:
        return out
    if residual is None:
        r = cast(x, parameter_dtype(x)) if residual_in_fp32 else x
    return out, r


_INPUTS = ("x", "weight", "residual")


@operator(
    "rms_norm(Tensor x, Tensor? weight, Tensor? residual, float eps) -> (Tensor out, Tensor sum)"
)
def _rms_norm(
    x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The sum is empty without a residual."""
    results = ops.rms_norm(x, weight, residual=residual, eps=eps)
    return results if residual is not None else (results, x.new_empty(0))


@fake("rms_norm")
def _(
    x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    r = x.new_empty(0) if residual is None else residual.new_empty(residual.shape)
    return x.new_empty(x.shape), r


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.eps = inputs
    ctx.set_materialize_grads(False)
    if tensors[2] is None:
        ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors)


def _backward(
    ctx: Any, dout: Tensor | None, dresidual_out: Tensor | None
) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    needs = ctx.needs_input_grad[: len(_INPUTS)]
    if dout is None:
        dout = zeros_like(tensors[0])
    gradients = _rms_norm_bwd(dout, dresidual_out, *tensors, ctx.eps, needs)
    return (*spread(gradients, needs), None)


@operator(
    "rms_norm_bwd(Tensor dout, Tensor? dresidual_out, Tensor x, Tensor? weight, Tensor? residual, "
    "float eps, bool[] needs) -> Tensor[]"
)
def _rms_norm_bwd(dout: Tensor, dresidual_out: Tensor | None, *arguments: Any) -> list[Tensor]:
    x, weight, residual, eps, needs = arguments
    gradients = ops.rms_norm_bwd(
        dout,
        x,
        weight,
        dresidual_out=dresidual_out,
        residual=residual,
        eps=eps,
        needs=list(compress(_INPUTS, needs)),
    )
    return [gradient for gradient in gradients if gradient is not None]


@fake("rms_norm_bwd")
def _(dout: Tensor, dresidual_out: Tensor | None, *arguments: Any) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in compress(arguments, arguments[-1])]


differentiable("rms_norm", _backward, _setup_context)


class RMSNorm(nn.Module):
    """RMS norm with a weight, and the residual sum before it."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dropout_p != 0:
            raise NotImplementedError("RMSNorm: dropout is not supported, expected dropout_p=0")
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Any:
        """As `rms_norm_fn`."""
        return rms_norm_fn(
            x,
            self.weight,
            None,
            residual=residual,
            eps=self.eps,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
        )
