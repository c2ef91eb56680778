"""A residual layer around a Mamba block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ._operands import cast, parameter_dtype
from .norm import RMSNorm


class Block(nn.Module):
    """residual ← hidden + residual; hidden ← mixer(norm(residual)), the published order.

    Args:
        dim: d_model.
        mixer_cls: makes the mixer of `dim`.
        mlp_cls: nn.Identity; others are not supported.
        norm_cls: makes the norm of `dim`.
        fused_add_norm: sum and norm as one operator (an `RMSNorm` does so).
        residual_in_fp32: keep the residual in float32.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], nn.Module],
        mlp_cls: Callable[[int], nn.Module] = nn.Identity,
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__()
        if mlp_cls is not nn.Identity:
            raise NotImplementedError(
                "Block: mlp_cls is not nn.Identity, and no other is supported"
            )
        self.residual_in_fp32 = residual_in_fp32
        self.fused_add_norm = fused_add_norm
        self.norm: Any = norm_cls(dim)
        self.mixer: Any = mixer_cls(dim)
        self.mlp = None

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        inference_params: Any = None,
        **mixer_kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """(hidden_states, residual), both (B, L, d_model)."""
        hidden_states, residual = add_norm(
            self.norm, hidden_states, residual, self.residual_in_fp32
        )
        hidden_states = self.mixer(hidden_states, inference_params=inference_params, **mixer_kwargs)
        return hidden_states, residual

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Any:
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)


def add_norm(
    norm: Any, hidden_states: Tensor, residual: Tensor | None, residual_in_fp32: bool
) -> tuple[Tensor, Tensor]:
    """(norm(hidden_states + residual), the sum)."""
    if isinstance(norm, RMSNorm):
        normed: tuple[Tensor, Tensor] = norm(
            hidden_states, residual, prenorm=True, residual_in_fp32=residual_in_fp32
        )
        return normed
    residual = hidden_states if residual is None else hidden_states + residual
    hidden_states = norm(residual.to(norm.weight.dtype))
    if residual_in_fp32:
        residual = cast(residual, parameter_dtype(residual))
    return hidden_states, residual
