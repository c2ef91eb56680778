"""Norms, matrix products and embeddings."""

from __future__ import annotations

from typing import Any

from .. import _core
from .._arrays import dtype_name, reshaped
from .._outputs import library_of
from ..errors import InvalidArgumentError
from ._arguments import Array, require_array, require_rank, require_size, rows


def rms_norm(
    x: Array,
    weight: Array | None,
    *,
    residual: Array | None = None,
    z: Array | None = None,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    eps: float = 1e-5,
) -> Any:
    """norm(r) = weight · r / sqrt(mean(r²) + eps) over the last axis, r = x + residual.

    With a gate (Mamba-2): norm(r SiLU(z)), or norm(r) SiLU(z) if `norm_before_gate`.

    Args:
        x: (..., D).
        weight: (D,), any activation type; None: ones.
        residual: x's shape, any activation type.
        z: x's shape, any activation type.
        group_size: divides D: the mean is over each group of so many elements; default D.
        norm_before_gate: gate after the norm.
        eps: added to the mean square.

    Returns:
        out, like x; with a residual (out, r), r in the residual's dtype.
    """
    require_array(x, "rms_norm: x")
    if group_size is not None:
        require_size(group_size, "rms_norm: group_size")
    library = library_of(x)
    out = library.empty(x.shape, dtype_name(x))
    for name, array in (("residual", residual), ("z", z)):
        if array is None:
            continue
        require_array(array, f"rms_norm: {name}")
        if tuple(array.shape) != tuple(x.shape):
            raise InvalidArgumentError(
                f"rms_norm: {name} has shape {tuple(array.shape)}, expected x's {tuple(x.shape)}"
            )
    residual_out = None
    if residual is not None:
        residual_out = library.empty(x.shape, dtype_name(residual))
    _core.rms_norm(
        on=library.on(),
        x=rows(x),
        weight=weight,
        residual=None if residual is None else rows(residual),
        residual_out=None if residual_out is None else rows(residual_out),
        z=None if z is None else rows(z),
        out=rows(out),
        group_size=0 if group_size is None else group_size,
        norm_before_gate=norm_before_gate,
        eps=eps,
    )
    out = library.hand_over(out)
    return out if residual is None else (out, library.hand_over(residual_out))


def linear(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    batch_invariant: bool = False,
) -> Array:
    """x weightᵀ + bias, accumulated in float32.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features), any activation type, rows contiguous.
        bias: (out_features,), any activation type.

    Returns:
        (..., out_features), x's dtype.
    """
    require_array(x, "linear: x")
    require_rank(weight, "linear: weight", 2, "(out_features, in_features)")
    library = library_of(x)
    out = library.empty((*x.shape[:-1], weight.shape[0]), dtype_name(x))
    library.prepare_products()
    _core.linear(
        on=library.on(batch_invariant=batch_invariant),
        x=rows(x),
        weight=weight,
        bias=bias,
        out=rows(out),
    )
    return library.hand_over(out)


def embedding(
    token_ids: Array,
    weight: Array,
    *,
    check: bool = False,
) -> Array:
    """Rows of `weight` by token id.

    Args:
        token_ids: (...), int32 or int64, each in [0, vocab_size).
        weight: (vocab_size, d_model), rows contiguous.

    Returns:
        (..., d_model), the weight's dtype and library.
    """
    require_array(token_ids, "embedding: token_ids")
    require_rank(weight, "embedding: weight", 2, "(vocab_size, d_model)")
    library = library_of(weight)
    out = library.empty((*token_ids.shape, weight.shape[1]), dtype_name(weight))
    _core.embedding(
        on=library.on(check=check), token_ids=reshaped(token_ids, -1), weight=weight, out=rows(out)
    )
    return library.hand_over(out)
