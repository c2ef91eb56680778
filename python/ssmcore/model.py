"""A language model as Python sees it: text or token ids in, text, ids, logits or a score out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from ssmcore import _core
from ssmcore._arrays import gpu_of, reshaped
from ssmcore._outputs import library_of
from ssmcore.decoder import Decoder
from ssmcore.errors import InvalidArgumentError
from ssmcore.generate import Generation, GenerationSettings
from ssmcore.scoring import Score, sum_nats, windows_of
from ssmcore.state import State
from ssmcore.tokenizer import Tokenizer, as_int32, as_token_ids


class Model:
    """A loaded language model; `ssmcore.load` makes it.

    It is never changed by use, so threads may share it, each with its own state. Loaded with
    `trainable=True`, it changes where its `parameters` are written and `refresh` is called.
    """

    def __init__(self, language_model: _core.LanguageModel, tokenizer: Tokenizer | None):
        self._language_model = language_model
        self._tokenizer = tokenizer

    def __repr__(self) -> str:
        config = self.config
        return (
            f"<ssmcore.Model {config.model_type}, {config.n_layer} layers, "
            f"{self.num_parameters:,} parameters, {self.dtype}, on {self.device}>"
        )

    @property
    def config(self) -> _core.ModelConfig:
        """The sizes and options of the model, read-only."""
        return self._language_model.config

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Text to ids and back (`encode`, `decode`); None if the model came without one."""
        return self._tokenizer

    @property
    def dtype(self) -> str:
        """The type of activations: "float32", "bfloat16" or "float16"."""
        return self._language_model.dtype

    @property
    def device(self) -> str:
        """Where it runs: "cpu", or "cuda:0" and so on."""
        return self._language_model.device

    @property
    def num_parameters(self) -> int:
        """How many numbers the model has learnt, tied weights counted once."""
        return self._language_model.num_parameters

    def new_state(self, batch: int = 1) -> State:
        """The memory of `batch` sequences at their start, for `forward` and `step`."""
        return State(self._language_model.new_state(batch))

    def new_decoder(self, state: State) -> Decoder:
        """For sequences in the slots of `state` that join, go on together and leave."""
        return Decoder(self._language_model.new_decoder(_native(state, "new_decoder")))

    def forward(
        self,
        token_ids: Any,
        state: State | None = None,
        logits: Literal["all", "last", "none"] = "all",
        *,
        cu_seqlens: Any = None,
        state_indices: Any = None,
    ) -> tuple[Any, State]:
        """Runs the model over `token_ids`, from `state` on.

        Args:
            token_ids: (B, T) or (T,) integers below `config.vocab_size`, T ≥ 1: a list, a NumPy
                array or a torch tensor. Those in memory of the model's GPU, int32 or int64, stay
                there, and one that is out of range is reported by a later call.
            state: the memory of B sequences, updated in place; None: of new ones.
            logits: which to return.
            cu_seqlens: (S + 1,) integers, for S sequences of any lengths packed one after another
                into `token_ids` (T,): sequence s is `token_ids[cu_seqlens[s]:cu_seqlens[s + 1]]`.
                They ascend from 0 to T. The state is then of S sequences; that of an empty one
                stays as it is.
            state_indices: the slot of `state` that each sequence uses, all different; the others
                stay as they are. None: sequence b uses slot b, and there are no others.

        Returns:
            The logits and the state. Logits are float32 of the library of `token_ids`: (B, T, V)
            or (T, V) for "all", (B, V) or (V,) for "last", None for "none". Packed: (T, V), or
            (S, V) for "last".

        Raises:
            InvalidArgumentError: for another rank or dtype, no tokens, an id or a slot out of
                range, a state of another number of sequences, `cu_seqlens` that do not ascend from
                0 to T, or an empty sequence where its last logits are wanted. The state is then as
                it was.
        """
        if logits not in ("all", "last", "none"):
            raise InvalidArgumentError(
                f'forward: logits should be "all", "last" or "none", got {logits!r}'
            )
        packed = cu_seqlens is not None
        ids = _as_ids(token_ids, "forward", ranks=(1,) if packed else (1, 2))
        batch = ids if len(ids.shape) == 2 else reshaped(ids, 1, ids.shape[0])
        ends = as_int32(cu_seqlens, "forward", "cu_seqlens", at_least=2)
        slots = as_int32(state_indices, "forward", "state_indices")
        num_rows = len(batch) if ends is None else ends.size - 1
        if state is None:
            if slots is not None:
                raise InvalidArgumentError("forward: state_indices needs a state")
            state = self.new_state(num_rows)
        native = _native(state, "forward")
        library, stream = library_of(token_ids), _stream_of(token_ids)
        if logits == "none":
            self._language_model.forward(batch, None, native, slots, ends, stream)
            return None, state
        shape = tuple(batch.shape) if logits == "all" else (num_rows,)
        out = library.empty((*shape, self.config.vocab_size), "float32")
        self._language_model.forward(batch, out, native, slots, ends, stream)
        is_batch = len(ids.shape) == 2 or (packed and logits == "last")
        return library.hand_over(out if is_batch else out[0]), state

    def step(self, token_ids: Any, state: State, *, state_indices: Any = None) -> Any:
        """Feeds one token to each of B sequences and returns the logits of the next, (B, V).

        `token_ids` is (B,) or (B, 1) integers, `state` the memory of the sequences, updated in
        place; `state_indices`, logits and errors are those of `forward`.
        """
        ids = _as_ids(token_ids, "step", ranks=(1, 2))
        slots = as_int32(state_indices, "step", "state_indices")
        shape = tuple(ids.shape)
        if len(shape) == 2 and shape[1] != 1:
            raise InvalidArgumentError(f"step: token_ids should be (B,) or (B, 1), got {shape}")
        library = library_of(token_ids)
        out = library.empty((shape[0], self.config.vocab_size), "float32")
        self._language_model.forward(
            reshaped(ids, shape[0], 1),
            out,
            _native(state, "step"),
            slots,
            None,
            _stream_of(token_ids),
        )
        return library.hand_over(out)

    @property
    def parameters(self) -> dict[str, Any]:
        """The float32 weights of a trainable model by their stored names, to be read and written.

        NumPy arrays, or on a GPU `ssmcore.Array`s, which other libraries take over by DLPack
        (`torch.from_dlpack`). The model follows what has been written with the next `refresh`.
        Nothing else may use it meanwhile. Raises InvalidArgumentError for a model that was not
        loaded as trainable.
        """
        if not self._language_model.trainable:
            raise InvalidArgumentError(
                "parameters: the model's weights cannot be written; load it with trainable=True"
            )
        return self._language_model.parameters()

    def refresh(self, stream: int | None = None) -> None:
        """Takes over what has been written to `parameters`.

        On a GPU in the order of `stream`, the handle of the CUDA stream on which it was written;
        None: the default stream.
        """
        if self.device == "cpu":
            self._language_model.refresh()
        else:
            from ssmcore._gpu_outputs import DEFAULT_STREAM

            self._language_model.refresh(stream or DEFAULT_STREAM)

    def loss_and_gradients(
        self,
        token_ids: Any,
        targets: Any,
        *,
        cu_seqlens: Any = None,
        gradients: dict[str, Any] | None = None,
        num_targets: int | None = None,
        recompute_layers: bool = False,
    ) -> tuple[float, dict[str, Any]]:
        """One training step without the update: the mean cross entropy, and its gradients.

        Args:
            token_ids: (B, T) or (T,) integers below `config.vocab_size`: sequences from their
                start. Those in memory of the model's GPU, int32 or int64 and contiguous, stay
                there, and one that is out of range is reported by a later call.
            targets: integers of the same shape, likewise: what each position should predict; -100
                where nothing is asked.
            cu_seqlens: (S + 1,) integers: packed sequences, as in `forward`.
            gradients: float32 arrays by parameter name, on the model's device, which are added to;
                of parameters that it does not name none is computed. None: new ones, of all
                parameters: NumPy arrays, or `ssmcore.Array`s on a GPU.
            num_targets: what the sum of the positions' losses is divided by; None: the number of
                targets but for those of -100. Where a batch is done in parts whose gradients are
                added up, their number in all parts.
            recompute_layers: keep only what enters each layer, and compute each layer again when
                its gradients are due: less memory for more time.

        Returns:
            The loss and the gradients by the names of the parameters, as they are stored.

        Raises:
            InvalidArgumentError: for ids or targets of another shape or out of range, no target, or
                gradients of another name, shape or dtype.
        """
        op = "loss_and_gradients"
        packed = cu_seqlens is not None
        ids = _as_ids(token_ids, op, ranks=(1,) if packed else (1, 2))
        expected = _as_ids(targets, op, ranks=(len(ids.shape),), name="targets")
        if num_targets is not None and num_targets < 1:
            raise InvalidArgumentError(f"{op}: num_targets is {num_targets}, expected at least 1")
        accumulate = gradients is not None
        if gradients is None:
            shapes = self._language_model.parameter_shapes()
            gradients = {name: self._empty(shape) for name, shape in shapes.items()}
        loss = self._language_model.loss_and_gradients(
            reshaped(ids, -1, ids.shape[-1]),
            reshaped(expected, -1, expected.shape[-1]),
            as_int32(cu_seqlens, op, "cu_seqlens", at_least=2),
            gradients,
            accumulate,
            num_targets or 0,
            recompute_layers,
        )
        return loss, gradients

    def _empty(self, shape: tuple[int, ...]) -> Any:
        """A float32 array on the model's device."""
        if self.device == "cpu":
            return np.empty(shape, np.float32)
        return _core.empty(shape, "float32", self.device)

    def generate(
        self,
        prompt: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
        max_new_tokens: int = 128,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | Sequence[int] = 0,
        stop: str | Sequence[str] | None = None,
        ignore_eos: bool = False,
        state: State | None = None,
    ) -> Any:
        """Continues one prompt or several and returns the continuation alone.

        Args:
            prompt: text, token ids, or a list of either, of any lengths.
            max_new_tokens: how many tokens to generate at most.
            temperature: 0 always takes the likeliest token; more makes choices more random.
            top_k: choose among the k likeliest tokens; 0: among all.
            top_p: choose among the likeliest tokens that together reach this probability.
            min_p: choose among tokens at least this probable, relative to the likeliest.
            repetition_penalty: above 1, makes tokens that have occurred less likely.
            seed: of the random choices. Row b draws with `seed + b`, or with `seed[b]` of a list,
                whatever the other rows are.
            stop: strings that end the text when they come; they are not returned. Ids are then
                those whose text ends before the stop string.
            ignore_eos: go on after an end-of-sequence token, and return it.
            state: the memory of as many sequences, which the prompts follow; None: of new ones.
                Afterwards it has read the prompts and every token chosen, a final stop or
                end-of-sequence token included, so that `max_new_tokens=0` reads the prompts and
                no more. Tokens that only begin a text are not added to a prompt that follows
                another; the repetition penalty knows only the tokens of this call.

        Returns:
            A str for a str, a list of str for a list of str, a list of ids for ids and a list of
            such lists for several.

        Raises:
            InvalidArgumentError: for a prompt of no tokens, an id or a setting out of range,
                seeds or a state for another number of rows, or text (or `stop`) where the model
                has no tokenizer.
        """
        settings = GenerationSettings(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
            ignore_eos=ignore_eos,
        )
        return self.start_generation(prompt, settings, "generate", state).collect()

    def stream(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = 128,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] | None = None,
        ignore_eos: bool = False,
        state: State | None = None,
    ) -> Iterator[Any]:
        """Continues one prompt as `generate` does, yielding the continuation as it comes.

        Text comes in pieces that are never empty and never hold half a character nor what may be
        the beginning of a stop string; ids come one by one. Arguments and errors are those of
        `generate`; a list of prompts is refused. The state has read all once the last piece has
        come.
        """
        settings = GenerationSettings(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
            ignore_eos=ignore_eos,
        )
        generation = self.start_generation(prompt, settings, "stream", state)
        if generation.is_batch:
            raise InvalidArgumentError("stream: expected one prompt, got a list of prompts")
        pieces = (piece for _, piece in generation)
        if generation.is_text:
            return (piece for piece in pieces if piece)
        return (token_id for piece in pieces for token_id in piece)

    def start_generation(
        self,
        prompt: Any,
        settings: GenerationSettings,
        op: str = "generate",
        state: State | None = None,
    ) -> Generation:
        """The run behind `generate` and `stream`, for those who count its tokens."""
        native = None if state is None else _native(state, op)
        return Generation(self._language_model, self._tokenizer, prompt, settings, op, native)

    def score(
        self,
        text: str,
        window: int | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> Score:
        """How well the model predicts `text`: bits per byte, perplexity.

        Without a window the text is one sequence, from an empty state; all its tokens but the
        first are scored. With one, it is cut into consecutive windows of `window` tokens, each
        from an empty state, and each of a window's next tokens is scored (its last is the first
        of the next window); an incomplete last window is left out. No special tokens are added.

        `progress(done, total)`, if given, is called with numbers of tokens as they are scored.

        Raises InvalidArgumentError for a text too short to score, or without a tokenizer.
        """
        if self._tokenizer is None:
            raise InvalidArgumentError("score: text needs a tokenizer, and this model has none")
        token_ids = np.asarray(self._tokenizer.encode(text, add_special_tokens=False), np.int64)
        inputs, targets = windows_of(token_ids, window)
        nats = sum_nats(self._language_model, inputs, targets, progress)
        read = token_ids[: targets.size + 1].tolist()
        num_bytes = self._tokenizer.num_bytes(read) - self._tokenizer.num_bytes(read[:1])
        return Score(tokens=targets.size, bytes=num_bytes, nats=nats)


def _as_ids(token_ids: Any, op: str, ranks: tuple[int, ...], name: str = "token_ids") -> Any:
    """Token ids as an int64 NumPy array, or as they are in memory of a GPU."""
    if gpu_of(token_ids) is None:
        return as_token_ids(token_ids, op, name, ranks)
    if len(token_ids.shape) not in ranks or 0 in token_ids.shape:
        raise InvalidArgumentError(
            f"{op}: {name} should be token ids of rank {' or '.join(map(str, ranks))}, "
            f"got shape {tuple(token_ids.shape)}"
        )
    return token_ids


def _stream_of(array: Any) -> int | None:
    """The stream of an array in memory of a GPU, by its library."""
    index = gpu_of(array)
    if index is None:
        return None
    from ssmcore._gpu_outputs import gpu_library_of

    return gpu_library_of(array, index).stream()


def _native(state: State, op: str) -> _core.ModelState:
    if not isinstance(state, State):
        raise InvalidArgumentError(f"{op}: state should be a State, got {type(state).__name__}")
    return state.native
