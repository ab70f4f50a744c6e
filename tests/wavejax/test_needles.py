"""SmolLM2 on real text: wave attention answers as full attention does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as ops
from models.checkpoint import find_default_model, open_checkpoint
from models.tokenizer import load_tokenizer
from pallas_kernels.encode_tokens import rotation
from pallas_kernels.encode_tokens.reference import unpack_signs
from wavejax import DenseAttention, Generator, WaveAttention, WaveConfig
from wavejax.evaluation.needles import TASKS, make_sample, score
from wavejax.evaluation.teacher_forcing import compare, greedy, places_of, share_prefill
from wavejax.generator import bucket

# 20 needles; most are short, since two cores read a prompt at some 300 tokens a second, and few
# different lengths, since each compiles programs of its own.
LENGTHS = [1024] * 12 + [1500] * 4 + [2048] * 2 + [3000] + [4096]
ANSWER_TOKENS = 10


@pytest.fixture(scope="module")
def smollm2():
    """Configuration, float32 parameters and tokenizer."""
    path = find_default_model()
    checkpoint = open_checkpoint(path)
    return checkpoint.config, checkpoint.load_params("float32"), load_tokenizer(path)


@pytest.mark.slow
def test_twenty_needles_at_1k_to_4k_tokens(smollm2, record_property):
    config, params, tokenizer = smollm2
    stops = tuple(sorted(tokenizer.stop_ids))
    full = Generator(config, DenseAttention(), stop_tokens=stops)
    wave = Generator(config, WaveAttention(), stop_tokens=stops)
    found = {"full": 0.0, "wave": 0.0}
    for seed, length in enumerate(LENGTHS):
        sample = make_sample(TASKS["single" if seed % 2 else "multikey"], tokenizer, length, seed)
        assert 0.9 * length < len(sample.tokens) <= length
        state = full.start(params, [sample.tokens], ANSWER_TOKENS)
        states = {
            "wave": share_prefill(wave, state, bucket(len(sample.tokens)), ANSWER_TOKENS),
            "full": state,
        }
        for name, generator in (("wave", wave), ("full", full)):
            _, tokens = generator.decode_n(params, states[name], ANSWER_TOKENS)
            answer = tokenizer.decode([token for token in tokens[:, 0].tolist() if token >= 0])
            found[name] += score(sample, answer)
    record_property("needles found", str(found))
    print(f"of {len(LENGTHS)} needles: full attention {found['full']}, wave {found['wave']}")
    assert found["full"] >= 10, f"too few found to compare: {found}"
    assert abs(found["wave"] - found["full"]) <= 1, found


@pytest.mark.slow
def test_two_level_index_beats_the_papers_at_one_budget(smollm2):
    """A slice of scripts/compare_methods.py: KL from full attention, 1.8 % of 2,048 tokens."""
    config, params, tokenizer = smollm2
    full = Generator(config, DenseAttention())
    samples = [make_sample(task, tokenizer, 2048, 0) for task in TASKS.values()]
    state = full.start(params, [sample.tokens for sample in samples], ANSWER_TOKENS)
    answers = greedy(full, params, state, ANSWER_TOKENS)
    forced = jnp.maximum(answers, 0)
    budget = {"retrieval_fraction": 0.018, "min_retrieved_tokens": 0}
    logits = {}
    for name, settings in (("paper", WaveConfig.paper(**budget)), ("wave", WaveConfig(**budget))):
        generator = Generator(config, WaveAttention(settings, "device"))
        shared = share_prefill(generator, state, 2048, ANSWER_TOKENS)
        _, logits[name] = generator.force(params, shared, forced)
    _, expected = full.force(params, state, forced)
    kl = {
        name: np.mean(
            [compare(answers[:, i], expected[:, i], of[:, i], []).kl for i in range(len(samples))]
        )
        for name, of in logits.items()
    }
    print(kl)
    assert kl["wave"] < kl["paper"] / 3, kl


def test_codes_error_on_real_keys_is_as_theory_says(smollm2):
    """The codes' estimates of q.k for real keys and queries: no bias, and RaBitQ's deviation."""
    config, params, tokenizer = smollm2
    text = make_sample(TASKS["single"], tokenizer, 600, 0)
    attention = DenseAttention()
    state = Generator(config, attention).start(params, [text.tokens], 1)
    layer, head = 12, 1
    keys = state.cache.keys[layer, 0, head, : len(text.tokens)]
    centroids = jnp.broadcast_to(keys.reshape(-1, keys.shape[-1])[:512].mean(0), keys.shape)
    queries = keys[-64:]  # of the same distribution as queries are, up to a rotation
    head_dim = keys.shape[-1]
    errors, expected = [], []
    gaussian = jax.random.normal(jax.random.key(0), (32, head_dim, head_dim))
    for matrix in [jnp.asarray(rotation(head_dim)), *jnp.linalg.qr(gaussian)[0]]:
        coded = ops.encode_tokens(keys, centroids, matrix)
        signs = unpack_signs(coded.codes, head_dim).astype(jnp.float32)
        estimate = coded.scales * ((queries @ matrix.T) @ signs.T)
        residual = keys - centroids
        length = jnp.linalg.norm(residual, axis=-1)
        along = queries @ residual.T
        errors.append(np.asarray(estimate - along))
        across = jnp.sqrt(jnp.maximum((queries**2).sum(-1)[:, None] - (along / length) ** 2, 0))
        cosine = length / (coded.scales * np.sqrt(head_dim))
        tangent = jnp.sqrt(1 - cosine**2) / cosine
        expected.append(np.asarray(across * length * tangent / np.sqrt(head_dim - 1)))
    normalised = np.stack(errors) / np.stack(expected)
    # A mean over 33 rotations of errors that share them: its own deviation is about 1 / sqrt(33).
    assert abs(normalised.mean()) < 0.2
    assert normalised.std() == pytest.approx(1.0, abs=0.1)


def test_places_of_a_reference_in_an_answer():
    pieces = [" ", "12", "34", "5", ".", ""]
    np.testing.assert_array_equal(places_of("12345", pieces), [1, 2, 3])
    np.testing.assert_array_equal(places_of("23", pieces), [1, 2])
    assert places_of("99", pieces) is None


def test_compare_counts_divergence_and_kept_references():
    full = jnp.log(jnp.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]]))
    other = jnp.log(jnp.array([[0.7, 0.2, 0.1], [0.5, 0.4, 0.1]]))
    answer = np.array([0, 1])
    same = compare(answer, full, full, [np.array([0, 1])])
    assert (same.kl, same.match, same.kept) == (pytest.approx(0, abs=1e-6), 1.0, 1.0)
    changed = compare(answer, full, other, [np.array([0, 1]), np.array([0])])
    assert changed.kl == pytest.approx((0.1 * np.log(0.2) + 0.8 * np.log(2)) / 2, rel=1e-4)
    assert changed.match == 0.5
    assert changed.kept == 0.5
