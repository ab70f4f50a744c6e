"""`attend_appended`: its meaning against float64, its kernel interpreted and lowered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as ops
from pallas_kernels.attend_appended import triton as kernel
from pallas_kernels.rounding import quantise
from tests.support.lowering import lower_for

LAYERS, BATCH, HEADS, LAYER, SEQUENCE = 2, 3, 2, 1, 2
NEW, COUNT = 21, 18
TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 1e-2}
QUICKLY = {"compiler_options": {"xla_backend_optimization_level": 0}}

# Of a window that new tokens are written to, the first tokens, and a store: rows in use, and room.
# The store has the most room, or the window has; nothing in use, or all of it.
KINDS = {
    "wave": ((33, 70), (4, 4), (250, 300)),
    "begins": ((0, 40), (2, 4), (0, 300)),
    "full window": ((19, 37), (4, 4), (300, 300)),
    "no store": ((50, 90), (4, 4), (0, 0)),
    "large window": ((333, 400), (4, 4), (17, 64)),
}


def rows_of(rng, used, room, dtype, *vectors):
    """Rows `[..., room, *vectors, head_dim]`; all that must not be read is NaN."""
    rows = rng.normal(size=(LAYERS, BATCH, HEADS, room, *vectors))
    rows[1 - LAYER] = np.nan
    rows[:, :SEQUENCE] = np.nan
    rows[:, :, :, used:] = np.nan
    return ops.Rows(jnp.asarray(rows, dtype))


def kept_of(rng, used, room, head_dim, dtype, new=0, apart=False):
    """Rows in use, and new ones behind them, as two arrays or as one."""
    tokens = jnp.full(BATCH, -5).at[SEQUENCE].set(used).astype(jnp.int32)
    if apart:
        keys, values = (rows_of(rng, used + new, room, dtype, head_dim) for _ in range(2))
        return ops.KeptRows(keys, values, tokens)
    return ops.KeptRows(rows_of(rng, used + new, room, dtype, 2, head_dim), None, tokens)


def query_of(rng, group, head_dim, dtype):
    return jnp.asarray(rng.normal(size=(NEW, HEADS, group, head_dim)), dtype)


def make_case(kind, group, head_dim, dtype):
    rng = np.random.default_rng((len(kind), group, head_dim))
    (own, *others), given = KINDS[kind], (head_dim, dtype)
    kept = (kept_of(rng, *own, *given, COUNT), *(kept_of(rng, *other, *given) for other in others))
    return query_of(rng, group, head_dim, dtype), kept[0], kept[1:]


def exact(query, own, others, scale):
    """The output of the tokens that there are, in float64."""

    def numbers(rows):
        data = np.asarray(rows.data[LAYER, SEQUENCE], np.float64)
        if rows.scales is None:
            return data
        return data * np.asarray(rows.scales[LAYER, SEQUENCE], np.float64)[..., None]

    def both(kept, used):
        keys = numbers(kept.keys)[:, :used]
        if kept.values is not None:
            return keys, numbers(kept.values)[:, :used]
        return keys[..., 0, :], keys[..., 1, :]

    output = np.zeros((COUNT, *query.shape[1:]))
    for i in range(COUNT):
        parts = [both(own, int(own.tokens[SEQUENCE]) + i + 1)]
        parts += [both(other, int(other.tokens[SEQUENCE])) for other in others]
        keys, values = (np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True))
        logits = scale * np.einsum("hgd,htd->hgt", np.asarray(query[i], np.float64), keys)
        mass = np.exp(logits - logits.max(-1, keepdims=True))
        output[i] = np.einsum("hgt,htd->hgd", mass, values) / mass.sum(-1)[..., None]
    return output


def check(found, case, tolerance):
    assert found.dtype == case[0].dtype
    expected = exact(*case, 0.3)
    error = np.linalg.norm(np.asarray(found, np.float64)[:COUNT] - expected, axis=-1)
    assert (error <= tolerance * np.linalg.norm(expected, axis=-1)).all()


def run(case, **settings):
    attend = functools.partial(ops.attend_appended, scale=0.3, implementation="xla")
    if settings:
        attend = functools.partial(kernel.attend_appended, scale=0.3, interpret=True, **settings)
    numbers = (jnp.int32(x) for x in (COUNT, SEQUENCE, LAYER))
    return jax.jit(attend, **QUICKLY)(*case, *numbers)


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_softmax_attention(kind):
    case = make_case(kind, 3, 48, "float32")
    check(run(case), case, 1e-5)


@pytest.mark.parametrize(
    "kind, group, head_dim, dtype, config",
    [
        ("wave", 3, 64, "float32", kernel.Config(3, 16, 16)),
        ("wave", 7, 128, "bfloat16", kernel.Config(1, 32, 32)),
        ("begins", 4, 96, "float16", kernel.Config(2, 64, 16)),
        # More splits than blocks: some have nothing.
        ("full window", 1, 64, "bfloat16", kernel.Config(25, 16, 16)),
        ("no store", 2, 64, "float32", kernel.Config(2, 16, 16)),
        # What is cut into splits is what new tokens were written to.
        ("large window", 3, 64, "float32", kernel.Config(4, 32, 16)),
        # The one that it picks by itself.
        ("wave", 16, 256, "bfloat16", None),
    ],
)
def test_the_kernel_is_softmax_attention(kind, group, head_dim, dtype, config):
    case = make_case(kind, group, head_dim, dtype)
    check(run(case, config=config), case, TOLERANCES[dtype])


@pytest.mark.parametrize("splits", [1, 3])
def test_full_attentions_cache_is_one_kind_of_rows(splits):
    rng = np.random.default_rng(splits)
    own = kept_of(rng, 100, 130, 64, "float32", COUNT, apart=True)
    case = query_of(rng, 3, 64, "float32"), own, ()
    check(run(case), case, 1e-5)
    check(run(case, config=kernel.Config(splits, 16, 16)), case, 1e-5)


def test_levels_are_numbers_times_scales():
    query, own, (sinks, store) = make_case("wave", 4, 64, "bfloat16")
    data = jnp.nan_to_num(store.keys.data.astype(jnp.float32))
    levels = quantise(data)
    levels = levels._replace(
        scales=jnp.where(jnp.isnan(store.keys.data[..., 0]), jnp.nan, 1) * levels.scales
    )
    case = query, own, (sinks, store._replace(keys=levels))
    check(run(case), case, 1e-2)
    check(run(case, config=kernel.Config(2, 32, 16)), case, 2e-2)


@pytest.mark.parametrize("head_dim, itemsize", [(64, 2), (96, 2), (128, 2), (128, 4), (256, 4)])
@pytest.mark.parametrize("queries, kv_heads", [(1, 2), (384, 3), (896, 2), (512, 8)])
def test_heuristic_fills_the_gpu_and_fits_its_shared_memory(queries, kv_heads, head_dim, itemsize):
    room = 131_072
    config = kernel.heuristic(queries, kv_heads, room, head_dim, itemsize)
    programs = -(-queries // config.queries) * kv_heads
    # Whole waves of two programs a processor; room for one part more would be for a twelfth of it.
    waves = (config.splits + 1) * programs / 264
    blocks = room // config.block
    assert 0.9 <= waves <= 1 or 2.6 <= waves <= 3 or config.splits == blocks // 4, waves
    width = 128 if head_dim == 96 else head_dim
    taken = (config.queries + 2 * config.num_stages * config.block) * width * itemsize
    assert taken <= 99 * 1024
    # A text of a few tokens is not cut to crumbs.
    assert kernel.heuristic(queries, kv_heads, 200, head_dim, itemsize).splits <= 3


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda q, own: (q[..., :32], own), "head_dim is 32"),
        (lambda q, own: (jnp.tile(q, (1, 1, 17, 1)), own), "17 query heads"),
        (lambda q, own: (q.astype(jnp.bfloat16), own), "rows are float32"),
    ],
)
def test_the_kernel_says_what_it_does_not_support(change, match):
    query, own, others = make_case("wave", 1, 64, "float32")
    query, own = change(query, own)
    with pytest.raises(NotImplementedError, match=match):
        kernel.attend_appended(query, own, others, COUNT, SEQUENCE, LAYER, scale=1.0)


@pytest.mark.parametrize(
    "platform, head_dim, dtype",
    [("cuda", 64, jnp.bfloat16), ("cuda", 96, jnp.float32), ("rocm", 128, jnp.bfloat16)],
)
def test_the_kernel_lowers(platform, head_dim, dtype):
    def rows(room):
        return ops.Rows(jax.ShapeDtypeStruct((2, 8, 8, room, 2, head_dim), dtype))

    tokens, number = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((8,), ()))
    own, sinks, store = (ops.KeptRows(rows(room), None, tokens) for room in (1216, 4, 131_072))
    query = jax.ShapeDtypeStruct((128, 8, 4, head_dim), dtype)
    attend = functools.partial(kernel.attend_appended, scale=0.1)
    text = lower_for(platform, attend, query, own, (sinks, store), number, number, number)
    assert "attend_appended" in text
    assert "merge_states" in text
    # Nothing but the kernel touches what is large.
    assert "gather" not in text
    assert "dynamic_slice" not in text
