"""The differentiable operators of ssmcore.torch against plain PyTorch, golden vectors and rules."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch_reference as reference
from helpers import assert_close
from test_golden_ops import COMPLEX_SCANS, CONVOLUTIONS, REAL_SCANS, SCAN_ARRAYS, load, select
from torch import Tensor

from ssmcore.torch import (
    Mamba,
    causal_conv1d_fn,
    causal_conv1d_update,
    rms_norm_fn,
    selective_scan_fn,
    selective_state_update,
)
from ssmcore.torch._block_parameters import block_parameters

BATCH, DIM, SEQLEN, DSTATE, WIDTH = 2, 6, 70, 3, 4
OPERATORS = torch.ops.ssmcore


def make(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape))
    return torch.randn(shape, dtype=dtype, generator=generator).requires_grad_()


def scan_inputs(seqlen: int = SEQLEN, **changes: Any) -> dict[str, Tensor]:
    """All inputs of a scan, leaves in float64; a changed one that is None is left out."""
    shape = (BATCH, DIM, seqlen)
    inputs = {
        "u": make(*shape, seed=1),
        "delta": make(*shape, seed=2),
        "A": (-torch.exp(make(DIM, DSTATE, seed=3))).detach().requires_grad_(),
        "B": make(BATCH, DSTATE, seqlen, seed=4),
        "C": make(BATCH, DSTATE, seqlen, seed=5),
        "D": make(DIM, seed=6),
        "z": make(*shape, seed=7),
        "delta_bias": make(DIM, seed=8),
        "initial_state": make(BATCH, DIM, DSTATE, seed=9),
        **changes,
    }
    return {name: tensor for name, tensor in inputs.items() if tensor is not None}


SCANS: dict[str, Callable[[], dict[str, Any]]] = {
    "all": lambda: {},
    "groups": lambda: {
        "B": make(BATCH, 2, DSTATE, SEQLEN),
        "C": make(BATCH, 2, DSTATE, SEQLEN, seed=1),
    },
    "constant B": lambda: {"B": make(DIM, DSTATE)},
    "constant B and C": lambda: {"B": make(DIM, DSTATE), "C": make(DIM, DSTATE, seed=1)},
    "no D": lambda: {"D": None},
    "no z": lambda: {"z": None},
    "no delta_bias": lambda: {"delta_bias": None},
    "no initial_state": lambda: {"initial_state": None},
    "token-major": lambda: {
        name: make(BATCH, SEQLEN, DIM, seed=i).transpose(1, 2).detach().requires_grad_()
        for i, name in enumerate(("u", "delta", "z"))
    },
}


def assert_same_gradients(
    actual: Any, expected: Any, inputs: dict[str, Tensor], dtype: str = "float64"
) -> None:
    """Outputs agree, and the gradients of a random weighing of all of them."""
    outputs = [actual, expected]
    weights = [make(*out.shape, seed=20 + i).detach() for i, out in enumerate(actual)]
    gradients = []
    for results in outputs:
        loss = sum(
            (weight.to(out.dtype) * out).real.sum()
            for weight, out in zip(weights, results, strict=True)
        )
        gradients.append(torch.autograd.grad(loss, list(inputs.values())))
    for mine, theirs in zip(*outputs, strict=True):
        assert_close(mine.detach().numpy(), theirs.detach().numpy(), dtype)
    for mine, theirs in zip(*gradients, strict=True):
        assert_close(mine.numpy(), theirs.numpy(), dtype)


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("case", SCANS)
def test_scan_gradients(case: str, softplus: bool) -> None:
    inputs = scan_inputs(**SCANS[case]())
    if not softplus:
        inputs["delta"] = inputs["delta"].abs().detach().mul(0.1).requires_grad_()
    actual = selective_scan_fn(**inputs, delta_softplus=softplus, return_last_state=True)
    expected = reference.selective_scan(**inputs, delta_softplus=softplus)
    assert_same_gradients(actual, expected, inputs)


@pytest.mark.parametrize("constant", [True, False])
def test_complex_scan_gradients(constant: bool) -> None:
    A = torch.complex(-torch.rand(DIM, DSTATE) - 0.1, torch.randn(DIM, DSTATE)).requires_grad_()
    shape = (DIM, DSTATE) if constant else (BATCH, 1, DSTATE, 2 * SEQLEN)
    dtype = torch.complex64 if constant else torch.float32
    B, C = (make(*shape, dtype=dtype, seed=seed) for seed in (1, 2))
    inputs = {
        name: tensor.detach().float().requires_grad_()
        for name, tensor in scan_inputs(A=None, B=None, C=None, initial_state=None).items()
    }
    inputs |= {"A": A, "B": B, "C": C}
    actual = selective_scan_fn(**inputs, delta_softplus=True, return_last_state=True)
    expected = reference.selective_scan(**inputs, delta_softplus=True)
    assert_same_gradients(actual, expected, inputs, "float32")


@pytest.mark.parametrize("changes", [{}, {"z": None, "D": None, "initial_state": None}])
def test_scan_gradcheck(changes: dict[str, Any]) -> None:
    inputs = scan_inputs(seqlen=5, **changes)

    def scan(*tensors: Tensor) -> Any:
        named = dict(zip(inputs, tensors, strict=True))
        return selective_scan_fn(**named, delta_softplus=True, return_last_state=True)

    assert torch.autograd.gradcheck(scan, tuple(inputs.values()))


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("absent", [None, "bias", "initial_state"])
def test_convolution_gradients(activation: str | None, absent: str | None) -> None:
    inputs = {
        "x": make(BATCH, DIM, SEQLEN),
        "weight": make(DIM, WIDTH),
        "bias": make(DIM),
        "initial_state": make(BATCH, DIM, WIDTH - 1),
    }
    inputs.pop(absent, None)

    def convolve(x: Tensor, weight: Tensor, bias: Any = None, initial_state: Any = None) -> Any:
        return causal_conv1d_fn(
            x,
            weight,
            bias,
            initial_states=initial_state,
            return_final_states=True,
            activation=activation,
        )

    expected = reference.causal_conv1d(**inputs, activation=activation)
    assert_same_gradients(convolve(**inputs), expected, inputs)
    small = (make(1, 2, 5), *(tensor[:2] for tensor in list(inputs.values())[1:2]))
    assert torch.autograd.gradcheck(convolve, small)


def test_convolution_with_numbered_sequences() -> None:
    x, weight = make(1, DIM, 12), make(DIM, WIDTH)
    seq_idx = torch.tensor([[0] * 5 + [1] * 4 + [-1] * 3], dtype=torch.int32)
    out = causal_conv1d_fn(x, weight, seq_idx=seq_idx, activation="silu")
    pieces = [causal_conv1d_fn(x[..., a:b], weight, activation="silu") for a, b in ((0, 5), (5, 9))]
    expected = torch.cat([*pieces, torch.zeros(1, DIM, 3, dtype=torch.float64)], dim=-1)
    assert_same_gradients((out,), (expected,), {"x": x, "weight": weight})
    out = causal_conv1d_fn(x, weight, seq_idx=seq_idx, activation="silu")
    (dx,) = torch.autograd.grad(out.sum(), x)
    assert not dx[..., 9:].any()


@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("with_weight", [True, False])
def test_norm_gradients(with_residual: bool, with_weight: bool) -> None:
    inputs = {"x": make(BATCH, SEQLEN, DIM)}
    if with_weight:
        inputs["weight"] = make(DIM)
    if with_residual:
        inputs["residual"] = make(BATCH, SEQLEN, DIM, seed=1)
    weight, residual = inputs.get("weight"), inputs.get("residual")
    eps = 2.0**-10  # which float32 holds exactly
    actual = rms_norm_fn(inputs["x"], weight, None, residual, prenorm=True, eps=eps)
    expected = reference.rms_norm(inputs["x"], weight, residual, eps)
    assert_same_gradients(actual, expected, inputs)


def test_norm_keeps_its_residual_in_float32() -> None:
    x, weight = make(2, DIM).bfloat16(), make(DIM).float()
    out, r = rms_norm_fn(x, weight, None, prenorm=True, residual_in_fp32=True)
    assert (out.dtype, r.dtype) == (torch.bfloat16, torch.float32)
    assert rms_norm_fn(x, weight, None, prenorm=True)[1].dtype == torch.bfloat16
    biased = rms_norm_fn(x, weight, torch.ones(DIM))
    assert torch.equal(biased, rms_norm_fn(x, weight, None) + 1)


# --- Golden vectors -------------------------------------------------------------------------------


def as_leaves(arrays: dict[str, Any], dtype: str) -> dict[str, Tensor]:
    def leaf(array: np.ndarray) -> Tensor:
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.astype(np.float32)).bfloat16().requires_grad_()
        return torch.from_numpy(array.copy()).requires_grad_()

    return {name: leaf(array) for name, array in arrays.items()}


def assert_golden(tensors: dict[str, Any], out: Tensor, inputs: dict[str, Tensor]) -> None:
    dtype = str(tensors["dtype"])
    out.backward(torch.from_numpy(tensors["dout"]).to(out.dtype))
    for name, tensor in inputs.items():
        assert tensor.grad is not None
        actual = tensor.grad.to(torch.complex64 if tensor.is_complex() else torch.float32)
        assert_close(actual.numpy(), tensors[f"d{name}"], dtype, rounded=True)


@pytest.mark.parametrize("case", [*REAL_SCANS, *COMPLEX_SCANS])
def test_golden_gradients_of_the_scan(case: str) -> None:
    tensors = load(case)
    inputs = as_leaves(select(tensors, *SCAN_ARRAYS), str(tensors["dtype"]))
    out = selective_scan_fn(**inputs, delta_softplus=bool(tensors["delta_softplus"]))
    assert_golden(tensors, out, inputs)


@pytest.mark.parametrize("case", [case for case in CONVOLUTIONS if case != "conv_states"])
def test_golden_gradients_of_the_convolution(case: str) -> None:
    tensors = load(case)
    inputs = as_leaves(select(tensors, "x", "weight", "bias"), str(tensors["dtype"]))
    activation = str(tensors["activation"])
    out = causal_conv1d_fn(**inputs, activation=None if activation == "None" else activation)
    assert_golden(tensors, out, inputs)


# --- Properties -----------------------------------------------------------------------------------

ALONG_L = ("u", "delta", "B", "C", "z")


@pytest.mark.parametrize("split", [1, 33, 64, 69])
def test_two_halves_equal_the_whole(split: int) -> None:
    inputs = scan_inputs()
    constant = {name: tensor for name, tensor in inputs.items() if name not in ALONG_L}
    first = {name: inputs[name][..., :split] for name in ALONG_L}
    second = {name: inputs[name][..., split:] for name in ALONG_L}
    start, state = selective_scan_fn(
        **first, **constant, delta_softplus=True, return_last_state=True
    )
    end, last_state = selective_scan_fn(
        **second, **constant | {"initial_state": state}, delta_softplus=True, return_last_state=True
    )
    whole = selective_scan_fn(**inputs, delta_softplus=True, return_last_state=True)
    assert_same_gradients((torch.cat([start, end], dim=-1), last_state), whole, inputs)


def test_packed_sequences_equal_separate_ones() -> None:
    bounds = [0, 5, 5, 37, SEQLEN]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    sequences = len(bounds) - 1
    inputs = {
        name: tensor[:1].detach().requires_grad_() if name in ALONG_L else tensor
        for name, tensor in scan_inputs(initial_state=make(sequences, DIM, DSTATE)).items()
    }
    packed = selective_scan_fn(
        **inputs, delta_softplus=True, return_last_state=True, cu_seqlens=cu_seqlens
    )
    constant = {name: inputs[name] for name in ("A", "D", "delta_bias")}
    outs, states = [], []
    for s, (begin, end) in enumerate(pairwise(bounds)):
        state = inputs["initial_state"][s : s + 1]
        if begin < end:
            piece = {name: inputs[name][..., begin:end] for name in ALONG_L}
            out, state = selective_scan_fn(
                **piece,
                **constant,
                initial_state=state,
                delta_softplus=True,
                return_last_state=True,
            )
            outs.append(out)
        states.append(state)
    separate = (torch.cat(outs, dim=-1), torch.cat(states))
    assert_same_gradients(packed, separate, inputs)


def test_one_tensor_as_two_inputs() -> None:
    inputs = scan_inputs(delta=None, C=None)
    shared = {"delta": inputs["u"], "C": inputs["B"]}
    actual = selective_scan_fn(**inputs, **shared, delta_softplus=True, return_last_state=True)
    expected = reference.selective_scan(**inputs, **shared, delta_softplus=True)
    assert_same_gradients(actual, expected, inputs)


def test_the_state_alone_passes_gradients_on() -> None:
    inputs = scan_inputs(C=None, D=None, z=None)
    C = make(BATCH, DSTATE, SEQLEN).detach()
    _, actual = selective_scan_fn(**inputs, C=C, delta_softplus=True, return_last_state=True)
    _, expected = reference.selective_scan(**inputs, C=C, delta_softplus=True)
    assert_same_gradients((actual,), (expected,), inputs)


def test_backward_twice_gives_the_same_bits() -> None:
    inputs = scan_inputs()
    out = selective_scan_fn(**inputs, delta_softplus=True).sum()
    first = torch.autograd.grad(out, list(inputs.values()), retain_graph=True)
    second = torch.autograd.grad(out, list(inputs.values()))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_steps_equal_the_sequence() -> None:
    with torch.no_grad():
        inputs = {name: tensor.float() for name, tensor in scan_inputs().items()}
        out, last_state = selective_scan_fn(**inputs, delta_softplus=True, return_last_state=True)
        state = inputs["initial_state"].clone()
        constant = [inputs["A"]]
        steps = [
            selective_state_update(
                state,
                inputs["u"][..., t],
                inputs["delta"][..., t],
                *constant,
                inputs["B"][..., t],
                inputs["C"][..., t],
                inputs["D"],
                z=inputs["z"][..., t],
                dt_bias=inputs["delta_bias"],
                dt_softplus=True,
            )
            for t in range(SEQLEN)
        ]
        assert_close(torch.stack(steps, -1).numpy(), out.numpy(), "float32")
        assert_close(state.numpy(), last_state.numpy(), "float32")

        x, weight = inputs["u"], make(DIM, WIDTH).float()
        conv_state = torch.zeros(BATCH, DIM, WIDTH)
        columns = [causal_conv1d_update(x[..., t], conv_state, weight) for t in range(SEQLEN)]
        expected = causal_conv1d_fn(x, weight)
        assert_close(torch.stack(columns, -1).numpy(), expected.numpy(), "float32")
        assert torch.equal(conv_state, x[..., -WIDTH:])


def test_a_state_in_bfloat16_is_rounded_once() -> None:
    with torch.no_grad():
        inputs = {name: tensor.float() for name, tensor in scan_inputs(seqlen=1).items()}
        step = {name: inputs[name][..., 0] for name in ("u", "delta", "B", "C")}
        args = (step["u"], step["delta"], inputs["A"], step["B"], step["C"])
        rounded = inputs["initial_state"].bfloat16()
        exact = rounded.float()
        outs = [selective_state_update(state, *args) for state in (rounded, exact)]
        assert torch.equal(*outs)
        assert torch.equal(rounded, exact.bfloat16())


def test_operands_of_a_step_are_not_rounded_to_the_type_of_x() -> None:
    with torch.no_grad():
        inputs = {name: tensor.float() for name, tensor in scan_inputs(seqlen=1).items()}
        u, *others = (inputs[name][..., 0] for name in ("u", "delta", "B", "C"))
        rest = (others[0], inputs["A"], *others[1:])
        states = [inputs["initial_state"].clone() for _ in range(2)]
        out = selective_state_update(states[0], u.bfloat16(), *rest)
        exact = selective_state_update(states[1], u.bfloat16().float(), *rest)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, exact.bfloat16()) and torch.equal(*states)


def test_final_states_go_where_they_should() -> None:
    x, weight = make(BATCH, DIM, 9).detach(), make(DIM, WIDTH).detach()
    place = torch.empty(BATCH, DIM, WIDTH - 1, dtype=torch.float64)
    _, given = causal_conv1d_fn(x, weight, return_final_states=True, final_states_out=place)
    assert given is place
    assert torch.equal(place, x[..., -WIDTH + 1 :])


# --- Registration ---------------------------------------------------------------------------------


def test_opcheck_of_the_scan() -> None:
    inputs = scan_inputs()
    cu_seqlens = torch.tensor([0, 10, SEQLEN], dtype=torch.int32)
    torch.library.opcheck(OPERATORS.selective_scan.default, (*inputs.values(), None, True, 64))
    packed = [tensor[:1] if tensor.dim() > 2 else tensor for tensor in inputs.values()]
    packed[-1] = inputs["initial_state"]
    torch.library.opcheck(OPERATORS.selective_scan.default, (*packed, cu_seqlens, True, 0))
    plain = list(inputs.values())[:5]
    torch.library.opcheck(
        OPERATORS.selective_scan.default, (*plain, None, None, None, None, None, False, 0)
    )


def test_opcheck_of_the_convolution() -> None:
    x = make(BATCH, SEQLEN, DIM).transpose(1, 2).detach().requires_grad_()
    weight, bias, state = make(DIM, WIDTH), make(DIM), make(BATCH, DIM, WIDTH - 1)
    operator = OPERATORS.causal_conv1d.default
    torch.library.opcheck(operator, (x, weight, bias, state, None, None, "silu", True))
    torch.library.opcheck(operator, (x, weight, None, None, None, None, None, False))


@pytest.mark.parametrize("keep", [False, True])
def test_opcheck_of_the_block(keep: bool) -> None:
    torch.manual_seed(0)
    mamba = Mamba(8, d_state=3, bias=True)
    x = torch.randn(2, 70, 8, requires_grad=keep)
    parameters = [p.detach().requires_grad_(keep) for p in block_parameters(mamba, torch.float32)]
    torch.library.opcheck(OPERATORS.mamba_block_train.default, (x, *parameters, 0.0, keep))


def test_opcheck_of_the_norm() -> None:
    x, weight, residual = make(3, 5, DIM), make(DIM), make(3, 5, DIM, seed=1)
    torch.library.opcheck(OPERATORS.rms_norm.default, (x, weight, residual, 1e-5))
    torch.library.opcheck(OPERATORS.rms_norm.default, (x, None, None, 1e-5))


def test_opcheck_of_the_updates() -> None:
    with torch.no_grad():
        state, x, dt = make(2, DIM, DSTATE).float(), make(2, DIM).float(), make(2, DIM).float()
        A, B = -make(DIM, DSTATE).float().abs(), make(2, DSTATE).float()
        torch.library.opcheck(
            OPERATORS.selective_state_update.default,
            (state, x, dt, A, B, B.clone(), None, None, None, True, None),
        )
        torch.library.opcheck(
            OPERATORS.causal_conv1d_update.default,
            (x, make(2, DIM, WIDTH).float(), make(DIM, WIDTH).float(), None, "silu", None, None),
        )


# --- Bad input ------------------------------------------------------------------------------------


def scan_with(**changes: Any) -> Callable[[], Any]:
    return lambda: selective_scan_fn(**{**scan_inputs(), **changes})


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (scan_with(B=3.0), TypeError, ("selective_scan_fn", "B", "float")),
        (scan_with(z=torch.ones(2, 3).to_sparse()), TypeError, ("z", "layout")),
        (scan_with(D=torch.ones(DIM, device="meta")), RuntimeError, ("D", "meta", "u", "cpu")),
        (scan_with(C=torch.ones(2, 2, 3)), ValueError, ("selective_scan", "C")),
        (scan_with(delta=torch.ones(BATCH, DIM, SEQLEN)), ValueError, ("delta", "float32")),
        (
            lambda: causal_conv1d_fn(make(1, 2, 3), make(2, 9)),
            ValueError,
            ("causal_conv1d", "weight"),
        ),
        (
            lambda: causal_conv1d_fn(make(1, 2, 3), make(2, 3), activation="relu"),
            ValueError,
            ("causal_conv1d", "activation", "relu"),
        ),
        (
            lambda: causal_conv1d_fn(
                make(1, 2, 3), make(2, 3), return_final_states=True, final_states_out=make(1, 2, 2)
            ),
            RuntimeError,
            ("final_states_out", "requires grad"),
        ),
        (
            lambda: causal_conv1d_update(make(1, 2), make(1, 2, 3), make(2, 3)),
            RuntimeError,
            ("causal_conv1d_update", "requires grad", "conv_state"),
        ),
        (
            lambda: selective_state_update(
                make(1, 2, 3), *(make(1, 2) for _ in range(2)), make(2, 3), make(1, 3), make(1, 3)
            ),
            RuntimeError,
            ("selective_state_update", "requires grad", "state"),
        ),
        (
            lambda: rms_norm_fn(make(2, 3), make(3), None, dropout_p=0.1),
            NotImplementedError,
            ("rms_norm_fn", "dropout"),
        ),
        (
            lambda: rms_norm_fn(make(2, 3), make(3), None, x1=make(2, 3)),
            NotImplementedError,
            ("rms_norm_fn", "x1"),
        ),
    ],
)
def test_refusals(call: Callable[[], Any], error: type, words: tuple[str, ...]) -> None:
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


def test_a_wrapped_tensor_is_refused() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    u = TwoTensor(torch.ones(BATCH, DIM, SEQLEN), torch.ones(BATCH, DIM, SEQLEN))
    with pytest.raises(TypeError, match=r"selective_scan_fn: u is a TwoTensor"):
        scan_with(u=u)()


def test_gradients_that_do_not_fit_are_refused() -> None:
    out = scan_with()()
    with pytest.raises(RuntimeError, match="shape"):
        out.backward(torch.ones(BATCH, DIM, 3, dtype=torch.float64))


def test_second_derivatives_are_refused() -> None:
    inputs = scan_inputs()
    out = selective_scan_fn(**inputs).sum()
    (du,) = torch.autograd.grad(out, inputs["u"], create_graph=True)
    with pytest.raises(RuntimeError, match="selective_scan: second derivatives"):
        du.sum().backward()


def test_a_graph_is_used_once() -> None:
    out = scan_with()().sum()
    out.backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.backward()


def test_a_state_changed_after_it_was_used_is_noticed() -> None:
    state = torch.zeros(BATCH, DIM, DSTATE)
    inputs = {name: tensor.detach().float() for name, tensor in scan_inputs().items()}
    inputs["A"].requires_grad_()
    out = selective_scan_fn(**inputs | {"initial_state": state})
    with torch.no_grad():
        step = [inputs[name][..., 0] for name in ("u", "delta")]
        B = inputs["B"][..., 0]
        selective_state_update(state, *step, inputs["A"], B, B)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
