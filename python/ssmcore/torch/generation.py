"""Generating token by token, from states that the caller may hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops


@dataclass
class InferenceParams:
    """The states of running sequences, by layer, and how many tokens they have read."""

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[int, Any] = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        self.max_seqlen = max_seqlen
        self.max_batch_size = max_batch_size
        self.seqlen_offset = 0


class GenerateOutput(NamedTuple):
    sequences: Tensor
    scores: tuple[Tensor, ...] | None


class GenerationMixin:
    """`generate`, for a model with `forward` and `allocate_inference_cache`."""

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor,
        max_length: int,
        top_k: int = 1,
        top_p: float = 0.0,
        min_p: float = 0.0,
        temperature: float = 1.0,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        *,
        repetition_penalty: float = 1.0,
        eos_token_id: int | None = None,
        cg: bool = False,
        enable_timing: bool = False,
        vocab_size: int | None = None,
    ) -> Any:
        """Continues `input_ids`, (B, L), up to `max_length` tokens, the prompt included.

        Args:
            top_k: draw among the k likeliest; 1: always the likeliest; 0: among all.
            top_p, min_p, temperature, repetition_penalty: as for `ssmcore.ops.sample`, but top_p
                0 is off. Draws follow torch's default generator.
            return_dict_in_generate: return (sequences, scores) instead of sequences.
            output_scores: with it, the logits each token was drawn from; else scores is None.
            eos_token_id: end where every row has just drawn it.
            cg, enable_timing: taken, and without effect.
            vocab_size: draw among so many ids; default the model's.

        Returns:
            (B, L') ids, the prompt included.
        """
        batch = input_ids.shape[0]
        params = InferenceParams(max_seqlen=max_length, max_batch_size=batch)
        params.key_value_memory_dict = self.allocate_inference_cache(  # type: ignore[attr-defined]
            batch, max_length
        )
        seed = int(torch.randint(2**31, (), dtype=torch.int64))
        sequences, scores = input_ids, []
        tokens = input_ids
        while sequences.shape[1] < max_length:
            output = self(  # type: ignore[operator]
                tokens, inference_params=params, num_last_tokens=1
            )
            params.seqlen_offset += tokens.shape[1]
            logits = output.logits[:, 0].float()
            limit = vocab_size or getattr(getattr(self, "config", None), "vocab_size", None)
            logits = logits[:, :limit]
            scores.append(logits)
            drawn = ops.sample(
                logits.contiguous(),
                temperature=temperature,
                top_k=top_k,
                top_p=top_p or 1.0,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                history=sequences if repetition_penalty != 1.0 else None,
                seed=seed,
                position=sequences.shape[1],
            )
            tokens = drawn[:, None].to(input_ids.dtype)
            sequences = torch.cat([sequences, tokens], dim=1)
            if eos_token_id is not None and bool((tokens == eos_token_id).all()):
                break
        if not return_dict_in_generate:
            return sequences
        return GenerateOutput(sequences, tuple(scores) if output_scores else None)
