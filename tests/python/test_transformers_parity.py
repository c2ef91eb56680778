"""Random models saved by transformers give its logits."""

import json
import shutil

import numpy as np
import pytest
import torch
from model_fixtures import BUNDLED, PROMPT, UPSTREAM, golden, golden_text, upstream_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers_models import make_falcon, make_model, random_ids

import ssmcore

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


FALCON_VARIATIONS = [
    *VARIATIONS,
    {"mixer_rms_eps": 1e-2},
    {"mixer_rms_eps": 1e-12, "state_size": 16, "time_step_rank": 8},
    {"expand": 16, "intermediate_size": 48},  # the largest one published overrules expand so
]


def assert_same_logits(folder, model):
    ids = random_ids(model, 2, 29)
    with torch.no_grad():
        expected = model(ids).logits.numpy()
    loaded = ssmcore.load(folder, device="cpu")
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


@pytest.mark.parametrize("changes", FALCON_VARIATIONS, ids=str)
def test_logits_of_falcon_mamba(tmp_path, changes):
    model = make_falcon(**changes)
    model.save_pretrained(tmp_path)
    loaded = assert_same_logits(tmp_path, model)
    assert loaded.config.model_type == "falcon_mamba"
    assert loaded.config.mixer_norm_eps == pytest.approx(model.config.mixer_rms_eps)
    assert loaded.num_parameters == model.num_parameters()


def test_falcon_mamba_with_defaults(tmp_path):
    model = make_falcon(hidden_size=32)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for name in ("mixer_rms_eps", "layer_norm_epsilon", "use_bias", "tie_word_embeddings"):
        del config[name]
    path.write_text(json.dumps(config))
    assert ssmcore.load(tmp_path).config.mixer_norm_eps == pytest.approx(1e-6)
    assert_same_logits(tmp_path, model)


@pytest.mark.parametrize("eps", [0, -1e-6, 2, "1e-6"])
def test_falcon_mamba_with_a_bad_eps(tmp_path, eps):
    make_falcon().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "mixer_rms_eps": eps}))
    with pytest.raises(ssmcore.InvalidArgumentError, match="mixer_rms_eps: expected a number"):
        ssmcore.load(tmp_path)


def test_falcon_mamba_step_by_step_and_packed(tmp_path):
    model = make_falcon(use_bias=True)
    model.save_pretrained(tmp_path)
    loaded, ids = ssmcore.load(tmp_path, device="cpu"), random_ids(model, 1, 31)
    with torch.no_grad():
        whole, parts = model(ids).logits.numpy(), [model(ids[:, a:b]).logits[0].numpy()
                                                   for a, b in ((0, 20), (20, 31))]  # fmt: skip
    state = loaded.new_state()
    steps = np.concatenate([loaded.step(ids[:, t], state) for t in range(31)])
    np.testing.assert_allclose(steps, whole[0], rtol=0, atol=1e-4)
    packed, _ = loaded.forward(ids[0], cu_seqlens=[0, 20, 31])
    np.testing.assert_allclose(packed, np.concatenate(parts), rtol=0, atol=1e-4)


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


@pytest.fixture
def torch_shards(tmp_path):
    """A model in two files of torch.save and their index."""
    model = make_model(tie_word_embeddings=False)
    model.config.save_pretrained(tmp_path)
    tensors = list(model.state_dict().items())
    files = {f"pytorch_model-{i}.bin": dict(tensors[i::2]) for i in range(2)}
    for file, shard in files.items():
        torch.save(shard, tmp_path / file)
    weight_map = {name: file for file, shard in files.items() for name in shard}
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path, model, weight_map


def test_shards_of_torch_files(torch_shards):
    folder, model, _ = torch_shards
    assert_same_logits(folder, model)


@pytest.mark.parametrize(
    "change, match",
    [
        ({"lm_head.weight": "../pytorch_model-0.bin"}, "the name of a file in the folder"),
        ({"lm_head.weight": "pytorch_model-7.bin"}, "pytorch_model-7.bin: No such file"),
        ({"no.such": "pytorch_model-0.bin"}, "has no tensor 'no.such'"),
        ({"lm_head.weight": 3}, "the name of a file in the folder, got 3"),
    ],
)
def test_bad_index_of_torch_files(torch_shards, change, match):
    folder, _, weight_map = torch_shards
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {**weight_map, **change}}))
    with pytest.raises(ssmcore.InvalidArgumentError, match=match):
        ssmcore.load(folder)
    index.write_text("[" * 1_000_000)
    with pytest.raises(ssmcore.InvalidArgumentError, match="nested deeper"):
        ssmcore.load(folder)


def test_generation_config_counts_for_torch_files_too(torch_shards):
    folder, _, _ = torch_shards
    assert ssmcore.load(folder).config.eos_token_ids == [0]
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    assert ssmcore.load(folder).config.eos_token_ids == [3, 5]


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
    continuation = ssmcore.load(tmp_path, device="cpu").generate(ids[0], 20, ignore_eos=True)
    assert continuation == expected[0, 9:].tolist()


# Saving.


def assert_transformers_reads(folder, expected_ids, expected):
    """The folder gives transformers these logits, or those of fewer tokens."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    with torch.no_grad():
        logits = model(torch.tensor(expected_ids)).logits.numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "make, changes",
    [
        (make_model, {}),
        (make_model, {"tie_word_embeddings": False, "use_bias": True, "use_conv_bias": False}),
        (make_model, {"hidden_size": 7, "intermediate_size": 10, "eos_token_id": [3, 4]}),
        (make_model, {"eos_token_id": None, "layer_norm_epsilon": 1e-3}),
        (make_falcon, {}),
        (make_falcon, {"tie_word_embeddings": False, "mixer_rms_eps": 1e-4, "use_bias": True}),
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(value),
)
def test_saved_models_load_in_transformers(tmp_path, make, changes):
    original = make(**changes)
    original.save_pretrained(tmp_path / "original")
    ssmcore.save(ssmcore.load(tmp_path / "original"), tmp_path / "new" / "saved")
    folder = tmp_path / "new" / "saved"
    files = ["config.json", "generation_config.json", "model.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == files
    ids = random_ids(original, 2, 29).tolist()
    with torch.no_grad():
        expected = original(torch.tensor(ids)).logits.numpy()
    assert_transformers_reads(folder, ids, expected)
    loaded = assert_same_logits(folder, original)
    eos = original.config.eos_token_id
    assert loaded.config.eos_token_ids == ([] if eos is None else [eos] if eos == 0 else eos)
    read = AutoModelForCausalLM.from_pretrained(folder).config
    for name in ("layer_norm_epsilon", "intermediate_size", "time_step_rank", "eos_token_id"):
        assert getattr(read, name) == getattr(original.config, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_saved_weights_are_the_stored_ones(tmp_path, dtype):
    make_model().to(dtype).save_pretrained(tmp_path / "original")
    ssmcore.save(ssmcore.load(tmp_path / "original", dtype="bf16"), tmp_path / "saved")
    tensors = [load_file(tmp_path / name / "model.safetensors") for name in ("original", "saved")]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        assert tensors[1][name].dtype == tensor.dtype
        assert torch.equal(tensors[1][name], tensor)


def test_upstream_model_is_saved_for_transformers(tmp_path):
    ssmcore.save(upstream_model(), tmp_path)
    ids = golden()["prompt"]
    assert_transformers_reads(tmp_path, [ids.tolist()], golden()["logits_upstream"][np.newaxis])
    loaded = ssmcore.load(tmp_path, device="cpu")
    assert loaded.config.format == "transformers"
    assert loaded.generate(PROMPT, 40) == golden_text()[:40]


def test_padding_of_the_vocabulary_is_not_saved(tmp_path):
    folder = shutil.copytree(UPSTREAM, tmp_path / "padded")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "vocab_size": 250, "pad_vocab_size_multiple": 16})
    )
    ssmcore.save(ssmcore.load(folder), tmp_path / "saved")
    expected = golden()["logits_upstream"][np.newaxis, :, :250]
    assert_transformers_reads(tmp_path / "saved", [golden()["prompt"].tolist()], expected)


def test_saved_over_the_folder_it_came_from(tmp_path):
    folder = shutil.copytree(BUNDLED, tmp_path / "model")
    model = ssmcore.load(folder, device="cpu")
    ssmcore.save(model, folder)
    for again in (model, ssmcore.load(folder, device="cpu")):
        assert again.generate(PROMPT, 40) == golden_text()[:40]
    assert type(ssmcore.load(folder).tokenizer) is type(model.tokenizer)
    assert not [path for path in folder.iterdir() if ".tmp" in path.name]


def test_folders_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ssmcore.InvalidArgumentError, match=r"save_checkpoint: .*file"):
        ssmcore.save(upstream_model(), tmp_path / "file")
    (tmp_path / "folder" / "config.json").mkdir(parents=True)
    with pytest.raises(ssmcore.InvalidArgumentError, match=r"config\.json: Is a directory"):
        ssmcore.save(upstream_model(), tmp_path / "folder")
