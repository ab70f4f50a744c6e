"""The methods: what each reads, and that they share budget, steady zone and prefill."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.errors import InputError
from tests.support.attention_harness import decode, model_of, prefill, random_stream
from tests.support.tiny_generator import CONFIG
from wavejax import DenseAttention, WaveAttention, WaveConfig
from wavejax.attention.retrieval import budgets
from wavejax.evaluation.baselines import PAGE_TOKENS, SparseAttention, page_bounds
from wavejax.evaluation.methods import METHODS, parse_methods
from wavejax.evaluation.probe import ProbeAttention, ProbeState, wave_reads
from wavejax.store.shape import CacheShape

RANKS = ("mass", "recency", "page_bound")
# 16 local tokens, growth after 64 more.
LENGTHS = [150, 61]
STEPS = 70


def started(attention, model, stream, new_tokens=STEPS, layers=1):
    room = max(LENGTHS)
    state = attention.init_state(CacheShape.of(model), len(LENGTHS), room, new_tokens, jnp.float32)
    return prefill(attention, state, stream, LENGTHS, room=room)[1]


def run(attention, model, stream, steps=STEPS):
    state = started(attention, model, stream)
    return np.asarray(decode(attention, state, stream, jnp.asarray(LENGTHS), steps)[0])


@pytest.fixture(scope="module")
def model():
    return model_of()


@pytest.fixture(scope="module")
def stream(model):
    return random_stream(model, np.random.default_rng(0), max(LENGTHS) + STEPS, len(LENGTHS))


@pytest.mark.parametrize("rank", RANKS)
def test_the_full_budget_is_full_attention(model, stream, rank):
    config = dataclasses.replace(CONFIG, retrieval_fraction=1.0)
    found = run(SparseAttention(config, rank), model, stream)
    np.testing.assert_allclose(found, run(DenseAttention(), model, stream), atol=1e-6)


def reads_of(attention, state, query):
    return np.asarray(attention.read(jnp.int32(0), query, state))


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 64])
def test_as_many_tokens_are_read_as_by_wave_attention(model, stream, steps):
    """Before and after the index of one sequence has grown; steady zones are the same tokens."""
    start = jnp.asarray(LENGTHS)
    query = stream[0][:, -1:]
    wave = WaveAttention(CONFIG, "device")
    # What the step after these would see: it grows the index first.
    state = wave.grow(decode(wave, started(wave, model, stream), stream, start, steps)[1])
    room = max(LENGTHS) + STEPS
    expected = np.asarray(wave_reads(wave, jnp.int32(0), query, state, room))
    indexed = np.asarray(state.index.tokens)
    assert indexed.tolist() == [130 + 64 * (steps >= 64), 64 * (steps >= 38)]
    retrieved = np.asarray(budgets(CONFIG, state.index.tokens)[0])
    found = {"wave": expected}
    for rank in RANKS:
        sparse = SparseAttention(CONFIG, rank)
        own = decode(sparse, started(sparse, model, stream), stream, start, steps)[1]
        found[rank] = reads_of(sparse, own, query)
    for name, reads in found.items():
        for b, length in enumerate(LENGTHS):
            end = 4 + indexed[b]
            place = np.arange(room)
            middle = (place >= 4) & (place < end)
            steady = ~middle & (place <= length + steps)
            assert (reads[b][:, steady]).all()
            assert not reads[b][:, ~steady & ~middle].any()
            count = retrieved[b]
            if name == "page_bound":
                count = min(-(-count // PAGE_TOKENS) * PAGE_TOKENS, indexed[b])
            assert (reads[b][:, middle].sum(-1) == count).all()


def exact(query, keys, values, tokens):
    """Attention of one query head to these tokens, in float64."""
    logits = (
        np.asarray(keys, np.float64)[tokens]
        @ np.asarray(query, np.float64)
        / np.sqrt(keys.shape[-1])
    )
    weights = np.exp(logits - logits.max())
    return weights / weights.sum() @ np.asarray(values, np.float64)[tokens]


def test_streaming_llm_is_sinks_and_a_window(model, stream):
    config = dataclasses.replace(CONFIG, retrieval_fraction=0.1)  # 13 of 130 indexed tokens
    found = run(SparseAttention(config, "recency"), model, stream, steps=3)
    step, b, head = 2, 0, 3
    newest = LENGTHS[b] + step
    # The 16 local tokens, the 13 before them, and what was generated.
    tokens = [*range(4), *range(LENGTHS[b] - 16 - 13, newest + 1)]
    query, key, value = (x[b] for x in stream)
    expected = exact(query[newest, head], key[:, head // 2], value[:, head // 2], tokens)
    np.testing.assert_allclose(found[step, b, head], expected, atol=1e-6)


def test_the_oracle_reads_the_tokens_of_most_mass(model, stream):
    config = dataclasses.replace(CONFIG, retrieval_fraction=0.1)
    oracle = SparseAttention(config, "mass")
    state = decode(oracle, started(oracle, model, stream), stream, jnp.asarray(LENGTHS), 1)[1]
    b, head, newest = 0, 1, LENGTHS[0] + 1
    query = stream[0][:, newest][:, None]
    keys = np.asarray(state.keys.data[0, b, head], np.float64)
    logits = np.asarray(query[b, 0, 2 * head : 2 * head + 2], np.float64) @ keys.T / 4
    masses = np.exp(logits[:, : newest + 1])
    mass = (masses / masses.sum(axis=1, keepdims=True)).sum(axis=0)
    middle = np.arange(4, 134)
    best = set(middle[np.argsort(mass[middle])[-13:]].tolist())
    read = set(np.nonzero(reads_of(oracle, state, query)[b, head])[0].tolist())
    assert read & set(middle.tolist()) == best


def test_page_bounds_are_above_every_logit_of_the_page():
    rng = np.random.default_rng(1)
    query = jnp.asarray(rng.normal(size=(2, 1, 4, 16)), jnp.float32)
    keys = jnp.asarray(rng.normal(size=(2, 2, 70, 16)), jnp.float32)
    valid = jnp.asarray((np.arange(70) >= 3) & (np.arange(70) < [[60], [35]]))
    bounds = np.asarray(page_bounds(query, keys, valid, 3))
    grouped = np.asarray(query).reshape(2, 2, 2, 16)
    logits = np.einsum("bhgd,bhsd->bhgs", grouped, np.asarray(keys)) / 4
    gaps = []
    for b, end in enumerate((60, 35)):
        for page in range(bounds.shape[-1]):
            tokens = np.arange(3 + 16 * page, min(3 + 16 * (page + 1), end))
            if len(tokens) == 0:
                assert (bounds[b, :, :, page] < -1e29).all()
                continue
            gaps.append(bounds[b, :, :, page] - logits[b][:, :, tokens].max(-1))
    assert np.min(gaps) >= -1e-5
    # Where all keys of a page are one, the bound is that key's logit.
    same = jnp.broadcast_to(keys[:, :, 5:6], keys.shape)
    bounds = np.asarray(page_bounds(query, same, valid, 3))
    np.testing.assert_allclose(bounds[..., 0], logits[..., 5], atol=1e-5)


def test_quest_reads_whole_pages_of_the_greatest_bounds(model, stream):
    config = dataclasses.replace(CONFIG, retrieval_fraction=0.2)  # 26 of 130: two pages
    quest = SparseAttention(config, "page_bound")
    state = started(quest, model, stream)
    query = stream[0][:, LENGTHS[0]][:, None]
    read = reads_of(quest, state, query)[0, 1, 4:132].reshape(8, PAGE_TOKENS)
    assert read.all(axis=1).sum() == read.any(axis=1).sum() == 2
    keys = state.keys.data[0]
    place = jnp.arange(keys.shape[2])
    valid = jnp.broadcast_to((place >= 4) & (place < 134), (2, len(place)))
    bounds = page_bounds(query, keys, valid, 4)[0, 1]
    mass = np.asarray(jax.nn.softmax(bounds, axis=-1).sum(axis=0))
    assert set(np.nonzero(read.all(axis=1))[0]) == set(np.argsort(mass)[-2:])


def probed(method, model, stream):
    """Recall and error `[batch, heads]` of the first step after the prompts."""
    probe = ProbeAttention(method=method)
    dense, own = started(DenseAttention(), model, stream), started(method, model, stream)
    zeros = jnp.zeros((1, len(LENGTHS), model.num_heads))
    state = ProbeState(dense.keys, dense.values, dense.tokens, own, zeros, zeros)
    batch = jnp.arange(len(LENGTHS))
    query, key, value = (x[batch, jnp.asarray(LENGTHS)][:, None] for x in stream)
    output, state = probe.decode(jnp.int32(0), query, key, value, state)
    return np.asarray(output[:, 0]), np.asarray(state.recall[0]), np.asarray(state.error[0])


@pytest.mark.slow
@pytest.mark.parametrize("method", [SparseAttention(), WaveAttention(store="device")])
def test_a_probe_finds_nothing_amiss_at_full_budget(model, stream, method):
    method = dataclasses.replace(
        method, config=dataclasses.replace(CONFIG, retrieval_fraction=1.0, candidate_fraction=1.0)
    )
    output, recall, error = probed(method, model, stream)
    np.testing.assert_allclose(output, run(DenseAttention(), model, stream, 1)[0], atol=1e-6)
    np.testing.assert_allclose(recall, 1, atol=1e-5)
    np.testing.assert_allclose(error, 0, atol=1e-5)


@pytest.mark.parametrize(
    "method, mass",
    [
        (SparseAttention(), 0.0),
        pytest.param(WaveAttention(store="device"), 0.0, marks=pytest.mark.slow(30)),
        pytest.param(WaveAttention(store="device"), 0.03, marks=pytest.mark.slow(10)),
    ],
)
def test_a_probes_recall_and_error_are_those_of_what_is_read(model, stream, method, mass):
    config = dataclasses.replace(
        CONFIG, retrieval_fraction=0.1, estimation_fraction=0.0, min_token_mass=mass
    )
    method = dataclasses.replace(method, config=config)
    if mass:
        # Half of the mass lies on the step's own token, or more: the others' shares tell it.
        at = jnp.arange(2), jnp.asarray(LENGTHS)
        own_key = 1.25 * stream[0][*at, :: stream[0].shape[2] // stream[1].shape[2]]
        stream = stream[0], stream[1].at[*at].set(own_key), stream[2]
    output, recall, error = probed(method, model, stream)
    b, head = 0, 2
    newest = LENGTHS[b]
    query, key, value = (np.asarray(x[b], np.float64) for x in stream)
    state = started(method, model, stream)
    at = jnp.asarray(LENGTHS)
    step = stream[0][jnp.arange(2), at][:, None]
    keys, values = (x[jnp.arange(2), at][:, None] for x in stream[1:])
    if isinstance(method, WaveAttention):
        _, state = method.select(jnp.int32(0), step, keys, values, state)
        read = wave_reads(method, jnp.int32(0), step, state, newest + 1)
    else:
        read = method.read(jnp.int32(0), step, method.append(jnp.int32(0), keys, values, state))
    tokens = np.nonzero(np.asarray(read)[b, head // 2])[0]
    mass = np.exp(key[: newest + 1, head // 2] @ query[newest, head] / 4)
    assert recall[b, head] == pytest.approx(mass[tokens].sum() / mass.sum(), abs=1e-5)
    assert 0.05 < recall[b, head] < 0.95
    own = exact(query[newest, head], key[:, head // 2], value[:, head // 2], tokens)
    full = exact(query[newest, head], key[:, head // 2], value[:, head // 2], range(newest + 1))
    expected = np.linalg.norm(own - full) / np.linalg.norm(full)
    assert error[b, head] == pytest.approx(expected, rel=1e-4)
    np.testing.assert_allclose(output[b, head], full, atol=1e-6)


def test_methods_by_name():
    budget = {"retrieval_fraction": 0.02, "min_retrieved_tokens": 7}
    found = parse_methods("full, wave[ cluster_size = 16 ,token_codes=false],paper,quest", budget)
    assert list(found) == ["full", "wave[cluster_size=16,token_codes=false]", "paper", "quest"]
    assert found["full"] == DenseAttention()
    assert found["wave[cluster_size=16,token_codes=false]"] == WaveAttention(
        WaveConfig(cluster_size=16, token_codes=False, **budget), "device"
    )
    assert found["paper"] == WaveAttention(WaveConfig.paper(**budget), "device")
    assert found["quest"] == SparseAttention(WaveConfig(**budget), "page_bound")
    own = parse_methods("oracle[min_retrieved_tokens=9],wave_no_estimation", budget)
    assert own["oracle[min_retrieved_tokens=9]"].config.min_retrieved_tokens == 9
    assert own["wave_no_estimation"].config.estimation_fraction == 0
    # What is admitted to a row cache depends on what is in it.
    [choosy] = parse_methods("wave[admission_ratio=16]", budget).values()
    assert choosy == WaveAttention(
        WaveConfig(admission_ratio=16.0, **budget), "device", cached=True
    )
    assert len(parse_methods(",".join(METHODS), budget)) == len(METHODS)
    [rounded] = parse_methods("full[row_dtype=int8]", budget).values()
    assert rounded == DenseAttention(row_dtype="int8")


@pytest.mark.parametrize(
    "text, said",
    [
        ("best", "no method 'best'; there are: full, oracle"),
        ("", "no method ''"),
        ("wave[", "no method 'wave['"),
        ("wave[size=3]", "no setting 'size' in 'size=3'; there are: sink_tokens"),
        ("wave[cluster_size=two]", "cluster_size is 'two'; it must be of type int"),
        ("wave[token_codes=2]", "token_codes is '2'; it must be of type bool"),
        ("wave[retrieval_fraction=2]", "retrieval_fraction is 2.0; it must be from 0 to 1"),
        ("full[cluster_size=2]", "full has no settings but row_dtype"),
        ("full[row_dtype=int4]", "row_dtype is int4; it must be one of model, int8"),
        ("ablation[admission_ratio=16]", "ablation has no row cache"),
        ("quest[admission_ratio=16]", "quest has no row cache"),
    ],
)
def test_bad_methods_are_refused(text, said):
    with pytest.raises(InputError) as caught:
        parse_methods(text, {})
    assert said in str(caught.value)
