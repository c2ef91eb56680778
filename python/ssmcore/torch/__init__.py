"""Differentiable operators, modules and models for PyTorch, on the kernels of ssmcore.

    from ssmcore.torch import Mamba, selective_scan_fn

The functions and modules take and give what those of mamba-ssm and causal-conv1d do, on the CPU
and, forward, on a GPU; they work under torch.compile, torch.export, autocast, activation
checkpointing, DDP and FSDP. `install_as` puts them in place under the published names, and
`patch_transformers` makes transformers' Mamba and FalconMamba models use them. Nothing here is
compiled against torch.
"""

from __future__ import annotations

from .block import Block
from .config import MambaConfig, from_transformers_names, to_transformers_names
from .convolution import causal_conv1d_fn, causal_conv1d_update
from .generation import InferenceParams
from .inner import mamba_inner_fn
from .install import install_as
from .language_model import MambaLMHeadModel, MixerModel
from .mamba import Mamba
from .norm import RMSNorm, rms_norm_fn
from .patch import patch_transformers, unpatch_transformers
from .scan import selective_scan_fn, selective_state_update

__all__ = [
    "Block",
    "InferenceParams",
    "Mamba",
    "MambaConfig",
    "MambaLMHeadModel",
    "MixerModel",
    "RMSNorm",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "from_transformers_names",
    "install_as",
    "mamba_inner_fn",
    "patch_transformers",
    "rms_norm_fn",
    "selective_scan_fn",
    "selective_state_update",
    "to_transformers_names",
    "unpatch_transformers",
]
