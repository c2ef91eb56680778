"""The optimiser's step."""

from __future__ import annotations

from .. import _core
from .._arrays import reshaped
from .._outputs import library_of
from ._arguments import Array, require_array


def sum_of_squares(x: Array) -> Array:
    """Σ x² in float64, summed in a fixed order: of gradients, the square of the norm that clips.

    `x` is float32 of any shape, contiguous. Returns a float64 array of shape ().
    """
    require_array(x, "sum_of_squares: x")
    library = library_of(x)
    out = library.empty((1,), "float64")
    _core.sum_of_squares(on=library.on(), x=reshaped(x, 1) if x.shape == () else x, out=out)
    return reshaped(library.hand_over(out))


def adamw(
    parameter: Array,
    gradient: Array,
    exp_avg: Array,
    exp_avg_sq: Array,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    master: Array | None = None,
    sum_of_squares: Array | None = None,
    max_norm: float = 0.0,
) -> None:
    """One step of AdamW (Loshchilov and Hutter, arXiv 1711.05101) on one tensor, in place.

    In float32, with g the gradient after clipping:

        exp_avg    ← β1 exp_avg + (1 - β1) g
        exp_avg_sq ← β2 exp_avg_sq + (1 - β2) g²
        parameter  ← (1 - lr weight_decay) parameter
                     - lr exp_avg / (1 - β1^step) / (√(exp_avg_sq / (1 - β2^step)) + eps)

    Arrays are contiguous and of one shape; `parameter`, `master`, `exp_avg` and `exp_avg_sq` are
    updated.

    Args:
        parameter: float32, bfloat16 or float16.
        gradient: float32.
        exp_avg, exp_avg_sq: float32, zeros before the first step.
        step: the number of this step, from 1.
        lr, betas, eps, weight_decay: as in the formula.
        master: float32: what a parameter of 16 bits is rounded from. Given for these alone.
        sum_of_squares: () or (1,) float64: over all gradients that are clipped together. Where it
            is not finite, nothing is updated.
        max_norm: above 0, g = gradient · min(1, max_norm / (√sum_of_squares + 1e-6)).
    """
    require_array(parameter, "adamw: parameter")
    for name, array in (
        ("gradient", gradient),
        ("exp_avg", exp_avg),
        ("exp_avg_sq", exp_avg_sq),
        ("master", master),
        ("sum_of_squares", sum_of_squares),
    ):
        if array is not None:
            require_array(array, f"adamw: {name}")
    library = library_of(parameter)
    _core.adamw(
        on=library.on(),
        parameter=parameter,
        master=master,
        gradient=gradient,
        exp_avg=exp_avg,
        exp_avg_sq=exp_avg_sq,
        sum_of_squares=None if sum_of_squares is None else reshaped(sum_of_squares, 1),
        max_norm=max_norm,
        step=step,
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        eps=eps,
        weight_decay=weight_decay,
    )
