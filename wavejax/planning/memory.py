"""What a run needs of memory, from shapes alone."""

import dataclasses
import math

import jax.numpy as jnp
from jax.typing import DTypeLike

from models.config import ModelConfig
from models.decoder import mlp_block
from models.formats import Formats, bytes_by_parameter
from models.parameters import Path, parameter_shapes
from wavejax.attention.causal import query_block
from wavejax.attention.footprint import Footprint
from wavejax.attention.protocol import AnyAttention
from wavejax.attention.state_shapes import state_shapes
from wavejax.engine.prompts import answer_room, bucket, least_of_bucket
from wavejax.engine.sampling import Sampler
from wavejax.store.rows import StoreKind
from wavejax.store.shape import CacheShape


@dataclasses.dataclass(frozen=True)
class MemoryNeed:
    """Bytes that a run takes at most.

    Attributes:
        weights: the parameters, on the device.
        index: the wave index, on the device; 0 for full attention.
        cache: the row cache and its table, on the device; where there is none, its counters.
        steady: the steady zone, and scales of rows in int8, on the device. Of full attention the
            scales alone.
        rows: all tokens' keys and values: the row store, or full attention's cache.
        rows_on: where `rows` are.
        workspace: what reading the longest prompt, or a decode step, takes besides, on the device.
        largest_stack: of `weights`, the largest parameter of all layers together.
        loading: host memory that reading the weights takes for a while, where the device has
            memory of its own: the largest stack of layers; where that is quantised, one matrix in
            float32 besides.
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
    largest_stack: int
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
    attention: AnyAttention,
    batch: int,
    prompt_tokens: int,
    new_tokens: int,
    dtype: DTypeLike,
    sampler: Sampler | None = None,
    shortest_prompt: int = 1,
    formats: Formats | None = None,
) -> MemoryNeed:
    """Compute the need from shapes alone; allocate nothing.

    Starts no device, but for rows in host memory whose `fetch` is the platform's to choose.

    Args:
        model: the model's sizes.
        attention: whose state is counted.
        batch: sequences.
        prompt_tokens: of the longest prompt.
        new_tokens: to generate.
        dtype: of weights and state.
        sampler: how tokens are drawn; None: in the way that takes most.
        shortest_prompt: tokens of the shortest one.
        formats: of the weights that are not of that dtype.
    """
    room, formats = bucket(prompt_tokens), formats or {}
    held = footprint(model, attention, batch, prompt_tokens, new_tokens, dtype, shortest_prompt)
    itemsize = jnp.dtype(dtype).itemsize
    sizes = bytes_by_parameter(model, itemsize, formats)
    loading = [
        size + (4 * _matrix_size(model, path) if path in formats else 0)
        for path, size in sizes.items()
    ]
    staged = attention.staged
    weights = _weights_workspace(model, itemsize, formats)
    reading = weights + _prefill_workspace(model, held, room, itemsize, bool(formats))
    step = weights + _drawing_workspace(model, batch, sampler) + held.step
    if staged:
        reading, step = reading + held.prompt_transfer, step + held.step_transfer
    return MemoryNeed(
        weights=sum(sizes.values()),
        index=held.index,
        cache=held.cache,
        steady=held.steady,
        rows=held.rows,
        rows_on=attention.store,
        workspace=max(reading, step),
        largest_stack=max(size for path, size in sizes.items() if path[0] == "layers"),
        loading=max(loading),
        slots=held.slots,
        staged=staged,
    )


def footprint(
    model: ModelConfig,
    attention: AnyAttention,
    batch: int,
    prompt_tokens: int,
    new_tokens: int,
    dtype: DTypeLike,
    shortest_prompt: int = 1,
) -> Footprint:
    """Count what an attention takes, from shapes alone; start no device. Arguments as above."""
    shape, room = CacheShape.of(model), bucket(prompt_tokens)
    sizes = batch, room, answer_room(new_tokens), jnp.dtype(dtype)
    state = state_shapes(attention, shape, *sizes, least_of_bucket(shortest_prompt))
    return attention.footprint(state, shape, model.num_heads, room, dtype)


def _weights_workspace(model: ModelConfig, itemsize: int, formats: Formats) -> int:
    """Bytes of one layer's weights: XLA may copy them out of the stack of all layers.

    And of what is quantised of a layer, and of the larger table, as floats: XLA may dequantise
    all of a layer's matrices before the first product.
    """
    sizes = bytes_by_parameter(model, itemsize, formats)
    layer = sum(size // model.num_layers for path, size in sizes.items() if path[0] == "layers")
    floats = {path: itemsize * _matrix_size(model, path) for path in formats}
    of_layer = sum(size for path, size in floats.items() if path[0] == "layers")
    return layer + of_layer + max((x for path, x in floats.items() if len(path) == 1), default=0)


def _matrix_size(model: ModelConfig, path: Path) -> int:
    """Count the numbers of a parameter, or of one layer's part of a stack."""
    size = math.prod(parameter_shapes(model)[path])
    return size // model.num_layers if path[0] == "layers" else size


def _prefill_workspace(
    model: ModelConfig, held: Footprint, room: int, itemsize: int, wide: bool
) -> int:
    """Bytes of one layer's temporaries, for a padded prompt; see `Generator.start`.

    `wide`: products may be float32 before they are scaled.
    """
    query, rows = model.num_heads * model.head_dim, 2 * model.num_kv_heads * model.head_dim
    # The layer's input and output, and the input before, for which progress is waited.
    residual = 3 * model.hidden_size * itemsize * room
    # The MLP's gate, up and their product, of a block of tokens or of them all.
    product = max(4, itemsize) if wide else itemsize
    mlp = model.intermediate_size * (2 * product + itemsize) * mlp_block(room)
    mlp += model.hidden_size * itemsize * room
    # Query, key and value, each as computed and heads first; the sections' outputs, and these
    # side by side; the logits of one block of queries, as they are, exponentiated, and rounded.
    block = query_block(room, model.num_heads) * model.num_heads * (8 + itemsize)
    attended = room * (2 * (2 * query + rows) * itemsize + block)
    attended = max(attended + held.beside_attention, held.writing)
    return residual + max(mlp, attended) + held.indexing


def _drawing_workspace(model: ModelConfig, batch: int, sampler: Sampler | None) -> int:
    """Bytes that drawing a token of each sequence takes."""
    logits = 4 * batch * model.vocab_size
    # The logits, scaled, and noise. Ranked are tokens with their logits, before and after; of the
    # ranked there are probabilities, their sums, what is kept, and noise.
    vocab = ranked = model.vocab_size
    if sampler is not None:
        # As `settings_of` rounds it.
        width = 2 ** (sampler.width(vocab) - 1).bit_length()
        ranked = min(width, vocab) if sampler.ranks_tokens else 0
    # Of what is said there are counts, what of it is in the prompt, and the logits less penalties.
    counted = 0 if sampler is not None and not sampler.penalises else logits + 5 * batch * vocab
    return 3 * logits + 14 * batch * ranked + counted
