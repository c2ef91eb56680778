"""What README.md shows is what happens."""

import contextlib
import io
import re
import shlex
import textwrap
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from model_fixtures import DATA, PROMPT, bundled_model, golden_text

from ssmcore import cli, ops

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language, in order."""
    return [text for kind, text in FENCED.findall(README) if kind == language]


def test_python_examples_print_what_follows_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # they write files
    examples = [
        (code, printed)
        for (kind, code), (next_kind, printed) in pairwise(FENCED.findall(README))
        if (kind, next_kind) == ("python", "text")
    ]
    assert len(examples) == len(blocks("python"))
    names: dict[str, Any] = {}  # one session
    for code, expected in examples:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "README.md", "exec"), names)
        assert printed.getvalue() == expected


def test_cpp_example_is_the_tested_program():
    (code,) = blocks("cpp")
    assert code == (ROOT / "cpp" / "examples" / "generate.cpp").read_text(encoding="utf-8")


def test_c_example_is_of_the_tested_program():
    (code,) = blocks("c")
    program = (ROOT / "cpp" / "examples" / "generate.c").read_text(encoding="utf-8")
    pieces = code.split("/* ... */\n")
    assert len(pieces) == 2
    for piece in pieces:
        assert textwrap.indent(piece, "  ") in program


def test_cmake_example_is_of_the_tested_project():
    (code,) = blocks("cmake")
    project = (ROOT / "tests" / "consumer" / "CMakeLists.txt").read_text(encoding="utf-8")
    for line in code.splitlines():
        assert line.replace("(program ", "(consumer ") in project.splitlines()


def test_first_command_prints_the_golden_continuation(capsys: pytest.CaptureFixture[str]):
    command = shlex.split(blocks("sh")[0])
    arguments = command[command.index(".venv/bin/ssmcore") + 1 :]
    assert PROMPT in arguments
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == golden_text()


def test_commands_with_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompt.txt").write_text(PROMPT)
    (commands,) = (block for block in blocks("sh") if block.startswith("ssmcore generate"))
    read, go_on = (shlex.split(line)[1:] for line in commands.splitlines())
    assert cli.main(read) == 0
    assert capsys.readouterr().out == ""
    assert cli.main(go_on) == 0
    assert capsys.readouterr().out == bundled_model().generate(PROMPT + " And then")


def test_training_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For a few steps, from the top of the repository but for the model's folder."""
    monkeypatch.chdir(ROOT)
    (commands,) = (block for block in blocks("sh") if block.startswith("ssmcore train"))
    folder = str(tmp_path / "austen")
    train, generate = (
        shlex.split(line.replace(" austen ", f" {folder} "))[1:] for line in commands.splitlines()
    )
    assert folder in train and folder in generate
    assert cli.main([*train, "--device=cpu", "--steps=2", "--warmup=1", "--quiet"]) == 0
    assert f"{folder}: step 2 of 2, loss " in capsys.readouterr().out
    assert cli.main([*generate, "--device=cpu"]) == 0
    assert len(capsys.readouterr().out) > 50


def test_every_operator_is_listed():
    for name in ops.__all__:
        if not isinstance(getattr(ops, name), type):  # what some of them return
            assert f"`{name}`" in README


def test_golden_text_of_the_cpp_tests_is_that_of_the_others():
    assert (DATA / "golden_mamba1_prose.txt").read_text(encoding="utf-8") == golden_text()
