"""`score_tokens` as a Triton kernel: one program scores a run of a row's candidates."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels import backend as plt
from pallas_kernels import tuning
from pallas_kernels.score_tokens import _by_floats, _by_integers, _query
from pallas_kernels.score_tokens._members import Members
from pallas_kernels.score_tokens.reference import query_of
from pallas_kernels.toolbox import launch
from pallas_kernels.types import (
    MASKED,
    WORD_BITS,
    Candidates,
    ClusterScores,
    PackedQuery,
    TokenCodes,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
        block: candidates that a program scores; with integers a multiple of its threads.
        integers: multiply the codes with an int8 query, in CUDA's assembly; otherwise with
            bfloat16 parts of the query, by Triton's `dot`.
        num_warps: see Triton.
    """

    block: int = 512
    integers: bool = True
    num_warps: int = 4

    @property
    def threads(self) -> int:
        """A program's."""
        return 32 * self.num_warps


def heuristic(rows: int, candidates: int, dtype: str) -> Config:
    """Choose a config for shapes that were not tuned.

    Args:
        rows, candidates: how many rows, and room for how many candidates of each.
        dtype: of the scales.

    An int8 query errs about as much as a bfloat16 one. Where the scales are float32, as in a
    model that is, it would be the largest error.
    """
    if dtype == "float32" or not plt.takes_assembly():
        return Config(min(128, launch.tile(candidates, launch.DOT_TILE)), integers=False)
    # Four candidates a thread; two where they are few, for programs enough for a large GPU.
    block = min(256, launch.tile(candidates, 32))
    return Config(block, num_warps=min(4 if rows * candidates <= 2**19 else 2, block // 32))


def _kernel(
    query_ref: Any,
    factors_ref: Any,
    shifts_ref: Any,
    logits_ref: Any,
    logsumexp_ref: Any,
    clusters_ref: Any,
    starts_ref: Any,
    granules_ref: Any,
    offsets_ref: Any,
    codes_ref: Any,
    scales_ref: Any,
    layer_ref: Any,
    log_mass_ref: Any,
    *,
    scale: float,
    head_dim: int,
    config: Config,
    emulate: bool,
) -> None:
    _, kv_heads, _, _ = logits_ref.shape
    part, row = pl.program_id(0), pl.program_id(1)
    b, h, layer = row // kv_heads, row % kv_heads, layer_ref[...]
    count = plt.load(starts_ref.at[b, h, jnp.int32(starts_ref.shape[-1] - 1)])
    by_floats = codes_ref is not None and not config.integers
    # CUDA's assembly takes one candidate a thread at a time.
    size = config.threads if config.integers else config.block
    firsts = range(0, config.block, size)
    places = [part * config.block + first + jnp.arange(size) for first in firsts]

    def store(place: Any, log_mass: Any) -> None:
        inside = place < log_mass_ref.shape[-1]
        log_mass = jnp.where(place < count, log_mass, MASKED)
        plt.store(log_mass_ref.at[b, h, place], log_mass, mask=inside)

    @pl.when(part * config.block >= count)
    def fill() -> None:
        for place in places:
            store(place, jnp.full(size, MASKED, jnp.float32))

    @pl.when(part * config.block < count)
    def score() -> None:
        members = Members(clusters_ref, starts_ref, granules_ref, offsets_ref)
        operands = logits_ref, logsumexp_ref, members, codes_ref, scales_ref, (layer, b, h)
        if by_floats:
            [place] = places
            log_masses = [
                _by_floats.score(
                    *(query_ref, *operands, place, place < count),
                    scale=scale,
                    head_dim=head_dim,
                )
            ]
        else:
            query = query_ref, factors_ref, shifts_ref
            log_masses = _by_integers.score(
                query, *operands, places, count, emulate=emulate or not config.integers
            )
        for place, log_mass in zip(places, log_masses, strict=True):
            store(place, log_mass)


def score_tokens(
    scores: ClusterScores,
    candidates: Candidates,
    offsets: Array,
    codes: TokenCodes | None,
    layer: Array | int,
    *,
    scale: float,
    max_candidates: int,
    config: Config | None = None,
    interpret: bool = False,
) -> Array:
    """See `pallas_kernels.score_tokens`.

    Raises:
        NotImplementedError: for head dims and groups that the kernel is not made for.
        ValueError: the config's block is none of what `Config` says, or a packed query meets a
            config without integers.
    """
    logits, logsumexp, *_ = scores
    query = query_of(scores)
    bits, scales = (None, None) if codes is None else codes
    if isinstance(query, PackedQuery):
        # It does not say its head dim; any from the codes' last word takes the same.
        head_dim = 0 if bits is None else WORD_BITS * bits.shape[-1]
        dtype = "bfloat16"
    else:
        head_dim = query.shape[-1]
        launch.check_heads("score_tokens", logits.shape[2], head_dim, query.dtype)
        dtype = "float32" if scales is None else jnp.dtype(scales.dtype).name
    # Only what is read: an operand of no use would stay one of the program's.
    operands = (
        *(None if codes is None else query, logits, logsumexp),
        *(candidates.clusters, candidates.starts, candidates.granules, offsets),
        *(bits, scales, launch.scalar(layer)),
    )
    score: Callable[..., Array] = plt.per_platform(_score)
    return score(
        *operands,
        scale=scale,
        head_dim=head_dim,
        dtype=dtype,
        max_candidates=max_candidates,
        config=config,
        interpret=interpret,
    )


def _score(
    query: Array | PackedQuery | None,
    *operands: Any,
    scale: float,
    head_dim: int,
    dtype: str,
    max_candidates: int,
    config: Config | None,
    interpret: bool,
) -> Any:
    """Call the kernel, with the query in the form that it takes.

    Args:
        query: None without codes.
        operands: the kernel's others, of refs from `logits_ref` on.
        scale, max_candidates, config, interpret: see `score_tokens`.
        head_dim: of the query.
        dtype: of the scales.
    """
    batch, kv_heads, group, _ = operands[0].shape
    config = config or tuning.config(
        "score_tokens",
        heuristic(batch * kv_heads, max_candidates, dtype),
        rows=batch * kv_heads,
        candidates=max_candidates,
        head_dim=head_dim,
        group=group,
        dtype=dtype,
    )
    if config.integers and config.block % config.threads:
        raise ValueError(
            f"score_tokens: a block of {config.block} candidates is no multiple of "
            f"{config.threads} threads; give one, or integers=False"
        )
    if isinstance(query, PackedQuery) and not plt.takes_assembly():
        query = _query.unpack(query, head_dim, scale=scale)
    form: tuple[Any, Any, Any] = (None, None, None)
    if isinstance(query, PackedQuery):
        if not config.integers:
            raise ValueError(
                "score_tokens: a packed query is of integers, the config has none; give one with "
                "integers=True, or the rotated query"
            )
        form = query
    elif query is not None and config.integers:
        form = _query.pack(query, scale=scale, interpret=interpret)
    elif query is not None:
        form = (_query.split(query), None, None)
    return launch.call(
        functools.partial(
            _kernel, scale=scale, head_dim=head_dim, config=config, emulate=interpret
        ),
        (*form, *operands),
        jax.ShapeDtypeStruct((batch, kv_heads, max_candidates), jnp.float32),
        (pl.cdiv(max_candidates, config.block), batch * kv_heads),
        name="score_tokens",
        num_warps=config.num_warps,
        interpret=interpret,
    )
