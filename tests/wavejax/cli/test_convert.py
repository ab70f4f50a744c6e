"""``python -m wavejax.convert``: what it writes, and what it says about bad input."""

import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers

from models.checkpoints.open import open_checkpoint
from models.text.tokenizer import load_tokenizer
from tests.support import tiny_models
from wavejax import convert

CONFIG = tiny_models.CONFIGS["qwen3"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    tiny_models.write_folder(folder, CONFIG, tiny_models.make_tensors(CONFIG))
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())[: CONFIG["vocab_size"]]
    model = tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, [])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_converted_model_is_the_same(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    destination = tmp_path / "new" / "converted"
    assert convert.main([str(source), str(destination), "--dtype", "float32"]) == 0
    assert str(destination) in capsys.readouterr().out
    original, converted = open_checkpoint(source), open_checkpoint(destination)
    assert (converted.kind, converted.config) == ("orbax", original.config)
    for left, right in zip(
        jax.tree.leaves(converted.load_params("float32")),
        jax.tree.leaves(original.load_params("float32")),
        strict=True,
    ):
        np.testing.assert_array_equal(left, right)
    text = "12345"
    ids = load_tokenizer(source).encode(text, add_special=False)
    assert ids
    assert load_tokenizer(destination).encode(text, add_special=False) == ids
    # A converted model can be converted again, to another dtype.
    again = tmp_path / "again"
    assert convert.main([str(destination), str(again)]) == 0
    assert open_checkpoint(again).load_params("bfloat16")["params"]["embedding"].dtype == "bfloat16"


@pytest.mark.parametrize("case", ["absent", "exists", "damaged", "no tokenizer", "dtype", "space"])
def test_bad_input_is_one_line_and_leaves_nothing(
    case: str,
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    destination, dtype, expected = tmp_path / "new", "bfloat16", ""
    if case == "absent":
        source, expected = tmp_path / "nowhere", "no such file or folder"
    elif case == "exists":
        destination, expected = source, "exists already"
    elif case == "damaged":
        (source / "model.safetensors").write_bytes(b"\0" * 100)
        expected = "truncated or corrupt"
    elif case == "no tokenizer":
        (source / "tokenizer.json").unlink()
        expected = "tokenizer"
    elif case == "dtype":
        dtype, expected = "int4", "int4"
    elif case == "space":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 9}))
        expected = "not enough disk space"
    before = sorted(tmp_path.rglob("*"))
    assert convert.main([str(source), str(destination), "--dtype", dtype]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert expected in captured.err
    assert sorted(tmp_path.rglob("*")) == before


def test_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "wavejax.convert", str(tmp_path), str(tmp_path / "new")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
