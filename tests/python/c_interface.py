"""The C interface through ctypes, with the structs that its header declares."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ssmcore

_HEADER = Path(__file__).parents[2] / "cpp/include/ssmcore/c_api.h"

_SCALARS: dict[str, Any] = {
    "double": ctypes.c_double,
    "float": ctypes.c_float,
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "size_t": ctypes.c_size_t,
    "uint8_t": ctypes.c_uint8,
    "uint16_t": ctypes.c_uint16,
    "uint64_t": ctypes.c_uint64,
}


def _read_header() -> str:
    return re.sub(r"/\*.*?\*/", "", _HEADER.read_text(), flags=re.DOTALL)


def _structs(header: str) -> dict[str, type[ctypes.Structure]]:
    structs: dict[str, type[ctypes.Structure]] = {}

    def field(declaration: str) -> tuple[str, Any]:
        if function := re.search(r"\(\*(\w+)\)", declaration):
            return function[1], ctypes.c_void_p
        matched = re.fullmatch(r"(?:const )?(\w+)(\*?) (\w+)", declaration)
        assert matched, f"not a field that ctypes can be told: {declaration}"
        type_name, pointer, name = matched.groups()
        if not pointer:
            return name, _SCALARS.get(type_name) or structs[type_name]
        return name, ctypes.POINTER(structs[type_name]) if type_name in structs else ctypes.c_void_p

    for name, body in re.findall(r"typedef struct (\w+) \{(.*?)\}", header, re.DOTALL):
        declarations = [" ".join(text.split()) for text in body.split(";") if text.strip()]
        fields = [field(text) for text in declarations]
        structs[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return structs


_header = _read_header()
STRUCTS = _structs(_header)
_statuses = re.search(r"enum ssmcore_status \{(.*?)\}", _header, re.DOTALL)
assert _statuses
Status = IntEnum("Status", re.findall(r"SSMCORE_(\w+)", _statuses[1]), start=0)

LIBRARY = ctypes.CDLL(str(ssmcore.get_library()))
LIBRARY.ssmcore_last_error.restype = ctypes.c_char_p
LIBRARY.ssmcore_version.restype = ctypes.c_char_p

_DTYPES = {
    "float32": (2, 32),
    "float64": (2, 64),
    "float16": (2, 16),
    "bfloat16": (4, 16),
    "int32": (0, 32),
    "int64": (0, 64),
    "complex64": (5, 64),
}


class Failure(Exception):
    def __init__(self, status: int) -> None:
        self.status = Status(status)
        super().__init__(LIBRARY.ssmcore_last_error().decode())


@contextmanager
def fails(status: Status, *words: str) -> Iterator[None]:
    """The block fails with this status and a message that holds each of `words`."""
    with pytest.raises(Failure) as caught:
        yield
    assert caught.value.status == status
    for word in words:
        assert word in str(caught.value)


def check(status: int) -> None:
    if status != Status.OK:
        raise Failure(status)


def tensor(array: np.ndarray) -> ctypes.Structure:
    """An ssmcore_tensor of `array`, which it does not keep alive."""
    made = STRUCTS["ssmcore_tensor"]()
    strides = [stride // array.itemsize for stride in array.strides]
    made.data = array.ctypes.data
    made.device.type = 1
    made.ndim = array.ndim
    made.dtype.code, made.dtype.bits = _DTYPES[array.dtype.name]
    made.dtype.lanes = 1
    made.sizes = (ctypes.c_int64 * array.ndim)(*array.shape)
    made.steps = (ctypes.c_int64 * array.ndim)(*strides)
    made.shape, made.strides = ctypes.addressof(made.sizes), ctypes.addressof(made.steps)
    return made


def gradient(array: np.ndarray, *, accumulate: bool = False) -> ctypes.Structure:
    """An ssmcore_gradient that goes to `array`."""
    made = STRUCTS["ssmcore_gradient"]()
    made.to = tensor(array)
    made.tensor = ctypes.pointer(made.to)
    made.accumulate = accumulate
    return made


def struct(name: str, **fields: Any) -> ctypes.Structure:
    """The struct ssmcore_`name`; arrays become tensors, and None leaves a field at 0."""
    made = STRUCTS[f"ssmcore_{name}"]()
    made.struct_size = ctypes.sizeof(made)
    made.kept = []  # what its pointers point to
    for field, value in fields.items():
        assert hasattr(made, field), f"ssmcore_{name} has no {field}"
        if isinstance(value, np.ndarray):
            value = tensor(value)
        if isinstance(value, ctypes.Structure):
            made.kept.append(value)
            if not isinstance(value, STRUCTS["ssmcore_gradient"]):
                value = ctypes.pointer(value)
        if value is not None:
            setattr(made, field, value)
    return made


def call(name: str, handle: ctypes.c_void_p, **fields: Any) -> None:
    """ssmcore_`name` of a context or a model, with these arguments."""
    args = struct(f"{name}_args", **fields)
    check(LIBRARY[f"ssmcore_{name}"](handle, ctypes.byref(args), None, ctypes.c_size_t(0), None))


def call_in_poison(name: str, handle: ctypes.c_void_p, **fields: Any) -> None:
    """The same in a workspace of NaN, of exactly the size that is asked for."""
    args = struct(f"{name}_args", **fields)
    needed = ctypes.c_size_t()
    query = LIBRARY[f"ssmcore_{name}_workspace_size"]
    check(query(handle, ctypes.byref(args), ctypes.byref(needed)))
    memory = np.full(needed.value // 4 + 32, np.nan, np.float32)
    begin = -memory.ctypes.data % 64 // 4
    end = begin + needed.value // 4
    workspace = ctypes.c_void_p(memory[begin:].ctypes.data)
    check(LIBRARY[f"ssmcore_{name}"](handle, ctypes.byref(args), workspace, needed, None))
    assert np.isnan(memory[:begin]).all() and np.isnan(memory[end:]).all()


def create(name: str, *arguments: Any) -> ctypes.c_void_p:
    """The handle that ssmcore_`name` makes, its last argument."""
    handle = ctypes.c_void_p()
    check(LIBRARY[f"ssmcore_{name}"](*arguments, ctypes.byref(handle)))
    return handle
