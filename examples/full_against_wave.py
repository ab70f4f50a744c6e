"""Plot how far wave attention's logits are from full attention's, by the tokens it retrieves.

Shows `Generator.force`, which gives the logits of given tokens, and writes a plot. The model is
tiny and random, so the numbers say nothing of real models: `--model` takes one.
Needs matplotlib, of the extra `evaluation`. Takes about 30 s on two CPU cores.

    python examples/full_against_wave.py --out full_against_wave.png
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

import wavejax
from models.config import ModelConfig
from models.decoder import Decoder
from wavejax import DenseAttention, Generator, WaveAttention, WaveConfig

matplotlib.use("Agg")  # writes files; opens no window
from matplotlib import pyplot

PROMPT, STEPS = 500, 16
RETRIEVED = (8, 32, 128, 512)  # tokens; the last one is all
TINY = ModelConfig("llama", 256, 2, 64, 96, 4, 2, 16, 4096)


def random_model():
    """Config and random parameters."""
    ids = jnp.zeros((1, 1), jnp.int32)
    attend = lambda layer, query, key, value, state: (query, state)  # noqa: E731
    return TINY, Decoder(TINY, attend).init(jax.random.key(0), ids, ids, None)


def logits_of(config, params, attention, prompt, tokens):
    """Logits `[STEPS, vocab]` with which the tokens are met, float32."""
    generator = Generator(config, attention)
    state = generator.start(params, [prompt], STEPS)
    return np.asarray(generator.force(params, state, tokens[:, None])[1][:, 0])


def main() -> None:
    """Measures, prints a table, writes the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("full_against_wave.png"))
    parser.add_argument("--model", help="a folder or file; a tiny random model unless given")
    arguments = parser.parse_args()
    if arguments.model is None:
        config, params = random_model()
    else:
        model = wavejax.load(arguments.model)
        config, params = model.config, model.params
    ids = np.random.default_rng(0).integers(0, config.vocab_size, PROMPT + STEPS, np.int32)
    prompt, tokens = ids[:PROMPT], ids[PROMPT:]

    full = logits_of(config, params, DenseAttention(), prompt, tokens)
    errors = []
    print("retrieved tokens   mean error of a logit")
    for count in RETRIEVED:
        settings = WaveConfig(growth_tokens=128, segment_tokens=256, min_retrieved_tokens=count)
        wave = logits_of(config, params, WaveAttention(settings, "device"), prompt, tokens)
        errors.append(float(np.abs(wave - full).mean()))
        print(f"{count:16}   {errors[-1]:.2e}")
    assert errors[-1] < 1e-4 < errors[0], "where all tokens are retrieved, attention is exact"

    figure, axes = pyplot.subplots(figsize=(5, 3.5), layout="constrained")
    axes.loglog(RETRIEVED, errors, marker="o")
    axes.set_xlabel("tokens retrieved in a step")
    axes.set_ylabel("mean |wave - full| of a logit")
    axes.set_title(f"{PROMPT} tokens of context, {STEPS} steps")
    figure.savefig(arguments.out, dpi=150)
    print(f"plot: {arguments.out}")


if __name__ == "__main__":
    main()
