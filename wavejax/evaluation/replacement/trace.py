"""Selection traces: which rows each decode step retrieves, in each layer and kv head."""

import dataclasses
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from models.errors import InputError
from models.parameters import Params
from pallas_kernels.rows import is_held
from pallas_kernels.select_tokens import segment_start
from pallas_kernels.types import RowTable
from wavejax.attention.wave import WaveAttention, WaveState
from wavejax.config import WaveConfig
from wavejax.engine.generator import DecodeState, Generator

NO_ROW = -1


@dataclasses.dataclass(frozen=True)
class Trace:
    """What one sequence's decode steps retrieved.

    Attributes:
        rows: `[steps, layers, kv_heads, most]` int32, the retrieved tokens of each step, rising;
            NO_ROW past the last one.
        order: `[layers, kv_heads, tokens]` int32, the token at each index position: all indexed
            tokens in the order of their clusters.
        about: what was run: method, settings, accuracy, text.
    """

    rows: np.ndarray
    order: np.ndarray
    about: dict[str, Any]

    def save(self, file: Path) -> None:
        """Write a compressed .npz, rows as the smallest unsigned integers that hold them."""
        small = np.min_scalar_type(self.order.shape[-1])
        # NO_ROW wraps around to the largest number, which is no token.
        np.savez_compressed(
            file,
            rows=self.rows.astype(small),
            order=self.order.astype(small),
            about=np.array(json.dumps(self.about)),
        )

    @classmethod
    def load(cls, file: Path) -> "Trace":
        """Read what `save` wrote. InputError if the file is missing or holds something else."""
        try:
            with np.load(file) as arrays:
                rows, order = arrays["rows"], arrays["order"]
                about = json.loads(str(arrays["about"]))
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise InputError(f"{file} is not a trace: {error}; record one first") from None
        none = rows == np.iinfo(rows.dtype).max
        return cls(np.where(none, NO_ROW, rows.astype(np.int32)), order.astype(np.int32), about)


def tracing(config: WaveConfig) -> WaveAttention:
    """Attention of these settings whose state tells what each step retrieved (`record`).

    Its row cache holds every row, so nothing is ever evicted, and the slots last used in a step are
    exactly the rows retrieved in it: a trace needs nothing in the step that is not there anyway.
    """
    config = dataclasses.replace(config, cache_fraction=1.0)
    return WaveAttention(config, store="device", cached=True)


def record(
    generator: Generator,
    params: Params,
    state: DecodeState,
    answer: Int[np.ndarray, " steps"],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Trace, Float[np.ndarray, "steps vocab"]]:
    """Run an answer's tokens through the decode step and record what each retrieves.

    Args:
        generator: its attention is `tracing(...)`.
        params: the model's.
        state: one sequence's, its prompt read; donated.
        answer: the tokens to force.
        progress: called with the steps done and all steps.

    Returns:
        the trace, and the logits from which each of the tokens would have been drawn.
    """
    config = generator.attention.config  # type: ignore[attr-defined]
    steps, logits = [], []
    for i, token in enumerate(answer.tolist()):
        state, given = generator.force(params, state, jnp.full((1, 1), token, jnp.int32))
        logits.append(np.asarray(given[0, 0]))
        held = _wave_state(state)
        steps.append(np.asarray(_used(held.cache.table, held.step - 1))[:, 0])
        progress(i + 1, len(answer))
    order = _cluster_order(config, _wave_state(state))
    return Trace(_list_rows(steps), order, {}), np.stack(logits)


def _wave_state(state: DecodeState) -> WaveState:
    assert isinstance(state.attention_state, WaveState)
    return state.attention_state


@jax.jit
def _used(table: RowTable, step: Int[Array, ""]) -> Bool[Array, "layers batch kv_heads tokens"]:
    """Mark the rows whose slots were last used in that step."""
    slots = table.slot_of_token
    last = jnp.take_along_axis(table.last_used, jnp.maximum(slots, 0), axis=-1)
    return is_held(slots) & (last == step)


def _list_rows(steps: list[np.ndarray]) -> np.ndarray:
    most = max(int(used.sum(-1).max()) for used in steps)
    rows = np.full((len(steps), *steps[0].shape[:2], most), NO_ROW, np.int32)
    for listed, used in zip(rows, steps, strict=True):
        layer, head, token = np.nonzero(used)
        nth = (np.cumsum(used, axis=-1) - 1)[layer, head, token]
        listed[layer, head, nth] = token
    return rows


def _cluster_order(config: WaveConfig, state: WaveState) -> np.ndarray:
    tokens = int(state.index.tokens[0])
    ids = np.asarray(state.index.token_ids)[:, 0, :, :tokens].astype(np.int32)
    start = segment_start(
        jnp.arange(tokens)[None],
        state.index.prompt_tokens,
        config.segment_tokens,
        config.growth_tokens,
    )
    return ids + np.asarray(start[0], np.int32)
