"""`scripts/bench_products.py` at a tiny matrix: XLA's ways are timed, and failures are told."""

import json
import sys

import pytest

from tests.support.scripts import load_script

FORMATS = ("bfloat16", "int8", "int4", "Q4_0", "Q4_K", "Q6_K", "Q8_0")


@pytest.fixture
def script(monkeypatch):
    module = load_script("bench_products")
    monkeypatch.setitem(module.MATRICES, "tiny", (64, 512))
    return module


def run(script, monkeypatch, out, *options):
    options = ["--matrices", "tiny", *options, "--turns", "1e5", "--seconds", "0.005"]
    monkeypatch.setattr(sys, "argv", ["bench_products.py", *options, "--out", str(out)])
    script.main()


def test_all_formats(script, monkeypatch, tmp_path, capsys):
    out = tmp_path / "new" / "products.json"
    run(script, monkeypatch, out, "--tokens", "2", "--formats", ",".join(FORMATS))
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


def test_the_chains_own_time_is_in_no_figure(script, monkeypatch, tmp_path):
    timing = script.empty_chain(1)
    monkeypatch.setattr(script, "empty_chain", lambda calls: type(timing)(2e-6, 1e-6, 3e-6))
    monkeypatch.setattr(script, "bench", lambda *_: {"us": 10.0, "least_us": 9.0, "error": 0.0})
    out = tmp_path / "products.json"
    run(script, monkeypatch, out, "--tokens", "1", "--formats", "bfloat16")
    (row,) = json.loads(out.read_text())["products"]
    assert (row["us"], row["least_us"]) == (8.0, 7.0)


def test_a_matrix_that_cannot_be_made_stops_no_other(script, monkeypatch, tmp_path):
    make, out = script.make_matrix, tmp_path / "products.json"

    def make_some(shape, format, seed):
        if format is script.FORMATS["int4"]:
            raise MemoryError("no room")
        if format is script.FORMATS["Q8_0"]:
            raise KeyboardInterrupt
        return make(shape, format, seed)

    monkeypatch.setattr(script, "make_matrix", make_some)
    with pytest.raises(KeyboardInterrupt):
        run(script, monkeypatch, out, "--tokens", "1", "--formats", "int4,bfloat16,Q8_0")
    # And what was found before a run is stopped stays.
    products = json.loads((tmp_path / "products.unfinished.json").read_text())["products"]
    failed, timed = products
    assert failed["error_text"] == "MemoryError: no room"
    assert (timed["format"], "error_text" in timed) == ("bfloat16", False)


@pytest.mark.parametrize("option", ["--formats", "--matrices", "--tokens"])
def test_a_typo_is_said_before_anything_is_timed(script, monkeypatch, tmp_path, capsys, option):
    monkeypatch.setattr(script, "copy_ceiling", lambda *_: pytest.fail("it began"))
    with pytest.raises(SystemExit):
        run(script, monkeypatch, tmp_path / "products.json", option, "int5")
    assert "int5" in capsys.readouterr().err


def test_a_wrong_product_is_no_time(script):
    matrix = script.make_matrix((64, 512), script.FORMATS["int4"], 0)
    inputs = script.jnp.ones((2, 512), "bfloat16")
    with pytest.raises(AssertionError, match="wrong"):
        script.bench(lambda x, m: 1.1 * script.by_xla(x, m), inputs, [matrix], 0.01)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tokens", [1, 8])
def test_a_group_that_is_left_out_is_found(script, format, tokens):
    matrix = script.make_matrix((256, 14336), script.FORMATS[format], 0)
    inputs = script.jax.random.normal(script.jax.random.key(tokens), (tokens, 14336), "bfloat16")
    right = script.error_of(script.by_xla, inputs, matrix)
    wrong = script.error_of(lambda x, m: script.by_xla(x.at[:, 640:672].set(0), m), inputs, matrix)
    assert 2 * right < script.TOLERANCE < wrong / 2
