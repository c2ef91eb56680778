"""The backward of the causal convolution."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from .. import _core
from .._outputs import library_of
from ._arguments import Array, gradients_of, handed_over, require_array, require_rank


class CausalConv1dGradients(NamedTuple):
    """What `causal_conv1d_bwd` returns, each like its input or None."""

    dx: Array | None
    dweight: Array | None
    dbias: Array | None
    dinitial_state: Array | None


def causal_conv1d_bwd(
    dout: Array,
    x: Array,
    weight: Array,
    bias: Array | None = None,
    activation: str | None = None,
    *,
    dfinal_state: Array | None = None,
    initial_state: Array | None = None,
    cu_seqlens: Array | None = None,
    seq_idx: Array | None = None,
    needs: Collection[str] | None = None,
) -> CausalConv1dGradients:
    """The gradients of a scalar, given those with respect to what `causal_conv1d` returned.

    What is before the activation is computed again. Steps with a negative number in `seq_idx` take
    and give no gradient.

    Args:
        dout: (B, D, L), x's dtype.
        x, weight, bias, activation, initial_state, cu_seqlens, seq_idx: as `causal_conv1d` had
            them.
        dfinal_state: (B, D, S), x's dtype; packed: one for each sequence. Default zeros.
        needs: names of the inputs whose gradients are wanted; default: of all that are there.

    Returns:
        The gradients (dx, dweight, dbias, dinitial_state), each shaped and typed like its input;
        None where it is not needed or its input is not there.
    """
    require_array(dout, "causal_conv1d_bwd: dout")
    require_rank(x, "causal_conv1d_bwd: x", 3, "(batch, dim, seqlen)")
    library = library_of(dout)
    inputs = {"x": x, "weight": weight, "bias": bias, "initial_state": initial_state}
    gradients = gradients_of(library, "causal_conv1d_bwd", inputs, needs)
    _core.causal_conv1d_bwd(
        on=library.on(),
        dout=dout,
        **inputs,
        activation=activation,
        cu_seqlens=cu_seqlens,
        seq_idx=seq_idx,
        dfinal_state=dfinal_state,
        accumulate=(),
        **gradients,
    )
    return CausalConv1dGradients(**handed_over(library, gradients))
