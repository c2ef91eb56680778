"""Sizes, overlaps and lengths at which careless arithmetic would break."""

import os

import numpy as np
import pytest

import ssmcore
from ssmcore import _core, ops


def ones(*shape):
    return np.ones(shape, np.float32)


@pytest.mark.parametrize("slots", [2**31, 2**58, 2**62, 2**62 + 1, 2**63 - 1])
def test_more_state_than_memory(slots):
    with pytest.raises(ssmcore.Error, match="memory"):
        ssmcore.load(device="cpu").new_state(slots)


def test_broadcast_state_of_any_length():
    """The workspace such a state would need is refused, not wrapped around to a small one."""
    state = np.broadcast_to(np.float32(0), (1, 1, 2**58))
    with pytest.raises(ssmcore.Error, match="out of memory"):
        ops.causal_conv1d(ones(1, 1, 4), ones(1, 4), initial_state=state)


def test_chunk_size_beyond_the_sequence():
    arrays = (ones(1, 2, 5), ones(1, 2, 5), -ones(2, 3), ones(1, 3, 5), ones(1, 3, 5))
    _, last_state, chunk_states = ops.selective_scan(*arrays, chunk_size=2**63 - 1)
    assert np.array_equal(chunk_states[:, 0], last_state)


def test_sum_of_delta_over_a_million_steps():
    seqlen = 1_000_000
    delta = np.broadcast_to(np.float32(0.1), (1, 1, seqlen))
    zeros = np.broadcast_to(np.float32(0), (1, 1, seqlen))
    _, delta_sum = ops.selective_scan(
        zeros, delta, -ones(1, 1), zeros, zeros, return_last_state=False, return_delta_sum=True
    )
    expected = float(np.float32(0.1)) * seqlen
    assert abs(delta_sum.item() / expected - 1) < 2e-5


def test_same_memory_of_another_dtype_is_an_overlap():
    memory = np.zeros(64, np.float32)
    arguments = {
        "x": memory.view(np.float16)[:16].reshape(1, 16),
        "weight": None,
        "residual": None,
        "residual_out": None,
        "z": None,
        "out": memory[:16].reshape(1, 16),
        "group_size": 0,
        "norm_before_gate": False,
        "eps": 1e-5,
    }
    with pytest.raises(ssmcore.InvalidArgumentError, match=r"rms_norm: out .* overlaps x"):
        _core.rms_norm(**arguments)


def test_outputs_inside_inputs_are_refused():
    table = ones(8, 4)
    with pytest.raises(ssmcore.InvalidArgumentError, match=r"embedding: out .* overlaps weight"):
        _core.embedding(token_ids=np.array([3], np.int32), weight=table, out=table[:1])
    out = ones(2, 4)
    with pytest.raises(ssmcore.InvalidArgumentError, match=r"linear: out .* overlaps bias"):
        _core.linear(x=ones(2, 3), weight=ones(4, 3), bias=out[0], out=out)


def test_state_is_refused_by_a_later_model_at_the_same_address():
    for _ in range(20):
        model = ssmcore.load(device="cpu")
        state = model.new_state()
        del model
        with pytest.raises(ssmcore.InvalidArgumentError, match="another model"):
            ssmcore.load(device="cpu").step([65], state)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_computes_resizes_and_ends():
    x = ones(64, 256)
    expected = ops.linear(x, x)
    child = os.fork()
    if child == 0:
        same = np.array_equal(ops.linear(x, x), expected)
        for threads in (2, 1, 3):
            ssmcore.set_num_threads(threads)
            same = same and np.array_equal(ops.linear(x, x), expected)
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_threads_change_between_calls_alone():
    """Changing the number of threads from another thread makes no running call fail."""
    from threading import Event, Thread

    x, stop = ones(32, 256), Event()

    def change():
        while not stop.is_set():
            for threads in (1, 2, 3):
                ssmcore.set_num_threads(threads)

    before = ssmcore.num_threads()
    thread = Thread(target=change)
    thread.start()
    try:
        for _ in range(200):
            ops.rms_norm(x, None)
            ops.linear(x, x)
    finally:
        stop.set()
        thread.join()
        ssmcore.set_num_threads(before)
