"""What the README says is so: its examples run, its flags exist; all links lead somewhere."""

import contextlib
import importlib
import io
import re
import tomllib
from pathlib import Path

import pytest

from models.checkpoints import open
from tests.support.tiny_models import make_tensors, write_folder
from tests.wavejax.cli.conftest import TEMPLATE, TINY, write_tokenizer
from wavejax.cli.generate_command import command

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]
ONE_OP, LIBRARY = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_example_runs(tmp_path, monkeypatch):
    # A tiny model in the place of SmolLM2, which takes a minute.
    write_folder(tmp_path, TINY, make_tensors(TINY))
    write_tokenizer(tmp_path, chat_template=TEMPLATE)
    monkeypatch.setattr(open, "find_default_model", lambda: tmp_path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(LIBRARY, "README.md", "exec"), {})
    lines = printed.getvalue().strip().splitlines()
    assert len(lines) >= 3  # two answers and the facts
    assert lines[-1].startswith("Facts(retrieved_share=")


def test_the_example_of_one_op_runs(capsys):
    exec(compile(ONE_OP, "README.md", "exec"), {})
    assert capsys.readouterr().out == "(1, 8, 4, 512) (1, 8, 4)\n"


def anchors(page):
    """What the headings of a page are called in links, by GitHub's rule."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for target in targets:
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.is_file(), target
        assert not anchor or anchor in anchors(file), target


def test_flags_exist():
    known = {flag for option in command.params for flag in [*option.opts, "--help"]}
    known |= {flag for option in command.params for flag in option.secondary_opts}
    assert set(re.findall(r"`(--[a-z-]+)", README)) <= known


def test_commands_have_names_of_their_own():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for name, where in project["scripts"].items():
        module, function = where.split(":")
        assert callable(getattr(importlib.import_module(module), function))
        assert f"`{name}`" in README
