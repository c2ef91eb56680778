"""Arrays of any library that exports DLPack, in capsules of version 1 and the older ones."""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from calls import CALLS, IN_PLACE, as_tuple
from helpers import DTYPES, assert_same_bits, refuses

from ssmcore import ops


class Array:
    """An array of a library that ssmcore has never heard of, in the memory of a NumPy one."""

    __module__ = "unheard_of.arrays"

    def __init__(self, memory: np.ndarray) -> None:
        self.memory = memory
        self.shape, self.dtype = memory.shape, memory.dtype

    def reshape(self, *shape: int) -> Array:
        return type(self)(self.memory.reshape(*shape))

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)

    def __dlpack__(self, *, max_version: tuple[int, int] | None = None, **_: Any) -> Any:
        if self.dtype == DTYPES["bfloat16"]:  # which NumPy does not export
            exporter: Any = torch.from_numpy(self.memory.view(np.int16)).view(torch.bfloat16)
        else:
            exporter = self.memory
        return exporter.__dlpack__(max_version=max_version)


class OldArray(Array):
    """The same from before DLPack 1.0: a capsule that knows no version and no read-only memory."""

    __module__ = "unheard_of.arrays"

    def __dlpack__(self) -> Any:  # type: ignore[override]
        return super().__dlpack__()


KINDS = pytest.mark.parametrize("kind", [Array, OldArray])


@pytest.fixture
def with_from_dlpack(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's module, with a `from_dlpack` of its own."""
    module = types.ModuleType("unheard_of")
    module.from_dlpack = lambda producer: Array(np.from_dlpack(producer))  # type: ignore
    monkeypatch.setitem(sys.modules, "unheard_of", module)


def convert(arguments: dict[str, Any], kind: type[Array]) -> dict[str, Any]:
    return {
        name: kind(value) if isinstance(value, np.ndarray) else value
        for name, value in arguments.items()
    }


@KINDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CALLS)
def test_results_are_numpy_without_a_from_dlpack(name: str, dtype: str, kind: type[Array]) -> None:
    expected = as_tuple(getattr(ops, name)(**CALLS[name](dtype)))
    results = as_tuple(getattr(ops, name)(**convert(CALLS[name](dtype), kind)))
    for ours, theirs in zip(expected, results, strict=True):
        assert type(theirs) is np.ndarray
        assert_same_bits(theirs, ours)


@KINDS
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", CALLS)
def test_results_go_through_from_dlpack(
    name: str, dtype: str, kind: type[Array], with_from_dlpack: None
) -> None:
    expected = as_tuple(getattr(ops, name)(**CALLS[name](dtype)))
    results = as_tuple(getattr(ops, name)(**convert(CALLS[name](dtype), kind)))
    for ours, theirs in zip(expected, results, strict=True):
        assert type(theirs) is Array
        assert_same_bits(theirs.memory.copy(), ours)


def test_bfloat16_results_stay_numpy(with_from_dlpack: None) -> None:
    arguments = CALLS["rms_norm"]("bfloat16")
    for result in ops.rms_norm(**convert(arguments, Array)):
        assert type(result) is np.ndarray
        assert result.dtype == DTYPES["bfloat16"]


class Standard(Array):
    """What the Python array API standard asks for: functions in a namespace, few methods."""

    __module__ = "unheard_of.arrays"

    @property
    def reshape(self) -> Any:
        raise AttributeError("reshape is a function of the namespace")

    def __array_namespace__(self) -> Any:
        return types.SimpleNamespace(
            from_dlpack=lambda producer: Standard(np.from_dlpack(producer)),
            reshape=lambda array, shape: Standard(array.memory.reshape(shape)),
        )


@pytest.mark.parametrize("name", CALLS)
def test_the_namespace_of_the_array_api_comes_first(name: str, with_from_dlpack: None) -> None:
    expected = as_tuple(getattr(ops, name)(**CALLS[name]("float32")))
    results = as_tuple(getattr(ops, name)(**convert(CALLS[name]("float32"), Standard)))
    for ours, theirs in zip(expected, results, strict=True):
        assert type(theirs) is Standard
        assert_same_bits(theirs.memory.copy(), ours)


def test_more_than_two_dimensions(with_from_dlpack: None) -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)
    expected = ops.rms_norm(x, None)
    for kind in (Array, OldArray, Standard):
        assert_same_bits(ops.rms_norm(kind(x), None).memory.copy(), expected)


@KINDS
def test_packed_boundaries(kind: type[Array], with_from_dlpack: None) -> None:
    arguments = CALLS["selective_scan"]("float32")
    arguments = {
        name: value[:1] if isinstance(value, np.ndarray) and len(value) == 2 else value
        for name, value in arguments.items()
    }
    del arguments["initial_state"]
    arguments["cu_seqlens"] = np.array([0, 20, 67], np.int32)
    expected = ops.selective_scan(**arguments, chunk_size=30)
    results = ops.selective_scan(**convert(arguments, kind), chunk_size=30)
    for ours, theirs in zip(expected, results, strict=True):
        assert_same_bits(theirs.memory.copy(), ours)


@KINDS
@pytest.mark.parametrize(("name", "state"), IN_PLACE.items())
def test_states_change_in_the_memory_of_the_caller(
    name: str, state: str, kind: type[Array]
) -> None:
    expected, arguments = CALLS[name]("float32"), CALLS[name]("float32")
    getattr(ops, name)(**expected)
    getattr(ops, name)(**convert(arguments, kind))
    assert_same_bits(arguments[state], expected[state])


@pytest.mark.parametrize(("name", "state"), IN_PLACE.items())
def test_what_says_it_is_read_only_is_an_input_alone(name: str, state: str) -> None:
    arguments = CALLS[name]("float32")
    for value in arguments.values():
        if isinstance(value, np.ndarray):
            value.flags.writeable = False
    before = arguments[state].copy()
    with refuses(name, state, "read-only"):
        getattr(ops, name)(**convert(arguments, Array))
    assert_same_bits(arguments[state], before)

    writable = {**convert(arguments, Array), state: Array(before)}
    expected = getattr(ops, name)(**CALLS[name]("float32"))
    assert_same_bits(getattr(ops, name)(**writable), expected)


@KINDS
def test_exports_are_released(kind: type[Array]) -> None:
    arguments = CALLS["selective_scan"]("float32")
    arrays = convert(arguments, kind)
    memory = arguments["u"]
    before = sys.getrefcount(memory)
    ops.selective_scan(**arrays)
    with refuses("selective_scan", "D"):
        ops.selective_scan(**{**arrays, "D": kind(np.ones(3, np.float32))})
    assert sys.getrefcount(memory) == before


# --- What is no DLPack that ssmcore reads ---------------------------------------------------------


class Stubborn(Array):
    def __dlpack__(self, **_: Any) -> Any:
        raise BufferError("not today")


class Confused(Array):
    def __dlpack__(self, **_: Any) -> Any:
        return 7


@pytest.mark.parametrize(
    ("kind", "words"), [(Stubborn, ["not today"]), (Confused, ["DLPack", "capsule"])]
)
def test_bad_exports(kind: type[Array], words: list[str]) -> None:
    with refuses("linear", "weight", *words):
        ops.linear(np.ones((3, 5), np.float32), kind(np.ones((7, 5), np.float32)))


@KINDS
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.bool_, np.complex128])
def test_other_dtypes_are_refused(kind: type[Array], dtype: type) -> None:
    with refuses("linear", "weight", "dtype"):
        ops.linear(np.ones((3, 5), np.float32), kind(np.ones((7, 5), dtype)))
