"""Transformers' Llama as a baseline: its two caches agree, and whatever is missing is told."""

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def load():
    """Imports a script; scripts import each other by their bare names."""
    sys.path.insert(0, str(ROOT / "scripts"))
    yield importlib.import_module
    sys.path.remove(str(ROOT / "scripts"))


def request(load, cases, **changes):
    model = load("decode_model").SHAPES["tiny"].to_json() | changes
    # As it comes out of the pipe.
    return json.loads(json.dumps(load("torch_baseline").request_of(model, "float32", 3, 2, cases)))


def test_a_process_that_ends_early_fails_the_cases_that_are_left(load, tmp_path):
    baseline = load("torch_baseline")
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho '{\"batch\": 1}'\necho no more memory >&2\nexit 3\n")
    python.chmod(0o755)
    found = baseline.time_transformers(request(load, [(300, 1), (300, 2), (600, 1)]), str(python))
    error = {"error": "the process ended with status 3: no more memory"}
    assert found == [{"batch": 1}, error, error]


def test_without_torch_the_baseline_is_missing(load, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    baseline = load("torch_baseline")
    cases = [(300, 1), (300, "max")]
    found = list(baseline.figures(request(load, cases)))
    assert len(found) == 2
    for one in found:
        assert one["error"].startswith("missing: this baseline needs torch and transformers")


def test_results_are_found_by_tokens_and_sequences(load, monkeypatch):
    baselines, sizes = load("decode_baselines"), load("decode_model").SHAPES["tiny"]
    moved = {"bytes_per_step": {"device": 4e9}}
    answers = [moved | {"batch": 1}, moved | {"batch": 6}, {"error": "out of memory"}]
    answers.append({"error": "missing: torch"})
    monkeypatch.setattr(baselines, "time_transformers", lambda request: answers)
    contexts, sequences = [300, 600], [1, "max", "common"]
    timed = baselines.TransformersBaseline.timed(sizes, "float32", 3, 2, contexts, sequences)
    assert timed.missing is None
    assert (timed.largest(300), timed.largest(600)) == (6, 1)
    assert timed.attempt(6, 300, 2e12)["floor_ms"] == pytest.approx(2)
    assert timed.attempt(1, 600, 2e12) == {"error": "out of memory"}
    assert "not timed" in timed.attempt(4, 300, 2e12)["error"]
    answers[:] = [{"error": "missing: torch sees no CUDA GPU"}]
    timed = baselines.TransformersBaseline.timed(sizes, "float32", 3, 2, [300], [1])
    assert timed.missing == "missing: torch sees no CUDA GPU"


def test_llama_is_timed_in_three_ways(load):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    baseline = load("torch_baseline")
    one, other = baseline.figures(request(load, [(300, 2), (77, 1)]), "cpu")
    for found, batch, context in ((one, 2, 300), (other, 1, 77)):
        assert found["batch"] == batch, found
        assert found["tokens_per_s"] == pytest.approx(1000 * batch / found["ms_per_step"])
        assert found["least_ms"] <= found["ms_per_step"] <= found["most_ms"]
        assert found["ms_by_way"][found["way"]] == min(found["ms_by_way"].values())
        assert found["ms_by_way"].keys() | found["failed_ways"].keys() == set(baseline.WAYS)
        assert found["ms_by_way"].keys() >= {"dynamic", "reserved"}
        # 2 layers of 2 kv heads with rows of 2 x 64 float32.
        tokens = found["bytes_per_step"]["attention"] / (2 * 2 * 2 * 64 * 4 * batch)
        assert context < tokens < context + 3 * 4
    (unlike,) = baseline.figures(request(load, [(300, 2)], qk_norm=True), "cpu")
    assert unlike == {"error": "missing: transformers' Llama has no qk_norm"}

    llama = load("torch_llama")
    model = llama.random_llama(request(load, [])["model"], torch.float32, "cpu")
    fed = torch.tensor([[3], [500]])
    caches = [llama.fill_cache(kind, model, 300, 2, 310) for kind in ("dynamic", "reserved")]
    found = [llama.decode(model, cache, fed, 5) for cache in caches]
    assert [cache.get_seq_length() for cache in caches] == [305, 305]
    torch.testing.assert_close(*found)
    # Other keys, other logits.
    again = llama.decode(model, llama.fill_cache("dynamic", model, 299, 2, 310), fed, 5)
    assert (again - found[0]).abs().max() > 1e-4
