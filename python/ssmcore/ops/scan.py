"""The selective scan, over sequences and step by step."""

from __future__ import annotations

from typing import Any

from .. import _core
from .._arrays import dtype_name, require_mutable
from .._outputs import library_of
from ._arguments import Array, count_chunks, empty_like, require_array, require_rank, require_size


def selective_scan(
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
    initial_state: Array | None = None,
    cu_seqlens: Array | None = None,
    return_last_state: bool = True,
    chunk_size: int | None = None,
    return_delta_sum: bool = False,
    check: bool = False,
    batch_invariant: bool = False,
) -> Any:
    """The selective scan (Gu & Dao, arXiv 2312.00752, algorithm 2).

    With Δ = softplus?(delta + delta_bias): h(t) = exp(Δ A) h(t-1) + Δ B(t) u(t),
    y(t) = C(t) h(t) + D u(t), out = y SiLU(z). Complex A: y(t) = 2 Re(C(t) h(t)) + D u(t).

    All arrays may also be float64, for checking.

    Args:
        u, delta: (B, D, L).
        A: (D, N), float32 or complex64.
        B, C: (D, N) of A's dtype, constant in time; (B, N, L); or (B, G, N, L), G dividing D. With
            complex A the last axis is 2 L, real and imaginary parts side by side.
        D: (D,), float32.
        z: (B, D, L).
        delta_bias: (D,), float32.
        delta_softplus: apply softplus to delta + delta_bias.
        initial_state: (B, D, N), A's dtype; default zeros.
        cu_seqlens: (S + 1,), int32: packed sequences.
        return_last_state: also return the state after the last step, (B, D, N), A's dtype.
        chunk_size: K: also return the state after every K steps and after the last,
            (B, ⌈L / K⌉, D, N); packed: (1, Σ ⌈length / K⌉, D, N), in order, for which a GPU's
            `cu_seqlens` are waited for and read.
        return_delta_sum: also return the sum of Δ over each sequence, (B, D).

    Returns:
        out, (B, D, L) like u, alone or in a tuple with what else is returned, in this order.
    """
    require_rank(u, "selective_scan: u", 3, "(batch, dim, seqlen)")
    require_rank(A, "selective_scan: A", 2, "(dim, dstate)")
    library = library_of(u)
    (batch, dim, seqlen), dstate = u.shape, A.shape[1]
    rows = batch
    if cu_seqlens is not None:
        require_rank(cu_seqlens, "selective_scan: cu_seqlens", 1, "(sequences + 1,)")
        rows = max(cu_seqlens.shape[0] - 1, 0)
    out = empty_like(library, u)
    last_state = chunk_states = delta_sum = None
    if return_last_state:
        last_state = library.empty((rows, dim, dstate), dtype_name(A))
    if chunk_size is not None:
        require_size(chunk_size, "selective_scan: chunk_size")
        chunks = count_chunks(seqlen, cu_seqlens, chunk_size)
        chunk_states = library.empty((batch, chunks, dim, dstate), dtype_name(A))
    if return_delta_sum:
        parameter = "float64" if dtype_name(u) == "float64" else "float32"
        delta_sum = library.empty((rows, dim), parameter)
    _core.selective_scan(
        on=library.on(check=check, batch_invariant=batch_invariant),
        u=u,
        delta=delta,
        A=A,
        B=B,
        C=C,
        D=D,
        z=z,
        delta_bias=delta_bias,
        delta_softplus=delta_softplus,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        last_state=last_state,
        chunk_states=chunk_states,
        chunk_size=chunk_size or 0,
        delta_sum=delta_sum,
        out=out,
    )
    results = [
        library.hand_over(result)
        for result in (out, last_state, chunk_states, delta_sum)
        if result is not None
    ]
    return tuple(results) if len(results) > 1 else results[0]


def selective_state_update(
    state: Array,
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    z: Array | None = None,
    dt_bias: Array | None = None,
    dt_softplus: bool = False,
    *,
    state_indices: Array | None = None,
    check: bool = False,
) -> Array:
    """One step of the selective scan, updating `state` in place.

    D may be two axes, H heads of P channels, in every array (Mamba-2, whose dt, A and dt_bias are
    usually broadcast: strides of 0); G then divides H.

    Args:
        state: (B, D, N), A's dtype, written; (slots, D, N) with `state_indices`.
        x, dt: (B, D).
        A: (D, N), float32 or complex64.
        B, C: (B, N) or (B, G, N), G dividing D; with complex A (..., N, 2).
        D: (D,), float32.
        z: (B, D).
        dt_bias: (D,), float32.
        dt_softplus: apply softplus to dt + dt_bias.
        state_indices: (B,), int32: the slot of each row; a negative one starts from zeros and
            leaves no state. Slots must differ.

    Returns:
        (B, D), like x.
    """
    require_array(x, "selective_state_update: x")
    require_mutable(
        state,
        "selective_state_update: state",
        "selective_scan over one step takes it as initial_state and returns last_state",
    )
    library = library_of(x)
    out = library.empty(x.shape, dtype_name(x))
    _core.selective_state_update(
        on=library.on(check=check),
        state=state,
        x=x,
        dt=dt,
        A=A,
        B=B,
        C=C,
        D=D,
        z=z,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        state_indices=state_indices,
        out=out,
    )
    return library.hand_over(out)
