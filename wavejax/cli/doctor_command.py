"""The command of `wavejax.doctor`: one verdict a line, and no traceback."""

import functools
import importlib.metadata
import logging
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import click
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import pallas_kernels as ops
from models.config import ModelConfig
from wavejax.attention.wave import WaveAttention
from wavejax.cli.guard import main_guard, missing_platform
from wavejax.cli.progress import bytes_text
from wavejax.config import WaveConfig
from wavejax.planning.free_memory import free_memory
from wavejax.store.rows import StoreKind, best_fetch
from wavejax.store.shape import CacheShape
from wavejax.store.state import WaveState

PACKAGES = ("wavejax", "jax", "jaxlib", "flax")
GPU_FILES = {"/dev/nvidiactl": "NVIDIA", "/dev/kfd": "AMD"}
# What is sent to the device to see how fast pinned memory is read, and how often.
PINNED_BYTES, SENDINGS = 256 * 2**20, 4
# The smoke test's tokens, and what its output may differ from the exact one's by, relative to it.
TOKENS, TOLERANCE = 700, 1e-2
# The kernels know these heads.
GROUP, KV_HEADS, HEAD_DIM = 2, 2, 64

Verdict = Literal["ok", "note", "fail"]


class Finding(NamedTuple):
    """One line.

    Attributes:
        verdict: "ok"; "note", which nobody needs to act upon to use wavejax; or "fail".
        subject: such as "device".
        text: what was found, without line breaks.
    """

    verdict: Verdict
    subject: str
    text: str


@click.command()
def doctor() -> int:
    """Says what of this machine wavejax can use: one verdict a line.

    ok: it works. note: it works, and you may want to know. fail: what is installed or asked for
    does not work. Status 0 if nothing fails, 1 otherwise.
    """
    failed = False
    for finding in _findings():
        click.echo(f"{finding.verdict:<5} {finding.subject + ':':<14} {finding.text}")
        failed |= finding.verdict == "fail"
    return int(failed)


main = main_guard(doctor)


def _findings() -> Iterator[Finding]:
    yield _versions()
    with _said_by_jax() as said:
        device = _checked("device", _device)
    yield from _plugins(said)
    yield device
    if device.verdict == "fail":
        yield Finding("fail", "verdict", "wavejax cannot be used here")
        return
    yield _checked("memory", _memory)
    yield _checked("pinned memory", _pinned_memory)
    smoke = _checked("smoke test", _smoke_test)
    yield from _kernels(smoke)
    yield smoke
    if smoke.verdict == "fail":
        yield Finding("fail", "verdict", "wavejax cannot be used here")
    else:
        name = jax.devices()[0].device_kind
        yield Finding("ok", "verdict", f"wavejax can be used here, on {name}")


def _checked(subject: str, check: Callable[[], Finding]) -> Finding:
    """Return a check's finding; whatever it raises is one that says so."""
    try:
        return check()
    except Exception as error:
        asked = missing_platform(error)
        return Finding("fail", subject, asked or f"{type(error).__name__}: {_one_line(error)}")


def _one_line(text: object) -> str:
    return " ".join(str(text).split())[:300] or "no reason given"


def _versions() -> Finding:
    found = [f"python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} of no known version")
    return Finding("ok", "versions", ", ".join(found))


class _Said(logging.Handler):
    """Keep what is logged: the message, and the error that it tells of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one record as one line."""
        text = record.getMessage()
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            text = f"{text.rstrip('. ')}: {type(error).__name__}: {error}"
        self.lines.append((record.levelno, _one_line(text)))


@contextmanager
def _said_by_jax() -> Iterator[_Said]:
    """Keep what JAX logs and warns of as it starts, and do not show it."""
    logger, said = logging.getLogger("jax"), _Said()
    before = logger.handlers[:], logger.propagate
    logger.handlers, logger.propagate = [said], False
    try:
        with warnings.catch_warnings(record=True) as warned:
            yield said
        said.lines += [(logging.WARNING, _one_line(each.message)) for each in warned]
    finally:
        logger.handlers, logger.propagate = before


def _plugins(said: _Said) -> Iterator[Finding]:
    """Which plugins bring platforms to JAX, and what went wrong with them."""
    names = sorted({entry.name for entry in importlib.metadata.entry_points(group="jax_plugins")})
    yield Finding("ok", "plugins", ", ".join(names) or "none: JAX's own platform is cpu")
    asked = jax.config.values["jax_platforms"]
    for level, text in said.lines:
        # Where the platforms to use are named, another one's plugin may be as it likes.
        broken = level >= logging.ERROR and not asked
        yield Finding("fail" if broken else "note", "plugins", text)


def _device() -> Finding:
    devices = jax.devices()
    first = devices[0]
    text = f"{len(devices)} x {first.device_kind} ({first.platform})"
    asked = jax.config.values["jax_platforms"]
    if asked:
        text += f"; JAX_PLATFORMS is {asked}, others are not looked for"
    elif first.platform == "cpu":
        there = [maker for path, maker in GPU_FILES.items() if os.path.exists(path)]
        if there:
            text += f"; there is a GPU of {there[0]}, which JAX does not use: install its plugin"
            text += " (for CUDA: pip install 'wavejax[cuda13]')"
            return Finding("note", "device", text)
    return Finding("ok", "device", text)


def _memory() -> Finding:
    free = free_memory()
    own = "the device's is the host's" if free.device is None else bytes_text(free.device)
    text = f"{own}; {bytes_text(free.host)} free on the host"
    if free.device is not None:
        text = f"{own} free on the device; {bytes_text(free.host)} free on the host, of which XLA "
        text += f"pins up to {bytes_text(free.pinned)}"
    return Finding("ok", "memory", text)


def _pinned_memory() -> Finding:
    device = jax.devices()[0]
    if device.platform == "cpu":
        return Finding("ok", "pinned memory", "not needed: there is one memory")
    kinds = {memory.kind for memory in device.addressable_memories()}
    if "pinned_host" not in kinds:
        return Finding("note", "pinned memory", "there is none; rows on the host are staged")
    return Finding("ok", "pinned memory", f"{pinned_rate(device) / 1e9:.1f} GB/s to the device")


def pinned_rate(device: jax.Device, size: int = PINNED_BYTES) -> float:
    """How fast pinned host memory comes to a device, at best: bytes a second.

    Args:
        device: which has such memory.
        size: bytes that are sent at once.
    """
    host = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    rows = jax.block_until_ready(jax.device_put(np.ones(size, np.uint8), host))
    here = jax.sharding.SingleDeviceSharding(device, memory_kind="device")
    seconds = []
    for _ in range(SENDINGS):
        start = time.perf_counter()
        sent = jax.block_until_ready(jax.device_put(rows, here))
        seconds.append(time.perf_counter() - start)
        del sent
    return size / min(seconds)


def _smoke_test() -> Finding:
    """Compare a prompt and a step, which retrieves all tokens, with a softmax."""
    start = time.perf_counter()
    ops.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a kernel that is not taken has a line of its own
        error = _error_of_a_step()
    seconds = time.perf_counter() - start
    text = f"wave attention is full attention but for {error:.0e} of it; took {seconds:.1f} s"
    return Finding("ok" if error < TOLERANCE else "fail", "smoke test", text)


def _error_of_a_step() -> float:
    """Return the largest difference to exact attention, as a share of the largest output."""
    heads = GROUP * KV_HEADS
    shape = CacheShape.of(_model(heads))
    config = WaveConfig(segment_tokens=256, growth_tokens=64, local_tokens=32)
    # Rows where they are by default, if one program can hold them there.
    store: StoreKind = "host" if best_fetch() == "in_place" else "device"
    attention = WaveAttention(config, store=store, cached=True)
    rng = np.random.default_rng(0)
    numbers = [
        rng.normal(size=(1, TOKENS + 1, n, HEAD_DIM)).astype(np.float32)
        for n in (heads, KV_HEADS, KV_HEADS)
    ]
    state = attention.init_state(shape, 1, TOKENS, 8, jnp.float32)
    layer, first, length = jnp.int32(0), jnp.int32(0), jnp.int32(TOKENS)

    @functools.partial(jax.jit, donate_argnums=3)
    def run(query: Array, key: Array, value: Array, state: WaveState) -> tuple[Array, WaveState]:
        rows = key[0, :TOKENS], value[0, :TOKENS]
        state = attention.write_prompt(layer, *rows, state, sequence=first, length=length)
        state = attention.finish_prefill(state, first, length)
        return attention.decode(layer, query[:, -1:], key[:, -1:], value[:, -1:], state)

    found = np.asarray(run(*numbers, state)[0], np.float64)[0, 0]
    query, key, value = (x.astype(np.float64)[0] for x in numbers)
    key, value = (np.repeat(x, GROUP, axis=1) for x in (key, value))
    logits = np.einsum("hd,thd->ht", query[-1], key) * HEAD_DIM**-0.5
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    exact = np.einsum("ht,thd->hd", weights, value)
    return float(np.abs(found - exact).max() / np.abs(exact).max())


def _model(heads: int) -> ModelConfig:
    return ModelConfig(
        architecture="llama",
        vocab_size=2,
        num_layers=1,
        hidden_size=HEAD_DIM,
        intermediate_size=HEAD_DIM,
        num_heads=heads,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_context=2 * TOKENS,
        rope_theta=1e4,
        norm_eps=1e-5,
    )


def _kernels(smoke: Finding) -> Iterator[Finding]:
    """Which ops run as kernels, and why others do not: as the smoke test chose."""
    choices = ops.explain()
    if not choices:
        yield Finding("note", "kernels", f"not known: the smoke test did not run ({smoke.text})")
        return
    by_kernel = [choice.op for choice in choices if choice.implementation != "xla"]
    others: dict[str, list[str]] = {}
    for choice in choices:
        if choice.implementation == "xla":
            others.setdefault(choice.reason, []).append(choice.op)
    if by_kernel:
        yield Finding("ok", "kernels", f"for {', '.join(by_kernel)}")
    for reason, names in others.items():
        text = "all ops" if len(names) == len(choices) else ", ".join(names)
        yield Finding("note" if by_kernel else "ok", "kernels", f"none for {text}: {reason}")
