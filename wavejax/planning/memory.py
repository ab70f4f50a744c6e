"""What a run needs of memory, from shapes alone, and what there is."""

import dataclasses
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import psutil
from jax.typing import DTypeLike

from models.config import ModelConfig
from models.decoder import mlp_block
from models.parameters import parameter_shapes
from wavejax.attention.causal import query_block
from wavejax.attention.dense import DenseAttention
from wavejax.attention.wave import WaveAttention, WaveState
from wavejax.engine.prompts import answer_room, bucket
from wavejax.engine.sampling import Sampler
from wavejax.store.index import segments_at_once
from wavejax.store.rows import StoreKind
from wavejax.store.shape import CacheShape
from wavejax.store.sizes import segment_sizes

PINNED_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
DEVICE_FRACTION = "XLA_CLIENT_MEM_FRACTION"
_OLD_DEVICE_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
_DEFAULT_PINNED_LIMIT = 64 * 2**30
_CGROUP = Path("/sys/fs/cgroup")


@dataclasses.dataclass(frozen=True)
class MemoryNeed:
    """Bytes that a run takes at most.

    Attributes:
        weights: the parameters, on the device.
        index: the wave index, on the device; 0 for full attention.
        cache: the row cache and its table, on the device; where there is none, its counters.
        steady: the steady zone, on the device.
        rows: all tokens' keys and values: the row store, or full attention's cache.
        rows_on: where `rows` are.
        workspace: what reading the longest prompt, or a decode step, takes besides, on the device.
        loading: host memory that reading the weights takes for a while, where the device has
            memory of its own: the largest stack of layers.
        slots: rows that the cache holds, in each layer, sequence and kv head; 0 without a cache.
        staged: whether `rows` on the host are staged (`engine.staged`), in memory not pinned.
    """

    weights: int
    index: int
    cache: int
    steady: int
    rows: int
    rows_on: StoreKind
    workspace: int
    loading: int
    slots: int
    staged: bool

    @property
    def state(self) -> int:
        """Bytes of the attention's state on the device."""
        on_device = self.rows if self.rows_on == "device" else 0
        return self.index + self.cache + self.steady + on_device

    @property
    def device(self) -> int:
        """Bytes on the device."""
        return self.weights + self.state + self.workspace

    @property
    def host(self) -> int:
        """Bytes of host memory, pinned or not."""
        return self.rows if self.rows_on == "host" else 0

    @property
    def pinned(self) -> int:
        """Bytes of host memory that XLA pins."""
        return 0 if self.staged else self.host


def memory_need(
    model: ModelConfig,
    attention: WaveAttention | DenseAttention,
    batch: int,
    prompt_tokens: int,
    new_tokens: int,
    dtype: DTypeLike,
    sampler: Sampler | None = None,
) -> MemoryNeed:
    """Computes the need from shapes alone; allocates nothing.

    Starts no device, but for rows in host memory whose `fetch` is the platform's to choose.

    Args:
        model: the model's sizes.
        attention: whose state is counted.
        batch: sequences.
        prompt_tokens: of the longest prompt.
        new_tokens: to generate.
        dtype: of weights and state.
        sampler: how tokens are drawn; None: in the way that takes most.
    """
    room, answer = bucket(prompt_tokens), answer_room(new_tokens)
    on_device = attention
    if isinstance(attention, WaveAttention):
        # `eval_shape` traces, and placing an array in host memory is no traced operation.
        cached = attention.has_cache
        on_device = dataclasses.replace(attention, store="device", cached=cached)
    state = jax.eval_shape(
        lambda: on_device.init_state(CacheShape.of(model), batch, room, answer, dtype)
    )
    sizes = [math.prod(shape) for shape in parameter_shapes(model).values()]
    itemsize = jnp.dtype(dtype).itemsize
    total = _bytes(state)
    index = cache = steady = slots = 0
    rows, rows_on, staged, on_the_way = total, "device", False, (0, 0)
    if isinstance(attention, WaveAttention):
        index, cache, rows = _bytes(state.index), _bytes(state.cache), _bytes(state.store)
        steady, rows_on = total - index - cache - rows, attention.store
        slots = state.cache.rows.shape[3]
        staged = attention.staged
        if staged:
            on_the_way = _on_the_way(attention, state)
    return MemoryNeed(
        weights=sum(sizes) * itemsize,
        index=index,
        cache=cache,
        steady=steady,
        rows=rows,
        rows_on=rows_on,  # type: ignore[arg-type]
        workspace=max(
            _prefill_workspace(model, attention, room, itemsize) + on_the_way[0],
            _decode_workspace(model, state, batch, itemsize, sampler) + on_the_way[1],
        ),
        loading=max(sizes) * itemsize,
        slots=slots,
        staged=staged,
    )


def _bytes(tree: object) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _on_the_way(attention: WaveAttention, state: WaveState) -> tuple[int, int]:
    """Bytes on the device of staged rows on their way: as a prompt is read, and in a step."""
    rows = state.store.rows
    layers, batch, kv_heads, tokens = rows.shape[:4]
    token = kv_heads * rows.row_bytes
    # A layer's rows leave while the next one is computed.
    prompt = tokens * token
    # Those of two layers, and one layer's as they are attended to, values in float32.
    missed = 4 * batch * attention.config.most_retrieved(tokens) * token
    # A growth's leave in all layers at once, while the next sequence's are cut out.
    grown = 2 * layers * attention.config.growth_tokens * token
    return prompt, max(missed, grown)


def _layer_weights(model: ModelConfig, itemsize: int) -> int:
    """Bytes of one layer's weights: XLA may copy them out of the stack of all layers."""
    stacks = [shape for path, shape in parameter_shapes(model).items() if path[0] == "layers"]
    return itemsize * sum(math.prod(shape[1:]) for shape in stacks)


def _prefill_workspace(
    model: ModelConfig, attention: WaveAttention | DenseAttention, room: int, itemsize: int
) -> int:
    """Bytes of one layer's temporaries, for a padded prompt; see `Generator.start`."""
    query, rows = model.num_heads * model.head_dim, 2 * model.num_kv_heads * model.head_dim
    # The layer's input and output, and the input before, for which progress is waited.
    residual = 3 * model.hidden_size * itemsize * room
    # The MLP's gate, up and their product, of a block of tokens or of them all.
    mlp = 3 * model.intermediate_size * itemsize * mlp_block(room)
    mlp += model.hidden_size * itemsize * room
    # Query, key and value, each as computed and heads first; the sections' outputs, and these
    # side by side; the logits of one block of queries, as they are, exponentiated, and rounded.
    block = query_block(room, model.num_heads) * model.num_heads * (8 + itemsize)
    attended = room * (2 * (2 * query + rows) * itemsize + block)
    clusters = 0
    if isinstance(attention, DenseAttention):
        # Keys and values heads first, and once more as the cache is written; then the block of
        # queries is over.
        written = room * (4 * (query + rows) + query // 4) * itemsize
        attended = max(attended + room * rows * itemsize // 2, written)
    else:
        # The rows side by side, padded for the window, and cut for the store; attention is over.
        written = room * (4 * rows + query) * itemsize
        attended = max(attended, written)
        clusters = _cluster_workspace(model, attention, room, itemsize)
    return _layer_weights(model, itemsize) + residual + max(mlp, attended) + clusters


def _cluster_workspace(
    model: ModelConfig, attention: WaveAttention, room: int, itemsize: int
) -> int:
    """Bytes of temporaries of the calls that build a prompt's index, in plain JAX or by kernels."""
    config, kv_heads, head_dim = attention.config, model.num_kv_heads, model.head_dim
    sizes = segment_sizes(config, config.indexed_tokens(room))
    if not sizes:
        return 0
    # Made room for are the smallest clusters that a prompt of this room may have.
    clusters = -(-sizes[0] // config.size_steps[-1][0])
    # Plain JAX, segment by segment: keys and values in float32, centred keys, and what encoding
    # makes of them; the scores of all clusters and the matrix that sums members.
    plain = 4 * kv_heads * sizes[0] * (6 * head_dim + 3 * clusters)
    # Of all the call's segments: keys, values, centred keys, the same in cluster order, their
    # centroids; sums of the pieces; numbers.
    tokens = sizes[0] * segments_at_once(len(sizes), kv_heads)
    return plain + kv_heads * tokens * (head_dim * (5 * itemsize + 1) + 32)


def _drawing_workspace(model: ModelConfig, batch: int, sampler: Sampler | None) -> int:
    """Bytes that drawing a token of each sequence takes."""
    logits = 4 * batch * model.vocab_size
    # The logits, scaled, and noise. Ranked are tokens with their logits, before and after; of the
    # ranked there are probabilities, their sums, what is kept, and noise.
    ranked = model.vocab_size
    if sampler is not None:
        ranked = sampler.width(ranked) if sampler.ranks_tokens else 0
    return 3 * logits + 14 * batch * ranked


def _decode_workspace(
    model: ModelConfig, state: object, batch: int, itemsize: int, sampler: Sampler | None
) -> int:
    """Bytes of a decode step's temporaries, in plain JAX; its kernels take less."""
    drawing = _drawing_workspace(model, batch, sampler)
    if isinstance(state, WaveState):
        _, _, kv_heads, clusters, head_dim = state.index.centroids.shape
        window = state.steady.window.shape[3] + state.steady.sink.shape[3]
        group = model.num_heads // model.num_kv_heads
        # Centroids and mean values in float32, of which those that are so need no copy but one; a
        # number for each cluster and query head, some for each token; the steady rows, once as they
        # are and once without what is not valid.
        copies = 2 if itemsize < 4 else 1
        layer = 4 * clusters * (copies * head_dim + 4 * group)
        layer += 8 * state.index.token_ids.shape[-1]
        layer += 2 * window * 2 * head_dim * itemsize
    else:
        _, _, kv_heads, tokens, head_dim = state.keys.shape  # type: ignore[attr-defined]
        # A layer's keys and values, and its values in float32.
        layer = tokens * head_dim * (2 * itemsize + 4)
    return _layer_weights(model, itemsize) + drawing + batch * kv_heads * layer


@dataclasses.dataclass(frozen=True)
class FreeMemory:
    """Bytes that a run may take.

    Attributes:
        device: of the device's own memory; None where that is the host's, as on a CPU.
        host: of the host's memory.
        pinned: the most that XLA will pin of it.
        name: the device's.
    """

    device: int | None
    host: int
    pinned: int = _DEFAULT_PINNED_LIMIT
    name: str = "cpu"


def free_memory() -> FreeMemory:
    """Asks JAX and the system; starts the device."""
    device = jax.local_devices()[0]
    stats = device.memory_stats()
    own = None
    if stats is not None and "bytes_limit" in stats:
        # What XLA set aside for this process as it started: not all that the device has.
        own = stats["bytes_limit"] - stats["bytes_in_use"]
    limit = os.environ.get(PINNED_LIMIT, "")
    pinned = int(limit) * 2**30 if limit.isdigit() else _DEFAULT_PINNED_LIMIT
    return FreeMemory(own, host_available(), pinned, getattr(device, "device_kind", "device"))


def host_available() -> int:
    """Bytes of host memory that this process may take: the system's, or its container's."""
    available = psutil.virtual_memory().available
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most = int((_CGROUP / limit).read_text())
            now = int((_CGROUP / used).read_text())
            stat = (_CGROUP / limit).with_name("memory.stat").read_text()
        except (OSError, ValueError):
            continue  # no such limit, or "max"
        # Files that were read count as used, and are dropped when memory is wanted.
        kept = dict(line.split(maxsplit=1) for line in stat.splitlines() if " " in line)
        available = min(available, most - now + int(kept.get(cache, 0)))
    return max(0, available)


def set_memory_limits(pinned_bytes: int) -> None:
    """Lets XLA pin so much host memory, and take nine tenths of a GPU's memory.

    Must come before JAX's first use of a device, and changes nothing that the user has set. XLA
    pins memory in powers of two as far as its limit lets it: a limit just above the need keeps it
    from pinning, for a store of 33 GiB, another 31.
    """
    os.environ.setdefault(PINNED_LIMIT, str(-(-pinned_bytes // 2**30)))
    if not {DEVICE_FRACTION, _OLD_DEVICE_FRACTION} & os.environ.keys():
        # XLA's own default is three quarters.
        os.environ[DEVICE_FRACTION] = "0.9"
