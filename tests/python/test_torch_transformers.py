"""transformers' models give the same on the kernels of ssmcore, in training and generation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_fixtures import BUNDLED, PROMPT, golden_text
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import MambaForCausalLM
from transformers.models.falcon_mamba import modeling_falcon_mamba
from transformers.models.mamba import modeling_mamba
from transformers_models import make_falcon, make_model, random_ids

import ssmcore.torch
from ssmcore.torch import patch_transformers, unpatch_transformers

MAKERS = {"mamba": make_model, "falcon_mamba": make_falcon}


def loss_and_gradients(model: Any, ids: Tensor, **arguments: Any) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    loss = model(ids, labels=ids, **arguments).loss
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]


def assert_same_training(model: Any, ids: Tensor, **arguments: Any) -> None:
    expected_loss, expected = loss_and_gradients(model, ids, **arguments)
    with patch_transformers():
        loss, gradients = loss_and_gradients(model, ids, **arguments)
    assert abs(loss - expected_loss) <= 1e-5 * expected_loss
    for mine, theirs in zip(gradients, expected, strict=True):
        assert (mine - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("options", [{}, {"use_bias": True, "use_conv_bias": False}])
@pytest.mark.parametrize("maker", MAKERS)
def test_training(maker: str, options: dict[str, Any], train: bool) -> None:
    model = MAKERS[maker](**options).train(train)
    assert_same_training(model, random_ids(model, 2, 40))


@pytest.mark.parametrize("maker", MAKERS)
def test_training_with_padding(maker: str) -> None:
    model = MAKERS[maker]().train()
    ids = random_ids(model, 2, 20)
    mask = torch.ones_like(ids)
    assert_same_training(model, ids, attention_mask=mask)
    mask[0, :7] = 0
    assert_same_training(model, ids, attention_mask=mask)


def test_training_with_checkpointing() -> None:
    model = make_model().train()
    model.gradient_checkpointing_enable()
    assert_same_training(model, random_ids(model, 2, 20))


def test_training_the_bundled_model() -> None:
    model = MambaForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32).train()
    ids = torch.tensor([list(PROMPT.encode())])
    assert_same_training(model, ids)


def generate(model: Any, ids: Tensor, **options: Any) -> Tensor:
    torch.manual_seed(0)
    return model.generate(ids, max_new_tokens=24, eos_token_id=None, pad_token_id=0, **options)


@pytest.mark.parametrize(
    "options", [{"do_sample": False}, {"num_beams": 3, "do_sample": False}, {"do_sample": True}]
)
@pytest.mark.parametrize("maker", MAKERS)
def test_generation(maker: str, options: dict[str, Any]) -> None:
    model = MAKERS[maker]()
    ids = random_ids(model, 2, 10)
    expected = generate(model, ids, **options)
    with patch_transformers():
        assert torch.equal(generate(model, ids, **options), expected)


def test_generation_with_padding() -> None:
    model = make_model()
    ids, mask = random_ids(model, 2, 10), torch.ones(2, 10, dtype=torch.long)
    mask[1, :4] = 0
    expected = generate(model, ids, attention_mask=mask, do_sample=False)
    with patch_transformers():
        actual = generate(model, ids, attention_mask=mask, do_sample=False)
    assert torch.equal(actual, expected)


def test_golden_text() -> None:
    model = MambaForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32)
    ids = torch.tensor([list(PROMPT.encode())])
    with patch_transformers():
        out = model.generate(ids, max_new_tokens=256, do_sample=False, eos_token_id=None)
    assert bytes(out[0, ids.shape[1] :].tolist()).decode() == golden_text()


@pytest.mark.parametrize("maker", MAKERS)
def test_bfloat16(maker: str) -> None:
    model = MAKERS[maker]()
    ids = random_ids(model, 2, 40)
    with torch.no_grad():
        exact = model(ids).logits
        model.bfloat16()
        plain = (model(ids).logits - exact).abs().mean()
        with patch_transformers():
            patched = (model(ids).logits - exact).abs().mean()
    assert patched <= 1.5 * plain


@pytest.mark.parametrize("maker", MAKERS)
def test_a_cache_that_was_filled_without_the_patch(maker: str) -> None:
    model = MAKERS[maker]()
    ids = random_ids(model, 2, 12)
    with torch.no_grad():
        expected = model(ids).logits[:, -1]
        cache = model(ids[:, :-1], use_cache=True).cache_params
        with patch_transformers():
            actual = model(ids[:, -1:], cache_params=cache, use_cache=True).logits[:, -1]
    assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("maker", MAKERS)
def test_a_step_while_gradients_are_recorded(maker: str) -> None:
    model = MAKERS[maker]()
    ids = random_ids(model, 2, 12)
    expected = model(ids).logits[:, -1]
    with patch_transformers():
        cache = model(ids[:, :-1], use_cache=True).cache_params
        actual = model(ids[:, -1:], cache_params=cache, use_cache=True).logits[:, -1]
    assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_reading_in_pieces_equals_the_whole() -> None:
    model = make_model()
    ids = random_ids(model, 2, 12)
    with torch.no_grad(), patch_transformers():
        whole = model(ids).logits
        out = model(ids[:, :2], use_cache=True)
        pieces = [out.logits]
        for begin, end in ((2, 9), (9, 10), (10, 12)):
            out = model(ids[:, begin:end], cache_params=out.cache_params, use_cache=True)
            pieces.append(out.logits)
    assert torch.allclose(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-4)


class LowRank(nn.Module):
    """A product with a correction beside it, as LoRA has it."""

    def __init__(self, product: nn.Linear) -> None:
        super().__init__()
        self.product = product
        self.down = nn.Linear(product.in_features, 2, bias=False)
        self.up = nn.Linear(2, product.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.product.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x) + self.up(self.down(x))


def test_layers_that_were_replaced_stay() -> None:
    model = make_model().train()
    torch.manual_seed(0)
    for layer in model.backbone.layers:
        layer.mixer.in_proj = LowRank(layer.mixer.in_proj)
    ids = random_ids(model, 2, 20)
    assert_same_training(model, ids)
    model.eval()
    expected = generate(model, ids, do_sample=False)
    with patch_transformers():
        assert torch.equal(generate(model, ids, do_sample=False), expected)


def test_hooks_on_layers_are_called() -> None:
    model = make_model()
    for layer in model.backbone.layers:
        layer.mixer.out_proj.register_forward_hook(lambda *call: 0.5 * call[-1])
        prune.l1_unstructured(layer.mixer.in_proj, "weight", 0.5)
    ids = random_ids(model, 2, 20)
    with torch.no_grad():
        expected = model(ids).logits
        with patch_transformers():
            assert torch.allclose(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def functions() -> list[Callable[..., Any]]:
    return [
        getattr(module, name)
        for module in (modeling_mamba, modeling_falcon_mamba)
        for name in ("mamba_inner_fn", "mamba_selective_scan", "causal_conv1d_update")
    ] + [modeling_mamba.MambaMixer.forward, modeling_falcon_mamba.FalconMambaRMSNorm.forward]


def test_undoing_it() -> None:
    before = functions()
    patch_transformers()
    patch_transformers()  # once is enough
    assert all(a is not b for a, b in zip(functions(), before, strict=True))
    unpatch_transformers()
    assert functions() == before
    unpatch_transformers()
    with ssmcore.torch.patch_transformers():
        assert functions() != before
    assert functions() == before


def test_compile_of_a_patched_model() -> None:
    torch.compiler.reset()
    model = make_model()
    ids = random_ids(model, 2, 12)
    with torch.no_grad(), patch_transformers():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        actual = compiled(ids, use_cache=False).logits
        assert torch.allclose(actual, model(ids).logits, rtol=1e-4, atol=1e-4)
