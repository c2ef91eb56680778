"""States: copies, files, and generation that goes on from one."""

import os

import numpy as np
import pytest
from model_fixtures import PROMPT, bundled_model, golden, golden_text, upstream_model

import ssmcore
from ssmcore.generate import GenerationSettings

TOLERANCE = 5e-5  # on fp32 logits


def read(*prompts, slots=None):
    """A state that has read one prompt a slot."""
    model = bundled_model()
    state = model.new_state(slots or len(prompts))
    for slot, prompt in enumerate(prompts):
        model.forward(list(prompt.encode()), state, "none", state_indices=[slot])
    return state


def test_saved_and_loaded_is_the_same_to_the_bit(tmp_path):
    state = read(PROMPT, "Emma", slots=3)
    state.save(tmp_path / "state")
    loaded = bundled_model().new_state(3)
    loaded.load(tmp_path / "state")
    model = bundled_model()
    np.testing.assert_array_equal(model.step([1, 2, 3], state), model.step([1, 2, 3], loaded))
    assert os.listdir(tmp_path) == ["state"]


def test_saved_over_what_was_there(tmp_path):
    path = tmp_path / "state"
    read("one").save(path)
    before = path.read_bytes()
    read("two").save(str(path))
    assert len(path.read_bytes()) == len(before) and path.read_bytes() != before


def test_clone_is_a_copy():
    model, state = bundled_model(), read(PROMPT)
    copy = state.clone()
    assert (copy.num_slots, copy.nbytes) == (state.num_slots, state.nbytes)
    expected = model.step([65], state)
    np.testing.assert_array_equal(model.step([65], copy), expected)
    assert (model.step([65], copy) != expected).any()


def test_a_state_outlives_its_model():
    state = ssmcore.load(device="cpu").new_state()
    assert state.is_at_start(0)
    assert state.clone().is_at_start(0)


def test_start_of_a_slot():
    state = read("a", slots=2)
    assert (state.is_at_start(0), state.is_at_start(1)) == (False, True)
    state.copy_slot(0, 1)
    assert not state.is_at_start(1)
    state.reset_slot(0)
    assert (state.is_at_start(0), state.is_at_start(1)) == (True, False)


def test_nbytes_is_what_the_layers_need():
    # 8 layers of 512 channels: 3 inputs of the convolution and 16 states, float32.
    assert bundled_model().new_state(5).nbytes == 5 * 8 * 512 * (3 + 16) * 4


@pytest.mark.parametrize("slot", [-1, 2, 2**40])
def test_slots_out_of_range(slot):
    state = bundled_model().new_state(2)
    for call in (
        state.reset_slot,
        state.is_at_start,
        lambda slot: state.copy_slot(slot, 0),
        lambda slot: state.copy_slot(0, slot),
    ):
        with pytest.raises(ssmcore.InvalidArgumentError, match=f"is {slot}, the state has 2 slots"):
            call(slot)


def test_wrong_files_are_refused_and_change_nothing(tmp_path):
    path, state = tmp_path / "state", read(PROMPT)
    state.save(path)
    good = path.read_bytes()
    target = read("Emma")
    before = target.native.save()
    header = good.index(b"\n\n") + 2
    for bad, match in (
        (b"", "expected a saved state"),
        (good[:10], "expected a saved state"),
        (b"PK" + good, "expected a saved state"),
        (good[:100], "it has"),
        (good[: header - 1], "it has"),
        (good.replace(b"layer 3", b"layer\xff3", 1), "expected"),
        (good[:-1], f"has {len(good) - 1} bytes, expected {len(good)}"),
        (good[:header], f"has {header} bytes"),
        (good + b"\0", f"has {len(good) + 1} bytes"),
    ):
        path.write_bytes(bad)
        with pytest.raises(ssmcore.InvalidArgumentError, match=match):
            target.load(path)
        assert target.native.save() == before
    with pytest.raises(ssmcore.InvalidArgumentError, match=r"cannot read .*nothing"):
        target.load(tmp_path / "nothing")
    with pytest.raises(ssmcore.InvalidArgumentError, match=r"save: cannot write .*No such file"):
        target.save(tmp_path / "no" / "folder")


def test_states_of_other_shapes_are_refused(tmp_path):
    path = tmp_path / "state"
    read("a").save(path)
    with pytest.raises(ssmcore.InvalidArgumentError, match=r"\(1, 3, 512\).*\(2, 3, 512\)"):
        bundled_model().new_state(2).load(path)
    half = ssmcore.load(device="cpu", dtype="bf16").new_state()
    with pytest.raises(ssmcore.InvalidArgumentError, match=r"float32 \(1.*bfloat16 \(1"):
        half.load(path)


def test_state_of_another_model_is_refused():
    with pytest.raises(ssmcore.InvalidArgumentError, match="state was made by another model"):
        upstream_model().forward([1], bundled_model().new_state())


# Generation.


def test_prompt_in_two_parts():
    model, whole = bundled_model(), golden_text()
    state = model.new_state()
    assert model.generate(PROMPT[:40], 0, state=state) == ""
    assert model.generate(PROMPT[40:], 60, state=state) == whole[:60]


@pytest.mark.parametrize("ids", [False, True], ids=["text", "ids"])
@pytest.mark.parametrize("stop", [None, "conduct", ","])
def test_state_has_read_prompt_and_continuation(ids, stop):
    model, state = bundled_model(), bundled_model().new_state()
    prompt = golden()["prompt"].tolist() if ids else PROMPT
    continuation = model.generate(prompt, 256, stop=stop, state=state)
    # A stop string is not returned, but has been read.
    read_text = PROMPT + golden_text()[: len(continuation)] + ("" if stop is None else stop)
    expected, _ = model.forward([*read_text.encode(), 65], logits="last")
    np.testing.assert_allclose(model.step([65], state)[0], expected, rtol=0, atol=TOLERANCE)


def test_batch_goes_on_from_its_states():
    model, begins = bundled_model(), ["And God said,", "My dear", "It is a truth"]
    state = model.new_state(3)
    first = model.generate(begins, 20, stop=" the", state=state)
    assert len({len(text) for text in first}) > 1, "rows should end at different times"
    second = model.generate([" Sir"] * 3, 20, state=state)
    for begin, text, more in zip(begins, first, second, strict=True):
        stopped = model.generate(begin, 20)[len(text) :].startswith(" the")
        so_far = begin + text + (" the" if stopped else "")
        assert model.generate(so_far + " Sir", 20) == more


def test_fork():
    model, state = bundled_model(), bundled_model().new_state(3)
    model.forward(golden()["prompt"], state, "none", state_indices=[0])
    state.copy_slot(0, 1)
    state.copy_slot(0, 2)
    ends = [" a", " the", " great"]
    assert model.generate(ends, 20, state=state) == [
        model.generate(PROMPT + end, 20) for end in ends
    ]


def test_stream_goes_on_from_a_state():
    model, state = bundled_model(), bundled_model().new_state()
    model.generate(PROMPT[:40], 0, state=state)
    assert "".join(model.stream(PROMPT[40:], 20, state=state)) == golden_text()[:20]


def test_tokens_that_begin_a_text_are_added_once():
    class Tokenizer:
        def encode(self, text, add_special_tokens=True):
            return [1] * add_special_tokens + list(text.encode())

        def decode(self, token_ids):
            return bytes(token_ids).decode(errors="replace")

    model = ssmcore.Model(bundled_model()._language_model, Tokenizer())
    state = model.new_state()
    settings = GenerationSettings(max_new_tokens=0)
    first = model.start_generation("ab", settings, state=state)
    assert first.prompts[0].tolist() == [1, 97, 98]
    first.collect()
    second = model.start_generation("c", settings, state=state)
    assert second.prompts[0].tolist() == [99]


def test_state_of_another_number_of_rows():
    model = bundled_model()
    with pytest.raises(ssmcore.InvalidArgumentError, match=r"state has 2 slots, .* 1 prompts"):
        model.generate("a", state=model.new_state(2))
    with pytest.raises(ssmcore.InvalidArgumentError, match="generate: state should be a State"):
        model.generate("a", state=b"state")
