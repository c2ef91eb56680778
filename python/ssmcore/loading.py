"""Finding a model, by path or on the Hugging Face hub, loading it, and saving it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ssmcore import _core
from ssmcore._cublaslt import find_cublaslt
from ssmcore._files import write_atomically
from ssmcore.errors import InvalidArgumentError
from ssmcore.model import Model
from ssmcore.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer

BUNDLED = Path(__file__).parent / "assets" / "mamba1-prose"
_DEVICE = re.compile(r"auto|cpu|cuda(:[0-9]+)?")
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
_HUB_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "*.safetensors",
    "model.safetensors.index.json",
)
_TORCH_FILE = "pytorch_model.bin"
_TORCH_INDEX = "pytorch_model.bin.index.json"
_HUB_TORCH_FILES = (_TORCH_FILE, _TORCH_INDEX, "pytorch_model-*.bin")
_DTYPES = {
    "auto": None,
    "float32": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
}


def load(
    path_or_hub_id: str | os.PathLike[str] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    *,
    trainable: bool = False,
    batch_invariant: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> Model:
    """Loads a language model.

    Args:
        path_or_hub_id: a folder with config.json and either model.safetensors as transformers
            writes it, or pytorch_model.bin as mamba-ssm does, whole or as shards and their index;
            or the name of a model on the Hugging Face hub, which needs huggingface_hub. None: the
            small model that comes with ssmcore.
        device: where the weights go and the model runs: "cpu", "cuda" for the first GPU, or
            "cuda:1" and so on. "auto": the first GPU if this build and machine have one, else the
            CPU.
        dtype: of the activations: "float32", "bfloat16" or "float16" (or "fp32", "bf16",
            "fp16"); weights stay as stored. "auto": float32 on the CPU, and on a GPU the type
            most weights are stored in.
        trainable: copy the weights as float32 to memory where `Model.parameters` may be written.
            On a GPU matrices are then used in the type of the activations.
        batch_invariant: make the bits of a sequence's results on a GPU independent of its batch,
            for some speed. On the CPU they always are.
        progress: called as `progress(done, total)` with bytes of the checkpoint. What it raises
            ends the loading.

    The tokenizer is the folder's tokenizer.json; without one, a model of 256 tokens gets one
    token for each byte and others none.

    Raises:
        InvalidArgumentError: for a path or hub id that is not there, a folder that holds no model
            ssmcore knows or a damaged one, and an unknown device or dtype.
        BackendError: for a device that this build or machine does not have, and out of memory.
    """
    device, activations = resolved_device(device), dtype_of(dtype)
    folder = BUNDLED if path_or_hub_id is None else find_folder(path_or_hub_id)
    is_torch = any((folder / name).exists() for name in (_TORCH_FILE, _TORCH_INDEX))
    if is_torch and not _has_safetensors(folder):
        checkpoint = _open_torch_checkpoint(folder)
    else:
        checkpoint = _core.Checkpoint.open(str(folder))
    tokenizer = _open_tokenizer(folder, checkpoint.config.vocab_size)
    if device != "cpu":
        find_cublaslt()
    language_model = _core.LanguageModel(
        checkpoint, activations, trainable, device, batch_invariant, progress
    )
    return Model(language_model, tokenizer)


def save(model: Model, path: str | os.PathLike[str]) -> None:
    """Writes a model to a folder, in the format of transformers, whatever it was loaded from.

    The folder, made if need be, gets config.json, generation_config.json and model.safetensors,
    with the weights as stored, and the model's tokenizer.json if it has one. Each file appears
    whole or not at all.

    Raises:
        InvalidArgumentError: for a folder that cannot be written.
    """
    folder = Path(path).expanduser()
    model._language_model.save(str(folder))
    if isinstance(model.tokenizer, FileTokenizer):
        write_atomically(folder / "tokenizer.json", model.tokenizer.to_json().encode(), "save")


def resolved_device(device: str) -> str:
    """`device`, or what "auto" means here. Raises InvalidArgumentError for another name."""
    if not isinstance(device, str) or not _DEVICE.fullmatch(device):
        raise InvalidArgumentError(
            f'load: device should be "auto", "cpu", "cuda" or "cuda:N", got {device!r}'
        )
    if device == "auto":
        return "cuda" if _core.cuda_device_count() > 0 else "cpu"
    return device


def dtype_of(name: str) -> str | None:
    """The dtype of this name, None for "auto". Raises InvalidArgumentError for another name."""
    if name not in _DTYPES:
        known = ", ".join(f'"{name}"' for name in _DTYPES)
        raise InvalidArgumentError(f"load: dtype should be one of {known}, got {name!r}")
    return _DTYPES[name]


def find_folder(path_or_hub_id: str | os.PathLike[str]) -> Path:
    """The folder meant, downloaded from the hub if need be."""
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise InvalidArgumentError(f"load: {path} is a file, expected a folder with config.json")
    if isinstance(path_or_hub_id, str) and _HUB_ID.fullmatch(path_or_hub_id):
        return _download(path_or_hub_id)
    raise InvalidArgumentError(f"load: there is no folder {path}")


def _download(repo_id: str) -> Path:
    """The folder of a model on the hub, as huggingface_hub caches it."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import RepositoryNotFoundError
    except ImportError:
        raise InvalidArgumentError(
            f"load: there is no folder {repo_id}; to look for it on the Hugging Face hub, "
            "install huggingface_hub (pip install ssmcore[hub])"
        ) from None
    try:
        folder = Path(snapshot_download(repo_id, allow_patterns=list(_HUB_FILES)))
        if not _has_safetensors(folder):
            snapshot_download(repo_id, allow_patterns=list(_HUB_TORCH_FILES))
    except RepositoryNotFoundError as error:
        raise InvalidArgumentError(
            f"load: there is no folder {repo_id}, nor a public model of that name "
            "on the Hugging Face hub"
        ) from error
    except Exception as error:  # offline, no cache, a server's error: many types, several libraries
        reason = str(error).partition("\n")[0]
        raise InvalidArgumentError(
            f"load: there is no folder {repo_id}, and it could not be had from the "
            f"Hugging Face hub: {reason}"
        ) from error
    return folder


def _has_safetensors(folder: Path) -> bool:
    names = ("model.safetensors", "model.safetensors.index.json")
    return any((folder / name).exists() for name in names)


def _open_torch_checkpoint(folder: Path) -> _core.Checkpoint:
    from ssmcore.torch_pickle import load_tensors

    config = _core.open_model_config(str(folder))
    if (folder / _TORCH_FILE).exists():
        tensors = load_tensors(folder / _TORCH_FILE)
    else:
        tensors = {}
        for file, names in _core.open_shard_index(str(folder / _TORCH_INDEX)).items():
            shard = load_tensors(folder / file)
            for name in names:
                if name not in shard:
                    raise InvalidArgumentError(
                        f"load: {folder / file} has no tensor {name!r}, which {_TORCH_INDEX} says "
                        "it holds"
                    )
                tensors[name] = shard[name]
    # The model takes plain arrays: copy the few, if any, that are stored transposed or unaligned.
    plain = {name: np.require(tensor, requirements=("C", "A")) for name, tensor in tensors.items()}
    return _core.Checkpoint.from_tensors(config, plain)


def _open_tokenizer(folder: Path, vocab_size: int) -> Tokenizer | None:
    path = folder / "tokenizer.json"
    if path.exists():
        return FileTokenizer(path)
    return ByteTokenizer() if vocab_size == 256 else None
