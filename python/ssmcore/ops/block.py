"""The Mamba block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import _core
from .._arrays import dtype_name, require_mutable
from .._outputs import library_of
from ..errors import InvalidArgumentError
from ._arguments import Array, require_array, require_rank

# Parameters by their published names, and what `_core` calls them.
NAMES = {
    "in_proj.weight": "in_proj",
    "conv1d.weight": "conv_weight",
    "x_proj.weight": "x_proj",
    "dt_proj.weight": "dt_proj",
    "dt_proj.bias": "dt_bias",
    "A_log": "A",
    "D": "D",
    "out_proj.weight": "out_proj",
    "in_proj.bias": "in_proj_bias",
    "conv1d.bias": "conv_bias",
    "out_proj.bias": "out_proj_bias",
}
OPTIONAL = ("in_proj.bias", "conv1d.bias", "out_proj.bias")


def mamba_block(
    x: Array,
    weights: dict[str, Array],
    *,
    conv_state: Array | None = None,
    ssm_state: Array | None = None,
    cu_seqlens: Array | None = None,
    state_indices: Array | None = None,
    dt_B_C_norm_eps: float | None = None,
    check: bool = False,
    batch_invariant: bool = False,
) -> Array:
    """The Mamba block (Gu & Dao, arXiv 2312.00752, figure 3), on a sequence or, with L = 1, a step.

    On the CPU all arrays may also be float64, for checking.

    Args:
        x: (B, L, d_model), contiguous.
        weights: by published name: "in_proj.weight" (2D, d_model), "conv1d.weight" (D, 1, W),
            "x_proj.weight" (R + 2N, D), "dt_proj.weight" (D, R), "dt_proj.bias" (D,),
            "A_log" (D, N), "D" (D,), "out_proj.weight" (d_model, D); optionally "in_proj.bias",
            "conv1d.bias", "out_proj.bias". Matrices may have any activation type; "dt_proj.bias",
            "A_log" and "D" are float32.
        conv_state: (B, D, W - 1), x's dtype: the convolution's state, read and updated; packed
            (S, D, W - 1); with `state_indices` (slots, D, W - 1).
        ssm_state: (B, D, N), float32: the scan's state, likewise.
        cu_seqlens: (S + 1,), int32: packed sequences.
        state_indices: (B,) or (S,), int32, as in `selective_state_update`; needs a state.
        dt_B_C_norm_eps: > 0: Δ (before dt_proj), B and C each pass an RMS norm without weights,
            with this eps (FalconMamba); None: they do not.

    Returns:
        (B, L, d_model), like x.
    """
    require_array(x, "mamba_block: x")
    parameters = block_parameters("mamba_block", weights, dt_B_C_norm_eps)
    if state_indices is not None and conv_state is None and ssm_state is None:
        raise InvalidArgumentError("mamba_block: state_indices needs conv_state or ssm_state")
    for name, state in (("conv_state", conv_state), ("ssm_state", ssm_state)):
        require_mutable(state, f"mamba_block: {name}", "pass a NumPy array, which x need not be")
    library = library_of(x)
    out = library.empty(x.shape, dtype_name(x))
    library.prepare_products()
    _core.mamba_block(
        on=library.on(check=check, batch_invariant=batch_invariant),
        x=x,
        **parameters,
        conv_state=conv_state,
        ssm_state=ssm_state,
        cu_seqlens=cu_seqlens,
        state_indices=state_indices,
        out=out,
    )
    return library.hand_over(out)


def check_parameters(op: str, weights: Mapping[str, Array], dt_B_C_norm_eps: float | None) -> None:
    """Raises InvalidArgumentError for names or taps of `mamba_block` that are not as it says."""
    for name in NAMES:
        if name not in weights and name not in OPTIONAL:
            raise InvalidArgumentError(f"{op}: weights has no {name!r}")
    for name in weights:
        if name not in NAMES:
            raise InvalidArgumentError(f"{op}: weights has an unknown {name!r}")
    conv_weight = weights["conv1d.weight"]
    require_rank(conv_weight, f"{op}: conv1d.weight", 3, "(dim, 1, width)")
    if conv_weight.shape[1] != 1:
        raise InvalidArgumentError(
            f"{op}: conv1d.weight has shape {tuple(conv_weight.shape)}, expected (dim, 1, width)"
        )
    require_array(weights["A_log"], f"{op}: A_log")
    if dt_B_C_norm_eps is not None and not dt_B_C_norm_eps > 0:
        raise InvalidArgumentError(
            f"{op}: dt_B_C_norm_eps is {dt_B_C_norm_eps!r}, expected more than 0, or None"
        )


def block_parameters(
    op: str, weights: dict[str, Array], dt_B_C_norm_eps: float | None
) -> dict[str, Any]:
    """The weights of a block as `_core` takes them: depthwise taps (D, W), A instead of A_log."""
    check_parameters(op, weights, dt_B_C_norm_eps)
    A_log = weights["A_log"]
    return {
        **{key: weights.get(name) for name, key in NAMES.items()},
        "conv_weight": weights["conv1d.weight"][:, 0, :],
        "A": library_of(A_log).decay(A_log),
        "dt_B_C_norm_eps": dt_B_C_norm_eps or 0.0,
    }
