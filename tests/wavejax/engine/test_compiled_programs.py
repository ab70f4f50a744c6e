"""The compiled programs: how many there are, that they work in place, that they never wait."""

import logging
import re

import jax
import jax.numpy as jnp
import pytest

from tests.support.tiny_generator import (
    ATTENTIONS,
    CONFIG,
    GREEDY,
    MODEL,
    make_params,
    make_prompts,
)
from wavejax import DecodeState, Generator, WaveAttention
from wavejax.engine import compiled
from wavejax.store.shape import CacheShape

# It looks at compiled programs.
pytestmark = pytest.mark.optimised

NEW_TOKENS = 90  # Enough for an index to grow.


class CompileLog(logging.Handler):
    """Counts what is compiled while it is open."""

    def __init__(self):
        super().__init__(logging.DEBUG)
        self.names = []

    def emit(self, record):
        message = record.getMessage()
        if message.startswith("Finished XLA compilation of"):
            self.names.append(message)

    def __enter__(self):
        self.log = jax.log_compiles()
        self.log.__enter__()
        logging.getLogger("jax").addHandler(self)
        return self

    def __exit__(self, *error):
        logging.getLogger("jax").removeHandler(self)
        self.log.__exit__(*error)


def run(generator, lengths, steps):
    state = generator.start(make_params(), make_prompts(lengths), NEW_TOKENS)
    for _ in range(steps // 8):
        state, _ = generator.decode_n(make_params(), state, 8)
    return state


def test_the_log_sees_a_compilation():
    with CompileLog() as log:
        jax.jit(lambda x: x * 3.25 + 1.75)(jnp.zeros(7)).block_until_ready()
    assert log.names


@pytest.mark.parametrize("attention", ["dense", pytest.param("wave", marks=pytest.mark.slow(30))])
def test_a_new_length_in_a_bucket_and_a_growth_compile_nothing(attention):
    generator = Generator(MODEL, ATTENTIONS[attention], GREEDY)
    before = compiled.decode_n._cache_size(), compiled.prefill_layer._cache_size()
    run(generator, (270, 300), 8)
    # One program for all steps, and one for all layers and both prompts.
    assert compiled.decode_n._cache_size() == before[0] + 1
    assert compiled.prefill_layer._cache_size() == before[1] + 1
    with CompileLog() as log:
        state = run(generator, (262, 320), 80)
    assert not log.names
    if attention == "wave":
        indexed = [CONFIG.indexed_tokens(length) + CONFIG.growth_tokens for length in (262, 320)]
        assert state.attention_state.index.tokens.tolist() == indexed


@pytest.mark.parametrize("attention", ["dense", "wave"])
def test_generators_of_one_attention_share_what_reads_prompts(attention):
    run(Generator(MODEL, ATTENTIONS[attention], GREEDY), (270, 300), 0)
    with CompileLog() as log:
        run(Generator(MODEL, ATTENTIONS[attention], GREEDY, stop_tokens=(1,)), (270, 300), 0)
    assert not log.names


@pytest.mark.parametrize("attention", ["dense", pytest.param("wave", marks=pytest.mark.slow(20))])
def test_requests_of_about_as_many_tokens_share_all_programs(attention):
    generator, prompts = Generator(MODEL, ATTENTIONS[attention], GREEDY), make_prompts((100,))
    before = compiled.decode_n._cache_size(), compiled.prefill_layer._cache_size()
    for new in (20, 21, 22, 31):
        state = generator.start(make_params(), prompts, new)
        state, tokens = generator.decode_n(make_params(), state, new)
        assert tokens.shape == (new, 1)
        found = compiled.decode_n._cache_size(), compiled.prefill_layer._cache_size()
        assert found == (before[0] + 1, before[1] + 1)


def empty_state(attention):
    """A state whose first tokens come from nothing: needs no prefill."""
    cache = attention.init_state(CacheShape.of(MODEL), 2, 320, NEW_TOKENS, jnp.float32)
    logits = jnp.zeros((2, MODEL.vocab_size), jnp.float32)
    return DecodeState(cache, logits, jnp.zeros(2, bool), jnp.int32(0), jnp.int32(0))


def pointers(state):
    return {
        jax.tree_util.keystr(path): leaf.unsafe_buffer_pointer()
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def test_the_text_of_a_program_names_a_callback():
    program = jax.jit(lambda x: jax.pure_callback(abs, x, x)).lower(jnp.zeros(3)).compile()
    assert "callback" in program.as_text()


def copies_of_stacks(text, cache):
    """Shapes of arrays of the cache, or of a layer of them, that a program copies or slices.

    The row table is left out, which plain JAX copies and kernels do not; and the window, which
    jax 0.10 copies while an index grows.
    """
    kept = (cache.index, cache.store, cache.cache.rows)
    stacks = {tuple(leaf.shape) for leaf in jax.tree.leaves(kept) if leaf.ndim > 3 and leaf.size}
    whole = stacks | {shape[1:] for shape in stacks}
    found = re.findall(r"= \w+\[([\d,]+)\]\S* copy(?:-start)?\(", text)
    return [shape for shape in found if tuple(map(int, shape.split(","))) in whole]


def test_a_copy_of_a_stack_is_seen():
    cache = empty_state(ATTENTIONS["wave"]).attention_state
    program = jax.jit(lambda cache: jax.tree.map(jnp.copy, cache)).lower(cache).compile()
    assert copies_of_stacks(program.as_text(), cache)


@pytest.mark.parametrize("store, memory", [("host", "pinned_host"), ("device", "device")])
def test_decoding_works_in_place_and_asks_nothing_of_the_host(store, memory):
    attention = WaveAttention(CONFIG, store)
    generator, params, room = Generator(MODEL, attention), make_params(), 128
    state = empty_state(attention)
    lowered = compiled.decode_n.lower(generator.engine, params, state, jnp.int32(90), room)
    program = lowered.compile()
    for text in (lowered.as_text(), program.as_text()):
        assert len(text) > 10_000
        assert "callback" not in text
        assert "outfeed" not in text
    assert not copies_of_stacks(program.as_text(), state.attention_state)
    before = pointers(state)
    # The growth, which writes rows to the store, included.
    state, _ = program(params, state, jnp.int32(90))
    assert state.attention_state.index.tokens.tolist() == [CONFIG.growth_tokens] * 2
    # Every array of the state, whatever its size, is where it was.
    assert pointers(state) == before
    assert state.attention_state.store.rows.data.sharding.memory_kind == memory
