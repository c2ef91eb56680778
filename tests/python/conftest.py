"""What every test of the operators uses: the backends to run on, and the thread count."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

# JAX leaves memory of a GPU to others; it reads this when it starts.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import pytest
from backends import BACKENDS, Backend, require_cuda
from hypothesis import settings

import ssmcore

settings.register_profile(
    "operators", deadline=None, max_examples=60, derandomize=True, database=None
)
settings.load_profile("operators")


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param == "cuda":
        require_cuda()
    return BACKENDS[request.param]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """Where a model runs; without a GPU that of CUDA is skipped."""
    if request.param == "cuda" and ssmcore.cuda_device_count() == 0:
        pytest.skip("no CUDA device, or ssmcore was built without CUDA")
    return str(request.param)


@pytest.fixture
def set_num_threads() -> Iterator[Callable[[int], None]]:
    """`ssmcore.set_num_threads`, undone after the test."""
    before = ssmcore.num_threads()
    yield ssmcore.set_num_threads
    ssmcore.set_num_threads(before)
