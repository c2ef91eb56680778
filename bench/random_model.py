"""A Mamba model of random weights at the published 130m shape, in transformers' format and as GGUF.

Speed does not depend on what the weights say, so random ones serve for measuring; they are drawn
such that activations stay in range.
"""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

D_MODEL, LAYERS, VOCAB, DSTATE, WIDTH, DT_RANK = 768, 24, 50280, 16, 4, 48
DIM = 2 * D_MODEL
DTYPES = {"fp32": np.dtype(np.float32), "bf16": np.dtype(ml_dtypes.bfloat16)}


def random_tensors(dtype: np.dtype) -> dict[str, np.ndarray]:
    """The model's tensors by transformers' names."""
    generator = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {}

    def normal(name: str, shape: tuple[int, ...], scale: float) -> None:
        values = generator.standard_normal(shape, dtype=np.float32)
        tensors[name] = (values * np.float32(scale)).astype(dtype)

    normal("backbone.embeddings.weight", (VOCAB, D_MODEL), 0.02)
    for i in range(LAYERS):
        layer = f"backbone.layers.{i}."
        tensors[f"{layer}norm.weight"] = np.ones(D_MODEL, dtype)
        normal(f"{layer}mixer.in_proj.weight", (2 * DIM, D_MODEL), 0.02)
        normal(f"{layer}mixer.conv1d.weight", (DIM, 1, WIDTH), 0.3)
        normal(f"{layer}mixer.conv1d.bias", (DIM,), 0.1)
        normal(f"{layer}mixer.x_proj.weight", (DT_RANK + 2 * DSTATE, DIM), 0.02)
        normal(f"{layer}mixer.dt_proj.weight", (DIM, DT_RANK), 0.1)
        normal(f"{layer}mixer.dt_proj.bias", (DIM,), 1.0)
        A_log = np.log(np.arange(1, DSTATE + 1, dtype=np.float32))
        tensors[f"{layer}mixer.A_log"] = np.tile(A_log, (DIM, 1)).astype(dtype)
        tensors[f"{layer}mixer.D"] = np.ones(DIM, dtype)
        normal(f"{layer}mixer.out_proj.weight", (D_MODEL, DIM), 0.02)
    tensors["backbone.norm_f.weight"] = np.ones(D_MODEL, dtype)
    return tensors


def save_transformers(folder: Path, precision: str) -> Path:
    """Writes the model as ssmcore and transformers read it; returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "hidden_size": D_MODEL,
        "num_hidden_layers": LAYERS,
        "vocab_size": VOCAB,
        "state_size": DSTATE,
        "conv_kernel": WIDTH,
        "time_step_rank": DT_RANK,
        "eos_token_id": 0,
        "dtype": {"fp32": "float32", "bf16": "bfloat16"}[precision],
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(random_tensors(DTYPES[precision]), folder / "model.safetensors", {"format": "pt"})
    return folder


def save_gguf(path: Path, precision: str) -> Path:
    """Writes the model as llama.cpp reads it, without a vocabulary; returns its path."""
    import gguf

    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_context_length(2**20)
    writer.add_embedding_length(D_MODEL)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(LAYERS)
    writer.add_ssm_conv_kernel(WIDTH)
    writer.add_ssm_inner_size(DIM)
    writer.add_ssm_state_size(DSTATE)
    writer.add_ssm_time_step_rank(DT_RANK)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("no_vocab")

    fields = {
        "norm.weight": "attn_norm.weight",
        "mixer.in_proj.weight": "ssm_in.weight",
        "mixer.conv1d.weight": "ssm_conv1d.weight",
        "mixer.conv1d.bias": "ssm_conv1d.bias",
        "mixer.x_proj.weight": "ssm_x.weight",
        "mixer.dt_proj.weight": "ssm_dt.weight",
        "mixer.dt_proj.bias": "ssm_dt.bias",
        "mixer.A_log": "ssm_a",
        "mixer.D": "ssm_d",
        "mixer.out_proj.weight": "ssm_out.weight",
    }
    names = {
        "backbone.embeddings.weight": "token_embd.weight",
        "backbone.norm_f.weight": "output_norm.weight",
    }
    for i in range(LAYERS):
        for ours, theirs in fields.items():
            names[f"backbone.layers.{i}.{ours}"] = f"blk.{i}.{theirs}"
    for name, tensor in random_tensors(DTYPES["fp32"]).items():
        if name.endswith("A_log"):
            tensor = -np.exp(tensor)
        tensor = tensor.squeeze()
        # llama.cpp wants vectors, the convolution and A in float32.
        is_matrix = tensor.ndim == 2 and not name.endswith(("conv1d.weight", "A_log"))
        if precision == "bf16" and is_matrix:
            bits = np.ascontiguousarray(tensor.astype(ml_dtypes.bfloat16)).view(np.uint8)
            writer.add_tensor(names[name], bits, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(names[name], np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
