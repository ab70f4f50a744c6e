"""The planner's workspace against what XLA compiles for this GPU, and its limits against JAX's."""

import jax
import jax.numpy as jnp
import pytest

from models.config import ModelConfig
from tests.wavejax.planning.test_memory import compiled_workspace
from wavejax import DenseAttention, WaveAttention, WaveConfig
from wavejax.planning.free_memory import free_memory
from wavejax.planning.memory import memory_need
from wavejax.store.rows import init_store

pytestmark = pytest.mark.gpu

# Llama-3-8B's shape, but for its depth: the workspace is one layer's.
LLAMA = ModelConfig("llama", 128256, 2, 4096, 14336, 32, 8, 128, 131072)


@pytest.mark.parametrize("attention", [DenseAttention(), WaveAttention(WaveConfig(), "device")])
@pytest.mark.parametrize("room", [8192, 65536])
def test_the_workspace_is_enough_and_not_three_times_too_much(attention, room):
    """Planned are blocks of logits, which cuDNN does without, where it reads the prompt."""
    need = memory_need(LLAMA, attention, 1, room, 1024, jnp.bfloat16)
    prefill, decode = compiled_workspace(LLAMA, attention, 1, room, 1024, jnp.bfloat16)
    stream = 3 * room * LLAMA.hidden_size * 2
    print(
        f"{room}: prefill {prefill:,} + {stream:,}, decode {decode:,}; planned {need.workspace:,}"
    )
    assert max(prefill + stream, decode) <= need.workspace
    assert need.workspace <= 3 * max(prefill + stream, decode)


def test_the_device_has_memory_of_its_own():
    free = free_memory()
    assert free.device is not None
    assert free.device > 2**30


def test_a_store_in_host_memory_takes_nothing_of_the_device():
    """It may be larger than all that the device has."""
    device = jax.local_devices()[0]
    before = device.memory_stats()
    # More than was ever in use: on the device it would be a new peak.
    size = before["peak_bytes_in_use"] - before["bytes_in_use"] + 2**30
    store = init_store((1, 1, 1, -(-size // 512), 2, 128), jnp.bfloat16, "host")
    jax.block_until_ready(store)
    # The program that makes it has a few numbers of its own there.
    assert device.memory_stats()["peak_bytes_in_use"] < before["peak_bytes_in_use"] + 2**20
    assert store.rows.data.sharding.memory_kind == "pinned_host"
    assert store.rows.data.nbytes >= size
