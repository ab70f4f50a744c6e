"""Compares admission ratios: what they miss, and what they cost in accuracy, on real text.

    python scripts/compare_admission.py --context 8192 --budgets 0.009 0.036 --ratios 1 4 16

Full attention reads a text; each setting then runs the text's next tokens through decode steps of
its own, from the same prefill, with rows in host memory behind a row cache. Printed are the mean KL
divergence from full attention, the share of steps with the same most probable token, and the rows
found and missed a step and kv head, all after the first steps, in which the cache fills.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from record_traces import SAMPLER, agreement, cut_text
from tqdm import tqdm

from models.checkpoints.open import find_default_model, open_checkpoint
from models.errors import InputError
from models.parameters import Params
from models.text.tokenizer import load_tokenizer
from wavejax import DenseAttention, Generator, WaveAttention, WaveConfig
from wavejax.attention.dense import DenseState
from wavejax.cli.flags import in_flags
from wavejax.engine.prompts import bucket
from wavejax.engine.state import DecodeState, commit
from wavejax.evaluation.files import write_growing
from wavejax.evaluation.haystack import MANUAL, load_haystack
from wavejax.evaluation.setup import check_context, make_room_for
from wavejax.evaluation.shared_prefill import build_index
from wavejax.evaluation.summary import tabulate
from wavejax.planning.free_memory import host_available, set_memory_limits
from wavejax.store.rows import RowCache, init_cache
from wavejax.store.state import WaveState

# Of the host's memory, what may be pinned.
PINNED_SHARE = 0.5


def settings(budgets: list[float], ratios: list[float]) -> dict[str, WaveConfig]:
    """Every budget with every ratio; 0 stands for the default budget. RetroInfer's come first."""
    found = {"paper": WaveConfig.paper()}
    for budget in budgets:
        config = WaveConfig()
        if budget:
            config = WaveConfig(
                retrieval_fraction=budget, min_retrieved_tokens=0, min_candidate_tokens=0
            )
        for ratio in ratios:
            name = f"{100 * budget:g} %" if budget else "default"
            found[f"{name}, ratio {ratio:g}"] = dataclasses.replace(config, admission_ratio=ratio)
    return found


def start(state: DecodeState, generator: Generator, room: int, new: int, slots: int) -> DecodeState:
    """Return a state of the generator's own after full attention's prefill, its cache empty.

    Its index is its own, too: `SharedPrefill` copies one for each state, and rows in host memory
    are not to be copied by JAX.

    Args:
        state: full attention's; not donated.
        generator: of wave attention.
        room: for the prompt's tokens.
        new: room for tokens to come.
        slots: of the row cache; 0: as many as the settings make.
    """
    attention = generator.attention
    assert isinstance(attention, WaveAttention)
    full = state.attention_state
    assert isinstance(full, DenseState)
    own = build_index(attention, generator, full, room, new)
    if slots:
        shape, tokens = own.cache.rows.shape, own.cache.table.slot_of_token.shape[-1]
        cache = init_cache((*shape[:3], slots, *shape[4:]), tokens, own.cache.rows.dtype)
        own = dataclasses.replace(own, cache=cache)
    rest = dataclasses.replace(state, attention_state=None)
    return commit(dataclasses.replace(jax.tree.map(jnp.copy, rest), attention_state=own))


def cache_of(state: DecodeState) -> RowCache:
    """Return the row cache of wave attention's state."""
    assert isinstance(state.attention_state, WaveState)
    return state.attention_state.cache


def measure(
    generator: Generator,
    params: Params,
    state: DecodeState,
    answer: Array,
    expected: Array,
    warm_up: int,
) -> dict[str, Any]:
    """Run an answer's tokens `[steps, 1]`; donate the state.

    Args:
        generator: of wave attention.
        params: the model's.
        state: of `start`.
        answer: the tokens to run.
        expected: full attention's logits, `[steps, 1, vocab]`.
        warm_up: steps not counted.
    """
    slots = cache_of(state).rows.shape[3]
    counts, logits = [], []
    for tokens in (answer[:warm_up], answer[warm_up:]):
        state, some = generator.force(params, state, tokens)
        table = cache_of(state).table
        counts.append([np.asarray(x).astype(np.int64).sum() for x in (table.hits, table.misses)])
        logits.append(some)
    # A row is a layer's, too: as many as the table has counters.
    rows = (len(answer) - warm_up) * table.misses.size
    hits, misses = (after - before for before, after in zip(*counts, strict=True))
    kl, same = agreement(expected[warm_up:, 0], logits[1][:, 0])
    first, _ = agreement(expected[:warm_up, 0], logits[0][:, 0])
    return {
        "slots": slots,
        "kl": kl,
        "same": same,
        "kl_while_filling": first,
        "hit": hits / rows,
        "missed": misses / rows,
    }


def main() -> int:
    """Measures every setting; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="GGUF file or folder (default: SmolLM2)")
    parser.add_argument("--context", type=int, default=8192, help="tokens, prompt and answer")
    parser.add_argument("--new-tokens", type=int, default=256, help="of the answer")
    parser.add_argument("--warm-up", type=int, default=64, help="of these, steps not counted")
    parser.add_argument(
        "--budgets", type=float, nargs="+", default=[0.009, 0.036, 0.0],
        help="shares of the tokens that are retrieved; 0: the default, 4096 at least",
    )  # fmt: skip
    parser.add_argument(
        "--ratios", type=float, nargs="+", default=[1.0, 4.0, 16.0], help="of admission"
    )
    parser.add_argument(
        "--slots", type=float, default=0.05,
        help="of the row cache, as a share of the tokens; 0: as many as the settings make",
    )  # fmt: skip
    parser.add_argument("--haystack", default=MANUAL, help="manual, essays or a text file")
    parser.add_argument("--dtype", default="float32", help="of weights and cache")
    parser.add_argument("--json", type=Path, help="write every figure here")
    arguments = parser.parse_args()
    new = arguments.new_tokens
    try:
        if not 0 < arguments.warm_up < new < arguments.context:
            raise InputError(
                f"--warm-up {arguments.warm_up}, --new-tokens {new} and --context "
                f"{arguments.context} must rise, from 1"
            )
        tabulate()  # Not to be found missing after hours.
        make_room_for(arguments.json)
        cases = settings(arguments.budgets, arguments.ratios)
        path = arguments.model or find_default_model()
        checkpoint, tokenizer = open_checkpoint(path), load_tokenizer(path)
        check_context(checkpoint, arguments.context, new)
        haystack = load_haystack([arguments.haystack])
        prompt, answer = cut_text(tokenizer, haystack, arguments.context - new, new, 0)
        set_memory_limits(int(PINNED_SHARE * host_available()))
        params = checkpoint.load_params(arguments.dtype)
    except InputError as error:
        print("error:", in_flags(str(error)), file=sys.stderr)
        return 2
    tokens = jnp.asarray(answer)[:, None]
    full = Generator(checkpoint.config, DenseAttention(), SAMPLER)
    state = full.start(params, [prompt], new)
    _, expected = full.force(params, jax.tree.map(jnp.copy, state), tokens)
    slots = int(np.ceil(arguments.slots * arguments.context))
    about = {
        "model": path.name,
        "context": len(prompt),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "dtype": arguments.dtype,
    }
    results = []
    for name, config in tqdm(cases.items(), disable=None):
        generator = Generator(checkpoint.config, WaveAttention(config, "host"), SAMPLER)
        own = start(state, generator, bucket(len(prompt)), new, slots)
        found = measure(generator, params, own, tokens, expected, arguments.warm_up)
        results.append({"settings": name} | found)
        tqdm.write(json.dumps(results[-1]))
        if arguments.json:
            text = json.dumps({"about": about, "results": results}, indent=1)
            write_growing(arguments.json, text, whole=len(results) == len(cases))
    print(tabulate()(results, headers="keys", floatfmt=".4g"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
