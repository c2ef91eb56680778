"""Sequential fp64 references of the operators, written to be read.

Every function takes arrays of any dtype, computes in float64 (complex128) one time step after the
other, and returns such arrays. States are returned, never changed in place. The formulas are those
of Gu & Dao, arXiv 2312.00752; shapes and names are those of `ssmcore.ops`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def fp64(array: np.ndarray) -> np.ndarray:
    """`array` in float64, or in complex128 if it is complex."""
    return np.asarray(array).astype(np.complex128 if np.iscomplexobj(array) else np.float64)


def softplus(x: np.ndarray) -> np.ndarray:
    return np.where(x > 20, x, np.log1p(np.exp(np.minimum(x, 20))))


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def per_channel(coefficients: np.ndarray, batch: int, dim: int, seqlen: int) -> np.ndarray:
    """B or C in any of its forms, as (batch, dim, dstate, seqlen).

    Constant: (dim, dstate). Variable: (batch, dstate, seqlen) or (batch, ngroups, dstate, seqlen),
    where each group serves dim / ngroups channels in a row. A variable complex one is real, with
    real and imaginary parts interleaved on the last axis (2 · seqlen).
    """
    coefficients = fp64(coefficients)
    if coefficients.ndim == 2:
        return np.broadcast_to(coefficients[None, :, :, None], (batch, *coefficients.shape, seqlen))
    if coefficients.ndim == 3:
        coefficients = coefficients[:, None]
    if coefficients.shape[-1] == 2 * seqlen:
        coefficients = coefficients[..., 0::2] + 1j * coefficients[..., 1::2]
    return np.repeat(coefficients, dim // coefficients.shape[1], axis=1)


def selective_scan(
    u: np.ndarray,
    delta: np.ndarray,
    A: np.ndarray,
    B: np.ndarray,
    C: np.ndarray,
    D: np.ndarray | None = None,
    z: np.ndarray | None = None,
    delta_bias: np.ndarray | None = None,
    delta_softplus: bool = False,
    *,
    initial_state: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(out, last_state) of the selective scan: (batch, dim, seqlen) and (batch, dim, dstate)."""
    u, delta, A = fp64(u), fp64(delta), fp64(A)
    batch, dim, seqlen = u.shape
    B = per_channel(B, batch, dim, seqlen)
    C = per_channel(C, batch, dim, seqlen)
    if delta_bias is not None:
        delta = delta + fp64(delta_bias)[:, None]
    if delta_softplus:
        delta = softplus(delta)

    h = np.zeros((batch, *A.shape), A.dtype)
    if initial_state is not None:
        h += fp64(initial_state)
    out = np.empty((batch, dim, seqlen))
    for t in range(seqlen):
        dt = delta[:, :, t, None]
        h = np.exp(dt * A) * h + dt * B[..., t] * u[:, :, t, None]
        y = (C[..., t] * h).sum(axis=-1)
        out[:, :, t] = 2 * y.real if np.iscomplexobj(A) else y
    if D is not None:
        out += fp64(D)[:, None] * u
    if z is not None:
        out *= silu(fp64(z))
    return out, h


def selective_state_update(
    state: np.ndarray,
    x: np.ndarray,
    dt: np.ndarray,
    A: np.ndarray,
    B: np.ndarray,
    C: np.ndarray,
    D: np.ndarray | None = None,
    z: np.ndarray | None = None,
    dt_bias: np.ndarray | None = None,
    dt_softplus: bool = False,
    *,
    state_indices: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(out, state after) of one step: (batch, dim) and (slots, dim, dstate), or dim in two axes.

    Row b uses slot state_indices[b]; a negative one starts from zeros and leaves nothing.
    """
    state = fp64(state)
    A = fp64(A)
    out = np.empty(x.shape)
    for b in range(len(x)):
        slot = b if state_indices is None else int(state_indices[b])
        h = state[slot] if slot >= 0 else np.zeros(A.shape)
        delta = fp64(dt[b])
        if dt_bias is not None:
            delta = delta + fp64(dt_bias)
        if dt_softplus:
            delta = softplus(delta)
        B_b, C_b = (_of_channels(fp64(v[b]), A) for v in (B, C))
        h = np.exp(delta[..., None] * A) * h + delta[..., None] * B_b * fp64(x[b])[..., None]
        y = (C_b * h).sum(axis=-1)
        out[b] = 2 * y.real if np.iscomplexobj(A) else y
        if D is not None:
            out[b] += fp64(D) * fp64(x[b])
        if z is not None:
            out[b] *= silu(fp64(z[b]))
        if slot >= 0:
            state[slot] = h
    return out, state


def _of_channels(coefficients: np.ndarray, A: np.ndarray) -> np.ndarray:
    """B or C of one row and step, ([ngroups,] dstate[, 2]), as (dim, dstate) or heads of it."""
    if np.iscomplexobj(A):
        coefficients = coefficients[..., 0] + 1j * coefficients[..., 1]
    coefficients = np.atleast_2d(coefficients)
    coefficients = np.repeat(coefficients, len(A) // len(coefficients), axis=0)
    return coefficients if A.ndim == 2 else coefficients[:, None]  # the same for a whole head


def causal_conv1d(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None = None,
    activation: str | None = None,
    *,
    initial_state: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(out, final_state): (batch, dim, seqlen) and the last inputs, oldest first.

    The final state is as long as the initial one; without one, width - 1.
    """
    x, weight = fp64(x), fp64(weight)
    batch, dim, seqlen = x.shape
    width = weight.shape[1]
    before = np.zeros((batch, dim, width - 1))
    if initial_state is not None:
        before = fp64(initial_state)
    state_len = before.shape[2]
    inputs = np.concatenate([before, x], axis=-1)
    out = np.empty(x.shape)
    for t in range(seqlen):
        end = state_len + t + 1
        out[:, :, t] = (inputs[:, :, end - width : end] * weight).sum(axis=-1)
    if bias is not None:
        out += fp64(bias)[:, None]
    if activation == "silu":
        out = silu(out)
    return out, inputs[:, :, seqlen:]


def causal_conv1d_numbered(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None = None,
    activation: str | None = None,
    *,
    seq_idx: np.ndarray,
) -> np.ndarray:
    """out of the convolution whose steps see those of their own number; 0 where it is negative."""
    x, weight = fp64(x), fp64(weight)
    batch, _, seqlen = x.shape
    width = weight.shape[1]
    out = np.zeros(x.shape)
    for b in range(batch):
        for t in range(seqlen):
            number = seq_idx[b, t]
            if number < 0:
                continue
            for w in range(width):
                before = t - width + 1 + w
                if before >= 0 and seq_idx[b, before] == number:
                    out[b, :, t] += weight[:, w] * x[b, :, before]
            if bias is not None:
                out[b, :, t] += fp64(bias)
            if activation == "silu":
                out[b, :, t] = silu(out[b, :, t])
    return out


def causal_conv1d_update(
    x: np.ndarray,
    conv_state: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None = None,
    activation: str | None = None,
    *,
    cache_seqlens: np.ndarray | None = None,
    state_indices: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(out, conv_state after) of the next tokens: x is (batch, dim) or (batch, dim, tokens).

    The state (slots, dim, state_len) shifts to the left by the number of tokens; with
    `cache_seqlens`, input number i of a row is at i modulo state_len instead. Row b uses slot
    state_indices[b]; a negative one starts from zeros and leaves nothing.
    """
    conv_state = fp64(conv_state)
    state_len = conv_state.shape[2]
    tokens = fp64(x).reshape(*x.shape[:2], -1)
    out = np.empty(tokens.shape)
    for b in range(len(x)):
        slot = b if state_indices is None else int(state_indices[b])
        before = conv_state[slot] if slot >= 0 else np.zeros(conv_state.shape[1:])
        seen = 0 if cache_seqlens is None else int(cache_seqlens[b])
        places = (seen + np.arange(state_len)) % state_len  # of the inputs, oldest first
        out[b : b + 1], after = causal_conv1d(
            tokens[b : b + 1],
            weight,
            bias,
            activation,
            initial_state=before[None, :, places],
        )
        if slot >= 0:
            if cache_seqlens is not None:
                places = (places + tokens.shape[2]) % state_len
            conv_state[slot][:, places] = after[0]
    return out.reshape(x.shape), conv_state


def rms_norm(
    x: np.ndarray,
    weight: np.ndarray | None,
    *,
    residual: np.ndarray | None = None,
    z: np.ndarray | None = None,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    eps: float = 1e-5,
) -> tuple[np.ndarray, np.ndarray]:
    """(out, r): r = x + residual, out = norm(r) = weight · r / sqrt(mean(r²) + eps).

    The mean is over groups of the last axis. With a gate: norm(r SiLU(z)), or norm(r) SiLU(z).
    """
    r = fp64(x) if residual is None else fp64(x) + fp64(residual)

    def norm(v: np.ndarray) -> np.ndarray:
        groups = v.reshape(*v.shape[:-1], -1, group_size or v.shape[-1])
        scaled = groups / np.sqrt((groups**2).mean(axis=-1, keepdims=True) + eps)
        return scaled.reshape(v.shape) * (1 if weight is None else fp64(weight))

    if z is None:
        return norm(r), r
    gate = silu(fp64(z))
    return (norm(r) * gate if norm_before_gate else norm(r * gate)), r


def linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """out = x weightᵀ + bias: (..., in_features) to (..., out_features)."""
    out = fp64(x) @ fp64(weight).T
    return out if bias is None else out + fp64(bias)


def embedding(token_ids: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """out[i] = weight[token_ids[i]]."""
    return fp64(weight)[token_ids]


def cross_entropy(
    logits: np.ndarray, targets: np.ndarray, *, ignore_index: int = -100
) -> tuple[np.ndarray, np.ndarray]:
    """(loss, lse) of each row: lse = log Σ exp(logits), loss = lse - logits[target].

    0 where the target is `ignore_index`.
    """
    logits = fp64(logits)
    largest = logits.max(axis=-1)
    lse = largest + np.log(np.exp(logits - largest[..., None]).sum(axis=-1))
    counts = targets != ignore_index
    of_target = np.take_along_axis(logits, np.where(counts, targets, 0)[..., None], axis=-1)
    return np.where(counts, lse - of_target[..., 0], 0), lse


def mamba_block(
    x: np.ndarray,
    weights: Mapping[str, np.ndarray],
    *,
    conv_state: np.ndarray | None = None,
    ssm_state: np.ndarray | None = None,
    dt_B_C_norm_eps: float | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(out, conv_state after, ssm_state after) of one Mamba block on x (batch, seqlen, d_model).

    What one operator hands to the next is rounded to x's dtype, which is what that dtype means.
    FalconMamba's block normalises Δ, B and C, each with `dt_B_C_norm_eps`.
    """

    def rounded(activation: np.ndarray) -> np.ndarray:
        return activation.astype(x.dtype).astype(np.float64)

    A = -np.exp(fp64(weights["A_log"]))
    dstate = A.shape[1]
    dt_rank = weights["dt_proj.weight"].shape[1]

    xz = rounded(linear(x, weights["in_proj.weight"], weights.get("in_proj.bias")))
    u, z = np.split(xz.swapaxes(1, 2), 2, axis=1)
    u, conv_state = causal_conv1d(
        u,
        weights["conv1d.weight"][:, 0],
        weights.get("conv1d.bias"),
        "silu",
        initial_state=conv_state,
    )
    u = rounded(u)
    delta_B_C = rounded(linear(u.swapaxes(1, 2), weights["x_proj.weight"]))
    delta, B, C = np.split(delta_B_C, [dt_rank, dt_rank + dstate], axis=-1)
    if dt_B_C_norm_eps is not None:
        delta, B, C = (rounded(rms_norm(v, None, eps=dt_B_C_norm_eps)[0]) for v in (delta, B, C))
    delta = rounded(linear(delta, weights["dt_proj.weight"]))
    y, ssm_state = selective_scan(
        u,
        delta.swapaxes(1, 2),
        A,
        B.swapaxes(1, 2),
        C.swapaxes(1, 2),
        weights["D"],
        z,
        weights["dt_proj.bias"],
        delta_softplus=True,
        initial_state=ssm_state,
    )
    y = rounded(y).swapaxes(1, 2)
    out = linear(y, weights["out_proj.weight"], weights.get("out_proj.bias"))
    return out, conv_state, ssm_state


def sampling_distribution(
    logits: np.ndarray,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    history: np.ndarray | None = None,
) -> np.ndarray:
    """The probability with which `ssmcore.ops.sample` draws each id, for one row of logits.

    In this order: repetition penalty, temperature, top-k, top-p, min-p, each on the probabilities
    that the filters before it left, renormalised.
    """
    logits = fp64(logits).copy()
    if history is not None:
        seen = np.unique(history[history >= 0])
        logits[seen] = np.where(
            logits[seen] > 0, logits[seen] / repetition_penalty, logits[seen] * repetition_penalty
        )
    if temperature == 0:
        return np.eye(len(logits))[np.argmax(logits)]

    scaled = logits / temperature
    weights = np.exp(scaled - scaled.max())
    descending = np.argsort(-weights, kind="stable")
    if top_k > 0:
        weights[descending[top_k:]] = 0
    probabilities = weights / weights.sum()
    if top_p < 1:
        larger_ones = np.cumsum(probabilities[descending]) - probabilities[descending]
        probabilities[descending[larger_ones >= top_p]] = 0
    probabilities[probabilities < min_p * probabilities.max()] = 0
    return probabilities / probabilities.sum()


def adamw(
    parameter: np.ndarray,
    gradient: np.ndarray,
    exp_avg: np.ndarray,
    exp_avg_sq: np.ndarray,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The parameter and the two moments after step number `step`."""
    g, m, v = fp64(gradient), fp64(exp_avg), fp64(exp_avg_sq)
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * g**2
    m_hat, v_hat = m / (1 - betas[0] ** step), v / (1 - betas[1] ** step)
    decayed = (1 - lr * weight_decay) * fp64(parameter)
    return decayed - lr * m_hat / (np.sqrt(v_hat) + eps), m, v
