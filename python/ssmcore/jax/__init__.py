"""Differentiable operators for JAX, on the kernels of ssmcore, as calls in programs of XLA.

    from ssmcore.jax import mamba_block, selective_scan

They work inside `jit`, `grad`, `vjp`, `vmap` and what is made of these, on arrays of the CPU and,
where ssmcore is built with CUDA, of a GPU; for gradients in reverse and of first order. ssmcore has
them if jaxlib was installed where it was built, as its XLA calls take jaxlib's headers.
"""

from __future__ import annotations

from .block import mamba_block
from .convolution import causal_conv1d
from .scan import selective_scan

__all__ = ["causal_conv1d", "mamba_block", "selective_scan"]
