"""The command line, run as its users do."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
from model_fixtures import BUNDLED, DATA, PROMPT, UPSTREAM, bundled_model, golden_text

import ssmcore

COMMAND = [sys.executable, "-m", "ssmcore"]
STATISTICS = re.compile(
    r"prompt: 74 tokens at [\d.]+ tok/s \| generation: (\d+) tokens at [\d.]+ tok/s"
    r" \| first token after [\d.]+ ms \| peak memory \d+ MiB\n"
)


def run(*arguments, stdin=b""):
    """On the CPU, unless they say where."""
    if arguments and arguments[0] in ("generate", "eval", "info", "bench"):
        arguments = (arguments[0], "--device=cpu", *arguments[1:])
    return subprocess.run([*COMMAND, *arguments], input=stdin, capture_output=True, timeout=120)


def assert_error(done, match):
    assert done.returncode == 2
    assert done.stdout == b""
    assert re.fullmatch(rf"ssmcore: error: .*{match}.*\n", done.stderr.decode())


def test_generate_prints_the_golden_continuation():
    done = run("generate", PROMPT, "-n", "256", "--temperature", "0")
    assert done.returncode == 0
    assert done.stdout.decode() == golden_text()
    assert STATISTICS.fullmatch(done.stderr.decode())[1] == "256"


def test_generate_on_every_device(device):
    done = run("generate", PROMPT, "-n", "256", "--device", device, "--dtype", "fp32", "--quiet")
    assert (done.stdout.decode(), done.stderr) == (golden_text(), b"")


@pytest.mark.parametrize("source", ["file", "stdin"])
def test_prompt_from(tmp_path, source):
    (tmp_path / "prompt").write_text(PROMPT)
    arguments = ["-f", tmp_path / "prompt"] if source == "file" else ["-"]
    done = run("generate", *arguments, "-n", "20", "--quiet", stdin=PROMPT.encode())
    assert (done.stdout.decode(), done.stderr) == (golden_text()[:20], b"")


def test_settings_arrive():
    model = bundled_model()
    settings = dict(
        temperature=0.9, top_k=40, top_p=0.95, min_p=0.02, repetition_penalty=1.1, seed=11
    )
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    expected = model.generate(PROMPT, 120, stop=[",", "ing"], **settings)
    stops = ["--stop", ",", "--stop", "ing"]
    done = run("generate", PROMPT, "-n", "120", "--threads", "1", *flags, *stops, "--quiet")
    assert done.stdout.decode() == expected
    assert len(expected) < len(model.generate(PROMPT, 120, **settings))


def test_json():
    done = run("generate", PROMPT, "-n", "20", "--json")
    assert done.stderr == b""
    result = json.loads(done.stdout)
    assert result["text"] == golden_text()[:20]
    assert (result["prompt_tokens"], result["generated_tokens"]) == (74, 20)
    for name in (
        "prompt_tokens_per_second", "generation_tokens_per_second", "seconds_to_first_token",
        "peak_memory_bytes",
    ):  # fmt: skip
        assert result[name] > 0


def test_a_prompt_computed_once(tmp_path):
    state = tmp_path / "state"
    done = run("generate", PROMPT[:40], "-n", "0", "--state-out", state)
    assert (done.returncode, done.stdout) == (0, b"")
    for _ in range(2):  # it stays as it is
        done = run("generate", PROMPT[40:], "-n", "60", "--state-in", state, "--quiet")
        assert done.stdout.decode() == golden_text()[:60]


def test_a_continuation_goes_on(tmp_path):
    model, state = bundled_model(), tmp_path / "state"
    done = run("generate", PROMPT, "-n", "20", "--state-out", state, "--json")
    assert json.loads(done.stdout)["text"] == golden_text()[:20]
    expected = model.generate(PROMPT + golden_text()[:20] + " Sir", 20)
    # Read from and written to at once.
    done = run("generate", " Sir", "-n", "20", "--state-in", state, "--state-out", state, "--quiet")
    assert done.stdout.decode() == expected
    so_far = PROMPT + golden_text()[:20] + " Sir" + expected
    done = run("generate", "!", "-n", "20", "--state-in", state, "--quiet")
    assert done.stdout.decode() == model.generate(so_far + "!", 20)


def test_states_that_do_not_fit(tmp_path):
    state, two = tmp_path / "state", bundled_model().new_state(2)
    two.save(state)
    assert_error(run("generate", "a", "--state-in", state), "number of slots")
    state.write_bytes(b"no state")
    assert_error(run("generate", "a", "--state-in", state), "expected a saved state")
    assert_error(run("generate", "a", "--state-in", tmp_path / "none"), "cannot read .*none")
    assert_error(run("generate", "a", "--state-out", tmp_path / "no" / "x"), "no such folder")
    assert_error(run("generate", "a", "--state-in", state, "--dtype", "bf16"), "saved state")
    assert state.read_bytes() == b"no state"


def test_memory_does_not_grow_with_the_prompt(tmp_path):
    peaks = []
    for length in (1_000, 60_000):
        (tmp_path / "prompt").write_text((DATA / "val_kjv.txt").read_text()[:length])
        done = json.loads(run("generate", "-f", tmp_path / "prompt", "-n", "1", "--json").stdout)
        assert done["prompt_tokens"] == length
        peaks.append(done["peak_memory_bytes"])
    # The text, its ids and the pages of a few buffers; its logits alone would be 61 MB.
    assert peaks[1] - peaks[0] < 16e6


def test_no_and_one_token():
    nothing = json.loads(run("generate", PROMPT, "-n", "0", "--json").stdout)
    assert (nothing["text"], nothing["generated_tokens"]) == ("", 0)
    assert nothing["seconds_to_first_token"] is None
    one = run("generate", PROMPT, "-n", "1")
    assert one.stdout.decode() == golden_text()[:1]
    assert "generation: 1 tokens |" in one.stderr.decode()


def test_another_model_and_type():
    done = run("generate", PROMPT, "-m", UPSTREAM, "-n", "30", "--quiet", "--device", "cpu")
    assert done.stdout.decode() == golden_text()[:30]
    assert b"bfloat16" in run("info", "--dtype", "bf16").stdout


@pytest.mark.parametrize(
    "arguments, match",
    [
        (["generate"], "expected a PROMPT"),
        (["generate", "a", "-f", "b"], "expected a PROMPT"),
        (["generate", ""], "no tokens"),
        (["generate", "-f", "/no/such/file"], "/no/such/file: No such file"),
        (["generate", "-f", "/"], "cannot read /"),
        (["generate", "-f", BUNDLED / "model.safetensors"], "not UTF-8"),
        (["generate", b"\xff"], "not valid Unicode"),
        (["generate", "a", "-m", "/no/such/model"], "/no/such/model"),
        (["generate", "a", "--device", "tpu"], "'tpu'"),
        (["generate", "a", "--device", "cuda:99"], "device cuda"),
        (["generate", "a", "--dtype", "int3"], "'int3'"),
        (["generate", "a", "--threads", "0"], "0"),
        (["generate", "a", "-n", "-1"], "max_new_tokens"),
        (["generate", "a", "-n", "x"], "invalid int value"),
        (["generate", "a", "--temperature", "1", "--top-p", "7"], "top_p"),
        (["generate", "a", "--stop", ""], "stop"),
        (["generate", "a", "--no-such-flag"], "--no-such-flag"),
        (["eval"], "FILE"),
        (["eval", "/no/such/file"], "/no/such/file: No such file"),
        (["eval", os.devnull], "at least 2 tokens, got 0"),
        (["eval", DATA / "val_kjv.txt", "--window", "0"], "window"),
        (["info", "-m", os.devnull], "expected a folder"),
        (["sing"], "'sing'"),
        ([], "COMMAND"),
    ],
)
def test_errors_are_one_line(arguments, match):
    assert_error(
        run(*arguments, "--quiet") if arguments[:1] == ["eval"] else run(*arguments), match
    )


def start(*arguments):
    return subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    )


def test_interrupt_ends_quietly_after_what_was_printed():
    process = start("generate", PROMPT, "-n", "1000000", "--ignore-eos")
    printed = process.stdout.read(10)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, b"")
    printed = (printed + rest).decode()
    assert printed
    assert printed[:256] == golden_text()[: len(printed)]


def test_closed_pipe_ends_quietly():
    process = start("generate", PROMPT, "-n", "1000000", "--ignore-eos")
    assert golden_text().encode().startswith(process.stdout.read(5))
    process.stdout.close()
    assert process.wait(timeout=30) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


def test_eval(tmp_path):
    text = (DATA / "val_kjv.txt").read_text()[:5000]
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text(text[::-1])
    done = run("eval", tmp_path / "a.txt", tmp_path / "b.txt", "--window", "1000")
    assert done.returncode == 0
    lines = done.stdout.decode().splitlines()
    for line, name, content in zip(lines, "ab", (text, text[::-1]), strict=True):
        score = bundled_model().score(content, 1000)
        assert re.fullmatch(
            re.escape(
                f"{tmp_path}/{name}.txt: {score.bits_per_byte:.4f} bits per byte, "
                f"perplexity {score.perplexity:.4f}, 4000 tokens, "
            )
            + r"\d+ tok/s",
            line,
        )
    assert "100%" in done.stderr.decode()


def test_eval_of_stdin_as_one_sequence():
    done = run("eval", "-", "--quiet", stdin=PROMPT.encode())
    assert f"{bundled_model().score(PROMPT).bits_per_byte:.4f} bits" in done.stdout.decode()
    assert done.stderr == b""


def test_info():
    done = run("info")
    assert done.returncode == 0
    rows = dict(line.split(maxsplit=1) for line in done.stdout.decode().splitlines())
    assert rows["parameters"] == "3,569,920"
    assert rows["layers"] == "8"
    assert rows["ssmcore"] == ssmcore.__version__
    assert "upstream" in run("info", "-m", UPSTREAM).stdout.decode()


def test_bench(tmp_path, device):
    sizes = ["--batch", "1", "3", "--prompt", "20", "--new", "4"]
    done = run("bench", *sizes, "--json", tmp_path / "json", "--device", device)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "3,569,920 parameters" in done.stdout.decode()
    table = done.stdout.decode().splitlines()[-2:]
    results = json.loads((tmp_path / "json").read_text())
    assert results["device"].startswith(device)
    for line, row, batch in zip(table, results["measurements"], (1, 3), strict=True):
        assert line.startswith(f"| {batch} | 20 | 4 |")
        assert (row["batch"], row["prompt"], row["new"]) == (batch, 20, 4)
        seconds = row["prefill_seconds"] + 4 * row["step_seconds"]
        assert row["new_tokens_per_second"] == pytest.approx(4 * batch / seconds)


def test_bench_of_a_published_shape():
    sizes = ["--batch", "1", "--prompt", "8", "--new", "2", "--dtype", "bf16", "--device", "cpu"]
    done = run("bench", "--shape", "130m", *sizes)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "129,135,360 parameters" in done.stdout.decode()


@pytest.mark.parametrize(
    "arguments, match",
    [
        (["--batch", "0"], "at least 1"),
        (["--shape", "7b"], "130m, 370m, 790m, 1.4b, 2.8b: '7b'"),
        (["--shape", "130m", "-m", "folder"], "got both"),
        (["--device", "cuda:99"], "device cuda"),
    ],
)
def test_bench_refuses(arguments, match):
    assert_error(run("bench", *arguments), match)


def test_version_and_help():
    assert run("--version").stdout.decode() == f"ssmcore {ssmcore.__version__}\n"
    for command in ([], ["generate"], ["eval"], ["info"], ["bench"]):
        done = run(*command, "--help")
        assert done.returncode == 0 and done.stdout.startswith(b"usage: ssmcore")


def test_start_is_light():
    heavy = ["torch", "transformers", "huggingface_hub", "tqdm", "tokenizers", "ml_dtypes", "jax"]
    code = f"import sys, ssmcore.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
