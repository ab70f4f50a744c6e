"""What a run needs of memory, checked before it starts."""

import dataclasses

import jax
import jax.numpy as jnp
import psutil
from jax.typing import DTypeLike

from models.config import ModelConfig
from models.errors import InputError
from wavejax.causal_attention import QUERY_BLOCK
from wavejax.dense_attention import DenseAttention
from wavejax.generator import bucket
from wavejax.wave_attention import WaveAttention


@dataclasses.dataclass(frozen=True)
class MemoryNeed:
    """Bytes that a run takes at most, by memory.

    Attributes:
        weights: parameters, on the device.
        device_state: the attention's state on the device.
        host_state: its part in pinned host memory.
        workspace: what reading the longest prompt takes besides, on the device.
    """

    weights: int
    device_state: int
    host_state: int
    workspace: int

    @property
    def device(self) -> int:
        """Bytes on the device."""
        return self.weights + self.device_state + self.workspace


def memory_need(
    model: ModelConfig,
    attention: WaveAttention | DenseAttention,
    batch: int,
    prompt_tokens: int,
    new_tokens: int,
    dtype: DTypeLike,
    weights: int,
) -> MemoryNeed:
    """Computes the need from shapes alone; allocates nothing.

    Args:
        model: the model's sizes.
        attention: whose state is counted.
        batch: sequences.
        prompt_tokens: of the longest prompt.
        new_tokens: to generate.
        dtype: of weights and state.
        weights: bytes of the parameters.
    """
    room = bucket(prompt_tokens)
    on_device = attention
    if isinstance(attention, WaveAttention):
        # `eval_shape` traces, and placing an array in host memory is no traced operation.
        on_device = dataclasses.replace(attention, store="device")
    state = jax.eval_shape(lambda: on_device.init_state(model, batch, room, new_tokens, dtype))
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    host = 0
    if isinstance(attention, WaveAttention) and attention.store == "host":
        host = state.store.rows.size * state.store.rows.dtype.itemsize
    # One layer's activations (hidden twice, query, key, value, output, the gated MLP's two), and
    # the logits of one block of queries, in float32, twice: before and after the softmax.
    heads = model.num_heads + model.num_kv_heads
    wide = 2 * model.hidden_size + 2 * heads * model.head_dim + 2 * model.intermediate_size
    activations = room * wide * jnp.dtype(dtype).itemsize
    logits = 2 * 4 * model.num_heads * min(QUERY_BLOCK, room) * room
    return MemoryNeed(weights, total - host, host, activations + logits)


def check_memory(
    model: ModelConfig,
    attention: WaveAttention | DenseAttention,
    batch: int,
    prompt_tokens: int,
    new_tokens: int,
    dtype: DTypeLike,
    weights: int,
) -> MemoryNeed:
    """Computes the need (see `memory_need`) and compares it with what is free.

    Raises:
        InputError: the run does not fit; says what is needed, what there is, and what to change.
    """
    need = memory_need(model, attention, batch, prompt_tokens, new_tokens, dtype, weights)
    host_free = psutil.virtual_memory().available
    stats = jax.local_devices()[0].memory_stats()
    if stats is None or "bytes_limit" not in stats:
        # A CPU: the device's memory is the host's.
        _compare("memory", need.device + need.host_state, host_free, need)
        return need
    _compare("device memory", need.device, stats["bytes_limit"] - stats["bytes_in_use"], need)
    _compare("host memory", need.host_state, host_free, need)
    return need


def _compare(name: str, needed: int, free: int, need: MemoryNeed) -> None:
    if needed <= free:
        return
    parts = f"weights {_gib(need.weights)}, KV cache and index {_gib(need.device_state)}"
    if need.host_state:
        parts += f", rows in host memory {_gib(need.host_state)}"
    raise InputError(
        f"not enough {name}: {_gib(needed)} needed ({parts}, workspace {_gib(need.workspace)}), "
        f"{_gib(free)} free; use a shorter prompt, fewer prompts or new tokens, or --dtype bfloat16"
    )


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
