"""Rows of a table by token id."""

from __future__ import annotations

import numpy as np
import pytest
import reference
from backends import Backend
from helpers import (
    DTYPES,
    LAYOUTS,
    assert_same_bits,
    place,
    refuses,
    refuses_value,
)

from ssmcore import ops


def table(vocab_size: int = 11, d_model: int = 19, dtype: str = "float32") -> np.ndarray:
    values = np.random.default_rng(0).standard_normal((vocab_size, d_model))
    return values.astype(DTYPES[dtype])


@pytest.mark.parametrize("id_dtype", [np.int32, np.int64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (40,), (2, 3), (2, 1, 5)])
def test_copies_rows(
    backend: Backend, shape: tuple[int, ...], dtype: str, id_dtype: type[np.integer]
) -> None:
    weight = table(dtype=dtype)
    token_ids = np.array(np.random.default_rng(1).integers(0, 11, shape), id_dtype)
    out = backend.call(ops.embedding, token_ids=token_ids, weight=weight)
    assert_same_bits(out, reference.embedding(token_ids, weight).astype(DTYPES[dtype]))


def test_first_and_last_row(backend: Backend) -> None:
    weight = table()
    out = backend.call(ops.embedding, token_ids=np.array([0, 10]), weight=weight)
    assert_same_bits(out, weight[[0, 10]])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_ids(backend: Backend, layout: str) -> None:
    token_ids = np.random.default_rng(1).integers(0, 11, (3, 4, 5))
    weight = table()
    out = backend.call(ops.embedding, token_ids=place(token_ids, layout), weight=weight)
    assert_same_bits(out, weight[token_ids])


def test_padded_table(backend: Backend) -> None:
    weight = place(table(), "padded")
    token_ids = np.arange(11)[::-1].copy()
    out = backend.call(ops.embedding, token_ids=token_ids, weight=weight)
    assert_same_bits(out, weight[token_ids])


@pytest.mark.parametrize(
    ("token_id", "id_dtype"), [(11, np.int32), (-1, np.int32), (2**40, np.int64), (-1, np.int64)]
)
def test_id_out_of_range(backend: Backend, token_id: int, id_dtype: type[np.integer]) -> None:
    token_ids = np.array([3, token_id], id_dtype)
    with refuses_value(backend, "embedding", "token_ids", str(token_id), "10"):
        backend.call(ops.embedding, token_ids=token_ids, weight=table())


@pytest.mark.parametrize(
    ("name", "bad", "words"),
    [
        ("token_ids", np.zeros(3, np.float32), ["float32"]),
        ("token_ids", np.zeros(3, np.uint8), ["uint8"]),
        ("weight", np.zeros(11, np.float32), []),
        ("weight", np.zeros((11, 19), np.int32), ["int32"]),
    ],
)
def test_bad_argument(backend: Backend, name: str, bad: np.ndarray, words: list[str]) -> None:
    inputs = {"token_ids": np.array([1, 2, 3]), "weight": table(), name: bad}
    with refuses("embedding", name, *words):
        backend.call(ops.embedding, **inputs)
