"""The native module: operators on borrowed arrays, checkpoints, language models.

An Array is a NumPy array or anything with DLPack. Arrays are never copied; those marked as written
are changed in place. Failures are the exceptions of `ssmcore.errors`.
"""

from typing import Any, TypeAlias

Array: TypeAlias = Any

__version__: str

def isa() -> str:
    """The instruction set of the CPU kernels: "baseline", "avx2", "avx512" or "avx512_bf16"."""

def num_threads() -> int:
    """The CPU threads that one call uses, the caller's included."""

def set_num_threads(n: int) -> None:
    """Sets the CPU threads that one call uses, 1 to 1024. Waits for running calls.

    The default is the environment variable SSMCORE_NUM_THREADS, or every core this process may run
    on. Raises InvalidArgumentError for another n.
    """

# Operators. ssmcore/ops.py says what they compute; `out` and states are written.

def selective_scan(
    *,
    u: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    z: Array | None = None,
    delta_bias: Array | None = None,
    delta_softplus: bool,
    initial_state: Array | None = None,
    cu_seqlens: Array | None = None,
    last_state: Array | None = None,
    chunk_states: Array | None = None,
    chunk_size: int,
    delta_sum: Array | None = None,
    out: Array,
) -> None: ...
def selective_state_update(
    *,
    state: Array,
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    z: Array | None = None,
    dt_bias: Array | None = None,
    dt_softplus: bool,
    state_indices: Array | None = None,
    out: Array,
) -> None: ...
def causal_conv1d(
    *,
    x: Array,
    weight: Array,
    bias: Array | None = None,
    activation: str | None,
    initial_state: Array | None = None,
    cu_seqlens: Array | None = None,
    seq_idx: Array | None = None,
    final_state: Array | None = None,
    out: Array,
) -> None: ...
def causal_conv1d_update(
    *,
    x: Array,
    conv_state: Array,
    weight: Array,
    bias: Array | None = None,
    activation: str | None,
    cache_seqlens: Array | None = None,
    state_indices: Array | None = None,
    out: Array,
) -> None: ...
def rms_norm(
    *,
    x: Array,
    weight: Array | None = None,
    residual: Array | None = None,
    residual_out: Array | None = None,
    z: Array | None = None,
    out: Array,
    group_size: int,
    norm_before_gate: bool,
    eps: float,
) -> None: ...
def linear(*, x: Array, weight: Array, bias: Array | None = None, out: Array) -> None: ...
def embedding(*, token_ids: Array, weight: Array, out: Array) -> None: ...
def sample(
    *,
    logits: Array,
    history: Array | None = None,
    repetition_penalty: Array | None = None,
    temperature: Array | None = None,
    top_k: Array | None = None,
    top_p: Array | None = None,
    min_p: Array | None = None,
    seed: Array | None = None,
    position: Array | None = None,
    out: Array,
) -> None: ...
def mamba_block(
    *,
    in_proj: Array,
    in_proj_bias: Array | None = None,
    conv_weight: Array,
    conv_bias: Array | None = None,
    x_proj: Array,
    dt_proj: Array,
    dt_bias: Array | None = None,
    A: Array,
    D: Array | None = None,
    out_proj: Array,
    out_proj_bias: Array | None = None,
    x: Array,
    conv_state: Array | None = None,
    ssm_state: Array | None = None,
    cu_seqlens: Array | None = None,
    state_indices: Array | None = None,
    dt_B_C_norm_eps: float,
    out: Array,
) -> None: ...

class ModelConfig:
    """What a checkpoint's config.json says of a model."""

    @property
    def format(self) -> str:
        """Whose names the checkpoint follows: "transformers" or "upstream"."""
    @property
    def model_type(self) -> str: ...
    @property
    def d_model(self) -> int: ...
    @property
    def vocab_size(self) -> int:
        """Ids and logits; the embedding may have more rows as padding."""
    @property
    def padded_vocab_size(self) -> int: ...
    @property
    def n_layer(self) -> int: ...
    @property
    def dim(self) -> int:
        """Channels of the scan, expand times d_model."""
    @property
    def dstate(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def dt_rank(self) -> int: ...
    @property
    def norm_eps(self) -> float: ...
    @property
    def mixer_norm_eps(self) -> float:
        """Of the norms on delta, B and C of falcon_mamba; else 0."""
    @property
    def use_bias(self) -> bool:
        """Whether in_proj and out_proj have biases."""
    @property
    def use_conv_bias(self) -> bool: ...
    @property
    def tie_embeddings(self) -> bool: ...
    @property
    def eos_token_ids(self) -> list[int]: ...

def open_model_config(folder: str) -> ModelConfig:
    """Reads config.json and generation_config.json; InvalidArgumentError for no known model."""

def open_shard_index(path: str) -> dict[str, list[str]]:
    """The tensor names of each file that an index of shards names, all files of its folder."""

class Checkpoint:
    """A model as stored."""

    @staticmethod
    def open(folder: str) -> Checkpoint:
        """Maps the folder's safetensors; InvalidArgumentError if it is not there or damaged."""
    @staticmethod
    def from_tensors(config: ModelConfig, tensors: dict[str, Array]) -> Checkpoint:
        """Borrows the arrays for as long as the checkpoint, or a model of it, lives."""
    @property
    def config(self) -> ModelConfig: ...
    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The dtype and shape of every tensor, by its stored name."""

class ModelState:
    """The memory of running sequences, one slot each; `LanguageModel.new_state` makes it."""

    @property
    def num_slots(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def is_at_start(self, slot: int) -> bool:
        """Whether the slot has read nothing yet."""
    def reset_slot(self, slot: int) -> None:
        """Back to the start of a sequence."""
    def copy_slot(self, src: int, dst: int) -> None: ...
    def clone(self) -> ModelState:
        """A copy of every slot."""
    def save(self) -> bytes:
        """All slots as bytes."""
    def load(self, bytes: bytes) -> None:
        """What `save` gave, of a state of the same shape; else InvalidArgumentError."""

class LanguageModel:
    """A model ready to run, never changed by it: threads may share it."""

    def __init__(self, checkpoint: Checkpoint, dtype: str = "float32") -> None: ...
    @property
    def config(self) -> ModelConfig: ...
    @property
    def dtype(self) -> str: ...
    @property
    def num_parameters(self) -> int: ...
    def new_state(self, num_slots: int = 1) -> ModelState: ...
    def forward(
        self,
        token_ids: Array,
        logits: Array | None,
        state: ModelState,
        state_indices: Array | None = None,
        cu_seqlens: Array | None = None,
    ) -> None:
        """Runs (batch, seqlen) ids, from `state` on, which is updated.

        `logits`, written, is float32: (batch, seqlen, vocab_size), or (rows, vocab_size) for the
        last position of each row alone. With `cu_seqlens`, int32, batch is 1 and each sequence
        packed in it is a row.
        """
    def save(self, folder: str) -> None:
        """Writes the checkpoint it was made from as transformers reads it."""
