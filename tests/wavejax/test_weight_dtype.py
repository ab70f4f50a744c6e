"""`wavejax.load(weight_dtype=...)`: whole answers, plans, kept documents, engine, Flax module."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wavejax
from models.decoder import unembed
from models.errors import InputError
from models.quantised import formats_of
from tests.support.quantised_cases import dequantised
from tests.support.tiny_models import make_tensors, write_folder
from tests.wavejax.cli.conftest import TEMPLATE, TINY, write_tokenizer
from wavejax import LanguageModel
from wavejax.documents.fingerprints import weights_fingerprint

PROMPT = "Who built the bridge?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_folder(folder, TINY, make_tensors(TINY))
    write_tokenizer(folder, chat_template=TEMPLATE)
    return folder


@pytest.fixture(scope="module", params=["int8", "int4"])
def model(request: pytest.FixtureRequest, folder: Path) -> LanguageModel:
    return wavejax.load(folder, weight_dtype=request.param)


@pytest.fixture(scope="module")
def floats(model: LanguageModel) -> LanguageModel:
    return dataclasses.replace(model, params=dequantised(model.params))


def test_the_answer_is_that_of_the_dequantised_model(
    model: LanguageModel, floats: LanguageModel
) -> None:
    assert model.dtype == "float32"
    assert formats_of(model.params)
    ours, theirs = (each.generate(PROMPT, max_new_tokens=12) for each in (model, floats))
    assert [answer.token_ids for answer in ours.answers] == [
        answer.token_ids for answer in theirs.answers
    ]


def test_a_batch_engine_answers_alike(model: LanguageModel) -> None:
    ids = model.encode(PROMPT)[0].ids
    expected = model.generate(PROMPT, max_new_tokens=6).answers[0].token_ids
    with wavejax.batch_engine(model, slots=1, max_context=128, max_new_tokens=8) as engine:
        answer = engine.submit(wavejax.Request(ids, 6)).result()
    assert tuple(answer.token_ids) == tuple(expected)


def test_the_plan_counts_what_is_there(model: LanguageModel, floats: LanguageModel) -> None:
    plan = model.plan(100, 10)
    assert plan.need.weights == sum(x.nbytes for x in jax.tree.leaves(model.params))
    assert plan.need.weights < 0.4 * floats.plan(100, 10).need.weights
    assert plan.weight_bits == pytest.approx(
        32 * plan.need.weights / floats.plan(100, 10).need.weights
    )


def test_the_flax_module_takes_them(model: LanguageModel, floats: LanguageModel) -> None:
    tokens = jnp.array([[1, 2, 3]])
    logits = []
    for each in (model, floats):
        module, variables = each.flax()
        hidden, _ = module.apply(variables, tokens, jnp.arange(3)[None], None)
        logits.append(unembed(module.config, variables, hidden))
    np.testing.assert_allclose(*logits, atol=1e-4)


def test_the_flax_module_refuses_what_is_not_the_models(model: LanguageModel) -> None:
    module, variables = model.flax()
    layers = variables["params"]["layers"]
    tokens = jnp.array([[1, 2, 3]])
    for changed, said in (
        ({"mlp_norm": layers["mlp_norm"][:, :-1]}, r"layers/mlp_norm is of the shape"),
        ({"down": None}, r"layers/down is missing"),
        ({"up": jax.tree.map(lambda x: x[:, :8], layers["up"])}, r"layers/up is of the shape"),
    ):
        params = variables["params"] | {"layers": layers | changed}
        with pytest.raises(ValueError, match=said):
            module.apply({"params": params}, tokens, jnp.arange(3)[None], None)


def test_a_fingerprint_tells_levels_from_floats(
    model: LanguageModel, floats: LanguageModel, folder: Path
) -> None:
    plain = wavejax.load(folder)
    found = [weights_fingerprint(each.params) for each in (model, floats, plain)]
    assert len(set(found)) == 3
    layers = model.params["params"]["layers"]
    down = layers["down"]
    changed = dataclasses.replace(down, scales=-down.scales)
    tree = model.params["params"] | {"layers": layers | {"down": changed}}
    assert weights_fingerprint({"params": tree}) not in found


def test_a_document_is_kept_for_its_own_weights(
    model: LanguageModel, floats: LanguageModel, tmp_path: Path
) -> None:
    generator = model.generator(64, 8)
    ids = model.encode(PROMPT)[0].ids
    state = generator.start(model.params, [ids], 8)
    kept = tmp_path / "kept"
    wavejax.save_document(state, kept, token_ids=ids, generator=generator, params=model.params)
    wavejax.load_document(kept, generator=generator, params=model.params)
    with pytest.raises(InputError, match="other weights of the model"):
        wavejax.load_document(kept, generator=generator, params=floats.params)


def test_auto_is_the_models_own(folder: Path) -> None:
    for weight_dtype in ("auto", "model"):
        assert formats_of(wavejax.load(folder, weight_dtype=weight_dtype).params) == {}
    with pytest.raises(InputError, match="is 'int2'; choose model, int8, int4 or packed"):
        wavejax.load(folder, weight_dtype="int2")
