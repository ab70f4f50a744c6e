"""Profile decode steps with `jax.profiler`, and print the calls that take longest.

Shows where to put the trace: after the programs have been compiled, around calls that are waited
for. The folder opens in XProf or Perfetto too. The model is tiny and random: `--model` takes one.
Takes about 15 s on two CPU cores.

    python examples/profile_step.py --out profile
"""

import argparse
import collections
from pathlib import Path

import jax
import jax.numpy as jnp

import wavejax
from models.config import ModelConfig
from models.decoder import Decoder
from wavejax import Generator, WaveAttention, WaveConfig

PROMPT, STEPS, SHOWN = 500, 8, 8
TINY = ModelConfig("llama", 256, 2, 64, 96, 4, 2, 16, 4096)
SETTINGS = WaveConfig(growth_tokens=64, segment_tokens=256, min_retrieved_tokens=64)


def random_model():
    """Config and random parameters."""
    ids = jnp.zeros((1, 1), jnp.int32)
    attend = lambda layer, query, key, value, state: (query, state)  # noqa: E731
    return TINY, Decoder(TINY, attend).init(jax.random.key(0), ids, ids, None)


def times_of(folder: Path) -> dict[str, list[float]]:
    """Microseconds of each run of each operation in a profile: kernels, or a CPU's thunks."""
    [path] = folder.rglob("*.xplane.pb")
    found: dict[str, list[float]] = collections.defaultdict(list)
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        on_gpu = plane.name.startswith("/device:GPU")
        for line in plane.lines:
            # On a GPU a stream's kernels; on a CPU the threads that XLA runs operations in.
            if line.name.startswith("Stream" if on_gpu else "tf_XLA"):
                for event in line.events:
                    if not event.name.startswith("ThunkExecutor"):  # which runs the others
                        found[event.name].append(event.duration_ns / 1e3)
    return found


def main() -> None:
    """Compiles, traces, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("profile"))
    parser.add_argument("--model", help="a folder or file; a tiny random model unless given")
    arguments = parser.parse_args()
    if arguments.model is None:
        config, params = random_model()
    else:
        model = wavejax.load(arguments.model)
        config, params = model.config, model.params

    generator = Generator(config, WaveAttention(SETTINGS, store="device"))
    state = generator.start(params, [[index % 200 for index in range(PROMPT)]], 4 * STEPS)
    # Two calls first: the state of the first one may come in another layout than its result.
    for _ in range(2):
        state, tokens = generator.decode_n(params, state, STEPS)
    jax.block_until_ready(tokens)
    with jax.profiler.trace(str(arguments.out)):
        state, tokens = generator.decode_n(params, state, STEPS)
        jax.block_until_ready((state, tokens))

    times = times_of(arguments.out)
    longest = sorted(times, key=lambda name: -sum(times[name]))[:SHOWN]
    assert longest, "the profile has no operations"
    print(f"{STEPS} steps; the {len(longest)} operations that take longest:")
    for name in longest:
        print(f"  {sum(times[name]):10.1f} us in {len(times[name]):5} runs  {name[:60]}")
    print(f"profile: {arguments.out}")


if __name__ == "__main__":
    main()
