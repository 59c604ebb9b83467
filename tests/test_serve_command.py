"""`mass-adapt serve` as a command: what it refuses, what it is called, and a service of its own that a signal ends."""

import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from openai import OpenAI

from mass import serve

SHORT = ["model.dtype=fp32", "prompt.style=plain", "generate.examples=2", "generate.max_new_tokens=16"]


def test_command_refuses_what_it_must(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MASS_TOKEN", raising=False)
    (tmp_path / "empty").touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        tiny = ["--model", "tiny:llama"]
        for words, sentence in [
            ([], "--run FOLDER"),
            ([*tiny, "--host", "0.0.0.0"], "can be reached from other machines: set a token"),
            ([*tiny, "--host", "::"], "set a token, by --token-file FILE or MASS_TOKEN"),
            ([*tiny, "--token-file", str(tmp_path / "empty")], "is empty"),
            ([*tiny, "--token-file", str(tmp_path / "none")], "cannot be read"),
            ([*tiny, "--port", port], f"--port {port}: cannot be listened at"),
            ([*tiny, "--port", "99999"], "cannot be listened at"),
            ([*tiny, "--method", "mass"], "weighs by a trained scorer"),
            ([*tiny, "--batch", "0"], "--batch 0: it wants 1 or more"),
            ([*tiny, "--window", "nan"], "--window nan"),
            ([*tiny, "--name", "a:b"], "without a colon"),
            ([*tiny, "inner.step=1"], "unknown key"),
        ]:
            assert serve.main(words) == 2
            assert sentence in capsys.readouterr().err, words


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--model", "models/foo"], "foo"),
        (["--model", "./models/foo//"], "foo"),
        (["--model", "tiny:llama"], "tiny-llama"),
        (["--run", "checkpoints/demo/"], "demo"),
        (["--run", "checkpoints/demo/step_000003"], "demo"),
    ],
)
def test_the_name_is_that_of_the_folder(words: list[str], name: str) -> None:
    assert serve._name(serve._parser().parse_args(words)) == name


def test_command_names_what_is_not_installed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert serve.main(["--model", "tiny:llama"]) == 2
    assert "serve needs uvicorn, which is not installed: pip install 'mass[serve]'" in capsys.readouterr().err


def heeds_interrupts() -> None:
    """In the background (`nohup make test &`) tests, and what they start, begin with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_command_serves_until_it_is_stopped() -> None:
    words = [sys.executable, "-m", "mass.adapt", "serve", "--model", "tiny:llama", "--port", "0", *SHORT, "generate.answer_tokens=4"]  # fmt: skip
    process = subprocess.Popen(
        words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=heeds_interrupts
    )
    assert process.stderr is not None and process.stdout is not None
    said = ""
    while "Ctrl-C" not in said:
        said = process.stderr.readline()
        assert said, "the service has ended"
    found = re.search(r"llama at (http://127\.0\.0\.1:\d+/v1) \(method quest\)", said)
    assert found, said
    client = OpenAI(base_url=found[1], api_key="none", max_retries=0)
    answer = client.chat.completions.create(model="tiny-llama", messages=[{"role": "user", "content": "x"}])
    assert answer.model_extra is not None and answer.model_extra["mass"]["method"] == "quest"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20) == ("", "") and process.returncode == 130
