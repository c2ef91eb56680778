"""transformers' Mamba and FalconMamba models on these kernels."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._operands import cast, parameter_dtype
from .block_step import advance
from .convolution import causal_conv1d_fn, causal_conv1d_update
from .inner import mamba_inner_fn
from .norm import rms_norm_fn
from .scan import selective_scan_fn, selective_state_update

# The classes of each model, and transformers' functions by what takes their place.
_MODELS = {
    "transformers.models.mamba.modeling_mamba": ("MambaMixer", "MambaRMSNorm"),
    "transformers.models.falcon_mamba.modeling_falcon_mamba": (
        "FalconMambaMixer",
        "FalconMambaRMSNorm",
    ),
}

_patched: ExitStack | None = None


def patch_transformers() -> ExitStack:
    """Makes transformers' Mamba and FalconMamba models use ssmcore, those already made included.

    What they compute, train and generate stays the same, to rounding; but under `torch.no_grad` a
    cache that has been filled is continued by several tokens at once, where transformers alone
    starts anew. Mixers whose layers were replaced (quantised, LoRA) or have hooks keep these layers
    and use the operators between them.

    Returns:
        A context manager that undoes it, as its `close` and `unpatch_transformers` do.
    """
    global _patched
    unpatch_transformers()
    _patched = patched = ExitStack()
    for name, (mixer, norm) in _MODELS.items():
        module = importlib.import_module(name)
        for function, replacement in _FUNCTIONS.items():
            if function in _UPDATES:
                replacement = _unless_differentiated(replacement, getattr(module, function))
            _replace(patched, module, function, replacement)
        mixer_class, norm_class = getattr(module, mixer), getattr(module, norm)
        _replace(patched, mixer_class, "forward", _mixer_forward(mixer_class.forward))
        _replace(patched, norm_class, "forward", _norm_forward(norm_class.forward))
    return patched


def unpatch_transformers() -> None:
    """Undoes `patch_transformers`; nothing happens where that was not called."""
    global _patched
    if _patched is not None:
        _patched.close()
        _patched = None


def _replace(patched: ExitStack, owner: Any, name: str, replacement: Any) -> None:
    patched.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, replacement)


def _without(function: Callable[..., Any], *unknown: str) -> Callable[..., Any]:
    """`function`, with arguments that only transformers' own has left out."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **{k: v for k, v in kwargs.items() if k not in unknown})

    return wrapped


def _unless_differentiated(
    function: Callable[..., Any], original: Callable[..., Any]
) -> Callable[..., Any]:
    """`function`, which has no gradient; `original` where gradients are recorded."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        recorded = torch.is_grad_enabled() and any(
            isinstance(value, Tensor) and value.requires_grad for value in (*args, *kwargs.values())
        )
        return (original if recorded else function)(*args, **kwargs)

    return wrapped


def _no_inner_fn(*args: Any, **kwargs: Any) -> None:
    """Leaves it to the mixer to call its layers, and to mask what they give."""


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": causal_conv1d_fn,
    "causal_conv1d_update": causal_conv1d_update,
    "mamba_inner_fn": _no_inner_fn,
    "mamba_selective_scan": _without(selective_scan_fn, "use_mambapy", "use_associative_scan"),
    "mamba_selective_state_update": selective_state_update,
}
_UPDATES = ("causal_conv1d_update", "mamba_selective_state_update")


def _norm_forward(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A norm's forward: one operator in training; for a token, `original` takes no longer."""

    @functools.wraps(original)
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or hidden_states.dtype != self.weight.dtype:
            return original(self, hidden_states)
        out: Tensor = rms_norm_fn(hidden_states, self.weight, None, eps=self.variance_epsilon)
        return out

    return forward


def _mixer_forward(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A mixer's forward: the whole block as one operator where it can be, else `original`."""

    @functools.wraps(original)
    def forward(
        self: Any,
        hidden_states: Tensor,
        cache_params: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        is_double = hidden_states.dtype == torch.float64
        if kwargs or is_double or not _is_plain(self) or _masks(attention_mask):
            return original(self, hidden_states, cache_params, attention_mask, **kwargs)
        if torch.is_grad_enabled():
            if cache_params is None:
                return _train(self, hidden_states)
        elif cache_params is None or not cache_params.is_recording_past(self.layer_idx):
            return _infer(self, hidden_states, cache_params)
        return original(self, hidden_states, cache_params, attention_mask)

    return forward


_LAYERS = {
    "in_proj": nn.Linear,
    "conv1d": nn.Conv1d,
    "x_proj": nn.Linear,
    "dt_proj": nn.Linear,
    "out_proj": nn.Linear,
}


_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_hf_hook",  # accelerate's
)


def _is_plain(mixer: Any) -> bool:
    """Whether the block's layers are as transformers makes them, without hooks of anybody."""
    layers = mixer._modules
    for name, kind in _LAYERS.items():
        layer = layers[name]
        if type(layer) is not kind or any(getattr(layer, hooks, None) for hooks in _HOOKS):
            return False
    return mixer.activation in ("silu", "swish")


def _masks(attention_mask: Tensor | None) -> bool:
    return attention_mask is not None and not bool(attention_mask.all())


def _train(mixer: Any, hidden_states: Tensor) -> Tensor:
    xz = F.linear(hidden_states, mixer.in_proj.weight, mixer.in_proj.bias).transpose(1, 2)
    norms: dict[str, Any] = {}
    if hasattr(mixer, "rms_eps"):
        norms = {
            "b_rms_weight": mixer.b_layernorm.weight,
            "c_rms_weight": mixer.c_layernorm.weight,
            "dt_rms_weight": mixer.dt_layernorm.weight,
            "b_c_dt_rms_eps": mixer.rms_eps,
        }
    return mamba_inner_fn(
        xz,
        mixer.conv1d.weight,
        mixer.conv1d.bias,
        mixer.x_proj.weight,
        mixer.dt_proj.weight,
        mixer.out_proj.weight,
        mixer.out_proj.bias,
        -torch.exp(cast(mixer.A_log, parameter_dtype(hidden_states))),
        D=mixer.D,
        delta_bias=mixer.dt_proj.bias,
        **norms,
    )


def _infer(mixer: Any, hidden_states: Tensor, cache: Any) -> Tensor:
    eps = getattr(mixer, "rms_eps", 0.0)
    layer = mixer.layer_idx
    conv_state = None if cache is None else cache.get_conv_state(layer, state_idx=0)
    ssm_state = None if cache is None else cache.get_recurrent_state(layer, state_idx=0)
    if conv_state is not None and ssm_state is not None:
        return advance(mixer, hidden_states, conv_state, ssm_state, eps)
    rows = (hidden_states.shape[0], mixer.intermediate_size)
    conv_state = hidden_states.new_zeros((*rows, mixer.conv_kernel_size))
    ssm_state = hidden_states.new_zeros((*rows, mixer.ssm_state_size), dtype=torch.float32)
    out = advance(mixer, hidden_states, conv_state, ssm_state, eps)
    if cache is not None:
        cache.update_conv_state(conv_state, layer)
        cache.update_recurrent_state(ssm_state, layer)
    return out
