"""Transformers' Llama is timed in three ways, whose caches agree.

It needs torch and no JAX: `make parity` runs it.
"""

import pytest

from tests.support.scripts import SCRIPTS, load_script

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 512,
    "num_layers": 2,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 64,
    "max_context": 2**20,
    "rope_theta": 500_000.0,
    "norm_eps": 1e-5,
    "tie_embeddings": False,
}


@pytest.fixture
def baseline(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)  # it imports its model once it is asked for figures
    return load_script("torch_baseline")


def figures(baseline, cases, **changes):
    request = baseline.request_of(SIZES | changes, "float32", 3, 2, cases)
    return list(baseline.figures(request, "cpu"))


def test_llama_is_timed_in_three_ways(baseline):
    one, other = figures(baseline, [(300, 2), (77, 1)])
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


def test_a_case_that_fails_says_its_batch_and_stops_no_other(baseline, monkeypatch):
    time_case = baseline._time_case

    def fail(model, request, context, batch, room):
        if batch > 2:
            raise MemoryError("no room")
        return time_case(model, request, context, batch, room)

    monkeypatch.setattr(baseline, "_time_case", fail)
    monkeypatch.setattr(baseline, "_largest", lambda *_: 7)
    failed, timed = figures(baseline, [(77, "max"), (77, 1)])
    assert failed == {"batch": 7, "error": "MemoryError: no room"}
    assert timed["batch"] == 1
    assert "error" not in timed


def test_another_models_parts_are_missing(baseline):
    (unlike,) = figures(baseline, [(300, 2)], qk_norm=True)
    assert unlike == {"error": "missing: transformers' Llama has no qk_norm"}


def test_both_caches_give_the_same_logits():
    llama = load_script("torch_llama")
    model = llama.random_llama(SIZES, torch.float32, "cpu")
    fed = torch.tensor([[3], [500]])
    caches = [llama.fill_cache(kind, model, 300, 2, 310) for kind in ("dynamic", "reserved")]
    found = [llama.decode(model, cache, fed, 5) for cache in caches]
    assert [cache.get_seq_length() for cache in caches] == [305, 305]
    torch.testing.assert_close(*found)
    # Other keys, other logits.
    again = llama.decode(model, llama.fill_cache("dynamic", model, 299, 2, 310), fed, 5)
    assert (again - found[0]).abs().max() > 1e-4
