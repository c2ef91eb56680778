"""Choosing the next token: which ids can come, how often, and what a draw depends on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
from backends import Backend
from helpers import (
    LAYOUTS,
    assert_same_bits,
    place,
    refuses_value,
)
from hypothesis import given
from hypothesis import strategies as st

from ssmcore import ops

VOCAB_SIZE = 23
DRAWS = 20_000


def random_logits(*shape: int, seed: int = 0) -> np.ndarray:
    return (2 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def frequencies(backend: Backend, logits: np.ndarray, **settings: Any) -> np.ndarray:
    """How often each id comes in `DRAWS` rows of the same logits, each with its own seed."""
    repeated = np.broadcast_to(logits, (DRAWS, len(logits)))
    if "history" in settings:
        settings["history"] = np.broadcast_to(
            settings["history"], (DRAWS, len(settings["history"]))
        )
    token_ids = backend.call(ops.sample, logits=repeated, **settings)
    assert token_ids.shape == (DRAWS,)
    assert token_ids.dtype == np.int64
    return np.bincount(token_ids, minlength=len(logits))


def assert_follows(counts: np.ndarray, probabilities: np.ndarray) -> None:
    """Pearson's chi-square of counts stays in the bulk of its distribution (5 deviations)."""
    assert not counts[probabilities == 0].any(), "an id that is filtered out has been drawn"
    expected = counts.sum() * probabilities
    common = expected >= 5
    statistic = ((counts - expected)[common] ** 2 / expected[common]).sum()
    freedom = common.sum() - 1
    assert statistic <= freedom + 5 * np.sqrt(2 * freedom), f"chi-square {statistic:.4g}"


# --- The distribution -----------------------------------------------------------------------------

HISTORY = np.array([13, 13, -1, 21, 7, -1])  # likely ids, with logits of both signs

SETTINGS = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": VOCAB_SIZE},
    {"top_k": 10 * VOCAB_SIZE},
    {"top_k": 2**32 + 1},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"top_p": 1e-6},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"repetition_penalty": 1.3, "history": HISTORY},
    {"repetition_penalty": 0.7, "history": HISTORY},
    # Each pair gives another distribution when its two filters change places.
    {"repetition_penalty": 1.5, "history": HISTORY, "top_k": 4},
    {"repetition_penalty": 1.5, "history": HISTORY, "temperature": 2.0, "top_p": 0.7},
    {"temperature": 2.0, "top_p": 0.6},
    {"temperature": 0.5, "min_p": 0.05},
    {"top_k": 4, "top_p": 0.75},
    {"top_p": 0.6, "min_p": 0.3},
    {
        "repetition_penalty": 1.2,
        "history": HISTORY,
        "temperature": 1.5,
        "top_k": 12,
        "top_p": 0.9,
        "min_p": 0.04,
    },
]


def names(settings: dict[str, Any]) -> str:
    parts = [name if name == "history" else f"{name}={value}" for name, value in settings.items()]
    return " ".join(parts) or "defaults"


@pytest.mark.parametrize("settings", SETTINGS, ids=names)
def test_frequencies(backend: Backend, settings: dict[str, Any]) -> None:
    logits = random_logits(VOCAB_SIZE)
    probabilities = reference.sampling_distribution(logits, **settings)
    assert_follows(frequencies(backend, logits, **settings), probabilities)


def test_frequencies_over_a_large_vocabulary(backend: Backend) -> None:
    logits = random_logits(400, seed=3) / 4
    probabilities = reference.sampling_distribution(logits)
    assert_follows(frequencies(backend, logits), probabilities)


def test_frequencies_over_positions(backend: Backend) -> None:
    """The draws of one seed at many positions follow the same distribution."""
    logits = random_logits(VOCAB_SIZE)
    seeds, positions = np.full(DRAWS, 17), np.arange(DRAWS)
    counts = frequencies(backend, logits, seed=seeds, position=positions)
    assert_follows(counts, reference.sampling_distribution(logits))


def test_successive_draws_are_independent(backend: Backend) -> None:
    logits = np.zeros((DRAWS, 4), np.float32)
    first = backend.call(ops.sample, logits=logits, position=0)
    second = backend.call(ops.sample, logits=logits, position=1)
    pairs = np.bincount(4 * first + second, minlength=16)
    assert_follows(pairs, np.full(16, 1 / 16))


def test_excluded_logits_never_come(backend: Backend) -> None:
    logits = random_logits(VOCAB_SIZE)
    logits[[0, 5, VOCAB_SIZE - 1]] = -np.inf
    counts = frequencies(backend, logits)
    assert not counts[[0, 5, VOCAB_SIZE - 1]].any()
    assert_follows(counts, reference.sampling_distribution(logits))


def test_one_possible_id_always_comes(backend: Backend) -> None:
    logits = np.full(VOCAB_SIZE, -np.inf, np.float32)
    logits[9] = -3
    assert frequencies(backend, logits)[9] == DRAWS


def test_logits_far_from_zero(backend: Backend) -> None:
    logits = random_logits(VOCAB_SIZE)
    shifted = (np.round(logits * 16) / 16 + 1e4).astype(np.float32)
    counts = frequencies(backend, shifted)
    assert_follows(counts, reference.sampling_distribution(shifted))


# --- Greedy ---------------------------------------------------------------------------------------


def test_temperature_zero_takes_the_largest(backend: Backend) -> None:
    logits = random_logits(50, 1000)
    token_ids = backend.call(ops.sample, logits=logits, temperature=0.0)
    assert_same_bits(token_ids, logits.argmax(axis=1))


@pytest.mark.parametrize("vocab_size", [1, 2, 15, 16, 17, 256, 1000])
def test_the_lowest_id_among_equals(backend: Backend, vocab_size: int) -> None:
    logits = np.full((3, vocab_size), -1, np.float32)
    logits[0, vocab_size // 2 :] = 2
    logits[2, [vocab_size // 3, -1]] = 5
    token_ids = backend.call(ops.sample, logits=logits, temperature=0.0)
    assert_same_bits(token_ids, np.array([vocab_size // 2, 0, vocab_size // 3]))


def test_greedy_after_the_repetition_penalty(backend: Backend) -> None:
    logits = np.array([[3.0, 2.0, -1.0], [-1.0, -1.5, -2.0]], np.float32)
    history = np.array([[0, 0], [0, -1]])
    arguments = {"logits": logits, "history": history, "temperature": 0.0}
    assert backend.call(ops.sample, **arguments, repetition_penalty=1.4).tolist() == [0, 0]
    assert backend.call(ops.sample, **arguments, repetition_penalty=1.6).tolist() == [1, 1]


@given(seed=st.integers(0, 2**31), vocab_size=st.integers(1, 300))
def test_top_k_of_one_is_greedy(backend: Backend, seed: int, vocab_size: int) -> None:
    logits = random_logits(4, vocab_size, seed=seed)
    greedy = backend.call(ops.sample, logits=logits, temperature=0.0)
    assert_same_bits(backend.call(ops.sample, logits=logits, top_k=1, seed=seed), greedy)


# --- What a draw depends on -----------------------------------------------------------------------

ROWS = 64


def test_the_same_call_draws_the_same(backend: Backend) -> None:
    logits = random_logits(ROWS, 300)
    first = backend.call(ops.sample, logits=logits, seed=5, position=9)
    assert_same_bits(backend.call(ops.sample, logits=logits, seed=5, position=9), first)


def test_seed_and_position_change_the_draw(backend: Backend) -> None:
    logits = np.zeros((ROWS, 10_000), np.float32)
    draws = [
        backend.call(ops.sample, logits=logits, seed=seed, position=position)
        for seed, position in [(0, 0), (1000, 0), (0, 1), (2**40, 0), (0, 2**40)]
    ]
    for i, one in enumerate(draws):
        for other in draws[:i]:
            assert np.mean(one == other) < 0.1


def test_default_seed_is_the_row(backend: Backend) -> None:
    logits = random_logits(ROWS, 300)
    default = backend.call(ops.sample, logits=logits)
    assert_same_bits(backend.call(ops.sample, logits=logits, seed=0), default)
    assert_same_bits(backend.call(ops.sample, logits=logits, seed=np.arange(ROWS)), default)


def test_a_scalar_seed_counts_up_with_the_row(backend: Backend) -> None:
    logits = random_logits(ROWS, 300)
    scalar = backend.call(ops.sample, logits=logits, seed=41)
    assert_same_bits(backend.call(ops.sample, logits=logits, seed=41 + np.arange(ROWS)), scalar)


@pytest.mark.parametrize("settings", SETTINGS, ids=names)
def test_a_row_draws_the_same_alone(backend: Backend, settings: dict[str, Any]) -> None:
    logits = random_logits(ROWS, VOCAB_SIZE)
    if "history" in settings:
        settings = {**settings, "history": np.tile(settings["history"], (ROWS, 1))}
    together = backend.call(ops.sample, logits=logits, **settings, seed=7, position=3)
    for b in range(0, ROWS, 9):
        row = (
            {**settings, "history": settings["history"][:1]} if "history" in settings else settings
        )
        alone = backend.call(ops.sample, logits=logits[b : b + 1], **row, seed=7 + b, position=3)
        assert alone.tolist() == [together[b]]


def test_settings_by_row(backend: Backend) -> None:
    logits = random_logits(4, VOCAB_SIZE)
    by_row: dict[str, np.ndarray] = {
        "temperature": np.array([0.0, 0.5, 1.0, 4.0], np.float32),
        "top_k": np.array([0, 3, 0, 20], np.int32),
        "top_p": np.array([1.0, 0.9, 0.5, 1.0], np.float32),
        "min_p": np.array([0.0, 0.0, 0.1, 0.2], np.float32),
        "repetition_penalty": np.array([1.0, 1.5, 1.0, 0.5], np.float32),
        "position": np.array([0, 8, 1, 3]),
    }
    history = np.tile(HISTORY, (4, 1))
    for seed in range(20):
        arguments = {"history": history, "seed": np.full(4, seed)}
        together = backend.call(ops.sample, logits=logits, **by_row, **arguments)
        for b in range(4):
            alone = backend.call(
                ops.sample,
                logits=logits[b : b + 1],
                history=history[b : b + 1],
                seed=seed,
                **{name: values[b].item() for name, values in by_row.items()},
            )
            assert alone.tolist() == [together[b]]


def test_threads_do_not_change_a_draw(backend: Backend, set_num_threads: Any) -> None:
    logits = random_logits(ROWS, 1000)
    set_num_threads(1)
    one = backend.call(ops.sample, logits=logits, top_p=0.9)
    set_num_threads(3)
    assert_same_bits(backend.call(ops.sample, logits=logits, top_p=0.9), one)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_arguments(backend: Backend, layout: str) -> None:
    logits = random_logits(ROWS, VOCAB_SIZE)
    history = np.random.default_rng(1).integers(0, VOCAB_SIZE, (ROWS, 5))
    arguments = {"top_p": 0.9, "repetition_penalty": 1.3}
    expected = backend.call(ops.sample, logits=logits, history=history, **arguments)
    placed = {"logits": place(logits, layout), "history": place(history, layout)}
    assert_same_bits(backend.call(ops.sample, **placed, **arguments), expected)


@pytest.mark.parametrize("id_dtype", [np.int32, np.int64])
def test_history_dtypes(backend: Backend, id_dtype: type[np.integer]) -> None:
    logits = np.array([[3.0, 2.0]], np.float32)
    history = np.array([[0]], id_dtype)
    settings = {"history": history, "repetition_penalty": 2.0, "temperature": 0.0}
    assert backend.call(ops.sample, logits=logits, **settings).tolist() == [1]


def test_logits_stay(backend: Backend) -> None:
    logits = random_logits(ROWS, VOCAB_SIZE)
    before = logits.copy()
    history = np.tile(HISTORY, (ROWS, 1))
    filters = {"temperature": 0.7, "top_k": 5, "top_p": 0.8, "repetition_penalty": 1.3}
    backend.call(ops.sample, logits=logits, history=history, **filters)
    assert_same_bits(logits, before)


# --- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bad", "words"),
    [
        ("logits", np.zeros(7, np.float32), []),
        ("logits", np.zeros((3, 7), np.float16), ["float16", "float32"]),
        ("temperature", -3.0, ["-3"]),
        ("temperature", float("nan"), []),
        ("temperature", np.array([1, 1, -1], np.float32), ["-1"]),
        ("temperature", np.ones(2, np.float32), ["3"]),
        ("top_k", -1, ["-1"]),
        ("top_k", 2.5, ["2.5"]),
        ("top_p", 0.0, ["0"]),
        ("top_p", 2.0, ["2"]),
        ("top_p", float("nan"), []),
        ("min_p", -1.0, ["-1"]),
        ("min_p", 2.0, ["2"]),
        ("repetition_penalty", 0.0, ["0"]),
        ("repetition_penalty", -2.0, ["-2"]),
        ("history", np.zeros((3, 2), np.float32), ["float32"]),
        ("history", np.zeros((2, 2), np.int64), ["2", "3"]),
        ("history", np.array([[0], [7], [0]]), ["7"]),
        ("seed", np.arange(4), ["3"]),
        ("seed", 1.5, ["1.5"]),
        ("position", np.arange(2), ["3"]),
    ],
)
def test_bad_argument(backend: Backend, name: str, bad: Any, words: list[str]) -> None:
    # A penalty that does something, so that the history is looked at.
    inputs: dict[str, Any] = {"logits": random_logits(3, 7), "repetition_penalty": 2.0, name: bad}
    with refuses_value(backend, "sample", name, *words):
        backend.call(ops.sample, **inputs)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad_row", [[0, np.nan, 1], [-np.inf] * 3], ids=["nan", "nothing-finite"])
def test_logits_without_a_choice(
    backend: Backend, bad_row: list[float], temperature: float
) -> None:
    logits = np.array([[1, 2, 3], bad_row], np.float32)
    with refuses_value(backend, "sample", "logits", "1"):
        backend.call(ops.sample, logits=logits, temperature=temperature)
