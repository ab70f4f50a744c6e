"""A slice of an evaluation, on SmolLM2: how the methods compare at one budget."""

import numpy as np
import pytest

from models.checkpoints.open import find_default_model, open_checkpoint
from models.text.tokenizer import load_tokenizer
from wavejax.evaluation.bench import Bench
from wavejax.evaluation.haystack import load_haystack
from wavejax.evaluation.methods import parse_methods
from wavejax.evaluation.samples import Material
from wavejax.evaluation.tasks import TASKS

# A real model runs longer than it compiles.
pytestmark = pytest.mark.optimised

# Of 1,400 indexed tokens every method reads 256.
LENGTH = 1600
BUDGET = {"retrieval_fraction": 0.009, "min_retrieved_tokens": 256}
METHODS = "full,streaming_llm,quest,paper,wave"


def bench_of(methods, budget):
    """The methods on the model, and what samples are made of."""
    path = find_default_model()
    checkpoint, tokenizer = open_checkpoint(path), load_tokenizer(path)
    bench = Bench(
        checkpoint.config,
        checkpoint.load_params("float32"),
        tokenizer,
        parse_methods(methods, budget),
        stop_tokens=tuple(sorted(tokenizer.stop_ids)),
    )
    return bench, Material(tokenizer, load_haystack())


@pytest.mark.slow(65)
def test_scores_by_method(record_property):
    bench, material = bench_of(METHODS, BUDGET)
    scores, kl = {}, {}
    for name in ("niah_single_2", "niah_multikey_1"):
        samples = [TASKS[name].sample(material, LENGTH, 42, index) for index in range(2)]
        for method, figures in bench.run(samples, LENGTH, METHODS.split(",")):
            scores.setdefault(method, []).extend(one.score for one in figures)
            kl.setdefault(method, []).extend(one.kl for one in figures)
    means = {method: np.mean(values) for method, values in scores.items()}
    divergence = {method: np.mean(values) for method, values in kl.items()}
    record_property("scores", str(means))
    print(means, divergence)
    assert means["full"] >= 0.75, "full attention finds too little to compare"
    assert means["wave"] >= means["full"] - 0.25
    # The needles lie before its window.
    assert means["streaming_llm"] <= means["wave"] - 0.5
    assert divergence["full"] == 0
    assert divergence["wave"] < divergence["paper"] / 2
    assert divergence["wave"] < divergence["quest"] / 2
