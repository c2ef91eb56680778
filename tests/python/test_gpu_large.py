"""Tensors on a GPU with more than 2³¹ elements, and rows that do not depend on their batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
import reference_gradients
from backends import require_cuda
from helpers import assert_close

from ssmcore import ops

pytestmark = pytest.mark.cuda

# A little more than 2³¹ elements.
DIM, SEQLEN = 4096, 2**19 + 64


@pytest.fixture(scope="module")
def torch() -> Any:
    require_cuda()
    torch = pytest.importorskip("torch")
    torch.use_deterministic_algorithms(False)  # outputs need not be filled before they are written
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free memory on the GPU")
    yield torch
    torch.cuda.empty_cache()


def huge(torch: Any, layout: str) -> Any:
    shape = (1, SEQLEN, DIM) if layout == "token-major" else (1, DIM, SEQLEN)
    values = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()
    return values.transpose(1, 2) if layout == "token-major" else values


def to_numpy(tensor: Any) -> np.ndarray:
    return tensor.float().cpu().numpy()


@pytest.mark.parametrize("layout", ["contiguous", "token-major"])
def test_scan_beyond_2_31_elements(torch: Any, layout: str) -> None:
    u = huge(torch, layout)
    A = -torch.exp2(torch.empty(DIM, 4, device="cuda").uniform_(-4, 4))
    B = torch.empty(1, 4, SEQLEN, dtype=torch.bfloat16, device="cuda").normal_()
    out, last_state = ops.selective_scan(u, u, A, B, B, delta_softplus=True)
    # The last channels on their own, and of them the first steps by the reference.
    tail = slice(DIM - 8, DIM)
    inputs = [u[:, tail], u[:, tail], A[tail], B, B]
    own_out, own_state = ops.selective_scan(*inputs, delta_softplus=True)
    assert_close(to_numpy(out[:, tail]), to_numpy(own_out), "bfloat16", rounded=True)
    assert_close(to_numpy(last_state[:, tail]), to_numpy(own_state), "float32", rounded=True)
    few = [to_numpy(v if v.ndim == 2 else v[..., :500]) for v in inputs]
    expected, _ = reference.selective_scan(*few, delta_softplus=True)
    assert_close(to_numpy(own_out[..., :500]), expected, "bfloat16")
    assert torch.isfinite(out[:, ::512, ::4096]).all()


@pytest.mark.parametrize("layout", ["contiguous", "token-major"])
def test_scan_gradients_beyond_2_31_elements(torch: Any, layout: str) -> None:
    u = huge(torch, layout)
    A = -torch.exp2(torch.empty(DIM, 4, device="cuda").uniform_(-4, 4))
    B = torch.empty(1, 4, SEQLEN, dtype=torch.bfloat16, device="cuda").normal_()
    needs = ("u", "delta", "A", "B")
    all_ = ops.selective_scan_bwd(u, u, u, A, B, B, delta_softplus=True, needs=needs)
    tail = slice(DIM - 8, DIM)
    inputs = [u[:, tail], u[:, tail], u[:, tail], A[tail], B, B]
    own = ops.selective_scan_bwd(*inputs, delta_softplus=True, needs=needs)
    for mine, alone in ((all_.du, own.du), (all_.ddelta, own.ddelta)):
        assert_close(to_numpy(mine[:, tail]), to_numpy(alone), "bfloat16", rounded=True)
        assert torch.isfinite(mine[:, ::512, ::4096]).all()
    assert_close(to_numpy(all_.dA[tail]), to_numpy(own.dA), "float32")
    # Of the last steps nothing depends on the steps before them but the states.
    few = [v if v.ndim == 2 else v[..., -500:] for v in (u, u, u, A, B, B)]
    _, state = ops.selective_scan(
        *(v[..., :-500] if v.ndim > 2 else v for v in (u, u, A, B, B)), delta_softplus=True
    )
    late = ops.selective_scan_bwd(*few, delta_softplus=True, needs=needs, initial_state=state)
    assert_close(to_numpy(all_.dB[..., -500:]), to_numpy(late.dB), "bfloat16", rounded=True)


@pytest.mark.parametrize("layout", ["contiguous", "token-major"])
def test_convolution_beyond_2_31_elements(torch: Any, layout: str) -> None:
    x = huge(torch, layout)
    weight = torch.empty(DIM, 4, device="cuda").normal_()
    out = ops.causal_conv1d(x, weight, None, "silu")
    expected, _ = reference.causal_conv1d(
        to_numpy(x[:, -8:, -100:]), to_numpy(weight[-8:]), None, "silu"
    )
    assert_close(to_numpy(out[:, -8:, -97:]), expected[..., 3:], "bfloat16")


@pytest.mark.parametrize("layout", ["contiguous", "token-major"])
def test_convolution_backward_beyond_2_31_elements(torch: Any, layout: str) -> None:
    x = huge(torch, layout)
    weight = torch.empty(DIM, 4, device="cuda").normal_()
    gradients = ops.causal_conv1d_bwd(x, x, weight, None, "silu")
    tail = to_numpy(x[:, -8:, -100:])
    expected = reference_gradients.causal_conv1d_bwd(
        tail, tail, to_numpy(weight[-8:]), None, "silu"
    )
    assert_close(to_numpy(gradients.dx[:, -8:, -97:]), expected["dx"][..., 3:], "bfloat16")
    own = ops.causal_conv1d_bwd(x[:, -8:], x[:, -8:], weight[-8:], None, "silu")
    assert_close(to_numpy(gradients.dweight[-8:]), to_numpy(own.dweight), "float32")


def test_norm_beyond_2_31_elements(torch: Any) -> None:
    x = huge(torch, "contiguous").reshape(SEQLEN, DIM)
    out = ops.rms_norm(x, None)
    expected, _ = reference.rms_norm(to_numpy(x[-5:]), None)
    assert_close(to_numpy(out[-5:]), expected, "bfloat16")


def test_a_million_steps(torch: Any) -> None:
    u = torch.empty(1, 16, 1_000_000, device="cuda").normal_()
    A = -torch.exp2(torch.empty(16, 16, device="cuda").uniform_(-4, 4))
    B = torch.empty(1, 16, 1_000_000, device="cuda").normal_()
    out, last_state = ops.selective_scan(u, u, A, B, B, delta_softplus=True)
    # Whatever precedes them by 100,000 steps has decayed: the last steps from there on.
    inputs = [to_numpy(v[..., -100_000:] if v.ndim == 3 else v) for v in (u, u, A, B, B)]
    cpu_out, cpu_state = ops.selective_scan(*inputs, delta_softplus=True)
    assert_close(to_numpy(out[..., -1000:]), cpu_out[..., -1000:], "float32")
    assert_close(to_numpy(last_state), cpu_state, "float32")


def test_gradients_of_a_million_steps(torch: Any) -> None:
    u, dout = (torch.empty(1, 16, 1_000_000, device="cuda").normal_() for _ in range(2))
    A = -torch.exp2(torch.empty(16, 16, device="cuda").uniform_(-4, 4))
    B = torch.empty(1, 16, 1_000_000, device="cuda").normal_()
    inputs = (dout, u, u, A, B, B)
    gradients = ops.selective_scan_bwd(*inputs, delta_softplus=True)
    expected = ops.selective_scan_bwd(*map(to_numpy, inputs), delta_softplus=True)
    for mine, of_cpu in zip(gradients, expected, strict=True):
        if mine is not None:
            assert_close(to_numpy(mine), of_cpu, "float32")


@pytest.mark.parametrize("seqlen", [1, 70, 5000])
@pytest.mark.parametrize("dim", [64, 1536])
def test_batch_invariant_scan(torch: Any, dim: int, seqlen: int) -> None:
    u, delta, z = (torch.randn(33, dim, seqlen, device="cuda") for _ in range(3))
    A = -torch.rand(dim, 16, device="cuda")
    B, C = (torch.randn(33, 16, seqlen, device="cuda") for _ in range(2))

    def scan(rows: slice) -> tuple[Any, Any]:
        arrays = (u[rows], delta[rows], A, B[rows], C[rows])
        return ops.selective_scan(*arrays, z=z[rows], delta_softplus=True, batch_invariant=True)

    out, last_state = scan(slice(None))
    for rows in (slice(0, 1), slice(5, 8), slice(32, 33)):
        own_out, own_state = scan(rows)
        assert torch.equal(own_out, out[rows])
        assert torch.equal(own_state, last_state[rows])
