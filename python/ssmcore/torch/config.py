"""The configuration of a language model, as mamba-ssm and transformers write it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class MambaConfig:
    """What the published config.json holds."""

    d_model: int = 2560
    d_intermediate: int = 0
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict[str, Any] = field(default_factory=dict)
    attn_layer_idx: list[int] = field(default_factory=list)
    attn_cfg: dict[str, Any] = field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True


# Names of the tensors that transformers calls otherwise.
_RENAMED = {"backbone.embedding.weight": "backbone.embeddings.weight"}


def config_from_transformers(config: dict[str, Any]) -> MambaConfig:
    """The configuration of a transformers model of type "mamba".

    Raises ValueError for another type, or one that the published model does not have.
    """
    model_type = config.get("model_type")
    if model_type != "mamba":
        raise ValueError(f"from_pretrained: model_type is {model_type!r}, expected 'mamba'")
    if config.get("layer_norm_epsilon", 1e-5) != 1e-5:
        raise ValueError(
            f"from_pretrained: layer_norm_epsilon is {config['layer_norm_epsilon']}, expected 1e-05"
        )
    return MambaConfig(
        d_model=config["hidden_size"],
        n_layer=config["num_hidden_layers"],
        vocab_size=config["vocab_size"],
        ssm_cfg={
            "layer": "Mamba1",
            "d_state": config["state_size"],
            "d_conv": config["conv_kernel"],
            "expand": config["expand"],
            "dt_rank": config["time_step_rank"],
            "conv_bias": config["use_conv_bias"],
            "bias": config["use_bias"],
        },
        residual_in_fp32=config.get("residual_in_fp32", True),
        pad_vocab_size_multiple=1,
        tie_embeddings=config.get("tie_word_embeddings", True),
    )


def from_transformers_names(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict of transformers' MambaForCausalLM under the names of MambaLMHeadModel."""
    published = {transformers: name for name, transformers in _RENAMED.items()}
    return {published.get(name, name): tensor for name, tensor in state_dict.items()}


def to_transformers_names(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict of MambaLMHeadModel under the names of transformers' MambaForCausalLM."""
    return {_RENAMED.get(name, name): tensor for name, tensor in state_dict.items()}
