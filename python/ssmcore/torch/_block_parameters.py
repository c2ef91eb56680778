"""The parameters of a Mamba block, of ssmcore's module, mamba-ssm's or transformers'."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._operands import cast

# By their published names, and in the same order as arguments of operators.
NAMES = (
    "in_proj.weight",
    "in_proj.bias",
    "conv1d.weight",
    "conv1d.bias",
    "x_proj.weight",
    "dt_proj.weight",
    "dt_proj.bias",
    "A_log",
    "D",
    "out_proj.weight",
    "out_proj.bias",
)
PARAMETERS = (
    "Tensor in_proj, Tensor? in_proj_bias, Tensor conv_weight, Tensor? conv_bias, Tensor x_proj, "
    "Tensor dt_proj, Tensor dt_bias, Tensor A_log, Tensor D, Tensor out_proj, "
    "Tensor? out_proj_bias"
)


def block_parameters(mixer: Any, dtype: torch.dtype) -> list[Tensor | None]:
    """Those of a module, in the order of NAMES; dt_proj.bias, A_log and D in `dtype`."""
    own = mixer._parameters

    def of(layer: str, name: str) -> Tensor | None:
        module = mixer._modules[layer]
        parameters: dict[str, Tensor | None] = module._parameters
        # One that is computed from others (parametrised, pruned) is an attribute alone.
        return parameters[name] if name in parameters else getattr(module, name)

    return [
        of("in_proj", "weight"),
        of("in_proj", "bias"),
        of("conv1d", "weight"),
        of("conv1d", "bias"),
        of("x_proj", "weight"),
        of("dt_proj", "weight"),
        cast(of("dt_proj", "bias"), dtype),
        cast(own["A_log"], dtype),
        cast(own["D"], dtype),
        of("out_proj", "weight"),
        of("out_proj", "bias"),
    ]


def by_name(*parameters: Tensor | None) -> dict[str, Tensor]:
    """As `ssmcore.ops.mamba_block` takes them, in the order of NAMES; None where one is absent."""
    return {
        name: parameter
        for name, parameter in zip(NAMES, parameters, strict=True)
        if parameter is not None
    }
