"""What a run needs of memory: the bytes of the state really made, and a refusal in one line."""

import types

import jax
import jax.numpy as jnp
import pytest

from tests.wavejax.tiny_generator import CONFIG, MODEL
from wavejax import DenseAttention, InputError, WaveAttention, WaveConfig, memory
from wavejax.facts import facts_of
from wavejax.generator import bucket
from wavejax.memory import check_memory, memory_need

ATTENTIONS = {
    "dense": DenseAttention(),
    "wave, host": WaveAttention(CONFIG, "host"),
    "wave, device": WaveAttention(CONFIG, "device"),
    "paper": WaveAttention(WaveConfig.paper(growth_tokens=64), "host"),
}


@pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("prompt, new", [(5, 1), (318, 90), (1300, 200)])
def test_the_need_is_the_state_that_is_made(attention, dtype, prompt, new):
    need = memory_need(MODEL, attention, 3, prompt, new, jnp.dtype(dtype), weights=1000)
    facts = facts_of(attention.init_state(MODEL, 3, bucket(prompt), new, dtype))
    assert (need.device_state, need.host_state) == (facts.device_bytes, facts.host_bytes)
    assert need.weights == 1000
    assert need.device == 1000 + need.device_state + need.workspace


def test_the_workspace_holds_a_layers_activations_and_a_block_of_logits():
    need = memory_need(MODEL, DenseAttention(), 1, 1000, 1, jnp.dtype(jnp.float32), 0)
    room = bucket(1000)
    assert need.workspace > room * (MODEL.hidden_size + 2 * MODEL.intermediate_size) * 4
    assert need.workspace > 4 * MODEL.num_heads * 128 * room


def available(monkeypatch, count):
    monkeypatch.setattr(
        memory.psutil, "virtual_memory", lambda: types.SimpleNamespace(available=count)
    )


def device_with(monkeypatch, limit, used):
    stats = {"bytes_limit": limit, "bytes_in_use": used}
    device = types.SimpleNamespace(memory_stats=lambda: stats)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])


def check(attention, **changes):
    arguments = {"batch": 2, "prompt_tokens": 4000, "new_tokens": 10, "weights": 2**30} | changes
    return check_memory(MODEL, attention, dtype=jnp.dtype(jnp.float32), **arguments)


@pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS)
def test_on_a_cpu_all_of_it_must_fit_in_one_memory(monkeypatch, attention):
    available(monkeypatch, 2**40)
    need = check(attention)
    available(monkeypatch, need.device + need.host_state)
    assert check(attention) == need
    available(monkeypatch, need.device + need.host_state - 1)
    with pytest.raises(InputError, match=r"^not enough memory: "):
        check(attention)


def test_the_refusal_is_one_line_with_needed_and_free(monkeypatch):
    available(monkeypatch, 2**29)
    with pytest.raises(InputError) as error:
        check(ATTENTIONS["wave, host"], weights=3 * 2**30)
    message = str(error.value)
    assert "\n" not in message
    need = memory_need(
        MODEL, ATTENTIONS["wave, host"], 2, 4000, 10, jnp.dtype(jnp.float32), 3 * 2**30
    )
    total = (need.device + need.host_state) / 2**30
    assert message.startswith(f"not enough memory: {total:.2f} GiB needed (weights 3.00 GiB, ")
    assert "rows in host memory" in message
    assert "0.50 GiB free" in message
    assert "--dtype bfloat16" in message  # what to do about it


def test_with_a_devices_own_memory_each_is_compared(monkeypatch):
    attention = ATTENTIONS["wave, host"]
    available(monkeypatch, 2**40)
    need = check(attention)
    device_with(monkeypatch, need.device + 100, 100)
    available(monkeypatch, need.host_state)
    assert check(attention) == need
    available(monkeypatch, need.host_state - 1)
    with pytest.raises(InputError, match=r"^not enough host memory: "):
        check(attention)
    device_with(monkeypatch, need.device + 99, 100)
    with pytest.raises(InputError, match=r"^not enough device memory: "):
        check(attention)
