"""Costs beside accuracy: of records, of folders old and new, and without running anything."""

import dataclasses
import json

import pytest

from models.checkpoints.open import Checkpoint
from tests.support.scripts import load_script
from tests.support.tiny_models import make_tensors, write_folder
from tests.wavejax.cli.conftest import TEMPLATE, TINY, write_tokenizer
from tests.wavejax.evaluation.test_summary import cells, record
from wavejax import WaveConfig
from wavejax.evaluation.cost import cost_of
from wavejax.evaluation.cost_report import panels_of, plot_kl_by_bytes, points_of, summarise_costs
from wavejax.evaluation.methods import parse_methods
from wavejax.store.shape import CacheShape

SHAPE = CacheShape(layers=2, kv_heads=2, head_dim=16)
BUDGET = {"retrieval_fraction": 0.1, "min_retrieved_tokens": 1}
SETTINGS = {"model": "tiny", "dtype": "bfloat16", **BUDGET}
LENGTH = 4000


def of(method, kl, index=0, task="a", **changes):
    more = {"length": LENGTH, "prompt_tokens": 3900, "kept": 0.5} | changes
    return record(task, method, index, 0.25, kl=kl, **more)


RECORDS = [
    *(of("full", 0.0, i) for i in range(2)),
    *(of("wave", kl, i, clusters=90.0) for i, kl in enumerate((0.1, 0.3))),
    of("wave", 0.5, task="b", clusters=90.0),
    of("full", 0.0, task="b"),
    of("quest", 0.9),
]


def test_a_table_of_costs_has_the_cheapest_first():
    points, unknown = points_of(RECORDS, SHAPE, SETTINGS)
    assert unknown == []
    text = summarise_costs(points)
    lines = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert lines[1:] == ["quest (1 of 3 samples)", "wave", "full"]
    [wave] = parse_methods("wave", BUDGET).values()
    cost = cost_of(wave, SHAPE, 3900, "bfloat16", clusters=90.0)
    # The mean over tasks, of 0.2 and 0.5.
    assert cells(text, "wave") == [
        *(f"{cost.step.total:,.0f}", f"{cost.index:.1f}", "0.3500", "50.0", "25.0"),
    ]


def test_methods_have_the_defaults_of_their_day():
    """A folder's own defaults hold, not today's; but a method's own settings stand before them."""
    then = dataclasses.asdict(WaveConfig()) | {"candidate_fraction": 0.9, "cluster_size": 11}
    then |= {"min_candidate_tokens": 1, "gone": 1}
    found = parse_methods("wave,paper,wave[cluster_size=5]", BUDGET, then)
    assert [found[name].config.cluster_size for name in found] == [11, 16, 5]
    assert {each.config.candidate_fraction for each in found.values()} == {0.9}
    wave = [one for one in RECORDS if one["method"] == "wave"]
    [old], [new] = (
        points_of(wave, SHAPE, SETTINGS | {"defaults": defaults})[0]
        for defaults in (then, dataclasses.asdict(WaveConfig()) | {"min_candidate_tokens": 1})
    )
    assert old.cost.step.codes > 2 * new.cost.step.codes


def test_unknown_methods_are_named_and_old_records_counted_by_settings():
    old = [{k: v for k, v in one.items() if k != "clusters"} for one in RECORDS]
    points, unknown = points_of([*old, of("best[x=1]", 0.1)], SHAPE, SETTINGS)
    assert unknown == ["best[x=1]"]
    assert "has no such method: best[x=1]" in summarise_costs(points, unknown)
    [wave] = (point for point in points if point.method == "wave")
    assert wave.cost.step.clusters > 0


def test_budgets_of_a_report_of_attention_are_the_records_own():
    records = [
        of(f"wave at {fraction}", 0.1, name="wave", fraction=fraction) for fraction in (0.01, 0.1)
    ]
    few, many = points_of(records, SHAPE, {"model": "tiny", "dtype": "float32"})[0]
    assert many.cost.step.rows == pytest.approx(10 * few.cost.step.rows, rel=0.05)
    assert {few.family, many.family} == {"wave"}


def test_the_plot_has_a_point_a_method_and_a_line_where_nothing_is_lost(tmp_path, monkeypatch):
    points, _ = points_of(RECORDS, SHAPE, SETTINGS)
    drawn = []
    monkeypatch.setattr("wavejax.evaluation.plots.finish", lambda figure, *_: drawn.append(figure))
    plot_kl_by_bytes(panels_of("tiny", points), tmp_path / "a.png")
    [axes] = drawn[0].axes
    marks = [line.get_xydata()[0].tolist() for line in axes.lines if len(line.get_xydata()) == 1]
    known = {p.family: [p.cost.step.total, p.kl] for p in points}
    assert sorted(marks) == sorted([known["wave"], known["quest"]])
    [upright] = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert upright.get_xdata()[0] == known["full"][0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")


def script(name):
    return load_script(name)


def write(folder, parts=None, model="tiny"):
    folder.mkdir()
    content = {"settings": SETTINGS | {"model": model}, "runs": []}
    content |= {} if parts is None else {"parts": parts}
    (folder / "settings.json").write_text(json.dumps(content))
    lines = "".join(json.dumps(one) + "\n" for one in RECORDS)
    (folder / "records.jsonl").write_text(lines + '{"task": "cut of')
    return str(folder)


def test_several_folders_share_a_plot_and_are_left_as_they_are(tmp_path, capsys):
    sizes = {"layers": 2, "kv_heads": 2, "head_dim": 16}
    new = write(tmp_path / "new", {"cache shape": sizes})
    old = write(tmp_path / "old", model="other")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    out, main = tmp_path / "plots" / "found.png", script("plot_cost").main
    assert main([new, old, "--out", str(out)]) == 2
    assert "does not say the layers and heads of other" in capsys.readouterr().err
    assert main([new, old, "--out", str(out), "--shape", "other=2,2"]) == 2
    assert "give MODEL=LAYERS,KV_HEADS,HEAD_DIM" in capsys.readouterr().err
    assert main([new, old, "--out", str(out), "--shape", "other=2,2,16"]) == 0
    first, second = capsys.readouterr().out.split("# old: other")
    assert cells(first, "wave") == cells(second, "wave")
    assert out.read_bytes().startswith(b"\x89PNG")
    assert {path: path.read_bytes() for path in before} == before
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == len(before) + 1
    assert main([str(tmp_path / "none"), "--out", str(out)]) == 2
    assert "holds no evaluation" in capsys.readouterr().err


@pytest.mark.slow
def test_a_complete_folder_is_reported_anew_without_the_weights(tmp_path, monkeypatch, capsys):
    """And a folder that was written before costs were counted goes on."""
    config = TINY | {"max_position_embeddings": 4096}
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    write_folder(model, config, make_tensors(config))
    write_tokenizer(model, chat_template=TEMPLATE)
    module = script("evaluate")
    arguments = ["--model", model, "--out", out, "--lengths", 2600, "--tasks", "vt"]
    arguments += ["--methods", "wave", "--samples", 1, "--batch", 1]
    arguments = [str(argument) for argument in arguments]

    class WouldRunError(Exception):
        pass

    def load(*_):
        raise WouldRunError

    monkeypatch.setattr(Checkpoint, "load_params", load)
    with (
        pytest.raises(WouldRunError),
        module.command.make_context("evaluate", arguments.copy()) as context,
    ):
        module.command.invoke(context)
    written = json.loads((out / "settings.json").read_text())
    assert written["parts"].pop("cache shape").keys() == {"layers", "kv_heads", "head_dim"}
    (out / "settings.json").write_text(json.dumps(written))
    one = record("vt", "wave", 0, 0.5, length=2600, prompt_tokens=2500)
    (out / "records.jsonl").write_text(json.dumps(one) + "\n")
    assert module.main(arguments) == 0
    assert "## Costs, 2600 tokens" in capsys.readouterr().out
    assert "| wave " in (out / "summary.md").read_text().split("## Costs")[1]
    assert (out / "kl_by_bytes.png").read_bytes().startswith(b"\x89PNG")
    assert "cache shape" in json.loads((out / "settings.json").read_text())["parts"]
