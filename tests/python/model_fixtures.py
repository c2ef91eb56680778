"""The trained model of the tests, in both formats, and what it should say."""

import functools
from pathlib import Path

import numpy as np

import ssmcore

DATA = Path(__file__).parents[1] / "data"
BUNDLED = Path(ssmcore.__file__).parent / "assets" / "mamba1-prose"
UPSTREAM = DATA / "mamba1-prose-upstream"

PROMPT = "It is a truth universally acknowledged, that a single man in possession of"


@functools.cache
def bundled_model() -> ssmcore.Model:
    return ssmcore.load(device="cpu")


@functools.cache
def model_on(device: str, **options) -> ssmcore.Model:
    """The bundled model in float32 on a device."""
    return ssmcore.load(device=device, dtype="float32", **options)


@functools.cache
def upstream_model() -> ssmcore.Model:
    return ssmcore.load(UPSTREAM, device="cpu")


@functools.cache
def golden() -> dict[str, np.ndarray]:
    """For PROMPT: ids (74), logits of transformers and upstream (74, 256), greedy ids (256)."""
    stored = np.load(DATA / "golden_mamba1_prose.npz")
    prompt = stored["prompt"][0]
    return {
        "prompt": prompt,
        "logits_transformers": stored["logits_transformers_fp32"][0],
        "logits_upstream": stored["logits_upstream_fp32"][0],
        "greedy": stored["greedy_upstream_fp32"][0, len(prompt) :],
    }


def golden_text() -> str:
    return bytes(golden()["greedy"].tolist()).decode()
