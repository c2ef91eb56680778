"""Arrays on devices: ssmcore's own, and those of torch, CuPy and JAX on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from backends import require_cuda
from calls import CALLS, IN_PLACE, as_tuple
from helpers import DTYPES, assert_close, assert_same_bits, refuses

import ssmcore
from ssmcore import ops

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda":
        require_cuda()
    return request.param


@pytest.fixture
def gpu() -> None:
    require_cuda()


# --- ssmcore.Array --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", ["float32", "float64", "bfloat16", "float16", "int32", "int64", "complex64"]
)
def test_there_and_back(device: str, dtype: str) -> None:
    values = np.arange(24).reshape(2, 3, 4).astype(DTYPES.get(dtype, np.dtype(dtype)))
    array = ssmcore.array(values, device)
    assert array.shape == (2, 3, 4)
    assert array.ndim == 3
    assert array.size == 24
    assert array.nbytes == values.nbytes
    assert array.dtype == values.dtype
    assert array.device == ("cpu" if device == "cpu" else "cuda:0")
    assert repr(array) == f"<ssmcore.Array (2, 3, 4) {dtype} on {array.device}>"
    assert_same_bits(array.numpy(), values)


def test_scattered_sources_are_gathered(device: str) -> None:
    values = np.arange(24, dtype=np.float32).reshape(4, 6)
    assert_same_bits(ssmcore.array(values[::2, 1:5].T, device).numpy(), values[::2, 1:5].T.copy())


def test_lists(device: str) -> None:
    assert_same_bits(
        ssmcore.array([[1.5, 2], [3, 4]], device).numpy(), np.array([[1.5, 2], [3, 4]])
    )


def test_reshaped_is_the_same_memory(device: str) -> None:
    array = ssmcore.empty((2, 6), "int32", device)
    other = array.reshape(3, -1)
    array.copy_from(np.arange(12, dtype=np.int32).reshape(2, 6))
    assert other.shape == (3, 4)
    assert array.reshape((12,)).shape == (12,)
    assert_same_bits(other.numpy(), np.arange(12, dtype=np.int32).reshape(3, 4))


def test_views_outlive_the_array(device: str) -> None:
    part = ssmcore.array(np.arange(1000.0), device).reshape(10, 100)
    assert_same_bits(part.numpy(), np.arange(1000.0).reshape(10, 100))


def test_numpy_of_the_cpu_is_the_memory() -> None:
    array = ssmcore.array(np.zeros(3))
    array.numpy()[1] = 5
    assert_same_bits(array.numpy(), np.array([0.0, 5, 0]))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ssmcore.empty(3, "int7"), ["array", "int7"]),
        (lambda: ssmcore.empty((), "float32"), ["array", "shape", "0"]),
        (lambda: ssmcore.empty((1,) * 7, "float32"), ["array", "shape", "7"]),
        (lambda: ssmcore.empty((2, -1), "float32"), ["array", "negative", "1"]),
        (lambda: ssmcore.empty((2**40, 2**40), "float32"), ["array", "memory"]),
        (lambda: ssmcore.empty(3, device="gpu"), ["device", "gpu"]),
        (lambda: ssmcore.empty(3, device="cuda:x"), ["device", "cuda:x"]),
        (lambda: ssmcore.empty(6).reshape(4, 2), ["array", "(6,)", "(4, 2)"]),
        (lambda: ssmcore.empty(6).reshape(-1, 4), ["array"]),
        (lambda: ssmcore.empty(6).copy_from(np.zeros(6)), ["copy", "float64", "float32"]),
        (lambda: ssmcore.empty(6).copy_from(np.zeros(5, np.float32)), ["copy", "(5,)", "(6,)"]),
        (lambda: ssmcore.empty(6).copy_from("six"), ["copy_from", "str"]),
        (lambda: ssmcore.array(3.0), ["array", "dimensions"]),
    ],
)
def test_refused(call: Any, words: list[str]) -> None:
    with refuses(*words):
        call()


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(ssmcore.BackendError, match="cuda:99"):
        ssmcore.empty(3, device="cuda:99")


def test_more_memory_than_there_is(device: str) -> None:
    with pytest.raises(ssmcore.BackendError, match=rf"out of memory on {device}.* {2**52} bytes"):
        ssmcore.empty(2**50, "float32", device)
    assert ssmcore.array([1.0], device).numpy()[0] == 1


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_operators_on_own_arrays(device: str, name: str, dtype: str) -> None:
    inputs = CALLS[name](dtype)
    expected = as_tuple(getattr(ops, name)(**{k: _copied(v) for k, v in inputs.items()}))
    moved = {
        k: ssmcore.array(v, device) if isinstance(v, np.ndarray) else v for k, v in inputs.items()
    }
    results = as_tuple(getattr(ops, name)(**moved))
    for result, wanted in zip(results, expected, strict=True):
        assert isinstance(result, ssmcore.Array)
        assert_close(result.numpy(), wanted, dtype, rounded=True)
    if name in IN_PLACE:
        reference = {k: _copied(v) for k, v in inputs.items()}
        getattr(ops, name)(**reference)
        state = IN_PLACE[name]
        assert_close(
            moved[state].numpy(),
            reference[state],
            "float32" if "scan" in name else dtype,
            rounded=True,
        )


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, np.ndarray) else value


# --- DLPack ---------------------------------------------------------------------------------------


def test_torch_shares_the_memory(device: str) -> None:
    torch = pytest.importorskip("torch")
    array = ssmcore.array(np.arange(6, dtype=np.float32).reshape(2, 3), device)
    tensor = torch.from_dlpack(array)
    assert tensor.device.type == device
    tensor.add_(1)
    if device == "cuda":
        torch.cuda.synchronize()
    assert_same_bits(array.numpy(), np.arange(1, 7, dtype=np.float32).reshape(2, 3))
    del array
    assert tensor.sum().item() == 21


def test_capsules_of_both_versions() -> None:
    array = ssmcore.array(np.zeros((2, 3)))
    assert "dltensor_versioned" in repr(array.__dlpack__(max_version=(1, 0)))
    assert '"dltensor"' in repr(array.__dlpack__())
    assert array.__dlpack_device__() == (1, 0)


@pytest.mark.parametrize(
    "arguments", [{"copy": True}, {"dl_device": (2, 0)}, {"stream": 1}], ids=lambda a: next(iter(a))
)
def test_exports_that_cannot_be(arguments: dict[str, Any]) -> None:
    with pytest.raises(BufferError, match=r"ssmcore\.Array"):
        ssmcore.array(np.zeros(3)).__dlpack__(**arguments)


@pytest.mark.cuda
@pytest.mark.parametrize("stream", [0, -2])
def test_streams_that_cannot_be(gpu: None, stream: int) -> None:
    with pytest.raises(BufferError, match=str(stream)):
        ssmcore.array(np.zeros(3), "cuda").__dlpack__(stream=stream)


@pytest.mark.cuda
@pytest.mark.parametrize("stream", [None, 1, 2, -1])
def test_streams_that_can_be(gpu: None, stream: int | None) -> None:
    array = ssmcore.array(np.ones(3), "cuda")
    assert array.__dlpack_device__() == (2, 0)
    assert "dltensor_versioned" in repr(array.__dlpack__(stream=stream, max_version=(1, 0)))


# --- Libraries with arrays on a GPU ---------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("library", ["torch", "cupy", "jax"])
def test_results_are_the_callers(gpu: None, name: str, library: str) -> None:
    module = pytest.importorskip("jax.numpy" if library == "jax" else library)
    if name in IN_PLACE and library == "jax":
        pytest.skip("JAX arrays cannot be changed in place")
    to_gpu = {
        "torch": lambda a: module.tensor(a, device="cuda"),
        "cupy": module.asarray,
        "jax": module.asarray,
    }[library]
    to_host: Any = {
        "torch": lambda a: a.cpu().numpy(),
        "cupy": lambda a: a.get(),
        "jax": np.asarray,
    }[library]
    inputs = CALLS[name]("float32")
    expected = as_tuple(getattr(ops, name)(**{k: _copied(v) for k, v in inputs.items()}))
    moved = {k: to_gpu(v) if isinstance(v, np.ndarray) else v for k, v in inputs.items()}
    results = as_tuple(getattr(ops, name)(**moved))
    for result, wanted in zip(results, expected, strict=True):
        assert type(result).__module__.partition(".")[0] in (library, "jaxlib")
        assert_close(to_host(result), wanted, "float32", rounded=True)


@pytest.mark.cuda
def test_calls_are_ordered_by_torchs_current_stream(gpu: None) -> None:
    torch = pytest.importorskip("torch")
    weight = torch.eye(2000, device="cuda")
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        x = torch.zeros(2000, 2000, device="cuda")
        for _ in range(50):  # keeps the stream busy, so that a call elsewhere would come too early
            x = x @ weight
        x += 1
        out = ops.rms_norm(x, None, eps=0.0)
        total = out.sum()
    stream.synchronize()
    assert total.item() == 2000 * 2000


@pytest.mark.cuda
def test_own_arrays_wait_for_torch_and_torch_for_them(gpu: None) -> None:
    torch = pytest.importorskip("torch")
    weight = torch.eye(2000, device="cuda")
    for _ in range(20):
        x = torch.zeros(2000, 2000, device="cuda")
        for _ in range(20):
            x = x @ weight
        x += 1
        own = ssmcore.empty((2000, 2000), "float32", "cuda")
        own.copy_from(x)
        out = ops.rms_norm(own, None, eps=0.0)
        assert torch.from_dlpack(out).sum().item() == 2000 * 2000


@pytest.mark.cuda
def test_a_call_in_a_graph(gpu: None) -> None:
    torch = pytest.importorskip("torch")
    inputs = {
        k: torch.tensor(v, device="cuda") if isinstance(v, np.ndarray) else v
        for k, v in CALLS["selective_scan"]("float32").items()
    }
    expected, _ = ops.selective_scan(**inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = ops.selective_scan(**inputs)
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.cuda
def test_a_mix_of_devices(gpu: None) -> None:
    torch = pytest.importorskip("torch")
    weight = torch.ones(4, 8)
    with refuses("linear", "weight", "cpu", "cuda:0"):
        ops.linear(torch.ones(2, 8, device="cuda"), weight)
    with refuses("embedding", "token_ids", "cuda:0", "cpu"):
        ops.embedding(torch.zeros(2, dtype=torch.int64, device="cuda"), weight)


@pytest.mark.cuda
def test_bad_indices_are_reported_later_or_at_once(gpu: None) -> None:
    torch = pytest.importorskip("torch")
    weight = torch.ones(4, 8, device="cuda")
    ids = torch.tensor([1, 4], device="cuda")
    out = ops.embedding(ids, weight)
    with refuses("embedding", "token_ids"):
        ssmcore.synchronize(out)
    assert not out[1].any()  # not read from anywhere
    ops.embedding(ids, weight)
    torch.cuda.synchronize()
    with refuses("embedding", "token_ids"):
        ops.rms_norm(weight, None)
    with refuses("embedding", "token_ids"):
        ops.embedding(ids, weight, check=True)
    assert ops.embedding(ids[:1], weight, check=True).sum().item() == 8
