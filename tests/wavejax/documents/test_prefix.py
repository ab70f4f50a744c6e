"""A request that begins with a kept document: what is alike is reused, the rest is read."""

import dataclasses

import numpy as np
import pytest

import wavejax
from tests.support.tiny_generator import CONFIG, GREEDY, MODEL, make_params, make_prompts
from wavejax import DenseAttention, Generator, WaveAttention
from wavejax.documents.prefix import Cut, cut_at
from wavejax.engine.prompts import common_prefix
from wavejax.store.sizes import segment_sizes

# Segments of 128 tokens: the document has three in its index, the last of them cut short.
EXACT = dataclasses.replace(CONFIG, min_retrieved_tokens=4096, min_candidate_tokens=4096)
WHOLE, OTHER = make_prompts((400, 60))
DENSE = Generator(MODEL, DenseAttention(), GREEDY)


def keep(path, generator, steps=0, new_tokens=500):
    """A document of the whole prompt, and of what is forced after it."""
    params = make_params()
    state = generator.start(params, [WHOLE[: 400 - steps]], new_tokens)
    if steps:
        state, _ = generator.force(params, state, np.asarray(WHOLE[400 - steps :])[:, None])
    given = {"generator": generator, "params": params}
    wavejax.save_document(state, path, token_ids=WHOLE, **given)
    return wavejax.load_document(path, **given)


def decode(generator, state, steps=10):
    logits = np.asarray(state.logits)
    return logits, np.asarray(generator.decode_n(make_params(), state, steps)[1])


def test_tokens_that_are_alike_are_counted():
    kept = np.asarray([1, 2, 3, 4])
    for prompt, expected in [([1, 2, 3, 4, 5], 4), ([1, 2, 9, 4], 2), ([1, 2], 2), ([7], 0)]:
        assert common_prefix(kept, np.asarray(prompt)) == expected


def test_a_document_is_reused_but_for_a_prompts_last_token(tmp_path):
    document = keep(tmp_path / "d", DENSE)
    assert document.reused(WHOLE) == 400
    assert document.reused([*WHOLE, 3]) == 400
    assert document.reused(WHOLE[:100]) == 99
    assert document.reused([*WHOLE[:100], WHOLE[100] ^ 1]) == 100
    assert document.reused([WHOLE[0] ^ 1]) == 0


def test_where_a_kept_index_is_cut():
    """Every length leaves a window that has room, and takes whole segments as they are."""
    config = CONFIG
    for prompt in (0, 100, 128, 300):
        for indexed in range(prompt, prompt + 3 * config.growth_tokens, config.growth_tokens):
            most = indexed + config.sink_tokens + config.window_tokens
            for length in range(1, most + 1):
                if length > config.sink_tokens + indexed + config.window_tokens:
                    continue
                cut = cut_at(config, length, indexed, prompt)
                assert cut.sinks + cut.indexed + cut.window == length
                assert 0 <= cut.window <= config.window_tokens
                assert cut.kept <= cut.indexed <= indexed
                if cut.indexed <= prompt and cut.indexed != prompt:
                    # A fresh reading's: the same tokens in the index, in the same segments.
                    assert cut.indexed == config.indexed_tokens(length)
                    assert cut.kept == cut.indexed // 128 * 128
                    assert cut.prompt_tokens == cut.indexed
                elif cut.indexed >= prompt:
                    assert cut.kept == cut.indexed
                    assert (cut.indexed - prompt) % config.growth_tokens == 0
                    assert cut.prompt_tokens == prompt
    assert cut_at(config, 300, 380, 380) == Cut(300, 4, 256, 280, 280)
    assert segment_sizes(config, 380) == [128, 128, 128]


@pytest.mark.parametrize(
    "name", ["dense", *(pytest.param(x, marks=pytest.mark.slow(40)) for x in ("host", "staged"))]
)
def test_it_gives_what_the_whole_prompt_gives(name, tmp_path):
    """At boundaries of all kinds; exact settings, so that full attention is the oracle."""
    params = make_params()
    attention = {
        "dense": DenseAttention(),
        "host": WaveAttention(EXACT, "host", "in_place"),
        "staged": WaveAttention(EXACT, "host", "staged"),
    }[name]
    generator = Generator(MODEL, attention, GREEDY)
    document = keep(tmp_path / "d", generator)
    prompts = [
        list(WHOLE),
        [*WHOLE, *OTHER],
        [*WHOLE[:276], *OTHER],
        [*WHOLE[:50], *OTHER],
        WHOLE[:3],
        list(OTHER),
    ]
    reused = [document.reused(prompt) for prompt in prompts]
    assert reused == [400, 400, 276, 50, 2, 0]
    state = document.start(generator, 10, params=params, prompts=prompts)
    logits, tokens = decode(generator, state)
    expected_logits, expected = decode(DENSE, DENSE.start(params, prompts, 10))
    np.testing.assert_allclose(logits, expected_logits, atol=3e-4)
    np.testing.assert_array_equal(tokens, expected)


@pytest.mark.slow(40)
def test_a_cut_index_is_a_fresh_readings(tmp_path):
    """Clusters, codes, rows and window, number for number where the model ran on the same."""
    config = dataclasses.replace(CONFIG, pooled_covariance=True)
    generator, params = Generator(MODEL, WaveAttention(config, "device"), GREEDY), make_params()
    document = keep(tmp_path / "d", generator)
    state = document.start(generator, 10, params=params, prompts=[WHOLE[:301]])
    fresh = generator.start(params, [WHOLE[:300]], 10)
    fresh = generator.append(params, fresh, WHOLE[300:301])
    cut, whole = state.attention_state, fresh.attention_state
    indexed = int(whole.index.tokens[0])
    assert int(cut.index.tokens[0]) == indexed == CONFIG.indexed_tokens(300)
    clusters = int(whole.index.num_clusters.max())
    np.testing.assert_array_equal(cut.index.num_clusters, whole.index.num_clusters)
    for name in ("offsets", "centroids", "value_means", "codes", "scales", "token_ids"):
        used = clusters if "ce" in name or "me" in name else indexed
        one, other = (np.asarray(getattr(x.index, name))[:, :, :, :used] for x in (cut, whole))
        np.testing.assert_allclose(one, other, atol=1e-4, err_msg=name)
    covariance = (np.asarray(x.index.covariance) for x in (cut, whole))
    np.testing.assert_allclose(*covariance, atol=1e-3)
    rows = (np.asarray(x.store.rows.data)[:, :, :, :indexed] for x in (cut, whole))
    np.testing.assert_allclose(*rows, atol=1e-4)
    window = int(whole.steady.window_tokens[0])
    assert int(cut.steady.window_tokens[0]) == window
    rows = (np.asarray(x.steady.window)[:, :, :, :window] for x in (cut, whole))
    np.testing.assert_allclose(*rows, atol=1e-4)


@pytest.mark.slow(40)
def test_a_document_that_has_grown_is_cut_too(tmp_path):
    params, generator = make_params(), Generator(MODEL, WaveAttention(EXACT, "host"), GREEDY)
    document = keep(tmp_path / "d", generator, steps=150)
    sizes = document.folder.facts["sizes"]
    assert sizes["tokens"] > EXACT.indexed_tokens(250)
    for cut in (390, 330, 240):
        prompt = [*WHOLE[:cut], *OTHER]
        state = document.start(generator, 10, params=params, prompts=[prompt])
        logits, tokens = decode(generator, state)
        expected_logits, expected = decode(DENSE, DENSE.start(params, [prompt], 10))
        np.testing.assert_allclose(logits, expected_logits, atol=3e-4)
        np.testing.assert_array_equal(tokens, expected)
