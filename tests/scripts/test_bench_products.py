"""`scripts/bench_products.py` at a tiny matrix: XLA's ways are timed, and failures are told."""

import importlib
import json
import sys
from pathlib import Path

import pytest

FORMATS = ("bfloat16", "int8", "int4", "Q4_0", "Q4_K", "Q6_K", "Q8_0")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    return importlib.import_module("bench_products")


def test_all_formats(script, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(script.MATRICES, "tiny", (64, 512))
    out = tmp_path / "products.json"
    options = ["--matrices", "tiny", "--tokens", "2", "--formats", ",".join(FORMATS)]
    options += ["--turns", "1e5", "--seconds", "0.005", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["bench_products.py", *options])
    script.main()
    products = json.loads(out.read_text())["products"]
    timed = {row["format"]: row for row in products if row["way"] == "XLA"}
    assert tuple(timed) == FORMATS
    for row in timed.values():
        assert 0 < row["error"] < script.TOLERANCE
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["us"] / 1e3)
    kernels = [row for row in products if row["way"] == "kernel"]
    assert [row["format"] for row in kernels] == list(FORMATS[2:])
    # There is no GPU, and the rest went on.
    assert all("Only interpret mode" in row["error_text"] for row in kernels)
    assert "Only interpret mode" in capsys.readouterr().out


def test_a_wrong_product_is_no_time(script):
    matrix = script.make_matrix((64, 512), script.FORMATS["int4"], 0)
    inputs = script.jnp.ones((2, 512), "bfloat16")
    with pytest.raises(AssertionError, match="wrong"):
        script.bench(lambda x, m: 1.1 * script.by_xla(x, m), inputs, [matrix], 0.01)
