"""The modules of ssmcore.torch: Mamba, the language model, their parameters and files."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
import torch_reference as reference
from helpers import assert_close
from model_fixtures import BUNDLED, UPSTREAM, golden
from test_golden_ops import load
from transformers import MambaForCausalLM

import ssmcore
from ssmcore.torch import (
    InferenceParams,
    Mamba,
    MambaConfig,
    MambaLMHeadModel,
    from_transformers_names,
    mamba_inner_fn,
    to_transformers_names,
)

SMALL = MambaConfig(d_model=24, n_layer=2, vocab_size=37, ssm_cfg={"d_state": 5})


def test_importing_ssmcore_does_not_import_torch() -> None:
    code = "import sys, ssmcore; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- Mamba ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"conv_bias": False, "bias": True},
        {"d_state": 5, "d_conv": 2, "expand": 3, "dt_rank": 3},
    ],
)
def test_block_and_its_gradients(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    mamba = Mamba(16, **options).double()
    x = torch.randn(2, 70, 16, dtype=torch.float64, requires_grad=True)
    inputs = [x, *mamba.parameters()]
    actual, expected = mamba(x), reference.mamba_block(mamba, x)
    assert_close(actual.detach().numpy(), expected.detach().numpy(), "float64")
    weight = torch.randn_like(expected)
    gradients = [torch.autograd.grad(out, inputs, weight) for out in (actual, expected)]
    for mine, theirs in zip(*gradients, strict=True):
        assert_close(mine.numpy(), theirs.numpy(), "float64")


def test_block_with_a_computed_weight() -> None:
    """Parametrised, as for weight norm, or pruned: gradients reach what it is computed from."""
    torch.manual_seed(0)
    plain = Mamba(16)
    x = torch.randn(1, 9, 16)
    changed = copy.deepcopy(plain)
    torch.nn.utils.parametrizations.weight_norm(changed.in_proj)
    assert_close(changed(x).detach().numpy(), plain(x).detach().numpy(), "float32")
    changed(x).sum().backward()
    assert changed.in_proj.parametrizations.weight.original1.grad.any()
    torch.nn.utils.prune.random_unstructured(plain.out_proj, "weight", 0.5)
    expected = reference.mamba_block(plain, x)
    assert_close(plain(x).detach().numpy(), expected.detach().numpy(), "float32")


def test_golden_block() -> None:
    tensors = load("mamba_block")
    parameters = {k.removeprefix("p."): v for k, v in tensors.items() if k.startswith("p.")}
    (dim, dstate), width = parameters["A_log"].shape, parameters["conv1d.weight"].shape[2]
    x = torch.from_numpy(tensors["x"]).requires_grad_()
    mamba = Mamba(x.shape[2], d_state=dstate, d_conv=width, expand=dim // x.shape[2])
    mamba.load_state_dict({name: torch.from_numpy(value) for name, value in parameters.items()})
    out = mamba(x)
    assert_close(out.detach().numpy(), tensors["out"], "float32", rounded=True)
    out.backward(torch.from_numpy(tensors["dout"]))
    assert_close(x.grad.numpy(), tensors["dx"], "float32", rounded=True)
    for name, parameter in mamba.named_parameters():
        assert_close(parameter.grad.numpy(), tensors[f"dp.{name}"], "float32", rounded=True)


def test_initialisation() -> None:
    torch.manual_seed(0)
    mamba = Mamba(256, d_state=4, dt_min=0.01, dt_max=0.2)
    dt = F.softplus(mamba.dt_proj.bias)
    assert dt.min() >= 0.0099
    assert dt.max() <= 0.201
    logs = (dt.log() - math.log(0.01)) / math.log(0.2 / 0.01)
    assert abs(logs.mean() - 0.5) < 0.05  # log-uniform
    assert torch.allclose(mamba.A_log[3].exp(), torch.tensor([1.0, 2, 3, 4]))
    assert torch.equal(mamba.D, torch.ones(512))
    assert mamba.dt_proj.weight.abs().max() <= 16**-0.5
    assert mamba.A_log._no_weight_decay
    assert mamba.D._no_weight_decay
    assert mamba.dt_proj.bias._no_reinit
    assert torch.equal(Mamba(8, dt_init="constant").dt_proj.weight, torch.ones(16, 1))
    assert Mamba(8, dtype=torch.bfloat16).A_log.dtype == torch.float32
    with pytest.raises(NotImplementedError, match="dt_init"):
        Mamba(8, dt_init="other")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_equal_the_sequence(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    mamba = Mamba(16, layer_idx=0, dtype=dtype)
    x = torch.randn(2, 9, 16, dtype=dtype)
    tolerance = "float32" if dtype == torch.float32 else "bfloat16"
    with torch.no_grad():
        whole = mamba(x).float().numpy()
        params = InferenceParams(max_seqlen=9, max_batch_size=2)
        read = mamba(x[:, :5], inference_params=params)
        params.seqlen_offset = 5
        states = params.key_value_memory_dict[0]
        steps = [mamba(x[:, 5:6], inference_params=params)]
        for t in range(6, 9):
            out, *given = mamba.step(x[:, t : t + 1], *states)
            assert all(a is b for a, b in zip(given, states, strict=True))
            steps.append(out)
        assert_close(torch.cat([read, *steps], 1).float().numpy(), whole, tolerance, rounded=True)
        inputs = F.linear(x, mamba.in_proj.weight)[..., :32].transpose(1, 2)
        assert torch.allclose(states[0].float(), inputs[..., -4:].float(), rtol=1e-2, atol=1e-2)
        params.seqlen_offset = 0
        again = mamba(x[:, :5], inference_params=params)
        assert torch.equal(again, read)


def test_packed_sequences_equal_separate_ones() -> None:
    torch.manual_seed(0)
    model = MambaLMHeadModel(SMALL)
    ids = torch.randint(0, 37, (1, 40))
    cu_seqlens = torch.tensor([0, 7, 40], dtype=torch.int32)
    packed = model(ids, cu_seqlens=cu_seqlens).logits
    separate = torch.cat([model(ids[:, :7]).logits, model(ids[:, 7:]).logits], dim=1)
    assert_close(packed.detach().numpy(), separate.detach().numpy(), "float32")
    parameters = list(model.parameters())
    gradients = [torch.autograd.grad(out.square().mean(), parameters) for out in (packed, separate)]
    for mine, theirs in zip(*gradients, strict=True):
        assert_close(mine.numpy(), theirs.numpy(), "float32")


def test_inner_function_with_all_its_options() -> None:
    """Complex A, whose B is projected with a bias; a constant C; norms."""
    torch.manual_seed(0)
    dim, dstate, dt_rank, seqlen = 6, 3, 2, 9
    xz = torch.randn(2, 2 * dim, seqlen)
    conv_weight, conv_bias = torch.randn(dim, 1, 4), torch.randn(dim)
    A = torch.complex(-torch.rand(dim, dstate), torch.randn(dim, dstate))
    C = torch.randn(dim, dstate, dtype=torch.complex64)
    x_proj = torch.randn(dt_rank + 2 * dstate, dim)
    dt_proj, out_proj = torch.randn(dim, dt_rank), torch.randn(5, dim)
    B_bias, norm = torch.randn(2 * dstate), torch.rand(2 * dstate)
    actual = mamba_inner_fn(
        xz,
        conv_weight,
        conv_bias,
        x_proj,
        dt_proj,
        out_proj,
        None,
        A,
        None,
        C,
        B_proj_bias=B_bias,
        b_rms_weight=norm,
        dt_rms_weight=torch.ones(dt_rank),
        b_c_dt_rms_eps=1e-3,
    )
    x, z = xz.chunk(2, dim=1)
    x, _ = reference.causal_conv1d(x, conv_weight.squeeze(1), conv_bias, "silu")
    projected = F.linear(x.transpose(1, 2), x_proj)
    delta, _ = reference.rms_norm(projected[..., :dt_rank], None, eps=1e-3)
    B, _ = reference.rms_norm(projected[..., dt_rank:] + B_bias, norm, eps=1e-3)
    B = B.unflatten(-1, (dstate, 2)).permute(0, 2, 1, 3).reshape(2, 1, dstate, 2 * seqlen)
    delta = F.linear(delta, dt_proj).transpose(1, 2)
    out, _ = reference.selective_scan(x, delta, A, B, C, z=z, delta_softplus=True)
    assert_close(actual.numpy(), F.linear(out.transpose(1, 2), out_proj).numpy(), "float32")


# --- The language model ---------------------------------------------------------------------------


@pytest.mark.parametrize("folder", [UPSTREAM, BUNDLED])
def test_golden_logits_and_text(folder: Path) -> None:
    model = MambaLMHeadModel.from_pretrained(folder, dtype=torch.float32)
    prompt = torch.from_numpy(golden()["prompt"]).long()[None]
    with torch.no_grad():
        logits = model(prompt).logits
        last = model(prompt, num_last_tokens=1).logits
    assert last.shape == (1, 1, 256)
    assert torch.allclose(last, logits[:, -1:], atol=1e-4)
    assert_close(logits[0].numpy(), golden()["logits_transformers"], "float32", rounded=True)
    generated = model.generate(prompt, max_length=prompt.shape[1] + 256)
    assert np.array_equal(generated[0, prompt.shape[1] :].numpy(), golden()["greedy"])


def test_published_names_and_files(tmp_path: Path) -> None:
    stored = torch.load(UPSTREAM / "pytorch_model.bin", weights_only=True)
    model = MambaLMHeadModel.from_pretrained(UPSTREAM)
    assert set(model.state_dict()) == set(stored) | {"lm_head.weight"}
    model.save_pretrained(tmp_path)
    written = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    for name, tensor in stored.items():
        assert torch.equal(written[name], tensor.float())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.items() <= json.loads((UPSTREAM / "config.json").read_text()).items()
    assert model.lm_head.weight is model.backbone.embedding.weight
    prompt = "It is a truth"
    assert ssmcore.load(tmp_path).generate(prompt, 20) == ssmcore.load().generate(prompt, 20)
    again = MambaLMHeadModel.from_pretrained(tmp_path)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, written[name])


def test_names_of_transformers() -> None:
    theirs = MambaForCausalLM.from_pretrained(BUNDLED).state_dict()
    mine = MambaLMHeadModel.from_pretrained(UPSTREAM).state_dict()
    assert set(to_transformers_names(mine)) == set(theirs)
    assert set(from_transformers_names(theirs)) == set(mine)


def test_unknown_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match="Mamba2"):
        MambaLMHeadModel(MambaConfig(d_model=8, n_layer=1, ssm_cfg={"layer": "Mamba2"}))
    with pytest.raises(NotImplementedError, match="attention or MLP"):
        MambaLMHeadModel(MambaConfig(d_model=8, n_layer=1, attn_layer_idx=[0]))
    with pytest.raises(FileNotFoundError):
        MambaLMHeadModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="llama"):
        MambaLMHeadModel.from_pretrained(tmp_path)


def test_residual_products_start_smaller_with_depth() -> None:
    torch.manual_seed(0)
    shallow, deep = (
        MambaLMHeadModel(MambaConfig(d_model=64, n_layer=n, vocab_size=37)) for n in (1, 4)
    )
    bound = 1 / math.sqrt(128)  # of kaiming_uniform_ with a = √5
    for model, n in ((shallow, 1), (deep, 4)):
        largest = model.backbone.layers[0].mixer.out_proj.weight.abs().max()
        assert 0.99 * bound / math.sqrt(n) < largest <= bound / math.sqrt(n) * 1.001
    assert abs(deep.backbone.embedding.weight.std() - 0.02) < 0.001


@pytest.mark.parametrize("options", [{"rms_norm": False}, {"fused_add_norm": False}])
def test_norms(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = MambaConfig(d_model=24, n_layer=2, vocab_size=37, **options)
    model = MambaLMHeadModel(config).double()
    ids = torch.randint(0, 37, (2, 9))
    residual = model.backbone.embedding(ids)
    for layer in model.backbone.layers:
        residual = residual + reference.mamba_block(layer.mixer, layer.norm(residual))
    expected = model.lm_head(model.backbone.norm_f(residual))
    # The residual is kept in float32.
    assert_close(model(ids).logits.detach().numpy(), expected.detach().numpy(), "float32")


def test_sampling_follows_the_generator() -> None:
    torch.manual_seed(0)
    model = MambaLMHeadModel(SMALL)
    prompt = torch.randint(0, 37, (3, 4))

    def draw(seed: int, **options: Any) -> Any:
        torch.manual_seed(seed)
        return model.generate(prompt, 12, **options)

    first = draw(0, top_k=0)
    assert first.shape == (3, 12)
    assert torch.equal(first, draw(0, top_k=0))
    assert not torch.equal(first, draw(1, top_k=0))
    assert first.max() < 37
    output = draw(0, return_dict_in_generate=True, output_scores=True)
    for t, scores in enumerate(output.scores):
        assert torch.equal(scores.argmax(-1), output.sequences[:, 4 + t])
    token = int(draw(0)[0, 4])
    assert model.generate(prompt[:1], 12, eos_token_id=token).shape == (1, 5)
