"""Traces and simulated replacement policies against plain Python."""

import dataclasses
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.types import NO_ID
from tests.support.tiny_generator import CONFIG, GREEDY, MODEL, make_params, make_prompts
from wavejax import Generator, InputError, WaveAttention
from wavejax.attention import retrieval
from wavejax.evaluation.replacement import study
from wavejax.evaluation.replacement.policies import policies
from wavejax.evaluation.replacement.simulate import Uses, keep_best, simulate
from wavejax.evaluation.replacement.trace import NO_ROW, Trace, record, tracing


def make_trace(steps, tokens=40, most=6, lanes=(2, 2), seed=0):
    """A random trace: rows drawn so that some are wanted again and again."""
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.full(tokens, 0.3))
    rows = np.full((steps, *lanes, most), NO_ROW, np.int32)
    for index in np.ndindex(steps, *lanes):
        count = min(rng.integers(1, most + 1), np.count_nonzero(weights))
        chosen = np.sort(rng.choice(tokens, count, replace=False, p=weights))
        rows[index][:count] = chosen
    order = np.stack([rng.permutation(tokens) for _ in range(4)]).reshape(*lanes, tokens)
    return Trace(rows, order.astype(np.int32), {"method": "random", "kl": 0.5})


def units_of(trace, size, order):
    """The sets of units that each step asks for, lane by lane, in plain Python."""
    lanes = []
    for lane in np.ndindex(trace.rows.shape[1:3]):
        place = {token: i for i, token in enumerate(trace.order[lane].tolist())}
        lanes.append(
            [
                {
                    (token if order == "token" else place[token]) // size
                    for token in rows[lane].tolist()
                    if token != NO_ROW
                }
                for rows in trace.rows
            ]
        )
    return lanes


def plain_lru(steps, slots):
    """Units missed, by a list in order of use; a step's own units stay."""
    held, missed = [], 0
    for wanted in steps:
        hits = [unit for unit in held if unit in wanted]
        misses = sorted(wanted - set(hits))
        missed += len(misses)
        idle = [unit for unit in held if unit not in wanted]
        kept = idle[max(0, len(idle) - max(0, slots - len(hits) - len(misses))) :]
        held = kept + hits + misses[: slots - len(hits)]
    return missed


def fewest_misses(steps, slots):
    """The fewest units missed by any policy: every way to keep up to `slots` units is tried."""
    states = {frozenset(): 0}
    for wanted in steps:
        following = {}
        for held, missed in states.items():
            cost = missed + len(wanted - held)
            pool = held | wanted
            for kept in itertools.combinations(sorted(pool), min(slots, len(pool))):
                key = frozenset(kept)
                following[key] = min(following.get(key, cost), cost)
        states = following
    return min(states.values())


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), slots=st.integers(1, 45))
def test_no_policy_beats_the_optimum_and_all_hold_what_fits(seed, slots):
    trace = make_trace(20, seed=seed)
    uses = Uses(trace, 1, "token", 512)
    best = simulate(uses, "optimum", slots, 0)
    distinct = sum(len(set().union(*lane)) for lane in units_of(trace, 1, "token")) / 4 / 20
    for make in policies().values():
        reads = simulate(uses, make(), slots, 0)
        assert best.missed <= reads.missed + 1e-9
        assert reads.missed == reads.read <= reads.wanted == best.wanted
        # Every row is missed once at least; and once alone where all have room.
        assert reads.missed >= distinct - 1e-9
        if slots >= 40:
            assert reads.missed == pytest.approx(distinct)


@pytest.mark.parametrize("size, order", study.UNITS)
@pytest.mark.parametrize("slots", [1, 3, 6, 10])
def test_lru_misses_what_a_list_misses(slots, size, order):
    trace = make_trace(30, seed=slots)
    reads = simulate(Uses(trace, size, order, 512), policies()["LRU"](), slots, 0)
    # Which of equally old units gives way is up to the cache: with one unit a step none is.
    lanes = units_of(trace, size, order)
    missed = sum(plain_lru(steps, slots) for steps in lanes)
    assert reads.read * 30 * 4 / size == pytest.approx(missed, rel=0.1)
    single = dataclasses.replace(trace, rows=trace.rows[..., :1])
    reads = simulate(Uses(single, size, order, 512), policies()["LRU"](), slots, 0)
    missed = sum(plain_lru(steps, slots) for steps in units_of(single, size, order))
    assert reads.read * 30 * 4 / size == pytest.approx(missed)


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_the_optimum_is_the_optimum(slots):
    trace = make_trace(8, tokens=7, most=3, seed=slots)
    reads = simulate(Uses(trace, 1, "token", 512), "optimum", slots, 0)
    fewest = sum(fewest_misses(steps, slots) for steps in units_of(trace, 1, "token"))
    assert reads.missed * 8 * 4 == pytest.approx(fewest)


def test_a_scan_passes_by_frequency_but_empties_lru():
    """Two rows wanted in every other step, between rows that are wanted once."""
    steps = [[0, 1] if step % 2 == 0 else [step + 10, step + 60] for step in range(40)]
    rows = np.array(steps, np.int32)[:, None, None]
    trace = Trace(rows, np.arange(120)[None, None], {})
    uses = Uses(trace, 1, "token", 512)
    missed = {name: simulate(uses, make(), 2, 10).missed * 30 for name, make in policies().items()}
    assert missed["LRU"] == missed["FIFO"] == 60
    assert missed["LFU"] == missed["LRU-2"] == missed["LRU, in at the second miss"] == 30
    assert missed["frequency, decay 0.95"] == 30


def test_rows_missed_units_read_and_pages():
    rows = np.array([[0, 1, 9], [1, 2, NO_ROW]], np.int32)[:, None, None]
    order = np.array([[[9, 1, 0, 2, 3, 4, 5, 6, 7, 8]]])
    trace = Trace(rows, order, {})
    by_token = simulate(Uses(trace, 2, "token", 2048, 4096), policies()["LRU"](), 9, 0)
    # Units {0, 1}, {8, 9} are missed at first, then {2, 3}; each is a page of its own.
    assert (by_token.missed, by_token.read, by_token.pages) == (4 / 2, 6 / 2, 3 / 2)
    by_cluster = simulate(Uses(trace, 2, "cluster", 2048, 4096), policies()["LRU"](), 9, 0)
    # 9 and 1 are neighbours, 0 and 2 are: the second step misses nothing.
    assert (by_cluster.missed, by_cluster.read, by_cluster.pages) == (3 / 2, 4 / 2, 2 / 2)
    # Rows of 3000 bytes straddle pages: row 0 lies in page 0, rows 1 and 2 in pages 0 to 2.
    straddling = simulate(Uses(trace, 1, "token", 3000, 4096), policies()["LRU"](), 9, 0)
    assert straddling.pages == (len({0, 1, 6, 7}) + len({1, 2})) / 2
    # All ten rows in one page: each step misses in it once.
    assert simulate(Uses(trace, 1, "token", 3000), policies()["LRU"](), 9, 0).pages == 2 / 2


def test_keep_best_breaks_ties_by_the_lower_unit():
    ranks = np.array([[1.0, 2.0, 2.0, 2.0, -np.inf], [5.0, 4.0, 3.0, 2.0, 1.0]])
    candidates = np.array([[1, 1, 1, 1, 1], [0, 1, 0, 1, 1]], bool)
    kept = keep_best(ranks, candidates, 2)
    assert kept.tolist() == [[False, True, True, False, False], [False, True, False, True, False]]
    assert keep_best(ranks, candidates, 9).tolist() == candidates.tolist()
    few = np.zeros((1, 5), bool)
    assert not keep_best(ranks[:1], few, 2).any()


@pytest.mark.slow
def test_a_trace_is_what_was_retrieved(tmp_path, monkeypatch):
    attention = tracing(CONFIG)
    generator = Generator(MODEL, attention, GREEDY)
    (prompt,) = make_prompts((318,))
    params, steps = make_params(), 70
    reference = Generator(MODEL, WaveAttention(CONFIG, "device"), GREEDY)
    state = reference.start(params, [prompt], steps)
    state, drawn = reference.decode_n(params, state, steps)
    answer = np.asarray(drawn)[:, 0]

    # Listed as the attention itself lists them, by a callback that only this test has.
    listed = []
    select_tokens = retrieval.select_tokens

    def listen(*arguments, **settings):
        found = select_tokens(*arguments, **settings)
        jax.debug.callback(lambda tokens: listed.append(np.asarray(tokens)), found.tokens)
        return found

    trace, logits = record(generator, params, generator.start(params, [prompt], steps), answer)
    assert trace.rows.shape[:3] == (steps, MODEL.num_layers, MODEL.num_kv_heads)
    np.testing.assert_array_equal(np.argmax(logits, -1), answer)

    monkeypatch.setattr(retrieval, "select_tokens", listen)
    # Another generator, so that it is compiled anew, and with its layers one after the other.
    listening = Generator(MODEL, attention, GREEDY, unroll=True)
    state = listening.start(params, [prompt], steps)
    for token in answer[:2]:
        state, _ = listening.force(params, state, jnp.full((1, 1), int(token), jnp.int32))
        jax.block_until_ready(state)
        jax.effects_barrier()
    assert len(listed) == 2 * MODEL.num_layers
    for step, layer in np.ndindex(2, MODEL.num_layers):
        tokens = listed[step * MODEL.num_layers + layer][0]
        for head in range(MODEL.num_kv_heads):
            expected = sorted(tokens[head][tokens[head] != NO_ID].tolist())
            rows = trace.rows[step, layer, head]
            assert rows[rows != NO_ROW].tolist() == expected
    # The index has grown: the order lists all its tokens.
    indexed = CONFIG.indexed_tokens(318) + CONFIG.growth_tokens
    for head in trace.order.reshape(-1, trace.order.shape[-1]):
        assert sorted(head.tolist()) == list(range(indexed))

    named = dataclasses.replace(trace, about={"method": "tiny"})
    named.save(tmp_path / "trace.npz")
    loaded = Trace.load(tmp_path / "trace.npz")
    np.testing.assert_array_equal(loaded.rows, trace.rows)
    np.testing.assert_array_equal(loaded.order, trace.order)
    assert loaded.about == {"method": "tiny"}


def test_what_is_no_trace_is_refused(tmp_path):
    file = tmp_path / "other.npz"
    with pytest.raises(InputError, match="is not a trace"):
        Trace.load(file)
    np.savez(file, something=np.zeros(3))
    with pytest.raises(InputError, match="is not a trace"):
        Trace.load(file)
    for content in (b"text", file.read_bytes()[:-30]):
        file.write_bytes(content)
        with pytest.raises(InputError, match="is not a trace"):
            Trace.load(file)
    with pytest.raises(InputError, match="the warm-up takes 30"):
        study.run(make_trace(30), [], 512, 30, lambda: None)


def test_the_study_prints_every_case(monkeypatch, tmp_path):
    trace = make_trace(20)
    cases = study.cases_of("random", [0.05, 0.2], ["LRU", study.OPTIMUM], [0.2])
    assert len(set(cases)) == len(cases) == 12 * 2 + 2 * 7
    results = study.run(trace, cases, 512, 5, lambda: None)
    assert set(results) == set(cases)
    doubled = study.mean([results, results])
    assert doubled == results
    table = study.policy_table(results, "random")
    assert [line.split("|")[1].strip() for line in table.splitlines()[4:]] == [
        *policies(),
        study.OPTIMUM,
    ]
    units = study.unit_table(results, "random", "LRU", 0.2)
    assert len(units.splitlines()) == 4 + len(study.UNITS)
    assert len(study.as_json(results)) == len(cases)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match="pip install 'matplotlib"):
        study.plot(results, tmp_path / "plot.svg")
