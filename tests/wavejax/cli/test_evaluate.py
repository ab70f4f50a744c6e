"""The evaluation scripts: they go on where they stopped, and refuse bad input in one line."""

import contextlib
import io
import json

import pytest

from models.checkpoints.open import Checkpoint
from models.errors import InputError
from tests.support.scripts import load_script
from tests.support.tiny_models import make_tensors, write_folder
from tests.wavejax.cli.conftest import TEMPLATE, TINY, Result, write_tokenizer
from wavejax.evaluation.bench import Bench
from wavejax.evaluation.records import Records, blocks, key_of

LENGTH = 1500
# Prompts of 1,400 bytes are then clustered.
SMALL = "[growth_tokens=64,segment_tokens=512,max_cluster_size=64,min_retrieved_tokens=64]"
METHODS = f"full,oracle{SMALL},wave{SMALL}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model whose tokens are bytes, with a context of 4,096."""
    folder = tmp_path_factory.mktemp("tiny")
    config = TINY | {"max_position_embeddings": 4096}
    write_folder(folder, config, make_tensors(config))
    write_tokenizer(folder, chat_template=TEMPLATE)
    return folder


def run(script, *arguments):
    module = load_script(script)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = module.main([str(argument) for argument in arguments])
    return Result(status, out.getvalue(), err.getvalue())


def evaluate(model, out, *more):
    return run(
        "evaluate",
        *(
            "--model",
            model,
            "--tasks",
            "niah_single_1,niah_multikey_2",
            "--lengths",
            LENGTH,
            "--samples",
            3,
        ),
        *("--batch", 2, "--methods", METHODS, "--out", out, "--no-plots", *more),
    )


def lines(folder):
    text = (folder / "records.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """The folder of an evaluation that nothing stopped, and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    result = evaluate(model, folder)
    assert result.status == 0, result.err
    return folder, result.out


def test_every_sample_and_method_has_a_record(whole):
    folder, printed = whole
    found = lines(folder)
    assert len({key_of(record) for record in found}) == len(found) == 2 * 3 * 3
    for record in found:
        assert 900 < record["prompt_tokens"] <= LENGTH - 128
        assert 0 <= record["score"] <= 1
        assert (record["kl"] == 0) == (record["method"] == "full")
    assert (folder / "summary.md").read_text(encoding="utf-8") == printed
    assert f"## {LENGTH} tokens" in printed
    for name in ("niah_single_1 (3)", "niah_multikey_2 (3)", f"oracle{SMALL}", f"wave{SMALL}"):
        assert name in printed
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["settings"]["seed"] == 42
    assert len(settings["runs"]) == 1


@pytest.mark.slow(10)
def test_a_stopped_evaluation_goes_on_where_it_was(whole, model, tmp_path, monkeypatch):
    original, done = Bench.run, []

    def interrupted(self, *arguments, **keywords):
        for name, figures in original(self, *arguments, **keywords):
            if len(done) == 4:
                raise KeyboardInterrupt
            done.append(name)
            yield name, figures

    monkeypatch.setattr(Bench, "run", interrupted)
    assert evaluate(model, tmp_path).status == 130
    # Three methods of two samples, and one of the third sample.
    before = lines(tmp_path)
    assert len(before) == 3 * 2 + 1
    # As if it had been killed in the middle of a line.
    with (tmp_path / "records.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"task": "vt", "len')
    asked = []

    def counted(self, samples, length, methods, **keywords):
        asked.append(list(methods))
        return original(self, samples, length, methods, **keywords)

    monkeypatch.setattr(Bench, "run", counted)
    result = evaluate(model, tmp_path)
    assert (result.status, result.out) == (0, whole[1])
    every = METHODS.replace(SMALL, "").split(",")
    assert [[name.split("[")[0] for name in names] for names in asked] == [every[1:], every, every]
    after = lines(tmp_path)
    assert after[: len(before)] == before
    assert sorted(after, key=key_of) == sorted(lines(whole[0]), key=key_of)

    # All done: nothing is run, and the weights are not read.
    monkeypatch.setattr(Checkpoint, "load_params", None)
    assert evaluate(model, tmp_path).out == whole[1]


def test_other_settings_are_refused(whole, model):
    result = evaluate(model, whole[0], "--seed", 7)
    assert (result.status, result.out) == (2, "")
    assert "holds an evaluation whose seed is 42, not 7: give another --out" in result.err


@pytest.mark.slow
def test_attention_is_reported_by_budget(model, tmp_path):
    arguments = (
        *("--model", model, "--tasks", "niah_single_1", "--lengths", LENGTH, "--samples", 1),
        *("--methods", METHODS.removeprefix("full,"), "--budgets", "0.1,1", "--out", tmp_path),
    )
    result = run("report_attention", *arguments)
    assert result.status == 0, result.err
    found = {
        (record["name"].split("[")[0], record["fraction"]): record for record in lines(tmp_path)
    }
    assert len(found) == 4
    for (name, fraction), record in found.items():
        assert len(record["recall"]) == TINY["num_hidden_layers"]
        assert len(record["recall"][0]) == TINY["num_attention_heads"]
        if fraction == 1 and name == "oracle":
            assert min(record["recall"][0]) > 0.999
            assert max(record["error"][0]) < 1e-3
            assert record["kl"] < 1e-4
        elif fraction < 1:
            assert max(record["recall"][0]) < 0.999
    for plot in ("recall_by_budget", "kl_by_budget", "error_by_budget", "error_by_layer"):
        assert (tmp_path / f"{plot}.png").read_bytes().startswith(b"\x89PNG")
    assert run("report_attention", *arguments) == result


@pytest.mark.parametrize("script", ["evaluate", "report_attention"])
@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--tasks", "qa_1"], "no task 'qa_1'"),
        (["--methods", "best"], "no method 'best'"),
        (["--methods", "wave[cluster_size=0]"], "cluster_size is 0"),
        (["--lengths", "4k"], "lengths are '4k'"),
        (["--lengths", "0"], "each must be above 0"),
        (["--lengths", "100000"], "above the model's context, 4096 tokens"),
        (["--lengths", "200"], "no sample of 200 tokens"),
        (["--tasks", "perplexity", "--haystack", "absent.txt"], "absent.txt: No such file"),
        (["--samples", "0"], "--samples"),
        (["--model", "absent"], "absent"),
    ],
)
def test_bad_input_is_one_line(model, tmp_path, monkeypatch, script, arguments, said):
    monkeypatch.setattr(Checkpoint, "load_params", None)
    out = tmp_path / "out"
    start = ["--model", model, "--tasks", "vt", "--out", out]
    result = run(script, *start, *arguments)
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert said in result.err
    assert not out.exists()


def test_a_folder_that_cannot_be_used(model, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    result = evaluate(model, file)
    assert result.status == 2
    assert f"cannot use the folder {file}" in result.err


def test_records_are_not_written_twice(tmp_path):
    record = {"task": "a", "length": 1, "index": 0, "method": "full"}
    with Records(tmp_path, {"seed": 1}, {}) as first:
        first.append([record])
        # Nor by two runs at a time, each of which would write what the other one has.
        with pytest.raises(InputError, match="another run writes to"):
            Records(tmp_path, {"seed": 1}, {})
    with Records(tmp_path, {"seed": 1}, {}) as again:
        assert again.records == [record]
        assert again.done == {("a", 1, 0, "full")}


def test_settings_that_differ_and_that_are_damaged_are_said(tmp_path):
    record = {"task": "a", "length": 1, "index": 0, "method": "full"}
    with Records(tmp_path, {"defaults": {"least": 1, "most": 2}}, {}) as first:
        first.append([record])
    with pytest.raises(InputError, match=r"whose defaults\.most is 2, not 3: give another `out`"):
        Records(tmp_path, {"defaults": {"least": 1, "most": 3}}, {})
    settings = tmp_path / "settings.json"
    settings.write_text("")
    with pytest.raises(InputError, match="does not hold an evaluation's settings"):
        Records(tmp_path, {"seed": 1}, {})
    settings.unlink()
    with Records(tmp_path, {"seed": 1}, {}) as again:
        assert again.records == [record]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(".lock", "records.jsonl", "settings.json")
    ]


def test_batches_have_one_size():
    assert [list(block) for block in blocks(5, 2)] == [[0, 1], [2, 3], [4, 5]]
    assert [list(block) for block in blocks(9, 8)] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert [list(block) for block in blocks(3, 8)] == [[0, 1, 2]]
