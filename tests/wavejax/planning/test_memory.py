"""What a run needs of memory: the bytes really made and really compiled; what there is."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels as ops
from models.config import ModelConfig
from models.formats import bytes_by_parameter, formats_of_dtype
from models.parameters import nest, parameter_shapes
from models.quantised import QuantisedMatrix
from tests.support.attention_harness import model_of
from tests.support.tiny_generator import CONFIG, MODEL, make_params
from wavejax import DecodeState, DenseAttention, Generator, Sampler, WaveAttention, WaveConfig
from wavejax.engine import compiled
from wavejax.engine.facts import facts_of
from wavejax.engine.prompts import answer_room, bucket
from wavejax.engine.sampling import settings_of
from wavejax.planning import free_memory as memory
from wavejax.planning.free_memory import free_memory, host_available, set_memory_limits
from wavejax.planning.memory import memory_need
from wavejax.store.rows import init_store
from wavejax.store.shape import CacheShape

# It looks at compiled programs.
pytestmark = pytest.mark.optimised

ATTENTIONS = {
    "dense": DenseAttention(),
    "dense in int8": DenseAttention(row_dtype="int8"),
    "wave, host": WaveAttention(CONFIG, "host"),
    "wave, device": WaveAttention(CONFIG, "device"),
    "moments": WaveAttention(dataclasses.replace(CONFIG, moment_rank=2, moment_dtype="int8")),
    "paper": WaveAttention(WaveConfig.paper(growth_tokens=64), "host"),
}


@pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("prompt, new", [(5, 1), (318, 90), (1300, 200)])
def test_the_need_is_the_state_that_is_made(attention, dtype, prompt, new):
    need = memory_need(MODEL, attention, 3, prompt, new, jnp.dtype(dtype))
    # As `Generator.start` makes it.
    state = attention.init_state(CacheShape.of(MODEL), 3, bucket(prompt), answer_room(new), dtype)
    facts = facts_of(attention, state)
    assert (need.state, need.host) == (facts.device_bytes, facts.host_bytes)
    assert need.device == need.weights + need.state + need.workspace
    if isinstance(attention, WaveAttention):
        parts = state.index, state.cache, state.steady, state.store
        sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(part)) for part in parts]
        # The step's number and the tokens attended to are counted with the steady zone.
        sizes[2] += state.step.nbytes + state.attended.nbytes
        assert [need.index, need.cache, need.steady, need.rows] == sizes
        assert need.slots == state.cache.rows.shape[3]
    elif attention.row_dtype == "int8":
        assert need.rows == state.keys.data.nbytes + state.values.data.nbytes
        scales = state.keys.scales.nbytes + state.values.scales.nbytes
        # The tokens' numbers are counted with the scales.
        assert need.steady == scales + state.tokens.nbytes


def test_the_weights_are_those_of_the_model():
    need = memory_need(MODEL, DenseAttention(), 1, 100, 1, jnp.float32)
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(make_params())]
    assert (need.weights, need.loading) == (sum(sizes), max(sizes))


WIDE = ModelConfig("llama", 1000, 2, 256, 512, 8, 2, 64, 10**6)
DEEP_MLP = ModelConfig("llama", 1000, 2, 128, 1024, 4, 1, 32, 10**6)


def compiled_workspace(
    model, attention, batch, room, new, dtype=jnp.float32, sampler=None, formats=None
):
    """Bytes of temporaries of the two programs, compiled for this machine."""

    def of(shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    def parameter(path, shape):
        if path not in (formats or {}):
            return of(shape)
        sizes, more = formats[path].arrays(shape), {"columns": shape[-1], "dtype": dtype}
        made = {name: functools.partial(jnp.zeros, *size) for name, size in sizes.items()}
        return jax.eval_shape(
            lambda: QuantisedMatrix(**{name: make() for name, make in made.items()}, **more)
        )

    shapes = parameter_shapes(model)
    params = {"params": nest({path: parameter(path, shape) for path, shape in shapes.items()})}
    number = of((), jnp.int32)

    def state():
        cache = attention.init_state(CacheShape.of(model), batch, room, new, dtype)
        logits = jnp.zeros((batch, model.vocab_size))
        state = DecodeState(cache, logits, jnp.zeros(batch, bool), jnp.int32(0), jnp.int32(0))
        settings = settings_of([sampler or Sampler()] * batch, model.vocab_size)
        return dataclasses.replace(state, sampling=settings)

    state = jax.eval_shape(state)
    hidden = of((1, room, model.hidden_size))
    arguments = params, hidden, number, number, number, state.attention_state
    prefill = compiled.prefill_layer.lower(model, attention, *arguments).compile()
    generator = Generator(model, attention)
    decode = compiled.decode_n.lower(generator.engine, params, state, number, 8).compile()
    return [program.memory_analysis().temp_size_in_bytes for program in (prefill, decode)]


CASES = [
    ("dense", WIDE, 16384),
    ("dense", DEEP_MLP, 2048),
    ("dense in int8", WIDE, 16384),
    pytest.param("wave", WIDE, 16384, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("attention, model, room", CASES)
def test_the_workspace_is_enough_and_not_twice_too_much(attention, model, room):
    config = WaveConfig(
        growth_tokens=64, segment_tokens=1024, min_retrieved_tokens=8, min_candidate_tokens=32
    )
    one = WaveAttention(config, "device") if attention == "wave" else ATTENTIONS[attention]
    need = memory_need(model, one, 4, room, 64, jnp.float32)
    prefill, decode = compiled_workspace(model, one, 4, room, 64)
    # The residual stream goes in and out of the program: no temporary of its own.
    stream = 3 * room * model.hidden_size * 4
    assert max(prefill + stream, decode) <= need.workspace
    assert need.workspace <= 2 * max(prefill + stream, decode)


LARGE_TABLE = ModelConfig("llama", 20_000, 2, 256, 1024, 8, 2, 64, 10**6)


@pytest.mark.parametrize("weight_dtype", ["int8", "int4"])
@pytest.mark.parametrize("model, room", [(LARGE_TABLE, 64), (DEEP_MLP, 2048)])
def test_the_workspace_of_quantised_weights(model, room, weight_dtype):
    """Of a short prompt it is the floats of the table; of a longer one products in float32."""
    formats = formats_of_dtype(model, weight_dtype)
    need = memory_need(model, DenseAttention(), 1, room, 64, jnp.float32, formats=formats)
    prefill, decode = compiled_workspace(model, DenseAttention(), 1, room, 64, formats=formats)
    stream = 3 * room * model.hidden_size * 4
    assert max(prefill + stream, decode) <= need.workspace
    assert need.workspace <= 2 * max(prefill + stream, decode)
    floats = memory_need(model, DenseAttention(), 1, room, 64, jnp.float32)
    assert need.weights < 0.3 * floats.weights
    # One stack of levels and one matrix in float32 pass through the host.
    stacks = bytes_by_parameter(model, 4, formats)
    matrix = 4 * 20_000 * 256 if model is LARGE_TABLE else 4 * 1000 * 128
    assert need.loading <= max(stacks.values()) + max(matrix, 4 * 128 * 1024)


def test_a_long_batch_of_full_attention_decodes_with_more_than_it_reads_a_prompt_with():
    model = model_of(kv_heads=8, group=1, head_dim=64)
    one, many = (
        memory_need(model, DenseAttention(), batch, 4096, 1, jnp.float32) for batch in (1, 64)
    )
    assert many.workspace > 4 * one.workspace


def test_nothing_starts_the_device():
    """In a process of its own: planning must leave the limits to be set."""
    import subprocess
    import sys

    code = (
        "import jax.numpy as jnp\n"
        "from jax._src import xla_bridge\n"
        "from models.config import ModelConfig\n"
        "import wavejax.cli.generate_command\n"
        "from wavejax.planning.plan import pinned_need\n"
        "model = ModelConfig('llama', 50, 2, 32, 48, 4, 2, 16, 1000)\n"
        "pinned_need(model, wavejax.WaveConfig(), 2, 500, 10, 'bfloat16')\n"
        "print(xla_bridge.backends_are_initialized())\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"


def device_with(monkeypatch, stats):
    device = types.SimpleNamespace(memory_stats=lambda: stats, device_kind="a GPU")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])


def test_a_store_in_host_memory():
    store = init_store((1, 2, 3, 12_345, 2, 16), jnp.bfloat16, "host")
    assert store.rows.data.sharding.memory_kind == "pinned_host"
    assert store.rows.shape == (1, 2, 3, 12_345, 2, 16)
    assert store.rows.dtype == jnp.bfloat16


def test_a_store_in_host_memory_can_be_donated():
    """Time and again: an array could be made of memory that is not XLA's to write to."""
    zeros = jnp.int32(0)
    for tokens in range(1000, 1020):
        store = init_store((1, 1, 2, tokens, 2, 16), jnp.float32, "host").rows
        address = store.data.unsafe_buffer_pointer()
        append = jax.jit(ops.append_rows, donate_argnums=0)
        store = append(store, jnp.ones((2, 5, 2, 16)), zeros, zeros, zeros)
        assert store.data.unsafe_buffer_pointer() == address


def test_what_is_free_is_what_xla_set_aside_less_what_is_in_use(monkeypatch):
    monkeypatch.delenv(memory.PINNED_LIMIT, raising=False)
    device_with(monkeypatch, {"bytes_limit": 1000, "bytes_in_use": 100})
    free = free_memory()
    assert (free.device, free.name, free.pinned) == (900, "a GPU", 64 * 2**30)
    monkeypatch.setenv(memory.PINNED_LIMIT, "100")
    assert free_memory().pinned == 100 * 2**30
    for stats in (None, {}):
        device_with(monkeypatch, stats)
        assert free_memory().device is None


def test_a_containers_limit_counts(monkeypatch, tmp_path):
    available = types.SimpleNamespace(available=10_000)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: available)
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert host_available() == 10_000
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("3000\n")
    (tmp_path / "memory.stat").write_text("anon 2000\ninactive_file 700\n")
    assert host_available() == 5000 - 3000 + 700
    (tmp_path / "memory.max").write_text("max\n")
    assert host_available() == 10_000
    old = tmp_path / "memory"
    old.mkdir()
    (old / "memory.limit_in_bytes").write_text("4000")
    (old / "memory.usage_in_bytes").write_text("4100")
    (old / "memory.stat").write_text("total_inactive_file 50")
    assert host_available() == 0


def test_limits_are_set_unless_the_user_has(monkeypatch):
    names = (memory.PINNED_LIMIT, memory.DEVICE_FRACTION, memory._OLD_DEVICE_FRACTION)
    for name in names:
        monkeypatch.delenv(name, raising=False)
    environment = dict(memory.os.environ)
    monkeypatch.setattr(memory.os, "environ", environment)
    set_memory_limits(33 * 2**30 + 1)
    assert environment[memory.PINNED_LIMIT] == "34"
    assert environment[memory.DEVICE_FRACTION] == "0.9"
    set_memory_limits(2**40)
    assert environment[memory.PINNED_LIMIT] == "34"
    # Both names together are an error to JAX.
    del environment[memory.DEVICE_FRACTION]
    environment[memory._OLD_DEVICE_FRACTION] = "0.5"
    set_memory_limits(2**40)
    assert memory.DEVICE_FRACTION not in environment
