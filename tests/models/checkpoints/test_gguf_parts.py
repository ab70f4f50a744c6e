"""A GGUF model in several parts is the same model; parts that do not fit are named."""

import shutil
import struct
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from models.checkpoints.gguf_parts import first_part
from models.checkpoints.open import open_checkpoint
from models.errors import InputError
from tests.support import tiny_models
from tests.support.tiny_gguf import write_gguf

CONFIG = tiny_models.CONFIGS["llama"]
TENSORS = tiny_models.make_tensors(CONFIG)


def write_parts(folder: Path, name: str = "llama", **splitting: Any) -> list[Path]:
    """Writes a tiny model in parts, whose paths are returned in order."""
    folder.mkdir(exist_ok=True)
    config = tiny_models.CONFIGS[name]
    splitting = splitting or {"split_max_tensors": 11}
    write_gguf(folder / "tiny.gguf", config, tiny_models.make_tensors(config), **splitting)
    return sorted(folder.iterdir())


def refused(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def change_number(file: Path, key: str, code: str, value: int) -> None:
    """Overwrites a number among a GGUF file's metadata."""
    data, name = bytearray(file.read_bytes()), key.encode()
    struct.pack_into("<" + code, data, data.index(name) + len(name) + 4, value)
    file.write_bytes(data)


@pytest.mark.parametrize(
    "name, splitting, count",
    [
        ("llama", {"split_max_tensors": 11}, 3),
        ("llama", {"split_max_tensors": 11, "small_first_shard": True}, 4),
        ("qwen2", {"split_max_tensors": 1}, 39),
    ],
)
def test_parts_are_the_model_in_one_file(
    name: str, splitting: dict[str, Any], count: int, tmp_path: Path
) -> None:
    parts = write_parts(tmp_path / "parts", name, **splitting)
    assert len(parts) == count
    config = tiny_models.CONFIGS[name]
    write_gguf(tmp_path / "whole.gguf", config, tiny_models.make_tensors(config))
    whole, split = open_checkpoint(tmp_path / "whole.gguf"), open_checkpoint(parts[0])
    assert (split.kind, split.path, split.config) == ("gguf", parts[0], whole.config)
    expected, given = whole.load_params("float32"), split.load_params("float32")
    assert jax.tree.structure(given) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, given, expected)


def test_another_part_stands_for_the_first(tmp_path: Path) -> None:
    parts = write_parts(tmp_path)
    for part in parts:
        assert first_part(part) == open_checkpoint(part).path == parts[0]
    # A whole file may be named as a part is.
    whole = tmp_path / "other-00002-of-00002.gguf"
    write_gguf(whole, CONFIG, TENSORS)
    shutil.copy(parts[0], tmp_path / "other-00001-of-00002.gguf")
    assert open_checkpoint(whole).path == whole


def test_parts_that_are_missing_are_named(tmp_path: Path) -> None:
    first, second, third = write_parts(tmp_path)
    third.unlink()
    said = refused(first)
    assert f"lacks 1 of its 3 parts: {third.name};" in said
    assert second.name not in said
    second.unlink()
    assert f"lacks 2 of its 3 parts: {second.name}, {third.name};" in refused(first)


def test_another_part_without_the_first_names_it(tmp_path: Path) -> None:
    first, second, _ = write_parts(tmp_path)
    first.unlink()
    said = refused(second)
    assert "is part 2 of the 3 parts of a model" in said
    assert f"give the first part, {first}, which is not there" in said
    renamed = second.rename(tmp_path / "renamed.gguf")
    assert "is part 2 of the 3 parts of a model; give the first part" in refused(renamed)


def test_parts_are_found_by_their_names(tmp_path: Path) -> None:
    first, *_ = write_parts(tmp_path)
    for name in ("model.gguf", "model-00001-of-00004.gguf"):
        first = first.rename(tmp_path / name)
        said = refused(first)
        assert "the first of 3 parts" in said
        assert "ends in -00001-of-00003.gguf" in said
        assert "llama-gguf-split --merge" in said


def test_a_truncated_part_is_named(tmp_path: Path) -> None:
    first, second, _ = write_parts(tmp_path)
    data = second.read_bytes()
    second.write_bytes(data[: len(data) // 2])
    assert f"{second} is truncated" in refused(first)
    second.write_bytes(b"")
    assert f"{second} is not a GGUF file" in refused(first)


def test_parts_of_different_models_are_refused(tmp_path: Path) -> None:
    parts = write_parts(tmp_path)
    others = write_parts(tmp_path / "two", split_max_tensors=20)
    shutil.copy(others[1], parts[1])
    said = refused(parts[0])
    assert f"{parts[1]} does not belong to {parts[0]}" in said
    assert "it says that it is part 2 of 2" in said
    shutil.copy(parts[2], parts[1])
    assert "it says that it is part 3 of 3" in refused(parts[0])
    write_gguf(parts[1], CONFIG, TENSORS)
    assert "it says that it is part 0 of 1" in refused(parts[0])
    change_number(parts[2], "split.no", "H", 1)
    shutil.copy(parts[2], parts[1])
    change_number(parts[2], "split.no", "H", 2)
    assert f"stands in {parts[1].name} too" in refused(parts[0])


def test_the_parts_hold_as_many_tensors_as_they_say(tmp_path: Path) -> None:
    parts = write_parts(tmp_path)
    total = len(TENSORS)
    change_number(parts[0], "split.tensors.count", "i", total + 1)
    assert f"of a model of {total} tensors, expected part 2" in refused(parts[0])
    for part in parts[1:]:
        change_number(part, "split.tensors.count", "i", total + 1)
    assert f"3 parts hold {total} tensors, expected {total + 1}" in refused(parts[0])
