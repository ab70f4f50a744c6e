"""The kernels that score and select, lowered for GPUs, and what they refuse."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.score_clusters import triton as score_clusters
from pallas_kernels.score_tokens import _query
from pallas_kernels.score_tokens import triton as score_tokens
from pallas_kernels.select_clusters import triton as select_clusters
from pallas_kernels.select_tokens import empty_table
from pallas_kernels.select_tokens import triton as select_tokens
from pallas_kernels.types import (
    Candidates,
    ClusterScores,
    IndexedTokens,
    RankedTokens,
    Reach,
    SelectionSettings,
    TokenCodes,
)
from tests.support.lowering import lower_for


def shapes(
    batch=2,
    kv_heads=2,
    group=4,
    head_dim=128,
    clusters=96,
    tokens=4096,
    slots=200,
    dtype="bfloat16",
):
    """Operands of the four ops, by name, as shapes."""
    row = (batch, kv_heads)
    of = jax.ShapeDtypeStruct
    i32, f32 = jnp.int32, jnp.float32
    candidates = Candidates(
        of((*row, clusters), jnp.bool_),
        of((*row, clusters), i32),
        of((*row, clusters + 1), i32),
        of((*row, 32), i32),
    )
    logits, logsumexp = of((*row, group, clusters), f32), of((*row, group), f32)
    offsets, number, numbers = of((3, *row, clusters + 1), i32), of((), i32), of((batch,), i32)
    table = jax.eval_shape(lambda: empty_table((3, *row), tokens, slots))
    words = -(-head_dim // 32)
    return {
        "score_clusters": (
            of((*row, group, head_dim), dtype),
            of((3, *row, clusters, head_dim), dtype),
            offsets,
            number,
        ),
        "select_clusters": (logits, logsumexp, offsets, number, numbers),
        "score_tokens": (
            ClusterScores(logits, logsumexp, of((*row, group, head_dim), f32)),
            *(candidates, offsets),
            TokenCodes(of((3, *row, tokens, words), jnp.uint32), of((3, *row, tokens), dtype)),
            number,
        ),
        "select_tokens": (
            RankedTokens(of((*row, 1024), f32), candidates, numbers),
            IndexedTokens(offsets, of((3, *row, tokens), jnp.uint16), numbers),
            *(table, number, number),
        ),
    }


KEYWORDS = {
    "score_clusters": {"scale": 0.1, "rotated": True},
    "select_clusters": {"max_candidates": 1024},
    "score_tokens": {"scale": 0.1, "max_candidates": 1024},
    "select_tokens": {"settings": SelectionSettings(100, 2048, 256)},
}
MODULES = {
    "score_clusters": score_clusters,
    "select_clusters": select_clusters,
    "score_tokens": score_tokens,
    "select_tokens": select_tokens,
}


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
def test_selection_by_reach_lowers(platform):
    given = shapes()["select_clusters"]
    logits, _, offsets, *_ = given
    deviations = jax.ShapeDtypeStruct((*offsets.shape[:-1], logits.shape[-1]), jnp.bfloat16)
    reach = Reach(jax.ShapeDtypeStruct(logits.shape[:-1], jnp.float32), deviations)

    def select(reach, *given):
        return select_clusters.select_clusters(*given, max_candidates=1024, reach=reach)

    text = lower_for(platform, select, reach, *given)
    assert "triton" in text
    assert "dynamic_slice" not in text


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
@pytest.mark.parametrize("op", MODULES)
def test_lowers(op, platform):
    function = functools.partial(getattr(MODULES[op], op), **KEYWORDS[op])
    for changes in (
        {},
        {"group": 7, "head_dim": 96, "dtype": "float32", "slots": 0},
        {"dtype": "float16"},
    ):
        text = lower_for(platform, function, *shapes(**changes)[op])
        assert "triton" in text
        # No slice of a stack is made for a kernel.
        assert "dynamic_slice" not in text
        assert "stablehlo.gather" not in text


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
@pytest.mark.parametrize("slots, admission_ratio", [(0, 1.0), (200, 1.0), (200, 4.0)])
def test_long_rows_have_kernels_of_many_programs(platform, slots, admission_ratio):
    function = functools.partial(
        select_tokens.select_tokens,
        settings=SelectionSettings(100, 2048, 256, admission_ratio),
        config=select_tokens.Config(512, 256, spread=True),
    )
    text = lower_for(platform, function, *shapes(slots=slots)["select_tokens"])
    for name, runs in (("draw_sample", True), ("join_contenders", True), ("admit_rows", slots > 0)):
        assert (name in text) == runs, name


def test_only_long_rows_are_spread():
    assert not select_tokens.heuristic(33_000, 1180).spread
    assert select_tokens.heuristic(262_209, 9438).spread
    # What a row's programs found is put together by one of them: not of too many.
    for most in (1, 30, 1180, 9438, 65_536):
        config = select_tokens.heuristic(262_209, most)
        assert most <= 128 * config.block
        assert config.block <= max(most * 2, 32)


@pytest.mark.parametrize("coded", [True, False])
def test_only_an_int8_query_takes_cudas_assembly(coded):
    operands = list(shapes()["score_tokens"])
    if not coded:
        operands[3] = None

    def assembly(config):
        function = functools.partial(score_tokens.score_tokens, **KEYWORDS["score_tokens"])
        return "inline_asm" in str(
            jax.make_jaxpr(functools.partial(function, config=config))(*operands)
        )

    assert assembly(score_tokens.Config(256))
    assert not assembly(score_tokens.Config(16, integers=False))


def test_a_block_that_threads_do_not_share_evenly_is_said():
    function = functools.partial(score_tokens.score_tokens, **KEYWORDS["score_tokens"])
    function = functools.partial(function, config=score_tokens.Config(64, num_warps=4))
    with pytest.raises(ValueError, match="a block of 64 candidates is no multiple of 128"):
        jax.eval_shape(function, *shapes()["score_tokens"])


def test_a_packed_query_wants_integers():
    function = functools.partial(score_tokens.score_tokens, **KEYWORDS["score_tokens"])
    function = functools.partial(function, config=score_tokens.Config(16, integers=False))
    scores, *others = shapes()["score_tokens"]
    scores = scores._replace(rotated=_query.packed_shapes(*scores.rotated.shape))
    with pytest.raises(ValueError, match="integers=True, or the rotated query"):
        jax.eval_shape(function, scores, *others)


def test_scores_without_the_rotated_query_are_said():
    function = functools.partial(score_tokens.score_tokens, **KEYWORDS["score_tokens"])
    scores, *others = shapes()["score_tokens"]
    with pytest.raises(ValueError, match="no rotated query; call score_clusters with rotated=True"):
        jax.eval_shape(function, scores._replace(rotated=None), *others)


def test_a_tile_that_is_too_small_is_said():
    config = select_clusters.Config(chunk=32, in_registers=True, tile=64)
    function = functools.partial(
        select_clusters.select_clusters, max_candidates=1024, config=config
    )
    with pytest.raises(ValueError, match="a tile of 64 does not hold 96 clusters"):
        jax.eval_shape(function, *shapes()["select_clusters"])


@pytest.mark.parametrize(
    "changes, message",
    [({"head_dim": 80}, "head_dim is 80"), ({"group": 17}, "17 query heads")],
)
def test_what_a_kernel_does_not_know_is_said(changes, message):
    with pytest.raises(NotImplementedError, match=message):
        lower_for(
            "cuda",
            functools.partial(score_clusters.score_clusters, scale=1.0),
            *shapes(**changes)["score_clusters"],
        )
