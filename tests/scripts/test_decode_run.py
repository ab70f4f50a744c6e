"""A decode benchmark's configurations: their order, memory, and what is told of them."""

import functools
from types import SimpleNamespace

from tests.support.scripts import load_script
from wavejax import DenseAttention, WaveAttention, WaveConfig
from wavejax.planning.free_memory import FreeMemory

load = functools.cache(load_script)


def managed_of(config, **changes):
    return load("decode_configurations").HostManagedBaseline(config, **changes)


def test_blocks_of_pages_may_be_pinned_too():
    script, model = load("decode_configurations"), load("decode_model").SHAPES["llama-3-8b"]
    wave, managed = WaveAttention(store="host", fetch="in_place"), managed_of(WaveConfig())
    given = 122_880, [1, 8], 0, "bfloat16"
    none, rows, blocks, both = (
        script.pinned_bytes(model, attentions, *given)
        for attentions in ([], [wave], [managed], [managed, managed, wave])
    )
    # Two pairs, each of the keys and the values of eight sequences.
    expected = 2 * 8 * managed.budget(122_880) * 2 * model.num_kv_heads * model.head_dim * 2
    assert blocks - none == both - rows == expected > 0


def bench_of(free):
    decode_model = load("decode_model")
    model = decode_model.SHAPES["tiny"]
    params = decode_model.random_params(model, "float32")
    options = {"hit_ratio": 0.8, "real_prefill": False, "unroll": None, "growth": False}
    options |= {"new_tokens": 8, "steps": 4, "profile": None, "ceiling": 1e9, "free": free}
    return load("decode_configurations").Bench(model, params, "float32", **options)


def test_rows_are_pinned_beside_the_blocks_of_pages():
    bench = bench_of(FreeMemory(device=10**12, host=10**8, pinned=6 * 10**7))
    config = WaveConfig(local_tokens=8, growth_tokens=64, min_retrieved_tokens=256)
    wave, managed = WaveAttention(config, "host", "in_place"), managed_of(config)
    alone = bench.largest(wave, 4096)
    of_wave, of_managed = bench.largest_of_each([wave, managed], 4096)
    assert of_managed == bench.largest(managed, 4096) > 0
    blocks = managed.pinned(bench.model, of_managed, 4096, "float32")
    fits, not_fits = (bench.need(wave, of_wave + i, 4096).pinned for i in range(2))
    assert fits + blocks <= bench.free.pinned < not_fits + blocks
    assert 0 < of_wave < alone


def test_what_the_host_manages_runs_before_anything_is_pinned_for_rows():
    run = load("decode_run")
    wave = "wave", "host", WaveAttention(store="host", fetch="in_place")
    managed = "host-managed", None, run.HostManagedBaseline(WaveConfig())
    choices = [("full", None, DenseAttention()), wave, managed]
    bench = SimpleNamespace(largest_of_each=lambda attentions, context: [9, 5, 7])
    jobs = run.jobs_of(bench, choices, [300, 600], [1, "max", 4, "common"])
    found = [(job.choice[0], job.context, job.asked, job.batch) for job in jobs]
    own = [(300, "max", 7), (300, "common", 5), (300, 4, 4), (300, 1, 1)]
    own = [(600, *rest) for _, *rest in own] + own
    assert found[:8] == [("host-managed", *rest) for rest in own]
    others = [(name, context, asked) for name, context, asked, _ in found[8:]]
    assert others == [(kind, *rest[:2]) for rest in own for kind in ("full", "wave")]
    assert {job.batch for job in jobs if job.asked == "common"} == {5}


def test_transformers_has_a_result_for_each_batch_asked_for():
    run = load("decode_run")
    timed = {"batch": 64, "tokens_per_s": 5.0, "bytes_per_step": {"device": 1e9}}
    failed = {"batch": 64, "error": "out of memory"}
    results = {(300, 64): failed, (300, "max"): timed}
    outsider = "transformers", None, run.TransformersBaseline(results)
    bench = bench_of(FreeMemory(None, 10**10))
    jobs = [run.Job(300, asked, 64, outsider) for asked in (64, "max")]
    failed, timed = run.run_jobs(bench, jobs, run.Report(None))
    assert failed["error"] == "out of memory"
    assert timed["tokens_per_s"] == 5
    # Others are run once.
    ran = []

    def attempt(self, *given):
        ran.append(given)
        return {"error": "none"}

    jobs = [run.Job(300, asked, 64, ("full", None, DenseAttention())) for asked in (64, "max")]
    bench = SimpleNamespace(attempt=functools.partial(attempt, None), held_as=lambda *_: {})
    assert len(run.run_jobs(bench, jobs, run.Report(None))) == 2
    assert len(ran) == 1


def test_blocks_that_are_not_pinned_are_told_under_the_table(capsys):
    result = {"context": 600, "batch": 2, "attention": "host-managed", "store": None, "budget": 48}
    result |= {"precision": {"weights": "float32", "rows": "float32"}, "prefill": {"seconds": None}}
    result |= {"ms_per_step": 1.0, "floor_ms": 0.5, "tokens_per_s": 2000.0}
    result |= {"bytes_per_step": {"host": 1.0}, "pinned": False, "not_pinned": "OSError: no room"}
    print_table = load("decode_report").print_table
    print_table([result])
    *_, last = capsys.readouterr().out.splitlines()
    assert last == "600 x 2 x host-managed: its blocks are not pinned: OSError: no room"
    print_table([result | {"not_pinned": None}])
    assert "not pinned" not in capsys.readouterr().out
