"""Logits that are not finite: the text that was sound, then one line and status 2."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.wavejax.cli.conftest import Result

Generate = Callable[..., Result]
NEW = 8
COMMON = ("--raw", "--max-new-tokens", NEW, "--attention", "full", "--no-progress")


def changed(tiny: Path, tmp_path: Path, change: Callable[[dict[str, np.ndarray]], None]) -> Path:
    """A copy of the model with other weights."""
    model = tmp_path / "changed"
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(tiny, model)
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors")
    return model


def without(token: int) -> Callable[[dict[str, np.ndarray]], None]:
    """Makes whatever follows a token NaN."""

    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.embed_tokens.weight"][token] = np.nan

    return change


def token_of(tiny: Path, letter: str) -> int:
    return json.loads((tiny / "tokenizer.json").read_text())["model"]["vocab"][letter]


def said(result: Result, *words: str) -> None:
    assert result.status == 2
    assert result.err.startswith("error: the logits ")
    assert result.err.count("\n") == 1
    for word in words:
        assert word in result.err


def test_float16_that_overflows_from_the_start(
    generate: Generate, tiny: Path, tmp_path: Path
) -> None:
    def enlarge(tensors: dict[str, np.ndarray]) -> None:
        for name in ("gate_proj", "up_proj"):
            tensors[f"model.layers.0.mlp.{name}.weight"] *= 300

    model = changed(tiny, tmp_path, enlarge)
    common = ("--model", model, "--prompt", "hello world", *COMMON)
    result = generate(*common, "--dtype", "float16")
    said(result, "from the start", "float16", "--dtype bfloat16 or float32")
    assert result.out == ""
    result = generate(*common, "--dtype", "float16", "--json")
    said(result, "float16")
    (answer,) = json.loads(result.out)["answers"]
    assert (answer["token_ids"], answer["text"]) == ([], "")
    assert answer["finish_reason"] == "not finite"
    assert generate(*common, "--dtype", "float32").status == 0


def test_the_text_before_is_printed(generate: Generate, tiny: Path, tmp_path: Path) -> None:
    common = ("--prompt", "hello", *COMMON)
    (free,) = json.loads(generate("--model", tiny, *common, "--json").out)["answers"]
    # What comes after this token is NaN; it has not come before.
    index = next(i for i in range(2, NEW) if free["token_ids"][i] not in free["token_ids"][:i])
    model = changed(tiny, tmp_path, without(free["token_ids"][index]))
    result = generate("--model", model, *common, "--json")
    said(result, f"after {index + 1} new tokens", "the weights hold NaN or infinity")
    printed = json.loads(result.out)
    (answer,) = printed["answers"]
    assert answer["token_ids"] == free["token_ids"][: index + 1]
    assert printed["facts"]["device_bytes"] > 0
    result = generate("--model", model, *common)
    said(result)
    assert result.out == answer["text"] + "\n"


def test_a_neighbour_in_the_batch_is_whole(generate: Generate, tiny: Path, tmp_path: Path) -> None:
    common = ("--prompt", "hello", "--prompt", "a zoo", *COMMON)
    model = changed(tiny, tmp_path, without(token_of(tiny, "z")))
    sound = generate("--model", tiny, *common).out.split("=== prompt 2 of 2 ===")[0]
    result = generate("--model", model, *common)
    said(result, "of prompt 2 of 2 ", "from the start")
    assert result.out == sound + "=== prompt 2 of 2 ===\n\n\n"


def test_a_stop_text_comes_before(generate: Generate, tiny: Path, tmp_path: Path) -> None:
    """What the device computes past the end of an answer is nobody's."""
    common = ("--prompt", "hello", *COMMON, "--json")
    (free,) = json.loads(generate("--model", tiny, *common).out)["answers"]
    last = free["token_ids"][-2]
    if last in free["token_ids"][:-2]:
        pytest.skip("this model repeats itself")
    stop = free["text"][1:2]
    model = changed(tiny, tmp_path, without(last))
    assert generate("--model", model, *common).status == 2
    result = generate("--model", model, *common, "--stop", stop)
    assert result.status == 0, result.err
    assert json.loads(result.out)["answers"][0]["finish_reason"] == "stop"
