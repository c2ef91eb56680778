"""Training steps of language models: the loss and its gradients."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers import assert_close, assert_same_bits, relative_error
from model_fixtures import BUNDLED, DATA
from sequences import boundaries
from transformers import AutoModelForCausalLM
from transformers_models import make_falcon, make_model, random_ids

import ssmcore

IGNORED = -100


def saved_and_loaded(tmp_path, model, **options):
    model.save_pretrained(tmp_path)
    return ssmcore.load(tmp_path, **options)


def shifted(ids):
    """Inputs, and as targets the tokens after them."""
    return np.ascontiguousarray(ids[..., :-1]), np.ascontiguousarray(ids[..., 1:])


def autograd(model, ids, targets):
    """The loss of a transformers model, and its gradients by parameter name."""
    model.zero_grad()
    logits = model(torch.from_numpy(ids)).logits
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(targets).flatten(), ignore_index=IGNORED
    )
    loss.backward()
    return loss.item(), {name: p.grad.numpy() for name, p in model.named_parameters()}


def assert_same(actual, expected, tolerance=2e-5):
    loss, gradients = actual
    expected_loss, expected_gradients = expected
    assert loss == pytest.approx(expected_loss, rel=tolerance)
    assert set(gradients) == set(expected_gradients)
    for name, gradient in expected_gradients.items():
        assert gradients[name].shape == gradient.shape
        assert np.any(gradient), name
        error = relative_error(gradients[name], gradient)
        assert error <= tolerance, f"{name}: error {error:.3g}"


VARIATIONS = [
    {},
    {"hidden_size": 33, "expand": 3},
    {"state_size": 16, "time_step_rank": "auto"},
    {"num_hidden_layers": 1},
    {"conv_kernel": 2},
    {"use_bias": True},
    {"use_conv_bias": False},
    {"tie_word_embeddings": False},
]


@pytest.mark.parametrize("recompute_layers", [False, True])
@pytest.mark.parametrize("changes", VARIATIONS, ids=str)
@pytest.mark.parametrize("make", [make_model, make_falcon], ids=["mamba", "falcon_mamba"])
def test_gradients_are_those_of_transformers(tmp_path, make, changes, recompute_layers):
    model = make(**changes)
    loaded = saved_and_loaded(tmp_path, model)
    ids, targets = shifted(random_ids(model, 2, 20).numpy())
    targets[0, 3:7] = IGNORED
    actual = loaded.loss_and_gradients(ids, targets, recompute_layers=recompute_layers)
    assert_same(actual, autograd(model, ids, targets), tolerance=1e-4)


@pytest.fixture(scope="module")
def text():
    """(2, 301) tokens of held-out prose."""
    return np.frombuffer((DATA / "val_austen.txt").read_bytes()[:602], np.uint8).reshape(2, 301)


def test_gradients_of_the_bundled_model(text):
    model = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32)
    ids, targets = shifted(text[:1, :49].astype(np.int64))
    actual = ssmcore.load().loss_and_gradients(ids, targets)
    assert 0.5 < actual[0] < 2  # it has learnt prose
    assert_same(actual, autograd(model, ids, targets), tolerance=1e-4)


def test_gradients_that_share_memory_are_refused(text):
    model = ssmcore.load()
    ids, targets = shifted(text[:, :11].astype(np.int64))
    shared = np.zeros(2 * model.config.d_model, np.float32)
    d = model.config.d_model
    gradients = {
        "backbone.norm_f.weight": shared[:d],
        "backbone.layers.0.norm.weight": shared[d // 2 : d // 2 + d],
    }
    with pytest.raises(ssmcore.InvalidArgumentError, match="overlaps the gradient of backbone"):
        model.loss_and_gradients(ids, targets, gradients=gradients)
    assert not shared.any()
    gradients["backbone.layers.0.norm.weight"] = shared[d:]
    model.loss_and_gradients(ids, targets, gradients=gradients)
    assert shared.all()


def nats(model, ids, targets):
    """The mean loss, from the logits."""
    logits = model.forward(ids)[0].astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return -np.take_along_axis(log_probabilities, targets[..., None], axis=-1).mean()


def test_gradients_are_the_slopes_of_the_loss(text):
    """The loss of logits changes as the gradients say when the parameters are moved."""
    model = ssmcore.load(trainable=True)
    ids, targets = shifted(text[:, :101].astype(np.int64))
    loss, gradients = model.loss_and_gradients(ids, targets)
    assert loss == pytest.approx(nats(model, ids, targets), rel=1e-5)
    parameters = model.parameters
    assert set(parameters) == set(gradients)
    for name, gradient in gradients.items():
        before = parameters[name].copy()
        step = 1e-3 / np.linalg.norm(gradient) * gradient
        losses = []
        for sign in (1, -1):
            parameters[name][...] = before + sign * step
            model.refresh()
            losses.append(nats(model, ids, targets))
        parameters[name][...] = before
        slope = (losses[0] - losses[1]) / 2e-3
        assert slope == pytest.approx(np.linalg.norm(gradient), rel=2e-2, abs=1e-3), name
    model.refresh()
    assert model.loss_and_gradients(ids, targets)[0] == loss


def test_packed_is_separate(tmp_path):
    lengths = [20, 1, 75, 0, 9]
    model = make_model()
    loaded = saved_and_loaded(tmp_path, model)
    ids, targets = shifted(random_ids(model, sum(lengths) + 1).numpy())
    cu_seqlens = boundaries(lengths)
    packed = loaded.loss_and_gradients(ids, targets, cu_seqlens=cu_seqlens)
    total, gradients = 0.0, zeros_of(loaded)
    for begin, end in pairwise(cu_seqlens):
        if begin == end:
            continue
        piece = slice(begin, end)
        loss, _ = loaded.loss_and_gradients(
            ids[piece], targets[piece], gradients=gradients, num_targets=len(ids)
        )
        total += loss
    assert_same(packed, (total, gradients))


def zeros_of(model):
    return {name: np.zeros(shape, np.float32) for name, shape in shapes_of(model).items()}


def shapes_of(model):
    return {name: g.shape for name, g in model.loss_and_gradients([0], [0])[1].items()}


def test_parts_of_a_batch_add_up(text):
    """Also where a part has more positions than the head takes at a time."""
    model = ssmcore.load()
    ids, targets = shifted(np.concatenate([text, text[:, ::-1], text[::-1]]).astype(np.int64))
    targets[1, :100] = IGNORED
    whole = model.loss_and_gradients(ids, targets)
    num_targets = int((targets != IGNORED).sum())
    total, gradients = 0.0, zeros_of(model)
    for part in (slice(0, 1), slice(1, 6)):
        loss, same = model.loss_and_gradients(
            ids[part], targets[part], gradients=gradients, num_targets=num_targets
        )
        assert same is gradients
        total += loss
    assert_same((total, gradients), whole)


def test_layers_computed_again_give_the_same_bits(text):
    model = ssmcore.load()
    ids, targets = shifted(text)
    loss, gradients = model.loss_and_gradients(ids, targets)
    again, gradients_again = model.loss_and_gradients(ids, targets, recompute_layers=True)
    assert again == loss
    for name, gradient in gradients.items():
        assert_same_bits(gradients_again[name], gradient)


def test_threads_do_not_change_a_bit(set_num_threads, text):
    model = ssmcore.load()
    ids, targets = shifted(text)
    set_num_threads(1)
    loss, gradients = model.loss_and_gradients(ids, targets)
    set_num_threads(2)
    again, gradients_again = model.loss_and_gradients(ids, targets)
    assert again == loss
    for name, gradient in gradients.items():
        assert_same_bits(gradients_again[name], gradient)


def test_only_the_gradients_that_are_named(text):
    model = ssmcore.load()
    ids, targets = shifted(text[:, :50])
    loss, every = model.loss_and_gradients(ids, targets)
    names = ["backbone.layers.1.mixer.A_log", "backbone.norm_f.weight"]
    given = {name: np.zeros_like(every[name]) for name in names}
    alone, gradients = model.loss_and_gradients(ids, targets, gradients=given)
    assert alone == loss and set(gradients) == set(names)
    for name in names:
        assert_close(gradients[name], every[name], "float32", rounded=True)
    assert model.loss_and_gradients(ids, targets, gradients={}) == (loss, {})


def test_ignored_positions_count_for_nothing(tmp_path):
    """What follows the last target does not matter, nor does padding of the vocabulary."""
    model = make_model()
    loaded = saved_and_loaded(tmp_path, model)
    ids, targets = shifted(random_ids(model, 2, 31).numpy())
    targets[:, 20:] = IGNORED
    expected = loaded.loss_and_gradients(ids[:, :20], targets[:, :20])
    assert_same(loaded.loss_and_gradients(ids, targets), expected)


@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 0.1), ("float16", 0.02)])
def test_narrow_activations(text, dtype, tolerance):
    ids, targets = shifted(text)
    expected = ssmcore.load().loss_and_gradients(ids, targets)
    actual = ssmcore.load(dtype=dtype).loss_and_gradients(ids, targets)
    assert actual[0] != expected[0]
    assert_same(actual, expected, tolerance=tolerance)


def test_training_a_model(tmp_path, text):
    """Steps down the slope lower the loss; the model then generates, and is saved, as trained."""
    model = ssmcore.load(trainable=True)
    untrained = ssmcore.load()
    ids, targets = shifted(text[:, :101])
    losses = []
    for _ in range(5):
        loss, gradients = model.loss_and_gradients(ids, targets)
        losses.append(loss)
        for name, parameter in model.parameters.items():
            parameter -= 0.02 * gradients[name]
        model.refresh()
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.97 * losses[0]
    logits, _ = model.forward(ids)
    assert not np.allclose(logits, untrained.forward(ids)[0], atol=1e-2)
    ssmcore.save(model, tmp_path)
    assert_same_bits(ssmcore.load(tmp_path).forward(ids)[0], logits)


# Bad input.


def test_refresh_is_for_trainable_models() -> None:
    with pytest.raises(ssmcore.InvalidArgumentError, match="not trainable"):
        ssmcore.load(device="cpu").refresh()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return saved_and_loaded(tmp_path_factory.mktemp("tiny"), make_model())


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"token_ids": [[1, 2, 37]]}, "token_ids holds 37"),
        ({"token_ids": [[1.0, 2, 3]]}, "token_ids should be integer"),
        ({"targets": [1, 2, 3]}, "targets should be integer"),
        ({"targets": [[1, 2]]}, "targets has seqlen 2, expected 3"),
        ({"targets": [[1, 2, 37]]}, "targets holds 37 at position 2"),
        ({"targets": [[1, -1, 3]]}, "targets holds -1 at position 1"),
        ({"targets": [[-100, -100, -100]]}, "targets holds nothing"),
        ({"num_targets": 0}, "num_targets is 0"),
        ({"gradients": {"no.such": np.zeros(3, np.float32)}}, "no.such: the model has no such"),
        (
            {"gradients": {"backbone.norm_f.weight": np.zeros(3, np.float32)}},
            "shape .3,.",
        ),
        ({"gradients": {"backbone.norm_f.weight": np.zeros(24)}}, "dtype float64"),
        (
            {"gradients": {"backbone.norm_f.weight": np.zeros(48, np.float32)[::2]}},
            "not contiguous",
        ),
    ],
)
def test_bad_arguments(tiny, changes, match):
    arguments = {"token_ids": [[1, 2, 3]], "targets": [[2, 3, 4]], **changes}
    with pytest.raises(ssmcore.InvalidArgumentError, match=f"loss_and_gradients: .*{match}"):
        tiny.loss_and_gradients(**arguments)


@pytest.mark.parametrize("ends", [[0, 2], [1, 3], [0, 2, 1, 3]])
def test_bad_boundaries(tiny, ends):
    with pytest.raises(ssmcore.InvalidArgumentError, match="loss_and_gradients: cu_seqlens"):
        tiny.loss_and_gradients([1, 2, 3], [2, 3, 4], cu_seqlens=ends)


def test_read_only_gradients(tiny):
    gradient = np.zeros(24, np.float32)
    gradient.flags.writeable = False
    with pytest.raises(ssmcore.InvalidArgumentError, match="read-only"):
        tiny.loss_and_gradients([1], [2], gradients={"backbone.norm_f.weight": gradient})


def test_parameters_of_a_model_that_is_not_trainable(tiny):
    with pytest.raises(ssmcore.InvalidArgumentError, match="trainable=True"):
        _ = tiny.parameters
