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
