"""GGUF metadata: what changes a model's numbers is obeyed or refused, never ignored."""

import struct
from pathlib import Path
from typing import Any

import gguf
import pytest

from models.checkpoints import gguf_encodings
from models.checkpoints.gguf_encodings import is_decodable, undecodable_encoding, unknown_encoding
from models.checkpoints.open import open_checkpoint
from models.errors import InputError
from tests.support import tiny_models
from tests.support.tiny_gguf import write_gguf

CONFIG = tiny_models.CONFIGS["llama"]
TENSORS = tiny_models.make_tensors(CONFIG)


def write(path: Path, changes: dict[str, Any]) -> Path:
    write_gguf(path / "model.gguf", CONFIG, TENSORS, metadata=changes)
    return path / "model.gguf"


@pytest.mark.parametrize(
    "key, value, neutral",
    [
        ("attention.causal", False, True),
        ("attention.clamp_kqv", 8.0, 0.0),
        ("attention.max_alibi_bias", 8.0, 0.0),
        ("attention.scale", 0.015625, 0.25),  # heads of 16
        ("attention.scale", 1.0, 0.0),
        ("attention.temperature_scale", 0.1, 0.0),
        ("attn_logit_softcapping", 50.0, 0.0),
        ("final_logit_softcapping", 30.0, 0.0),
        ("embedding_scale", 12.0, 1.0),
        ("residual_scale", 0.22, 1.0),
        ("logit_scale", 16.0, 1.0),
        ("use_parallel_residual", True, False),
        ("rope.scaling.attn_factor", 1.19, 1.0),
        ("rope.scaling.yarn_ext_factor", 0.0, 1.0),
        ("rope.scaling.yarn_log_multiplier", 0.1, 0.0),
    ],
)
def test_settings_that_the_decoder_lacks(
    key: str, value: Any, neutral: Any, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        open_checkpoint(write(tmp_path, {f"llama.{key}": value}))
    assert f"llama.{key}" in str(caught.value)
    assert "supported is" in str(caught.value)
    open_checkpoint(write(tmp_path, {f"llama.{key}": neutral}))


def test_attention_factor_is_yarns_alone(tmp_path: Path) -> None:
    factor = {"llama.rope.scaling.attn_factor": 0.5}
    yarn = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    scaling = open_checkpoint(write(tmp_path, factor | yarn)).config.rope_scaling
    plain = open_checkpoint(write(tmp_path, yarn)).config.rope_scaling
    assert scaling is not None
    assert plain is not None
    assert scaling.attention_factor == plain.attention_factor / 2
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    with pytest.raises(InputError, match=r"attn_factor 0\.5 beside RoPE scaling linear"):
        open_checkpoint(write(tmp_path, factor | linear))


@pytest.mark.parametrize(
    "kind, said",
    [("adapter", "LoRA adapter; merge"), ("mmproj", "reads images"), ("odd", "file of type model")],
)
def test_files_that_hold_no_model(kind: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        open_checkpoint(write(tmp_path, {"general.type": kind}))
    open_checkpoint(write(tmp_path, {"general.type": "model"}))


def test_sliding_window(tmp_path: Path) -> None:
    config = open_checkpoint(write(tmp_path, {"llama.attention.sliding_window": 17})).config
    assert (config.max_context, config.sliding_window) == (17, 17)
    config = open_checkpoint(write(tmp_path, {"llama.attention.sliding_window": 999})).config
    assert (config.max_context, config.sliding_window) == (256, 999)
    config = open_checkpoint(write(tmp_path, {})).config
    assert (config.max_context, config.sliding_window) == (256, None)


@pytest.mark.parametrize(
    "number, said",
    [
        (5, "encoding Q4_3 (number 5), which llama.cpp has removed; take another file"),
        (
            33,
            "encoding Q4_0_8_8 (number 33), which llama.cpp has removed: it was Q4_0 in another",
        ),
        (
            38,
            "encoding IQ4_NL_8_8 (number 38), which llama.cpp has removed: it was IQ4_NL",
        ),
        (141, "encoding IQ6_K (number 141), which only a fork of llama.cpp has; take another file"),
        (337, "encoding number 337, which the installed gguf package does not know: a fork"),
        (95, "encoding number 95, which the installed gguf package does not know; update that"),
    ],
)
def test_encodings_that_have_gone(number: int, said: str, tmp_path: Path) -> None:
    path = write(tmp_path, {})
    data, name = path.read_bytes(), b"output_norm.weight"
    at = data.index(name) + len(name) + 4 + 8
    assert data[at : at + 4] == struct.pack("<I", gguf.GGMLQuantizationType.F32)
    path.write_bytes(data[:at] + struct.pack("<I", number) + data[at + 4 :])
    with pytest.raises(InputError) as caught:
        open_checkpoint(path)
    assert f"tensor output_norm.weight has {said}" in str(caught.value)


def test_the_encodings_advised_are_those_that_can_be_read() -> None:
    advised = unknown_encoding(95)
    for name in gguf_encodings._USUAL:
        assert is_decodable(gguf.GGMLQuantizationType[name])
        assert name in advised
    assert not is_decodable(gguf.GGMLQuantizationType.I32)
    assert "I32, which the gguf package cannot decode; take another file" in undecodable_encoding(
        gguf.GGMLQuantizationType.I32
    )
