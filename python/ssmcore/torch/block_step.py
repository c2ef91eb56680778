"""A Mamba block that goes on from its states, as one operator without gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ._operands import cast, is_autocast
from ._operators import count_as_written, fake, operator


def advance(
    mixer: Any,
    hidden_states: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    dt_B_C_norm_eps: float = 0.0,
) -> Tensor:
    """Runs the block on (B, L, d_model), updating its states in place.

    Args:
        mixer: a module with the published parameters of a Mamba block.
        conv_state: (B, D, W), the last inputs of the convolution, oldest first.
        ssm_state: (B, D, N).
        dt_B_C_norm_eps: as for `ssmcore.ops.mamba_block`; 0: no norms.
    """
    x = hidden_states
    if is_autocast(x):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    exact_conv, exact_ssm = cast(conv_state, x.dtype), cast(ssm_state, torch.float32)
    # The block remembers W - 1 inputs; the oldest of W is there for others to read.
    seqlen, width = x.shape[1], conv_state.shape[2]
    if 0 < seqlen < width:
        exact_conv[..., 0] = exact_conv[..., seqlen]
    out: Tensor = _mamba_block(
        x.contiguous(),
        mixer.in_proj.weight,
        mixer.in_proj.bias,
        mixer.conv1d.weight,
        mixer.conv1d.bias,
        mixer.x_proj.weight,
        mixer.dt_proj.weight,
        cast(mixer.dt_proj.bias, torch.float32),
        cast(mixer.A_log, torch.float32),
        cast(mixer.D, torch.float32),
        mixer.out_proj.weight,
        mixer.out_proj.bias,
        exact_conv[..., 1:],
        exact_ssm,
        dt_B_C_norm_eps,
    )
    for state, exact in ((conv_state, exact_conv), (ssm_state, exact_ssm)):
        if exact is state:
            count_as_written(state)
        else:
            state.copy_(exact)
    return out


@operator(
    "mamba_block",
    writes=(
        "conv_state",
        "ssm_state",
    ),
)
def _mamba_block(
    x: Tensor,
    in_proj: Tensor,
    in_proj_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    out_proj: Tensor,
    out_proj_bias: Tensor | None,
    conv_state: Tensor,
    ssm_state: Tensor,
    dt_B_C_norm_eps: float,
) -> Tensor:
    weights = {
        "in_proj.weight": in_proj,
        "conv1d.weight": conv_weight,
        "x_proj.weight": x_proj,
        "dt_proj.weight": dt_proj,
        "dt_proj.bias": dt_bias,
        "A_log": A_log,
        "D": D,
        "out_proj.weight": out_proj,
    }
    biases = {
        "in_proj.bias": in_proj_bias,
        "conv1d.bias": conv_bias,
        "out_proj.bias": out_proj_bias,
    }
    weights |= {name: bias for name, bias in biases.items() if bias is not None}
    out: Tensor = ops.mamba_block(
        x,
        weights,
        conv_state=conv_state,
        ssm_state=ssm_state,
        dt_B_C_norm_eps=dt_B_C_norm_eps or None,
    )
    return out


@fake("mamba_block")
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)
