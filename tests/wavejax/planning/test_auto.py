"""`attention="auto"`: which attention a plan takes, and what it says of it."""

import dataclasses
import inspect

import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import wavejax
from tests.support.tiny_generator import CONFIG, GREEDY, MODEL, make_params, make_prompts
from wavejax import DenseAttention, Generator, InputError, WaveAttention, WaveConfig
from wavejax.documents.text import pinned
from wavejax.engine.prompts import bucket
from wavejax.loading import attention_of, named_attention, open_model
from wavejax.planning.auto import CROSSOVERS, AutoAttention
from wavejax.planning.free_memory import FreeMemory
from wavejax.planning.memory import memory_need
from wavejax.planning.plan import make_plan, pinned_need
from wavejax.planning.table import plan_json, plan_text
from wavejax.store.sizes import segment_sizes

PLENTY = 2**50
# Deep, so that what one layer takes for a while counts for little.
DEEP = dataclasses.replace(MODEL, num_layers=32)
AUTO = AutoAttention(WaveConfig())


def gpu(device=PLENTY):
    return FreeMemory(device, PLENTY, PLENTY, "NVIDIA H200")


CPU = FreeMemory(None, PLENTY)


def plan(free, prompt_tokens, batch=1, auto=AUTO, **named):
    return make_plan(DEEP, auto, batch, prompt_tokens, 100, jnp.bfloat16, free=free, **named)


@pytest.mark.parametrize(
    "free, batch, tokens, name",
    [
        (gpu(), 1, 40_000, "full"),
        (gpu(), 1, 50_000, "wave"),
        # A batch's tokens count together on a GPU, and each sequence's on a CPU.
        (gpu(), 2, 40_000, "wave"),
        (CPU, 2, 40_000, "full"),
        (CPU, 1, 70_000, "wave"),
        # Of these wave attention reads every token.
        (gpu(), 64, 3000, "full"),
        (CPU, 64, 3000, "full"),
        # There are no times of others.
        (FreeMemory(PLENTY, PLENTY, PLENTY, "AMD MI300X"), 1, 20_000, "wave"),
        (FreeMemory(PLENTY, PLENTY, PLENTY, "AMD MI300X"), 1, 3000, "full"),
    ],
)
def test_the_faster_one_is_taken(free, batch, tokens, name):
    made = plan(free, tokens, batch)
    made.check()
    assert plan_json(made, "m")["attention"] == name
    assert isinstance(made.attention, WaveAttention if name == "wave" else DenseAttention)
    if name == "wave":
        assert made.attention == WaveAttention(AUTO.config, "device")
    assert f"attention: {name}; {made.chosen}" in plan_text(made, "m")


def test_it_says_why():
    assert "wave attention would read all of 3,100 tokens" in plan(gpu(), 3000).chosen
    assert "below some 45,000 tokens in a batch, measured on an H100" in plan(gpu(), 9000).chosen
    assert "80,200 tokens: it is faster from some 45,000" in plan(gpu(), 40_000, 2).chosen
    other = FreeMemory(PLENTY, PLENTY, PLENTY, "a TPU")
    assert "no times of full attention are known for 'a TPU'" in plan(other, 9000).chosen
    assert plan(gpu(), 9000, auto=WaveConfig()).chosen is None


def needs(prompt_tokens, *attentions):
    run = {"batch": 1, "prompt_tokens": prompt_tokens, "new_tokens": 100, "dtype": jnp.bfloat16}
    return [memory_need(DEEP, attention, **run).device for attention in attentions]


def test_memory_counts_more_than_speed():
    """Wave in host memory where nothing else fits; full where it fits and wave's rows do not."""
    config = dataclasses.replace(AUTO.config, min_clusters=0)
    auto = AutoAttention(config)
    full, device, host = needs(
        100_000, DenseAttention(), WaveAttention(config, "device"), WaveAttention(config, "host")
    )
    assert host < full < device
    for free, taken in ((device, "device"), (device - 1, "full"), (full - 1, "host")):
        made = plan(gpu(free), 100_000, auto=auto)
        made.check()
        found = made.attention
        assert (found.store if found.has_index else "full") == taken
    assert made.chosen == "full attention does not fit on the device"
    # Short, but too long for full attention.
    made = plan(gpu(needs(40_000, DenseAttention())[0] - 1), 40_000, auto=auto)
    assert made.chosen == "full attention is faster, but does not fit"
    assert made.attention.store == "host"


def test_either_attention_keeps_the_rows_that_are_asked_for():
    auto = AutoAttention(WaveConfig(row_dtype="int8"))
    short, long = (plan(gpu(), tokens, auto=auto) for tokens in (9000, 90_000))
    assert short.attention == DenseAttention(row_dtype="int8")
    assert long.attention == WaveAttention(auto.config, "device")
    for made in (short, long):
        # Of int8 rows there are no times.
        assert "with rows in the model's dtype" in made.chosen
        assert "scales" in plan_text(made, "m")
    whole = plan(gpu(), 9000)
    assert short.need.rows == short.need.state - short.need.steady
    # A byte a number and a scale of four a vector, in place of two bytes a number.
    vectors = short.need.rows // MODEL.head_dim
    assert short.need.steady - 4 * vectors == whole.need.state - 2 * short.need.rows == 4
    assert short.need.workspace < 2 * whole.need.workspace
    assert named_attention("full", auto.config) == short.attention
    assert named_attention("auto", auto.config) == auto


def test_rows_that_are_asked_for_in_host_memory_are_waves():
    made = plan(gpu(), 3000, store="host")
    assert made.attention == WaveAttention(AUTO.config, "host")
    assert made.chosen == "its rows are asked for in host memory"
    run = (1, 3000, 100, jnp.bfloat16)
    assert pinned_need(MODEL, AUTO, *run) == pinned_need(MODEL, AUTO.config, *run)


@settings(max_examples=200, deadline=None)
@given(
    prompt=st.integers(1, 30_000),
    new=st.integers(0, 30_000),
    least=st.integers(0, 20_000),
    candidates=st.integers(0, 20_000),
    codes=st.booleans(),
    choosy=st.booleans(),
)
def test_all_is_read_only_where_every_indexed_token_is(
    prompt, new, least, candidates, codes, choosy
):
    """By the sizes that the state has as it grows, token by token."""
    config = WaveConfig(
        min_retrieved_tokens=least, min_candidate_tokens=candidates, token_codes=codes,
        admission_ratio=2.0 if choosy else 1.0,
    )  # fmt: skip
    if not config.reads_all(prompt + new):
        return
    indexed = config.indexed_tokens(prompt)
    window = prompt - config.sink_tokens - indexed
    most = max(0, window + new - config.window_tokens)
    indexed += -(-most // config.growth_tokens) * config.growth_tokens
    assert not choosy or not indexed
    assert indexed <= max(least, config.retrieval_fraction * indexed)
    assert not codes or indexed <= max(candidates, least, config.candidate_fraction * indexed)
    assert config.most_retrieved(max(1, indexed)) >= indexed
    assert sum(segment_sizes(config, config.indexed_tokens(bucket(prompt)))) >= indexed or new


def test_names():
    assert attention_of("auto") == AUTO
    assert attention_of(AUTO) is AUTO
    with pytest.raises(InputError, match="must be 'wave', 'full', 'auto', a WaveConfig or an"):
        attention_of("fast")
    assert named_attention(None, WaveConfig()) == AUTO
    assert named_attention(None, CONFIG) == CONFIG
    for function in (wavejax.load, open_model):
        assert inspect.signature(function).parameters["attention"].default == "auto"
    assert set(CROSSOVERS) == {"NVIDIA", "cpu"}


@pytest.mark.parametrize("attention", [DenseAttention(), WaveAttention(CONFIG, "device")])
def test_a_kept_document_goes_on_with_the_attention_that_kept_it(attention, tmp_path):
    generator, params = Generator(MODEL, attention, GREEDY), make_params()
    [prompt] = make_prompts((30,))
    state = generator.start(params, [prompt], 1)
    wavejax.save_document(
        state, tmp_path / "d", generator=generator, params=params, token_ids=prompt
    )
    auto = AutoAttention(CONFIG)
    expected = CONFIG if attention.has_index else DenseAttention()
    assert pinned(auto, tmp_path / "d") == expected
    int8 = dataclasses.replace(CONFIG, row_dtype="int8")
    rounded = DenseAttention(row_dtype="int8")
    expected = int8 if attention.has_index else rounded
    assert pinned(AutoAttention(int8), tmp_path / "d") == expected
    for settled in (CONFIG, DenseAttention()):
        assert pinned(settled, tmp_path / "none") is settled
