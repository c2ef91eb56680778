"""Code written for the published packages runs on ssmcore.torch."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator

import pytest
import torch
from model_fixtures import PROMPT, UPSTREAM, golden_text

import ssmcore.torch

PROGRAM = """
import torch
from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from causal_conv1d.causal_conv1d_interface import causal_conv1d_fn as same_fn
from mamba_ssm import Mamba, selective_scan_fn
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
from mamba_ssm.modules.mamba_simple import Mamba as SameMamba
from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn, selective_scan_fn as same_scan
from mamba_ssm.ops.selective_scan_interface import selective_scan_ref
from mamba_ssm.ops.triton.layer_norm import RMSNorm, rms_norm_fn
from mamba_ssm.ops.triton.selective_state_update import selective_state_update
from mamba_ssm.utils.generation import InferenceParams

assert causal_conv1d_fn is same_fn and Mamba is SameMamba and selective_scan_fn is same_scan
batch, length, dim = 2, 64, 16
x = torch.randn(batch, length, dim)
model = Mamba(d_model=dim, d_state=16, d_conv=4, expand=2)
y = model(x)
assert y.shape == x.shape
y.sum().backward()
assert all(p.grad is not None for p in model.parameters())

lm = MambaLMHeadModel.from_pretrained(folder, device="cpu", dtype=torch.float32)
input_ids = torch.tensor([list(prompt.encode())])
out = lm.generate(
    input_ids=input_ids, max_length=input_ids.shape[1] + 256, cg=True,
    return_dict_in_generate=True, output_scores=True, enable_timing=False,
    temperature=1.0, top_k=1, top_p=1.0,
)
text = bytes(out.sequences[0, input_ids.shape[1]:].tolist()).decode()
"""


@pytest.fixture
def without_packages() -> Iterator[None]:
    names = [name for name in sys.modules if name.split(".")[0] in ("mamba_ssm", "causal_conv1d")]
    assert not names
    yield
    left = [name for name in sys.modules if name.split(".")[0] in ("mamba_ssm", "causal_conv1d")]
    assert not left


@pytest.mark.usefixtures("without_packages")
def test_published_code_runs() -> None:
    names = {"folder": UPSTREAM, "prompt": PROMPT}
    with ssmcore.torch.install_as("mamba_ssm", "causal_conv1d"):
        exec(compile(PROGRAM, "published.py", "exec"), names)
        assert importlib.util.find_spec("mamba_ssm") is not None
        assert importlib.util.find_spec("mamba_ssm.nothing") is None
    assert names["text"] == golden_text()


@pytest.mark.usefixtures("without_packages")
def test_one_package_of_two() -> None:
    with ssmcore.torch.install_as("causal_conv1d"):
        assert "causal_conv1d" in sys.modules
        assert "mamba_ssm" not in sys.modules
        with pytest.raises(RuntimeError, match="causal_conv1d is imported already"):
            ssmcore.torch.install_as()


@pytest.mark.usefixtures("without_packages")
def test_unknown_packages_are_refused() -> None:
    with pytest.raises(ValueError, match="'flash_attn'"):
        ssmcore.torch.install_as("flash_attn")


def test_operators_still_refuse_to_lose_gradients() -> None:
    with pytest.raises(ValueError, match="requires a gradient"):
        ssmcore.ops.rms_norm(torch.ones(2, 3, requires_grad=True), None)
