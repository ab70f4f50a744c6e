"""The Mosaic GPU kernel of `score_clusters`: interpreted, and lowered. `tests/gpu` runs it."""

import functools

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels as ops
from pallas_kernels.score_clusters import mosaic_gpu
from pallas_kernels.toolbox import launch
from tests.support.cluster_cases import (
    BATCH,
    HEADS,
    LAYERS,
    SCALE,
    check,
    check_nan,
    cluster_case,
)
from tests.support.lowering import lower_for
from tests.support.mosaic_gpu_interpreter import interpret, needs_interpreter

# Group, head dim, dtype, room for clusters, config.
CASES = [
    (3, 64, "float16", 304, mosaic_gpu.Config(64, 2)),
    (4, 128, "bfloat16", 320, mosaic_gpu.Config(64, 1)),
    (7, 96, "bfloat16", 384, mosaic_gpu.Config(128, 1)),
    (1, 128, "float16", 304, None),
    (16, 64, "bfloat16", 312, mosaic_gpu.Config(64, 4)),
    (12, 256, "bfloat16", 512, mosaic_gpu.Config(64, 2)),
]


@needs_interpreter
@pytest.mark.parametrize("group, head_dim, dtype, room, config", CASES)
def test_it_is_the_reference(group, head_dim, dtype, room, config):
    case = cluster_case(group, group, head_dim, dtype, room)
    kernel = functools.partial(
        mosaic_gpu.score_clusters, scale=SCALE, rotated=True, config=config, interpret=True
    )
    config = config or mosaic_gpu.heuristic(BATCH * HEADS, room, head_dim)
    # The last two programs of a row then share clusters, and write the same.
    overlap = room % (config.block * config.blocks) > 0
    check(interpret(kernel, *case, races=overlap), case, rotated=True)


@needs_interpreter
def test_nan_in_a_cluster_shows_in_its_row_alone():
    kernel = functools.partial(
        mosaic_gpu.score_clusters, scale=SCALE, interpret=True, config=mosaic_gpu.Config(64, 1)
    )
    check_nan(lambda *case: interpret(kernel, *case), 64, "bfloat16", 320)


@pytest.mark.parametrize("group, head_dim, dtype, room, config", CASES)
def test_it_lowers(group, head_dim, dtype, room, config):
    case = jax.eval_shape(lambda: cluster_case(0, group, head_dim, dtype, room))
    kernel = functools.partial(mosaic_gpu.score_clusters, scale=SCALE, config=config)
    text = lower_for("cuda", kernel, *case)
    assert text.count("custom_call @mosaic_gpu_v2") == 2
    # A slice of a layer would be a copy, as would be a transposition.
    assert "dynamic_slice" not in text
    assert "stablehlo.transpose" not in text
    heads = 8 if group <= 8 else 16
    padded = heads % group > 0 or BATCH * HEADS * group % heads > 0
    assert ("stablehlo.pad" in text) == padded


@pytest.mark.parametrize(
    "change, match",
    [
        ({"head_dim": 32}, "head_dim is 32"),
        ({"dtype": "float32"}, "dtypes are float32, float32; the Mosaic GPU kernel wants one 16-"),
        ({"room": 0}, "room for 0 clusters"),
        ({"room": 56}, "at least 64"),
        ({"room": 301}, "a multiple of 8"),
        ({"directions": jnp.zeros(1)}, "no Mosaic GPU kernel for moments"),
        ({"config": mosaic_gpu.Config(128, 4)}, "programs of 512 clusters"),
    ],
)
def test_it_says_what_it_does_not_support(change, match):
    head_dim, dtype = change.get("head_dim", 64), change.get("dtype", "bfloat16")
    row = (LAYERS, BATCH, HEADS, change.get("room", 512))
    operands = (
        jnp.zeros((BATCH, HEADS, 4, head_dim), dtype),
        jnp.zeros((*row, head_dim), dtype),
        jnp.zeros((*row[:3], row[3] + 1), jnp.int32),
    )
    settings = {"directions": change.get("directions"), "config": change.get("config")}
    with pytest.raises(NotImplementedError, match=match):
        mosaic_gpu.score_clusters(*operands, 0, scale=1.0, **settings)


@pytest.mark.parametrize("capability", [(8, 0), (10, 0)])
def test_it_wants_hopper(capability, monkeypatch):
    monkeypatch.setattr(launch, "compute_capability", lambda: capability)
    case = cluster_case(0, 4, 64, "bfloat16")
    with pytest.raises(NotImplementedError, match="wants Hopper"):
        ops.score_clusters(*case, scale=1.0, implementation="mosaic_gpu")
