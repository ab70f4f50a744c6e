"""What a user writes never becomes control tokens unless asked; all else is encoded as ever."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.text.chat import apply_chat
from models.text.tokenizer import Tokenizer
from tests.support.small_tokenizers import CHATML, KINDS, LETTERS, SHOWN, SPECIAL, save

# Trims, and goes by what the messages begin with, as Llama 3's and Qwen3's templates do.
TRIMMED = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' and m.content.startswith('<tool_response>') %}[INST]tool{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Leaves out the thoughts of answers, and writes those of the last one anew.
THOUGHTFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% set content = m.content %}"
    "{% if m.role == 'assistant' and '</think>' in content %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}"
    "{% if loop.last %}<think>\n{{ m.content.split('</think>')[0].split('<think>')[-1].strip() }}"
    "\n</think>\n\n{% endif %}{% endif %}"
    "{{ content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "trimmed": TRIMMED, "thoughtful": THOUGHTFUL}
MARKERS = [*SPECIAL, *SHOWN]
CONVERSATIONS = {
    "one turn": ["ab im"],
    "white space around": ["  \n ab \n\n"],
    "only white space": [" \n"],
    "nothing": [""],
    "the same twice": ["ab", "ab", "ab"],
    "pieces of the template": ["assistant\n", "user", "assistant", "im_start"],
    "a long word": ["a" * 300],
    "spaces": ["a    b        c"],
    "thoughts": ["ab", "<think>\nwhy ab?\n</think>\n\nab it is.", "and then?"],
    "thoughts at the end": ["ab", "<think>\nwhy ab?\n</think>\n\nab it is."],
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def load(tmp_path_factory: pytest.TempPathFactory, kind: str, template: str = CHATML) -> Tokenizer:
    return save(tmp_path_factory.mktemp("tokenizer"), KINDS[kind](), chat_template=template)


def turns(contents: list[str]) -> list[dict[str, str]]:
    roles = ["user", "assistant"] * len(contents)
    return [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]


def ids_of_rendered_text(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[int]:
    """The whole rendered text encoded at once, whoever wrote the control tokens in it."""
    assert tokenizer.chat_template is not None
    text = apply_chat(tokenizer.chat_template, messages, bos_token="<s>", eos_token="</s>")
    ids = tokenizer.backend.encode(text, add_special_tokens=False).ids
    return ids if ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *ids]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_ordinary_conversations_are_encoded_as_they_are_written(
    tmp_path_factory: pytest.TempPathFactory, kind: str, template: str, conversation: str
) -> None:
    tokenizer = load(tmp_path_factory, kind, TEMPLATES[template])
    messages = turns(CONVERSATIONS[conversation])
    expected = ids_of_rendered_text(tokenizer, messages)
    assert tokenizer.encode_chat(messages) == expected
    assert tokenizer.encode_chat(messages, control_tokens=True) == expected
    assert tokenizer.encode_chat_text(tokenizer.chat_text(messages)) == expected


def test_documents_that_spell_control_tokens(
    tmp_path_factory: pytest.TempPathFactory, kind: str
) -> None:
    tokenizer = load(tmp_path_factory, kind)
    control = {tokenizer.backend.token_to_id(text) for text in MARKERS}

    def marks(ids: list[int]) -> list[int]:
        return [index for index in ids if index in control]

    frame = marks(tokenizer.encode_chat(turns(["ab"])))
    text = st.lists(st.sampled_from([*MARKERS, "ab", " ", "\n", "<", "s>", "|im_end|>"]))
    contents = st.lists(text.map("".join), min_size=1, max_size=3)

    @given(contents)
    @settings(deadline=None, max_examples=60)
    def holds(documents: list[str]) -> None:
        messages = [{"role": "user", "content": text} for text in documents]
        ids = tokenizer.encode_chat(messages)
        turn = [tokenizer.backend.token_to_id(text) for text in ("<|im_start|>", "<|im_end|>")]
        assert marks(ids) == frame[: len(frame) - 3] + turn * len(documents) + turn[:1]
        # No letter is lost: all that the markers around it may take is white space.
        shown = tokenizer.backend.decode(ids, skip_special_tokens=False)
        squeezed = "".join(shown.split())
        for document in documents:
            assert "".join(document.split()) in squeezed
        raw = tokenizer.encode(documents[0], add_special=True)
        assert raw[0] == tokenizer.bos_id
        assert not marks(raw[1:])

    holds()


def test_control_tokens_when_they_are_asked_for(
    tmp_path_factory: pytest.TempPathFactory, kind: str
) -> None:
    tokenizer = load(tmp_path_factory, kind)
    messages = turns(["ab<|im_end|>"])
    end = tokenizer.backend.token_to_id("<|im_end|>")
    assert tokenizer.encode_chat(messages, control_tokens=True).count(end) == 2
    assert tokenizer.encode_chat(messages).count(end) == 1


def test_the_shielded_copy_encodes_like_the_tokenizer(
    tmp_path_factory: pytest.TempPathFactory, kind: str
) -> None:
    """With all control tokens meant as such, no more than their names differ in it."""
    tokenizer = load(tmp_path_factory, kind)
    spelt = st.lists(st.sampled_from([*MARKERS, *LETTERS, "ab", "  ", "    ", "é"]), max_size=20)

    @given(spelt.map("".join))
    @settings(deadline=None, max_examples=80)
    def same(text: str) -> None:
        encode = tokenizer.control_tokens.encode_marked
        expected = tokenizer.backend.encode(text, add_special_tokens=False).ids
        assert encode(text, {}) == expected
        assert encode(text, {0x10FFFD: "x"}) == expected  # which is in no text

    same()


@pytest.mark.parametrize("template", TEMPLATES)
def test_what_a_template_looks_for_in_a_users_message_is_text(
    tmp_path_factory: pytest.TempPathFactory, template: str
) -> None:
    tokenizer = load(tmp_path_factory, "byte-level", TEMPLATES[template])
    document = "<tool_response>ab</tool_response> </think> <think>"
    ids = tokenizer.encode_chat(turns([document]))
    assert document in tokenizer.decode(ids)
    for text in ("[INST]", *SHOWN):
        assert tokenizer.backend.token_to_id(text) not in ids


def test_text_after_thoughts_stays_text(tmp_path: Path) -> None:
    """An answer's thoughts are left out; a turn's end spelt in it is still text."""
    tokenizer = save(tmp_path, KINDS["byte-level"](), chat_template=THOUGHTFUL)
    plain = tokenizer.encode_chat(turns(["ab", "<think>ab</think>it is im", "ab"]))
    spelt = tokenizer.encode_chat(turns(["ab", "<think>ab</think>it is <|im_end|>", "ab"]))
    end = tokenizer.backend.token_to_id("<|im_end|>")
    assert spelt.count(end) == plain.count(end) == 3
    assert "it is <|im_end|>" in tokenizer.decode(spelt)
    assert tokenizer.backend.token_to_id("<think>") not in spelt


def test_prompts_begin_once_and_never_end(tmp_path: Path) -> None:
    tokenizer = save(tmp_path, KINDS["byte-level"](), chat_template=TRIMMED)
    bos = tokenizer.bos_id
    for ids in (
        tokenizer.encode("<s>ab", add_special=True, control_tokens=True),
        tokenizer.encode("ab", add_special=True),
        tokenizer.encode("<s>ab", add_special=True),
        tokenizer.encode_chat(turns(["<s>ab"])),
        tokenizer.encode_chat(turns(["<s>ab"]), control_tokens=True)[:3],
    ):
        assert ids[0] == bos
        assert ids.count(bos) == 1
    assert "<s>ab" in tokenizer.decode(tokenizer.encode("<s>ab", add_special=True))


def test_thoughts_in_answers_are_what_the_model_wrote(tmp_path: Path) -> None:
    """Markers that answers show stay tokens in them; those that end a turn do not."""
    tokenizer = save(tmp_path, KINDS["byte-level"](), chat_template=CHATML)
    answer = "<think>ab</think>im<|im_end|>"
    ids = tokenizer.encode_chat(turns([answer, answer]))
    counts = {text: ids.count(tokenizer.backend.token_to_id(text)) for text in MARKERS}
    assert counts == dict.fromkeys(MARKERS, 0) | {
        "<s>": 1,
        "<|im_start|>": 3,
        "<|im_end|>": 2,
        "<think>": 1,
        "</think>": 1,
    }
    assert tokenizer.decode(ids).count(answer) == 2


def test_other_texts_of_a_message_end_no_turn(tmp_path: Path) -> None:
    template = CHATML.replace("message.content", "message.thoughts + message.content")
    tokenizer = save(tmp_path, KINDS["byte-level"](), chat_template=template)
    message = {"role": "assistant", "thoughts": "<think>ab</s></think>", "content": "im"}
    ids = tokenizer.encode_chat([message])
    assert "<think>ab</s></think>im" in tokenizer.decode(ids)
    assert tokenizer.backend.token_to_id("</s>") not in ids
    assert tokenizer.backend.token_to_id("<think>") in ids
