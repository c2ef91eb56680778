"""The native module: operators on borrowed arrays, checkpoints, language models.

An AnyArray is a NumPy array or anything with DLPack. Arrays are never copied; those marked as
written are changed in place. Failures are the exceptions of `ssmcore.errors`.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeAlias

import numpy as np

AnyArray: TypeAlias = Any

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

class Array:
    """Memory on the CPU or a GPU that belongs to no framework. `ssmcore.empty` and `ssmcore.array`
    make it; calls on arrays of a GPU run on a stream that ssmcore has for that GPU.

    It speaks DLPack: `torch.from_dlpack(array)`, `cupy.from_dlpack(array)` and the like share its
    memory, and it stays alive for them.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def ndim(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def dtype(self) -> np.dtype: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def device(self) -> str:
        """ "cpu", "cuda:0", …"""
    def reshape(self, *shape: int) -> Array:
        """The same memory in another shape; one size may be -1."""
    def numpy(self) -> np.ndarray:
        """The memory itself as a NumPy array, or from a GPU a copy, which is waited for.

        InvalidArgumentError if a kernel has met an index out of range.
        """
    def copy_from(self, source: AnyArray) -> None:
        """Overwrites it with a contiguous array of its shape and dtype, from any device."""
    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

def empty(shape: Sequence[int], dtype: str, device: str) -> Array: ...
def cuda_device_count() -> int:
    """The GPUs that this build and machine can use."""

def device_memory(device: str) -> tuple[int, int]:
    """Bytes of a GPU's memory that nobody uses, and all there are. BackendError for the CPU."""

def set_cublaslt_path(path: str) -> None:
    """Where to load cuBLASLt from, unless a copy of it is loaded already."""

def own_stream(index: int) -> int:
    """The handle of the stream that ssmcore has for a GPU."""

def synchronize(index: int, stream: int) -> None:
    """Waits for a stream of a GPU, and raises what was found wrong on it."""

XLA_TARGETS: dict[str, dict[str, Any]]
"""By operator and by platform, as JAX names it: a capsule of the handler of XLA's custom calls.

Empty where ssmcore was built without jaxlib. Their attributes hold the place of each array among
the operands or results, by the names below, and what is no array.
"""
XLA_FFI_VERSION: tuple[int, int]
"""That of the headers they were built with; (0, 0) without."""

# Operators. ssmcore/ops.py says what they compute; `out` and states are written. `on`: None for the
# CPU, or (index of the GPU, stream, type of arrays, check, batch_invariant), as _outputs.py has it.
# Gradients whose names `accumulate` holds are added to what is there. With `only_check`, nothing is
# computed, and arrays need no more than a shape and a dtype.

def selective_scan(
    *,
    on: Any,
    u: AnyArray,
    delta: AnyArray,
    A: AnyArray,
    B: AnyArray,
    C: AnyArray,
    D: AnyArray | None = None,
    z: AnyArray | None = None,
    delta_bias: AnyArray | None = None,
    delta_softplus: bool,
    initial_state: AnyArray | None = None,
    cu_seqlens: AnyArray | None = None,
    last_state: AnyArray | None = None,
    chunk_states: AnyArray | None = None,
    chunk_size: int,
    delta_sum: AnyArray | None = None,
    out: AnyArray,
) -> None: ...
def selective_scan_bwd(
    *,
    on: Any,
    dout: AnyArray,
    u: AnyArray,
    delta: AnyArray,
    A: AnyArray,
    B: AnyArray,
    C: AnyArray,
    D: AnyArray | None = None,
    z: AnyArray | None = None,
    delta_bias: AnyArray | None = None,
    delta_softplus: bool,
    cu_seqlens: AnyArray | None = None,
    initial_state: AnyArray | None = None,
    state_indices: AnyArray | None = None,
    chunk_states: AnyArray | None = None,
    chunk_size: int,
    dlast_state: AnyArray | None = None,
    du: AnyArray | None = None,
    ddelta: AnyArray | None = None,
    dA: AnyArray | None = None,
    dB: AnyArray | None = None,
    dC: AnyArray | None = None,
    dD: AnyArray | None = None,
    dz: AnyArray | None = None,
    ddelta_bias: AnyArray | None = None,
    dinitial_state: AnyArray | None = None,
    accumulate: Collection[str] = (),
) -> None: ...
def selective_state_update(
    *,
    on: Any,
    state: AnyArray,
    x: AnyArray,
    dt: AnyArray,
    A: AnyArray,
    B: AnyArray,
    C: AnyArray,
    D: AnyArray | None = None,
    z: AnyArray | None = None,
    dt_bias: AnyArray | None = None,
    dt_softplus: bool,
    state_indices: AnyArray | None = None,
    out: AnyArray,
) -> None: ...
def causal_conv1d(
    *,
    on: Any,
    x: AnyArray,
    weight: AnyArray,
    bias: AnyArray | None = None,
    activation: str | None,
    initial_state: AnyArray | None = None,
    cu_seqlens: AnyArray | None = None,
    seq_idx: AnyArray | None = None,
    final_state: AnyArray | None = None,
    out: AnyArray,
) -> None: ...
def causal_conv1d_bwd(
    *,
    on: Any,
    dout: AnyArray,
    x: AnyArray,
    weight: AnyArray,
    bias: AnyArray | None = None,
    activation: str | None,
    initial_state: AnyArray | None = None,
    state_indices: AnyArray | None = None,
    cu_seqlens: AnyArray | None = None,
    seq_idx: AnyArray | None = None,
    dfinal_state: AnyArray | None = None,
    dx: AnyArray | None = None,
    dweight: AnyArray | None = None,
    dbias: AnyArray | None = None,
    dinitial_state: AnyArray | None = None,
    accumulate: Collection[str] = (),
) -> None: ...
def causal_conv1d_update(
    *,
    on: Any,
    x: AnyArray,
    conv_state: AnyArray,
    weight: AnyArray,
    bias: AnyArray | None = None,
    activation: str | None,
    cache_seqlens: AnyArray | None = None,
    state_indices: AnyArray | None = None,
    out: AnyArray,
) -> None: ...
def rms_norm(
    *,
    on: Any,
    x: AnyArray,
    weight: AnyArray | None = None,
    residual: AnyArray | None = None,
    residual_out: AnyArray | None = None,
    z: AnyArray | None = None,
    out: AnyArray,
    group_size: int,
    norm_before_gate: bool,
    eps: float,
) -> None: ...
def rms_norm_bwd(
    *,
    on: Any,
    dout: AnyArray,
    x: AnyArray,
    weight: AnyArray | None = None,
    residual: AnyArray | None = None,
    z: AnyArray | None = None,
    group_size: int,
    norm_before_gate: bool,
    eps: float,
    dresidual_out: AnyArray | None = None,
    dx: AnyArray | None = None,
    dresidual: AnyArray | None = None,
    dz: AnyArray | None = None,
    dweight: AnyArray | None = None,
    accumulate: Collection[str] = (),
) -> None: ...
def linear(
    *, on: Any, x: AnyArray, weight: AnyArray, bias: AnyArray | None = None, out: AnyArray
) -> None: ...
def linear_bwd(
    *,
    on: Any,
    dout: AnyArray,
    x: AnyArray | None = None,
    weight: AnyArray | None = None,
    dx: AnyArray | None = None,
    dweight: AnyArray | None = None,
    dbias: AnyArray | None = None,
    accumulate: Collection[str] = (),
) -> None: ...
def embedding(*, on: Any, token_ids: AnyArray, weight: AnyArray, out: AnyArray) -> None: ...
def embedding_bwd(
    *,
    on: Any,
    dout: AnyArray,
    token_ids: AnyArray,
    dweight: AnyArray,
    accumulate: Collection[str] = (),
) -> None: ...
def cross_entropy(
    *,
    on: Any,
    logits: AnyArray,
    targets: AnyArray,
    ignore_index: int,
    loss: AnyArray | None = None,
    mean_loss: AnyArray | None = None,
    lse: AnyArray | None = None,
) -> None: ...
def cross_entropy_bwd(
    *,
    on: Any,
    logits: AnyArray,
    targets: AnyArray,
    ignore_index: int,
    lse: AnyArray,
    dloss: AnyArray | None = None,
    dmean_loss: AnyArray | None = None,
    dlogits: AnyArray,
    accumulate: Collection[str] = (),
) -> None: ...
def sum_of_squares(*, on: Any, x: AnyArray, out: AnyArray) -> None: ...
def adamw(
    *,
    on: Any,
    parameter: AnyArray,
    master: AnyArray | None,
    gradient: AnyArray,
    exp_avg: AnyArray,
    exp_avg_sq: AnyArray,
    sum_of_squares: AnyArray | None,
    max_norm: float,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None: ...
def sample(
    *,
    on: Any,
    logits: AnyArray,
    history: AnyArray | None = None,
    repetition_penalty: AnyArray | None = None,
    temperature: AnyArray | None = None,
    top_k: AnyArray | None = None,
    top_p: AnyArray | None = None,
    min_p: AnyArray | None = None,
    seed: AnyArray | None = None,
    position: AnyArray | None = None,
    out: AnyArray,
) -> None: ...
def mamba_block(
    *,
    on: Any,
    in_proj: AnyArray,
    in_proj_bias: AnyArray | None = None,
    conv_weight: AnyArray,
    conv_bias: AnyArray | None = None,
    x_proj: AnyArray,
    dt_proj: AnyArray,
    dt_bias: AnyArray | None = None,
    A: AnyArray,
    D: AnyArray | None = None,
    out_proj: AnyArray,
    out_proj_bias: AnyArray | None = None,
    x: AnyArray,
    conv_state: AnyArray | None = None,
    ssm_state: AnyArray | None = None,
    cu_seqlens: AnyArray | None = None,
    state_indices: AnyArray | None = None,
    dt_B_C_norm_eps: float,
    out: AnyArray,
) -> None: ...
def mamba_block_train_fwd(
    *,
    on: Any,
    in_proj: AnyArray,
    in_proj_bias: AnyArray | None = None,
    conv_weight: AnyArray,
    conv_bias: AnyArray | None = None,
    x_proj: AnyArray,
    dt_proj: AnyArray,
    dt_bias: AnyArray | None = None,
    A: AnyArray,
    D: AnyArray | None = None,
    out_proj: AnyArray,
    out_proj_bias: AnyArray | None = None,
    dt_B_C_norm_eps: float,
    x: AnyArray,
    initial_conv_state: AnyArray | None = None,
    initial_ssm_state: AnyArray | None = None,
    final_conv_state: AnyArray | None = None,
    last_ssm_state: AnyArray | None = None,
    cu_seqlens: AnyArray | None = None,
    xz: AnyArray | None,
    delta_B_C: AnyArray | None,
    y: AnyArray | None,
    chunk_states: AnyArray | None,
    u: AnyArray | None = None,
    delta: AnyArray | None = None,
    out: AnyArray,
) -> None: ...
def mamba_block_bwd(
    *,
    on: Any,
    in_proj: AnyArray,
    in_proj_bias: AnyArray | None = None,
    conv_weight: AnyArray,
    conv_bias: AnyArray | None = None,
    x_proj: AnyArray,
    dt_proj: AnyArray,
    dt_bias: AnyArray | None = None,
    A: AnyArray,
    D: AnyArray | None = None,
    out_proj: AnyArray,
    out_proj_bias: AnyArray | None = None,
    dt_B_C_norm_eps: float,
    x: AnyArray,
    initial_conv_state: AnyArray | None = None,
    initial_ssm_state: AnyArray | None = None,
    cu_seqlens: AnyArray | None = None,
    xz: AnyArray | None,
    delta_B_C: AnyArray | None,
    y: AnyArray | None,
    chunk_states: AnyArray | None,
    u: AnyArray | None = None,
    delta: AnyArray | None = None,
    dout: AnyArray,
    dfinal_conv_state: AnyArray | None = None,
    dlast_ssm_state: AnyArray | None = None,
    dx: AnyArray | None = None,
    dinitial_conv_state: AnyArray | None = None,
    dinitial_ssm_state: AnyArray | None = None,
    din_proj: AnyArray | None = None,
    din_proj_bias: AnyArray | None = None,
    dconv_weight: AnyArray | None = None,
    dconv_bias: AnyArray | None = None,
    dx_proj: AnyArray | None = None,
    ddt_proj: AnyArray | None = None,
    ddt_bias: AnyArray | None = None,
    dA: AnyArray | None = None,
    dD: AnyArray | None = None,
    dout_proj: AnyArray | None = None,
    dout_proj_bias: AnyArray | None = None,
    accumulate: Collection[str] = (),
) -> None: ...

MAMBA_BLOCK_CHUNK_SIZE: int

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

def parse_model_config(json: str) -> ModelConfig:
    """The text of a config.json; InvalidArgumentError if it describes no model."""

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
    def from_tensors(config: ModelConfig, tensors: dict[str, AnyArray]) -> Checkpoint:
        """Borrows the arrays for as long as the checkpoint, or a model of it, lives."""
    @staticmethod
    def initial(config: ModelConfig, seed: int) -> Checkpoint:
        """Random weights, drawn as the published implementation draws them."""
    @property
    def config(self) -> ModelConfig: ...
    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The dtype and shape of every tensor, by its stored name."""

class TrainerStep:
    @property
    def step(self) -> int: ...
    @property
    def loss(self) -> float: ...
    @property
    def grad_norm(self) -> float: ...
    @property
    def lr(self) -> float: ...

class Trainer:
    """`ssmcore.Trainer`, whose settings are all keywords here."""

    def __init__(
        self,
        language_model: LanguageModel,
        *,
        lr: float,
        warmup_steps: int,
        total_steps: int,
        final_lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        max_grad_norm: float,
        micro_batch: int,
        recompute_layers: bool,
    ) -> None: ...
    @property
    def steps_taken(self) -> int: ...
    def lr(self, step: int) -> float: ...
    def step(self, token_ids: np.ndarray, targets: np.ndarray) -> TrainerStep: ...
    def save(self, path: str) -> None: ...
    def load(self, path: str) -> None: ...

class ModelState:
    """The memory of running sequences, one slot each; `LanguageModel.new_state` makes it."""

    @property
    def num_slots(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def device(self) -> str: ...
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

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: str | None = None,
        trainable: bool = False,
        device: str = "cpu",
        batch_invariant: bool = False,
        progress: Callable[[int, int], object] | None = None,
    ) -> None:
        """`dtype` None: float32 on the CPU, the stored type on a GPU. Trainable: with weights
        copied as float32, which may be written."""
    @property
    def config(self) -> ModelConfig: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str:
        """ "cpu", or "cuda:0" and so on."""
    @property
    def num_parameters(self) -> int: ...
    @property
    def trainable(self) -> bool: ...
    def parameters(self) -> dict[str, AnyArray]:
        """Those of a trainable model, by their stored names, to be written."""
    def parameter_shapes(self) -> dict[str, tuple[int, ...]]: ...
    def refresh(self, stream: int | None = None) -> None:
        """Takes over what has been written to the parameters, by the host or on `stream`."""
    def loss_and_gradients(
        self,
        token_ids: AnyArray,
        targets: AnyArray,
        cu_seqlens: AnyArray | None,
        gradients: dict[str, AnyArray],
        accumulate: bool,
        num_targets: int,
        recompute_layers: bool,
    ) -> float:
        """The mean cross entropy; `gradients`, float32 by parameter name, are written or added to.

        `num_targets`: what the sum of losses is divided by; 0: by those not ignored (-100).
        """
    def new_state(self, num_slots: int = 1) -> ModelState: ...
    def new_decoder(self, state: ModelState, use_graphs: bool = True) -> Decoder: ...
    def forward(
        self,
        token_ids: AnyArray,
        logits: AnyArray | None,
        state: ModelState,
        state_indices: AnyArray | None = None,
        cu_seqlens: AnyArray | None = None,
        stream: int | None = None,
    ) -> None:
        """Runs (batch, seqlen) ids, from `state` on, which is updated.

        `logits`, written, is float32: (batch, seqlen, vocab_size), or (rows, vocab_size) for the
        last position of each row alone. With `cu_seqlens`, int32, batch is 1 and each sequence
        packed in it is a row. Ids and logits may be in memory of the host or of the model's GPU,
        where `stream` is that of their library.
        """
    def save(self, folder: str) -> None:
        """Writes the checkpoint it was made from as transformers reads it."""

class Decoder:
    """Sequences that go on together; see ssmcore.Decoder."""

    @property
    def runs_ahead(self) -> bool: ...
    def admit(
        self,
        slots: AnyArray,
        token_ids: AnyArray,
        lengths: AnyArray,
        temperature: AnyArray,
        top_k: AnyArray,
        top_p: AnyArray,
        min_p: AnyArray,
        repetition_penalty: AnyArray,
        seed: AnyArray,
    ) -> None:
        """The prompts lie one after another in `token_ids`; the rest is one number for each."""
    def step(self, slots: AnyArray) -> None: ...
    def read(self, slots: AnyArray) -> None: ...
    def take(self) -> list[int]: ...
