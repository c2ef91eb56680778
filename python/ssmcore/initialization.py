"""New models, whose weights are random."""

from __future__ import annotations

import json

from ssmcore import _core
from ssmcore._cublaslt import find_cublaslt
from ssmcore.errors import InvalidArgumentError
from ssmcore.loading import dtype_of, resolved_device
from ssmcore.model import Model
from ssmcore.ops._arguments import require_size
from ssmcore.tokenizer import ByteTokenizer, Tokenizer


def create(
    d_model: int,
    n_layer: int,
    vocab_size: int = 256,
    *,
    dstate: int = 16,
    width: int = 4,
    expand: float = 2,
    dt_rank: int | None = None,
    tie_embeddings: bool = True,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    tokenizer: Tokenizer | None = None,
) -> Model:
    """Makes a trainable Mamba model with random weights, drawn as the published implementation
    draws them; the same `seed` gives the same weights.

    Args:
        d_model: width of the layers.
        n_layer: how many there are.
        vocab_size: tokens.
        dstate, width: the scan's state size N, and the convolution's width.
        expand: channels of the scan, as a multiple of `d_model`.
        dt_rank: rank of the Δ projection; None: ⌈d_model / 16⌉.
        tie_embeddings: the head is the embedding.
        seed: of the random numbers.
        device, dtype: as in `load`; the weights are float32.
        tokenizer: of the model; None: one token a byte if `vocab_size` is 256, else none.

    Raises:
        InvalidArgumentError: for a size out of range, an unknown device or dtype.
    """
    sizes = {"d_model": d_model, "n_layer": n_layer, "vocab_size": vocab_size, "dstate": dstate}
    for name, size in sizes.items():
        require_size(size, f"create: {name}")
    config = config_of(
        d_model,
        n_layer,
        vocab_size,
        dstate=dstate,
        width=width,
        expand=expand,
        dt_rank=dt_rank,
        tie_embeddings=tie_embeddings,
    )
    if not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise InvalidArgumentError(f"create: seed is {seed!r}, expected an integer in [0, 2^64)")
    where = resolved_device(device)
    if where != "cpu":
        find_cublaslt()
    language_model = _core.LanguageModel(
        _core.Checkpoint.initial(config, seed), dtype_of(dtype), True, where
    )
    if tokenizer is None and vocab_size == 256:
        tokenizer = ByteTokenizer()
    return Model(language_model, tokenizer)


def config_of(
    d_model: int,
    n_layer: int,
    vocab_size: int,
    *,
    dstate: int = 16,
    width: int = 4,
    expand: float = 2,
    dt_rank: int | None = None,
    tie_embeddings: bool = True,
) -> _core.ModelConfig:
    """The configuration of a Mamba model without an end-of-sequence token; see `create`."""
    fields = {
        "model_type": "mamba",
        "hidden_size": d_model,
        "num_hidden_layers": n_layer,
        "vocab_size": vocab_size,
        "state_size": dstate,
        "conv_kernel": width,
        "expand": expand,
        "time_step_rank": dt_rank,
        "tie_word_embeddings": tie_embeddings,
        "eos_token_id": None,
    }
    return _core.parse_model_config(json.dumps(fields))
