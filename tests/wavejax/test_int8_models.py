"""A loaded model with rows in int8, by either attention: the rounded rows' text, in less memory."""

from pathlib import Path

import pytest

import wavejax
from tests.support.tiny_models import make_tensors, write_folder
from tests.wavejax.attention import test_dense_int8, test_int8_rows
from tests.wavejax.cli.conftest import TINY, write_tokenizer
from tests.wavejax.test_language_model import ZONES
from wavejax import DenseAttention, WaveConfig
from wavejax.planning.auto import AutoAttention

INT8 = WaveConfig(**vars(ZONES) | {"row_dtype": "int8"})
LONG = "A cat sat on the mat, and a dog lay beside it. " * 6
CHOICES = {
    "full": (DenseAttention(row_dtype="int8"), test_dense_int8.RoundedFloats()),
    "auto": (AutoAttention(INT8), test_dense_int8.RoundedFloats()),
    "wave": (INT8, test_int8_rows.RoundedFloats(ZONES, "device")),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model; a byte is a token."""
    folder = tmp_path_factory.mktemp("tiny")
    write_folder(folder, TINY, make_tensors(TINY))
    write_tokenizer(folder)
    return folder


@pytest.mark.parametrize("name", CHOICES)
def test_it_is_greedy_over_the_rounded_rows(name: str, folder: Path) -> None:
    rounded, floats = (
        wavejax.load(folder, attention=attention).generate(["Hello", LONG], 24)
        for attention in CHOICES[name]
    )
    assert rounded.facts is not None
    assert floats.facts is not None
    tokens = [answer.token_ids for answer in rounded.answers]
    assert tokens == [answer.token_ids for answer in floats.answers]
    assert all(len(each) == 24 for each in tokens)
    if name != "wave":
        # Numbers of four bytes each are levels of one; each vector has a scale of four.
        head_dim = TINY["hidden_size"] // TINY["num_attention_heads"]
        share = (head_dim + 4) / (4 * head_dim)
        assert rounded.facts.device_bytes == pytest.approx(share * floats.facts.device_bytes, 1e-3)
        assert rounded.facts.rounded
        assert not floats.facts.rounded
