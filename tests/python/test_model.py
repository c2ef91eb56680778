"""Loading, logits, states and scores of the trained model."""

import json
import math
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from model_fixtures import BUNDLED, DATA, PROMPT, UPSTREAM, bundled_model, golden, upstream_model

import ssmcore
from ssmcore.tokenizer import ByteTokenizer, FileTokenizer

TOLERANCE = 5e-5  # on fp32 logits


@pytest.fixture(params=[bundled_model, upstream_model], ids=["transformers", "upstream"])
def model(request):
    return request.param()


# Logits.


def test_logits_are_golden(model):
    logits, _ = model.forward(golden()["prompt"])
    assert logits.shape == (74, 256) and logits.dtype == np.float32
    np.testing.assert_allclose(logits, golden()["logits_transformers"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(logits, golden()["logits_upstream"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("split", range(1, 74))
def test_logits_are_golden_wherever_the_prompt_is_split(model, split):
    prompt, expected = golden()["prompt"], golden()["logits_transformers"]
    first, state = model.forward(prompt[:split])
    second, same_state = model.forward(prompt[split:], state)
    assert same_state is state
    np.testing.assert_allclose(np.concatenate([first, second]), expected, rtol=0, atol=TOLERANCE)


def test_logits_are_golden_step_by_step(model):
    state = model.new_state()
    for token_id, expected in zip(golden()["prompt"], golden()["logits_transformers"], strict=True):
        logits = model.step([token_id], state)
        np.testing.assert_allclose(logits, expected[np.newaxis], rtol=0, atol=TOLERANCE)


def test_rows_of_a_batch_keep_apart():
    model, rng = bundled_model(), np.random.default_rng(0)
    batch = rng.integers(0, 256, (3, 20))
    batch[1, :20] = golden()["prompt"][:20]
    logits, state = model.forward(batch)
    assert logits.shape == (3, 20, 256)
    for row in range(3):
        alone, _ = model.forward(batch[row])
        np.testing.assert_allclose(logits[row], alone, rtol=0, atol=TOLERANCE)
    following = rng.integers(0, 256, 3)
    stepped = model.step(following, state)
    whole, _ = model.forward(np.column_stack([batch, following]), logits="last")
    np.testing.assert_allclose(stepped, whole, rtol=0, atol=TOLERANCE)


def test_which_logits():
    model, prompt = bundled_model(), golden()["prompt"]
    every, _ = model.forward(prompt)
    last, _ = model.forward(prompt, logits="last")
    assert last.shape == (256,)
    np.testing.assert_allclose(last, every[-1], rtol=0, atol=TOLERANCE)
    none, state = model.forward(prompt[:-1], logits="none")
    assert none is None
    np.testing.assert_allclose(model.step(prompt[-1:], state)[0], last, rtol=0, atol=TOLERANCE)
    assert model.forward(prompt[np.newaxis], logits="last")[0].shape == (1, 256)
    assert model.forward(prompt[np.newaxis])[0].shape == (1, 74, 256)


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, np.uint64])
def test_ids_of_any_integer_type_and_stride(dtype):
    model, prompt = bundled_model(), golden()["prompt"]
    expected, _ = model.forward(prompt)
    strided = np.repeat(prompt, 2).astype(dtype)[::2]
    np.testing.assert_array_equal(model.forward(strided)[0], expected)
    np.testing.assert_array_equal(model.forward(strided.tolist())[0], expected)


def test_torch_in_torch_out():
    model, prompt = bundled_model(), golden()["prompt"]
    expected, _ = model.forward(prompt)
    logits, state = model.forward(torch.tensor(prompt))
    assert isinstance(logits, torch.Tensor) and logits.dtype == torch.float32
    np.testing.assert_array_equal(logits.numpy(), expected)
    stepped = model.step(torch.tensor([[65]]), state)
    assert isinstance(stepped, torch.Tensor) and stepped.shape == (1, 256)


def test_states_are_reset_and_copied_by_slot():
    model, prompt = bundled_model(), golden()["prompt"]
    state = model.new_state(2)
    assert state.num_slots == 2 and state.nbytes == 2 * model.new_state().nbytes > 0
    model.forward(np.stack([prompt, prompt[::-1]]), state, logits="none")
    state.copy_slot(0, 1)
    rows = model.step([65, 65], state)
    np.testing.assert_allclose(rows[0], rows[1], rtol=0, atol=TOLERANCE)
    state.reset_slot(1)
    fresh = model.step([65], model.new_state())
    np.testing.assert_allclose(model.step([65, 65], state)[1], fresh[0], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("dtype, tolerance", [("bf16", 0.5), ("fp16", 0.05)])
def test_half_precision_is_near(dtype, tolerance):
    model = ssmcore.load(device="cpu", dtype=dtype)
    logits, _ = model.forward(golden()["prompt"])
    assert logits.dtype == np.float32
    assert 0 < abs(logits - golden()["logits_transformers"]).max() < tolerance


@pytest.mark.parametrize(
    "token_ids, match",
    [
        ([], "no tokens"),
        (np.empty((2, 0), int), "no tokens"),
        (3, "rank 1 or 2, got int64 of shape"),
        ([[[1]]], r"rank 1 or 2, got int64 of shape \(1, 1, 1\)"),
        ([1.0], "float64"),
        ([True], "bool"),
        ("text", "integer"),
        ([[1, 2], [3]], "no array of token ids"),
        ([256], "256"),
        ([3, -1], "-1"),
    ],
)
def test_bad_ids(token_ids, match):
    with pytest.raises(ssmcore.InvalidArgumentError, match=match):
        bundled_model().forward(token_ids)


def test_bad_calls():
    model = bundled_model()
    with pytest.raises(ssmcore.InvalidArgumentError, match='"all", "last" or "none"'):
        model.forward([1], logits="some")
    with pytest.raises(ssmcore.InvalidArgumentError, match=r"step: token_ids should be \(B,\)"):
        model.step([[1, 2]], model.new_state())
    for batch in (1, 3):
        with pytest.raises(ssmcore.InvalidArgumentError, match=f"state has {batch} slots"):
            model.forward([[1], [2]], model.new_state(batch))
    with pytest.raises(ssmcore.InvalidArgumentError):
        model.new_state(-1)
    with pytest.raises(ssmcore.InvalidArgumentError, match="slot"):
        model.new_state(2).reset_slot(2)


def test_a_refused_id_leaves_the_state_alone():
    model, prompt = bundled_model(), golden()["prompt"]
    _, state = model.forward(prompt[:40])
    with pytest.raises(ssmcore.InvalidArgumentError):
        model.forward([65, 300], state)
    logits, _ = model.forward(prompt[40:], state, logits="last")
    np.testing.assert_allclose(logits, golden()["logits_transformers"][-1], rtol=0, atol=TOLERANCE)


def test_threads_may_share_a_model():
    model, prompt = bundled_model(), golden()["prompt"]
    expected = model.generate(prompt, 20)
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(model.generate(prompt, 20)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 4


def test_threads_give_what_each_gives_alone():
    model, rng = bundled_model(), np.random.default_rng(1)
    prompts = [rng.integers(0, 256, length) for length in (5, 300, 700, 64)]

    def run(prompt):
        half = len(prompt) // 2
        packed, state = model.forward(prompt, cu_seqlens=[0, half, len(prompt)])
        steps = [model.step(token_ids, state) for token_ids in prompt[: 2 * 2].reshape(-1, 2)]
        texts = model.generate([prompt, prompt[::-1]], 20, temperature=0.9, seed=3)
        return packed.tobytes(), [logits.tobytes() for logits in steps], texts

    alone = [run(prompt) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as threads:
        for _ in range(3):
            assert list(threads.map(run, prompts)) == alone


# Properties.


def test_properties(model):
    assert model.num_parameters == 3_569_920
    assert model.dtype == "float32"
    config = model.config
    assert config.model_type == "mamba"
    sizes = (config.n_layer, config.d_model, config.dim, config.dstate, config.width)
    assert sizes == (8, 256, 512, 16, 4)
    assert (config.dt_rank, config.vocab_size, config.tie_embeddings) == (16, 256, True)
    with pytest.raises(AttributeError):
        config.dim = 3
    assert "3,569,920" in repr(model)


def test_formats():
    assert bundled_model().config.format == "transformers"
    assert bundled_model().config.eos_token_ids == [0]
    assert isinstance(bundled_model().tokenizer, FileTokenizer)
    assert upstream_model().config.format == "upstream"
    assert isinstance(upstream_model().tokenizer, ByteTokenizer)


# Scores.


@pytest.mark.parametrize("name, bits", [("val_austen.txt", 1.4819), ("val_kjv.txt", 1.5406)])
def test_bits_per_byte_of_held_out_text(name, bits):
    text = (DATA / name).read_text()
    score = bundled_model().score(text, window=2048)
    assert score.bits_per_byte == pytest.approx(bits, abs=1e-3)
    assert score.tokens == score.bytes == (len(text) - 1) // 2048 * 2048
    assert score.perplexity == pytest.approx(2**score.bits_per_byte)


def nats_of(model, token_ids):
    logits = model.forward(token_ids[:-1])[0].astype(np.float64)
    chosen = logits[np.arange(len(token_ids) - 1), token_ids[1:]]
    return (np.log(np.exp(logits).sum(axis=1)) - chosen).sum()


@pytest.mark.parametrize("window", [None, 1, 7, 30, 73])
def test_score_is_the_sum_over_windows(window):
    model, ids = bundled_model(), golden()["prompt"]
    size = window or 73
    expected = sum(
        nats_of(model, ids[begin : begin + size + 1]) for begin in range(0, len(ids) - size, size)
    )
    score = model.score(PROMPT, window)
    assert score.tokens == 73 // size * size
    assert score.nats == pytest.approx(expected, rel=1e-5)
    assert score.bits_per_byte == pytest.approx(expected / math.log(2) / score.bytes, rel=1e-5)


def test_score_runs_in_pieces(monkeypatch):
    model = bundled_model()
    text = (DATA / "val_kjv.txt").read_text()[:400]
    whole = {window: model.score(text, window) for window in (None, 50, 133)}
    for positions in (1, 64, 100):
        monkeypatch.setattr("ssmcore.scoring._MAX_POSITIONS", positions)
        for window, expected in whole.items():
            score = model.score(text, window)
            assert score.tokens == expected.tokens
            assert score.nats == pytest.approx(expected.nats, rel=1e-5)


def test_score_reports_progress():
    calls = []
    bundled_model().score("x" * 5001, 1000, progress=lambda *counts: calls.append(counts))
    done = [count for count, _ in calls]
    assert done == sorted(set(done)) and done[-1] == 5000
    assert {total for _, total in calls} == {5000}


def test_score_counts_bytes_not_characters():
    score = bundled_model().score("€€")
    assert (score.tokens, score.bytes) == (5, 5)


@pytest.mark.parametrize("text", ["", "a"])
def test_text_too_short_to_score(text):
    with pytest.raises(ssmcore.InvalidArgumentError, match=f"at least 2 tokens, got {len(text)}"):
        bundled_model().score(text)


def test_bad_scores():
    model = bundled_model()
    with pytest.raises(ssmcore.InvalidArgumentError, match="at least 11 tokens, got 10"):
        model.score("0123456789", window=10)
    for window in (0, -1, 1.5):
        with pytest.raises(ssmcore.InvalidArgumentError, match="window should be an integer"):
            model.score("0123456789", window=window)
    with pytest.raises(ssmcore.InvalidArgumentError, match="text should be a str"):
        model.score(b"bytes")
    with pytest.raises(ssmcore.InvalidArgumentError, match="needs a tokenizer"):
        ssmcore.Model(model._language_model, None).score("text")


# Loading.


@pytest.mark.parametrize(
    "dtype, name",
    [("auto", "float32"), ("fp32", "float32"), ("float32", "float32"), ("bf16", "bfloat16"),
     ("bfloat16", "bfloat16"), ("fp16", "float16"), ("float16", "float16")],
)  # fmt: skip
def test_dtypes(dtype, name):
    assert ssmcore.load(device="cpu", dtype=dtype).dtype == name


def test_paths(tmp_path):
    assert ssmcore.load(BUNDLED).num_parameters == 3_569_920
    assert ssmcore.load(str(BUNDLED), device="cpu").num_parameters == 3_569_920


def test_bad_arguments(tmp_path):
    for device in ("tpu", "cuda:", "cuda:x", "cuda 0", None):
        with pytest.raises(ssmcore.InvalidArgumentError, match="device should be "):
            ssmcore.load(device=device)
    with pytest.raises(ssmcore.BackendError, match="device cuda"):
        ssmcore.load(device="cuda:99")
    with pytest.raises(ssmcore.InvalidArgumentError, match=r"dtype should be .*\"bf16\".* 'int8'"):
        ssmcore.load(dtype="int8")
    for path in (tmp_path / "nothing", "nothing", "./no/thing", "/a/b/c"):
        with pytest.raises(ssmcore.InvalidArgumentError, match="there is no folder"):
            ssmcore.load(path)
    with pytest.raises(ssmcore.InvalidArgumentError, match="is a file, expected a folder"):
        ssmcore.load(BUNDLED / "config.json")
    with pytest.raises(ssmcore.InvalidArgumentError, match=r"config\.json"):
        ssmcore.load(tmp_path)


@pytest.fixture
def folder(tmp_path):
    """A copy of the bundled model to spoil."""
    return shutil.copytree(BUNDLED, tmp_path / "model")


@pytest.fixture
def upstream_folder(tmp_path):
    return shutil.copytree(UPSTREAM, tmp_path / "model")


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"model_type": "llama"}, r"known: mamba, falcon_mamba.*llama"),
        ({"state_size": 8}, r"x_proj|A_log"),
        ({"num_hidden_layers": 9}, r"layers\.8"),
        ({"vocab_size": 300}, "embedding"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"tie_word_embeddings": False}, "lm_head"),
    ],
)
def test_config_that_does_not_fit(folder, changes, match):
    change_config(folder, **changes)
    with pytest.raises(ssmcore.InvalidArgumentError, match=match):
        ssmcore.load(folder)


def test_damaged_folders(folder):
    weights = (folder / "model.safetensors").read_bytes()
    for content in (b"", weights[:100], weights[:-1], b"\xff" * 100):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(ssmcore.InvalidArgumentError, match="safetensors"):
            ssmcore.load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ssmcore.InvalidArgumentError, match="safetensors"):
        ssmcore.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ssmcore.InvalidArgumentError, match=r"config\.json"):
        ssmcore.load(folder)


def test_damaged_upstream_folders(upstream_folder):
    change_config(upstream_folder, d_model=128)
    with pytest.raises(ssmcore.InvalidArgumentError, match="embedding"):
        ssmcore.load(upstream_folder)
    (upstream_folder / "config.json").unlink()
    with pytest.raises(ssmcore.InvalidArgumentError, match=r"config\.json"):
        ssmcore.load(upstream_folder)


def test_upstream_weights_may_be_stored_transposed(upstream_folder):
    path = upstream_folder / "pytorch_model.bin"
    weights = torch.load(path, weights_only=True)
    for name, tensor in weights.items():
        if tensor.ndim == 2:
            weights[name] = tensor.T.contiguous().T
    torch.save(weights, path)
    logits, _ = ssmcore.load(upstream_folder, device="cpu").forward(golden()["prompt"])
    np.testing.assert_allclose(logits, golden()["logits_upstream"], rtol=0, atol=TOLERANCE)


def test_padded_vocabulary(upstream_folder):
    change_config(upstream_folder, vocab_size=250, pad_vocab_size_multiple=16)
    model = ssmcore.load(upstream_folder, device="cpu")
    assert (model.config.vocab_size, model.config.padded_vocab_size) == (250, 256)
    logits, _ = model.forward(golden()["prompt"])
    expected = golden()["logits_upstream"][:, :250]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)
    assert model.tokenizer is None
    with pytest.raises(ssmcore.InvalidArgumentError, match="250"):
        model.forward([250])


def test_safetensors_come_first(folder):
    (folder / "pytorch_model.bin").write_bytes(b"not read")
    assert ssmcore.load(folder).num_parameters == 3_569_920


# The Hugging Face hub.


def test_hub_needs_its_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ssmcore.InvalidArgumentError, match=r"pip install ssmcore\[hub\]"):
        ssmcore.load("somebody/some-model")


def test_hub_offline(tmp_path):
    code = (
        "import ssmcore\n"
        "try: ssmcore.load('somebody/some-model')\n"
        "except ssmcore.InvalidArgumentError as error: print(error)"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert "no folder somebody/some-model, and it could not be had" in done.stdout


def test_hub_downloads_what_is_needed(monkeypatch):
    import huggingface_hub

    calls = []

    def snapshot_download(repo_id, allow_patterns):
        calls.append((repo_id, allow_patterns))
        return str(source)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    source = BUNDLED
    assert ssmcore.load("somebody/some-model").num_parameters == 3_569_920
    assert [repo_id for repo_id, _ in calls] == ["somebody/some-model"]
    assert "config.json" in calls[0][1] and "pytorch_model.bin" not in calls[0][1]
    calls.clear()
    source = UPSTREAM
    assert ssmcore.load("somebody/some-model").num_parameters == 3_569_920
    assert "pytorch_model.bin" in calls[1][1] and "pytorch_model.bin.index.json" in calls[1][1]
