"""The Mamba language model as a module."""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..loading import find_folder
from .block import Block, add_norm
from .config import MambaConfig, config_from_transformers, from_transformers_names
from .generation import GenerationMixin
from .mamba import Mamba
from .norm import RMSNorm

_CONFIG_FILE = "config.json"
_WEIGHTS_FILE = "pytorch_model.bin"
_SAFETENSORS_FILE = "model.safetensors"


class CausalLMOutput(NamedTuple):
    logits: Tensor


def create_block(
    d_model: int,
    d_intermediate: int = 0,
    ssm_cfg: Mapping[str, Any] | None = None,
    attn_layer_idx: list[int] | None = None,
    attn_cfg: Mapping[str, Any] | None = None,
    norm_epsilon: float = 1e-5,
    rms_norm: bool = False,
    residual_in_fp32: bool = False,
    fused_add_norm: bool = False,
    layer_idx: int | None = None,
    device: Any = None,
    dtype: torch.dtype | None = None,
) -> Block:
    """A layer of Mamba-1; NotImplementedError for Mamba-2, attention and MLP layers."""
    options = dict(ssm_cfg or {})
    layer = options.pop("layer", "Mamba1")
    if layer != "Mamba1":
        raise NotImplementedError(
            f"create_block: layer is {layer!r}, and only 'Mamba1' is supported"
        )
    if d_intermediate != 0 or attn_layer_idx:
        raise NotImplementedError("create_block: layers of attention or MLP are not supported")
    factory: dict[str, Any] = {"device": device, "dtype": dtype}
    block = Block(
        d_model,
        functools.partial(Mamba, layer_idx=layer_idx, **options, **factory),
        norm_cls=functools.partial(
            RMSNorm if rms_norm else nn.LayerNorm, eps=norm_epsilon, **factory
        ),
        fused_add_norm=fused_add_norm,
        residual_in_fp32=residual_in_fp32,
    )
    block.layer_idx = layer_idx  # type: ignore[assignment]
    return block


def _init_weights(
    module: nn.Module,
    n_layer: int,
    initializer_range: float = 0.02,
    rescale_prenorm_residual: bool = True,
    n_residuals_per_layer: int = 1,
) -> None:
    """The published initialisation, beyond what the modules do themselves.

    Products that end in the residual start at 1 / √(their number), so that its variance does not
    grow with depth (GPT-2).
    """
    if isinstance(module, nn.Linear):
        if module.bias is not None and not getattr(module.bias, "_no_reinit", False):
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=initializer_range)
    if rescale_prenorm_residual:
        for name, parameter in module.named_parameters():
            if name == "out_proj.weight":
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
                with torch.no_grad():
                    parameter.div_(math.sqrt(n_residuals_per_layer * n_layer))


class MixerModel(nn.Module):
    """Embedding, layers and the last norm: token ids to hidden states."""

    def __init__(
        self,
        d_model: int,
        n_layer: int,
        d_intermediate: int,
        vocab_size: int,
        ssm_cfg: Mapping[str, Any] | None = None,
        attn_layer_idx: list[int] | None = None,
        attn_cfg: Mapping[str, Any] | None = None,
        norm_epsilon: float = 1e-5,
        rms_norm: bool = False,
        initializer_cfg: Mapping[str, Any] | None = None,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.residual_in_fp32 = residual_in_fp32
        self.fused_add_norm = fused_add_norm
        self.embedding: Any = nn.Embedding(vocab_size, d_model, **factory)
        self.layers: Any = nn.ModuleList(
            create_block(
                d_model,
                d_intermediate,
                ssm_cfg,
                attn_layer_idx,
                attn_cfg,
                norm_epsilon,
                rms_norm,
                residual_in_fp32,
                fused_add_norm,
                layer_idx=i,
                **factory,
            )
            for i in range(n_layer)
        )
        norm_cls: Any = RMSNorm if rms_norm else nn.LayerNorm
        self.norm_f: Any = norm_cls(d_model, eps=norm_epsilon, **factory)
        self.apply(functools.partial(_init_weights, n_layer=n_layer, **(initializer_cfg or {})))

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, Any]:
        """The states of every layer, by its index."""
        return {
            i: layer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)
            for i, layer in enumerate(self.layers)
        }

    def forward(
        self, input_ids: Tensor, inference_params: Any = None, **mixer_kwargs: Any
    ) -> Tensor:
        """(B, L) → (B, L, d_model)."""
        hidden_states, residual = self.embedding(input_ids), None
        for layer in self.layers:
            hidden_states, residual = layer(
                hidden_states, residual, inference_params=inference_params, **mixer_kwargs
            )
        return add_norm(self.norm_f, hidden_states, residual, self.residual_in_fp32)[0]


class MambaLMHeadModel(nn.Module, GenerationMixin):
    """The Mamba language model, with the published parameters."""

    def __init__(
        self,
        config: MambaConfig,
        initializer_cfg: Mapping[str, Any] | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        multiple = config.pad_vocab_size_multiple
        vocab_size = -(-config.vocab_size // multiple) * multiple
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.backbone = MixerModel(
            d_model=config.d_model,
            n_layer=config.n_layer,
            d_intermediate=config.d_intermediate,
            vocab_size=vocab_size,
            ssm_cfg=config.ssm_cfg,
            attn_layer_idx=config.attn_layer_idx,
            attn_cfg=config.attn_cfg,
            rms_norm=config.rms_norm,
            initializer_cfg=initializer_cfg,
            fused_add_norm=config.fused_add_norm,
            residual_in_fp32=config.residual_in_fp32,
            **factory,
        )
        self.lm_head = nn.Linear(config.d_model, vocab_size, bias=False, **factory)
        self.apply(
            functools.partial(_init_weights, n_layer=config.n_layer, **(initializer_cfg or {}))
        )
        self.tie_weights()

    def tie_weights(self) -> None:
        """Makes the embedding and lm_head one parameter, if the configuration says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, Any]:
        """The states of every layer, by its index: what `inference_params` holds."""
        return self.backbone.allocate_inference_cache(batch_size, max_seqlen, dtype, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        inference_params: Any = None,
        num_last_tokens: int = 0,
        **mixer_kwargs: Any,
    ) -> CausalLMOutput:
        """Logits, (B, L, vocab_size), of the last `num_last_tokens` positions if that is not 0.

        `position_ids` is taken, and without effect. With `cu_seqlens` the batch of 1 holds packed
        sequences.
        """
        hidden_states = self.backbone(input_ids, inference_params=inference_params, **mixer_kwargs)
        if num_last_tokens > 0:
            hidden_states = hidden_states[:, -num_last_tokens:]
        return CausalLMOutput(logits=self.lm_head(hidden_states))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name: str | os.PathLike[str],
        device: Any = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> MambaLMHeadModel:
        """A model from a folder or the Hugging Face hub, as mamba-ssm or transformers saved it.

        Args:
            pretrained_model_name: a folder with config.json and pytorch_model.bin or
                model.safetensors (which needs safetensors), whole or as shards and their index; or
                a name on the hub, which needs huggingface_hub.
            device, dtype: of the parameters, whatever is stored; default those of torch.
            kwargs: more arguments of the model.

        Raises:
            FileNotFoundError: no such file in the folder.
            ValueError: no such folder or name, or a model of another kind.
        """
        folder = find_folder(pretrained_model_name)
        raw = json.loads((folder / _CONFIG_FILE).read_text(encoding="utf-8"))
        state_dict = _read_weights(folder)
        if "model_type" in raw:
            config = config_from_transformers(raw)
            state_dict = from_transformers_names(state_dict)
        else:
            known = MambaConfig.__dataclass_fields__
            config = MambaConfig(**{name: raw[name] for name in raw if name in known})
        state_dict.setdefault("lm_head.weight", state_dict["backbone.embedding.weight"])
        model = cls(config, device=device, dtype=dtype, **kwargs)
        model.load_state_dict(state_dict)
        return model

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Writes config.json and pytorch_model.bin as mamba-ssm reads them, and `ssmcore.load`."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.state_dict(), folder / _WEIGHTS_FILE)
        config = json.dumps(asdict(self.config), indent=2)
        (folder / _CONFIG_FILE).write_text(config + "\n", encoding="utf-8")


def _read_weights(folder: Path) -> dict[str, Tensor]:
    for name in (_SAFETENSORS_FILE, _WEIGHTS_FILE):
        index = folder / f"{name}.index.json"
        if (folder / name).exists():
            return _read_file(folder / name)
        if index.exists():
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            weights: dict[str, Tensor] = {}
            for shard in sorted(shards):
                weights.update(_read_file(folder / shard))
            return weights
    raise FileNotFoundError(
        f"from_pretrained: {folder} has neither {_SAFETENSORS_FILE} nor {_WEIGHTS_FILE}"
    )


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    weights: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return weights
