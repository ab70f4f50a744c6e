"""The comparison of a tolerance with fixed budgets, from end to end on a tiny random model."""

import json

import pytest

from tests.support.scripts import load_script
from tests.support.tiny_models import make_tensors, write_folder
from tests.wavejax.cli.conftest import TEMPLATE, TINY, write_tokenizer

METHOD = (
    "wave[min_retrieved_tokens=64,retrieval_fraction=0,min_clusters=0,cluster_size=16,"
    "max_cluster_size=32,tolerance_draws=16]"
)


def script():
    return load_script("compare_tolerance")


@pytest.mark.slow(90)
def test_fixed_budgets_are_as_many_tokens_in_the_mean(tmp_path, capsys):
    config = TINY | {"max_position_embeddings": 4096}
    model, out = tmp_path / "model", tmp_path / "found.json"
    model.mkdir()
    write_folder(model, config, make_tensors(config))
    write_tokenizer(model, chat_template=TEMPLATE)
    arguments = ["--model", model, "--tasks", "vt,fwe", "--lengths", 2600, "--samples", 1]
    arguments += ["--tolerances", "0.01,0.1", "--method", METHOD, "--json", out]
    assert script().main([str(argument) for argument in arguments]) == 0
    printed = capsys.readouterr().out
    assert "## 2600 tokens, tolerance 0.01" in printed
    figures = json.loads(out.read_text())["figures"]
    assert {(one["tolerance"], one["task"]) for one in figures} == {
        (tolerance, task) for tolerance in (0.01, 0.1) for task in ("all", "vt", "fwe")
    }
    for tolerance in (0.01, 0.1):
        rows = {
            one["mode"]: [float(cell.rstrip("%") or "nan") for cell in one["cells"]]
            for one in figures
            if (one["tolerance"], one["task"]) == (tolerance, "all")
        }
        retrieved, read, *errors = rows["adaptive"][:5]
        assert rows["first budget"][:2] == [64, 64]
        assert 64 <= retrieved < read <= 15 * 64 + 4 * 16
        assert rows["fixed, as many retrieved"][0] == pytest.approx(retrieved, abs=0.5)
        assert rows["fixed, as many read"][0] == pytest.approx(min(read, 512), abs=0.5)
        assert errors == sorted(errors)
        # More tokens, less error.
        assert rows["fixed, as many read"][3] <= rows["first budget"][3]
