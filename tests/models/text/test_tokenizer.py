"""The default model's tokenizer against transformers; folders; streaming; damaged input."""

import json
import os
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import InputError
from models.text.tokenizer import Tokenizer, load_tokenizer

# `make parity` records them anew.
REFERENCES = Path(os.environ.get("WAVEJAX_REFERENCES", Path(__file__).parents[2] / "references"))


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    from models.checkpoints.open import find_default_model

    return load_tokenizer(find_default_model())


@pytest.fixture(scope="module")
def reference() -> dict:
    return json.loads((REFERENCES / "tokenizer_smollm2.json").read_text(encoding="utf-8"))


def test_encodes_as_transformers_does(smollm2: Tokenizer, reference: dict) -> None:
    assert len(reference["samples"]) >= 60
    for sample in reference["samples"]:
        ids = smollm2.encode(sample["text"], add_special=True, control_tokens=True)
        assert ids == sample["ids"], sample["text"]


def test_chat_is_as_transformers_renders_it(smollm2: Tokenizer, reference: dict) -> None:
    ids = smollm2.encode_chat(reference["conversation"])
    assert smollm2.chat_text(reference["conversation"]) == reference["conversation_text"]
    assert ids == smollm2.encode_chat_text(reference["conversation_text"])
    assert ids[:1] == [smollm2.bos_id]
    assert ids.count(smollm2.backend.token_to_id("<|im_start|>")) == 5  # system, 3 turns, answer


def test_special_tokens_of_the_default_model(smollm2: Tokenizer) -> None:
    assert (smollm2.bos_token, smollm2.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert smollm2.stop_ids == {0, 2}  # <|endoftext|>, <|im_end|>
    assert smollm2.vocab_size == 49152
    assert smollm2.encode("<|im_end|>", add_special=True, control_tokens=True) == [2]
    assert smollm2.decode([2, 19556, 0]) == "Hello"


@given(text=st.text(st.characters(codec="utf-8"), max_size=60))
@settings(deadline=None, max_examples=60)
def test_decoding_undoes_encoding(smollm2: Tokenizer, text: str) -> None:
    # SmolLM2 has no token for some bytes, those of rare control characters and of planes above 3.
    has = smollm2.backend.get_vocab()
    alphabet = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    text = "".join(c for c in text if all(b in has for b in alphabet.pre_tokenize_str(c)[0][0]))
    assert smollm2.decode(smollm2.encode(text, add_special=True)) == text


@given(ids=st.lists(st.integers(0, 49151), max_size=40))
@settings(deadline=None, max_examples=60)
def test_stream_of_any_ids_gives_what_decode_gives(smollm2: Tokenizer, ids: list[int]) -> None:
    stream = smollm2.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == smollm2.decode(ids)


def test_stream_holds_back_half_a_character(smollm2: Tokenizer) -> None:
    text = "é👍🏽漢字 ok"
    stream = smollm2.stream()
    pieces = [stream.push(i) for i in smollm2.encode(text, add_special=False)]
    assert "".join(pieces) == text
    assert "" in pieces
    assert not any("\ufffd" in piece for piece in pieces)
    assert stream.flush() == ""


def test_stream_flushes_what_never_became_a_character(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("a👍", add_special=False)
    stream = smollm2.stream()
    assert "".join(map(stream.push, ids[:-1])) == "a"
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_saved_and_loaded_again(smollm2: Tokenizer, tmp_path: Path) -> None:
    smollm2.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.stop_ids == smollm2.stop_ids
    assert again.chat_template == smollm2.chat_template
    assert (again.add_bos, again.bos_token, again.eos_token) == (
        False,
        "<|im_start|>",
        "<|im_end|>",
    )
    text = "Grüße,\n\n 42 <|im_end|> 👍"
    for control in (False, True):
        expected = smollm2.encode(text, add_special=True, control_tokens=control)
        assert again.encode(text, add_special=True, control_tokens=control) == expected
        assert (2 in expected) == control


def make_folder(folder: Path, **config: object) -> Path:
    """A folder with a byte-level tokenizer and the given tokenizer_config.json."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<s>", "</s>", "<end>", *alphabet])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<end>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("said, adds", [({}, True), ({"add_bos_token": False}, False)])
def test_folder_says_whether_text_starts_with_bos(tmp_path: Path, said: dict, adds: bool) -> None:
    loaded = load_tokenizer(make_folder(tmp_path, bos_token="<s>", eos_token="</s>", **said))
    assert loaded.encode("", add_special=True) == ([0] if adds else [])
    assert loaded.encode("", add_special=False) == []


def test_bos_does_not_come_twice(tmp_path: Path) -> None:
    template = "{{ bos_token }}{{ messages[0].content }}"
    folder = make_folder(tmp_path, bos_token={"content": "<s>"}, chat_template=template)
    assert load_tokenizer(folder).encode_chat([{"role": "user", "content": ""}]) == [0]
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert load_tokenizer(folder).encode_chat([{"role": "user", "content": ""}]) == [0]


def test_stop_ids_come_from_all_files(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, eos_token="</s>")
    assert load_tokenizer(folder).stop_ids == {1}
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert load_tokenizer(folder).stop_ids == {1, 2}
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    assert load_tokenizer(folder).stop_ids == {1, 2}


def test_named_templates(tmp_path: Path) -> None:
    templates = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    assert load_tokenizer(make_folder(tmp_path, chat_template=templates)).chat_template == "b"


def test_no_template_is_an_error_that_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="raw=True"):
        load_tokenizer(make_folder(tmp_path)).encode_chat([{"role": "user", "content": "x"}])


def test_stored_truncation_and_padding_are_not_obeyed(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    stored = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    expected = {text: stored.encode(text, add_special_tokens=False).ids for text in ("a", "a" * 9)}
    stored.enable_truncation(5)
    stored.enable_padding(length=7, pad_id=1, pad_token="</s>")
    stored.save(str(folder / "tokenizer.json"))
    loaded = load_tokenizer(folder)
    loaded.save(tmp_path)  # nor handed on
    for tokenizer in (loaded, load_tokenizer(tmp_path)):
        for text, ids in expected.items():
            assert tokenizer.encode(text, add_special=False) == ids


@pytest.mark.parametrize("ids", ["2", ["</s>"], 2.0, 3.5, 2**32 - 1, -1, True, ["a", 3], {}])
def test_stop_ids_that_are_no_ids(tmp_path: Path, ids: object) -> None:
    for name, key in (
        ("generation_config.json", "eos_token_id"),
        ("tokenizer_config.json", "stop_token_ids"),
    ):
        folder = make_folder(tmp_path)
        (folder / "generation_config.json").unlink(missing_ok=True)
        (folder / name).write_text(json.dumps({key: ids}))
        with pytest.raises(InputError, match=f"{name}: {key} is .*; expected a token id"):
            load_tokenizer(folder)


@pytest.mark.parametrize("template", [5, [1, 2], {"default": "a"}, [{"template": 1}]])
def test_templates_of_a_wrong_kind(tmp_path: Path, template: object) -> None:
    folder = make_folder(tmp_path, chat_template=template)
    with pytest.raises(InputError, match=r"tokenizer_config\.json: chat_template is .*; expected"):
        load_tokenizer(folder)
    (folder / "chat_template.jinja").write_text("a")  # which counts
    assert load_tokenizer(folder).chat_template == "a"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    (folder / "chat_template.jinja").write_bytes("é".encode("latin-1"))
    with pytest.raises(InputError, match=r"chat_template\.jinja is not UTF-8"):
        load_tokenizer(folder)
    (folder / "chat_template.jinja").unlink()
    (folder / "generation_config.json").mkdir()
    with pytest.raises(InputError, match=r"generation_config\.json cannot be read: Is a directory"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("tokenizer.json", "{", "is not a tokenizer"),
        ("tokenizer.json", '{"model": 1}', "is not a tokenizer"),
        ("tokenizer_config.json", "{", "is not JSON"),
        ("tokenizer_config.json", "[1]", "expected an object"),
        ("tokenizer_config.json", '{"bos_token": "\\ud800"}', "surrogates not allowed"),
        ("generation_config.json", "\x00", "is not JSON"),
        ("generation_config.json", "[" * 100_000, "recursion"),
    ],
)
def test_damaged_folder(tmp_path: Path, name: str, content: str, said: str) -> None:
    folder = make_folder(tmp_path)
    (folder / name).write_text(content)
    with pytest.raises(InputError, match=said) as caught:
        load_tokenizer(folder)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no tokenizer: expected tokenizer\.json.*download"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="no such file or folder"):
        load_tokenizer(tmp_path / "absent")
