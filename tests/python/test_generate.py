"""Generation: stops, batches, sampling, streaming."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_fixtures import PROMPT, bundled_model, golden, golden_text, upstream_model

import ssmcore
from ssmcore.continuation import IdContinuation, StopFilter, TextContinuation
from ssmcore.tokenizer import ByteTokenizer

PROMPTS = [PROMPT, "And God said,", "My dear Mr. Bennet, said his lady to him one day,", "Emma"]


def ids_of(text):
    return list(text.encode())


# Stop strings.


def until_stop(text, stops):
    """The text before the first stop string to be completed, character by character."""
    for end in range(1, len(text) + 1):
        begins = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if begins:
            return text[: min(begins)], True
    return text, False


@settings(max_examples=500)
@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=8),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_stop_filter(pieces, stops):
    expected, stopped = until_stop("".join(pieces), stops)
    stop_filter = StopFilter(stops)
    passed = ""
    for count, piece in enumerate(pieces, start=1):
        passed += stop_filter.push(piece)
        assert expected.startswith(passed)
        if stop_filter.stopped:
            break
        could_stop = [stop for stop in stops if stop.startswith(stop_filter.held)]
        assert not stop_filter.held or could_stop
        assert passed + stop_filter.held == "".join(pieces[:count])
    assert stop_filter.stopped == stopped
    assert passed + stop_filter.held == expected


@settings(max_examples=500)
@given(
    text=st.text("a€b", max_size=12),
    stops=st.lists(st.text("a€b", min_size=1, max_size=3), max_size=3),
)
def test_continuations_end_before_a_stop_string(text, stops):
    expected, stopped = until_stop(text, stops)
    for make in (TextContinuation, IdContinuation):
        continuation = make(ByteTokenizer(), stops)
        pieces = []
        for token_id in ids_of(text):
            pieces.append(continuation.push(token_id))
            if continuation.stopped:
                break
        pieces.append(continuation.close())
        assert continuation.stopped == stopped
        if make is TextContinuation:
            assert "".join(pieces) == expected
        else:
            assert list(itertools.chain(*pieces)) == ids_of(expected)


class WordTokenizer:
    """Tokens of several characters, so that a stop string may lie inside one."""

    words = ("ab", "cd", "abcd", "x")

    def encode(self, text, add_special_tokens=True):
        return [self.words.index(word) for word in text.split("|")]

    def decode(self, token_ids):
        return "".join(self.words[token_id] for token_id in token_ids)

    def num_bytes(self, token_ids):
        return len(self.decode(token_ids))


@pytest.mark.parametrize(
    "tokens, stop, text, ids",
    [
        ("x|ab|cd|x", "bc", "xa", "x"),
        ("x|abcd|x", "bc", "xa", "x"),
        ("x|abcd|x", "abcd", "x", "x"),
        ("ab|cd|ab|x", "abx", "abcd", "ab|cd"),
        ("x|ab|ab|x", "dx", "xababx", "x|ab|ab|x"),
        ("x|ab", "abc", "xab", "x|ab"),
    ],
)
def test_stop_inside_and_across_tokens(tokens, stop, text, ids):
    tokenizer = WordTokenizer()
    as_text, as_ids = TextContinuation(tokenizer, [stop]), IdContinuation(tokenizer, [stop])
    texts, kept = "", []
    for token_id in tokenizer.encode(tokens):
        if not as_text.stopped:
            texts += as_text.push(token_id)
            kept += as_ids.push(token_id)
        assert as_text.stopped == as_ids.stopped
    assert texts + as_text.close() == text
    assert kept + as_ids.close() == tokenizer.encode(ids)


# With the trained model.


@pytest.mark.parametrize("load", [bundled_model, upstream_model])
def test_greedy_continuation_is_golden(load):
    model = load()
    assert model.generate(golden()["prompt"].tolist(), 256) == golden()["greedy"].tolist()
    assert model.generate(PROMPT, 256) == golden_text()


def test_result_is_in_kind():
    model, text, ids = bundled_model(), golden_text()[:8], golden()["greedy"][:8].tolist()
    prompt = golden()["prompt"]
    assert model.generate(PROMPT, 8) == text
    assert model.generate([PROMPT], 8) == [text]
    assert model.generate((PROMPT, PROMPT), 8) == [text, text]
    assert model.generate(prompt, 8) == ids
    assert model.generate(torch.tensor(prompt), 8) == ids
    assert model.generate(prompt.tolist(), 8) == ids
    assert model.generate([prompt.tolist()], 8) == [ids]
    assert model.generate([prompt, prompt.astype(np.uint8)], 8) == [ids, ids]
    assert model.generate(np.stack([prompt, prompt]), 8) == [ids, ids]
    assert all(type(token_id) is int for token_id in model.generate(prompt, 8))


def test_batch_is_as_each_prompt_alone():
    model = bundled_model()
    alone = [model.generate(prompt, 60) for prompt in PROMPTS]
    assert model.generate(PROMPTS, 60) == alone
    assert len(set(alone)) == len(alone)


def test_rows_that_end_leave_the_others_as_they_were():
    model = bundled_model()
    alone = [model.generate(prompt, 60, stop=[",", "."]) for prompt in PROMPTS]
    assert len({len(text) for text in alone}) > 1, "rows should end at different times"
    assert model.generate(PROMPTS, 60, stop=[",", "."]) == alone


def test_stop_strings_with_the_model():
    model, whole = bundled_model(), golden_text()
    for stop in ("conduct", " and the", "e party to"):
        expected = whole[: whole.index(stop)]
        assert model.generate(PROMPT, 256, stop=stop) == expected
        assert "".join(model.stream(PROMPT, 256, stop=[stop, "never there"])) == expected
        assert model.generate(ids_of(PROMPT), 256, stop=stop) == ids_of(expected)
    assert model.generate(PROMPT, 30, stop="never there") == whole[:30]


def with_eos(model, token_id):
    """A language model like the one in `model`, but for its end-of-sequence token."""

    class Config:
        vocab_size = model.config.vocab_size
        eos_token_ids = (token_id,)

    class LanguageModel:
        config = Config
        new_state = model._language_model.new_state
        new_decoder = model._language_model.new_decoder

    return ssmcore.Model(LanguageModel, model.tokenizer)


def test_end_of_sequence():
    whole = golden_text()
    model = with_eos(bundled_model(), ord(","))
    expected = whole[: whole.index(",")]
    assert model.generate(PROMPT, 256) == expected
    assert model.generate([PROMPT, PROMPT], 256) == [expected, expected]
    assert "".join(model.stream(PROMPT, 256)) == expected
    assert model.generate(PROMPT, 256, ignore_eos=True) == whole
    assert model.generate(ids_of(PROMPT), 256) == ids_of(expected)


def test_end_of_sequence_gives_back_what_was_held():
    whole = golden_text()
    end = whole.index(",")
    model = with_eos(bundled_model(), ord(","))
    almost = whole[end - 3 : end] + "!"
    assert model.generate(PROMPT, 256, stop=almost) == whole[:end]
    assert model.generate(PROMPT, end, stop=almost) == whole[:end]


def test_stream_yields_the_same_as_it_comes():
    model = bundled_model()
    assert list(model.stream(PROMPT, 20)) == list(golden_text()[:20])
    assert list(model.stream(ids_of(PROMPT), 20)) == golden()["greedy"][:20].tolist()


def test_stream_is_lazy():
    stream = bundled_model().stream(PROMPT, 10**9, ignore_eos=True)
    assert [next(stream) for _ in range(5)] == list(golden_text()[:5])


def test_no_new_tokens():
    model = bundled_model()
    assert model.generate(PROMPT, 0) == ""
    assert model.generate([ids_of(PROMPT)], 0) == [[]]
    assert list(model.stream(PROMPT, 0)) == []


SAMPLING = dict(temperature=0.9, top_k=40, top_p=0.95, min_p=0.01)


def test_sampling_is_reproducible():
    model = bundled_model()
    first = model.generate(PROMPT, 60, seed=7, **SAMPLING)
    assert model.generate(PROMPT, 60, seed=7, **SAMPLING) == first
    assert "".join(model.stream(PROMPT, 60, seed=7, **SAMPLING)) == first
    assert model.generate(PROMPT, 60, seed=8, **SAMPLING) != first
    assert model.generate(PROMPT, 60, **SAMPLING) == model.generate(PROMPT, 60, seed=0, **SAMPLING)


def test_draws_do_not_depend_on_the_batch():
    model = bundled_model()
    alone = [
        model.generate(prompt, 40, seed=5 + row, stop=".", **SAMPLING)
        for row, prompt in enumerate(PROMPTS)
    ]
    assert model.generate(PROMPTS, 40, seed=5, stop=".", **SAMPLING) == alone


def test_a_seed_for_each_row():
    model, seeds = bundled_model(), [3, -(2**63), 2**63 - 1, 3]
    alone = [
        model.generate(prompt, 30, seed=seed, **SAMPLING)
        for prompt, seed in zip(PROMPTS, seeds, strict=True)
    ]
    for batch_seeds in (seeds, tuple(seeds), np.array(seeds)):
        assert model.generate(PROMPTS, 30, seed=batch_seeds, **SAMPLING) == alone
    same = model.generate([PROMPT] * 3, 30, seed=[5, 5, 6], **SAMPLING)
    assert same[0] == same[1] != same[2]
    assert model.generate(PROMPT, 30, seed=[5], **SAMPLING) == same[0]


@pytest.mark.parametrize("seed", [[], [1], [1, 2, 3]])
def test_seeds_for_another_number_of_rows(seed):
    with pytest.raises(ssmcore.InvalidArgumentError, match=rf"{len(seed)} items, .* 2 prompts"):
        bundled_model().generate(["a", "b"], seed=seed, temperature=1.0)


@settings(max_examples=10)
@given(
    prompts=st.lists(st.binary(min_size=1, max_size=700), min_size=1, max_size=5),
    seed=st.integers(0, 99),
)
def test_batch_of_unequal_prompts_is_as_each_alone(prompts, seed):
    model = bundled_model()
    rows = [list(prompt) for prompt in prompts]
    sampled = dict(max_new_tokens=12, temperature=0.7, top_p=0.9)
    alone = [model.generate(row, seed=seed + i, **sampled) for i, row in enumerate(rows)]
    assert model.generate(rows, seed=seed, **sampled) == alone


def test_rows_of_the_same_prompt_differ():
    rows = bundled_model().generate([PROMPT] * 3, 40, seed=1, temperature=1.0)
    assert len(set(rows)) == 3


def test_repetition_penalty_sees_prompt_and_continuation():
    model = bundled_model()
    strong = dict(repetition_penalty=1e9, max_new_tokens=20)
    for prompt in (ids_of("abc"), [ids_of("abc"), ids_of("thou art")]):
        result = model.generate(prompt, **strong)
        prompts, rows = (prompt, result) if np.ndim(result[0]) else ([prompt], [result])
        for begin, row in zip(prompts, rows, strict=True):
            # A token that was seen is left with a logit of 0 at most; another one has more.
            assert len(set(row)) == len(row) and not set(row) & set(begin)
    alone = [model.generate(prompt, 40, repetition_penalty=1.3) for prompt in PROMPTS]
    assert model.generate(PROMPTS, 40, repetition_penalty=1.3) == alone


@pytest.mark.parametrize("prompt", ["", [""], ["a", ""], [], [[]], [[3], []], np.empty((0,), int)])
def test_prompt_of_no_tokens(prompt):
    for run in (bundled_model().generate, lambda prompt: list(bundled_model().stream(prompt))):
        with pytest.raises(ssmcore.InvalidArgumentError, match=r"no tokens|one prompt"):
            run(prompt)


@pytest.mark.parametrize(
    "prompt", [None, 5, 1.5, b"text", {"a": 1}, [1.5], ["a", 3], [[1, 2], "a"], [[[1]]], [True]]
)
def test_prompts_of_other_types(prompt):
    with pytest.raises(ssmcore.InvalidArgumentError, match="generate: prompt"):
        bundled_model().generate(prompt)


@pytest.mark.parametrize("token_id", [-1, 256, 2**40])
def test_ids_out_of_range(token_id):
    with pytest.raises(ssmcore.InvalidArgumentError, match=str(token_id)):
        bundled_model().generate([1, token_id])


@pytest.mark.parametrize(
    "setting, value",
    [
        ("max_new_tokens", -1),
        ("max_new_tokens", 1.5),
        ("seed", 1.5),
        ("seed", 2**63),
        ("seed", None),
        ("seed", [0.5]),
        ("seed", [2**63]),
        ("seed", "1"),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", 3),
        ("stop", [b"a"]),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
    ],
)
def test_bad_settings(setting, value):
    with pytest.raises(ssmcore.InvalidArgumentError, match=setting):
        bundled_model().generate(PROMPT, **{"temperature": 1.0, setting: value})


def test_stream_checks_at_once_and_takes_one_prompt():
    model = bundled_model()
    with pytest.raises(ssmcore.InvalidArgumentError, match="stream: expected one prompt"):
        model.stream([PROMPT, PROMPT])
    with pytest.raises(ssmcore.InvalidArgumentError, match="stream: prompt has no tokens"):
        model.stream("")


def test_text_needs_a_tokenizer():
    model = ssmcore.Model(bundled_model()._language_model, None)
    assert model.tokenizer is None
    assert model.generate(golden()["prompt"], 8) == golden()["greedy"][:8].tolist()
    with pytest.raises(ssmcore.InvalidArgumentError, match="prompt that is text needs a tokenizer"):
        model.generate(PROMPT)
    with pytest.raises(ssmcore.InvalidArgumentError, match="stop needs a tokenizer"):
        model.generate([1, 2], stop="a")
