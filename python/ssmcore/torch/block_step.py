"""A Mamba block that goes on from its states, as one operator without gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ._block_parameters import PARAMETERS, block_parameters, by_name
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
        conv_state: (B, D, W), the last inputs of the convolution, oldest first. The oldest of them,
            which is not needed again, is left as it is.
        ssm_state: (B, D, N).
        dt_B_C_norm_eps: as for `ssmcore.ops.mamba_block`; 0: no norms.
    """
    x = hidden_states
    if is_autocast(x):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    exact_conv, exact_ssm = cast(conv_state, x.dtype), cast(ssm_state, torch.float32)
    # A traced program needs the operator; otherwise the way through it would take half the time.
    run = _mamba_block if torch.compiler.is_compiling() else _run_mamba_block
    out: Tensor = run(
        x.contiguous(),
        *block_parameters(mixer, torch.float32),
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


def _run_mamba_block(x: Tensor, *arguments: Any) -> Tensor:
    *parameters, conv_state, ssm_state, eps = arguments
    out: Tensor = ops.mamba_block(
        x,
        by_name(*parameters),
        conv_state=conv_state,
        ssm_state=ssm_state,
        dt_B_C_norm_eps=eps or None,
    )
    return out


_mamba_block = operator(
    f"mamba_block(Tensor x, {PARAMETERS}, Tensor(a!) conv_state, Tensor(b!) ssm_state, "
    "float dt_B_C_norm_eps) -> Tensor"
)(_run_mamba_block)


@fake("mamba_block")
def _(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty(x.shape)
