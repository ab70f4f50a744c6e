"""`scripts/bench_appended.py` at a tiny shape: plain JAX is timed, and failures are told."""

import json

import pytest

from tests.support.scripts import load_script
from wavejax.attention import appended

TINY = ["--shapes", "tiny", "--rooms", "256", "--tokens", "16,64", "--seconds", "0.01"]


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setattr(appended, "MOST_TOKENS", appended.MOST_TOKENS)  # which it changes
    script = load_script("bench_appended")
    return lambda *options: script.main([*TINY, "--turns", "1e5", *options])


def test_both_ways_are_timed_and_what_fails_is_told(run, tmp_path):
    out = tmp_path / "new" / "pieces.json"
    assert run("--config", "2,32,16,4,2", "--out", str(out)) == 0
    pieces = json.loads(out.read_text())["pieces"]
    assert [(row["shape"], row["room"], row["tokens"]) for row in pieces] == [
        ("tiny", 256, 16),
        ("tiny", 256, 64),
    ]
    for row in pieces:
        assert row["cudnn"]["us"] > 0
        assert row["cudnn"]["norm"] > 0
        # There is no GPU, and the rest went on.
        own = [found for label, found in row.items() if label == "op" or "Config" in label]
        assert len(own) == 2
        assert all("Only interpret mode" in found["error"] for found in own)


@pytest.mark.parametrize(
    "options, said",
    [
        (["--tokens", "16,no"], "error: --tokens: 'no' is no number from 1 up"),
        (["--shapes", "smol"], "error: --shapes: 'smol' is none of"),
        (["--config", "1,2"], "error: --config: '1,2' is not SPLITS,QUERIES,BLOCK,WARPS,STAGES"),
    ],
)
def test_what_is_none_is_refused(run, options, said, capfd):
    assert run(*options) == 2
    assert capfd.readouterr().err.startswith(said)
