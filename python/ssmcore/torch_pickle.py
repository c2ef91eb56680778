"""Reading the files of `torch.save` without torch, and without executing what their pickle says.

Such a file is an uncompressed zip archive: `<name>/data.pkl` describes the tensors and
`<name>/data/<key>` holds the bytes of each storage. The pickle is read by an Unpickler that knows
nothing but tensors and dictionaries, all of them inert stand-ins of this module. Whatever else it
names is refused before it is looked up. Storages are mapped, so that a tensor costs memory only
once it is touched.
"""

from __future__ import annotations

import io
import math
import mmap
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ssmcore.errors import InvalidArgumentError

_DTYPES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
    "ComplexFloatStorage": np.dtype(np.complex64),
}

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, then the lengths of name and extra field


def load_tensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The tensors of a state dict written by `torch.save`, as read-only arrays by name.

    The arrays share the mapped file, strides and shared storages as stored; bfloat16 is
    ml_dtypes'. Raises InvalidArgumentError for a file that is not there or damaged, for the
    formats torch wrote before 1.6, for compressed archives, for a pickle that names anything but
    tensors and dictionaries, and where a value is not a tensor.
    """
    archive = _Archive(os.fspath(path))
    state_dict = archive.unpickle()
    if not isinstance(state_dict, dict):
        raise archive.error(f"expected a dictionary of tensors, got {_describe(state_dict)}")
    for name, value in state_dict.items():
        if not isinstance(name, str):
            raise archive.error(f"expected names of tensors, got {_describe(name)}")
        if not isinstance(value, np.ndarray):
            raise archive.error(f"'{name}' should be a tensor, but is {_describe(value)}")
    return dict(state_dict)


class _StorageType(NamedTuple):
    """Stands in for torch.FloatStorage and its kin."""

    dtype: np.dtype


class _Dict(dict[Any, Any]):
    """Stands in for collections.OrderedDict; attributes set on it, `_metadata`, are dropped."""

    def __setstate__(self, state: object) -> None:
        pass


class _RebuildTensor:
    """Stands in for torch._utils._rebuild_tensor_v2: a view of a storage, checked to lie in it."""

    __slots__ = ()  # as below: a pickle can set nothing on what it is given

    def __call__(
        self,
        storage: np.ndarray,
        offset: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        *_: object,
    ) -> np.ndarray:
        numbers = (offset, *shape, *strides)
        if len(shape) != len(strides) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError(f"a tensor has offset {offset}, shape {shape} and strides {strides}")
        size = math.prod(shape)
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        # A size above the storage's is an expanded tensor: small in the file, huge once copied.
        if offset > storage.size or size > storage.size or (size > 0 and last >= storage.size):
            raise ValueError(
                f"a tensor of shape {shape}, strides {strides} and offset {offset} "
                f"does not fit its storage of {storage.size} elements"
            )
        steps = [stride * storage.itemsize for stride in strides]
        return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps, writeable=False)


class _RebuildParameter:
    """Stands in for torch._utils._rebuild_parameter."""

    __slots__ = ()

    def __call__(self, data: np.ndarray, *_: object) -> np.ndarray:
        return data


_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Dict,
    ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
    ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
    **{("torch", name): _StorageType(dtype) for name, dtype in _DTYPES.items()},
}


class _Unpickler(pickle.Unpickler):
    """Builds the stand-ins above and nothing else."""

    def __init__(self, data: bytes, storage: Callable[[str, np.dtype, int], np.ndarray]):
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _GLOBALS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}, which is no part of a dictionary of tensors"
            ) from None

    def persistent_load(self, pid: Any) -> np.ndarray:
        kind, storage_type, key, _location, numel = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType):
            raise pickle.UnpicklingError(f"it refers to {kind!r} of type {storage_type!r}")
        return self._storage(key, storage_type.dtype, numel)


class _Archive:
    """A mapped zip archive as torch.save writes it."""

    def __init__(self, path: str):
        self._path = path
        self._storages: dict[str, np.ndarray] = {}
        try:
            with open(path, "rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                self._entries = {entry.filename: entry for entry in zipfile.ZipFile(file).filelist}
        except OSError as error:
            raise self.error(error.strerror or str(error)) from error
        except Exception as error:  # zipfile raises much more than BadZipFile for damaged files
            raise self.error(
                "is not a zip archive as torch.save writes it since torch 1.6; "
                "if an older torch wrote it, load and save it once with a newer one"
            ) from error
        pickles = [n for n in self._entries if n.endswith("/data.pkl") and n.count("/") == 1]
        if len(pickles) != 1:
            raise self.error("has no data.pkl, as torch.save writes it")
        self._prefix = pickles[0].removesuffix("data.pkl")

    def error(self, message: str) -> InvalidArgumentError:
        return InvalidArgumentError(f"load: {self._path}: {message}")

    def unpickle(self) -> Any:
        if self._prefix + "byteorder" in self._entries:
            order = bytes(self._record("byteorder"))
            if order != b"little":
                raise self.error(f"byte order is {order!r}, expected b'little'")
        try:
            return _Unpickler(bytes(self._record("data.pkl")), self._storage).load()
        except InvalidArgumentError:
            raise
        except Exception as error:  # a damaged pickle may raise anything
            raise self.error(f"cannot read its pickle: {error}") from error

    def _storage(self, key: str, dtype: np.dtype, numel: int) -> np.ndarray:
        """The storage `key`: `numel` elements of `dtype` in the mapped file."""
        if key not in self._storages:
            self._storages[key] = self._record(f"data/{key}")
        data = self._storages[key]
        if type(numel) is not int or data.size != numel * dtype.itemsize:
            raise self.error(
                f"storage {key} should hold {numel!r} elements of {dtype}, has {data.size} bytes"
            )
        return data.view(dtype)

    def _record(self, name: str) -> np.ndarray:
        """The bytes of one entry, in place."""
        entry = self._entries.get(self._prefix + name)
        if entry is None:
            raise self.error(f"has no entry {self._prefix}{name}")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 0x1:
            raise self.error(f"entry {entry.filename} is compressed or encrypted")
        begin = entry.header_offset + _LOCAL_HEADER.size
        if entry.header_offset >= 0 and begin <= len(self._bytes):
            header = self._bytes[entry.header_offset : begin]
            signature, name_length, extra_length = _LOCAL_HEADER.unpack(header)
            begin += name_length + extra_length
            if signature == b"PK\x03\x04" and begin + entry.file_size <= len(self._bytes):
                return np.frombuffer(self._bytes, np.uint8, entry.file_size, begin)
        raise self.error(f"entry {entry.filename} lies outside the file")


def _describe(value: object) -> str:
    return repr(value) if isinstance(value, int | float | str) else f"a {type(value).__name__}"
