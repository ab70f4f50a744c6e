"""Paths at which no model lies, but nearly: the message says what lies there and what to do."""

import json
import os
import shutil
from pathlib import Path

import pytest

from models.checkpoints.model_path import resolve_model
from models.checkpoints.open import open_checkpoint, write_orbax
from models.errors import InputError
from models.paths import is_lfs_pointer, refuse_lfs_pointer
from tests.support import tiny_models
from tests.support.tiny_gguf import write_gguf

CONFIG = tiny_models.CONFIGS["llama"]
TENSORS = tiny_models.make_tensors(CONFIG)
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 1234567\n".format(
    "0" * 64
)


def refused(path: Path, *parts: str) -> str:
    with pytest.raises(InputError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole model."""
    tiny_models.write_folder(tmp_path / "folder", CONFIG, TENSORS, shards=2)
    (tmp_path / "folder" / "generation_config.json").write_text("{}")
    return tmp_path / "folder"


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "model-00002-of-00002.safetensors",
    ],
)
def test_git_lfs_pointers_in_a_folder(name: str, folder: Path) -> None:
    (folder / name).write_text(POINTER)
    refused(folder, f"{folder / name} is a Git LFS pointer", "1,234,567 bytes", "git lfs pull")


def test_git_lfs_pointers_elsewhere(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_text(POINTER.replace("git-lfs", "hawser"))
    refused(file, f"{file} is a Git LFS pointer")
    converted = tmp_path / "converted"
    write_orbax(open_checkpoint(folder), converted, "float32")
    stored = max(converted.rglob("*"), key=lambda path: path.stat().st_size)
    stored.write_text(POINTER)
    refused(converted, f"{stored} is a Git LFS pointer")


def test_what_is_a_pointer(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("see " + POINTER)
    os.mkfifo(tmp_path / "pipe")  # to open it would wait for ever
    for path in (tmp_path / "text", tmp_path / "pipe", tmp_path, tmp_path / "absent"):
        assert not is_lfs_pointer(path)
        refuse_lfs_pointer(path)
    (tmp_path / "text").write_text(POINTER.splitlines()[0])
    assert is_lfs_pointer(tmp_path / "text")
    with pytest.raises(InputError, match="pointer, not the file that it stands for"):
        refuse_lfs_pointer(tmp_path / "text")


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00002.safetensors"])
def test_web_pages(name: str, folder: Path) -> None:
    (folder / name).write_text("\n<!DOCTYPE html>\n<html>" + 9000 * " ")
    refused(folder, f"{folder / name} is a web page")


def test_files_that_are_nearly_gguf(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_text("<html></html>")
    refused(file, "is a web page")
    for magic in (b"lmgg", b"tjgg"):
        file.write_bytes(magic + bytes(100))
        refused(file, "before GGUF; take a GGUF file")
    write_gguf(file, CONFIG, TENSORS)
    data = file.read_bytes()
    pieces = [tmp_path / f"model.gguf-split-{letter}" for letter in "ab"]
    for piece, half in zip(pieces, (data[:200_000], data[200_000:]), strict=True):
        piece.write_bytes(half)
        refused(piece, str(piece), "join the pieces in order with cat")


def test_hub_cache(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--owner--name"
    (cache / "snapshots").mkdir(parents=True)
    refused(cache, "without snapshots; download")
    folder.rename(cache / "snapshots" / "abc")
    (cache / "snapshots" / ".lock").touch()
    assert open_checkpoint(cache).path == resolve_model(cache) == cache / "snapshots" / "abc"
    refused(tmp_path, f"did you mean {cache}?")
    refused(cache / "snapshots", f"did you mean {cache / 'snapshots' / 'abc'}?")
    (cache / "snapshots" / "def").mkdir()
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("def")
    refused(cache, "2 snapshots; give one of them", f"{cache / 'snapshots'}/NAME: abc, def (main)")
    # The same by what lies in it, whatever its name is.
    renamed = cache.rename(tmp_path / "renamed")
    refused(renamed, "2 snapshots")
    shutil.rmtree(renamed / "refs")
    refused(renamed, "is not a model folder")


def test_gguf_beside_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    write_gguf(tmp_path / "tiny.gguf", CONFIG, TENSORS, split_max_tensors=20)
    first, second = sorted(tmp_path.glob("*.gguf"))
    said = refused(tmp_path, "neither model.safetensors", f"did you mean {first}?")
    assert second.name not in said
    (tmp_path / "config.json").unlink()
    assert second.name not in refused(tmp_path, "no config.json", f"did you mean {first}?")


def test_adapters(folder: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").touch()
    refused(adapter, f"{adapter} holds a LoRA adapter", "merge_and_unload")
    # It would change what the model beside it says.
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "holds a LoRA adapter", "or remove that file")


@pytest.mark.parametrize(
    "place", ["_CHECKPOINT_METADATA", "7/_METADATA", "7/params/manifest.ocdbt"]
)
def test_orbax_of_another_program(place: str, tmp_path: Path) -> None:
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).touch()
    refused(tmp_path, "Orbax checkpoint of another program", "wavejax.convert")


def test_an_unfinished_conversion(folder: Path, tmp_path: Path) -> None:
    write_orbax(open_checkpoint(folder), tmp_path / "new", "float32")
    (tmp_path / "new" / "model_config.json").unlink()
    left = (tmp_path / "new").rename(tmp_path / ".new.unfinished-1")
    refused(left, "what an interrupted conversion left")


@pytest.mark.parametrize(
    "names, said",
    [
        (["pytorch_model.bin"], "its .bin files are not read: convert them to safetensors"),
        (["flax_model.msgpack"], "its .msgpack files are not read"),
        (["model-00001-of-00002.safetensors"], "beside model-00001-of-00002.safetensors; download"),
        (["README.md"], "model.safetensors.index.json; download the whole folder"),
    ],
)
def test_config_without_weights(names: list[str], said: str, tmp_path: Path) -> None:
    for name in ["config.json", *names]:
        (tmp_path / name).write_text(json.dumps(CONFIG))
    refused(tmp_path, said)


@pytest.mark.parametrize(
    "name, said",
    [
        ("params.json", "original release"),
        ("model.safetensors", "no config.json beside model.safetensors; download the whole folder"),
        ("README.md", "give a Hugging Face folder, a .gguf file or a converted folder"),
    ],
)
def test_folder_without_config(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    refused(tmp_path, "is not a model folder: it has no config.json", said)


def test_links_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("../../blobs/0123")
    said = "model.safetensors is a link to a file that is not there: download it again"
    refused(tmp_path, "no config.json", said)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    refused(tmp_path, "neither model.safetensors nor", said)


def test_one_file_of_a_model(folder: Path) -> None:
    for name in ("config.json", "model-00001-of-00002.safetensors"):
        refused(folder / name, "is one file of a model; give the folder that holds it")


def test_a_folder_of_models(folder: Path, tmp_path: Path) -> None:
    refused(tmp_path, f"did you mean {folder}?")
    for number in range(7):
        (tmp_path / f"gguf{number}").mkdir()
        (tmp_path / f"gguf{number}" / "m.gguf").touch()
    refused(tmp_path, f"{folder}, {tmp_path / 'gguf0'}", "and 3 more?")
