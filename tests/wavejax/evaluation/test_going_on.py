"""Evaluations that go on: with other tasks and more samples, and only with the same samples."""

import json

import pytest

from models.checkpoints.open import Checkpoint
from models.errors import InputError
from tests.support.scripts import load_script
from tests.support.tiny_models import make_tensors, write_folder
from tests.wavejax.cli.conftest import TEMPLATE, TINY, write_tokenizer


class WouldRunError(Exception):
    """The input was found right: the weights would be read now."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    config = TINY | {"max_position_embeddings": 4096}
    write_folder(folder, config, make_tensors(config))
    write_tokenizer(folder, chat_template=TEMPLATE)
    return folder


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    def load(*_):
        raise WouldRunError

    monkeypatch.setattr(Checkpoint, "load_params", load)


def run(script, model, folder, *more):
    """What is said of the command's input; None where all is right and it would run."""
    module = load_script(script)
    options = {"--model": model, "--out": folder, "--lengths": 2600, "--tasks": "vt"}
    options |= dict(zip(more[::2], more[1::2], strict=True))
    arguments = [str(x) for pair in options.items() for x in pair]
    with module.command.make_context(script, [*arguments, "--no-plots"]) as context:
        try:
            module.command.invoke(context)
        except WouldRunError:
            return None
        except InputError as error:
            return str(error)
    raise AssertionError("it neither ran nor refused")


def test_drawn_answers_go_on_in_the_same_batches_only(model, tmp_path):
    assert run("evaluate", model, tmp_path, "--tasks", "drift") is None
    said = run("evaluate", model, tmp_path, "--tasks", "drift", "--batch", 1)
    assert "whose answers drawn of drift.batch is 2, not 1: give another `out`" in said
    # More samples leave those that are there in the batches that they were in.
    assert run("evaluate", model, tmp_path, "--tasks", "drift,vt", "--samples", 3) is None
    # Greedy answers go on in any.
    assert run("evaluate", model, tmp_path, "--tasks", "vt", "--batch", 1) is None


@pytest.mark.parametrize("script", ["evaluate", "report_attention"])
def test_other_samples_are_refused_with_what_differs(model, tmp_path, script, monkeypatch):
    methods = ("--methods", "wave")
    assert run(script, model, tmp_path, *methods) is None
    assert run(script, model, tmp_path, *methods, "--lengths", 3000) is None
    assert "whose seed is 42, not 43" in run(script, model, tmp_path, *methods, "--seed", 43)
    text = tmp_path / "text.txt"
    text.write_text("Some words. " * 3000)
    said = run(script, model, tmp_path, *methods, "--haystack", text)
    assert "whose haystack is 'manual', not 'text.txt'" in said
    # A sample that changed for a reason that has no setting.
    monkeypatch.setattr("wavejax.evaluation.variable_tracking.NOISE", "The grass is blue.")
    said = run(script, model, tmp_path, *methods)
    assert "whose first sample of vt at 2600 tokens is " in said


@pytest.mark.parametrize("script", ["evaluate", "report_attention"])
def test_a_method_joins_only_on_the_samples_of_the_others(model, tmp_path, script, monkeypatch):
    """Each sample is looked at before it is run, not only the first of its task."""
    one = {"task": "vt", "length": 2600, "index": 0, "method": "full", "sample": "0" * 16}
    monkeypatch.setattr(Checkpoint, "load_params", lambda *_: None)
    monkeypatch.setattr("wavejax.evaluation.bench.Bench.__init__", lambda *_, **__: None)
    (tmp_path / "records.jsonl").write_text(json.dumps(one) + "\n")
    said = run(script, model, tmp_path, "--methods", "wave", "--samples", 1)
    assert "holds records of another sample 0 of vt at 2600 tokens (0000000000000000, not" in said
