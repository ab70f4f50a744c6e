"""`scripts/bench_decode.py` runs anywhere, at a tiny shape; what it reports adds up."""

import functools
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from models.formats import bytes_by_parameter, formats_of_dtype
from models.quantised import QuantisedMatrix, formats_of
from tests.support.scripts import load_script
from wavejax import WaveAttention

ROOT = Path(__file__).parents[2]
TINY = [
    *("--local-tokens", "8", "--growth-tokens", "64", "--cluster-size", "4"),
    *("--max-cluster-size", "8", "--segment-tokens", "128"),
    *("--min-candidate-tokens", "32", "--min-retrieved-tokens", "8"),
]
CONTEXT, BATCH, STEPS = 300, 2, 4


load = functools.cache(load_script)


def bench(*options):
    command = [sys.executable, "scripts/bench_decode.py", "--shape", "tiny", *TINY, *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("weight_dtype", ["int8", "int4"])
def test_random_weights_may_be_levels(weight_dtype):
    decode_model = load("decode_model")
    model = decode_model.SHAPES["tiny"]
    formats = formats_of_dtype(model, weight_dtype)
    params = decode_model.random_params(model, "bfloat16", formats=formats)
    assert formats_of(params) == formats
    assert decode_model.memory_of(params) == sum(bytes_by_parameter(model, 2, formats).values())
    for name, stack in params["params"]["layers"].items():
        if isinstance(stack, QuantisedMatrix):
            numbers = np.asarray(stack.dequantise("float32"))
            assert numbers.std() == pytest.approx(stack.columns**-0.5, rel=0.05), name
    # What makes the row cache hit stays: the embedding is that of floats, but for rounding.
    expected = np.asarray(decode_model.smooth_embedding(model, "bfloat16", 0), np.float32)
    table = params["params"]["embedding"]
    assert np.abs(np.asarray(table.dequantise("float32")) - expected).max() < 0.05
    again = decode_model.with_smooth_embedding(model, params)["params"]["embedding"]
    assert again.format == table.format


@pytest.mark.slow
def test_both_attentions_are_measured_and_failures_are_recorded(tmp_path):
    out, plot = tmp_path / "results.json", tmp_path / "decode.svg"
    done = bench(
        # The second does not fit any machine.
        *("--contexts", str(CONTEXT), "--batches", f"{BATCH},100000000", "--store", "host,staged"),
        *("--steps", str(STEPS), "--hit-ratio", "0.7", "--growth", "--profile", str(tmp_path)),
        "--unroll",  # as by itself on a GPU: with layers of their own
        *("--out", str(out), "--plot", str(plot)),
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert report["copy"]["best"] > 0
    by_name = {(one["store"] or "full", one["batch"]): one for one in report["results"]}
    assert len(by_name) == 6
    for kind, name in [("full", "full"), ("host", "wave, host"), ("staged", "wave, staged")]:
        assert "MemoryError: needs" in by_name[kind, 100_000_000]["error"]
        assert f"100000000 {name}" in " ".join(done.stdout.replace(" x ", " ").split())
    full, wave, staged = (by_name[kind, BATCH] for kind in ("full", "host", "staged"))
    for one in (full, wave, staged):
        assert "error" not in one, one
        assert one["tokens_per_s"] == pytest.approx(1000 * BATCH / one["ms_per_step"])
        assert one["least_ms"] <= one["ms_per_step"] <= one["most_ms"]
        assert len(one["prefill"]["each"]) == BATCH
        assert list(tmp_path.rglob(f"{one['profile']['trace']}/**/*.xplane.pb"))
    assert full["full_ratio"] == 1
    assert wave["full_ratio"] == pytest.approx(full["ms_per_step"] / wave["ms_per_step"])

    assert wave["host_ratio"] == 1
    assert staged["host_ratio"] == pytest.approx(wave["ms_per_step"] / staged["ms_per_step"])
    # From the same state, by the same tokens, the same rows.
    assert (staged["stride"], staged["tried"]) == (wave["stride"], wave["tried"])
    for key in ("hit_ratio", "bytes_per_step", "state_bytes"):
        assert staged[key] == wave[key]

    # 2 layers of 2 kv heads with rows of 2 x 64 float32; unembedding and embedding are two.
    assert full["bytes_per_step"]["weights"] == report["weight_bytes"] - 512 * 128 * 4
    tokens = full["bytes_per_step"]["attention"] / (2 * 2 * 2 * 64 * 4 * BATCH)
    assert CONTEXT < tokens < CONTEXT + 4 * 30 * STEPS
    assert 0 < wave["hit_ratio"] < 1
    # Of 512 tokens no stride meets a ratio exactly; equal and unlike tokens are far apart.
    tried = sorted(wave["tried"])
    assert len(tried) > 1
    assert tried[0][1] > tried[-1][1] + 0.1
    missed = wave["bytes_per_step"]["host"] / (2 * 64 * 4) / (2 * 2 * BATCH)
    # At least 8 rows a sequence and kv head are retrieved.
    assert missed == pytest.approx(8 * (1 - wave["hit_ratio"]), rel=0.3)
    assert min(one["growth"]["growing_step_ms"] for one in (wave, staged)) > 0
    assert wave["state_bytes"]["host"] > 0
    assert plot.read_text().count("<path") > 10


@pytest.mark.slow(45)
def test_full_attention_is_measured_in_both_dtypes(tmp_path):
    """With rows in int8, so that either side of the comparison has them."""
    out = tmp_path / "results.json"
    done = bench(
        *("--contexts", str(CONTEXT), "--batches", str(BATCH), "--store", "device"),
        *("--steps", str(STEPS), "--row-dtype", "int8", "--out", str(out)),
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())["results"]
    full, rounded, _ = results
    assert [one["attention"] for one in results] == ["full", "full-int8", "wave"]
    assert "full-int8" in done.stdout
    # Rows of 2 x 64 float32, and of 2 x 64 levels with two scales.
    tokens = [
        one["bytes_per_step"]["attention"] / row
        for one, row in ((full, 2 * 64 * 4), (rounded, 2 * 64 + 8))
    ]
    assert tokens[0] == pytest.approx(tokens[1])
    assert rounded["state_bytes"]["device"] < 0.3 * full["state_bytes"]["device"]
    for one in results:
        for name, other in (("full_ratio", full), ("full_int8_ratio", rounded)):
            assert one[name] == pytest.approx(one["tokens_per_s"] / other["tokens_per_s"])
            assert one[name.replace("full", "best")] == pytest.approx(one[name])


@pytest.mark.slow(45)
def test_baselines_are_measured_beside_the_others(tmp_path):
    out = tmp_path / "results.json"
    done = bench(
        *("--contexts", "600", "--batches", f"{BATCH},100000000", "--store", "host"),
        *("--attention", "wave", "--steps", str(STEPS), "--min-retrieved-tokens", "40"),
        *("--baselines", "host-managed,host-managed-ahead,transformers", "--out", str(out)),
    )
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("transformers: ")]
    missing = [line for line in said if "{" not in line]
    # Each case's figures as they came, and the reason: no CUDA GPU here, if there is torch.
    assert (len(said), len(missing)) == (3, 1), done.stdout
    report = json.loads(out.read_text())
    results = report["results"]
    assert report["missing"] == {"transformers": missing[0].removeprefix("transformers: ")}
    # Wave attention comes last: XLA keeps what it pins for it.
    managed, ahead, wave = (one for one in results if one["batch"] == BATCH)
    names = [one["attention"] for one in (managed, ahead, wave)]
    assert names == ["host-managed", "host-managed-ahead", "wave"]
    for one in (wave, managed, ahead):
        assert "error" not in one, one
        assert one["precision"] == {"weights": "float32", "rows": "float32"}
    # Whole pages of 16.
    assert (wave["budget"], managed["budget"], ahead["budget"]) == (40, 48, 48)
    assert managed["tokens_per_s"] == pytest.approx(1000 * BATCH / managed["ms_per_step"])
    assert managed["managed_ratio"] == 1
    assert wave["managed_ratio"] == pytest.approx(managed["ms_per_step"] / wave["ms_per_step"])
    assert wave["ahead_ratio"] == pytest.approx(ahead["ms_per_step"] / wave["ms_per_step"])
    assert ahead["bytes_per_step"]["host"] == managed["bytes_per_step"]["host"]
    # 2 layers of 2 kv heads, 48 tokens each, rows of 2 x 64 float32.
    assert managed["bytes_per_step"]["host"] == BATCH * 2 * 2 * 48 * 2 * 64 * 4
    assert managed["bytes_per_step"]["weights"] == wave["bytes_per_step"]["weights"]
    assert 0 < sum(managed["ms_of_step"].values()) < managed["most_ms"]
    assert min(managed["alone"]["gather_gb_per_s"].values()) > 0
    text = " ".join(done.stdout.split())
    assert "precision budget" in text
    assert f"600 {BATCH} host-managed float32 48 " in text
    assert "100000000 x host-managed: MemoryError: needs" in text


def test_a_mistake_is_one_line():
    done = bench("--batches", "1,most")
    assert done.returncode == 2
    assert done.stderr == "error: --batches: 'most' is no number from 1 up or any of max, common\n"


def test_as_much_may_be_pinned_as_the_rows_take():
    script, model = load("decode_configurations"), load("decode_model").SHAPES["llama-3-8b"]
    attention = WaveAttention(store="host", fetch="in_place")
    narrow, wide = (
        script.pinned_bytes(model, [attention], 122_880, [1, 2], 0, dtype)
        for dtype in ("bfloat16", "float32")
    )
    numbers = 2 * model.num_layers * model.num_kv_heads * 122_880 * 2 * model.head_dim
    assert narrow >= 2 * numbers
    assert wide >= 4 * numbers


def test_the_largest_batch_is_found():
    script = load("decode_configurations")
    for most in (0, 1, 7, 8, 1000):
        assert script.largest_batch(lambda batch, most=most: batch <= most) == most
    assert script.largest_batch(lambda batch: True, most=64) == 64


def test_neighbouring_tokens_are_alike():
    script = load("decode_model")
    model = script.SHAPES["tiny"]
    embedding = np.asarray(script.smooth_embedding(model, "float32", 0))
    embedding = embedding / np.linalg.norm(embedding, axis=-1, keepdims=True)
    alike = [
        (embedding * np.roll(embedding, stride, axis=0)).sum(-1).mean() for stride in range(33)
    ]
    # It falls all the way, without a seam where the vocabulary ends.
    assert alike[0] == pytest.approx(1)
    assert alike[1] > 0.95
    assert all(later < earlier for earlier, later in itertools.pairwise(alike[:12]))
    assert abs(alike[32]) < 0.5
    last, first = embedding[-1], embedding[0]
    assert last @ first > 0.9
