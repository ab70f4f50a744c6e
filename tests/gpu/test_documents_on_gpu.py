"""Kept documents and appended tokens on a CUDA GPU: every store gives what reading gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wavejax
from models.decoder import Decoder
from tests.gpu.test_engine_on_gpu import CONFIG, LLAMA
from wavejax import DenseAttention, Generator, WaveAttention

pytestmark = [pytest.mark.gpu, pytest.mark.slow(120)]

ATTENTIONS = {
    "dense": DenseAttention(),
    "device": WaveAttention(CONFIG, "device"),
    "host": WaveAttention(CONFIG, "host", "in_place"),
    "staged": WaveAttention(CONFIG, "host", "staged"),
}


@pytest.fixture(scope="module")
def params():
    ids = jnp.zeros((1, 1), jnp.int32)
    return Decoder(LLAMA, lambda layer, q, k, v, state: (q, state)).init(
        jax.random.key(0), ids, ids, None
    )


def memory_kinds(generator, state):
    arrays = generator.engine.arrays_of(state.attention_state)
    return [leaf.sharding.memory_kind for leaf in jax.tree.leaves(arrays)]


@pytest.mark.parametrize("name", ATTENTIONS)
def test_a_kept_document_gives_the_same_tokens(name, params, tmp_path):
    """In float32, token for token; each array lies where a reading puts it."""
    generator = Generator(LLAMA, ATTENTIONS[name])
    prompt = np.random.default_rng(0).integers(0, LLAMA.vocab_size, 3000).tolist()
    state = generator.start(params, [prompt], 150)
    kinds = memory_kinds(generator, state)
    given = {"generator": generator, "params": params}
    wavejax.save_document(state, tmp_path / "kept", token_ids=prompt, **given)
    _, expected = generator.decode_n(params, state, 150)
    document = wavejax.load_document(tmp_path / "kept", **given)
    state = document.start(generator, 150)
    assert memory_kinds(generator, state) == kinds
    _, tokens = generator.decode_n(params, state, 150)
    np.testing.assert_array_equal(tokens, expected)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_appended_tokens_attend_to_all_that_is_kept(name, params, tmp_path):
    """Full attention to the whole prompt is the oracle, whole and cut, past a growth."""
    generator, dense = Generator(LLAMA, ATTENTIONS[name]), Generator(LLAMA, DenseAttention())
    prompt = np.random.default_rng(1).integers(0, LLAMA.vocab_size, 3300).tolist()
    given = {"generator": generator, "params": params}
    kept = generator.start(params, [prompt[:3000]], 400)
    kinds = memory_kinds(generator, kept)
    wavejax.save_document(kept, tmp_path / "kept", token_ids=prompt[:3000], **given)
    document = wavejax.load_document(tmp_path / "kept", **given)
    for length in (3200, 3001, 2500):
        text = prompt[: min(length, 3000)] + prompt[-200:]
        state = document.start(generator, 8, params=params, prompts=[text])
        assert memory_kinds(generator, state) == kinds
        whole = dense.start(params, [text], 8)
        np.testing.assert_allclose(state.logits, whole.logits, atol=2e-3)
