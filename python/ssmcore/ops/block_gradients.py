"""The Mamba block in training: a forward that keeps what its backward needs, and that backward."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from .. import _core
from .._arrays import dtype_name, reshaped
from .._outputs import library_of
from ..errors import InvalidArgumentError
from ._arguments import Array, count_chunks, gradients_of, handed_over, require_array, require_rank
from .block import NAMES, block_parameters


@dataclass(eq=False)
class MambaBlockSaved:
    """What `mamba_block_train_fwd` keeps for `mamba_block_bwd`, which uses it up.

    All but `chunk_states` are of x's dtype. The last two are computed again where they are None.
    """

    xz: Array
    """(B, L, 2D): the result of in_proj."""
    delta_B_C: Array
    """(B, L, R + 2N): the result of x_proj, not normalised."""
    y: Array
    """(B, L, D): the result of the scan, gated."""
    chunk_states: Array
    """(B, chunks, D, N), float32: that of `selective_scan`."""
    u: Array | None = None
    """(B, L, D): the result of the convolution."""
    delta: Array | None = None
    """(B, L, D): the result of dt_proj."""

    def arrays(self) -> dict[str, Any]:
        """The arrays by name; all None once they have been used."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def require_unused(self, op: str) -> None:
        if self.xz is None:
            raise InvalidArgumentError(
                f"{op}: saved has been used by a backward pass before; run the forward pass again"
            )

    def clear(self) -> None:
        for field in fields(self):
            setattr(self, field.name, None)


class MambaBlockGradients(NamedTuple):
    """What `mamba_block_bwd` returns, each like its input or None."""

    dx: Array | None
    dweights: dict[str, Array]
    dinitial_conv_state: Array | None
    dinitial_ssm_state: Array | None


def mamba_block_train_fwd(
    x: Array,
    weights: dict[str, Array],
    *,
    initial_conv_state: Array | None = None,
    initial_ssm_state: Array | None = None,
    cu_seqlens: Array | None = None,
    dt_B_C_norm_eps: float | None = None,
    return_states: bool = False,
    keep: Collection[str] = (),
) -> Any:
    """`mamba_block` over a sequence, leaving its arguments as they are, for training.

    Args:
        x, weights, cu_seqlens, dt_B_C_norm_eps: as in `mamba_block`.
        initial_conv_state: (B, D, W - 1), x's dtype; packed (S, D, W - 1). Default zeros.
        initial_ssm_state: (B, D, N), float32; packed (S, D, N). Default zeros.
        return_states: also return the states after the last step, of these shapes.
        keep: of "u" and "delta", what to keep as well, which takes D more numbers a step each.
            Otherwise `mamba_block_bwd` computes them again: u by a convolution, delta by a product
            with dt_proj.

    Returns:
        (out, saved), or (out, saved, final_conv_state, last_ssm_state): out is (B, L, d_model),
        like x, and saved a `MambaBlockSaved`.
    """
    op = "mamba_block_train_fwd"
    if other := set(keep) - {"u", "delta"}:
        raise InvalidArgumentError(f"{op}: keep has {min(other)!r}; expected 'u' and 'delta' only")
    require_rank(x, f"{op}: x", 3, "(batch, seqlen, d_model)")
    parameters = block_parameters(op, weights, dt_B_C_norm_eps)
    for name in ("A_log", "dt_proj.weight"):
        require_rank(weights[name], f"{op}: {name}", 2, "(dim, …)")
    library, dtype = library_of(x), dtype_name(x)
    batch, seqlen = x.shape[:2]
    (dim, dstate), dt_rank = weights["A_log"].shape, weights["dt_proj.weight"].shape[1]
    width = weights["conv1d.weight"].shape[2]
    parameter = "float64" if dtype == "float64" else "float32"
    rows = batch
    if cu_seqlens is not None:
        require_rank(cu_seqlens, f"{op}: cu_seqlens", 1, "(sequences + 1,)")
        rows = max(cu_seqlens.shape[0] - 1, 0)
    chunks = count_chunks(seqlen, cu_seqlens, _core.MAMBA_BLOCK_CHUNK_SIZE)

    def activation(size: int) -> Array:
        return library.empty((batch, seqlen, size), dtype)

    saved = MambaBlockSaved(
        xz=activation(2 * dim),
        delta_B_C=activation(dt_rank + 2 * dstate),
        y=activation(dim),
        chunk_states=library.empty((batch, chunks, dim, dstate), parameter),
        u=activation(dim) if "u" in keep else None,
        delta=activation(dim) if "delta" in keep else None,
    )
    out = library.empty(x.shape, dtype)
    library.prepare_products()
    states: dict[str, Array] = {}
    if return_states:
        states["final_conv_state"] = library.empty((rows, dim, width - 1), dtype)
        states["last_ssm_state"] = library.empty((rows, dim, dstate), parameter)
    _core.mamba_block_train_fwd(
        on=library.on(),
        x=x,
        **parameters,
        initial_conv_state=initial_conv_state,
        initial_ssm_state=initial_ssm_state,
        cu_seqlens=cu_seqlens,
        **saved.arrays(),
        **states,
        out=out,
    )
    for name, array in saved.arrays().items():
        if array is not None:
            setattr(saved, name, library.hand_over(array))
    return (library.hand_over(out), saved, *map(library.hand_over, states.values()))


def mamba_block_bwd(
    dout: Array,
    x: Array,
    weights: dict[str, Array],
    saved: MambaBlockSaved,
    *,
    dfinal_conv_state: Array | None = None,
    dlast_ssm_state: Array | None = None,
    initial_conv_state: Array | None = None,
    initial_ssm_state: Array | None = None,
    cu_seqlens: Array | None = None,
    dt_B_C_norm_eps: float | None = None,
    needs: Collection[str] | None = None,
) -> MambaBlockGradients:
    """The gradients of a scalar, given those with respect to what `mamba_block_train_fwd` returned.

    Args:
        dout: (B, L, d_model), like x, contiguous.
        x, weights, initial_conv_state, initial_ssm_state, cu_seqlens, dt_B_C_norm_eps: as
            `mamba_block_train_fwd` had them.
        saved: what it returned; used up, its memory is let go.
        dfinal_conv_state, dlast_ssm_state: like the states; default zeros.
        needs: names of the inputs whose gradients are wanted: "x", "initial_conv_state",
            "initial_ssm_state" and those of weights; default: of all that are there.

    Returns:
        The gradients (dx, dweights, dinitial_conv_state, dinitial_ssm_state), each shaped and typed
        like its input; None, or not in dweights, where it is not needed or its input is not there.
    """
    op = "mamba_block_bwd"
    require_array(dout, f"{op}: dout")
    require_array(x, f"{op}: x")
    parameters = block_parameters(op, weights, dt_B_C_norm_eps)
    if not isinstance(saved, MambaBlockSaved):
        raise InvalidArgumentError(
            f"{op}: saved is a {type(saved).__name__}, expected what mamba_block_train_fwd returned"
        )
    saved.require_unused(op)
    library = library_of(dout)
    inputs: dict[str, Any] = {
        "x": x,
        "initial_conv_state": initial_conv_state,
        "initial_ssm_state": initial_ssm_state,
        **{name: weights.get(name) for name in NAMES},
        "conv1d.weight": parameters["conv_weight"],
    }
    gradients = gradients_of(library, op, inputs, needs)
    written: dict[str, Any] = {f"d{key}": gradients[f"d{name}"] for name, key in NAMES.items()}
    written["dA_log"] = written.pop("dA")
    library.prepare_products()
    _core.mamba_block_bwd(
        on=library.on(),
        dout=dout,
        x=x,
        **parameters,
        initial_conv_state=initial_conv_state,
        initial_ssm_state=initial_ssm_state,
        cu_seqlens=cu_seqlens,
        **saved.arrays(),
        dfinal_conv_state=dfinal_conv_state,
        dlast_ssm_state=dlast_ssm_state,
        dx=gradients["dx"],
        dinitial_conv_state=gradients["dinitial_conv_state"],
        dinitial_ssm_state=gradients["dinitial_ssm_state"],
        **written,
    )
    saved.clear()
    given = handed_over(library, gradients)
    dweights = {name: given[f"d{name}"] for name in NAMES if given[f"d{name}"] is not None}
    if "conv1d.weight" in dweights:
        dweights["conv1d.weight"] = reshaped(
            dweights["conv1d.weight"], *weights["conv1d.weight"].shape
        )
    return MambaBlockGradients(
        given["dx"], dweights, given["dinitial_conv_state"], given["dinitial_ssm_state"]
    )
