"""The Mamba block as a module."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._operands import cast, parameter_dtype
from .block_function import mamba_block_fn
from .block_step import advance
from .inner import mamba_inner_fn


class Mamba(nn.Module):
    """The Mamba block (Gu & Dao, arXiv 2312.00752), with the published parameters.

    Args:
        d_model: channels of input and output.
        d_state, d_conv, expand: N, W, and D / d_model.
        dt_rank: R; "auto": d_model / 16, rounded up.
        dt_min, dt_max, dt_init_floor: softplus(dt_proj.bias) starts log-uniform between the first
            two, and not below the third.
        dt_init, dt_scale: dt_proj.weight starts "random", uniform in ± dt_scale / √R, or "constant"
            at that value.
        conv_bias, bias: whether the convolution, and in_proj and out_proj, have biases.
        use_fast_path: taken, and without effect.
        layer_idx: the key of its states in `inference_params`.
        device, dtype: of the parameters; A_log and D are float32.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dt_init not in ("random", "constant"):
            raise NotImplementedError(
                f"Mamba: dt_init is {dt_init!r}, expected 'random' or 'constant'"
            )
        self.d_model = d_model
        self.d_state = d_state
        self.d_conv = d_conv
        self.expand = expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else int(dt_rank)
        self.use_fast_path = use_fast_path
        self.layer_idx = layer_idx
        self.activation = "silu"
        self.act = nn.SiLU()

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **factory)
        self.conv1d = nn.Conv1d(
            self.d_inner,
            self.d_inner,
            kernel_size=d_conv,
            groups=self.d_inner,
            padding=d_conv - 1,
            bias=conv_bias,
            **factory,
        )
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **factory)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, bias=True, **factory)
        self._init_delta(dt_min, dt_max, dt_init, dt_scale, dt_init_floor)

        A = torch.arange(1, d_state + 1, dtype=torch.float32, device=device)
        self.A_log = nn.Parameter(torch.log(A).repeat(self.d_inner, 1))
        self.D = nn.Parameter(torch.ones(self.d_inner, dtype=torch.float32, device=device))
        for parameter in (self.A_log, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)

    @torch.no_grad()
    def _init_delta(self, low: float, high: float, init: str, scale: float, floor: float) -> None:
        bound = scale / math.sqrt(self.dt_rank)
        if init == "constant":
            nn.init.constant_(self.dt_proj.weight, bound)
        else:
            nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        bias = self.dt_proj.bias
        uniform = torch.rand(self.d_inner, dtype=torch.float32, device=bias.device)
        dt = torch.exp(math.log(low) + uniform * math.log(high / low)).clamp(min=floor)
        bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        bias._no_reinit = True  # type: ignore[attr-defined]

    def forward(
        self,
        hidden_states: Tensor,
        inference_params: Any = None,
        *,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """(B, L, d_model) → (B, L, d_model).

        With `inference_params` it goes on from the states these hold for `layer_idx`, from zeros
        at `seqlen_offset` 0, updates them, and gives no gradients.
        """
        if inference_params is not None:
            if cu_seqlens is not None:
                raise ValueError("Mamba: cu_seqlens and inference_params exclude each other")
            at_start = inference_params.seqlen_offset == 0
            states = self._get_states_from_cache(
                inference_params, hidden_states.shape[0], initialize_states=at_start
            )
            return self._advance(hidden_states, *states)
        if cu_seqlens is None:
            out = mamba_block_fn(self, hidden_states)
            if out is not None:
                return out
        xz = F.linear(hidden_states, self.in_proj.weight, self.in_proj.bias).transpose(1, 2)
        return mamba_inner_fn(
            xz,
            self.conv1d.weight,
            self.conv1d.bias,
            self.x_proj.weight,
            self.dt_proj.weight,
            self.out_proj.weight,
            self.out_proj.bias,
            -torch.exp(cast(self.A_log, parameter_dtype(hidden_states))),
            D=self.D,
            delta_bias=self.dt_proj.bias,
            cu_seqlens=cu_seqlens,
        )

    def step(
        self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One token, (B, 1, d_model), updating the states in place; no gradients.

        Returns:
            out, (B, 1, d_model), and the two states.
        """
        if hidden_states.shape[1] != 1:
            raise ValueError(
                f"Mamba.step: hidden_states has shape {tuple(hidden_states.shape)}, "
                "expected (batch, 1, d_model)"
            )
        return self._advance(hidden_states, conv_state, ssm_state), conv_state, ssm_state

    @torch.no_grad()
    def _advance(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
        seqlen = hidden_states.shape[1]
        if 0 < seqlen < self.d_conv:
            conv_state[..., 0] = conv_state[..., seqlen]  # for others to read
        return advance(self, hidden_states, conv_state, ssm_state)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """(conv_state, ssm_state): (B, D, W), in `dtype` or the weights', and (B, D, N), float32.

        Their size does not depend on `max_seqlen`.
        """
        weight = self.in_proj.weight
        conv_state = torch.zeros(
            (batch_size, self.d_inner, self.d_conv),
            device=weight.device,
            dtype=dtype or weight.dtype,
        )
        ssm_state = torch.zeros(
            (batch_size, self.d_inner, self.d_state), device=weight.device, dtype=torch.float32
        )
        return conv_state, ssm_state

    def _get_states_from_cache(
        self, inference_params: Any, batch_size: int, initialize_states: bool = False
    ) -> tuple[Tensor, Tensor]:
        if self.layer_idx is None:
            raise ValueError("Mamba: inference_params needs a layer_idx")
        cache = inference_params.key_value_memory_dict
        if self.layer_idx not in cache:
            cache[self.layer_idx] = self.allocate_inference_cache(batch_size, 0)
        elif initialize_states:
            for state in cache[self.layer_idx]:
                state.zero_()
        states: tuple[Tensor, Tensor] = cache[self.layer_idx]
        return states
