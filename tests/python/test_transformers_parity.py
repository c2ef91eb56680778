"""Random models saved by transformers give its logits."""

import json

import numpy as np
import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

import ssmcore

BASE = dict(
    vocab_size=37, hidden_size=24, state_size=5, num_hidden_layers=2, conv_kernel=4, expand=2,
    time_step_rank=3, use_bias=False, use_conv_bias=True, tie_word_embeddings=True,
)  # fmt: skip
VARIATIONS = [
    {},
    {"vocab_size": 101},
    {"hidden_size": 7},
    {"hidden_size": 33, "expand": 3},
    {"hidden_size": 64, "state_size": 16, "time_step_rank": "auto"},
    {"state_size": 1},
    {"state_size": 17},
    {"num_hidden_layers": 1},
    {"num_hidden_layers": 5},
    {"conv_kernel": 2},
    {"conv_kernel": 3},
    {"time_step_rank": 1},
    {"layer_norm_epsilon": 1e-3},
    {"use_bias": True},
    {"use_conv_bias": False},
    {"tie_word_embeddings": False},
    {"tie_word_embeddings": False, "use_bias": True, "use_conv_bias": False, "conv_kernel": 2},
]


def make_model(**changes):
    """A transformers model with random weights, none of them left at a special value."""
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(**{**BASE, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def random_ids(model, *shape):
    return torch.randint(0, model.config.vocab_size, shape, generator=torch.Generator())


def assert_same_logits(folder, model):
    ids = random_ids(model, 2, 29)
    with torch.no_grad():
        expected = model(ids).logits.numpy()
    loaded = ssmcore.load(folder)
    logits, _ = loaded.forward(ids.numpy())
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
    first, state = loaded.forward(ids[:, :11].numpy())
    second, _ = loaded.forward(ids[:, 11:].numpy(), state)
    parts = np.concatenate([first, second], axis=1)
    np.testing.assert_allclose(parts, expected, rtol=0, atol=1e-4)
    return loaded


@pytest.mark.parametrize("changes", VARIATIONS, ids=str)
def test_logits(tmp_path, changes):
    model = make_model(**changes)
    model.save_pretrained(tmp_path)
    loaded = assert_same_logits(tmp_path, model)
    assert loaded.num_parameters == model.num_parameters()
    assert loaded.config.vocab_size == model.config.vocab_size


def test_shards(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_same_logits(tmp_path, model)


def test_torch_file_in_the_names_of_transformers(tmp_path):
    model = make_model(tie_word_embeddings=False)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert_same_logits(tmp_path, model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_half_precision(tmp_path, dtype):
    model = make_model().to(dtype)
    model.save_pretrained(tmp_path)
    assert_same_logits(tmp_path, model.float())


def test_infinity_in_the_config(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for infinity in (float("inf"), "Infinity"):
        path.write_text(json.dumps({**config, "time_step_limit": [0.0, infinity]}))
        assert_same_logits(tmp_path, model)


def test_greedy_continuation(tmp_path):
    model = make_model(hidden_size=48, tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    ids = random_ids(model, 1, 9)
    expected = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None)
    continuation = ssmcore.load(tmp_path).generate(ids[0], 20, ignore_eos=True)
    assert continuation == expected[0, 9:].tolist()
