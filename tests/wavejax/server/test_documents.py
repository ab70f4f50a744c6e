"""The field `document`, and prompts that begin with a kept document, by OpenAI's own client."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

import wavejax
from models.errors import InputError
from tests.wavejax.server.conftest import NAME, Running
from wavejax import LanguageModel
from wavejax.documents.shelf import DocumentNotFound, Shelf
from wavejax.engine.batching import BatchEngine

TEXT = "The town lies in a wide valley. The bridge over the river Elm was opened in 1907."
QUESTION = "When was it opened?"
GREEDY: Any = {"model": NAME, "temperature": 0}


@pytest.fixture(scope="module")
def folder(tiny_model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat's document, a text that goes on, one whose marks count, and a damaged one."""
    made = tmp_path_factory.mktemp("documents")
    wavejax.read_document(tiny_model, TEXT, made / "valley")
    wavejax.read_document(tiny_model, TEXT, made / "text", raw=True)
    wavejax.read_document(tiny_model, f"{TEXT}<answer>", made / "marks", control_tokens=True)
    shutil.copytree(made / "valley", made / "damaged")
    file = next((made / "damaged").glob("arrays-*/keys.0.npy"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    (made / "no document").mkdir()
    wavejax.read_document(tiny_model, TEXT, made.parent / "outside")
    return made


@pytest.fixture(scope="module")
def shelf(folder: Path, tiny_model: LanguageModel, tiny_engine: BatchEngine) -> Shelf:
    given: Any = {"generator": tiny_engine.generator, "params": tiny_model.params}
    return Shelf(folder, tokenizer=tiny_model.tokenizer, **given)


@pytest.fixture(scope="module")
def keeper(start: Callable[..., Running], shelf: Shelf) -> Running:
    """A server that keeps documents."""
    return start(shelf=shelf)


def ask(server: Running, question: str = QUESTION, document: str = "valley", **more: Any) -> Any:
    talk: Any = [{"role": "user", "content": question}]
    given: Any = {**GREEDY, "messages": talk, "max_tokens": 12, **more}
    extra = {"document": document, "ignore_eos": True}
    return server.client.chat.completions.create(**given, extra_body=extra)


def expected(server: Running, folder: Path, name: str = "valley") -> Any:
    stream = wavejax.ask_document(server.model, folder / name, QUESTION, 12)
    for _ in stream:
        pass
    return stream.result()


def test_a_question_gets_the_answer_of_ask_document(keeper: Running, folder: Path) -> None:
    got, alone = ask(keeper), expected(keeper, folder)
    assert got.choices[0].message.content == alone.text
    kept = len(keeper.service.shelf.open("valley").token_ids)  # type: ignore[union-attr]
    assert got.usage.prompt_tokens_details.cached_tokens == kept > len(TEXT)
    assert got.usage.prompt_tokens == alone.prompt_tokens > kept
    chunks = list(ask(keeper, stream=True, stream_options={"include_usage": True}))
    text = "".join(one.choices[0].delta.content or "" for one in chunks if one.choices)
    assert text == alone.text
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == kept


def test_the_pages_example(keeper: Running, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[3] / "docs/server.md").read_text(encoding="utf-8")
    _, code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = {"client": keeper.client, "model": NAME}
    exec(compile(code.replace("book", "valley"), "docs/server.md", "exec"), names)
    assert re.fullmatch(r"\d\d+ tokens were not read anew\n", capsys.readouterr().out)


def test_of_several_answers_the_prompt_counts_once(keeper: Running) -> None:
    once = ask(keeper, temperature=1.0, n=2, seed=3)
    assert once.usage.prompt_tokens_details.cached_tokens < once.usage.prompt_tokens
    assert once.choices[0].message.content != once.choices[1].message.content


def test_a_response_about_a_document(keeper: Running, folder: Path) -> None:
    got = keeper.client.responses.create(
        model=NAME,
        input=QUESTION,
        temperature=0,
        max_output_tokens=12,
        extra_body={"document": "valley"},
    )
    assert expected(keeper, folder).text.startswith(got.output_text)
    assert got.usage is not None
    assert got.usage.input_tokens_details.cached_tokens > len(TEXT)


def test_a_text_goes_on(keeper: Running, folder: Path) -> None:
    """As a text, as tokens, and unasked where the whole prompt is sent."""
    alone, tokenizer = expected(keeper, folder, "text"), keeper.model.tokenizer
    question = tokenizer.encode(QUESTION, add_special=False)
    whole = tokenizer.encode(TEXT, add_special=True) + question
    given: Any = {**GREEDY, "max_tokens": 12}
    for prompt, extra in (
        (QUESTION, {"document": "text"}),
        (question, {"document": "text"}),
        (TEXT + QUESTION, {}),
        (whole, {}),
    ):
        got = keeper.client.completions.create(
            **given, prompt=prompt, extra_body=extra | {"ignore_eos": True}
        )
        assert got.choices[0].text == alone.text
        assert got.usage.prompt_tokens_details.cached_tokens > len(TEXT)


def test_a_chat_that_begins_with_a_document_reuses_it(keeper: Running, folder: Path) -> None:
    talk: Any = [{"role": "user", "content": f"{TEXT}\n\n{QUESTION}"}]
    extra = {"ignore_eos": True}
    got = keeper.client.chat.completions.create(
        **GREEDY, messages=talk, max_tokens=12, extra_body=extra
    )
    assert got.choices[0].message.content == expected(keeper, folder).text
    assert got.usage.prompt_tokens_details.cached_tokens > len(TEXT)
    other = keeper.client.chat.completions.create(
        **GREEDY, messages=[{"role": "user", "content": "Hello"}], max_tokens=2
    )
    assert other.usage.prompt_tokens_details.cached_tokens == 0


@pytest.mark.parametrize(
    "name, status, words",
    [
        ("none", 404, "there is no document 'none'"),
        ("../outside", 404, "there is no document '../outside'"),
        ("valley/../valley", 404, "there is no document"),
        ("..", 404, "there is no document"),
        ("no document", 404, "there is no document"),
        ("damaged", 409, "checksum differs"),
        ("text", 400, "send the rest as the `prompt` of /v1/completions"),
    ],
)
def test_documents_that_cannot_be_asked(
    keeper: Running, folder: Path, name: str, status: int, words: str
) -> None:
    with pytest.raises(openai.APIStatusError, match=words) as caught:
        ask(keeper, document=name)
    assert caught.value.status_code == status
    assert caught.value.param == "document"
    assert str(folder) not in str(caught.value)


@pytest.mark.parametrize(
    "given, words",
    [
        ({"messages": [{"role": "system", "content": "x"}]}, "leave the system message out"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "a user"),
        ({"max_tokens": 500}, "max_tokens|context"),
    ],
)
def test_what_does_not_fit_a_document(keeper: Running, given: Any, words: str) -> None:
    given = {"messages": [{"role": "user", "content": "x"}], **given}
    with pytest.raises(openai.BadRequestError, match=words):
        keeper.client.chat.completions.create(**GREEDY, **given, extra_body={"document": "valley"})


def test_marks_of_a_document_count_and_a_questions_do_not(keeper: Running) -> None:
    assert ask(keeper, document="marks").usage.prompt_tokens_details.cached_tokens > len(TEXT)
    with pytest.raises(openai.BadRequestError, match="spells control tokens"):
        ask(keeper, "When?<user>", document="marks")


def test_a_server_without_documents_says_so(server: Running) -> None:
    with pytest.raises(openai.NotFoundError, match="start it with `--documents DIR`"):
        ask(server)


def test_a_shelf_opens_each_version_once(
    shelf: Shelf, tiny_model: LanguageModel, tmp_path: Path
) -> None:
    own = Shelf.__new__(Shelf)
    own.__dict__.update(shelf.__dict__)
    own.folder, own._open, own._most = tmp_path, own._open.__class__(), 1
    for name in ("one", "two"):
        shutil.copytree(shelf.folder / "valley", tmp_path / name)
    assert own.names() == ["one", "two"]
    first = own.open("one")
    assert own.open("one") is first
    own.open("two")
    assert own.open("one") is not first  # one stays open
    first = own.open("one")
    wavejax.read_document(tiny_model, TEXT + " It is old.", tmp_path / "one")
    again = own.open("one")
    assert len(again.token_ids) > len(first.token_ids)
    assert first.last_logits().shape == (tiny_model.config.vocab_size,)  # still mapped
    shutil.rmtree(tmp_path / "one")
    with pytest.raises(DocumentNotFound):
        own.open("one")


def test_another_models_document_says_what_differs(
    folder: Path, tiny_model: LanguageModel, tiny_engine: BatchEngine
) -> None:
    params = {"params": dict(tiny_model.params["params"])}
    params["params"]["final_norm"] = params["params"]["final_norm"] * 2
    given: Any = {"generator": tiny_engine.generator, "params": params}
    other = Shelf(folder, tokenizer=tiny_model.tokenizer, **given)
    with pytest.raises(InputError, match="document 'valley' was kept with other weights"):
        other.open("valley")
    assert other.best(tiny_model.tokenizer.encode(TEXT + QUESTION, add_special=True)) is None
    with pytest.raises(InputError, match="is no folder"):
        Shelf(folder / "none", tokenizer=tiny_model.tokenizer, **given)
