"""`attend_dense` as a Mosaic GPU kernel for Hopper: flash decoding, a program for each split.

Tokens are the rows of the first product and dimensions those of the second; the query heads are
the columns of both, of which there may be eight. Keys and values come by the TMA, into a ring.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels import mosaic_gpu_route as route
from pallas_kernels.merge_states.reference import merge_states
from pallas_kernels.numerics import log_total
from pallas_kernels.toolbox import launch
from pallas_kernels.toolbox import mosaic_gpu as toolbox
from pallas_kernels.types import MASKED, Rows


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
        splits: parts that a row's tokens are cut into, each a program's; merged afterwards.
        block: tokens that a program attends to at once, a multiple of 64.
        stages: blocks that are on the way, or worked on.
    """

    splits: int
    block: int = 64
    stages: int = 2


def heuristic(rows: int, tokens: int, head_dim: int) -> Config:
    """Fill an H200's processors once, with 64 KiB of keys and values for each program.

    Args:
        rows: sequences times kv heads.
        tokens: room of a sequence.
        head_dim: of the heads.
    """
    programs = 132 * (3 if head_dim <= 128 else 1)
    return Config(max(1, min(programs // rows, tokens // 256)))


def _kernel(
    queries: Any,
    keys: Any,
    values: Any,
    lengths: Any,
    layer_ref: Any,
    outputs: Any,
    logsumexps: Any,
    query: Any,
    key: Any,
    value: Any,
    weights: Any,
    output: Any,
    logsumexp: Any,
    query_came: Any,
    key_came: Any,
    value_came: Any,
    *,
    scale: float,
    padded: int,
    kv_heads: int,
    config: Config,
) -> None:
    """One split of one row: online softmax over its tokens.

    Args:
        queries, keys, values, lengths, layer_ref: `[heads, head_dim]`, `[layers * rows, tokens,
            head_dim]` twice, `[batch]`, `[1]`.
        outputs, logsumexps: results, `[splits, rows, group, head_dim]`, `[splits, rows, group]`.
        query, key, value, weights, output, logsumexp: in shared memory, `[heads, head_dim]`,
            `[stages, block, head_dim]` twice, `[heads, block]`, `[heads, head_dim]`, `[heads]`.
        query_came, key_came, value_came: barriers.
        scale, padded, kv_heads, config: of the op, of the window, of the shape, of the kernel.
    """
    mgpu = route.api()
    (heads, head_dim), (_, rows, group, _) = query.shape, outputs.shape
    block, stages, layout = config.block, config.stages, mgpu.Layout.WGMMA
    part, row = lax.axis_index("part"), lax.axis_index("row")
    window, first_head = toolbox.place_in(heads, padded, row)
    mgpu.copy_gmem_to_smem(queries.at[pl.ds(window, heads)], query, query_came)
    own = layer_ref[0] * rows + row
    # Each sequence's own tokens are cut evenly, so that none of its programs is left without.
    length = jnp.minimum(lengths[lax.div(row, jnp.int32(kv_heads))], keys.shape[1])
    blocks = lax.div(jnp.maximum(length, 0) + (block - 1), jnp.int32(block))
    each = lax.div(blocks + (config.splits - 1), jnp.int32(config.splits))
    count = jnp.clip(blocks - part * each, 0, each)

    def ask(i: Any, slot: Any) -> None:
        at = own, pl.ds((part * each + i) * block, block)
        mgpu.copy_gmem_to_smem(keys.at[at], key.at[slot], key_came.at[slot])
        mgpu.copy_gmem_to_smem(values.at[at], value.at[slot], value_came.at[slot])

    for i in range(stages):
        pl.when(i < count)(functools.partial(ask, i, i))
    mgpu.barrier_wait(query_came)

    def visit(i: Any, carry: Any) -> Any:
        total, mass, peak = carry
        slot = lax.rem(i, jnp.int32(stages))
        # Tokens that there are from the block's first one on.
        rest = length - (part * each + i) * block
        mgpu.barrier_wait(key_came.at[slot])
        logits = scale * route.products(key.at[slot], query.transpose((1, 0)))
        token = mgpu.broadcasted_iota(jnp.int32, (block, heads), 0, layout=layout)
        logits = jnp.where(token < rest, logits, MASKED)
        higher = jnp.maximum(peak, jnp.max(logits, axis=0))
        fade = jnp.exp(peak - higher)
        added = jnp.exp(logits - _for_each(higher, block))
        rounded = mgpu.layout_cast(added.astype(weights.dtype), mgpu.Layout.WGMMA_TRANSPOSED)
        route.store(weights.transpose((1, 0)), rounded)
        mgpu.barrier_wait(value_came.at[slot])

        @pl.when(rest < block)
        def clear() -> None:
            # What is not seen may be NaN, which a weight of zero would not keep out.
            found = route.load(value.at[slot], layout)
            place = mgpu.broadcasted_iota(jnp.int32, found.shape, 0, layout=layout)
            route.store(value.at[slot], jnp.where(place < rest, found, jnp.zeros_like(found)))

        mgpu.commit_smem()

        added_values = route.products(value.at[slot].transpose((1, 0)), weights.transpose((1, 0)))
        total = total * _for_each(fade, head_dim) + added_values
        pl.when(i + stages < count)(functools.partial(ask, i + stages, slot))
        # Each thread keeps a sum of its own: those of a head meet at the end.
        return total, mass * _for_each(fade, block) + added, higher

    start = (
        mgpu.layout_cast(jnp.zeros((head_dim, heads), jnp.float32), layout),
        mgpu.layout_cast(jnp.zeros((block, heads), jnp.float32), layout),
        mgpu.layout_cast(jnp.full((heads,), MASKED, jnp.float32), layout.reduce(0)),
    )
    total, mass, peak = lax.fori_loop(0, count, visit, start)
    weight = jnp.sum(mass, axis=0)
    found = total / _for_each(jnp.where(weight == 0, 1.0, weight), head_dim)
    route.store(output.transpose((1, 0)), mgpu.layout_cast(found, mgpu.Layout.WGMMA_TRANSPOSED))
    route.store(logsumexp, log_total(peak, weight))
    for g in range(group):
        logsumexps[part, row, g] = logsumexp[first_head + g]
    mgpu.commit_smem()
    mgpu.copy_smem_to_gmem(output.at[pl.ds(first_head, group)], outputs.at[part, row])
    mgpu.wait_smem_to_gmem(0)


def _for_each(of_heads: Any, rows: int) -> Any:
    """Repeat `[heads]` for every row: `[rows, heads]`."""
    return lax.broadcast_in_dim(of_heads, (rows, of_heads.shape[0]), [1])


def attend_dense(
    query: Array,
    keys: Rows,
    values: Rows,
    lengths: Array,
    layer: Array | int,
    *,
    scale: float,
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """See `pallas_kernels.attend_dense`.

    Raises:
        NotImplementedError: for head dims, groups, dtypes and GPUs that the kernel is not made for,
            scaled rows, room for no multiple of 8 tokens, and more stages than there is memory for.
    """
    if keys.scales is not None or values.scales is not None:
        raise NotImplementedError("attend_dense: there is no Mosaic GPU kernel for scaled rows")
    batch, kv_heads, group, head_dim = query.shape
    layers, tokens, rows = keys.shape[0], keys.shape[3], batch * kv_heads
    toolbox.check("attend_dense", group, head_dim, query.dtype, keys.dtype, values.dtype)
    if head_dim % toolbox.ROWS:
        raise NotImplementedError(
            f"attend_dense: head_dim is {head_dim}; the Mosaic GPU kernel wants a multiple of 64"
        )
    config = config or heuristic(rows, tokens, head_dim)
    toolbox.check_room("attend_dense", "tokens", tokens, config.block)
    queries, heads, padded = toolbox.window(query)
    mgpu, tiles = route.api(), toolbox.swizzled(head_dim)
    ring = (config.stages, config.block, head_dim)
    scratch = (
        mgpu.SMEM((heads, head_dim), query.dtype, transforms=tiles),
        mgpu.SMEM(ring, query.dtype, transforms=tiles),
        mgpu.SMEM(ring, query.dtype, transforms=tiles),
        mgpu.SMEM((heads, config.block), query.dtype, transforms=toolbox.swizzled(config.block)),
        mgpu.SMEM((heads, head_dim), jnp.float32),
        mgpu.SMEM((heads,), jnp.float32),
        mgpu.Barrier(),
        mgpu.Barrier(num_barriers=config.stages),
        mgpu.Barrier(num_barriers=config.stages),
    )
    taken = 2 * query.dtype.itemsize * config.stages * config.block * head_dim
    if taken + 32 * 1024 > toolbox.SHARED_BYTES:
        raise NotImplementedError(
            f"attend_dense: {config} takes {taken} bytes of shared memory for keys and values; the "
            f"Mosaic GPU kernel wants 32 KiB less than {toolbox.SHARED_BYTES}"
        )
    outputs, logsumexps = route.call(
        functools.partial(_kernel, scale=scale, padded=padded, kv_heads=kv_heads, config=config),
        results=[
            jax.ShapeDtypeStruct((config.splits, rows, group, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((config.splits, rows, group), jnp.float32),
        ],
        scratch=scratch,
        grid={"part": config.splits, "row": rows},
        name="attend_dense",
        interpret=interpret,
    )(
        queries,
        *(x.data.reshape(layers * rows, tokens, head_dim) for x in (keys, values)),
        lengths.astype(jnp.int32),
        launch.scalar(layer)[None],
    )
    heads_of = (config.splits, batch, kv_heads, group)
    outputs, logsumexps = outputs.reshape(*heads_of, head_dim), logsumexps.reshape(heads_of)
    if config.splits == 1:
        return outputs[0], logsumexps[0]
    return merge_states(outputs, logsumexps)
