"""Compares attentions on SmolLM2's needle tasks under teacher forcing, at one token budget.

    python scripts/compare_methods.py --lengths 2048 4096 --samples 4

Full attention answers each prompt greedily; every method then runs the answer's tokens through
decode steps of its own, all from one shared prefill. Prints, by length and method, the share of
right reference strings that the method keeps, and the mean KL divergence from full attention.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from models.checkpoint import find_default_model, open_checkpoint
from models.tokenizer import Tokenizer, load_tokenizer
from wavejax import DenseAttention, Generator, WaveAttention, WaveConfig
from wavejax.evaluation.needles import TASKS, Sample, make_sample
from wavejax.evaluation.teacher_forcing import (
    Agreement,
    compare,
    greedy,
    places_of,
    share_prefill,
)
from wavejax.generator import NO_TOKEN, bucket

ANSWER_TOKENS = 24
BATCH = 12


def methods(fraction: float) -> dict[str, WaveConfig]:
    """The settings compared: the same share of tokens retrieved, and no floor under it."""
    budget: dict[str, Any] = {"retrieval_fraction": fraction, "min_retrieved_tokens": 0}
    return {
        "paper": WaveConfig.paper(**budget),
        "paper, nothing estimated": WaveConfig.paper(**budget, estimation_fraction=0.0),
        "wave": WaveConfig(**budget),
        "wave, nothing estimated": WaveConfig(**budget, estimation_fraction=0.0),
        "wave, no codes": WaveConfig(**budget, token_codes=False),
    }


class Bench:
    """The model, and what each method makes of a batch of samples."""

    def __init__(self, fraction: float):
        path = find_default_model()
        checkpoint = open_checkpoint(path)
        self.tokenizer: Tokenizer = load_tokenizer(path)
        self.params = checkpoint.load_params("float32")
        stops = tuple(sorted(self.tokenizer.stop_ids))
        self.full = Generator(checkpoint.config, DenseAttention(), stop_tokens=stops)
        # Nothing ends a forced answer, and its stop token counts.
        self.waves = {
            name: Generator(checkpoint.config, WaveAttention(config, "device"))
            for name, config in methods(fraction).items()
        }

    def run(self, samples: list[Sample], shown: tqdm) -> dict[str, list[Agreement]]:
        """Each method's agreement with full attention's answer to each sample."""
        prompts = [sample.tokens for sample in samples]
        state = self.full.start(self.params, prompts, ANSWER_TOKENS)
        answers = greedy(self.full, self.params, state, ANSWER_TOKENS)
        forced = jnp.asarray(np.where(answers == NO_TOKEN, 0, answers))
        copy = jax.tree.map(jnp.copy, state)
        _, full_logits = self.full.force(self.params, copy, forced)
        shown.update()
        room = max(bucket(len(prompt)) for prompt in prompts)
        results = {}
        for name, generator in self.waves.items():
            shared = share_prefill(generator, state, room, ANSWER_TOKENS)
            _, logits = generator.force(self.params, shared, forced)
            results[name] = [
                compare(
                    answers[:, i],
                    full_logits[:, i],
                    logits[:, i],
                    self.places(sample, answers[:, i]),
                )
                for i, sample in enumerate(samples)
            ]
            shown.update()
        return results

    def places(self, sample: Sample, answer: np.ndarray) -> list[np.ndarray]:
        """Where the answer spells those of the references that it gives."""
        stream = self.tokenizer.stream()
        pieces = [stream.push(token) for token in answer[answer != NO_TOKEN].tolist()]
        found = [places_of(reference, pieces) for reference in sample.references]
        return [places for places in found if places is not None]


def table(results: dict[str, list[Agreement]], length: int) -> str:
    """A Markdown table of one length's means, with the standard error of the KL."""
    lines = [
        f"{length} tokens, {len(next(iter(results.values())))} samples",
        "",
        "| method | kept | KL | same token |",
        "| --- | --- | --- | --- |",
    ]
    for name, agreements in results.items():
        kl = np.array([agreement.kl for agreement in agreements])
        kept = np.nanmean([agreement.kept for agreement in agreements])
        match = np.mean([agreement.match for agreement in agreements])
        error = kl.std(ddof=1) / math.sqrt(len(kl)) if len(kl) > 1 else math.nan
        lines.append(f"| {name} | {kept:.3f} | {kl.mean():.4f} ± {error:.4f} | {match:.3f} |")
    return "\n".join(lines)


def main() -> None:
    """Runs the comparison and prints a table a length."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--samples", type=int, default=4, help="of each task at each length")
    parser.add_argument("--fraction", type=float, default=0.018, help="share of tokens retrieved")
    parser.add_argument("--json", type=Path, help="write every sample's figures here")
    arguments = parser.parse_args()

    bench = Bench(arguments.fraction)
    records = []
    jobs = [(task, seed) for seed in range(arguments.samples) for task in TASKS]
    for length in arguments.lengths:
        results: dict[str, list[Agreement]] = {name: [] for name in bench.waves}
        batches = [jobs[i : i + BATCH] for i in range(0, len(jobs), BATCH)]
        with tqdm(total=len(batches) * (len(results) + 1), desc=f"{length} tokens") as shown:
            for batch in batches:
                samples = [
                    make_sample(TASKS[task], bench.tokenizer, length, seed) for task, seed in batch
                ]
                for name, agreements in bench.run(samples, shown).items():
                    results[name] += agreements
                    records += [
                        {"task": task, "length": length, "seed": seed, "method": name}
                        | vars(agreement)
                        for (task, seed), agreement in zip(batch, agreements, strict=True)
                    ]
                if arguments.json:
                    arguments.json.write_text(json.dumps(records, indent=1))
        print(table(results, length), end="\n\n", flush=True)
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, {arguments.fraction:.1%}")


if __name__ == "__main__":
    main()
