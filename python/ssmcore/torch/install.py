"""Modules of the published packages' names, for code that imports them."""

from __future__ import annotations

import importlib.machinery
import sys
from contextlib import ExitStack
from types import ModuleType
from typing import Any

from .. import __version__
from .block import Block
from .config import MambaConfig
from .convolution import causal_conv1d_fn, causal_conv1d_update
from .generation import GenerationMixin, InferenceParams
from .inner import mamba_inner_fn
from .language_model import MambaLMHeadModel, MixerModel, create_block
from .mamba import Mamba
from .norm import RMSNorm, rms_norm_fn
from .scan import selective_scan_fn, selective_state_update


def _names(*objects: Any) -> dict[str, Any]:
    return {item.__name__: item for item in objects}


_SCAN = {
    **_names(selective_scan_fn, mamba_inner_fn),
    # The published reference implementations, by the operators they are for.
    "selective_scan_ref": selective_scan_fn,
    "mamba_inner_ref": mamba_inner_fn,
}

# What each module of a package has.
_MODULES: dict[str, dict[str, dict[str, Any]]] = {
    "mamba_ssm": {
        "mamba_ssm": _names(selective_scan_fn, mamba_inner_fn, Mamba, MambaLMHeadModel),
        "mamba_ssm.ops": {},
        "mamba_ssm.ops.selective_scan_interface": _SCAN,
        "mamba_ssm.ops.triton": {},
        "mamba_ssm.ops.triton.selective_state_update": _names(selective_state_update),
        "mamba_ssm.ops.triton.layer_norm": _names(rms_norm_fn, RMSNorm),
        "mamba_ssm.modules": {},
        "mamba_ssm.modules.block": _names(Block),
        "mamba_ssm.modules.mamba_simple": _names(Mamba, Block),
        "mamba_ssm.models": {},
        "mamba_ssm.models.config_mamba": _names(MambaConfig),
        "mamba_ssm.models.mixer_seq_simple": _names(
            MambaConfig, MambaLMHeadModel, MixerModel, create_block
        ),
        "mamba_ssm.utils": {},
        "mamba_ssm.utils.generation": _names(GenerationMixin, InferenceParams),
    },
    "causal_conv1d": {
        "causal_conv1d": _names(causal_conv1d_fn, causal_conv1d_update),
        "causal_conv1d.causal_conv1d_interface": _names(causal_conv1d_fn, causal_conv1d_update),
    },
}


def install_as(*packages: str) -> ExitStack:
    """Puts modules of the published names in place, made of what ssmcore.torch has.

    After `install_as("mamba_ssm", "causal_conv1d")` (what no argument means too) `import mamba_ssm`
    and the like find them, whether or not these packages are installed.

    Args:
        packages: "mamba_ssm", "causal_conv1d".

    Returns:
        A context manager that takes them away again, as its `close` does.

    Raises:
        ValueError: another name.
        RuntimeError: a package of that name is imported already.
    """
    packages = packages or tuple(_MODULES)
    for package in packages:
        if package not in _MODULES:
            raise ValueError(f"install_as: {package!r} is none of {', '.join(map(repr, _MODULES))}")
        if package in sys.modules:
            raise RuntimeError(
                f"install_as: {package} is imported already; call install_as before that"
            )
    installed = ExitStack()
    for package in packages:
        for name, contents in _MODULES[package].items():
            sys.modules[name] = _make_module(name, contents)
            installed.callback(sys.modules.pop, name, None)
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, sys.modules[name])
    return installed


def _make_module(name: str, contents: dict[str, Any]) -> ModuleType:
    module = ModuleType(name, "Of ssmcore.torch, under the published name.")
    is_package = any(other.startswith(f"{name}.") for other in _MODULES[name.partition(".")[0]])
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=is_package)
    if is_package:
        module.__path__ = []
    module.__dict__.update(contents, __version__=__version__)
    return module
