"""One call of each operator, for tests of what arrays it takes."""

from __future__ import annotations

from typing import Any

import numpy as np
from cases import ConvCase, ConvUpdateCase, LinearCase, NormCase, ScanCase, StateUpdateCase
from helpers import DTYPES

# Its arguments by name, for a dtype.
CALLS: dict[str, Any] = {
    "selective_scan": lambda dtype: ScanCase(dtype=dtype).inputs(),
    "selective_state_update": lambda dtype: StateUpdateCase(dtype=dtype).inputs(),
    "causal_conv1d": lambda dtype: ConvCase(dtype=dtype).inputs(),
    "causal_conv1d_update": lambda dtype: ConvUpdateCase(dtype=dtype).inputs(),
    "rms_norm": lambda dtype: NormCase(dtype=dtype, residual_dtype=dtype, shape=(2, 96)).inputs(),
    "linear": lambda dtype: LinearCase(dtype=dtype, weight_dtype=dtype, rows=(2,)).inputs(),
    "embedding": lambda dtype: {
        "token_ids": np.array([[1, 2], [3, 0]]),
        "weight": np.arange(20).reshape(4, 5).astype(DTYPES[dtype]),
    },
    "sample": lambda dtype: {"logits": np.arange(12, dtype=np.float32).reshape(3, 4)},
}

# The operators that change an argument.
IN_PLACE = {"selective_state_update": "state", "causal_conv1d_update": "conv_state"}


def as_tuple(results: Any) -> tuple[Any, ...]:
    return results if isinstance(results, tuple) else (results,)
