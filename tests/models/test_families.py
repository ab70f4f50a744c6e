"""The rows of the families: they fit what they name, and a row is all that a family is."""

import ast
import dataclasses
import json
from pathlib import Path

import pytest

import models
from models import families
from models.checkpoints import hf_config
from models.checkpoints.hf_config import config_from_hf
from models.checkpoints.open import open_checkpoint
from models.config import ModelConfig
from models.errors import InputError
from models.families import FAMILIES, Family, WindowRule, family_of_gguf, family_of_hf_class
from models.text.pre_tokenizers import PRE_TOKENIZERS
from tests.support import tiny_models
from tests.support.tiny_gguf import write_gguf

ROWS = FAMILIES.values()


@pytest.mark.parametrize("row", ROWS, ids=list(FAMILIES))
def test_what_a_row_names_is_there(row: Family) -> None:
    names = {row.pre_tokenizer, *dict(row.pre_tokenizer_of_size).values()} - {None}
    assert names <= set(PRE_TOKENIZERS)
    assert row.own_settings <= set(hf_config._NEUTRAL)
    assert row.tokenizer_class is None or row.pre_tokenizer is not None
    reads_rope_layers = {"no_rope_layers", "no_rope_layer_interval"} <= row.own_settings
    assert reads_rope_layers == (row.no_rope_interval is not None)
    assert family_of_hf_class(row.hf_class) is row
    assert tiny_models.CONFIGS[row.name]["model_type"] == row.name  # which the tests go through
    assert tiny_models.CONFIGS[row.name]["architectures"] == [row.hf_class]


def test_names_are_told_apart() -> None:
    for names in (
        [row.name for row in ROWS],
        [row.hf_class.lower() for row in ROWS],
        [row.gguf_architecture for row in ROWS if row.gguf_architecture],
    ):
        assert len(names) == len(set(names))
    assert family_of_gguf(None) is family_of_gguf(["llama"]) is family_of_gguf("Llama") is None
    assert family_of_hf_class("Unknown") is None
    # One tokenizer's class cuts texts in one way.
    cuts = {(row.tokenizer_class, row.pre_tokenizer) for row in ROWS if row.tokenizer_class}
    assert len(cuts) == len(dict(cuts))


def test_no_other_file_names_a_family() -> None:
    names = {*FAMILIES, *(row.hf_class for row in ROWS), *(row.tokenizer_class for row in ROWS)}
    root = Path(models.__file__).parent
    naming = {
        (file.relative_to(root).as_posix(), node.value)
        for file in root.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and node.value in names - {None}
    }
    naming = {(file, name) for file, name in naming if file != "families.py"}
    assert naming == {("text/gguf_tokenizer.py", "llama")}  # which is a kind of tokenizer there


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> Family:
    """A row more."""
    row = dataclasses.replace(
        FAMILIES["llama"],
        name="made_up",
        hf_class="MadeUpForCausalLM",
        gguf_architecture="made-up",
        default_context=77,
        default_theta=5e5,
        default_head_dim=24,
        ties_embeddings=True,
        no_rope_interval=2,
        own_settings=frozenset({"clip_qkv", "no_rope_layers", "no_rope_layer_interval"}),
        gguf_interleaved=False,
        includes=("Another",),
    )
    monkeypatch.setitem(FAMILIES, row.name, row)
    return row


def test_a_row_more_is_a_family_more(made_up: Family, tmp_path: Path) -> None:
    llama = tiny_models.CONFIGS["llama"]
    silent = {
        key: value
        for key, value in llama.items()
        if key not in ("rope_theta", "max_position_embeddings", "tie_word_embeddings", "model_type")
    }
    config = config_from_hf(silent | {"architectures": ["MadeUpForCausalLM"], "clip_qkv": 8})
    said = (config.architecture, config.max_context, config.rope_theta, config.head_dim)
    assert said == ("made_up", 77, 5e5, 24)
    assert config.tie_embeddings
    assert config.rope_layers == (True, False, True)
    assert config == config_from_hf(silent | {"model_type": "made_up"})

    keys = {
        f"made-up.{key}": value
        for key, value in {
            "block_count": 3,
            "context_length": 256,
            "embedding_length": 64,
            "feed_forward_length": 112,
            "attention.head_count": 4,
            "attention.head_count_kv": 2,
            "attention.layer_norm_rms_epsilon": 1e-5,
        }.items()
    }
    path = tmp_path / "model.gguf"
    metadata = keys | {"general.architecture": "made-up"}
    write_gguf(
        path, llama | {"model_type": "qwen2"}, tiny_models.make_tensors(llama), metadata=metadata
    )
    config = open_checkpoint(path).config
    said = (config.architecture, config.rope_theta, config.rope_layers)
    assert said == ("made_up", 5e5, (True, False, True))

    with pytest.raises(
        InputError, match=r"qwen3, made_up \(SmolLM2 is llama; Another is made_up\)"
    ):
        config_from_hf(llama | {"model_type": "odd"})


def test_a_vocabularys_size_goes_before_the_family() -> None:
    assert families.FAMILIES["llama"].unnamed_pre_tokenizer(32000) is None
    assert families.FAMILIES["llama"].unnamed_pre_tokenizer(128256) == "llama-bpe"
    assert families.FAMILIES["qwen2"].unnamed_pre_tokenizer(128256) == "qwen2"


NO_ROPE = tiny_models.CONFIGS["llama"] | {"model_type": "made_up"}


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({}, (True, False, True)),
        ({"no_rope_layers": None, "no_rope_layer_interval": None}, (True, False, True)),
        ({"no_rope_layer_interval": 3}, (True, True, False)),
        ({"no_rope_layer_interval": 1}, (False, False, False)),
        ({"no_rope_layer_interval": 4}, None),
        ({"no_rope_layers": [0, 1, 1], "no_rope_layer_interval": 3}, (False, True, True)),
        ({"no_rope_layers": [1, 1, 1, 0]}, None),
    ],
)
def test_layers_without_rope(settings: dict, layers: tuple | None, made_up: Family) -> None:
    config = config_from_hf(NO_ROPE | settings)
    assert config.rope_layers == layers
    stored = json.loads(json.dumps(config.to_json()))
    assert ModelConfig.from_json(stored) == config
    assert ("rope_layers" in stored) == (layers is not None)  # others are stored as they were


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"no_rope_layers": 4}, "no_rope_layers is 4; expected a list"),
        ({"no_rope_layers": [1, 2, 0]}, "expected a list of 0 (no RoPE) and 1"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers names 2 layers; expected 3"),
        ({"no_rope_layers": []}, "no_rope_layers names 0 layers; expected 3"),
        ({"no_rope_layer_interval": 0}, "no_rope_layer_interval is 0; expected 1 or more"),
        ({"no_rope_layer_interval": "4"}, "no_rope_layer_interval is '4'; expected a number"),
        ({"num_hidden_layers": 2**40}, "num_layers is 1099511627776; expected at most 65536"),
        ({"num_hidden_layers": 0}, "num_layers is 0; expected 1 or more"),
    ],
)
def test_layers_without_rope_that_make_no_sense(settings: dict, said: str, made_up: Family) -> None:
    with pytest.raises(InputError) as caught:
        config_from_hf(NO_ROPE | settings)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_window_over_the_layers_without_rope(
    made_up: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = dataclasses.replace(made_up, window_rule=WindowRule.LAYERS_WITHOUT_ROPE)
    monkeypatch.setitem(FAMILIES, row.name, row)
    for settings, window in [
        ({}, None),
        ({"use_sliding_window": True}, 17),
        ({"use_sliding_window": True, "no_rope_layers": [1, 1, 1]}, None),
        ({"use_sliding_window": True, "layer_types": ["full_attention"] * 3}, None),
        ({"use_sliding_window": True, "layer_types": ["sliding_attention"] * 3}, 17),
    ]:
        config = config_from_hf(NO_ROPE | {"sliding_window": 17} | settings)
        assert (config.sliding_window, config.max_context) == (window, window or 256)


def test_as_many_layers_as_the_model_has() -> None:
    config = config_from_hf(tiny_models.CONFIGS["llama"])
    with pytest.raises(InputError, match="says of 2 layers whether they have RoPE; expected its 3"):
        dataclasses.replace(config, rope_layers=(True, False))
