"""ssmcore.torch under torch.compile, torch.export, autocast and activation checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_reference as reference
from helpers import assert_close
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssmcore.torch import Mamba, causal_conv1d_fn, rms_norm_fn, selective_scan_fn


class Mixer(nn.Module):
    """Every differentiable operator, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mamba = Mamba(16, d_state=4)
        self.weight = nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        normed, residual = rms_norm_fn(x, self.weight, None, residual=x, prenorm=True)
        return self.mamba(normed) + residual


def results(model: Any, parameters: list[Tensor], x: Tensor) -> list[Tensor]:
    """The output and the gradients of its squares."""
    out = model(x)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), parameters)]


def assert_all_close(actual: list[Tensor], expected: list[Tensor], dtype: str = "float32") -> None:
    for mine, theirs in zip(actual, expected, strict=True):
        assert_close(mine.float().numpy(), theirs.float().numpy(), dtype)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks(dynamic: bool) -> None:
    torch.compiler.reset()
    model = Mixer()
    parameters = list(model.parameters())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for seqlen in (9, 70):
        x = torch.randn(2, seqlen, 16)
        assert_all_close(results(compiled, parameters, x), results(model, parameters, x))


def test_compile_of_states_and_packed_sequences() -> None:
    torch.compiler.reset()
    cu_seqlens = torch.tensor([0, 3, 9], dtype=torch.int32)

    def scan(u: Tensor, A: Tensor, B: Tensor, initial_state: Tensor) -> Any:
        x = causal_conv1d_fn(u, A, activation="silu", cu_seqlens=cu_seqlens)
        return selective_scan_fn(
            x,
            u,
            A,
            B,
            B,
            delta_softplus=True,
            return_last_state=True,
            initial_state=initial_state,
            cu_seqlens=cu_seqlens,
        )

    inputs = (torch.randn(1, 6, 9), -torch.rand(6, 3), torch.randn(1, 3, 9), torch.randn(2, 6, 3))
    compiled = torch.compile(scan, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(*inputs), scan(*inputs), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    model, x = Mixer(), torch.randn(2, 9, 16)
    program = torch.export.export(model, (x,), strict=strict)
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"ssmcore.rms_norm.default", "ssmcore.mamba_block_train.default"} <= operators
    with torch.no_grad():
        assert_close(program.module()(x).numpy(), model(x).numpy(), "float32")


def test_autocast() -> None:
    model = Mixer().mamba
    x = torch.randn(2, 70, 16)
    parameters = list(model.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
        assert out.dtype == torch.bfloat16
    gradients = torch.autograd.grad(out.float().square().sum(), parameters)
    for gradient, parameter in zip(gradients, parameters, strict=True):
        assert gradient.dtype == parameter.dtype
    expected = reference.mamba_block(model, x)
    exact = torch.autograd.grad(expected.square().sum(), parameters)
    # Sums over 140 steps of products that were rounded to 8 bits at every stage.
    for mine, theirs in zip((out, *gradients), (expected, *exact), strict=True):
        error = (mine.float() - theirs).abs().max() / theirs.abs().max()
        assert error < 0.05


def test_autocast_lets_types_follow_u() -> None:
    u, z = torch.randn(2, 1, 6, 9, dtype=torch.bfloat16)
    A, B = -torch.rand(6, 3), torch.randn(1, 3, 9)
    with pytest.raises(ValueError, match="selective_scan: B"):
        selective_scan_fn(u, u, A, B, B, z=z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = selective_scan_fn(u, u, A, B, B, z=z)
    rounded = B.bfloat16()
    assert torch.equal(out, selective_scan_fn(u, u, A, rounded, rounded, z=z))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant: bool) -> None:
    model = Mixer()
    parameters = list(model.parameters())
    x = torch.randn(2, 70, 16, requires_grad=True)

    def gradients(out: Tensor) -> list[Tensor]:
        model.zero_grad()
        out.square().sum().backward()
        return [parameter.grad.clone() for parameter in parameters]

    checkpointed = gradients(checkpoint(model, x, use_reentrant=use_reentrant))
    for mine, theirs in zip(checkpointed, gradients(model(x)), strict=True):
        assert torch.equal(mine, theirs)
