"""The beginning of a kept sequence: its arrays as if no more than so many tokens had been read.

Whole segments of the index are taken as they are. Of a segment that is cut the rows are kept, so
that its tokens are clustered anew and not read anew by the model.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int

from pallas_kernels.rounding import dequantise
from pallas_kernels.types import Rows
from wavejax.config import WaveConfig
from wavejax.documents.stored_arrays import StoredArray
from wavejax.engine.prompts import common_prefix
from wavejax.store.index import WaveIndex, append_segments


class Cut(NamedTuple):
    """How a kept sequence of wave attention is cut.

    Attributes:
        length: tokens that are taken.
        sinks: of them, sinks.
        kept: indexed tokens whose segments are taken as they are.
        indexed: indexed tokens, those that are clustered anew included.
        prompt_tokens: of them, those in segments of a prompt's size.
    """

    length: int
    sinks: int
    kept: int
    indexed: int
    prompt_tokens: int

    @property
    def window(self) -> int:
        """Tokens in the window."""
        return self.length - self.sinks - self.indexed


def reusable(kept: Int[np.ndarray, "_kept"], prompt: Int[np.ndarray, "_prompt"]) -> int:
    """Count the tokens of a prompt that need not be read: those that it begins with alike.

    The last token of a prompt is read anew where what is kept goes on after it: what comes next is
    not kept.
    """
    alike = common_prefix(kept, prompt)
    return alike - 1 if alike == len(prompt) < len(kept) else alike


def cut_at(config: WaveConfig, length: int, indexed: int, prompt_tokens: int) -> Cut:
    """Say how a kept sequence is cut.

    Args:
        config: the settings.
        length: tokens to take.
        indexed: tokens in the kept index.
        prompt_tokens: of them, those that came with the prompt.
    """
    sinks = min(length, config.sink_tokens)
    wanted = min(config.indexed_tokens(length), indexed)
    if wanted >= prompt_tokens:
        # Segments that grew are taken whole or not at all: the window has room for one of them.
        grown = (wanted - prompt_tokens) // config.growth_tokens * config.growth_tokens
        return Cut(length, sinks, prompt_tokens + grown, prompt_tokens + grown, prompt_tokens)
    kept = wanted // config.segment_tokens * config.segment_tokens
    return Cut(length, sinks, kept, wanted, wanted)


def cut_arrays(
    cut: Cut, kept: Mapping[str, np.ndarray], axes: Mapping[str, tuple[str, ...]]
) -> dict[str, np.ndarray]:
    """Cut the arrays of the index and the steady zone, but for the window.

    Args:
        cut: how.
        kept: the arrays, by name.
        axes: the names of their axes.
    """
    offsets = kept["index/offsets"]
    clusters = np.sum(offsets[..., :-1] < cut.kept, axis=-1, dtype=np.int32)
    most = int(clusters.max(initial=0))
    sizes = {"tokens": cut.kept, "clusters": most, "cluster_edges": most + 1}
    found = {
        name: array[tuple(slice(sizes.get(axis)) for axis in axes[name])]
        for name, array in kept.items()
    }
    return found | {
        "index/offsets": np.minimum(found["index/offsets"], cut.kept),
        "index/num_clusters": clusters,
        "index/tokens": np.asarray(cut.indexed, np.int32),
        "index/prompt_tokens": np.asarray(cut.prompt_tokens, np.int32),
        "steady/sink_tokens": np.asarray(cut.sinks, np.int32),
        "steady/window_tokens": np.asarray(cut.window, np.int32),
    }


def map_store(files: Mapping[str, StoredArray], layer: int, rows: str, scales: str) -> Rows:
    """Map a layer's kept row store; who reads it has it checked.

    Args:
        files: a document's, by name.
        layer: which layer.
        rows, scales: the names that the store's arrays are kept under; scales may be none.
    """
    data, beside = (files.get(f"{name}/{layer}") for name in (rows, scales))
    mapped: Any = data and data.map(), beside and beside.map()
    return Rows(*mapped)


def rows_between(store: Rows, window: np.ndarray, start: int, end: int) -> np.ndarray:
    """Take one layer's KV rows from a store row to another, `[kv_heads, end - start, 2, head_dim]`.

    Args:
        store: the kept row store of that layer, its data `[kv_heads, indexed, 2, head_dim]`.
        window: the kept window of that layer, whose first row follows the store's last.
        start, end: store rows.
    """
    indexed = store.shape[1]
    taken = jax.tree.map(lambda array: array[:, start : min(end, indexed)], store)
    parts = [
        np.asarray(dequantise(jax.tree.map(jnp.asarray, taken)))
        if taken.scales is not None
        else taken.data,
        window[:, max(0, start - indexed) : max(0, end - indexed)],
    ]
    return np.concatenate(parts, axis=1)


def cluster_cut_segment(
    config: WaveConfig, index: WaveIndex, slot: int, cut: Cut, layer: int, rows: np.ndarray
) -> WaveIndex:
    """Cluster in one layer the tokens of the segment that was cut; donates `index`.

    Args:
        config: the settings.
        index: with the whole segments in the slot.
        slot: whose.
        cut: how it was cut.
        layer: which layer.
        rows: `[kv_heads, new, 2, head_dim]`, from store row `cut.kept` on.
    """
    room = index.token_ids.shape[-1] - int(index.growths) * config.growth_tokens
    width = max(rows.shape[1], min(config.segment_tokens, room - cut.kept))
    padded = np.pad(rows, [(0, 0), (0, width - rows.shape[1]), (0, 0), (0, 0)])
    numbers = (layer, slot, cut.kept, rows.shape[1], cut.indexed)
    return _cluster(config, index, *map(jnp.int32, numbers), padded[None])


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _cluster(
    config: WaveConfig,
    index: WaveIndex,
    layer: Array,
    slot: Array,
    start: Array,
    count: Array,
    tokens: Array,
    rows: Any,
) -> WaveIndex:
    return append_segments(index, config, layer, slot, start, rows, count[None], tokens)
