"""The backwards of norms, matrix products and embeddings."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from .. import _core
from .._arrays import dtype_name, reshaped
from .._outputs import library_of
from ..errors import InvalidArgumentError
from ._arguments import (
    Array,
    gradients_of,
    handed_over,
    require_array,
    require_rank,
    require_size,
    rows,
)


class RmsNormGradients(NamedTuple):
    """What `rms_norm_bwd` returns, each like its input or None."""

    dx: Array | None
    dweight: Array | None
    dresidual: Array | None
    dz: Array | None


def rms_norm_bwd(
    dout: Array,
    x: Array,
    weight: Array | None,
    *,
    dresidual_out: Array | None = None,
    residual: Array | None = None,
    z: Array | None = None,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    eps: float = 1e-5,
    needs: Collection[str] | None = None,
) -> RmsNormGradients:
    """The gradients of a scalar, given those with respect to what `rms_norm` returned.

    Args:
        dout: x's shape, any activation type.
        x, weight, residual, z, group_size, norm_before_gate, eps: as `rms_norm` had them. Instead
            of x and the residual, x may be the r that it returned, where dx, which is dr, is wanted
            alone.
        dresidual_out: the gradient with respect to that r, x's shape. Default zeros.
        needs: names of the inputs whose gradients are wanted; default: of all that are there.

    Returns:
        The gradients (dx, dweight, dresidual, dz), each shaped and typed like its input; None where
        it is not needed or its input is not there.
    """
    require_array(dout, "rms_norm_bwd: dout")
    require_array(x, "rms_norm_bwd: x")
    if group_size is not None:
        require_size(group_size, "rms_norm_bwd: group_size")
    for name, array in (
        ("dout", dout),
        ("dresidual_out", dresidual_out),
        ("residual", residual),
        ("z", z),
    ):
        if array is not None:
            require_array(array, f"rms_norm_bwd: {name}")
            _require_shape_of_x(array, f"rms_norm_bwd: {name}", x)
    library = library_of(dout)
    inputs = {"x": x, "weight": weight, "residual": residual, "z": z}
    gradients = gradients_of(library, "rms_norm_bwd", inputs, needs, contiguous=True)

    def as_rows(array: Array | None) -> Array | None:
        return None if array is None else rows(array)

    _core.rms_norm_bwd(
        on=library.on(),
        dout=rows(dout),
        x=rows(x),
        weight=weight,
        residual=as_rows(residual),
        z=as_rows(z),
        group_size=0 if group_size is None else group_size,
        norm_before_gate=norm_before_gate,
        eps=eps,
        dresidual_out=as_rows(dresidual_out),
        dx=as_rows(gradients["dx"]),
        dresidual=as_rows(gradients["dresidual"]),
        dz=as_rows(gradients["dz"]),
        dweight=gradients["dweight"],
    )
    return RmsNormGradients(**handed_over(library, gradients))


def _require_shape_of_x(array: Array, what: str, x: Array) -> None:
    if tuple(array.shape) != tuple(x.shape):
        raise InvalidArgumentError(
            f"{what} has shape {tuple(array.shape)}, expected x's {tuple(x.shape)}"
        )


class LinearGradients(NamedTuple):
    """What `linear_bwd` returns, each like its input or None."""

    dx: Array | None
    dweight: Array | None
    dbias: Array | None


def linear_bwd(
    dout: Array,
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    needs: Collection[str] | None = None,
    batch_invariant: bool = False,
) -> LinearGradients:
    """dx = dout weight, dweight = doutᵀ x and dbias = Σ dout, accumulated in float32.

    Args:
        dout: (..., out_features), any activation type.
        x, weight, bias: as `linear` had them; of a weight, any strides.
        needs: names of the inputs whose gradients are wanted; default: of all that are there.
        batch_invariant: on a GPU, make the bits of a row of dx independent of the other rows and
            their number; slower. On the CPU they always are.

    Returns:
        The gradients (dx, dweight, dbias), each shaped and typed like its input; None where it is
        not needed or its input is not there.
    """
    require_array(dout, "linear_bwd: dout")
    require_array(x, "linear_bwd: x")
    require_rank(weight, "linear_bwd: weight", 2, "(out_features, in_features)")
    expected = (*x.shape[:-1], weight.shape[0])
    if tuple(dout.shape) != expected:
        raise InvalidArgumentError(
            f"linear_bwd: dout has shape {tuple(dout.shape)}, expected {expected}"
        )
    library = library_of(dout)
    inputs = {"x": x, "weight": weight, "bias": bias}
    gradients = gradients_of(library, "linear_bwd", inputs, needs, contiguous=True)
    library.prepare_products()
    _core.linear_bwd(
        on=library.on(batch_invariant=batch_invariant),
        dout=rows(dout),
        x=rows(x),
        weight=weight,
        dx=None if gradients["dx"] is None else rows(gradients["dx"]),
        dweight=gradients["dweight"],
        dbias=gradients["dbias"],
    )
    return LinearGradients(**handed_over(library, gradients))


def embedding_bwd(
    dout: Array,
    token_ids: Array,
    vocab_size: int,
    *,
    dtype: str | None = None,
) -> Array:
    """The gradient of `embedding` with respect to its weight: for each id the sum of `dout` over
    the places that hold it, in their order, accumulated in float32.

    Args:
        dout: (..., d_model), any activation type.
        token_ids: (...), as `embedding` had them.
        vocab_size: rows of the weight.
        dtype: of the result, the name of an activation type; default dout's.

    Returns:
        (vocab_size, d_model).
    """
    require_array(dout, "embedding_bwd: dout")
    require_array(token_ids, "embedding_bwd: token_ids")
    require_size(vocab_size, "embedding_bwd: vocab_size")
    if tuple(dout.shape[:-1]) != tuple(token_ids.shape):
        raise InvalidArgumentError(
            f"embedding_bwd: dout has shape {tuple(dout.shape)}, expected token_ids' "
            f"{tuple(token_ids.shape)} and d_model"
        )
    library = library_of(dout)
    dweight = library.empty((vocab_size, dout.shape[-1]), dtype or dtype_name(dout))
    _core.embedding_bwd(
        on=library.on(), dout=rows(dout), token_ids=reshaped(token_ids, -1), dweight=dweight
    )
    return library.hand_over(dweight)
