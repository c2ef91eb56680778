"""Sequential fp64 references of the operators' backwards, written to be read.

Each takes the gradients with respect to the results of a reference, and that one's arguments. A
complex gradient is dx + i dy for x + i y: a small change c of x + i y then changes the scalar whose
gradient it is by the real part of conj(gradient) c.
"""

from __future__ import annotations

import numpy as np
from reference import fp64, per_channel, silu, softplus


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def silu_slope(x: np.ndarray) -> np.ndarray:
    return sigmoid(x) * (1 + x * (1 - sigmoid(x)))


def selective_scan_bwd(
    dout: np.ndarray,
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
    dlast_state: np.ndarray | None = None,
    initial_state: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Of the inputs that are there, by name: {"du": …, "ddelta": …, …}."""
    dout, u, A = fp64(dout), fp64(u), fp64(A)
    batch, dim, seqlen = u.shape
    B_all = per_channel(B, batch, dim, seqlen)
    C_all = per_channel(C, batch, dim, seqlen)
    raw_delta = fp64(delta)
    if delta_bias is not None:
        raw_delta = raw_delta + fp64(delta_bias)[:, None]
    dt = softplus(raw_delta) if delta_softplus else raw_delta
    decay = np.exp(dt[:, :, None] * A[..., None])  # (batch, dim, dstate, seqlen)

    # Forward: h[t] is the state after t steps. In the complex case y = 2 Re(C h).
    h = np.zeros((seqlen + 1, batch, *A.shape), A.dtype)
    if initial_state is not None:
        h[0] = fp64(initial_state)
    twice = 2 if np.iscomplexobj(A) else 1
    y = np.zeros(u.shape)
    for t in range(seqlen):
        h[t + 1] = decay[..., t] * h[t] + (dt * u)[:, :, t, None] * B_all[..., t]
        y[:, :, t] = twice * (C_all[..., t] * h[t + 1]).sum(axis=-1).real
    if D is not None:
        y += fp64(D)[:, None] * u

    # out = y SiLU(z)
    gradients = {}
    dy = dout
    if z is not None:
        gate = fp64(z)
        dy = dout * silu(gate)
        gradients["dz"] = dout * y * sigmoid(gate) * (1 + gate * (1 - sigmoid(gate)))

    # Backward: dh is the gradient of h[t + 1], then of h[t].
    dh = np.zeros((batch, *A.shape), A.dtype)
    if dlast_state is not None:
        dh += fp64(dlast_state)
    du, ddt = np.zeros(u.shape), np.zeros(u.shape)
    dA, dB, dC = np.zeros_like(A), np.zeros_like(decay), np.zeros_like(decay)
    for t in reversed(range(seqlen)):
        u_t, dt_t, dy_t = u[:, :, t, None], dt[:, :, t, None], dy[:, :, t, None]
        dh = dh + twice * np.conj(C_all[..., t]) * dy_t
        dC[..., t] = twice * np.conj(h[t + 1]) * dy_t
        dB[..., t] = dh * dt_t * u_t
        dx = (dh * np.conj(B_all[..., t])).real.sum(axis=-1)  # of Δ u
        dh = np.conj(decay[..., t]) * dh
        q = dh * np.conj(h[t])  # of Δ A
        dA += (q * dt_t).sum(axis=0)
        du[:, :, t] = dt[:, :, t] * dx
        ddt[:, :, t] = u[:, :, t] * dx + (q * np.conj(A)).real.sum(axis=-1)
    if D is not None:
        du += fp64(D)[:, None] * dy
        gradients["dD"] = (dy * u).sum(axis=(0, 2))
    ddelta = ddt * np.where(raw_delta > 20, 1, sigmoid(raw_delta)) if delta_softplus else ddt

    gradients.update(du=du, ddelta=ddelta, dA=dA)
    gradients["dB"] = _shaped_as(B, dB)
    gradients["dC"] = _shaped_as(C, dC)
    if delta_bias is not None:
        gradients["ddelta_bias"] = ddelta.sum(axis=(0, 2))
    if initial_state is not None:
        gradients["dinitial_state"] = dh
    return gradients


def _shaped_as(coefficients: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """The (batch, dim, dstate, seqlen) gradient of what `per_channel` made of B or C."""
    if coefficients.ndim == 2:
        return gradient.sum(axis=(0, 3))
    batch, _, dstate, seqlen = gradient.shape
    ngroups = coefficients.shape[1] if coefficients.ndim == 4 else 1
    gradient = gradient.reshape(batch, ngroups, -1, dstate, seqlen).sum(axis=2)
    if np.iscomplexobj(gradient):
        gradient = np.stack([gradient.real, gradient.imag], axis=-1)
    return gradient.reshape(coefficients.shape)


def causal_conv1d_bwd(
    dout: np.ndarray,
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None = None,
    activation: str | None = None,
    *,
    dfinal_state: np.ndarray | None = None,
    initial_state: np.ndarray | None = None,
    seq_idx: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """With `seq_idx`, a step sees those of its own number, and none if that is negative."""
    dout, x, weight = fp64(dout), fp64(x), fp64(weight)
    batch, dim, seqlen = x.shape
    width = weight.shape[1]
    before = np.zeros((batch, dim, width - 1))
    if initial_state is not None:
        before = fp64(initial_state)
    inputs = np.concatenate([before, x], axis=-1)
    first = before.shape[2] - (width - 1)  # of the inputs that step 0 sees

    def sees(b: int, t: int, w: int) -> bool:
        if seq_idx is None:
            return True
        other = t - width + 1 + w
        return other >= 0 and seq_idx[b, other] == seq_idx[b, t] >= 0

    dinputs, dweight, dbias = np.zeros(inputs.shape), np.zeros(weight.shape), np.zeros(dim)
    for b in range(batch):
        for t in range(seqlen):
            if seq_idx is not None and seq_idx[b, t] < 0:
                continue
            seen = [w for w in range(width) if sees(b, t, w)]
            g = dout[b, :, t]
            if activation == "silu":
                before_silu = np.zeros(dim) if bias is None else fp64(bias)
                for w in seen:
                    before_silu = before_silu + weight[:, w] * inputs[b, :, first + t + w]
                g = g * silu_slope(before_silu)
            dbias += g
            for w in seen:
                dinputs[b, :, first + t + w] += g * weight[:, w]
                dweight[:, w] += g * inputs[b, :, first + t + w]
    if dfinal_state is not None:
        dinputs[:, :, seqlen:] += fp64(dfinal_state)

    gradients = {"dx": dinputs[:, :, before.shape[2] :], "dweight": dweight}
    if bias is not None:
        gradients["dbias"] = dbias
    if initial_state is not None:
        gradients["dinitial_state"] = dinputs[:, :, : before.shape[2]]
    return gradients


def rms_norm_bwd(
    dout: np.ndarray,
    x: np.ndarray,
    weight: np.ndarray | None,
    *,
    dresidual_out: np.ndarray | None = None,
    residual: np.ndarray | None = None,
    z: np.ndarray | None = None,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    eps: float = 1e-5,
) -> dict[str, np.ndarray]:
    dout = fp64(dout)
    r = fp64(x) if residual is None else fp64(x) + fp64(residual)
    w = np.ones(r.shape[-1]) if weight is None else fp64(weight)
    gate = np.ones(r.shape) if z is None else silu(fp64(z))

    def mean(v: np.ndarray) -> np.ndarray:
        """Over each group, for each of its elements."""
        groups = v.reshape(*v.shape[:-1], -1, group_size or v.shape[-1])
        means = groups.mean(axis=-1, keepdims=True)
        return np.broadcast_to(means, groups.shape).reshape(v.shape)

    v = r if norm_before_gate else r * gate
    scale = 1 / np.sqrt(mean(v**2) + eps)
    n = v * scale
    dy = dout * gate if norm_before_gate else dout
    dn = dy * w
    dv = scale * (dn - n * mean(dn * n))
    dgate = dout * n * w if norm_before_gate else dv * r
    dr = dv if norm_before_gate else dv * gate
    if dresidual_out is not None:
        dr = dr + fp64(dresidual_out)

    gradients = {"dx": dr}
    if weight is not None:
        gradients["dweight"] = (dy * n).reshape(-1, n.shape[-1]).sum(axis=0)
    if residual is not None:
        gradients["dresidual"] = dr
    if z is not None:
        gradients["dz"] = dgate * silu_slope(fp64(z))
    return gradients


def linear_bwd(
    dout: np.ndarray, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    dout_rows, x_rows = (fp64(v).reshape(-1, v.shape[-1]) for v in (dout, x))
    gradients = {"dx": fp64(dout) @ fp64(weight), "dweight": dout_rows.T @ x_rows}
    if bias is not None:
        gradients["dbias"] = dout_rows.sum(axis=0)
    return gradients


def embedding_bwd(dout: np.ndarray, token_ids: np.ndarray, vocab_size: int) -> np.ndarray:
    dweight = np.zeros((vocab_size, dout.shape[-1]))
    for place in np.ndindex(token_ids.shape):
        dweight[token_ids[place]] += fp64(dout[place])
    return dweight


def cross_entropy_bwd(
    dloss: np.ndarray, logits: np.ndarray, targets: np.ndarray, *, ignore_index: int = -100
) -> np.ndarray:
    """dlogits, given the gradient of each row's loss."""
    logits = fp64(logits)
    dlogits = np.exp(logits - logits.max(axis=-1, keepdims=True))
    dlogits /= dlogits.sum(axis=-1, keepdims=True)
    for row in np.ndindex(targets.shape):
        if targets[row] == ignore_index:
            dlogits[row] = 0
        else:
            dlogits[row][targets[row]] -= 1
    return dlogits * fp64(dloss)[..., None]
