"""More tokens after a prompt: the state of the whole prompt, and the tokens that it gives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, use_implementation
from tests.support.tiny_generator import CONFIG, GREEDY, MODEL, make_params, make_prompts
from wavejax import DenseAttention, Generator, InputError, Sampler, WaveAttention
from wavejax.attention import appended
from wavejax.engine import appending
from wavejax.store.shape import CacheShape

# With all tokens retrieved wave attention is exact: it then gives full attention's tokens.
EXACT = dataclasses.replace(CONFIG, min_retrieved_tokens=4096, min_candidate_tokens=4096)
ATTENTIONS = {
    "dense": DenseAttention(),
    "device": WaveAttention(EXACT, "device"),
    "host": WaveAttention(EXACT, "host", "in_place"),
    "staged": WaveAttention(EXACT, "host", "staged"),
}
WHOLE, OTHER = make_prompts((300, 20))
DENSE = Generator(MODEL, DenseAttention(), GREEDY)


def after(generator, state, steps=12, slot=0):
    state, tokens = generator.decode_n(make_params(), state, steps)
    return np.asarray(tokens)[:, slot]


@pytest.mark.parametrize(
    "name",
    [
        name if name == "dense" else pytest.param(name, marks=pytest.mark.slow(25))
        for name in ATTENTIONS
    ],
)
def test_it_is_the_whole_prompt(name):
    """Cut where sinks, a short window, the index and a window that is nearly full end."""
    params, generator = make_params(), Generator(MODEL, ATTENTIONS[name], GREEDY)
    whole = DENSE.start(params, [WHOLE], 20)
    logits = np.asarray(whole.logits[0])
    expected = after(DENSE, whole)
    for cut in (2, 50, 200, 299):
        state = generator.start(params, [OTHER, WHOLE[:cut]], 420)
        state = generator.append(params, state, WHOLE[cut:], slot=1)
        np.testing.assert_allclose(state.logits[1], logits, atol=2e-4)
        np.testing.assert_array_equal(after(generator, state, slot=1), expected)


@pytest.mark.parametrize(
    "name, op",
    [
        ("dense", False),
        ("dense", True),
        pytest.param("device", False, marks=pytest.mark.slow(25)),
        pytest.param("device", True, marks=pytest.mark.slow(25)),
    ],
)
def test_layers_that_are_written_out_append_in_one_program(name, op, monkeypatch):
    """Short pieces, as on a GPU: the whole prompt's logits, and no layer runs alone."""
    params = make_params()
    generator = Generator(MODEL, ATTENTIONS[name], GREEDY, unroll=True)
    whole = DENSE.start(params, [WHOLE], 20)
    expected = np.asarray(whole.logits[0]), after(DENSE, whole)
    monkeypatch.setattr(appending, "_append_layer", None)
    # As with kernels, by the op that reads rows where they lie, or by none.
    asked = []
    monkeypatch.setattr(appended, "_reads_where_they_lie", lambda *given: asked.append(op) or op)
    jax.clear_caches()
    for cut in (200, 299):
        state = generator.start(params, [OTHER, WHOLE[:cut]], 420)
        state = generator.append(params, state, WHOLE[cut:], slot=1)
        np.testing.assert_allclose(state.logits[1], expected[0], atol=2e-4)
        np.testing.assert_array_equal(after(generator, state, slot=1), expected[1])
    assert set(asked) == {op}
    jax.clear_caches()


def test_questions_share_two_lengths():
    lengths = [appending.padded_piece(tokens) for tokens in (1, 64, 65, 128, 129)]
    assert lengths == [64, 64, 128, 128, 160]


@pytest.mark.slow(20)
def test_what_is_appended_grows_into_the_index():
    params, generator = make_params(), Generator(MODEL, ATTENTIONS["host"], GREEDY)
    state = generator.start(params, [WHOLE[:200]], 420)
    indexed = int(state.attention_state.index.tokens[0])
    state = generator.append(params, state, WHOLE[200:])
    # As by steps: what fills the window moves on, its last tokens stay.
    stepped = generator.start(params, [WHOLE[:200]], 420)
    stepped, _ = generator.force(params, stepped, np.asarray(WHOLE[200:])[:, None])
    for one in (state, stepped):
        wave = one.attention_state
        assert int(wave.index.tokens[0]) == indexed + CONFIG.growth_tokens
        assert int(wave.steady.window_tokens[0]) == 300 - 4 - indexed - CONFIG.growth_tokens
    np.testing.assert_allclose(
        state.attention_state.steady.window[:, 0, :, :50],
        stepped.attention_state.steady.window[:, 0, :, :50],
        atol=2e-4,
    )


def test_a_finished_sequence_goes_on_and_its_words_count():
    params = make_params()
    generator = Generator(MODEL, DenseAttention(), Sampler(repetition_penalty=1.3))
    whole = generator.start(params, [WHOLE[:60]], 20)
    state = generator.start(params, [WHOLE[:40]], 40)
    state = generator.append(params, generator.release(state, 0), WHOLE[40:60])
    np.testing.assert_array_equal(state.counts.in_prompt, whole.counts.in_prompt)
    assert not bool(state.finished[0])
    np.testing.assert_array_equal(after(generator, state), after(generator, whole))


def test_what_cannot_be_appended_is_refused():
    params = make_params()
    state = DENSE.allocate(1, 10, 10)
    with pytest.raises(InputError, match="slot 0 holds nothing: `insert` a prompt"):
        DENSE.append(params, state, [1])
    state = DENSE.insert(params, state, 0, WHOLE[:100])
    room = int(DENSE.attention.remaining(state.attention_state)[0])
    with pytest.raises(InputError, match=f"200 tokens are more than there is room for, {room}"):
        DENSE.append(params, state, WHOLE[:200])
    with pytest.raises(InputError, match="prompt 1 is empty"):
        DENSE.append(params, state, [])
    with pytest.raises(InputError, match="slot is 1"):
        DENSE.append(params, state, [1], slot=1)


@pytest.mark.parametrize("name", ["dense", "device", "host"])
def test_rows_are_read_where_they_lie_where_the_op_has_a_kernel(name, monkeypatch):
    shape = dataclasses.replace(CacheShape.of(MODEL), head_dim=64)

    def reads(tokens=64, dtype=jnp.bfloat16, head_dim=64):
        own = dataclasses.replace(shape, head_dim=head_dim)
        state = ATTENTIONS[name].init_state(own, 1, 64, 8, dtype)
        query = jnp.zeros((tokens, shape.kv_heads, 2, head_dim), dtype)
        return appended._reads_where_they_lie(query, state)

    lies_on_device = name != "host"
    assert not reads()  # there is no kernel for a CPU
    monkeypatch.setattr(dispatch, "_unfit", lambda: None)  # as on a GPU
    assert reads() == lies_on_device
    assert not reads(256)
    assert not reads(head_dim=80)
    assert not reads(dtype=jnp.float32)
    with use_implementation("xla"):
        assert not reads()
    monkeypatch.undo()
    with use_implementation("triton"):
        # Asked for by name: then the op refuses what its kernel does not know.
        for case in ({}, {"dtype": jnp.float32}, {"head_dim": 80}):
            assert reads(**case) == lies_on_device
        assert not reads(256)
