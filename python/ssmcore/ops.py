"""The operators of selective state space models, on NumPy, torch, CuPy, JAX and other arrays.

Outputs are arrays of the library that the first argument belongs to; inputs are never copied, may
be read-only and may have any non-negative strides. What is updated in place must be writable, which
JAX arrays never are. Shapes use the field's names: B batch, L sequence length, D channels, N state
size, G groups, W convolution width. Activations are float32, bfloat16 (NumPy: ml_dtypes) or
float16, one type in a call; A, D, biases of delta, and the scan's states are float32.

Packed sequences lie one after another in a batch of 1, sequence s in the steps
[cu_seqlens[s], cu_seqlens[s + 1]) of (S + 1,) int32 `cu_seqlens`; states are then (S, ...).

On a GPU a call runs on the current stream of the first argument's library, and returns before it is
done where all arrays belong to that library. Indices (`cu_seqlens`, `state_indices`, token ids, …)
cannot be looked at before it runs: bad ones are never followed, and reported by the next call on
the device, by `ssmcore.synchronize`, or at once with `check=True`, which waits for the call. With
`batch_invariant=True` the bits of a row's result do not depend on its batch, for some speed; on the
CPU they never do.

Every function raises `ssmcore.InvalidArgumentError`, naming the argument, what was expected and
what came, for a shape, dtype, device or value that does not fit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import _core
from ._arrays import dtype_name, gpu_of, is_token_major, require_mutable, reshaped
from ._outputs import Library, library_of
from .errors import InvalidArgumentError

Array = Any

__all__ = [
    "causal_conv1d",
    "causal_conv1d_update",
    "embedding",
    "linear",
    "mamba_block",
    "rms_norm",
    "sample",
    "selective_scan",
    "selective_state_update",
]


def _require_array(array: Any, what: str) -> None:
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        raise InvalidArgumentError(f"{what} is a {type(array).__name__}, expected an array")


def _require_rank(array: Any, what: str, rank: int, dims: str) -> None:
    _require_array(array, what)
    if len(array.shape) != rank:
        raise InvalidArgumentError(f"{what} has shape {tuple(array.shape)}, expected {dims}")


def _require_size(value: Any, what: str) -> None:
    if not isinstance(value, (int, np.integer)) or value < 1:
        raise InvalidArgumentError(f"{what} is {value!r}, expected a whole number of at least 1")


def _empty_like(library: Library, array: Array) -> Array:
    """Memory for an output like a (B, D, L) array: token-major where that is, which is faster."""
    if len(array.shape) == 3 and is_token_major(array):
        batch, dim, seqlen = array.shape
        return library.empty((batch, seqlen, dim), dtype_name(array)).swapaxes(1, 2)
    return library.empty(array.shape, dtype_name(array))


def _rows(array: Array) -> Array:
    """(..., n) as (rows, n)."""
    return array if len(array.shape) == 2 else reshaped(array, -1, array.shape[-1])


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
    _require_rank(u, "selective_scan: u", 3, "(batch, dim, seqlen)")
    _require_rank(A, "selective_scan: A", 2, "(dim, dstate)")
    library = library_of(u)
    (batch, dim, seqlen), dstate = u.shape, A.shape[1]
    rows = batch
    if cu_seqlens is not None:
        _require_rank(cu_seqlens, "selective_scan: cu_seqlens", 1, "(sequences + 1,)")
        rows = max(cu_seqlens.shape[0] - 1, 0)
    out = _empty_like(library, u)
    last_state = chunk_states = delta_sum = None
    if return_last_state:
        last_state = library.empty((rows, dim, dstate), dtype_name(A))
    if chunk_size is not None:
        _require_size(chunk_size, "selective_scan: chunk_size")
        chunks = -(-seqlen // chunk_size)
        if cu_seqlens is not None:
            # Entries that are no boundaries are refused below.
            lengths = np.clip(np.diff(library_of(cu_seqlens).to_host(cu_seqlens)), 0, seqlen)
            chunks = int((-(-lengths // chunk_size)).sum())
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
    _require_array(x, "selective_state_update: x")
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
    _require_rank(x, "causal_conv1d: x", 3, "(batch, dim, seqlen)")
    _require_rank(weight, "causal_conv1d: weight", 2, "(dim, width)")
    library = library_of(x)
    out = _empty_like(library, x)
    final_state = None
    if return_final_state:
        state_len = weight.shape[1] - 1 if initial_state is None else initial_state.shape[-1]
        rows = x.shape[0]
        if cu_seqlens is not None:
            _require_rank(cu_seqlens, "causal_conv1d: cu_seqlens", 1, "(sequences + 1,)")
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
    _require_array(x, "causal_conv1d_update: x")
    require_mutable(
        conv_state,
        "causal_conv1d_update: conv_state",
        "causal_conv1d takes it as initial_state and returns the final state",
    )
    library = library_of(x)
    out = _empty_like(library, x)
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
    _require_array(x, "rms_norm: x")
    if group_size is not None:
        _require_size(group_size, "rms_norm: group_size")
    library = library_of(x)
    out = library.empty(x.shape, dtype_name(x))
    for name, array in (("residual", residual), ("z", z)):
        if array is None:
            continue
        _require_array(array, f"rms_norm: {name}")
        if tuple(array.shape) != tuple(x.shape):
            raise InvalidArgumentError(
                f"rms_norm: {name} has shape {tuple(array.shape)}, expected x's {tuple(x.shape)}"
            )
    residual_out = None
    if residual is not None:
        residual_out = library.empty(x.shape, dtype_name(residual))
    _core.rms_norm(
        on=library.on(),
        x=_rows(x),
        weight=weight,
        residual=None if residual is None else _rows(residual),
        residual_out=None if residual_out is None else _rows(residual_out),
        z=None if z is None else _rows(z),
        out=_rows(out),
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
    _require_array(x, "linear: x")
    _require_rank(weight, "linear: weight", 2, "(out_features, in_features)")
    library = library_of(x)
    out = library.empty((*x.shape[:-1], weight.shape[0]), dtype_name(x))
    library.prepare_products()
    _core.linear(
        on=library.on(batch_invariant=batch_invariant),
        x=_rows(x),
        weight=weight,
        bias=bias,
        out=_rows(out),
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
    _require_array(token_ids, "embedding: token_ids")
    _require_rank(weight, "embedding: weight", 2, "(vocab_size, d_model)")
    library = library_of(weight)
    out = library.empty((*token_ids.shape, weight.shape[1]), dtype_name(weight))
    _core.embedding(
        on=library.on(check=check), token_ids=reshaped(token_ids, -1), weight=weight, out=_rows(out)
    )
    return library.hand_over(out)


# The range of each setting of `sample`, and how to say it.
_SETTINGS: dict[str, tuple[Callable[[np.ndarray], Any], str]] = {
    "repetition_penalty": (lambda v: (v > 0) & np.isfinite(v), "a positive number"),
    "temperature": (lambda v: (v >= 0) & np.isfinite(v), "a finite number of at least 0"),
    "top_k": (lambda v: v >= 0, "at least 0 (0: off)"),
    "top_p": (lambda v: (v > 0) & (v <= 1), "more than 0 and at most 1"),
    "min_p": (lambda v: (v >= 0) & (v <= 1), "0 to 1"),
}


def sample(
    logits: Array,
    *,
    temperature: Any = 1.0,
    top_k: Any = 0,
    top_p: Any = 1.0,
    min_p: Any = 0.0,
    repetition_penalty: Any = 1.0,
    history: Array | None = None,
    seed: Any = None,
    position: Any = 0,
    check: bool = False,
) -> Array:
    """Draws a token a row: repetition penalty, temperature, top-k, top-p, min-p, in this order.

    A row's draw depends on its logits and settings, its seed and its position alone (Philox4x32-10,
    key = seed, counter = position). Settings are numbers or (B,) arrays.

    Args:
        logits: (B, V), float32, each row with a finite largest value and no NaN.
        temperature: ≥ 0; 0 takes the largest logit, the lowest id among equals.
        top_k: keep the k largest; 0 keeps all.
        top_p: keep the smallest set of largest probabilities that sums to at least this; in (0, 1].
        min_p: keep probabilities of at least this times the largest; in [0, 1].
        repetition_penalty: > 0: logits of ids in `history` are divided by it where positive and
            multiplied by it where negative.
        history: (B, H) ids; negative ones are padding.
        seed: number s, row b then uses s + b; (B,) array; or None, row b uses b.
        position: the draw's number in its sequence.

    Returns:
        (B,), int64 (in JAX its default integer, int32 unless x64 is enabled).
    """
    _require_rank(logits, "sample: logits", 2, "(batch, vocab_size)")
    batch = logits.shape[0]
    library = library_of(logits)
    out = library.empty((batch,), "int64")

    def setting(name: str, value: Any, dtype: str) -> Any:
        if gpu_of(value) is not None:
            return value
        try:
            given = np.asarray(value)
            if dtype == "int32":
                given = np.minimum(given, np.iinfo(np.int32).max)
            converted = given.astype(dtype, casting="same_kind")
            if given.dtype.kind in "iu" and not np.array_equal(converted, given):
                raise ValueError(f"beyond {dtype}")
            if name == "seed" and given.ndim == 0:
                converted = converted + np.arange(batch)
            rows = np.broadcast_to(converted, (batch,))
        except (TypeError, ValueError) as error:
            raise InvalidArgumentError(
                f"sample: {name} is {value!r}, expected a number or {batch} of them"
            ) from error
        valid, expected = _SETTINGS.get(name, (None, ""))
        if valid is not None and not valid(rows).all():
            raise InvalidArgumentError(f"sample: {name} is {value!r}, expected {expected}")
        return library.from_host(rows)

    _core.sample(
        on=library.on(check=check),
        logits=logits,
        history=history,
        repetition_penalty=setting("repetition_penalty", repetition_penalty, "float32"),
        temperature=setting("temperature", temperature, "float32"),
        top_k=setting("top_k", top_k, "int32"),
        top_p=setting("top_p", top_p, "float32"),
        min_p=setting("min_p", min_p, "float32"),
        seed=setting("seed", 0 if seed is None else seed, "int64"),
        position=setting("position", position, "int64"),
        out=out,
    )
    return library.hand_over(out)


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
    _require_array(x, "mamba_block: x")
    required = (
        "in_proj.weight",
        "conv1d.weight",
        "x_proj.weight",
        "dt_proj.weight",
        "dt_proj.bias",
        "A_log",
        "D",
        "out_proj.weight",
    )
    for name in required:
        if name not in weights:
            raise InvalidArgumentError(f"mamba_block: weights has no {name!r}")
    optional = ("in_proj.bias", "conv1d.bias", "out_proj.bias")
    for name in weights:
        if name not in required and name not in optional:
            raise InvalidArgumentError(f"mamba_block: weights has an unknown {name!r}")
    conv_weight = weights["conv1d.weight"]
    _require_rank(conv_weight, "mamba_block: conv1d.weight", 3, "(dim, 1, width)")
    if conv_weight.shape[1] != 1:
        raise InvalidArgumentError(
            f"mamba_block: conv1d.weight has shape {tuple(conv_weight.shape)}, "
            "expected (dim, 1, width)"
        )
    A_log = weights["A_log"]
    _require_array(A_log, "mamba_block: A_log")
    if dt_B_C_norm_eps is not None and not dt_B_C_norm_eps > 0:
        raise InvalidArgumentError(
            f"mamba_block: dt_B_C_norm_eps is {dt_B_C_norm_eps!r}, expected more than 0, or None"
        )
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
        in_proj=weights["in_proj.weight"],
        in_proj_bias=weights.get("in_proj.bias"),
        conv_weight=conv_weight[:, 0, :],
        conv_bias=weights.get("conv1d.bias"),
        x_proj=weights["x_proj.weight"],
        dt_proj=weights["dt_proj.weight"],
        dt_bias=weights["dt_proj.bias"],
        A=library_of(A_log).decay(A_log),
        D=weights["D"],
        out_proj=weights["out_proj.weight"],
        out_proj_bias=weights.get("out_proj.bias"),
        conv_state=conv_state,
        ssm_state=ssm_state,
        cu_seqlens=cu_seqlens,
        state_indices=state_indices,
        dt_B_C_norm_eps=dt_B_C_norm_eps or 0.0,
        out=out,
    )
    return library.hand_over(out)
