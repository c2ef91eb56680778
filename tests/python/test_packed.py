"""Packed prompts: sequences of any lengths in one pass, and which state slots they use."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_fixtures import bundled_model

import ssmcore

TOLERANCE = 5e-5  # on fp32 logits
CHUNK = 512  # tokens of one pass, where sequences are cut


def random_sequences(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, length) for length in lengths]


def pack(sequences):
    return np.concatenate(sequences), np.cumsum([0, *map(len, sequences)])


def assert_near(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)


def assert_same_states(actual, expected):
    """Two states of the same slots go on alike."""
    model, following = bundled_model(), random_sequences([actual.num_slots], seed=9)[0]
    assert_near(model.step(following, actual.clone()), model.step(following, expected.clone()))


lengths_of_sequences = st.lists(st.integers(0, 40) | st.integers(480, 700), min_size=1, max_size=6)


@given(lengths=lengths_of_sequences.filter(any), seed=st.integers(0, 99))
def test_packed_is_separate(lengths, seed):
    model, sequences = bundled_model(), random_sequences(lengths, seed)
    token_ids, cu_seqlens = pack(sequences)
    packed_state = model.new_state(len(lengths))
    starts = random_sequences([len(lengths)], seed + 1)[0]  # the states before differ
    model.step(starts, packed_state)
    separate_state = packed_state.clone()

    logits, same_state = model.forward(token_ids, packed_state, cu_seqlens=cu_seqlens)
    assert same_state is packed_state
    assert logits.shape == (len(token_ids), 256) and logits.dtype == np.float32
    for row, sequence in enumerate(sequences):
        if sequence.size:
            alone, _ = model.forward(sequence, separate_state, state_indices=[row])
            assert_near(logits[cu_seqlens[row] : cu_seqlens[row + 1]], alone)
    assert_same_states(packed_state, separate_state)


@given(
    lengths=st.lists(st.integers(1, 30) | st.integers(490, 530), min_size=1, max_size=5),
    data=st.data(),
)
def test_last_logits_and_slots_of_packed_sequences(lengths, data):
    model, sequences = bundled_model(), random_sequences(lengths)
    token_ids, cu_seqlens = pack(sequences)
    slots = data.draw(st.permutations(range(7)))[: len(lengths)]
    state = model.new_state(7)
    model.step(np.arange(7), state)
    before = state.clone()
    logits, _ = model.forward(token_ids, state, "last", cu_seqlens=cu_seqlens, state_indices=slots)
    assert logits.shape == (len(lengths), 256)
    expected = before.clone()
    for row, (slot, sequence) in enumerate(zip(slots, sequences, strict=True)):
        alone, _ = model.forward(sequence, expected, "last", state_indices=[slot])
        assert_near(logits[row], alone)
    assert_same_states(state, expected)
    assert_untouched(state, before, set(range(7)) - set(slots))


def assert_untouched(state, before, slots):
    """These slots are the same to the bit in both states."""
    for slot in slots:
        both = []
        for source in (state, before):
            only = source.clone()
            for other in range(only.num_slots):
                if other != slot:
                    only.reset_slot(other)
            both.append(only.native.save())
        assert both[0] == both[1]


@pytest.mark.parametrize(
    "lengths",
    [
        [CHUNK], [CHUNK, 1], [CHUNK - 1, 1], [1, CHUNK], [CHUNK, CHUNK], [3 * CHUNK + 7],
        [1] * (CHUNK + 3), [0, CHUNK, 0, 0, CHUNK, 0], [CHUNK - 1, 2, CHUNK - 1], [5, 0],
    ],
    ids=str,
)  # fmt: skip
def test_sequences_that_end_with_a_chunk(lengths):
    model, sequences = bundled_model(), random_sequences(lengths)
    token_ids, cu_seqlens = pack(sequences)
    logits, state = model.forward(token_ids, cu_seqlens=cu_seqlens)
    expected = model.new_state(len(lengths))
    for row, sequence in enumerate(sequences):
        if sequence.size:
            alone, _ = model.forward(sequence, expected, state_indices=[row])
            assert_near(logits[cu_seqlens[row] : cu_seqlens[row + 1]], alone)
    assert_same_states(state, expected)
    if 0 not in lengths:
        last, _ = model.forward(token_ids, logits="last", cu_seqlens=cu_seqlens)
        assert_near(last, logits[cu_seqlens[1:] - 1])


def test_without_logits():
    model, sequences = bundled_model(), random_sequences([700, 3])
    token_ids, cu_seqlens = pack(sequences)
    none, state = model.forward(token_ids, logits="none", cu_seqlens=cu_seqlens)
    assert none is None
    assert_same_states(state, model.forward(token_ids, cu_seqlens=cu_seqlens)[1])


def test_slots_of_a_batch():
    model = bundled_model()
    batch = np.stack(random_sequences([20, 20]))
    state = model.new_state(3)
    logits, _ = model.forward(batch, state, state_indices=[2, 0])
    assert_near(logits, model.forward(batch)[0])
    assert state.is_at_start(1) and not state.is_at_start(0)
    stepped = model.step([5, 6], state, state_indices=[0, 2])
    assert_near(stepped[0], model.forward([*batch[1], 5], logits="last")[0])
    assert_near(stepped[1], model.forward([*batch[0], 6], logits="last")[0])


@pytest.mark.parametrize("make", [list, tuple, np.array, lambda x: np.array(x, np.uint64)[::1]])
def test_cu_seqlens_of_any_integers(make):
    model, token_ids = bundled_model(), np.arange(10)
    expected = model.forward(token_ids, logits="last", cu_seqlens=[0, 4, 10])[0]
    actual = model.forward(token_ids, logits="last", cu_seqlens=make([0, 4, 10]))[0]
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(
    "cu_seqlens, match",
    [
        ([0, 6, 4, 10], r"cu_seqlens\[2\] is 4, less than"),
        ([0, -1, 10], r"cu_seqlens\[1\] is -1, less than"),
        ([1, 5, 10], r"cu_seqlens\[0\] is 1, expected 0"),
        ([-3, 10], r"cu_seqlens\[0\] is -3, expected 0"),
        ([0, 5, 9], r"cu_seqlens\[2\] is 9, expected"),
        ([0, 5, 11], r"cu_seqlens\[2\] is 11, expected"),
        ([0, 2**31, 10], "more than 32 bits"),
        ([0], "at least 2 integers"),
        ([], "at least 2 integers"),
        (10, "at least 2 integers"),
        ([[0, 10]], r"shape \(1, 2\)"),
        ([0.0, 10.0], "float64"),
        ([0, [10]], "no list of integers"),
    ],
)
def test_bad_cu_seqlens_leave_the_state_alone(cu_seqlens, match):
    model = bundled_model()
    state = model.new_state(max(1, np.size(np.asarray(cu_seqlens, object)) - 1))
    with pytest.raises(ssmcore.InvalidArgumentError, match=match):
        model.forward(np.arange(10), state, cu_seqlens=cu_seqlens)
    assert all(state.is_at_start(slot) for slot in range(state.num_slots))


def test_bad_packed_calls():
    model, token_ids = bundled_model(), np.arange(10)
    refused = ssmcore.InvalidArgumentError
    with pytest.raises(refused, match=r"rank 1, got int64 of shape \(1, 10\)"):
        model.forward(token_ids[np.newaxis], cu_seqlens=[0, 10])
    with pytest.raises(refused, match="sequence 1 empty, which has no last position"):
        model.forward(token_ids, logits="last", cu_seqlens=[0, 4, 4, 10])
    with pytest.raises(refused, match="state has 3 slots, expected one for each of 2 rows"):
        model.forward(token_ids, model.new_state(3), cu_seqlens=[0, 4, 10])
    with pytest.raises(refused, match="state_indices needs a state"):
        model.forward(token_ids, state_indices=[0])
    for slots, match in (([0, 0], "slot 0 twice"), ([0, 5], "5"), ([0], "state_indices")):
        with pytest.raises(refused, match=match):
            model.forward(token_ids, model.new_state(3), cu_seqlens=[0, 4, 10], state_indices=slots)
    with pytest.raises(refused, match="state should be a State, got int"):
        model.forward(token_ids, 3)
