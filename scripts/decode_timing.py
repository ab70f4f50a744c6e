"""Times compiled decode steps on given tokens: their speed, growth, and kernels."""

import functools
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from decode_bytes import Counts, bytes_of_step
from decode_state import about_to_grow
from jax import Array, lax
from profile_step import kernel_times

from models.parameters import Params
from wavejax import Generator
from wavejax.engine.generator import DecodeState
from wavejax.engine.sampling import step_keys
from wavejax.engine.staged_state import on_device_of

WARM_UPS = 2  # The first compiles, the second tells how long that took.
PROBES = 8  # at most, of strides that might give the hit ratio
SETTLE = 8  # steps before a probe's are counted: rows of another stride leave the cache
CLOSE = 0.02  # of the hit ratio asked for
GROWTHS = 3
PROFILED_STEPS = 4


def steps_needed(steps: int, calls: int) -> int:
    """Return the most steps that one state is decoded for, but for growth."""
    return (
        steps * (WARM_UPS + PROBES + calls) + SETTLE * (PROBES + 1) + 2 * GROWTHS + PROFILED_STEPS
    )


class Decoder:
    """A state that is decoded step by step.

    One compiled program runs all numbers of steps, but for staged rows, whose steps Python runs.

    Each step's token is the last one's plus `stride` (see `decode_model.smooth_embedding`). A token
    is also drawn from every step's logits, as generation does, and forgotten.
    """

    def __init__(self, generator: Generator, params: Params, state: DecodeState):
        self.generator, self.params, self.state = generator, params, state
        batch = state.logits.shape[0]
        vocab = generator.model_config.vocab_size
        tokens = jnp.asarray(np.arange(batch) * vocab // batch, jnp.int32)
        self.tokens = jax.device_put(tokens, tokens.sharding)
        self.stride = 0

    def run(self, steps: int) -> float:
        """Decode, wait, and return the seconds."""
        start = time.perf_counter()
        decode = _decode_staged if self.generator.staged else _decode
        self.state, self.tokens, drawn = decode(
            self.generator,
            self.params,
            self.state,
            self.tokens,
            jnp.int32(self.stride),
            jnp.int32(steps),
        )
        jax.block_until_ready((self.state, drawn))
        return time.perf_counter() - start

    def counted(self, steps: int, calls: int = 1) -> tuple[list[float], Counts]:
        """Seconds of each call, and what the caches counted in all of them."""
        before = Counts.of(self.state.attention_state)
        seconds = [self.run(steps) for _ in range(calls)]
        return seconds, Counts.of(self.state.attention_state).since(before)


@functools.partial(jax.jit, static_argnums=0, donate_argnames="state")
def _decode(
    generator: Generator,
    params: Params,
    state: DecodeState,
    tokens: Array,
    stride: Array,
    steps: Array,
) -> tuple[DecodeState, Array, Array]:
    def one_step(_: Array, carry: Any) -> Any:
        state, tokens, drawn = carry
        state = generator.feed(params, state, tokens)
        return state, *sample(generator, state.logits, state.step, tokens, stride, drawn)

    carry = state, tokens, jnp.zeros_like(tokens)
    return lax.fori_loop(0, steps, one_step, carry)


def _decode_staged(
    generator: Generator,
    params: Params,
    state: DecodeState,
    tokens: Array,
    stride: Array,
    steps: Array,
) -> tuple[DecodeState, Array, Array]:
    drawn = jnp.zeros_like(tokens)
    for _ in range(int(steps)):
        state = generator.feed(params, state, tokens)
        tokens, drawn = sample(generator, state.logits, state.step, tokens, stride, drawn)
    return state, tokens, drawn


@functools.partial(jax.jit, static_argnums=0)
def sample(
    generator: Generator, logits: Array, step: Array, tokens: Array, stride: Array, drawn: Array
) -> tuple[Array, Array]:
    """Return the tokens to feed next, and what was drawn so far."""
    keys = step_keys(jnp.int32(0), step, jnp.arange(logits.shape[0], dtype=jnp.int32))
    sampled = generator.sampler.sample(logits, keys)
    return (tokens + stride) % generator.model_config.vocab_size, drawn ^ sampled


def reach_hit_ratio(decoder: Decoder, wanted: float, steps: int) -> list[tuple[int, float]]:
    """Set the decoder's stride so that the cache's hit ratio is what is wanted, or near it.

    By bisection: the larger the stride, the less alike are successive queries.

    Returns:
        the strides tried and the hit ratios that they gave.
    """
    tried: list[tuple[int, float]] = []
    # From equal tokens to such as have nothing in common.
    low, high = 0, max(2, decoder.generator.model_config.vocab_size // 16)
    stride = high // 4
    while len(tried) < PROBES and stride not in [one for one, _ in tried]:
        decoder.stride = stride
        decoder.run(SETTLE)
        found = decoder.counted(steps)[1].hit_ratio
        if found is None:
            break
        tried.append((stride, found))
        if abs(found - wanted) <= CLOSE / 2:
            break
        low, high = (stride, high) if found > wanted else (low, stride)
        stride = (low + high) // 2
    if tried:
        decoder.stride = min(tried, key=lambda one: abs(one[1] - wanted))[0]
        decoder.run(SETTLE)
    return tried


def time_decoding(
    decoder: Decoder, steps: int, calls: int, hit_ratio: float, ceiling: float
) -> dict[str, Any]:
    """Compiles, finds the stride for the hit ratio, and times several calls.

    Args:
        decoder: of a filled state.
        steps: of each call.
        calls: how many are timed.
        hit_ratio: wanted of the row cache, if there is one.
        ceiling: bytes a second that a copy reads and writes on this device.
    """
    first, second = (decoder.run(steps) for _ in range(WARM_UPS))
    attention = decoder.generator.attention
    cached = attention.has_cache
    tried = reach_hit_ratio(decoder, hit_ratio, steps) if cached else []
    indexed = Counts.of(decoder.state.attention_state).indexed
    seconds, counts = decoder.counted(steps, calls)
    grew = Counts.of(decoder.state.attention_state).indexed != indexed
    batch = len(decoder.tokens)
    step = statistics.median(seconds) / steps
    moved = bytes_of_step(
        decoder.params,
        decoder.generator.attention,
        decoder.state.attention_state,
        counts,
        steps * calls,
    )
    # What is missed in the host's memory is not read from the device's, but written to it.
    on_device = moved["weights"] + moved["attention"] + moved["missed"]
    found: dict[str, Any] = {
        "ms_per_step": 1e3 * step,
        "least_ms": 1e3 * min(seconds) / steps,
        "most_ms": 1e3 * max(seconds) / steps,
        "tokens_per_s": batch / step,
        "compile_s": first - second,
        "bytes_per_step": moved | {"device": on_device},
        "floor_ms": 1e3 * on_device / ceiling,
        "grew": grew,
    }
    if attention.has_index:
        retrieved = counts.hits + counts.misses
        found |= {
            "hit_ratio": counts.hit_ratio if cached else None,
            "hit_ratio_wanted": hit_ratio if cached else None,
            "stride": decoder.stride,
            "tried": tried,
            "retrieved_share": retrieved / counts.attended if counts.attended else None,
            "host_gb_per_s_of_step": moved["host"] / step / 1e9,
        }
    return found


def time_growth(decoder: Decoder, dtype: str) -> dict[str, float]:
    """Return a step in which every sequence's index grows, beside one step without.

    Leaves the state with that many more random tokens.
    """
    alone, growing = [], []
    for _ in range(GROWTHS):
        decoder.state = about_to_grow(decoder.generator, decoder.state, dtype)
        jax.block_until_ready(on_device_of(decoder.state.attention_state))
        before = Counts.of(decoder.state.attention_state).indexed
        growing.append(decoder.run(1))
        assert Counts.of(decoder.state.attention_state).indexed > before, "the index did not grow"
        alone.append(decoder.run(1))
    every = decoder.generator.attention.config.growth_tokens  # type: ignore[attr-defined]
    more = statistics.median(growing) - statistics.median(alone)
    return {
        "step_ms": 1e3 * statistics.median(alone),
        "growing_step_ms": 1e3 * statistics.median(growing),
        "amortised_ms_per_step": 1e3 * max(0.0, more) / every,
    }


def profile(decoder: Decoder, folder: Path, name: str) -> dict[str, Any]:
    """Write a profiler's trace of a few steps; add up the kernels of a step.

    While the profiler watches, XLA launches kernels one by one: their sum may be compared with the
    time of a step that nobody watches, and the gaps between them may not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=folder))
    with jax.profiler.trace(str(own)):
        decoder.run(PROFILED_STEPS)
    try:
        times = kernel_times(own)
    except ValueError:  # No trace, or several.
        times = {}
    sums = {kernel: math.fsum(each) / PROFILED_STEPS / 1e3 for kernel, each in times.items()}
    largest = sorted(sums.items(), key=lambda one: -one[1])[:20]
    return {"trace": own.name, "kernels_ms_per_step": sum(sums.values()), "largest": dict(largest)}
