"""Decodes a long time: memory must stay flat, and pieces must give what one run gives.

    python scripts/soak.py --steps 20000 --batch 4 --context 4096

Generates greedily from a real text twice, in calls of `--pieces` steps each (100 and 7, say), with
the index growing all the while, and compares the tokens. After each tenth of a run it looks at the
memory of the device and of the process, and at JAX's live arrays. Exit status 1 if tokens differ or
memory grew.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence

import jax
import numpy as np
import psutil
from tqdm import tqdm

from models.checkpoints.open import find_default_model, open_checkpoint
from models.errors import InputError
from models.parameters import Params
from models.text.tokenizer import load_tokenizer
from models.unstacked import unstack_layers
from wavejax import Generator, Sampler, WaveConfig, make_plan
from wavejax.cli.flags import in_flags
from wavejax.cli.progress import bytes_text
from wavejax.evaluation.haystack import paragraphs

LOOKS = 10  # at memory, in a run
SLACK = 64 * 2**20  # bytes that a process may grow by and count as flat: caches of the runtime


@dataclasses.dataclass(frozen=True)
class Look:
    """Bytes in use at one moment.

    Attributes:
        steps: decode steps done.
        device: of the device's memory, by JAX's allocator; 0 where it does not say.
        process: resident, of the host's memory.
        arrays: of all JAX arrays.
    """

    steps: int
    device: int
    process: int
    arrays: int


def look(steps: int) -> Look:
    """Measures now."""
    stats = jax.local_devices()[0].memory_stats() or {}
    arrays = sum(array.nbytes for array in jax.live_arrays())
    return Look(steps, stats.get("bytes_in_use", 0), psutil.Process().memory_info().rss, arrays)


def soak(
    generator: Generator,
    params: Params,
    prompts: Sequence[Sequence[int]],
    steps: int,
    piece: int,
    shown: bool = False,
) -> tuple[np.ndarray, list[Look]]:
    """Generate in calls of `piece` steps; return tokens `[steps, batch]` and look at memory.

    The first look comes after a tenth of the run: by then all is compiled.
    """
    state = generator.start(params, prompts, steps)
    tokens, looks, due = [], [], steps / LOOKS
    done = 0
    with tqdm(total=steps, desc=f"pieces of {piece}", disable=not shown) as bar:
        while done < steps:
            state, new = generator.decode_n(params, state, min(piece, steps - done))
            tokens.append(np.array(new))  # a copy: a view would keep the array alive
            done += len(new)
            bar.update(len(new))
            if done >= due:
                looks.append(look(done))
                due += steps / LOOKS
    return np.concatenate(tokens), looks


def growth(looks: Sequence[Look]) -> dict[str, int]:
    """Bytes by which each memory grew from the first look to the last; 0 or less is flat."""
    first, last = looks[0], looks[-1]
    return {
        name: getattr(last, name) - getattr(first, name) for name in ("device", "process", "arrays")
    }


def faults(pieces: Sequence[int], runs: Sequence[tuple[np.ndarray, list[Look]]]) -> list[str]:
    """Return what is wrong with the runs, a line each."""
    found = []
    reference = runs[0][0]
    for piece, (tokens, looks) in zip(pieces, runs, strict=True):
        differ = np.argwhere(tokens != reference)
        if len(differ):
            step, sequence = differ[0]
            found.append(
                f"pieces of {piece}: {len(differ)} tokens differ from pieces of {pieces[0]}, first "
                f"at step {step} of sequence {sequence}"
            )
        for name, more in growth(looks).items():
            # Arrays and the device's bytes are counted exactly; a process has caches of its own.
            if more > (SLACK if name == "process" else 0):
                found.append(f"pieces of {piece}: {name} memory grew by {bytes_text(more)}")
    return found


def main() -> int:
    """Return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="GGUF file or folder (default: SmolLM2)")
    parser.add_argument("--steps", type=int, default=20_000, help="tokens for each sequence")
    parser.add_argument("--batch", type=int, default=4, help="sequences, of unequal lengths")
    parser.add_argument("--context", type=int, default=4096, help="tokens of the longest prompt")
    parser.add_argument("--pieces", type=int, nargs="+", default=[100, 7], help="steps in a call")
    parser.add_argument("--store", choices=["auto", "host", "device"], default="auto")
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()
    try:
        path = arguments.model or find_default_model()
        checkpoint = open_checkpoint(path)
        text = load_tokenizer(path).encode("\n\n".join(paragraphs()), add_special=True)
        longest, batch = arguments.context, arguments.batch
        prompts = [text[: max(1, longest * (i + 1) // batch)] for i in range(batch)]
        plan = make_plan(
            checkpoint.config, WaveConfig(), batch, max(map(len, prompts)),
            arguments.steps, arguments.dtype, store=arguments.store, sampler=Sampler(),
        )  # fmt: skip
        plan.check()
        params = checkpoint.load_params(arguments.dtype)
    except InputError as error:
        print("error:", in_flags(str(error)), file=sys.stderr)
        return 2
    generator = Generator(checkpoint.config, plan.attention)
    if generator.unrolls:
        params = unstack_layers(params)
    runs = []
    for piece in arguments.pieces:
        started = time.perf_counter()
        runs.append(soak(generator, params, prompts, arguments.steps, piece, sys.stderr.isatty()))
        seconds = time.perf_counter() - started
        grown = ", ".join(f"{name} {more:+,} B" for name, more in growth(runs[-1][1]).items())
        print(f"pieces of {piece}: {seconds:.0f} s with the prefill; grew by: {grown}", flush=True)
    found = faults(arguments.pieces, runs)
    segments = arguments.steps // WaveConfig().growth_tokens
    print(f"store: {plan.need.rows_on}; each sequence's index grew about {segments} times")
    print("\n".join(found) or "tokens equal, memory flat")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
