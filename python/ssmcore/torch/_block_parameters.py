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
    layers, own = mixer._modules, mixer._parameters
    in_proj, conv, out_proj = (
        layers[name]._parameters for name in ("in_proj", "conv1d", "out_proj")
    )
    dt_proj = layers["dt_proj"]._parameters
    return [
        in_proj["weight"],
        in_proj["bias"],
        conv["weight"],
        conv["bias"],
        layers["x_proj"]._parameters["weight"],
        dt_proj["weight"],
        cast(dt_proj["bias"], dtype),
        cast(own["A_log"], dtype),
        cast(own["D"], dtype),
        out_proj["weight"],
        out_proj["bias"],
    ]


def by_name(*parameters: Tensor | None) -> dict[str, Tensor]:
    """As `ssmcore.ops.mamba_block` takes them, in the order of NAMES; None where one is absent."""
    return {
        name: parameter
        for name, parameter in zip(NAMES, parameters, strict=True)
        if parameter is not None
    }
