"""Tokenizers, and decoding token by token."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_fixtures import BUNDLED
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

import ssmcore
from ssmcore.tokenizer import ByteTokenizer, FileTokenizer, IncrementalDecoder

TEXTS = [
    "naïve café, 5 € or 5€",
    "日本語のテキスト",
    "👩‍👩‍👧 family 👍🏽",
    "plain ascii text",
    " ",
    "  a  b ",
]


def byte_level_bpe(folder):
    """A byte-level BPE whose tokens begin and end inside characters, with an added token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens([AddedToken("<é>", normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return FileTokenizer(folder / "tokenizer.json")


def sentencepiece_bpe(folder):
    """A tokenizer as sentencepiece makes them: spaces as ▁, unknown characters as bytes."""
    tokens = ["<unk>", "▁", "▁a", "a", "b", "▁b"] + [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [("▁", "a"), ("▁", "b")]
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return FileTokenizer(folder / "tokenizer.json")


@pytest.fixture(scope="module", params=["bytes", "bundled", "bpe", "sentencepiece"])
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    match request.param:
        case "bytes":
            return ByteTokenizer()
        case "bundled":
            return FileTokenizer(BUNDLED / "tokenizer.json")
        case "bpe":
            return byte_level_bpe(folder)
        case _:
            return sentencepiece_bpe(folder)


def pieces_of(tokenizer, token_ids):
    decoder = IncrementalDecoder(tokenizer)
    return [decoder.push(token_id) for token_id in token_ids] + [decoder.flush()]


@given(text=st.text())
def test_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=200)
@given(text=st.text() | st.sampled_from(TEXTS))
def test_pieces_hold_whole_characters_and_join_to_the_text(tokenizer, text):
    pieces = pieces_of(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("make", [ByteTokenizer, lambda: FileTokenizer(BUNDLED / "tokenizer.json")])
@settings(max_examples=200)
@given(data=st.binary() | st.lists(st.sampled_from(b"\xf0\x9f\x98\x80\xe2\x82\xc3a")).map(bytes))
def test_broken_bytes_decode_as_a_whole_sequence_does(make, data):
    tokenizer = make()
    assert "".join(pieces_of(tokenizer, data)) == data.decode(errors="replace")


def test_pieces_come_as_soon_as_a_character_is_whole():
    decoder = IncrementalDecoder(ByteTokenizer())
    pieces, pending = [], []
    for byte in "a€b".encode():
        pieces.append(decoder.push(byte))
        pending.append(decoder.pending)
    assert pieces == ["a", "", "", "€", "b"]
    assert pending == [False, True, True, False, False]


def test_decoding_looks_only_at_the_last_tokens():
    seen = []

    class Watched(ByteTokenizer):
        def decode(self, token_ids):
            seen.append(len(token_ids))
            return super().decode(token_ids)

    pieces_of(Watched(), list("long enough, €, to show".encode() * 20))
    assert max(seen) <= 8


def test_ids_without_text_give_empty_pieces(tmp_path):
    tokenizer = byte_level_bpe(tmp_path)
    beyond = 5000
    ids = [beyond, *tokenizer.encode("é"), beyond, beyond, *tokenizer.encode("x")]
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == "éx"


@given(text=st.text() | st.sampled_from(TEXTS))
def test_bytes_of_a_text_are_counted(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.num_bytes(ids) == len(text.encode())


def test_bytes_of_a_part_of_a_character(tmp_path):
    for tokenizer in (ByteTokenizer(), FileTokenizer(BUNDLED / "tokenizer.json")):
        assert [tokenizer.num_bytes([byte]) for byte in "€".encode()] == [1, 1, 1]
    bpe = byte_level_bpe(tmp_path)
    text = "5 € <é> 👍🏽"
    ids = bpe.encode(text)
    assert sum(bpe.num_bytes([token_id]) for token_id in ids) == len(text.encode())


def permute_ids(tokenizer):
    vocab = tokenizer["model"]["vocab"]
    ids = list(vocab.values())
    tokenizer["model"]["vocab"] = dict(zip(vocab, ids[::-1], strict=True))


def add_token(tokenizer):
    token = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=False)
    tokenizer["added_tokens"].append({"id": 256, "content": "ab", **token})


def add_merge(tokenizer):
    tokenizer["model"]["vocab"]["ab"] = 256
    tokenizer["model"]["merges"].append(["a", "b"])


def add_begin(tokenizer):
    begin = {"a": {"id": "a", "ids": [97], "tokens": ["a"]}}
    single = [{"SpecialToken": {"id": "a", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": begin,
    }  # fmt: skip


@pytest.mark.parametrize(
    "change, is_of_bytes",
    [
        (lambda tokenizer: None, True),
        (permute_ids, True),
        (lambda tokenizer: tokenizer["pre_tokenizer"].update(use_regex=True), True),
        (lambda tokenizer: tokenizer["pre_tokenizer"].update(add_prefix_space=True), False),
        (lambda tokenizer: tokenizer.update(normalizer={"type": "Lowercase"}), False),
        (lambda tokenizer: tokenizer["model"].update(end_of_word_suffix="b"), False),
        (add_token, False),
        (add_merge, False),
        (add_begin, False),
    ],
)
def test_ids_are_those_of_the_library(tmp_path, change, is_of_bytes):
    contents = json.loads((BUNDLED / "tokenizer.json").read_text())
    change(contents)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(contents))
    ours, library = FileTokenizer(path), Tokenizer.from_file(str(path))
    assert (ours._id_by_byte is not None) == is_of_bytes

    @settings(max_examples=40)
    @given(text=st.text() | st.text("aAbB "))
    def check(text):
        for special in (True, False):
            ids = library.encode(text, add_special_tokens=special).ids
            assert ours.encode(text, special) == ids

    check()
    text = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000, 0x101)]))
    assert ours.encode(text) == library.encode(text).ids


def test_text_is_never_truncated_or_padded(tmp_path):
    stored = json.loads((BUNDLED / "tokenizer.json").read_text())
    stored["truncation"] = {
        "max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right",
    }  # fmt: skip
    stored["padding"] = {
        "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "x",
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    assert FileTokenizer(tmp_path / "tokenizer.json").encode("truth") == list(b"truth")


@pytest.mark.parametrize("bad", [b"text", 3, None, ["text"]])
def test_what_is_not_text_is_refused(bad):
    for tokenizer in (ByteTokenizer(), FileTokenizer(BUNDLED / "tokenizer.json")):
        with pytest.raises(ssmcore.InvalidArgumentError, match="should be a str"):
            tokenizer.encode(bad)


def test_text_that_is_no_unicode_is_refused():
    for tokenizer in (ByteTokenizer(), FileTokenizer(BUNDLED / "tokenizer.json")):
        with pytest.raises(ssmcore.InvalidArgumentError, match="not valid Unicode"):
            tokenizer.encode("a\ud800")


@pytest.mark.parametrize("content", ["", "{}", "[1, 2", '{"model": 3}'])
def test_damaged_file_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ssmcore.InvalidArgumentError, match=r"tokenizer\.json"):
        FileTokenizer(tmp_path / "tokenizer.json")
