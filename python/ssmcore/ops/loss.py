"""The loss of language models, and its backward."""

from __future__ import annotations

from typing import Any

from .. import _core
from .._arrays import dtype_name, reshaped
from .._outputs import library_of
from ..errors import InvalidArgumentError
from ._arguments import Array, require_array, rows

_REDUCTIONS = ("mean", "none")


def cross_entropy(
    logits: Array,
    targets: Array,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    return_lse: bool = False,
) -> Any:
    """The cross entropy, lse - logits[target] with lse = log Σ exp(logits), in float32.

    On the CPU all arrays may also be float64, for checking.

    Args:
        logits: (..., V), any activation type.
        targets: (...), int32 or int64, in [0, V) or `ignore_index`.
        ignore_index: the target of rows that do not count.
        reduction: "mean", over the rows that count (NaN where none does), or "none".
        return_lse: also return lse, which `cross_entropy_bwd` takes.

    Returns:
        loss, float32, of shape () or that of `targets`, 0 in rows that do not count; or
        (loss, lse), lse shaped like `targets`.
    """
    _check("cross_entropy", logits, targets, reduction)
    library = library_of(logits)
    dtype = _loss_dtype(logits)
    mean = reduction == "mean"
    loss = library.empty((1,) if mean else targets.shape, dtype)
    lse = library.empty(targets.shape, dtype) if return_lse else None
    _core.cross_entropy(
        on=library.on(),
        logits=rows(logits),
        targets=reshaped(targets, -1),
        ignore_index=ignore_index,
        loss=None if mean else reshaped(loss, -1),
        mean_loss=loss if mean else None,
        lse=None if lse is None else reshaped(lse, -1),
    )
    loss = library.hand_over(loss)
    if mean:
        loss = reshaped(loss)
    return loss if lse is None else (loss, library.hand_over(lse))


def cross_entropy_bwd(
    dloss: Array,
    logits: Array,
    targets: Array,
    lse: Array,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    dlogits: Array | None = None,
) -> Array:
    """The gradient with respect to logits, dloss (softmax(logits) - onehot(target)); 0 in rows that
    do not count.

    Args:
        dloss: the gradient with respect to the loss, float32, of its shape.
        logits, targets, ignore_index, reduction: as `cross_entropy` had them.
        lse: what it returned.
        dlogits: where to write the result: logits' shape, any activation type; may be `logits`.

    Returns:
        dlogits, like logits.
    """
    _check("cross_entropy_bwd", logits, targets, reduction)
    for name, array in (("dloss", dloss), ("lse", lse)):
        require_array(array, f"cross_entropy_bwd: {name}")
        of_rows = name == "lse" or reduction == "none"
        if of_rows and tuple(array.shape) != tuple(targets.shape):
            raise InvalidArgumentError(
                f"cross_entropy_bwd: {name} has shape {tuple(array.shape)}, expected targets' "
                f"{tuple(targets.shape)}"
            )
    library = library_of(logits)
    out = library.empty(logits.shape, dtype_name(logits)) if dlogits is None else dlogits
    if tuple(out.shape) != tuple(logits.shape):
        raise InvalidArgumentError(
            f"cross_entropy_bwd: dlogits has shape {tuple(out.shape)}, expected logits' "
            f"{tuple(logits.shape)}"
        )
    if dlogits is not None and not _rows_are_evenly_spaced(dlogits):
        raise InvalidArgumentError(
            "cross_entropy_bwd: dlogits is written, but its rows are not evenly spaced in memory"
        )
    mean = reduction == "mean"
    _core.cross_entropy_bwd(
        on=library.on(),
        logits=rows(logits),
        targets=reshaped(targets, -1),
        ignore_index=ignore_index,
        lse=reshaped(lse, -1),
        dloss=None if mean else reshaped(dloss, -1),
        dmean_loss=reshaped(dloss, -1) if mean else None,
        dlogits=rows(out),
    )
    return library.hand_over(out) if dlogits is None else dlogits


def _rows_are_evenly_spaced(array: Array) -> bool:
    """Whether viewing it as rows of its last axis takes no copy."""
    strides = array.stride() if hasattr(array, "stride") else array.strides
    shape = array.shape
    return strides is None or all(
        shape[i] == 1 or strides[i] == strides[i + 1] * shape[i + 1] for i in range(len(shape) - 2)
    )


def _loss_dtype(logits: Array) -> str:
    return "float64" if dtype_name(logits) == "float64" else "float32"


def _check(operator: str, logits: Array, targets: Array, reduction: str) -> None:
    require_array(logits, f"{operator}: logits")
    require_array(targets, f"{operator}: targets")
    if reduction not in _REDUCTIONS:
        raise InvalidArgumentError(
            f"{operator}: reduction is {reduction!r}, expected 'mean' or 'none'"
        )
    if tuple(targets.shape) != tuple(logits.shape[:-1]):
        raise InvalidArgumentError(
            f"{operator}: targets has shape {tuple(targets.shape)}, expected logits' without the "
            f"last axis, {tuple(logits.shape[:-1])}"
        )
