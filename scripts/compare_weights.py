"""How far weights in 8 and 4 bits take a model's next tokens from those of its floats.

    JAX_PLATFORMS=cpu python scripts/compare_weights.py --out weights.json

Reads text of Python's own manual in pieces of 512 tokens. Says of each way to keep the weights the
bits a number, the KL divergence from the floats' next-token distributions (mean over all tokens,
nats), the perplexity, how often the most probable token is the same, and the least time of a decode
step of one sequence.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gpu_timing import device_facts
from jax import Array

from models.checkpoints.levels import quantised
from models.checkpoints.open import Checkpoint, find_default_model, open_checkpoint
from models.config import ModelConfig
from models.decoder import apply_model, unembed
from models.errors import InputError
from models.formats import INT4, INT8, WeightFormat, bits_each, matrices
from models.parameters import Params
from models.parameters import Path as ParameterPath
from models.text.tokenizer import load_tokenizer
from wavejax import DenseAttention, Generator
from wavejax.cli.flags import in_flags
from wavejax.evaluation.files import write_text
from wavejax.evaluation.haystack import paragraphs
from wavejax.language_model import causal_attend

PIECE, STEPS, CALLS = 512, 16, 4


def main() -> int:
    """Compare, write the figures, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="the installed SmolLM2, if none is named")
    parser.add_argument("--pieces", type=int, default=4, help="of 512 tokens")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    arguments = parser.parse_args()
    try:
        study(open_checkpoint(arguments.model or find_default_model()), arguments)
    except InputError as error:
        print("error:", in_flags(str(error)), file=sys.stderr)
        return 2
    return 0


def study(checkpoint: Checkpoint, arguments: argparse.Namespace) -> None:
    """Compare the ways to keep a model's weights."""
    tokens = text_tokens(checkpoint, arguments.pieces)
    report: dict[str, Any] = device_facts() | {"model": checkpoint.path.name, "weights": {}}
    expected: list[Array] = []
    for name, params in ways(checkpoint):
        logs = log_probabilities(checkpoint.config, params, tokens)
        expected = expected or logs
        figures = compare(tokens, expected, logs)
        nbytes = sum(x.nbytes for x in jax.tree.leaves(params))
        figures["bits"] = round(bits_each(checkpoint.config, nbytes), 2)
        figures["ms_per_step"] = round(step_time(checkpoint.config, params), 1)
        report["weights"][name] = figures
        print(name, json.dumps(figures), flush=True)
    if arguments.out is not None:
        write_text(arguments.out, json.dumps(report, indent=1) + "\n")


def ways(checkpoint: Checkpoint) -> Iterator[tuple[str, Params]]:
    """Make the parameters in each way, one after the other: first the floats.

    Besides what `weight_dtype` takes there is what it might have been: larger groups, and
    embeddings in 4 bits.
    """
    floats = checkpoint.load_params("float32")
    yield "model", floats
    for weight_dtype in ("int8", "packed", "int4"):
        if weight_dtype != "packed" or packs(checkpoint):
            yield weight_dtype, checkpoint.load_params("float32", None, weight_dtype)
    in_groups = WeightFormat(4, 64, INT4.scale)
    for name, layers, table in (
        ("int4_groups_of_64", in_groups, INT8),
        ("int4_embedding_too", INT4, INT4),
    ):
        formats = {
            path: layers if path[0] == "layers" else table for path in matrices(checkpoint.config)
        }
        yield name, with_formats(floats, formats)


def packs(checkpoint: Checkpoint) -> bool:
    """Whether a file has levels of its own, which "packed" keeps."""
    try:
        return bool(checkpoint.formats("packed"))
    except InputError:
        return False


def with_formats(floats: Params, formats: dict[ParameterPath, WeightFormat]) -> Params:
    """Return parameters with matrices in these formats."""

    def of(path: Any, leaf: Array) -> Any:
        at = tuple(key.key for key in path)
        return quantised(np.asarray(leaf), formats[at]) if at in formats else leaf

    return {"params": jax.tree_util.tree_map_with_path(of, floats["params"])}


def text_tokens(checkpoint: Checkpoint, pieces: int) -> Array:
    """Return int32 ``[pieces, 512]`` of the manual."""
    tokenizer, found = load_tokenizer(checkpoint.path), []
    for paragraph in paragraphs():
        found += tokenizer.encode(paragraph + "\n\n", add_special=False)
    return jnp.asarray(found[: pieces * PIECE], jnp.int32).reshape(pieces, PIECE)


def log_probabilities(config: ModelConfig, params: Params, tokens: Array) -> list[Array]:
    """Return of each piece the log-probabilities of the next tokens, ``[512, vocab]``."""
    positions = jnp.arange(PIECE)[None]

    @jax.jit
    def run(params: Params, piece: Array) -> Array:
        hidden, _ = apply_model(config, params, piece[None], positions, causal_attend, None)
        return jax.nn.log_softmax(unembed(config, params, hidden[0]))

    return [run(params, piece) for piece in tokens]


def compare(tokens: Array, expected: list[Array], given: list[Array]) -> dict[str, float]:
    """Compare next-token distributions over all pieces."""
    kl, same, loss = [], [], []
    for piece, floats, logs in zip(tokens, expected, given, strict=True):
        kl.append(jnp.sum(jnp.exp(floats) * (floats - logs), axis=-1).mean())
        same.append((logs.argmax(-1) == floats.argmax(-1)).mean())
        loss.append(-jnp.take_along_axis(logs[:-1], piece[1:, None], axis=-1).mean())
    return {
        "kl_nats": round(abs(float(np.mean(kl))), 5),
        "perplexity": round(math.exp(float(np.mean(loss))), 2),
        "same_percent": round(100 * float(np.mean(same)), 1),
    }


def step_time(config: ModelConfig, params: Params) -> float:
    """Return milliseconds of a decode step of one sequence, the least of a few calls."""
    generator, seconds = Generator(config, DenseAttention()), []
    for _ in range(CALLS):
        state = generator.start(params, [range(3, 67)], STEPS)
        jax.block_until_ready(state.logits)
        start = time.perf_counter()
        _, drawn = generator.decode_n(params, state, STEPS)
        drawn.block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 1e3 * min(seconds) / STEPS


if __name__ == "__main__":
    sys.exit(main())
