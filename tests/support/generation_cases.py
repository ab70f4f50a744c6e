"""Generations whose tokens are recorded (scripts/record_generations.py): no change may change them.

A tiny random model with every attention and engine, and the default model; greedy and sampled.
"""

import functools
import pydoc_data.topics
from collections.abc import Callable

import numpy as np

from models.checkpoints.open import find_default_model, open_checkpoint
from models.text.tokenizer import load_tokenizer
from tests.support.tiny_generator import CONFIG, MODEL, make_params, make_prompts
from wavejax import DenseAttention, Generator, Sampler, WaveAttention, WaveConfig

# Of the tiny model: with 90 new tokens the two long prompts' indexes grow, and the short one's
# begins. SEED and STOPS end some sequences early, and not all.
LENGTHS, NEW_TOKENS, SEED, STOPS = (5, 262, 318), 90, 1, (12,)
ATTENTIONS = {
    "dense": DenseAttention(),
    "device": WaveAttention(CONFIG, "device"),
    "host": WaveAttention(CONFIG, "host", "in_place"),
    "staged": WaveAttention(CONFIG, "host", "staged"),
}
SAMPLERS = {
    "greedy": Sampler(),
    "greedy, repetition": Sampler(repetition_penalty=1.4),
    "temperature": Sampler(temperature=1.2),
    "min_p": Sampler(temperature=1.5, min_p=0.05),
    "top_p": Sampler(temperature=1.0, top_p=0.95),
    "top_k": Sampler(temperature=0.7, top_k=7),
    "all": Sampler(1.3, 20, 0.9, 0.02, 1.2, 0.3, 0.2),
}
# Each sampler once; every attention greedy and sampled.
TINY = [("dense", sampler) for sampler in SAMPLERS]
TINY += [(name, one) for name in ("device", "host", "staged") for one in ("greedy", "top_p")]

# Of the default model.
REAL_TOKENS = 16
REAL_LENGTHS = (60, 420)
REAL_CONFIG = WaveConfig(
    local_tokens=16,
    growth_tokens=64,
    segment_tokens=128,
    min_candidate_tokens=64,
    min_retrieved_tokens=16,
)
REAL_ATTENTIONS = {"dense": DenseAttention(), "wave": WaveAttention(REAL_CONFIG, "host")}
REAL = [(name, one) for name in REAL_ATTENTIONS for one in ("greedy", "top_p")]


@functools.cache
def _default_model():
    path = find_default_model()
    checkpoint = open_checkpoint(path)
    text = load_tokenizer(path).encode(pydoc_data.topics.topics["typesmapping"], add_special=True)
    prompts = [text[:length] for length in REAL_LENGTHS]
    return checkpoint.config, checkpoint.load_params("float32"), prompts


def run_tiny(attention: str, sampler: str) -> list[list[int]]:
    """The tokens of one case, a list for each sequence; NO_TOKEN once it has stopped."""
    generator = Generator(MODEL, ATTENTIONS[attention], SAMPLERS[sampler], STOPS)
    return _run(generator, make_params(), make_prompts(LENGTHS), NEW_TOKENS)


def run_real(attention: str, sampler: str) -> list[list[int]]:
    """The same, of the default model in float32."""
    config, params, prompts = _default_model()
    generator = Generator(config, REAL_ATTENTIONS[attention], SAMPLERS[sampler])
    return _run(generator, params, prompts, REAL_TOKENS)


def _run(generator, params, prompts, new_tokens):
    state = generator.start(params, prompts, new_tokens, SEED)
    parts = []
    for steps in (1, new_tokens - 1):  # A stream's first token comes alone.
        state, tokens = generator.decode_n(params, state, steps)
        parts.append(np.asarray(tokens))
    return np.concatenate(parts).T.tolist()


CASES: dict[str, Callable[[], list[list[int]]]] = {}
for names in TINY:
    CASES[f"tiny, {', '.join(names)}"] = functools.partial(run_tiny, *names)
for names in REAL:
    CASES[f"default model, {', '.join(names)}"] = functools.partial(run_real, *names)
