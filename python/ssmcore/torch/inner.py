"""The Mamba block between its first product and its output."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._operands import cast, check_tensors
from .convolution import causal_conv1d_fn
from .norm import rms_norm_fn
from .scan import selective_scan_fn


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
    *,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Convolution, SiLU, the projections to delta, B and C, the gated scan, the last product.

    Under autocast the products are computed in its type, and so is all that follows them.

    Args:
        xz: (B, 2D, L), in_proj's result: what is convolved, and the gate.
        conv1d_weight: (D, 1, W).
        x_proj_weight: (R + 2N, D), N fewer rows for each of B and C that is given.
        delta_proj_weight: (D, R).
        out_proj_weight: (d_model, D).
        A: (D, N), real or complex (then 2N for N in the rows of x_proj_weight).
        B, C: None: projected from the sequence; or as in `selective_scan_fn`.
        D, delta_bias, conv1d_bias: (D,). B_proj_bias, C_proj_bias: (N,). out_proj_bias: (d_model,).
        checkpoint_lvl: taken, and without effect.
        b_rms_weight, c_rms_weight, dt_rms_weight: (N,), (N,), (R,): B, C and delta (before its own
            product) each pass an RMS norm with eps `b_c_dt_rms_eps` (FalconMamba).
        cu_seqlens: (S + 1,), int32: packed sequences.

    Returns:
        (B, L, d_model).

    Raises:
        TypeError, RuntimeError, ssmcore.InvalidArgumentError: as for `selective_scan_fn`.
    """
    check_tensors(
        "mamba_inner_fn",
        xz=xz,
        conv1d_weight=conv1d_weight,
        conv1d_bias=conv1d_bias,
        x_proj_weight=x_proj_weight,
        delta_proj_weight=delta_proj_weight,
        out_proj_weight=out_proj_weight,
        out_proj_bias=out_proj_bias,
        A=A,
    )
    x, z = xz.chunk(2, dim=1)
    x = causal_conv1d_fn(
        x, conv1d_weight.squeeze(1), conv1d_bias, activation="silu", cu_seqlens=cu_seqlens
    )
    dt_rank = delta_proj_weight.shape[1]
    dstate = A.shape[1] * (2 if A.is_complex() else 1)
    given = (B is not None, C is not None)
    projected = F.linear(x.transpose(1, 2), x_proj_weight)
    sizes = [dt_rank] + [dstate for is_given in given if not is_given]
    delta, *varying = torch.split(projected, sizes, dim=-1)
    if B is None:
        B = _varying(varying.pop(0), B_proj_bias, b_rms_weight, b_c_dt_rms_eps, A)
    if C is None:
        C = _varying(varying.pop(0), C_proj_bias, c_rms_weight, b_c_dt_rms_eps, A)
    if dt_rms_weight is not None:
        delta = rms_norm_fn(delta, dt_rms_weight[:dt_rank], None, eps=b_c_dt_rms_eps)
    delta = F.linear(delta, delta_proj_weight).transpose(1, 2)
    out = selective_scan_fn(
        x, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens=cu_seqlens
    )
    return F.linear(
        out.transpose(1, 2), out_proj_weight, cast(out_proj_bias, out_proj_weight.dtype)
    )


def _varying(
    projected: Tensor, bias: Tensor | None, rms_weight: Tensor | None, eps: float, A: Tensor
) -> Tensor:
    """A projection (B, L, N or 2N) as the scan takes B and C: (B, 1, N, L or 2L)."""
    if bias is not None:
        projected = projected + bias.to(projected.dtype)
    if rms_weight is not None:
        projected = rms_norm_fn(projected, rms_weight, None, eps=eps)
    if not A.is_complex():
        return projected.transpose(1, 2).unsqueeze(1)
    batch, seqlen, _ = projected.shape
    pairs = projected.view(batch, seqlen, A.shape[1], 2).permute(0, 2, 1, 3)
    return pairs.reshape(batch, 1, A.shape[1], 2 * seqlen)
