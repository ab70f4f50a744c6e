"""Full attention with rows in int8: that of the rounded keys and values, number for number."""

import dataclasses
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.rounding import dequantise, quantise
from pallas_kernels.types import Rows
from tests.support.attention_harness import decode, model_of, prefill, random_stream
from tests.support.tiny_generator import GREEDY, MODEL, make_params, make_prompts
from wavejax import DenseAttention, Generator, InputError, load_document, save_document
from wavejax.documents.files import read_folder
from wavejax.documents.fingerprints import check_fingerprints, fingerprints
from wavejax.store.shape import CacheShape

SHAPE = model_of(kv_heads=2, group=3, head_dim=16)
INT8 = DenseAttention(row_dtype="int8")
STEPS = 20


@dataclasses.dataclass(frozen=True)
class RoundedFloats(DenseAttention):
    """Full attention whose keys and values are floats, rounded as int8 rows are."""

    def write_prompt(self, *operands, **named):
        return rounded(super().write_prompt(*operands, **named))

    def append(self, *operands):
        return rounded(super().append(*operands))


def rounded(state):
    keys, values = (Rows(dequantise(quantise(x.data))) for x in (state.keys, state.values))
    return dataclasses.replace(state, keys=keys, values=values)


def assert_numbers_are(state, expected):
    """Levels and scales are those of the model's numbers, and their numbers a float state's."""
    for rows, floats in ((state.keys, expected.keys), (state.values, expected.values)):
        assert (rows.dtype, rows.format, floats.format) == (jnp.int8, "scaled", "plain")
        levels, scales = np.asarray(rows.data, np.float64), np.asarray(rows.scales, np.float64)
        np.testing.assert_array_equal(levels * scales[..., None], np.asarray(floats.data))
    np.testing.assert_array_equal(state.tokens, expected.tokens)


def test_it_is_the_attention_of_the_rounded_rows():
    """Prompts of unequal lengths and steps, one of them from nothing: outputs and states."""
    lengths = [150, 1, 37]
    stream = random_stream(SHAPE, np.random.default_rng(0), 150 + STEPS, len(lengths))
    found = []
    for attention in (INT8, RoundedFloats()):
        state = attention.init_state(CacheShape.of(SHAPE), 3, 160, STEPS, jnp.float32)
        read, state = prefill(attention, state, stream, lengths, room=160)
        outputs, state = decode(attention, state, stream, jnp.asarray(lengths, jnp.int32), STEPS)
        found.append((read, np.asarray(outputs), state))
    (read, outputs, state), (expected_read, expected, floats) = found
    jax.tree.map(np.testing.assert_array_equal, read, expected_read)
    np.testing.assert_array_equal(outputs, expected)
    assert_numbers_are(state, floats)
    # Against the numbers that the model gave: half a scale at most, in every token that is held.
    keys = np.asarray(stream[1])
    for b, length in enumerate(lengths):
        held = np.asarray(dequantise(state.keys))[0, b, :, : length + STEPS]
        given = keys[b, : length + STEPS].swapaxes(0, 1)
        scales = np.asarray(state.keys.scales)[0, b, :, : length + STEPS, None]
        assert (np.abs(held - given) <= (0.5 + 1e-3) * scales).all()


def test_what_is_not_held_may_be_anything():
    """Scales of NaN past a sequence's length, as a slot keeps them of the sequence before."""
    lengths = [60, 9]
    stream = random_stream(SHAPE, np.random.default_rng(1), 60 + STEPS, 2)
    state = INT8.init_state(CacheShape.of(SHAPE), 2, 64, STEPS, jnp.float32)
    _, state = prefill(INT8, state, stream, lengths)
    past = jnp.arange(state.keys.shape[3]) >= state.tokens[:, None]
    keys, values = (
        Rows(jnp.copy(rows.data), jnp.where(past[None, :, None], jnp.nan, rows.scales))
        for rows in (state.keys, state.values)
    )
    spoilt = dataclasses.replace(state, keys=keys, values=values, tokens=jnp.copy(state.tokens))
    start = jnp.asarray(lengths, jnp.int32)
    expected, _ = decode(INT8, state, stream, start, STEPS)
    found, _ = decode(INT8, spoilt, stream, start, STEPS)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("heads_seen", [1, 2])
def test_a_part_of_the_tokens_is_attended_to_by_their_numbers(heads_seen):
    stream = random_stream(SHAPE, np.random.default_rng(2), 40, 1)
    outputs = []
    for attention in (INT8, RoundedFloats()):
        state = attention.init_state(CacheShape.of(SHAPE), 1, 40, 0, jnp.float32)
        _, state = prefill(attention, state, stream, [40])
        seen = jnp.asarray(np.random.default_rng(0).random((1, heads_seen, 40)) < 0.5)
        query = stream[0][:, -1:]
        logits = attention.logits(jnp.int32(0), query, state)
        outputs.append((attention.attend(jnp.int32(0), query, state, seen), logits))
    jax.tree.map(np.testing.assert_array_equal, *outputs)


def test_appended_kept_and_gone_on_with(tmp_path):
    """A float state of the rounded numbers says the same, wherever its tokens came from."""
    params, (whole, short) = make_params(), make_prompts((150, 9))
    generator = Generator(MODEL, INT8, GREEDY)
    state = generator.start(params, [whole[:100]], 90)
    state = generator.append(params, state, whole[100:])

    floats = Generator(MODEL, RoundedFloats(), GREEDY)
    expected = floats.start(params, [whole[:100]], 90)
    expected = floats.append(params, expected, whole[100:])
    # What is appended attends to itself before it is rounded, as a prompt does.
    held = rounded(expected.attention_state)
    expected = dataclasses.replace(expected, attention_state=held)
    assert_numbers_are(state.attention_state, held)

    given = {"generator": generator, "params": params}
    save_document(state, tmp_path / "kept", token_ids=whole, **given)
    state, tokens = generator.decode_n(params, state, 30)
    _, expected_tokens = floats.decode_n(params, expected, 30)
    np.testing.assert_array_equal(tokens, expected_tokens)

    document = load_document(tmp_path / "kept", **given)
    _, gone_on = generator.decode_n(params, document.start(generator, 40), 30)
    np.testing.assert_array_equal(gone_on, tokens)
    # A part of it, and other tokens after that.
    prompt = [*whole[:80], *short]
    cut = document.start(generator, 10, params=params, prompts=[prompt])
    again = generator.append(params, generator.start(params, [whole[:80]], 20), short)
    for found, read in zip(
        generator.decode_n(params, cut, 8)[1], generator.decode_n(params, again, 8)[1], strict=True
    ):
        np.testing.assert_array_equal(found, read)
    plain = Generator(MODEL, DenseAttention(), GREEDY)
    with pytest.raises(InputError, match="row_dtype is 'int8' there and 'model' here"):
        load_document(tmp_path / "kept", generator=plain, params=params)


def test_a_document_of_before_can_be_read(tmp_path):
    """Full attention's named no setting, and its arrays are named as plain ones' are now."""
    params, [prompt] = make_params(), make_prompts((40,))
    generator = Generator(MODEL, DenseAttention(), GREEDY)
    state = generator.start(params, [prompt], 20)
    given = {"generator": generator, "params": params}
    save_document(state, tmp_path / "kept", token_ids=prompt, **given)
    folder = read_folder(tmp_path / "kept")
    layers = {f"{name}/{i}" for name in ("keys", "values") for i in range(MODEL.num_layers)}
    assert set(folder.arrays) == layers | {"token_ids", "logits", "tokens"}
    kept = folder.facts["fingerprints"]
    before = kept | {"settings": {}}
    for attention, differs in ((DenseAttention(), False), (INT8, True)):
        now = fingerprints(MODEL, params, attention)
        for said in (kept, before):
            with pytest.raises(InputError, match="row_dtype") if differs else nullcontext():
                check_fingerprints("d", said, now)


def test_there_are_two_dtypes():
    with pytest.raises(InputError, match="`row_dtype` is int4; it must be one of model, int8"):
        DenseAttention(row_dtype="int4")
