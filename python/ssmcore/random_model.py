"""Models of the published shapes with random weights, for measuring: speed does not depend on what
the weights say, only on their not being zeros."""

from __future__ import annotations

import numpy as np

from ssmcore import _core
from ssmcore._arrays import numpy_dtype
from ssmcore.initialization import config_of

SHAPES = {  # d_model, layers
    "130m": (768, 24),
    "370m": (1024, 48),
    "790m": (1536, 48),
    "1.4b": (2048, 48),
    "2.8b": (2560, 64),
}
_VOCAB_SIZE, _DSTATE, _WIDTH = 50280, 16, 4


def random_checkpoint(shape: str, dtype: str) -> _core.Checkpoint:
    """A Mamba checkpoint of the published shape, its matrices of `dtype`.

    Matrices are pieces of one block of random numbers, so that making gigabytes takes little time
    and memory; activations stay in range.
    """
    d_model, layers = SHAPES[shape]
    dim, dt_rank = 2 * d_model, d_model // 16
    generator = np.random.default_rng(0)

    def uniform(least: float, most: float, *size: int) -> np.ndarray:
        numbers: np.ndarray = generator.random(size, np.float32) * (most - least) + least
        return numbers

    block = uniform(-0.03, 0.03, _VOCAB_SIZE * d_model).astype(numpy_dtype(dtype))
    tensors: dict[str, np.ndarray] = {}

    def matrix(name: str, rows: int, columns: int) -> None:
        apart = 64 * 1009  # elements between the beginnings of two pieces
        begin = len(tensors) * apart % (block.size - rows * columns + 1)
        tensors[name] = block[begin : begin + rows * columns].reshape(rows, columns)

    matrix("backbone.embeddings.weight", _VOCAB_SIZE, d_model)
    tensors["backbone.norm_f.weight"] = uniform(0.9, 1.1, d_model)
    A_log = np.tile(np.log(np.arange(1, _DSTATE + 1, dtype=np.float32)), (dim, 1))
    for i in range(layers):
        layer = f"backbone.layers.{i}."
        tensors[f"{layer}norm.weight"] = uniform(0.9, 1.1, d_model)
        matrix(f"{layer}mixer.in_proj.weight", 2 * dim, d_model)
        tensors[f"{layer}mixer.conv1d.weight"] = uniform(-0.5, 0.5, dim, 1, _WIDTH)
        tensors[f"{layer}mixer.conv1d.bias"] = uniform(-0.1, 0.1, dim)
        matrix(f"{layer}mixer.x_proj.weight", dt_rank + 2 * _DSTATE, dim)
        matrix(f"{layer}mixer.dt_proj.weight", dim, dt_rank)
        tensors[f"{layer}mixer.dt_proj.bias"] = uniform(-6, -3, dim)
        tensors[f"{layer}mixer.A_log"] = A_log
        tensors[f"{layer}mixer.D"] = uniform(0.9, 1.1, dim)
        matrix(f"{layer}mixer.out_proj.weight", d_model, dim)
    return _core.Checkpoint.from_tensors(config_of(d_model, layers, _VOCAB_SIZE), tensors)
