"""Tokens that only side files name: their ids, their flags, and what contradicts them."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import pre_tokenizers

from models.errors import InputError
from models.text.tokenizer import Tokenizer, load_tokenizer
from tests.support.gguf_tokenizers import finish
from tests.support.small_tokenizers import CHATML, SPECIAL, byte_level, pieces, save

TURN = {"role": "user", "content": "ab"}


def with_files(folder: Path, backend: Any = None, **files: Any) -> Tokenizer:
    """A folder of a tokenizer, with a chat, and with these JSON files."""
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    config = files.get("tokenizer_config", {})
    return save(
        folder, backend or byte_level(), chat_template="{{ messages[0].content }}", **config
    )


def size() -> int:
    return byte_level().get_vocab_size()


@pytest.mark.parametrize("gap", [0, 1, 1000])
@pytest.mark.parametrize("file", ["tokenizer_config", "added_tokens"])
def test_each_token_has_the_id_that_the_file_gives(tmp_path: Path, file: str, gap: int) -> None:
    ids = {"<|turn|>": size() + gap, "<|turn_end|>": size() + gap + 1, "<note>": size() + 5 + gap}
    if file == "added_tokens":
        content: dict[str, Any] = ids
    else:
        decoder = {
            str(index): {"content": text, "special": text != "<note>", "lstrip": text == "<note>"}
            for text, index in ids.items()
        }
        content = {"added_tokens_decoder": decoder}
    before = byte_level()
    loaded = with_files(tmp_path, **{file: content})
    text = "<|turn|>ab <|im_start|> im <note> ab<|turn_end|>"
    encoded = loaded.encode(text, add_special=False, control_tokens=True)
    expected = [ids[token] for token in ("<|turn|>", "<note>", "<|turn_end|>")]
    assert [index for index in encoded if index >= size()] == expected
    # Those of before keep theirs.
    for token, index in before.get_vocab(with_added_tokens=True).items():
        assert loaded.backend.token_to_id(token) == index
    # <|im_start|> takes the space after it, and where it is said so <note> the one before it.
    shown = "ab im <note> ab" if file == "added_tokens" else "ab im<note> ab"
    assert loaded.decode(encoded) == shown
    # A user's text spells none of them.
    assert max(loaded.encode(text, add_special=False)) < size()
    chat = loaded.encode_chat([{"role": "user", "content": text}])
    assert max(chat) < size()
    loaded.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.encode(text, add_special=False, control_tokens=True) == encoded
    assert again.encode(text, add_special=False) == loaded.encode(text, add_special=False)


def test_chat_markers_that_only_side_files_name_end_a_turn(tmp_path: Path) -> None:
    folder = tmp_path
    listed = {"<|begin|>": size(), "<|finish|>": size() + 1}
    (folder / "added_tokens.json").write_text(json.dumps(listed))
    template = CHATML.replace("<|im_start|>", "<|begin|>").replace("<|im_end|>", "<|finish|>")
    loaded = save(folder, byte_level(), chat_template=template)
    assert loaded.encode_chat([TURN])[1] == size()  # after the beginning of the text
    assert size() + 1 in loaded.stop_ids  # no list of ours holds it: the template writes it
    assert size() not in loaded.stop_ids


def test_names_in_the_map_of_special_tokens(tmp_path: Path) -> None:
    """A token of the vocabulary is a control token where the map names it."""
    backend = byte_level()
    marks = {"additional_special_tokens": ["Ġab", {"content": "im"}, "<absent>"]}
    assert backend.token_to_id("im") not in backend.get_added_tokens_decoder()
    loaded = with_files(tmp_path, special_tokens_map=marks)
    added = loaded.backend.get_added_tokens_decoder()
    assert added[backend.token_to_id("im")].special
    assert loaded.backend.token_to_id("<absent>") is None  # it has no id
    ids = loaded.encode("im", add_special=False, control_tokens=True)
    assert ids == [backend.token_to_id("im")]
    assert loaded.decode(ids) == ""
    assert ids[0] not in loaded.encode("im im", add_special=False)


@pytest.mark.parametrize(
    "listed, said",
    [
        ({"</s>": 3}, "token 3 is '</s>', but in the vocabulary it is"),
        ({"<new>": 0}, "token 0 is '<new>', but in the vocabulary it is '!'"),
        ({"</s>": 100_000}, "token 100000 is '</s>', but in the vocabulary '</s>' is token"),
        ({"<new>": "7"}, "'<new>' is '7'; expected a token id"),
        ({"<new>": -1}, "expected a token id"),
    ],
)
def test_ids_that_clash(tmp_path: Path, listed: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        with_files(tmp_path, added_tokens=listed)
    assert "added_tokens.json" in str(caught.value)


@pytest.mark.parametrize("decoder", [[], {"x": {"content": "a"}}, {"1": {}}, {"1": 5}, "a"])
def test_decoders_of_a_wrong_kind(tmp_path: Path, decoder: Any) -> None:
    with pytest.raises(InputError, match=r"added_tokens_decoder is .*; expected"):
        with_files(tmp_path, tokenizer_config={"added_tokens_decoder": decoder})


def test_gaps_that_a_unigram_model_cannot_have(tmp_path: Path) -> None:
    backend = pieces(unigram=True)
    after = backend.get_vocab_size()
    loaded = with_files(tmp_path, backend, added_tokens={"<new>": after})
    assert loaded.backend.token_to_id("<new>") == after
    with pytest.raises(InputError, match="leave gaps"):
        with_files(tmp_path, pieces(unigram=True), added_tokens={"<new>": after + 7})


# ---- GGUF files that type their markers as text, or not at all

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
# "<p>" and "</s>" are merged from letters, as in vocabularies of web pages: they are text.
MERGES = ["a b", "< p", "<p >", "< /", "</ s", "</s >"]
MERGED = [merge.replace(" ", "") for merge in MERGES]
MARKS = ["<|text|>", "<|open|>", "<|close|>", "<|eot_id|>", "<idea>", "<|unwritten|>"]
TOKENS = [*LETTERS, *MERGED, *MARKS]
TEMPLATE = (
    "{% for m in messages %}<|open|><p>{{ m.role }}</s>\n{{ m.content }}<|close|>{% endfor %}"
    "{% if add_generation_prompt %}<|open|><idea>{% endif %}"
)


def write_untyped(path: Path, kinds: list[int] | None, **ids: int) -> Tokenizer:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    if kinds is not None:
        writer.add_token_types(kinds)
    writer.add_token_merges(MERGES)
    writer.add_chat_template(TEMPLATE)
    for name, index in ids.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", index)
    return load_tokenizer(finish(writer, path))


@pytest.mark.parametrize("kinds", [None, [1] * len(TOKENS), [0] * len(TOKENS)])
def test_markers_without_their_type(tmp_path: Path, kinds: list[int] | None) -> None:
    ids = {text: TOKENS.index(text) for text in TOKENS}
    loaded = write_untyped(tmp_path / "m.gguf", kinds, bos=ids["<|text|>"], eos=ids["<|text|>"])
    chat = loaded.encode_chat([TURN])
    assert chat[0] == ids["<|open|>"]
    assert chat[-2:] == [ids["<|open|>"], ids["<idea>"]]
    assert chat.count(ids["<|close|>"]) == 1
    assert loaded.stop_ids == {ids["<|text|>"], ids["<|close|>"], ids["<|eot_id|>"]}
    # What is merged is text, though the template writes it; what it does not write, is nothing.
    assert {ids["<p>"], ids["</s>"]}.isdisjoint(loaded.backend.get_added_tokens_decoder())
    text = "<|unwritten|><|close|><idea>"
    added = loaded.encode(text, add_special=False, control_tokens=True)
    assert added[-2:] == [ids["<|close|>"], ids["<idea>"]]
    assert ids["<|unwritten|>"] not in added
    assert loaded.decode(added) == "<|unwritten|><idea>"  # of an answer, the idea is seen
    assert set(loaded.encode(text, add_special=False)).isdisjoint(map(ids.get, MARKS))


def test_ids_that_name_ordinary_tokens_make_no_markers_of_them(tmp_path: Path) -> None:
    loaded = write_untyped(tmp_path / "m.gguf", None, bos=1, eos=2)
    assert 1 not in loaded.backend.get_added_tokens_decoder()
    assert loaded.decode([1]) == TOKENS[1]


@pytest.mark.parametrize("typed", [True, False])
def test_text_never_merges_into_control_tokens_of_sentencepiece(
    tmp_path: Path, typed: bool
) -> None:
    """Their spelling may be put together of pieces, as "<s>" of "<" and "s>"."""
    pieces = ["▁", *"<s>/abx016", "s>", "</", "<0", "x6", "1>", "x61>"]
    tokens = ["<unk>", "<s>", "</s>", *pieces, "<0x61>"]
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    kind = gguf.TokenType
    normal = [kind.NORMAL] * len(pieces)
    if typed:
        types = [kind.UNKNOWN, kind.CONTROL, kind.CONTROL, *normal, kind.BYTE]
        writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    loaded = load_tokenizer(finish(writer, tmp_path / "m.gguf"))
    ids = loaded.encode("<s></s><0x61>", add_special=True)
    assert ids[0] == 1
    assert {1, 2, len(tokens) - 1}.isdisjoint(ids[1:])
    assert loaded.decode(ids) == "<s></s><0x61>"


def test_special_tokens_of_the_small_tokenizers(tmp_path: Path) -> None:
    """Guards the tests above against a tokenizer that has none."""
    loaded = with_files(tmp_path)
    assert set(SPECIAL) < set(loaded.control_tokens.ids)
