"""`--weight-dtype`: what is planned is what is held, what is held answers, the rest is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.quantised_folders import write_quantised
from tests.support.quantised_packers import awq, fp8
from tests.support.tiny_gguf import write_gguf
from tests.support.tiny_models import make_tensors
from tests.wavejax.cli.conftest import TINY, Result, write_tokenizer

Generate = Callable[..., Result]
COMMON = ("--raw", "--prompt", "abcdef", "--max-new-tokens", 4)


def test_the_plan_says_fewer_bytes(generate: Generate, tiny: Path) -> None:
    needs, bits = {}, {}
    for weight_dtype in ("auto", "model", "int8", "int4"):
        common = ("--model", tiny, "--plan", "--context", 100, "--weight-dtype", weight_dtype)
        said = json.loads(generate(*common, "--json").out)
        needs[weight_dtype], bits[weight_dtype] = said["need"]["weights"], said["weight_bits"]
        text = generate(*common).out
        assert (f"weights, {said['weight_bits']:.1f} bits" in text) == ("int" in weight_dtype)
    assert needs["auto"] == needs["model"] > 3 * needs["int8"] > 3 * needs["int4"]
    assert bits["auto"] == 32


@pytest.mark.parametrize("weight_dtype", ["int8", "int4"])
def test_a_run_says_what_its_weights_take(
    weight_dtype: str, generate: Generate, tiny: Path
) -> None:
    common = ("--model", tiny, *COMMON, "--weight-dtype", weight_dtype)
    result = generate(*common)
    assert result.status == 0
    assert "; weights: " in result.err
    assert " bits a number; KV cache" in result.err
    printed = json.loads(generate(*common, "--json").out)
    assert 4 < printed["weight_bits"] < 16
    plain = generate("--model", tiny, *COMMON, "--json")
    assert "weight_bits" not in json.loads(plain.out)


def test_other_files_are_refused_by_the_flag(generate: Generate, tiny: Path) -> None:
    result = generate("--model", tiny, *COMMON, "--weight-dtype", "packed")
    assert result.status == 2
    assert "holds floats; --weight-dtype packed keeps" in result.err
    assert "give --weight-dtype int8" in result.err
    assert result.err.count("\n") == 1


def test_packed_takes_what_the_file_has(generate: Generate, tmp_path: Path) -> None:
    """Planning reads no tokenizer: a file without one will do."""
    import gguf

    config = TINY | {"hidden_size": 64, "intermediate_size": 96}
    write_gguf(tmp_path / "m.gguf", config, make_tensors(config), gguf.GGMLQuantizationType.Q8_0)
    common = ("--model", tmp_path / "m.gguf", "--plan", "--context", 9, "--json")
    said = json.loads(generate(*common, "--weight-dtype", "packed").out)
    # A scale in float16 for 32 numbers; norms are float32.
    assert 8.5 < said["weight_bits"] < 8.7


def test_a_quantised_folder_says_what_comes_of_it(generate: Generate, tmp_path: Path) -> None:
    folder = tmp_path / "fp8"
    write_quantised(folder, {"quant_method": "fp8"}, fp8(lambda _: (1,)), **TINY)
    write_tokenizer(folder)
    for weight_dtype, done in (("auto", "to floats"), ("int8", "then rounded to int8")):
        common = ("--model", folder, "--weight-dtype", weight_dtype)
        note = f"weights: fp8, dequantised{',' * (weight_dtype == 'int8')} {done}"
        result = generate(*common, *COMMON)
        assert result.status == 0
        assert f"note: {note}\n" in result.err
        assert json.loads(generate(*common, *COMMON, "--json").out)["notes"] == [note]
        plan = (*common, "--plan", "--context", 9)
        assert f"\n{note}\n" in generate(*plan).out
        assert json.loads(generate(*plan, "--json").out)["notes"] == [note]


def test_packed_takes_what_a_quantised_folder_has(generate: Generate, tmp_path: Path) -> None:
    folder = tmp_path / "awq"
    said = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}
    write_quantised(folder, said, awq(16), **TINY)
    write_tokenizer(folder)
    common = ("--model", folder, *COMMON, "--json")
    floats, packed = (
        json.loads(generate(*common, "--weight-dtype", weight_dtype).out)
        for weight_dtype in ("auto", "packed")
    )
    assert floats["notes"] == [
        "weights: AWQ int4 in groups of 16, dequantised to floats; --weight-dtype packed keeps its "
        "levels"
    ]
    assert packed["notes"] == ["weights: AWQ int4 in groups of 16, kept as the folder has them"]
    assert packed["weight_bits"] < 32
    assert "weight_bits" not in floats
    assert packed["answers"] == floats["answers"]


def test_a_quantised_folder_is_converted_to_floats(
    generate: Generate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from wavejax.convert import main

    folder = tmp_path / "fp8"
    write_quantised(folder, {"quant_method": "fp8"}, fp8(lambda _: (1,)), **TINY)
    write_tokenizer(folder)
    assert main([str(folder), str(tmp_path / "orbax"), "--dtype", "float32"]) == 0
    capsys.readouterr()
    ours, theirs = (
        json.loads(generate("--model", path, *COMMON, "--json").out)
        for path in (folder, tmp_path / "orbax")
    )
    assert ours["answers"] == theirs["answers"]
    assert "notes" not in theirs
