"""Registering operators with PyTorch, under the namespace ssmcore.

Through `torch.library.Library` itself: what its `custom_op` adds to every call would be most of the
time that a single token takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_LIBRARY: Any = torch.library.Library("ssmcore", "DEF")  # type: ignore[no-untyped-call]


def operator(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function as the operator of a schema, and gives what calls it.

    It computes on the CPU and on CUDA. Its results share no memory with each other or an argument.
    """
    name = schema.partition("(")[0]

    def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
        _LIBRARY.define(schema)
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(name, kernel, key)
        overload: Callable[..., Any] = getattr(torch.ops.ssmcore, name).default
        return overload

    return register


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers what gives outputs of the shapes, types and strides of ssmcore::name."""
    register: Callable[..., Any] = torch.library.register_fake(f"ssmcore::{name}", lib=_LIBRARY)
    return register


def differentiable(
    name: str, backward: Callable[..., Any], setup_context: Callable[..., Any]
) -> None:
    """Registers the gradients of ssmcore::name, as `torch.library.register_autograd` takes them.

    They are computed by ssmcore::name_bwd, which has none itself, and says so.
    """

    def refuse(ctx: Any, *gradients: Any) -> None:
        raise RuntimeError(f"ssmcore::{name}: second derivatives are not supported")

    torch.library.register_autograd(
        f"ssmcore::{name}", backward, setup_context=setup_context, lib=_LIBRARY
    )
    torch.library.register_autograd(f"ssmcore::{name}_bwd", refuse, lib=_LIBRARY)


def spread(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """The gradients of the inputs that need one, with None for the others."""
    given = iter(gradients)
    return [next(given) if need else None for need in needs]


def count_as_written(tensor: Tensor) -> None:
    """Lets autograd see that an operator has changed a tensor that a backward pass may need."""
    if not torch.compiler.is_compiling() and not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)
