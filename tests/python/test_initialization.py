"""The weights of new models."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import assert_same_bits, refuses

import ssmcore

D_MODEL, LAYERS, DIM, RANK = 48, 3, 96, 3


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return ssmcore.create(D_MODEL, LAYERS, 1000, tie_embeddings=False, device="cpu").parameters


def assert_uniform(values: np.ndarray, bound: float) -> None:
    """Of ±bound: Kolmogorov's and Smirnov's distance to the distribution, at one in 10⁵."""
    values = np.sort(values.reshape(-1).astype(np.float64))
    assert -bound <= values[0] and values[-1] <= bound
    expected = (values / bound + 1) / 2
    steps = np.arange(values.size + 1) / values.size
    distance = max(np.abs(expected - steps[1:]).max(), np.abs(expected - steps[:-1]).max())
    assert distance < math.sqrt(-0.5 * math.log(0.5e-5)) / math.sqrt(values.size)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_layers_are_as_published(weights: dict[str, np.ndarray], layer: int) -> None:
    mixer = {
        name.split(".mixer.")[1]: weight
        for name, weight in weights.items()
        if f".{layer}.mixer." in name
    }
    assert_same_bits(mixer["A_log"], np.tile(np.log(np.arange(1, 17)), (DIM, 1)).astype(np.float32))
    assert_same_bits(mixer["D"], np.ones(DIM, np.float32))
    assert_uniform(mixer["in_proj.weight"], D_MODEL**-0.5)
    assert_uniform(mixer["x_proj.weight"], DIM**-0.5)
    assert_uniform(mixer["dt_proj.weight"], RANK**-0.5)
    assert_uniform(mixer["out_proj.weight"], DIM**-0.5 / math.sqrt(LAYERS))
    assert_uniform(mixer["conv1d.weight"], 0.5)
    assert_uniform(mixer["conv1d.bias"], 0.5)
    delta = np.log1p(np.exp(mixer["dt_proj.bias"].astype(np.float64)))
    centre, half = (math.log(1e-3) + math.log(1e-1)) / 2, math.log(100) / 2
    assert_uniform(np.log(delta) - centre, half * (1 + 1e-6))


def test_bounds_are_those_of_torch() -> None:
    """Of layers that the published implementation leaves as torch initialises them."""
    torch.manual_seed(0)
    assert_uniform(torch.nn.Linear(D_MODEL, 400).weight.detach().numpy(), D_MODEL**-0.5)
    convolution = torch.nn.Conv1d(2000, 2000, 4, groups=2000)
    assert_uniform(convolution.weight.detach().numpy(), 0.5)
    assert convolution.bias is not None
    assert_uniform(convolution.bias.detach().numpy(), 0.5)


def test_embedding_is_normal(weights: dict[str, np.ndarray]) -> None:
    embedding = weights["backbone.embeddings.weight"].astype(np.float64) / 0.02
    count = embedding.size
    assert abs(embedding.mean()) < 4.5 / math.sqrt(count)
    assert abs(embedding.std() - 1) < 4.5 / math.sqrt(2 * count)
    for deviations, share in ((1, 0.682689), (2, 0.954500), (3, 0.997300)):
        within = (np.abs(embedding) < deviations).mean()
        assert abs(within - share) < 4.5 * math.sqrt(share * (1 - share) / count)


def test_rest(weights: dict[str, np.ndarray]) -> None:
    assert_uniform(weights["lm_head.weight"], D_MODEL**-0.5)
    norms = [name for name in weights if "norm" in name]
    assert len(norms) == LAYERS + 1
    for name in norms:
        assert_same_bits(weights[name], np.ones(D_MODEL, np.float32))


def test_no_two_tensors_are_alike(weights: dict[str, np.ndarray]) -> None:
    firsts = [weight.reshape(-1)[:8] for name, weight in weights.items() if "proj" in name]
    for i, a in enumerate(firsts):
        for b in firsts[:i]:
            assert abs(np.corrcoef(a, b)[0, 1]) < 0.999


def test_seed_decides() -> None:
    once, again, other = (
        ssmcore.create(16, 1, seed=seed, device="cpu").parameters for seed in (5, 5, 6)
    )
    for name, weight in once.items():
        assert_same_bits(again[name], weight)
        constant = name.endswith(("A_log", ".D")) or "norm" in name
        assert np.array_equal(other[name], weight) == constant


def test_sizes() -> None:
    model = ssmcore.create(24, 2, 300, dstate=8, width=3, expand=1.5, dt_rank=5)
    config = model.config
    assert (config.d_model, config.n_layer, config.vocab_size) == (24, 2, 300)
    assert (config.dstate, config.width, config.dim, config.dt_rank) == (8, 3, 36, 5)
    assert config.tie_embeddings and config.eos_token_ids == []
    assert model.tokenizer is None and ssmcore.create(8, 1).tokenizer is not None


def test_refuses() -> None:
    for changes in ({"d_model": 0}, {"n_layer": -1}, {"width": 9}, {"vocab_size": 0}):
        with pytest.raises(ssmcore.InvalidArgumentError):
            ssmcore.create(**{"d_model": 8, "n_layer": 1, **changes})
    with refuses("create", "seed", "-1"):
        ssmcore.create(8, 1, seed=-1)
