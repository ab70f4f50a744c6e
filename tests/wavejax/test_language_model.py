"""Text to text from Python: the command's answers, finish reasons, errors, the Flax module."""

import dataclasses
import doctest
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wavejax
from models.decoder import unembed
from models.unstacked import unstack_layers
from tests.support.tiny_models import make_tensors, write_folder
from tests.wavejax.cli.conftest import CONTEXT, TEMPLATE, TINY, write_tokenizer
from wavejax import InputError, LanguageModel, Sampler, WaveConfig, loading
from wavejax.cli.flags import errors_in_flags
from wavejax.engine.facts import Facts
from wavejax.engine.prompt_text import list_prompts
from wavejax.generate import main
from wavejax.planning import free_memory

ZONES = WaveConfig(
    local_tokens=8,
    growth_tokens=16,
    cluster_size=4,
    max_cluster_size=8,
    segment_tokens=128,
    min_candidate_tokens=32,
    min_retrieved_tokens=8,
)
TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model that knows chat; a byte is a token."""
    folder = tmp_path_factory.mktemp("tiny")
    write_folder(folder, TINY, make_tensors(TINY))
    write_tokenizer(folder, chat_template=TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> LanguageModel:
    return wavejax.load(folder, attention=ZONES)


@pytest.fixture
def command(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., list[dict[str, object]]]:
    """The answers of the command, as --json prints them."""
    zones = [
        argument
        for field in dataclasses.fields(WaveConfig)
        if not isinstance(value := getattr(ZONES, field.name), bool)
        for argument in ("--" + field.name.replace("_", "-"), str(value))
    ]

    def run(*arguments: str) -> list[dict[str, object]]:
        capsys.readouterr()
        assert main(["--model", str(folder), "--json", *zones, *arguments]) == 0
        return json.loads(capsys.readouterr().out)["answers"]

    return run


def test_the_commands_answers(
    model: LanguageModel, command: Callable[..., list[dict[str, object]]]
) -> None:
    """A batch of a text and a long text, sampled twice each, with a stop string."""
    long = "A cat sat on the mat. " * 12
    flags = ("--prompt", "Hello", "--prompt", long, "--samples", "2", "--temperature", "0.8")
    expected = command(*flags, "--seed", "3", "--max-new-tokens", "12", "--stop", "e")
    sampler = Sampler(temperature=0.8)
    result = model.generate(["Hello", long], 12, samples=2, sampler=sampler, seed=3, stop=["e"])
    assert [(a.prompt, a.sample) for a in result.answers] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [(a.text, list(a.token_ids), a.prompt_tokens) for a in result.answers] == [
        (one["text"], one["token_ids"], one["prompt_tokens"]) for one in expected
    ]
    assert result.facts is not None
    assert result.facts.indexed_tokens > 0
    assert result.first_token_seconds is not None
    assert (result.text, result.token_ids) == (result.answers[0].text, result.answers[0].token_ids)


def test_a_text_is_answered_or_continued(model: LanguageModel) -> None:
    chat = model.generate("Hello", 3)
    assert chat.token_ids == model.generate([{"role": "user", "content": "Hello"}], 3).token_ids
    assert chat.prompt_tokens == 8
    raw = model.generate("Hello", 3, raw=True)
    assert raw.prompt_tokens == 6
    both = model.generate(["Hello", TALK], 3)
    assert both.answers[0].token_ids == chat.token_ids
    assert both.answers[1].token_ids == model.generate("Hello", 3, system="Be brief.").token_ids
    text = model.tokenizer.decode(model.encode(TALK)[0].ids)
    assert text == "Be brief.Hello"


def test_pieces_make_the_text_and_the_last_has_the_reason(model: LanguageModel) -> None:
    whole = model.generate("Hello", 12)
    stream = model.stream("Hello", 12)
    first = next(stream)
    assert stream.result().token_ids == (first.token_id,)
    assert stream.result().facts is None
    pieces = [first, *stream]
    assert "".join(piece.text for piece in pieces) == whole.text == stream.result().text
    tokens = [piece.token_id for piece in pieces if piece.token_id is not None]
    assert tuple(tokens) == whole.token_ids
    assert {piece.finish_reason for piece in pieces[:-1]} == {None}
    assert pieces[-1].finish_reason == whole.finish_reason == "length"
    assert isinstance(stream.result().facts, Facts)


def test_finish_reasons(model: LanguageModel) -> None:
    free = model.generate("Hello", 12)
    stop = free.token_ids[4]
    ended = dataclasses.replace(model, stop_tokens=(stop,)).generate("Hello", 12)
    assert ended.finish_reason == "stop"
    assert ended.token_ids == free.token_ids[: free.token_ids.index(stop) + 1]

    text = next(char for char in free.text[2:] if char != "\ufffd")
    cut = model.generate("Hello", 12, stop=text)
    assert cut.finish_reason == "stop_string"
    assert cut.text == free.text.partition(text)[0]

    params = jax.tree.map(lambda x: x, model.params)
    params["params"]["final_norm"] = params["params"]["final_norm"] * jnp.nan
    broken = dataclasses.replace(model, params=params).generate("Hello", 12)
    assert broken.finish_reason == "not finite"
    assert (broken.text, broken.token_ids) == ("", ())


def test_a_stop_token_that_the_model_does_not_have_is_left_out(folder: Path) -> None:
    opened = loading.open_model(folder)
    config = opened.checkpoint.config
    more = dataclasses.replace(config, stop_token_ids=(*config.stop_token_ids, config.vocab_size))
    checkpoint = dataclasses.replace(opened.checkpoint, config=more)
    assert dataclasses.replace(opened, checkpoint=checkpoint).stop_tokens == opened.stop_tokens
    assert opened.stop_tokens


@pytest.mark.parametrize(
    "options, said, flags",
    [
        ({"max_new_tokens": CONTEXT}, "lower `max_new_tokens`", "lower --max-new-tokens"),
        ({"prompt": "x" * CONTEXT},
         "stretch it with `rope_scaling='yarn:2'`", "stretch it with --rope-scaling yarn:2,"),
        ({"samples": 2}, "`samples=2` without sampling", "--samples 2 without sampling"),
        ({"sampler": "model"}, "`sampler='model'`: ", "--sampling model: "),
        ({"prompt": TALK, "system": "x"}, "`system` is given", "--system is given"),
        ({"prompt": TALK, "raw": True}, "`messages` is for chat, and `raw`",
         "--messages is for chat, and --raw"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0", "max_new_tokens is 0"),
        ({"prompt": []}, "there is no prompt", "there is no prompt"),
        ({"prompt": " "}, "the prompt is empty", "the prompt is empty"),
        ({"prompt": [*TALK, {"role": "assistant", "content": "Hi"}]}, "end with one", "end with"),
        ({"stop": ""}, "none of them empty", "none of them empty"),
    ],
)  # fmt: skip
def test_errors_name_parameters_and_the_command_flags(
    model: LanguageModel, options: dict, said: str, flags: str
) -> None:
    given = {"prompt": "Hello"} | options
    with pytest.raises(InputError, match=re.escape(said)):
        model.stream.__wrapped__(model, **given)
    with pytest.raises(InputError, match=re.escape(flags)), errors_in_flags():
        model.stream.__wrapped__(model, **given)


def test_prompts_and_samplers_of_another_kind(model: LanguageModel) -> None:
    for prompts, said in (
        (["x", 3], "prompt 2 is of type int"),
        (["x", {"role": "user"}], "prompt 2 is of type dict"),
        (b"x", "the prompt is of type bytes"),
        ([], "there is no prompt"),
    ):
        with pytest.raises(InputError, match=said):
            list_prompts(prompts)
    with pytest.raises(InputError, match="`sampler` is 'best'"):
        model.sampler.__wrapped__(model, "best")


@pytest.mark.parametrize(
    "options, said",
    [
        ({"attention": "some"}, "`attention` is 'some'"),
        ({"attention": "full", "store": "host"}, "`store='host'` is for wave attention"),
        ({"store": "device", "fetch": "staged"}, "`fetch` is for rows on the host"),
        ({"attention": wavejax.WaveAttention(), "store": "host"}, "the WaveAttention's own"),
        ({"max_context": 0}, "`max_context` is 0"),
    ],
)
def test_settings_that_cannot_be(folder: Path, options: dict, said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        wavejax.load(folder, **options)


def test_max_context_and_rope_scaling(folder: Path) -> None:
    longer = wavejax.load(folder, attention="full", max_context=2 * CONTEXT)
    assert len(longer.generate("x" * CONTEXT, 1).token_ids) == 1
    with pytest.raises(InputError, match=re.escape("give `max_context=")):
        longer.generate("x" * 3 * CONTEXT, 1)
    assert wavejax.load(folder, rope_scaling="yarn:4").config.max_context == 4 * CONTEXT


def test_a_plan_does_not_count_the_weights_twice(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = model.plan(100, 10).need
    rest = need.device + need.host - need.weights
    for free, fits in ((rest, True), (rest - 1, False)):
        memory = free_memory.FreeMemory(None, free)
        monkeypatch.setattr(free_memory, "free_memory", lambda memory=memory: memory)
        if fits:
            model.plan(100, 10).check()
        else:
            with pytest.raises(InputError, match="not enough memory"):
                model.generator(100, 10)


def test_an_attention_is_used_as_it_is_where_it_fits(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = wavejax.WaveAttention(ZONES, "host")
    with_own = dataclasses.replace(model, attention=own)
    assert with_own.generator(9, 1).attention is own
    monkeypatch.setattr(free_memory, "free_memory", lambda: free_memory.FreeMemory(None, 1000))
    with pytest.raises(InputError, match="not enough memory"):
        with_own.generator(9, 1)


@pytest.mark.parametrize("unstacked", [False, True])
def test_the_flax_module_gives_the_same_logits(folder: Path, unstacked: bool) -> None:
    model = wavejax.load(folder, attention="full")
    if unstacked:
        model = dataclasses.replace(model, params=unstack_layers(model.params))
    module, variables = model.flax()
    ids = [model.encode(text)[0].ids for text in ("Hello", "World")]
    tokens = jnp.asarray(ids)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, state = module.apply(variables, tokens, positions, None)
    logits = unembed(model.config, variables, hidden[:, -1])
    expected = model.generator(len(ids[0]), 4, batch=2).start(model.params, ids, 4).logits
    np.testing.assert_allclose(logits, expected, atol=2e-5)
    assert state is None


def test_layers_lie_apart_where_they_are_written_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = wavejax.load(folder, attention="full").generate("Hello", 4)
    monkeypatch.setattr(loading, "unstacks", lambda *_: True)
    model = wavejax.load(folder, attention="full")
    assert isinstance(model.params["params"]["layers"], tuple)
    assert model.generate("Hello", 4).token_ids == expected.token_ids


def test_public_names_are_listed_and_documented() -> None:
    assert wavejax.__doc__ is not None
    listed = set(re.findall(r"`(\w+)`", wavejax.__doc__.partition("Examples,")[0]))
    assert set(wavejax.__all__) <= listed
    for name in wavejax.__all__:
        value = getattr(wavejax, name)
        assert len(value.__doc__ or "") > 40, name
        for method, member in vars(value).items() if isinstance(value, type) else ():
            if callable(member) and not method.startswith("_"):
                assert inspect.getdoc(getattr(value, method)), f"{name}.{method}"


@pytest.mark.parametrize(
    "subject",
    [
        wavejax,
        loading.load,
        LanguageModel.generate,
        LanguageModel.stream,
        LanguageModel.flax,
        wavejax.batch_engine,
    ],
    ids=lambda subject: subject.__name__,
)
def test_the_docstrings_examples_run(
    subject: object, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A tiny model in the place of SmolLM2, which takes longer.
    monkeypatch.setattr(loading, "find_default_model", lambda: folder)
    plain = SimpleNamespace(__doc__=subject.__doc__)
    example = doctest.DocTestParser().get_doctest(plain.__doc__ or "", {}, "example", None, None)
    assert example.examples
    report: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=report.append)
    assert not report, "".join(report)
