"""Tables and plots of records small enough to count by hand."""

import math

import numpy as np
import pytest

from wavejax.evaluation import attention_report, plots
from wavejax.evaluation.summary import able_tasks, bootstrap, summarise, values_of


def record(task, method, index, score, kl=0.5, length=100, **changes):
    return {
        "task": task,
        "length": length,
        "index": index,
        "method": method,
        "kl": kl,
        "match": 0.75,
        "nll": math.log(2),
        "kept": None,
        "score": score,
        "kl_by_chunk": [],
    } | changes


RECORDS = [
    *(record("a", "wave", i, score) for i, score in enumerate((1.0, 0.5, 1.0, 0.5))),
    *(record("a", "full", i, 1.0, kl=0.0) for i in range(4)),
    *(record("b", "wave", i, 0.5) for i in range(4)),
    *(record("b", "full", i, 0.25, kl=0.0) for i in range(4)),
    *(record("hard", method, i, 0.0) for i in range(4) for method in ("full", "wave")),
]


def cells(text, name):
    """The first table row that begins with this name."""
    (row, *_) = [line for line in text.splitlines() if line.startswith(f"| {name} ")]
    return [cell.strip() for cell in row.strip("|").split("|")][1:]


def test_scores_by_task_average_and_difference():
    text = summarise(RECORDS)
    assert cells(text, "score (samples)") == ["full", "wave"]
    assert cells(text, "b (4)") == ["25.0 ± 0.0", "50.0 ± 0.0"]
    full, wave = cells(text, "a (4)")
    assert (full, wave.split(" ± ")[0]) == ("100.0 ± 0.0", "75.0")
    # The mean of 4 values that are 50 or 100 has a standard deviation of 12.5.
    assert float(wave.split(" ± ")[1]) == pytest.approx(1.96 * 12.5, rel=0.2)
    assert [cell.split(" ± ")[0] for cell in cells(text, "average")] == ["62.5", "62.5"]
    assert cells(text, "against full")[0] == ""
    assert cells(text, "against full")[1].startswith("+0.0 ± ")
    assert "Not in the average, since full attention scores below 10: hard" in text


def test_fewer_samples_than_others_have_are_not_averaged():
    text = summarise([one for one in RECORDS if one["method"] == "full" or one["index"] < 2])
    assert cells(text, "a (4)")[1].endswith(" (2)")
    assert not cells(text, "a (4)")[0].endswith(")")
    assert [cell != "" for cell in cells(text, "average")] == [True, False]
    # Sample by sample they can be compared.
    assert cells(text, "against full")[1] == "+0.0 ± 12.5"
    assert "| wave (6 of 12 samples) " in text


def test_agreement_and_perplexity():
    long = [record("perplexity", "wave", i, None, length=200, kept=0.5) for i in range(3)]
    text = summarise(long)
    assert "score (samples)" not in text
    assert cells(text, "wave") == ["0.5000 ± 0.0000", "75.0 ± 0.0", "50.0 ± 0.0", "2.000"]


def test_an_average_over_other_tasks_is_not_given():
    text = summarise([*RECORDS, record("a", "quest", 0, 1.0)])
    assert cells(text, "average")[2] == ""
    assert cells(text, "against full")[2] == ""


def test_bootstrap_is_that_of_the_mean_of_means():
    rng = np.random.default_rng(0)
    groups = [rng.normal(size=50), 3 + rng.normal(size=400)]
    lists = [group.tolist() for group in groups]
    mean, half = bootstrap(lists)
    assert mean == pytest.approx((groups[0].mean() + groups[1].mean()) / 2)
    error = math.sqrt(groups[0].var() / 50 + groups[1].var() / 400) / 2
    assert half == pytest.approx(1.96 * error, rel=0.1)
    assert bootstrap(lists) == (mean, half)
    assert math.isnan(bootstrap([[1.0]])[1])


def test_values_leave_out_what_was_not_measured():
    found = values_of([record("a", "full", 0, None), record("a", "full", 1, 0.5)], "score", 100)
    assert found == {"full": {"a": {1: 0.5}}}
    assert able_tasks({"wave": {"a": {0: 0.0}}}) == (["a"], [])


def test_plots_are_written(tmp_path):
    plots.plot_scores([*RECORDS, *(r | {"length": 200} for r in RECORDS)], tmp_path / "a.png")
    plots.plot_by_budget({"wave": [(0.1, 1.0), (0.2, 0.5)]}, "y", tmp_path / "b.png", log=True)
    plots.plot_by_layer({"wave": np.ones((3, 2))}, "y", tmp_path / "c.png")
    chunks = [record("drift", "wave", i, None, kl_by_chunk=[i, 2.0]) for i in range(3)]
    early = record("drift", "wave", 3, None, kl_by_chunk=[9.0])
    by_position = plots.kl_by_position([*chunks, early, record("drift", "full", 0, None)])
    np.testing.assert_array_equal(by_position["wave"], [1.0, 2.0])
    assert list(by_position) == ["wave"]
    plots.plot_by_position(by_position, 128, "y", tmp_path / "d.png")
    for name in "abcd":
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_attention_is_reported_by_length():
    def of(length, task, kl):
        heads = {"recall": [[0.5, 0.75]], "error": [[0.25, 0.125]]}
        return {"task": task, "length": length, "name": "wave", "fraction": 0.01, "kl": kl} | heads

    rows = [(100, "a", 0.5), (100, "a", 0.25), (100, "b", 0.125), (900, "a", 1.0)]
    text = attention_report.summarise([of(*row) for row in rows])
    short, long = text.split("## 900 tokens")
    assert short.startswith("## 100 tokens")
    # Each task weighs the same, however many samples it has.
    assert cells(short, "wave")[:2] == ["1.00%", "3"]
    assert cells(short, "wave")[4].startswith("0.2500 ± ")
    assert cells(long, "wave") == ["1.00%", "1", "0.6250", "0.1875", "1.0000"]
