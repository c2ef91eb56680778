"""What every backend must pass: per operator a base case, then cases that differ in one field.

A case holds sizes, dtype and options; `inputs()` makes the operator's arguments from them. The
references take the same arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from helpers import DTYPES, LAYOUTS, place


def rows(base: Any, **alternatives: Sequence[Any]) -> list[Any]:
    """`base`, and for every alternative value of a field, `base` with that field changed."""
    params = [pytest.param(base, id="base")]
    for field, values in alternatives.items():
        for value in values:
            assert getattr(base, field) != value, f"{field}={value} is the base row"
            case = replace(base, **{field: value})
            params.append(pytest.param(case, id=f"{field}={value}".replace(" ", "-")))
    return params


class _Random:
    """Reproducible arrays in one dtype and one memory layout."""

    def __init__(self, dtype: str = "float32", layout: str = "contiguous") -> None:
        self.generator = np.random.default_rng(0)
        self.dtype = dtype
        self.layout = layout

    def _placed(self, values: np.ndarray, dtype: str | None) -> np.ndarray:
        name = dtype or self.dtype
        return place(values.astype(DTYPES.get(name, name)), self.layout)

    def normal(self, *shape: int, dtype: str | None = None, scale: float = 1.0) -> np.ndarray:
        values = scale * self.generator.standard_normal(shape)
        if dtype == "complex64":
            values = values + 1j * scale * self.generator.standard_normal(shape)
        return self._placed(values, dtype)

    def uniform(self, low: float, high: float, *shape: int, dtype: str | None = None) -> np.ndarray:
        return self._placed(self.generator.uniform(low, high, shape), dtype)

    def decay(self, *shape: int, dtype: str = "float32") -> np.ndarray:
        """A: negative rates from 1/16 to 16; if complex, at frequencies from -8 to 8."""
        values = -np.exp2(self.generator.uniform(-4, 4, shape))
        if dtype == "complex64":
            values = values + 1j * self.generator.uniform(-8, 8, shape)
        return self._placed(values, dtype)


# Everything but float32, base rows having float32.
NARROW = ("bfloat16", "float16")


@dataclass(frozen=True)
class ScanCase:
    batch: int = 2
    dim: int = 24
    seqlen: int = 67
    dstate: int = 16
    dtype: str = "float32"
    A: str = "real"  # or "complex"
    B: str = "shared"  # or "constant", "1 group", "3 groups"
    C: str = "shared"
    D: bool = True
    z: bool = True
    delta_bias: bool = True
    delta_softplus: bool = True
    initial_state: bool = True
    layout: str = "contiguous"

    @property
    def parameter_dtype(self) -> str:
        """Of D, delta_bias and sums of delta."""
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def state_dtype(self) -> str:
        """Also of A, and of B and C where they are constant."""
        return "complex64" if self.A == "complex" else self.parameter_dtype

    def inputs(self) -> dict[str, Any]:
        random = _Random(self.dtype, self.layout)
        sequence = (self.batch, self.dim, self.seqlen)
        steps = random.normal(*sequence)
        if not self.delta_softplus:
            steps = random.uniform(0.01, 1, *sequence)
        bias = random.uniform(-3, 0, self.dim, dtype=self.parameter_dtype)
        if not self.delta_softplus:
            bias = -bias
        state = random.normal(self.batch, self.dim, self.dstate, dtype=self.state_dtype)
        return {
            "u": random.normal(*sequence),
            "delta": steps,
            "A": random.decay(self.dim, self.dstate, dtype=self.state_dtype),
            "B": self._coefficients(random, self.B),
            "C": self._coefficients(random, self.C),
            "D": random.normal(self.dim, dtype=self.parameter_dtype) if self.D else None,
            "z": random.normal(*sequence) if self.z else None,
            "delta_bias": bias if self.delta_bias else None,
            "delta_softplus": self.delta_softplus,
            "initial_state": state if self.initial_state else None,
        }

    def _coefficients(self, random: _Random, form: str) -> np.ndarray:
        if form == "constant":
            return random.normal(self.dim, self.dstate, dtype=self.state_dtype)
        steps = 2 * self.seqlen if self.A == "complex" else self.seqlen
        if form == "shared":
            return random.normal(self.batch, self.dstate, steps)
        return random.normal(self.batch, int(form.split()[0]), self.dstate, steps)


_SCAN_ALTERNATIVES: dict[str, Sequence[Any]] = {
    "batch": (1, 5),
    "dim": (1, 7, 129),
    "seqlen": (1, 2, 3, 64, 300),
    "dstate": (1, 3, 8, 64, 256),
    "B": ("constant", "1 group", "3 groups"),
    "C": ("constant", "1 group", "3 groups"),
    "D": (False,),
    "z": (False,),
    "delta_bias": (False,),
    "delta_softplus": (False,),
    "initial_state": (False,),
    "layout": LAYOUTS,
}

SCAN_CASES = rows(ScanCase(), dtype=NARROW, **_SCAN_ALTERNATIVES)
FLOAT64_SCAN_CASES = rows(ScanCase(dtype="float64"), **_SCAN_ALTERNATIVES)
# Channels and steps beyond what a block of the GPU's kernels takes.
LARGE_SCAN_CASES = rows(
    ScanCase(dim=390, seqlen=150, B="3 groups"),
    batch=(1,),
    dim=(192, 195),
    seqlen=(64, 128, 129),
    dstate=(1, 5),
    dtype=NARROW,
    B=("1 group",),
    C=("3 groups",),
    z=(False,),
    initial_state=(False,),
    layout=LAYOUTS,
)
COMPLEX_SCAN_CASES = rows(ScanCase(A="complex"), dtype=NARROW, **_SCAN_ALTERNATIVES)


@dataclass(frozen=True)
class StateUpdateCase:
    batch: int = 3
    dim: int = 24
    dstate: int = 16
    dtype: str = "float32"
    nheads: int | None = None  # None: x is (batch, dim); else (batch, nheads, dim / nheads)
    A: str = "real"  # or "complex"
    ngroups: int | None = None  # None: B and C are (batch, dstate)
    D: bool = True
    z: bool = True
    dt_bias: bool = True
    dt_softplus: bool = True
    state_indices: tuple[int, ...] | None = None  # into 5 slots
    layout: str = "contiguous"

    def inputs(self) -> dict[str, Any]:
        random = _Random(self.dtype, self.layout)
        slots = self.batch if self.state_indices is None else 5
        channels = (self.dim,)
        if self.nheads is not None:
            channels = (self.nheads, self.dim // self.nheads)
        groups = () if self.ngroups is None else (self.ngroups,)
        pair = (2,) if self.A == "complex" else ()
        state_dtype = "complex64" if self.A == "complex" else "float32"
        bias = random.uniform(-3, 0, *channels, dtype="float32")
        indices = np.array(self.state_indices or [], np.int32)
        return {
            "state": random.normal(slots, *channels, self.dstate, dtype=state_dtype),
            "x": random.normal(self.batch, *channels),
            "dt": random.uniform(0.01, 1, self.batch, *channels),
            "A": random.decay(*channels, self.dstate, dtype=state_dtype),
            "B": random.normal(self.batch, *groups, self.dstate, *pair),
            "C": random.normal(self.batch, *groups, self.dstate, *pair),
            "D": random.normal(*channels, dtype="float32") if self.D else None,
            "z": random.normal(self.batch, *channels) if self.z else None,
            "dt_bias": (bias if self.dt_softplus else -bias) if self.dt_bias else None,
            "dt_softplus": self.dt_softplus,
            "state_indices": None if self.state_indices is None else place(indices, self.layout),
        }


_STATE_UPDATE_ALTERNATIVES: dict[str, Sequence[Any]] = {
    "batch": (1, 33),
    "dstate": (1, 3, 64, 256),
    "dtype": NARROW,
    "ngroups": (1, 3),
    "D": (False,),
    "z": (False,),
    "dt_bias": (False,),
    "dt_softplus": (False,),
    "state_indices": ((4, 0, 2), (1, -1, 3), (-1, -1, -1)),
    "layout": LAYOUTS,
}

STATE_UPDATE_CASES = rows(StateUpdateCase(), dim=(1, 7, 129), **_STATE_UPDATE_ALTERNATIVES)
HEADS_UPDATE_CASES = rows(
    StateUpdateCase(nheads=6), dim=(6, 42, 300), A=("complex",), **_STATE_UPDATE_ALTERNATIVES
)
COMPLEX_UPDATE_CASES = rows(
    StateUpdateCase(A="complex"), dim=(1, 7, 129), **_STATE_UPDATE_ALTERNATIVES
)


@dataclass(frozen=True)
class ConvCase:
    batch: int = 2
    dim: int = 24
    seqlen: int = 67
    width: int = 4
    dtype: str = "float32"
    weight_dtype: str | None = None  # None: dtype
    bias: bool = True
    activation: str | None = "silu"
    state_len: int | None = 3  # None: no initial state
    layout: str = "contiguous"

    def inputs(self) -> dict[str, Any]:
        random = _Random(self.dtype, self.layout)
        state_len = self.state_len and max(self.state_len, self.width - 1)
        state = random.normal(self.batch, self.dim, state_len) if state_len else None
        return {
            "x": random.normal(self.batch, self.dim, self.seqlen),
            "weight": random.normal(self.dim, self.width, dtype=self.weight_dtype),
            "bias": random.normal(self.dim, dtype=self.weight_dtype) if self.bias else None,
            "activation": self.activation,
            "initial_state": state,
        }


_CONV_ALTERNATIVES: dict[str, Sequence[Any]] = {
    "batch": (1, 5),
    "dim": (1, 7, 129),
    "seqlen": (1, 2, 3, 64, 300),
    "width": (2, 3, 5, 6, 7, 8),
    "bias": (False,),
    "activation": (None,),
    "state_len": (None, 5),
    "layout": LAYOUTS,
}

FLOAT64_CONV_CASES = rows(ConvCase(dtype="float64"), **_CONV_ALTERNATIVES)
CONV_CASES = [
    *rows(ConvCase(), dtype=NARROW, **_CONV_ALTERNATIVES),
    *(
        pytest.param(ConvCase(dtype=dtype, weight_dtype="float32"), id=f"{dtype}-float32-weight")
        for dtype in NARROW
    ),
]


@dataclass(frozen=True)
class ConvUpdateCase:
    batch: int = 3
    dim: int = 24
    tokens: int | None = None  # None: x is (batch, dim)
    width: int = 4
    dtype: str = "float32"
    bias: bool = True
    activation: str | None = "silu"
    state_len: int = 3
    cache_seqlens: tuple[int, ...] | None = None  # None: the state is shifted, not circular
    state_indices: tuple[int, ...] | None = None  # into 5 slots
    layout: str = "contiguous"

    def inputs(self) -> dict[str, Any]:
        random = _Random(self.dtype, self.layout)
        slots = self.batch if self.state_indices is None else 5
        tokens = () if self.tokens is None else (self.tokens,)
        state_len = max(self.state_len, self.width - 1)
        seen, indices = (
            None if entries is None else place(np.array(entries, np.int32), self.layout)
            for entries in (self.cache_seqlens, self.state_indices)
        )
        return {
            "x": random.normal(self.batch, self.dim, *tokens),
            "conv_state": random.normal(slots, self.dim, state_len),
            "weight": random.normal(self.dim, self.width),
            "bias": random.normal(self.dim) if self.bias else None,
            "activation": self.activation,
            "cache_seqlens": seen,
            "state_indices": indices,
        }


_CONV_UPDATE_ALTERNATIVES: dict[str, Sequence[Any]] = {
    "dim": (1, 7, 129),
    "tokens": (1, 2, 3, 9, 300),
    "width": (2, 3, 5, 6, 7, 8),
    "dtype": NARROW,
    "bias": (False,),
    "activation": (None,),
    "state_len": (4, 9),
    "state_indices": ((4, 0, 2), (1, -1, 3), (-1, -1, -1)),
    "layout": LAYOUTS,
}

CONV_UPDATE_CASES = rows(ConvUpdateCase(), batch=(1, 33), **_CONV_UPDATE_ALTERNATIVES)
CIRCULAR_CONV_CASES = rows(
    ConvUpdateCase(cache_seqlens=(5, 0, 1_000_003)),
    cache_seqlens=((3, 3, 3), (1, 2, 7), (2**31 - 1, 2**31 - 2, 12)),
    **_CONV_UPDATE_ALTERNATIVES,
)


@dataclass(frozen=True)
class NormCase:
    shape: tuple[int, ...] = (5, 96)
    dtype: str = "float32"
    weight_dtype: str | None = "float32"  # None: no weight
    residual_dtype: str | None = "float32"  # None: no residual
    z_dtype: str | None = None  # None: no gate
    group_size: int | None = None
    norm_before_gate: bool = False
    eps: float = 1e-5
    scale: float = 1.0
    layout: str = "contiguous"

    def inputs(self) -> dict[str, Any]:
        random = _Random(self.dtype, self.layout)
        residual = weight = z = None
        if self.residual_dtype is not None:
            residual = random.normal(*self.shape, dtype=self.residual_dtype, scale=self.scale)
        if self.weight_dtype is not None:
            weight = random.normal(self.shape[-1], dtype=self.weight_dtype)
        if self.z_dtype is not None:
            z = random.normal(*self.shape, dtype=self.z_dtype)
        return {
            "x": random.normal(*self.shape, scale=self.scale),
            "weight": weight,
            "residual": residual,
            "z": z,
            "group_size": self.group_size,
            "norm_before_gate": self.norm_before_gate,
            "eps": self.eps,
        }


_NORM_ALTERNATIVES: dict[str, Sequence[Any]] = {
    "dtype": NARROW,
    "weight_dtype": (None, *NARROW),
    "eps": (1e-2,),
    "scale": (1e-3, 1e3),
    "layout": LAYOUTS,
}

NORM_CASES = rows(
    NormCase(),
    shape=((96,), (1, 1), (3, 7), (2, 3, 129), (1, 4096)),
    residual_dtype=(None, *NARROW),
    group_size=(1, 3, 24, 96),
    **_NORM_ALTERNATIVES,
)
FLOAT64_NORM_CASES = [
    pytest.param(NormCase(dtype="float64", weight_dtype=w, residual_dtype=r, z_dtype=z, **more))
    for w in (None, "float64")
    for r in (None, "float64")
    for z, more in (
        (None, {}),
        ("float64", {"group_size": 24}),
        ("float64", {"norm_before_gate": True}),
    )
]
GATED_NORM_CASES = rows(
    NormCase(residual_dtype=None, z_dtype="float32", group_size=24),
    shape=((96,), (3, 24), (2, 3, 168), (1, 4104)),
    residual_dtype=("float32", *NARROW),
    z_dtype=NARROW,
    group_size=(None, 1, 3, 96),
    norm_before_gate=(True,),
    **_NORM_ALTERNATIVES,
)


@dataclass(frozen=True)
class LinearCase:
    rows: tuple[int, ...] = (5,)
    in_features: int = 96
    out_features: int = 70
    dtype: str = "float32"
    weight_dtype: str = "float32"
    bias_dtype: str | None = "float32"  # None: no bias
    layout: str = "contiguous"

    def inputs(self) -> dict[str, Any]:
        random = _Random(self.dtype, self.layout)
        bias = self.bias_dtype and random.normal(self.out_features, dtype=self.bias_dtype)
        weight = _Random(
            self.weight_dtype, "padded" if self.layout != "contiguous" else "contiguous"
        )
        return {
            "x": random.normal(*self.rows, self.in_features),
            "weight": weight.normal(self.out_features, self.in_features),
            "bias": bias,
        }


LINEAR_CASES = rows(
    LinearCase(),
    rows=((), (1,), (2,), (4,), (67,), (300,), (2, 3), (2, 1, 3)),
    in_features=(1, 7, 513),
    out_features=(1, 7, 513),
    dtype=NARROW,
    weight_dtype=NARROW,
    bias_dtype=(None, *NARROW),
    layout=LAYOUTS,
)


@dataclass(frozen=True)
class LossCase:
    rows: tuple[int, ...] = (7,)
    vocab_size: int = 257
    dtype: str = "float32"
    target_dtype: str = "int64"
    ignore_index: int = -100
    ignored: int = 2  # rows that do not count, from the second on
    scale: float = 3.0
    layout: str = "contiguous"

    def inputs(self) -> dict[str, Any]:
        random = _Random(self.dtype, self.layout)
        targets = random.generator.integers(0, self.vocab_size, self.rows)
        targets.reshape(-1)[1 : 1 + self.ignored] = self.ignore_index
        return {
            "logits": random.normal(*self.rows, self.vocab_size, scale=self.scale),
            "targets": place(targets.astype(self.target_dtype), self.layout),
            "ignore_index": self.ignore_index,
        }


_LOSS_ALTERNATIVES: dict[str, Sequence[Any]] = {
    "rows": ((1,), (3, 5), (301,)),
    "vocab_size": (2, 7, 256, 1024, 5003),
    "target_dtype": ("int32",),
    "ignore_index": (3, -1),
    "ignored": (0,),
    "scale": (1e-3, 30.0),
    "layout": LAYOUTS,
}

LOSS_CASES = rows(LossCase(), dtype=NARROW, **_LOSS_ALTERNATIVES)
FLOAT64_LOSS_CASES = rows(LossCase(dtype="float64"), **_LOSS_ALTERNATIVES)


@dataclass(frozen=True)
class BlockCase:
    batch: int = 2
    seqlen: int = 35
    d_model: int = 32
    dim: int = 64
    dstate: int = 16
    dt_rank: int = 2
    width: int = 4
    dtype: str = "float32"
    weight_dtype: str = "float32"
    proj_bias: bool = False
    conv_bias: bool = True

    def weights(self) -> dict[str, np.ndarray]:
        """Parameters as they are initialised for training, so that activations keep their scale."""
        random = _Random(self.weight_dtype)

        def projection(out_features: int, in_features: int) -> np.ndarray:
            return random.normal(out_features, in_features, scale=in_features**-0.5)

        decay = np.tile(np.arange(1, self.dstate + 1, dtype=np.float32), (self.dim, 1))
        conv_dtype = "float32" if self.weight_dtype != self.dtype else self.dtype
        weights = {
            "in_proj.weight": projection(2 * self.dim, self.d_model),
            "conv1d.weight": random.normal(self.dim, 1, self.width, dtype=conv_dtype, scale=0.5),
            "x_proj.weight": projection(self.dt_rank + 2 * self.dstate, self.dim),
            "dt_proj.weight": projection(self.dim, self.dt_rank),
            "dt_proj.bias": random.uniform(-5, -1, self.dim, dtype="float32"),
            "A_log": np.log(decay),
            "D": random.normal(self.dim, dtype="float32"),
            "out_proj.weight": projection(self.d_model, self.dim),
        }
        if self.conv_bias:
            weights["conv1d.bias"] = random.normal(self.dim, dtype=conv_dtype)
        if self.proj_bias:
            weights["in_proj.bias"] = random.normal(2 * self.dim)
            weights["out_proj.bias"] = random.normal(self.d_model)
        return weights

    def inputs(self) -> dict[str, Any]:
        x = _Random(self.dtype).normal(self.batch, self.seqlen, self.d_model)
        return {"x": x, "weights": self.weights()}

    def states(self) -> dict[str, np.ndarray]:
        """Running states, as another sequence left them."""
        random = _Random()
        return {
            "conv_state": random.normal(self.batch, self.dim, self.width - 1, dtype=self.dtype),
            "ssm_state": random.normal(self.batch, self.dim, self.dstate),
        }


BLOCK_CASES = rows(
    BlockCase(),
    batch=(1, 5),
    seqlen=(1, 2, 3, 300),
    d_model=(1, 33),
    dim=(1, 67),
    dstate=(1, 5, 64),
    dt_rank=(1, 7),
    width=(2, 3, 8),
    dtype=NARROW,
    weight_dtype=NARROW,
    proj_bias=(True,),
    conv_bias=(False,),
)
