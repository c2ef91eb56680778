"""What the functions ask of their tensors, and the types they are computed in."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def check_tensors(op: str, **tensors: Tensor | None) -> None:
    """Raises TypeError for what is not a plain tensor, RuntimeError for mixed devices.

    `op` names the function in messages. Absent tensors are None; the first is not.
    """
    first: str | None = None
    device = None
    for name, tensor in tensors.items():
        if tensor is None and first is not None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} is a {type(tensor).__name__}, expected a torch.Tensor")
        if is_traceable_wrapper_subclass(tensor):
            raise TypeError(
                f"{op}: {name} is a {type(tensor).__name__}, expected a plain torch.Tensor: pass "
                "the local tensor that it wraps"
            )
        if tensor.layout != torch.strided:
            raise TypeError(f"{op}: {name} has layout {tensor.layout}, expected torch.strided")
        if first is None:
            first, device = name, tensor.device
        elif tensor.device != device:
            raise RuntimeError(
                f"{op}: expected all tensors on one device, but {first} is on {device} and "
                f"{name} on {tensor.device}"
            )


def check_no_gradient(op: str, written: str, **tensors: Tensor | None) -> None:
    """Raises RuntimeError if gradients are wanted of an operator that changes `written`."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(
                f"{op}: {name} requires grad, but {written} is changed in place and no gradient "
                "is recorded: call it under torch.no_grad(), or detach the tensor"
            )


def parameter_dtype(x: Tensor) -> torch.dtype:
    """The type of A, D, biases of delta and states beside activations like `x`."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@overload
def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor: ...
@overload
def cast(tensor: None, dtype: torch.dtype) -> None: ...
def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """`tensor` in `dtype`, itself where it is; complex tensors stay complex."""
    if tensor is None or tensor.dtype == dtype or tensor.dtype.is_complex:
        return tensor
    return tensor.to(dtype)


def cast_weight(tensor: Tensor | None, x: Tensor) -> Tensor | None:
    """A weight that may have the type of `x` or float32, as one of these."""
    if tensor is None or tensor.dtype == x.dtype:
        return tensor
    return cast(tensor, parameter_dtype(x))


def is_autocast(x: Tensor) -> bool:
    device = x.device.type  # others, such as meta, may have no autocast
    return device in ("cpu", "cuda") and torch.is_autocast_enabled(device)


def empty_like(x: Tensor) -> Tensor:
    """Memory for an output like a (B, D, L) tensor, laid out as `ssmcore.ops` does."""
    if x.dim() == 3 and x.shape[2] > 1 and 0 < x.stride(1) < x.stride(2):
        batch, dim, seqlen = x.shape
        return x.new_empty((batch, seqlen, dim)).transpose(1, 2)
    return x.new_empty(x.shape)


def zeros_like(x: Tensor) -> Tensor:
    """Zeros of the shape of `x`, in the memory of one."""
    return x.new_zeros(()).expand(x.shape)
