"""What README.md shows is what happens."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
from model_fixtures import DATA, PROMPT, golden_text

from ssmcore import cli

ROOT = Path(__file__).parents[2]


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language, in order."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def test_python_example_prints_what_follows_it():
    (code,), (expected,) = blocks("python"), blocks("text")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    assert printed.getvalue() == expected


def test_cpp_example_is_the_tested_program():
    (code,) = blocks("cpp")
    assert code == (ROOT / "cpp" / "examples" / "generate.cpp").read_text(encoding="utf-8")


def test_first_command_prints_the_golden_continuation(capsys: pytest.CaptureFixture[str]):
    command = shlex.split(blocks("sh")[0])
    arguments = command[command.index(".venv/bin/ssmcore") + 1 :]
    assert PROMPT in arguments
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == golden_text()


def test_golden_text_of_the_cpp_tests_is_that_of_the_others():
    assert (DATA / "golden_mamba1_prose.txt").read_text(encoding="utf-8") == golden_text()
