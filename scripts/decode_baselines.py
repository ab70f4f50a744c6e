"""Baselines of a decode benchmark: sparse decoding managed by the host, and transformers' Llama."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from decode_model import memory_of
from decode_timing import WARM_UPS, sample
from host_managed import HostManaged, fill
from host_pages import PAGE_TOKENS, round_trip
from host_programs import Layout
from jax import Array
from torch_baseline import MISSING, Case, request_of, time_transformers

from models.config import ModelConfig
from models.parameters import Params
from wavejax import DenseAttention, Generator, WaveConfig
from wavejax.engine.prompts import bucket
from wavejax.planning.memory import MemoryNeed

# Why transformers gives nothing for a batch that JAX's planner alone knows.
TOO_LATE = "it runs before the others' common batch is known"


@dataclasses.dataclass(frozen=True)
class HostManagedBaseline:
    """The baseline of `host_managed`.

    Attributes:
        config: wave attention's, for the budget and for what stays on the device.
        ahead: whether pages are chosen a layer early.
        threads: that gather; 0: as many as are fastest.
    """

    config: WaveConfig
    ahead: bool = False
    threads: int = 0
    store: ClassVar[str] = "host"
    staged: ClassVar[bool] = True

    def budget(self, context: int) -> int:
        """Tokens of each kv head that a step fetches."""
        return PAGE_TOKENS * Layout.of(self.config, context).chosen

    def pinned(self, model: ModelConfig, batch: int, context: int, dtype: str) -> int:
        """Bytes of the two pairs of blocks that it pins; its pages are not pinned."""
        of_token = 2 * model.num_kv_heads * model.head_dim * jnp.dtype(dtype).itemsize
        return 2 * batch * self.budget(context) * of_token

    def need(
        self, model: ModelConfig, batch: int, context: int, new_tokens: int, dtype: str
    ) -> MemoryNeed:
        """Count what it takes beside the weights, of which none are counted."""
        layout = Layout.of(self.config, context)
        number = jnp.dtype(dtype).itemsize
        of_token = 2 * model.num_kv_heads * model.head_dim * number
        heads = batch * model.num_kv_heads
        held = layout.sinks + layout.window + new_tokens
        blocks = self.pinned(model, batch, context, dtype)
        scores = 4 * batch * model.num_heads * layout.pages
        # Of making one sequence's keys and values: these, what they are made of, and their pages.
        making = 4 * bucket(context) * of_token
        return MemoryNeed(
            weights=0,
            index=model.num_layers * batch * layout.pages * of_token
            + 4 * heads * (layout.pages + 1),
            cache=3 * blocks // 2,
            steady=batch * (model.num_layers * held * of_token + 4),
            rows=model.num_layers * batch * layout.pages * PAGE_TOKENS * of_token + blocks,
            rows_on="host",
            workspace=max(making, 4 * scores + 12 * batch * model.vocab_size),
            largest_stack=0,
            loading=0,
            slots=0,
            staged=True,
        )

    def measure(
        self,
        model: ModelConfig,
        params: Params,
        batch: int,
        context: int,
        new_tokens: int,
        dtype: str,
        *,
        steps: int,
        calls: int,
        ceiling: float,
    ) -> dict[str, Any]:
        """Fill the pages, decode, and return the figures that `decode_timing` gives.

        Args:
            model, params: sizes and weights.
            batch, context, new_tokens: sequences, tokens of each, room for more.
            dtype: of keys and values.
            steps, calls: decode steps in a call, and how many calls are timed.
            ceiling: bytes a second that a copy reads and writes on this device.
        """
        start = time.perf_counter()
        sizes = batch, context, new_tokens, dtype, self.threads
        managed = fill(model, self.config, *sizes, ahead=self.ahead)
        filled = time.perf_counter() - start
        pages = managed.pages
        try:
            gather = {} if self.threads else pages.choose_threads()
            alone = {
                "round_trip_us": 1e6 * round_trip(),
                "send_gb_per_s": pages.send_rate() / 1e9,
                "gather_gb_per_s": {str(k): rate / 1e9 for k, rate in gather.items()},
            }
            decoder = _Decoder(managed, params, batch)
            first, second = (decoder.run(steps) for _ in range(WARM_UPS))
            managed.seconds = dict.fromkeys(managed.seconds, 0.0)
            seconds = [decoder.run(steps) for _ in range(calls)]
        finally:
            pages.close()
        step = statistics.median(seconds) / steps
        moved = bytes_of_step(managed, params)
        of_step = {name: 1e3 * x / (steps * calls) for name, x in managed.seconds.items()}
        return {
            "prefill": {"kind": "synthetic", "seconds": None, "all_with_compiling": filled},
            "state_bytes": {
                "device": memory_of((managed.summaries, managed.steady)),
                "host": pages.nbytes,
            },
            "ms_per_step": 1e3 * step,
            "least_ms": 1e3 * min(seconds) / steps,
            "most_ms": 1e3 * max(seconds) / steps,
            "tokens_per_s": batch / step,
            "compile_s": first - second,
            "bytes_per_step": moved,
            "floor_ms": 1e3 * moved["device"] / ceiling,
            "host_gb_per_s_of_step": moved["host"] / step / 1e9,
            "pages": managed.layout.chosen,
            "page_tokens": PAGE_TOKENS,
            "threads": pages.threads,
            "pinned": pages.pinned,
            "not_pinned": pages.not_pinned,
            "ms_of_step": of_step,
            "alone": alone,
        }


class _Decoder:
    """Decodes step by step; tokens are drawn and forgotten, as by `decode_timing.Decoder`."""

    def __init__(self, managed: HostManaged, params: Params, batch: int):
        self.managed, self.params = managed, params
        self.generator = Generator(managed.model, DenseAttention())
        vocab = managed.model.vocab_size
        self.tokens: Array = jnp.asarray(np.arange(batch) * vocab // batch, jnp.int32)
        self.step = 0

    def run(self, steps: int) -> float:
        """Decode, wait, and return the seconds."""
        start = time.perf_counter()
        drawn, stride = jnp.zeros_like(self.tokens), jnp.int32(1)
        for _ in range(steps):
            logits = self.managed.feed(self.params, self.tokens)
            at = self.generator, logits, np.int32(self.step)
            self.tokens, drawn = sample(*at, self.tokens, stride, drawn)
            self.step += 1
        jax.block_until_ready((self.managed.steady, drawn))
        return time.perf_counter() - start


def bytes_of_step(managed: HostManaged, params: Params) -> dict[str, float]:
    """Bytes that one step must move: see `decode_bytes.bytes_of_step`."""
    tree, model = params["params"], managed.model
    weights = memory_of(tree) - (tree["embedding"].nbytes if "unembedding" in tree else 0)
    fetched = model.num_layers * managed.pages.block_bytes
    keys = managed.steady.keys
    layers, _, kv_heads = keys.shape[:3]
    tokens = int(np.asarray(managed.steady.tokens).sum())
    near = layers * kv_heads * tokens * 2 * keys.row_bytes
    read = memory_of(managed.summaries.bounds) + near + fetched
    return {
        "weights": float(weights),
        "attention": float(read),
        "missed": float(fetched),
        "host": float(fetched),
        "device": float(weights + read + fetched),
    }


@dataclasses.dataclass(frozen=True)
class TransformersBaseline:
    """The baseline of `torch_baseline`, already timed: JAX leaves it no memory once it runs.

    Attributes:
        results: by tokens and by sequences as they were asked for: a number, or "max".
    """

    results: dict[Case, dict[str, Any]]
    store: ClassVar[str] = "device"
    staged: ClassVar[bool] = False

    @classmethod
    def timed(
        cls,
        model: ModelConfig,
        dtype: str,
        steps: int,
        calls: int,
        contexts: Sequence[int],
        batches: Sequence[int | str],
        tell: Callable[[Case, dict[str, Any]], None],
    ) -> "TransformersBaseline":
        """Time it at all contexts and batches but "common", which JAX's planner alone knows.

        Starts no device of JAX's, and no process where there is no case.

        Args:
            model: sizes.
            dtype: of weights, keys and values, by PyTorch's name.
            steps, calls: decode steps in a call, and how many calls are timed.
            contexts, batches: numbers, or "max" and "common" as batches.
            tell: called with each case and its figures as they come.
        """
        sizes = [batch for batch in batches if batch != "common"]
        cases = [(context, batch) for context in contexts for batch in sizes]
        results: dict[Case, dict[str, Any]] = {}
        if cases:
            request = request_of(model.to_json(), dtype, steps, calls, cases)
            for case, found in zip(cases, time_transformers(request), strict=True):
                results[case] = found
                tell(case, found)
        return cls(results)

    @property
    def missing(self) -> str | None:
        """Why nothing could be timed; None where something was tried."""
        if not self.results:
            return f"{MISSING}: {TOO_LATE}"
        errors = [found.get("error", "") for found in self.results.values()]
        if all(error.startswith(MISSING) for error in errors):
            return str(errors[0])
        return None

    def largest(self, context: int) -> int:
        """Return the sequences of the "max" case, timed or failed; 0 if there is none."""
        return int(self.results.get((context, "max"), {}).get("batch", 0))

    def attempt(
        self, batch: int, context: int, ceiling: float, asked: int | str | None = None
    ) -> dict[str, Any]:
        """Return the figures, or `error`.

        Args:
            batch, context: sequences, and tokens of each.
            ceiling: as of `HostManagedBaseline.measure`.
            asked: the batch as it was asked for, if not by its number.
        """
        found = self.results.get((context, batch if asked is None else asked))
        if found is None:
            # The others' common batch may happen to be one that was timed.
            same = (
                one
                for case, one in self.results.items()
                if case[0] == context and one.get("batch") == batch and "error" not in one
            )
            found = next(same, None)
        if found is None:
            return {"error": f"not timed: {TOO_LATE}"}
        if "error" in found:
            return found
        return found | {
            "prefill": {"kind": "synthetic", "seconds": None},
            "floor_ms": 1e3 * found["bytes_per_step"]["device"] / ceiling,
        }
