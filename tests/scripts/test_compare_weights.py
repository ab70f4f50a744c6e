"""`compare_weights.py`: its figures are those of the distributions, its ways those it names."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest

from models.checkpoints.open import open_checkpoint
from models.formats import INT4, INT8
from models.quantised import formats_of
from tests.support.scripts import load_script
from tests.support.tiny_gguf import write_gguf
from tests.support.tiny_models import CONFIGS, make_tensors, write_folder


@pytest.fixture(scope="module")
def script():
    # It imports another script.
    return load_script("compare_weights")


def test_figures_are_of_the_distributions(script):
    """Two pieces of a vocabulary of two: by hand."""
    expected = [jnp.log(jnp.array([[0.5, 0.5], [0.9, 0.1]]))] * 2
    given = [expected[0], jnp.log(jnp.array([[0.25, 0.75], [0.9, 0.1]]))]
    found = script.compare(jnp.array([[0, 1], [0, 0]]), expected, given)
    divergence = 0.5 * np.log(2) + 0.5 * np.log(2 / 3)
    assert found["kl_nats"] == pytest.approx(divergence / 4, abs=1e-5)
    # The second tokens: 1 of 0.5 and 0.5, 0 of 0.25 and 0.75.
    assert found["perplexity"] == pytest.approx((1 / 0.5 / 0.25) ** 0.5, abs=0.01)
    assert found["same_percent"] == 75.0
    assert script.compare(jnp.array([[0, 1]]), expected[:1], expected[:1])["kl_nats"] == 0


def test_each_way_has_its_formats(script, tmp_path):
    config = CONFIGS["llama"]
    write_folder(tmp_path, config, make_tensors(config))
    found = {name: formats_of(params) for name, params in script.ways(open_checkpoint(tmp_path))}
    down, table = ("layers", "down"), ("embedding",)
    assert list(found) == ["model", "int8", "int4", "int4_groups_of_64", "int4_embedding_too"]
    assert found["model"] == {}
    assert {found["int8"][down], found["int8"][table], found["int4"][table]} == {INT8}
    assert {found["int4"][down], found["int4_embedding_too"][table]} == {INT4}
    assert found["int4_groups_of_64"][down].group == 64


def test_a_gguf_file_of_floats_has_no_packed_way(script, tmp_path):
    config = CONFIGS["llama"]
    write_gguf(tmp_path / "model.gguf", config, make_tensors(config))
    found = [name for name, _ in script.ways(open_checkpoint(tmp_path / "model.gguf"))]
    assert found[:3] == ["model", "int8", "int4"]


def test_a_model_that_is_not_there_is_one_line(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare_weights.py", "--model", "nowhere"])
    assert script.main() == 2
    assert capsys.readouterr().err == "error: no such file or folder: nowhere\n"
