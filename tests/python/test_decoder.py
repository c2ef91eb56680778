"""Sequences that join, go on together and leave, on every device."""

import numpy as np
import pytest
from model_fixtures import PROMPT, golden, golden_text, model_on

import ssmcore

SAMPLING = dict(temperature=0.9, top_k=40, top_p=0.95, min_p=0.01)
PROMPTS = [list(text.encode()) for text in (PROMPT, "And God said,", "Emma", "My dear Mr. Bennet,")]


@pytest.fixture(params=[False, True], ids=["", "batch-invariant"])
def model(request, device):
    return model_on(device, batch_invariant=request.param)


def tokens_of(decoder, slots, count):
    """`count` tokens more in each slot, as rows."""
    columns = []
    for _ in range(count):
        decoder.step(slots)
        columns.append(decoder.take())
    return [list(row) for row in zip(*columns, strict=True)]


def alone(model, prompt, count, **settings):
    decoder = model.new_decoder(model.new_state())
    decoder.admit([0], [prompt], **settings)
    first = decoder.take()
    return first + tokens_of(decoder, [0], count - 1)[0]


def test_greedy_tokens_are_golden(device):
    assert alone(model_on(device), golden()["prompt"], 256) == golden()["greedy"].tolist()


def test_a_step_may_be_launched_before_the_tokens_are_taken(model):
    decoder = model.new_decoder(model.new_state())
    decoder.admit([0], [PROMPTS[0]])
    decoder.step([0])
    with pytest.raises(ssmcore.InvalidArgumentError, match="two results"):
        decoder.step([0])
    tokens = decoder.take()
    for _ in range(18):
        decoder.step([0])
        tokens += decoder.take()
    assert tokens + decoder.take() == golden()["greedy"][:20].tolist()


def test_rows_that_join_and_leave_are_as_each_alone(model):
    """Random joins and leaves; which slot is used by whom changes all the time."""
    rng = np.random.default_rng(0)
    state = model.new_state(5)
    decoder = model.new_decoder(state)
    length = 24
    settings = [SAMPLING, dict(temperature=0.0), dict(temperature=1.2, repetition_penalty=1.3)]
    expected = {
        (p, s, seed): alone(model, PROMPTS[p], length, seed=seed, **settings[s])
        for p in range(len(PROMPTS))
        for s in range(len(settings))
        for seed in (0, 1)
    }
    running: dict[int, tuple] = {}  # by slot: what it is, and its tokens so far
    num_finished = 0
    while num_finished < 40:
        free = [slot for slot in range(5) if slot not in running]
        joining = [slot for slot in free if rng.random() < 0.4]
        if joining:
            keys = [list(expected)[rng.integers(len(expected))] for _ in joining]
            for slot in joining:
                state.reset_slot(slot)
            rows = [settings[s] for _, s, _ in keys]
            names = {name for row in rows for name in row}
            defaults = dict(top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
            decoder.admit(
                joining,
                [PROMPTS[p] for p, _, _ in keys],
                seed=[seed for _, _, seed in keys],
                **{name: [row.get(name, defaults.get(name)) for row in rows] for name in names},
            )
            for slot, key, token in zip(joining, keys, decoder.take(), strict=True):
                running[slot] = (key, [token])
        slots = rng.permutation(list(running))
        if not len(slots):
            continue
        for slot, (token,) in zip(slots, tokens_of(decoder, slots, 1), strict=True):
            key, tokens = running[slot]
            tokens.append(token)
            assert tokens == expected[key][: len(tokens)]
            if len(tokens) == length or rng.random() < 0.02:
                del running[slot]
                num_finished += 1


def test_the_state_has_read_all(model):
    state = model.new_state(2)
    decoder = model.new_decoder(state)
    decoder.admit([1], [PROMPTS[0]])
    tokens = decoder.take() + tokens_of(decoder, [1], 4)[0]
    decoder.read([1])
    following = model.step([65], state, state_indices=[1])
    expected = model.forward([*PROMPTS[0], *tokens, 65], logits="last")[0]
    np.testing.assert_allclose(following[0], expected, rtol=0, atol=1e-3)


def test_what_is_refused(model):
    decoder = model.new_decoder(model.new_state(2))
    invalid = ssmcore.InvalidArgumentError
    with pytest.raises(invalid, match="no tokens"):
        decoder.admit([0], [[]])
    with pytest.raises(invalid, match="2 prompts for 1 slots"):
        decoder.admit([0], PROMPTS[:2])
    with pytest.raises(invalid, match=r"slot is -1"):
        decoder.admit([-1], PROMPTS[:1])
    with pytest.raises(invalid, match="2, the state has 2 slots"):
        decoder.admit([2], PROMPTS[:1])
    with pytest.raises(invalid, match="slot 1 twice"):
        decoder.admit([1, 1], PROMPTS[:2])
    with pytest.raises(invalid, match="got 3 rows, the state has 2 slots"):
        decoder.admit([0, 1, 2], PROMPTS[:3])
    with pytest.raises(invalid, match="256"):
        decoder.admit([0], [[256]])
    for name, value in (
        ("temperature", -1.0),
        ("top_k", -1),
        ("top_p", 0.0),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("seed", 0.5),
        ("temperature", [1.0, 1.0]),
    ):
        with pytest.raises(invalid, match=name):
            decoder.admit([0], PROMPTS[:1], **{name: value})
    with pytest.raises(invalid, match="no result"):
        decoder.take()
    decoder.admit([0], PROMPTS[:1])
    decoder.take()
    for call in (decoder.step, decoder.read):
        with pytest.raises(invalid, match="slot 1 has no sequence"):
            call([0, 1])
    # Nothing of this has changed anything.
    decoder.admit([0], [golden()["prompt"]])
    assert decoder.take() == golden()["greedy"][:1].tolist()


def test_a_state_has_not_read_the_last_token_of_a_stream_that_is_left(device):
    model = model_on(device)
    state = model.new_state()
    stream = model.stream(PROMPT, 256, state=state)
    pieces = [next(stream) for _ in range(3)]
    stream.close()
    text = "".join(pieces) + model.generate(pieces[-1], 20, state=state)
    assert text == golden_text()[:23]
