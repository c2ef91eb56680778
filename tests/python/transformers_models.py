"""Small random models of transformers."""

import torch
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

BASE = dict(
    vocab_size=37, hidden_size=24, state_size=5, num_hidden_layers=2, conv_kernel=4, expand=2,
    time_step_rank=3, use_bias=False, use_conv_bias=True, tie_word_embeddings=True,
)  # fmt: skip


def make_model(**changes):
    """A transformers model with random weights, none of them left at a special value."""
    return make_random(MambaForCausalLM, MambaConfig(**{**BASE, **changes}))


def make_falcon(**changes):
    return make_random(FalconMambaForCausalLM, FalconMambaConfig(**{**BASE, **changes}))


def make_random(model_class, config):
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def random_ids(model, *shape):
    return torch.randint(0, model.config.vocab_size, shape, generator=torch.Generator())
