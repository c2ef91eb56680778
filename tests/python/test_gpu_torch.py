"""ssmcore.torch's gradients on a GPU, beside those on the CPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from backends import require_cuda
from helpers import relative_error
from torch import Tensor

from ssmcore import ops
from ssmcore.torch import Mamba, MambaConfig, MambaLMHeadModel
from ssmcore.torch._block_parameters import block_parameters, by_name

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def _gpu() -> None:
    require_cuda()


def gradients(model: torch.nn.Module, x: Tensor, **inputs: Any) -> list[Tensor]:
    """Of a fixed loss by the input and every parameter, on the CPU."""
    out = model(x, **inputs)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out.shape, generator=generator).to(out.device)
    found = torch.autograd.grad((out.float() * weight).sum(), [x, *model.parameters()])
    return [out.detach().float().cpu(), *(gradient.float().cpu() for gradient in found)]


def assert_all_close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for mine, theirs in zip(actual, expected, strict=True):
        if not theirs.any():  # A plays no part in a single step
            assert not mine.any()
        else:
            assert relative_error(mine.numpy(), theirs.numpy()) <= tolerance


@pytest.fixture
def block() -> Mamba:
    torch.manual_seed(0)
    return Mamba(48, bias=True)


@pytest.mark.parametrize("seqlen", [1, 70, 1000])
def test_block(block: Mamba, seqlen: int) -> None:
    x = torch.randn(2, seqlen, 48, requires_grad=True)
    expected = gradients(block, x)
    on_gpu = copy.deepcopy(block).cuda()
    moved = x.detach().cuda().requires_grad_()
    actual = gradients(on_gpu, moved)
    assert_all_close(actual, expected, 5e-5)
    assert all(map(torch.equal, gradients(on_gpu, moved), actual))  # the same bits
    with torch.autocast("cuda", torch.bfloat16):
        assert_all_close(gradients(on_gpu, moved), expected, 5e-2)
    compiled = torch.compile(on_gpu, fullgraph=True, backend="aot_eager")
    assert_all_close(gradients(compiled, moved), expected, 5e-5)


def test_packed_sequences(block: Mamba) -> None:
    x = torch.randn(1, 100, 48, requires_grad=True)
    cu_seqlens = torch.tensor([0, 7, 7, 100], dtype=torch.int32)
    expected = gradients(block, x, cu_seqlens=cu_seqlens)
    moved = x.detach().cuda().requires_grad_()
    actual = gradients(block.cuda(), moved, cu_seqlens=cu_seqlens.cuda())
    assert_all_close(actual, expected, 5e-5)


def test_block_operator_with_states(block: Mamba) -> None:
    """The operators' own form: states in and out, little kept, gradients of states."""
    torch.manual_seed(1)
    arrays = {
        "x": torch.randn(2, 130, 48),
        "initial_conv_state": torch.randn(2, 96, 3),
        "initial_ssm_state": torch.randn(2, 96, 16),
    }
    given = {
        "dout": torch.randn(2, 130, 48),
        "dfinal_conv_state": torch.randn(2, 96, 3),
        "dlast_ssm_state": torch.randn(2, 96, 16),
    }
    weights = by_name(*block_parameters(block, torch.float32))

    def run(device: str) -> list[Tensor]:
        moved = {name: value.to(device) for name, value in arrays.items()}
        moved_weights = {name: value.detach().to(device) for name, value in weights.items()}
        x = moved.pop("x")
        out, saved, *states = ops.mamba_block_train_fwd(
            x, moved_weights, **moved, return_states=True
        )
        dx, dweights, *dstates = ops.mamba_block_bwd(
            x=x,
            weights=moved_weights,
            saved=saved,
            **moved,
            **{name: value.to(device) for name, value in given.items()},
        )
        assert dweights.keys() == weights.keys()
        return [t.cpu() for t in (out, *states, dx, *dweights.values(), *dstates)]

    assert_all_close(run("cuda"), run("cpu"), 5e-5)


def test_training_step_in_a_graph() -> None:
    torch.manual_seed(0)
    config = MambaConfig(d_model=32, n_layer=2, vocab_size=61)
    model = MambaLMHeadModel(config, device="cuda")
    ids = torch.randint(0, 61, (2, 90), device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        logits = model(ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        return loss.detach()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    reference = copy.deepcopy(model)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    losses = []
    for _ in range(3):
        graph.replay()
        losses.append(loss.item())
    model, optimizer = reference, torch.optim.SGD(reference.parameters(), lr=0.1)
    assert [step().item() for _ in range(3)] == losses
