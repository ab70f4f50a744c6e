"""The memory planner: where the rows go, how large the cache is, what is refused, what is said."""

import dataclasses

import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.tiny_generator import CONFIG, MODEL
from wavejax import DenseAttention, InputError, Sampler, WaveAttention, WaveConfig
from wavejax.engine.prompts import bucket
from wavejax.planning.free_memory import FreeMemory
from wavejax.planning.memory import memory_need
from wavejax.planning.plan import make_plan, pinned_need, shortage
from wavejax.planning.table import plan_json, plan_text

PLENTY = 2**50
FETCHES = ("auto", "in_place", "staged")
RUN = {"batch": 2, "prompt_tokens": 4000, "new_tokens": 100, "dtype": jnp.float32}


def free(device, host=PLENTY, pinned=PLENTY):
    return FreeMemory(device, host, pinned, "a GPU")


def plan(memory, attention=CONFIG, store="auto", **changes):
    return make_plan(MODEL, attention, store=store, free=memory, **(RUN | changes))


def need(store, cache_fraction=CONFIG.cache_fraction, **changes):
    config = dataclasses.replace(CONFIG, cache_fraction=cache_fraction)
    return memory_need(MODEL, WaveAttention(config, store), **(RUN | changes))


def choice(memory, store="auto"):
    """Where the rows go, and what is left of the cache that was asked for."""
    made = plan(memory, store=store)
    made.check()
    return made.attention.store, made.attention.config.cache_fraction / CONFIG.cache_fraction


def test_a_plan_knows_how_tokens_are_drawn():
    """A batch of many sequences needs room for what is ranked and counted, if anything is."""
    run = (MODEL, DenseAttention(), 4096, 10, 1, "float32")
    rooms = []
    drawn = (Sampler(), Sampler(temperature=1.0, top_k=5), Sampler(temperature=1.0, top_p=0.9))
    for sampler in (*drawn, Sampler(temperature=1.0, top_p=0.9, presence_penalty=1.0), None):
        made = make_plan(*run, sampler=sampler, free=free(PLENTY))
        assert made.need == memory_need(*run, sampler)
        rooms.append(made.need.workspace)
    greedy, few, all_ranked, counted, unknown = rooms
    assert greedy < few < all_ranked < counted == unknown
    # A run that fits when the most probable token is taken need not fit when all are ranked.
    tight = free(make_plan(*run, sampler=drawn[0], free=free(PLENTY)).need.device)
    make_plan(*run, sampler=drawn[0], free=tight).check()
    with pytest.raises(InputError, match="not enough device memory"):
        make_plan(*run, sampler=drawn[2], free=tight).check()


def test_the_device_while_it_fits_then_the_host():
    assert choice(free(PLENTY)) == ("device", 1.0)
    assert choice(free(need("device").device)) == ("device", 1.0)
    assert choice(free(need("device").device - 1)) == ("host", 1.0)
    assert choice(free(need("host").device)) == ("host", 1.0)
    where, left = choice(free(need("host").device - 1))
    assert where == "host"
    assert 0.9 < left < 1
    assert choice(free(need("host", 0.0).device)) == ("host", 0.0)
    with pytest.raises(InputError, match=r"^not enough device memory: "):
        choice(free(need("host", 0.0).device - 1))


def test_a_cache_of_all_tokens_is_made_smaller_in_proportion():
    """Of so short a context every token has a slot, at any fraction near the one asked for."""
    config = WaveConfig()
    full, none = (
        memory_need(MODEL, WaveAttention(one, "host"), **RUN)
        for one in (config, dataclasses.replace(config, cache_fraction=0.0))
    )
    made = plan(free((full.device + none.device) // 2), config, store="host")
    made.check()
    assert made.need.rows_on == "host"
    assert 0.4 * full.slots < made.need.slots < 0.5 * full.slots
    assert "with a smaller row cache" in made.reason


def test_where_it_is_asked_for_it_goes():
    assert choice(free(PLENTY), "host") == ("host", 1.0)
    assert choice(free(PLENTY), "device") == ("device", 1.0)
    with pytest.raises(InputError, match=r"`store=.host.`"):
        choice(free(need("device").device - 1), "device")


def test_rows_on_the_device_have_no_cache():
    on_device = need("device")
    assert on_device.slots == 0
    assert on_device == need("device", 0.5)
    assert on_device.cache < need("host", 0.0).cache < need("host").cache
    assert "row cache" not in plan_text(plan(free(PLENTY)), "tiny")
    assert "row cache" in plan_text(plan(free(PLENTY), store="host"), "tiny")


def test_on_a_cpu_all_of_it_must_fit_in_one_memory():
    for store, where in [("auto", "device"), ("device", "device"), ("host", "host")]:
        least = need(where, 0.0)
        total = least.device + least.host
        # On the host the cache is given up; on the device there is none to give up.
        assert choice(free(None, total), store) == (where, 1.0 if where == "device" else 0.0)
        with pytest.raises(InputError, match=r"^not enough memory: "):
            choice(free(None, total - 1), store)


def test_host_and_pinned_memory_are_compared_too():
    rows = need("host").host
    assert choice(free(PLENTY, rows), "host")[0] == "host"
    with pytest.raises(InputError, match=r"^not enough host memory: "):
        choice(free(PLENTY, rows - 1), "host")
    with pytest.raises(InputError, match=r"^not enough pinned memory: .*set XLA_PJRT_GPU_HOST"):
        choice(free(PLENTY, pinned=rows - 1), "host")
    # Nobody pins what stays on the device, but the weights pass through the host's memory.
    assert choice(free(PLENTY, need("device").loading, pinned=0)) == ("device", 1.0)
    with pytest.raises(InputError, match=r"^not enough host memory: "):
        choice(free(PLENTY, need("device").loading - 1, pinned=0))


def test_staged_rows_are_not_pinned():
    attention = WaveAttention(CONFIG, "host", "staged")
    in_place, staged = need("host"), memory_need(MODEL, attention, **RUN)
    assert (in_place.pinned, staged.pinned) == (in_place.host, 0)
    assert staged.host == in_place.host
    made = plan(free(PLENTY, pinned=0), store="host", fetch="staged")
    made.check()
    assert made.attention == attention
    assert "fetch: staged" in plan_text(made, "tiny")
    assert "pin" not in plan_text(made, "tiny").replace("not pinned", "")
    assert plan_json(made, "tiny")["need"]["pinned"] == 0
    with pytest.raises(InputError, match=r"^not enough host memory: "):
        plan(free(PLENTY, staged.host - 1), store="host", fetch="staged").check()
    # Whatever the cache, on the host by whatever way.
    smaller = plan(free(staged.device - 1), store="host", fetch="staged").attention
    assert smaller.config.cache_fraction < CONFIG.cache_fraction
    assert smaller.fetch == "staged"
    # Kernels of the device itself read rows on the device.
    assert not plan(free(PLENTY), fetch="staged").attention.staged


def test_staged_rows_on_their_way_take_room_on_the_device():
    attention = WaveAttention(CONFIG, "host", "staged")
    for prompt in (4000, 100_000):
        in_place = need("host", prompt_tokens=prompt)
        staged = memory_need(MODEL, attention, **RUN | {"prompt_tokens": prompt})
        layer = staged.rows // (MODEL.num_layers * RUN["batch"])
        assert staged.workspace - in_place.workspace == layer


def test_the_pinned_limit_holds_the_store_and_what_xla_stages():
    shape = tuple(RUN.values())
    without = pinned_need(MODEL, DenseAttention(), *shape)
    rows = {fetch: pinned_need(MODEL, CONFIG, *shape, fetch) - without for fetch in FETCHES}
    assert rows == {"auto": need("host").host, "in_place": need("host").host, "staged": 0}


def test_the_platform_chooses_how_to_fetch(monkeypatch):
    monkeypatch.setattr("wavejax.store.rows.best_fetch", lambda: "staged")
    made = plan(free(PLENTY, pinned=0), store="host")
    made.check()
    assert made.attention.staged
    with pytest.raises(InputError, match=r"^not enough pinned memory: .* `fetch=.staged.`"):
        plan(free(PLENTY, pinned=0), store="host", fetch="in_place").check()


def test_full_attention_fits_or_not():
    one = memory_need(MODEL, DenseAttention(), **RUN)
    made = plan(free(one.device), DenseAttention())
    made.check()
    assert made.attention == DenseAttention()
    with pytest.raises(InputError, match=r"^not enough device memory: ") as error:
        plan(free(one.device - 1), DenseAttention()).check()
    assert "`store" not in str(error.value)


def test_the_refusal_is_one_line_with_needed_and_free():
    made = plan(free(None, 2**20))
    with pytest.raises(InputError) as error:
        made.check()
    message = str(error.value)
    assert "\n" not in message
    total = (made.need.device + made.need.host) / 2**30
    assert message.startswith(f"not enough memory: {total:.2f} GiB needed (weights ")
    assert "0.00 GiB free" in message
    assert "`dtype='bfloat16'`" in message  # what to do about it
    with pytest.raises(InputError) as error:
        plan(free(None, 2**20), dtype=jnp.bfloat16).check()
    assert "`dtype" not in str(error.value)


@settings(max_examples=25, deadline=None)
@given(
    memory=st.integers(2**20, 2**34),
    host=st.integers(2**20, 2**34),
    batch=st.integers(1, 8),
    store=st.sampled_from(["auto", "host", "device"]),
    unified=st.booleans(),
)
def test_the_longest_prompt_fits_and_the_next_does_not(memory, host, batch, store, unified):
    there_is = free(None if unified else memory, host)
    longest = plan(there_is, store=store, batch=batch).longest
    if longest:
        plan(there_is, store=store, batch=batch, prompt_tokens=longest).check()
    longer = plan(there_is, store=store, batch=batch, prompt_tokens=bucket(longest + 1))
    with pytest.raises(InputError):
        longer.check()


def test_the_longest_prompt_is_found_where_a_shorter_one_needs_more():
    """As where the MLP takes all of 8192 tokens at once, and 2048 of 10,240."""
    model = dataclasses.replace(
        MODEL, hidden_size=64, intermediate_size=4096, num_heads=1, num_kv_heads=1
    )
    lengths = sorted({bucket(tokens) for tokens in range(1024, 2**16 + 1, 1024)})
    run = {"batch": 1, "new_tokens": 100, "dtype": jnp.bfloat16}
    needs = {
        tokens: memory_need(model, DenseAttention(), prompt_tokens=tokens, **run).device
        for tokens in lengths
    }
    assert sorted(needs.values()) != list(needs.values())
    for room in needs.values():
        made = make_plan(model, DenseAttention(), prompt_tokens=9, free=free(room), **run)
        assert made.longest == max(tokens for tokens, need in needs.items() if need <= room)


def test_the_table_adds_up_and_says_why():
    made = plan(free(need("host").device - 1), store="host")
    text = plan_text(made, "tiny")
    lines = text.splitlines()
    assert lines[0] == "Memory for tiny: 2 prompts, 4,000 + 100 tokens, float32"
    assert max(map(len, lines)) <= 100
    for name in ("weights", "wave index", "steady zone", "row store", "workspace", "needed"):
        assert name in text
    assert f"row cache, {made.need.slots:,} slots a head" in text
    assert "store: host; asked for, with a smaller row cache" in text
    assert f"longest prompt that would fit: {made.longest:,} tokens" in text
    assert lines[-1] == "it fits"
    short = plan(free(10))
    assert "it does not fit: " in plan_text(short, "tiny").splitlines()[-1]
    assert "longest" not in plan_text(short, "tiny")
    assert "keys and values" in plan_text(plan(free(None), DenseAttention()), "tiny")


def test_the_json_has_the_tables_numbers():
    made = plan(free(PLENTY))
    printed = plan_json(made, "tiny")
    assert printed["fits"]
    assert (printed["store"], printed["prompt_tokens"], printed["prompts"]) == ("device", 4000, 2)
    parts = ("weights", "index", "cache", "steady", "rows", "workspace")
    assert sum(printed["need"][part] for part in parts) == printed["need"]["device"]
    assert shortage(made.need, made.free) is None
