"""Generation from end to end on a CUDA GPU, against plain JAX on its host's CPU.

Real models as well, if the environment names their files:

    WAVEJAX_MODELS=smollm2.gguf:qwen.gguf pytest tests/gpu/test_engine_on_gpu.py
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from models.config import ModelConfig
from models.decoder import Decoder
from wavejax import DecodeState, Generator, WaveAttention, WaveConfig
from wavejax.engine import compiled
from wavejax.store.shape import CacheShape

pytestmark = [pytest.mark.gpu, pytest.mark.slow(120)]

MODELS = [Path(name) for name in filter(None, os.environ.get("WAVEJAX_MODELS", "").split(":"))]
# Small enough to be retrieved, estimated and grown several times.
SMALL = ["--growth-tokens", "64", "--segment-tokens", "1024", "--min-retrieved-tokens", "64"]
SMALL += ["--min-candidate-tokens", "256"]


def generate(model: Path, platform: str, *arguments: str) -> list[list[int]]:
    """The token ids of each answer, by the command line in a process of its own."""
    said = run_generate(model, platform, *arguments)
    return [answer["token_ids"] for answer in said["answers"]]


def run_generate(model: Path, platform: str, *arguments: str) -> dict[str, Any]:
    """What the command line prints with --json."""
    environment = os.environ | {
        "JAX_PLATFORMS": platform,
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    command = [sys.executable, "-m", "wavejax.generate", "--model", str(model), "--json"]
    done = subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def prompts(folder: Path, characters: tuple[int, ...]) -> list[str]:
    """Flags that give prompts of so many characters of Python's manual."""
    text = "\n".join(topics[name] for name in sorted(topics))
    flags = []
    for i, length in enumerate(characters):
        file = folder / f"prompt{i}.txt"
        file.write_text(text[i * 1000 :][:length] + "\n\nSummarise this text in detail.")
        flags += ["--prompt-file", str(file)]
    return flags


@pytest.mark.parametrize("model", ["random", *MODELS], ids=lambda model: Path(model).name)
def test_both_stores_and_the_cpu_say_the_same(model, random_model, tmp_path):
    """Token for token in float32; a batch of prompts of unequal lengths, and growth."""
    real = model != "random"
    lengths = (14000, 9000) if real else (5000, 3300)
    flags = [*prompts(tmp_path, lengths), "--dtype", "float32", "--max-new-tokens", "160", *SMALL]
    path = model if real else random_model
    host = generate(path, "cuda", *flags, "--store", "host")
    staged = generate(path, "cuda", *flags, "--store", "host", "--fetch", "staged")
    device = generate(path, "cuda", *flags, "--store", "device")
    cpu = generate(path, "cpu", *flags, "--store", "device")
    assert max(map(len, cpu)) > 64
    assert host == staged
    assert host == device
    assert host == cpu


def test_with_moments_both_stores_and_the_cpu_say_the_same(random_model, tmp_path):
    """The estimate by moments, in kernels that a run on a CPU does not have."""
    flags = [
        *prompts(tmp_path, (5000, 3300)),
        "--dtype",
        "float32",
        "--max-new-tokens",
        "96",
        *SMALL,
    ]
    flags += ["--moment-rank", "2", "--moment-dtype", "int8"]
    cpu = generate(random_model, "cpu", *flags, "--store", "device")
    assert max(map(len, cpu)) > 64
    for store in ("device", "host"):
        assert generate(random_model, "cuda", *flags, "--store", store) == cpu


@pytest.mark.parametrize("model", MODELS or [None], ids=lambda model: Path(model or "none").name)
def test_both_stores_say_the_same_in_bfloat16(model, tmp_path):
    """Real models: one of random weights finds many tokens alike, and rounding decides."""
    if model is None:
        pytest.skip("WAVEJAX_MODELS names no model")
    flags = [*prompts(tmp_path, (14000,)), "--dtype", "bfloat16", "--max-new-tokens", "64", *SMALL]
    host = generate(model, "cuda", *flags, "--store", "host")
    assert host == generate(model, "cuda", *flags, "--store", "device")
    assert len(host[0]) > 16


def test_a_second_run_need_not_compile(random_model, tmp_path, monkeypatch):
    """By what the command keeps in the user's cache folder; the tokens are the same."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flags = [*prompts(tmp_path, (5000,)), "--max-new-tokens", "100", *SMALL, "--store", "host"]
    first, second = (run_generate(random_model, "cuda", *flags) for _ in range(2))
    assert list((tmp_path / "wavejax" / "compiled").iterdir())
    assert second["answers"] == first["answers"]
    seconds = [one["facts"]["first_token_seconds"] for one in (first, second)]
    assert seconds[1] < seconds[0] / 2, seconds


CONFIG = WaveConfig(
    growth_tokens=64, segment_tokens=1024, min_candidate_tokens=256, min_retrieved_tokens=64
)
LLAMA = ModelConfig(
    architecture="llama",
    vocab_size=512,
    num_layers=3,
    hidden_size=256,
    intermediate_size=512,
    num_heads=8,
    num_kv_heads=2,
    head_dim=128,
    max_context=100_000,
    rope_theta=1e4,
    norm_eps=1e-5,
)


@pytest.mark.parametrize("store, memory", [("host", "pinned_host"), ("device", "device")])
def test_the_compiled_step_copies_no_cache_and_asks_nothing_of_the_host(store, memory):
    """Reads the program, then runs it past a growth: every array of the state stays in place."""
    steps = CONFIG.window_tokens + CONFIG.growth_tokens // 2
    generator = Generator(LLAMA, WaveAttention(CONFIG, store))
    ids = jnp.zeros((1, 1), jnp.int32)
    params = Decoder(
        LLAMA, lambda layer, q, k, v, state: (q, state), param_dtype=jnp.bfloat16
    ).init(jax.random.key(0), ids, ids, None)
    cache = generator.attention.init_state(CacheShape.of(LLAMA), 2, 5000, 300, jnp.bfloat16)
    rest = jnp.zeros((2, LLAMA.vocab_size)), jnp.zeros(2, bool), jnp.int32(0), jnp.int32(0)
    state = DecodeState(cache, *rest)
    program = compiled.decode_n.lower(
        generator.engine, params, state, jnp.int32(steps), 256
    ).compile()
    text = program.as_text()
    for word in ("callback", "outfeed", "infeed", "MoveToHost", "MoveToDevice"):
        assert word not in text, word
    stacks = {
        tuple(leaf.shape)
        for leaf in jax.tree.leaves(state.attention_state)
        if leaf.size > 2 * 3 * 2 * 64
    }
    layers = {shape[1:] for shape in stacks}
    copied = re.findall(r"= \w+\[([\d,]+)\]\S* (?:copy|copy-start|dynamic-slice|slice)\(", text)
    shapes = [tuple(map(int, shape.split(","))) for shape in copied]
    # The window's tokens are cut in growth, one sequence at a time, and are the only ones.
    bad = [shape for shape in shapes if shape in stacks or shape in layers]
    assert not bad, bad

    def pointers(state):
        paths = jax.tree_util.tree_leaves_with_path(state)
        return {
            jax.tree_util.keystr(path): leaf.unsafe_buffer_pointer()
            for path, leaf in paths
            if leaf.size > 1
        }

    before = pointers(state)
    state, _ = program(params, state, jnp.int32(steps))
    assert state.attention_state.index.tokens.tolist() == [CONFIG.growth_tokens] * 2
    assert pointers(state) == before
    assert state.attention_state.store.rows.data.sharding.memory_kind == memory
