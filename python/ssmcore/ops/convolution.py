"""The causal convolution, over sequences and token by token."""

from __future__ import annotations

from typing import Any

from .. import _core
from .._arrays import dtype_name, require_mutable
from .._outputs import library_of
from ._arguments import Array, empty_like, require_array, require_rank


def causal_conv1d(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    activation: str | None = None,
    *,
    initial_state: Array | None = None,
    cu_seqlens: Array | None = None,
    seq_idx: Array | None = None,
    return_final_state: bool = False,
    check: bool = False,
) -> Any:
    """The causal depthwise convolution: out(t) = act(bias + Σ_w weight[w] x(t - W + 1 + w)).

    Args:
        x: (B, D, L).
        weight: (D, W), W from 2 to 8, x's dtype or float32.
        bias: (D,), x's dtype or float32.
        activation: None, "silu" or "swish" (the same).
        initial_state: (B, D, S), S ≥ W - 1 (by default W - 1 zeros), x's dtype, oldest first: the
            inputs before x.
        cu_seqlens: (S + 1,), int32: packed sequences.
        seq_idx: (B, L), int32: a number for every step, which sees those before it of the same
            number; a negative one gives 0. Excludes states and `cu_seqlens`.
        return_final_state: also return the last inputs, as `initial_state` takes them.

    Returns:
        out, (B, D, L) like x; or (out, final_state).
    """
    require_rank(x, "causal_conv1d: x", 3, "(batch, dim, seqlen)")
    require_rank(weight, "causal_conv1d: weight", 2, "(dim, width)")
    library = library_of(x)
    out = empty_like(library, x)
    final_state = None
    if return_final_state:
        state_len = weight.shape[1] - 1 if initial_state is None else initial_state.shape[-1]
        rows = x.shape[0]
        if cu_seqlens is not None:
            require_rank(cu_seqlens, "causal_conv1d: cu_seqlens", 1, "(sequences + 1,)")
            rows = max(cu_seqlens.shape[0] - 1, 0)
        final_state = library.empty((rows, x.shape[1], state_len), dtype_name(x))
    _core.causal_conv1d(
        on=library.on(check=check),
        x=x,
        weight=weight,
        bias=bias,
        activation=activation,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        seq_idx=seq_idx,
        final_state=final_state,
        out=out,
    )
    out = library.hand_over(out)
    return (out, library.hand_over(final_state)) if return_final_state else out


def causal_conv1d_update(
    x: Array,
    conv_state: Array,
    weight: Array,
    bias: Array | None = None,
    activation: str | None = None,
    *,
    cache_seqlens: Array | None = None,
    state_indices: Array | None = None,
    check: bool = False,
) -> Array:
    """The convolution for the next tokens of running sequences, updating `conv_state` in place.

    Args:
        x: (B, D) for one token, (B, D, T) for T.
        conv_state: (B, D, S), S ≥ W - 1, x's dtype, oldest first: shifted by the new tokens;
            (slots, D, S) with `state_indices`.
        weight: (D, W), x's dtype or float32.
        bias: (D,), x's dtype or float32.
        activation: None, "silu" or "swish".
        cache_seqlens: (B,), int32: tokens each row has seen. The state is then circular, input
            number i at i modulo S, instead of shifted.
        state_indices: (B,), int32, as in `selective_state_update`.

    Returns:
        x's shape and dtype.
    """
    require_array(x, "causal_conv1d_update: x")
    require_mutable(
        conv_state,
        "causal_conv1d_update: conv_state",
        "causal_conv1d takes it as initial_state and returns the final state",
    )
    library = library_of(x)
    out = empty_like(library, x)
    _core.causal_conv1d_update(
        on=library.on(check=check),
        x=x,
        conv_state=conv_state,
        weight=weight,
        bias=bias,
        activation=activation,
        cache_seqlens=cache_seqlens,
        state_indices=state_indices,
        out=out,
    )
    return library.hand_over(out)
