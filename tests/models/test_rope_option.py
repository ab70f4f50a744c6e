"""RoPE scaling by option gives the numbers that the same scaling in the model's files gives."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.checkpoints.hf_config import config_from_hf
from models.checkpoints.open import Checkpoint, open_checkpoint, write_orbax
from models.config import ModelConfig, RopeScaling
from models.decoder import Decoder, unembed
from models.errors import InputError
from models.rope_option import suggest_rope_scaling, with_rope_scaling
from tests.support import plain_attention, tiny_models
from tests.support.tiny_gguf import write_gguf

QWEN2 = tiny_models.CONFIGS["qwen2"]
TENSORS = tiny_models.make_tensors(QWEN2)
PLAIN = config_from_hf(QWEN2)


def scaled(checkpoint: Checkpoint, text: str) -> Checkpoint:
    return dataclasses.replace(checkpoint, config=with_rope_scaling(checkpoint.config, text))


def logits(checkpoint: Checkpoint) -> np.ndarray:
    config, params = checkpoint.config, checkpoint.load_params("float32")
    tokens = jnp.asarray(tiny_models.make_tokens(QWEN2))
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    state = plain_attention.empty_state(config, *tokens.shape)
    decoder = Decoder(config, plain_attention.attend)
    hidden, _ = jax.jit(decoder.apply)(params, tokens, positions, state)
    return np.asarray(unembed(config, params, hidden))


@pytest.mark.parametrize(
    "text, stated, max_context",
    [
        ("yarn:4", {"rope_type": "yarn", "factor": 4.0}, 1024),
        (
            "yarn:8:64",
            {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64},
            512,
        ),
        # config.json's max_position_embeddings already is the longer context of linear scaling.
        ("linear:2.5", {"rope_type": "linear", "factor": 2.5}, 640),
    ],
)
def test_the_same_as_in_config_json(
    text: str, stated: dict[str, Any], max_context: int, tmp_path: Path
) -> None:
    tiny_models.write_folder(tmp_path / "plain", QWEN2, TENSORS)
    tiny_models.write_folder(tmp_path / "stated", QWEN2 | {"rope_scaling": stated}, TENSORS)
    plain, expected = open_checkpoint(tmp_path / "plain"), open_checkpoint(tmp_path / "stated")
    given = scaled(plain, text)
    assert given.config.max_context == max_context
    assert given.config.rope_scaling == expected.config.rope_scaling
    if stated["rope_type"] == "yarn":
        assert given.config == expected.config
    right, without = logits(expected), logits(plain)
    np.testing.assert_array_equal(logits(given), right)
    assert np.abs(without - right).max() > 1e-2

    write_gguf(tmp_path / "model.gguf", QWEN2, TENSORS)
    write_orbax(plain, tmp_path / "converted", "float32")
    write_orbax(given, tmp_path / "converted scaled", "float32")
    for name in ("model.gguf", "converted"):
        again = scaled(open_checkpoint(tmp_path / name), text)
        assert again.config.max_context == max_context
        # A GGUF file holds epsilon as float32.
        np.testing.assert_allclose(logits(again), right, atol=1e-5)
    assert open_checkpoint(tmp_path / "converted scaled").config == given.config


@pytest.mark.parametrize(
    "text",
    [
        *("", "yarn", "yarn:", "4", "yarn:x", "yarn:4:x", "yarn:4:64:1", "yarn:4:6.5", "yarn=4"),
        *("Yarn:4", "linear:4:64", "linear:4 5", "llama3:8", "dynamic:2"),
    ],
)
def test_texts_that_say_no_scaling(text: str) -> None:
    with pytest.raises(InputError) as caught:
        with_rope_scaling(PLAIN, text)
    message = str(caught.value)
    assert f"RoPE scaling {text!r}; expected yarn:FACTOR, yarn:FACTOR:ORIGINAL" in message


@pytest.mark.parametrize(
    "text, said",
    [
        ("yarn:1", "its factor is 1; expected more than 1"),
        ("yarn:0.5", "its factor is 0.5"),
        ("linear:-2", "its factor is -2"),
        ("linear:nan", "its factor is nan"),
        ("yarn:inf", "its factor is inf"),
        ("linear:1e30", "makes a context of 2.56e+32 tokens; expected fewer than"),
        ("yarn:4:0", "its original context is 0 tokens; expected 1 to the model's 256"),
        # Somebody gives the context that is to come of it.
        ("yarn:4:1024", "its original context is 1024 tokens; expected 1 to the model's 256"),
        ("yarn:4:64", "makes a context of 256 tokens; the model has 256 without it"),
    ],
)
def test_numbers_that_make_no_sense(text: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        with_rope_scaling(PLAIN, text)
    assert said in str(caught.value)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("name", ["llama31", "llama_linear", "qwen2_yarn"])
def test_a_model_that_scales_rope_already(name: str) -> None:
    config = config_from_hf(tiny_models.CONFIGS[name])
    assert config.rope_scaling is not None
    already = f"the model scales RoPE already ({config.rope_scaling.kind}, factor"
    with pytest.raises(InputError) as caught:
        with_rope_scaling(config, "yarn:4")
    assert already in str(caught.value)
    assert "leave the option out" in str(caught.value)
    divisors = RopeScaling("divisors", divisors=(1.0,) * (config.head_dim // 2))
    with pytest.raises(InputError, match="the model scales RoPE already, up to"):
        with_rope_scaling(dataclasses.replace(config, rope_scaling=divisors), "yarn:4")


def test_a_sliding_window_still_ends_the_context() -> None:
    mistral = config_from_hf(tiny_models.CONFIGS["mistral"])
    assert (mistral.max_context, mistral.sliding_window) == (128, 128)
    with pytest.raises(InputError, match="sliding window of 128 tokens, which RoPE scaling does"):
        with_rope_scaling(mistral, "yarn:4")
    wide = dataclasses.replace(PLAIN, sliding_window=700)
    assert with_rope_scaling(wide, "linear:2").max_context == 512
    assert with_rope_scaling(wide, "yarn:4").max_context == 700


@pytest.mark.parametrize(
    "tokens, text",
    [
        (256, None),
        (257, "yarn:2"),
        (512, "yarn:2"),
        (513, "yarn:4"),
        (8192, "yarn:32"),
        (8193, None),
    ],
)
def test_what_is_suggested_makes_room(tokens: int, text: str | None) -> None:
    assert suggest_rope_scaling(PLAIN, tokens) == text
    if text is not None:
        assert with_rope_scaling(PLAIN, text).max_context >= tokens
        windowed = dataclasses.replace(PLAIN, sliding_window=tokens - 1)
        assert suggest_rope_scaling(windowed, tokens) is None
        assert suggest_rope_scaling(with_rope_scaling(PLAIN, "yarn:1.01"), tokens) is None


def test_older_converted_folders_lack_the_window() -> None:
    stored = PLAIN.to_json()
    del stored["sliding_window"]
    assert ModelConfig.from_json(stored) == PLAIN
