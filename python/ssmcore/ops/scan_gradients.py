"""The backward of the selective scan."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from .. import _core
from .._outputs import library_of
from ._arguments import Array, gradients_of, handed_over, require_array, require_size


class SelectiveScanGradients(NamedTuple):
    """What `selective_scan_bwd` returns, each like its input or None."""

    du: Array | None
    ddelta: Array | None
    dA: Array | None
    dB: Array | None
    dC: Array | None
    dD: Array | None
    dz: Array | None
    ddelta_bias: Array | None
    dinitial_state: Array | None


def selective_scan_bwd(
    dout: Array,
    u: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    z: Array | None = None,
    delta_bias: Array | None = None,
    delta_softplus: bool = False,
    *,
    dlast_state: Array | None = None,
    initial_state: Array | None = None,
    cu_seqlens: Array | None = None,
    chunk_states: Array | None = None,
    chunk_size: int | None = None,
    needs: Collection[str] | None = None,
) -> SelectiveScanGradients:
    """The gradients of a scalar, given those with respect to what `selective_scan` returned.

    The states are computed again, in pieces, from `chunk_states` where they are given. Complex
    gradients are dx + i dy of x + iy, as PyTorch has them. A GPU takes dstate up to 256.

    Args:
        dout: (B, D, L), like u.
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens: as
            `selective_scan` had them.
        dlast_state: (B, D, N), A's dtype; packed: (S, D, N). Default zeros.
        chunk_states, chunk_size: what `selective_scan` returned for a chunk_size, and that. Without
            them the states take about one more forward's time. On a GPU 32 is the fastest size,
            and those of longer chunks are computed again; on a CPU 64 is.
        needs: names of the inputs whose gradients are wanted; default: of all that are there.

    Returns:
        The gradients (du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state), each shaped and
        typed like its input; None where it is not needed or its input is not there.
    """
    require_array(dout, "selective_scan_bwd: dout")
    if chunk_size is not None:
        require_size(chunk_size, "selective_scan_bwd: chunk_size")
    library = library_of(dout)
    inputs = {
        "u": u,
        "delta": delta,
        "A": A,
        "B": B,
        "C": C,
        "D": D,
        "z": z,
        "delta_bias": delta_bias,
        "initial_state": initial_state,
    }
    gradients = gradients_of(library, "selective_scan_bwd", inputs, needs)
    _core.selective_scan_bwd(
        on=library.on(),
        dout=dout,
        **inputs,
        delta_softplus=delta_softplus,
        dlast_state=dlast_state,
        cu_seqlens=cu_seqlens,
        chunk_states=chunk_states,
        chunk_size=chunk_size or 0,
        accumulate=(),
        **gradients,
    )
    return SelectiveScanGradients(**handed_over(library, gradients))
