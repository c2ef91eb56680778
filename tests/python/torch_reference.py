"""The operators in plain PyTorch, one step after the other, for autograd to differentiate.

Shapes and names are those of `ssmcore.torch`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _per_channel(coefficients: Tensor, dim: int, seqlen: int) -> Tensor:
    """B or C in any of its forms, as (batch or 1, dim, dstate, seqlen)."""
    if coefficients.dim() == 2:
        return coefficients[None, :, :, None].expand(-1, -1, -1, seqlen)
    if coefficients.dim() == 3:
        coefficients = coefficients.unsqueeze(1)
    if coefficients.shape[-1] == 2 * seqlen:
        pairs = coefficients.unflatten(-1, (seqlen, 2)).contiguous()
        coefficients = torch.view_as_complex(pairs)
    return coefficients.repeat_interleave(dim // coefficients.shape[1], dim=1)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, last_state), (batch, dim, seqlen) and (batch, dim, dstate)."""
    batch, dim, seqlen = u.shape
    B, C = _per_channel(B, dim, seqlen), _per_channel(C, dim, seqlen)
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    h = A.new_zeros((batch, *A.shape)) if initial_state is None else initial_state
    outputs = []
    for t in range(seqlen):
        dt = delta[:, :, t, None]
        h = torch.exp(dt * A) * h + dt * B[..., t] * u[:, :, t, None]
        y = (C[..., t] * h).sum(-1)
        outputs.append(2 * y.real if A.is_complex() else y)
    out = torch.stack(outputs, dim=-1)
    if D is not None:
        out = out + D[:, None] * u
    if z is not None:
        out = out * F.silu(z)
    return out, h


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, final_state), (batch, dim, seqlen) and (batch, dim, width - 1)."""
    batch, dim, _ = x.shape
    memory = weight.shape[1] - 1
    before = x.new_zeros((batch, dim, memory)) if initial_state is None else initial_state
    inputs = torch.cat([before, x], dim=-1)
    out = F.conv1d(inputs, weight.unsqueeze(1), bias, groups=dim)
    return F.silu(out) if activation else out, inputs[..., inputs.shape[-1] - memory :]


def rms_norm(
    x: Tensor, weight: Tensor | None, residual: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """(out, x + residual)."""
    r = x if residual is None else x + residual
    out = r * torch.rsqrt(r.square().mean(-1, keepdim=True) + eps)
    return out if weight is None else out * weight, r


def mamba_block(mixer: torch.nn.Module, hidden_states: Tensor) -> Tensor:
    """The Mamba block with the parameters of a module."""
    xz = F.linear(hidden_states, mixer.in_proj.weight, mixer.in_proj.bias).transpose(1, 2)
    x, z = xz.chunk(2, dim=1)
    x, _ = causal_conv1d(x, mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias, "silu")
    A = -torch.exp(mixer.A_log)
    dt_rank, dstate = mixer.dt_proj.weight.shape[1], A.shape[1]
    projected = F.linear(x.transpose(1, 2), mixer.x_proj.weight).transpose(1, 2)
    delta, B, C = projected.split([dt_rank, dstate, dstate], dim=1)
    delta = mixer.dt_proj.weight @ delta
    out, _ = selective_scan(x, delta, A, B, C, mixer.D, z, mixer.dt_proj.bias, True)
    return F.linear(out.transpose(1, 2), mixer.out_proj.weight, mixer.out_proj.bias)
