"""The operators of selective state space models, on NumPy, torch, CuPy, JAX and other arrays.

Outputs are arrays of the library that the first argument belongs to; inputs are never copied, may
be read-only and may have any non-negative strides. What is updated in place must be writable, which
JAX arrays never are. Shapes use the field's names: B batch, L sequence length, D channels, N state
size, G groups, W convolution width. Activations are float32, bfloat16 (NumPy: ml_dtypes) or
float16, one type in a call; A, D, biases of delta, and the scan's states are float32.

Packed sequences lie one after another in a batch of 1, sequence s in the steps
[cu_seqlens[s], cu_seqlens[s + 1]) of (S + 1,) int32 `cu_seqlens`; states are then (S, ...).

On a GPU a call runs on the current stream of the first argument's library, and returns before it is
done where all arrays belong to that library. Indices (`cu_seqlens`, `state_indices`, token ids, …)
cannot be looked at before it runs: bad ones are never followed, and reported by the next call on
the device, by `ssmcore.synchronize`, or at once with `check=True`, which waits for the call. So are
slots that `state_indices` names twice, whose states are then undefined. With
`batch_invariant=True` the bits of a row's result do not depend on its batch, for some speed; on the
CPU they never do.

Every function raises `ssmcore.InvalidArgumentError`, naming the argument, what was expected and
what came, for a shape, dtype, device or value that does not fit.
"""

from __future__ import annotations

from .block import mamba_block
from .block_gradients import (
    MambaBlockGradients,
    MambaBlockSaved,
    mamba_block_bwd,
    mamba_block_train_fwd,
)
from .convolution import causal_conv1d, causal_conv1d_update
from .convolution_gradients import CausalConv1dGradients, causal_conv1d_bwd
from .dense import embedding, linear, rms_norm
from .dense_gradients import (
    LinearGradients,
    RmsNormGradients,
    embedding_bwd,
    linear_bwd,
    rms_norm_bwd,
)
from .loss import cross_entropy, cross_entropy_bwd
from .optimizer import adamw, sum_of_squares
from .sampling import sample
from .scan import selective_scan, selective_state_update
from .scan_gradients import SelectiveScanGradients, selective_scan_bwd

__all__ = [
    "CausalConv1dGradients",
    "LinearGradients",
    "MambaBlockGradients",
    "MambaBlockSaved",
    "RmsNormGradients",
    "SelectiveScanGradients",
    "adamw",
    "causal_conv1d",
    "causal_conv1d_bwd",
    "causal_conv1d_update",
    "cross_entropy",
    "cross_entropy_bwd",
    "embedding",
    "embedding_bwd",
    "linear",
    "linear_bwd",
    "mamba_block",
    "mamba_block_bwd",
    "mamba_block_train_fwd",
    "rms_norm",
    "rms_norm_bwd",
    "sample",
    "selective_scan",
    "selective_scan_bwd",
    "selective_state_update",
    "sum_of_squares",
]
