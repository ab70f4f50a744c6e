"""What README and docs say is so: examples run, flags exist, links lead somewhere."""

import contextlib
import importlib.util
import io
import re
import tomllib
from pathlib import Path

import pytest

from tests.support.tiny_models import make_tensors, write_folder
from tests.wavejax.cli.conftest import TEMPLATE, TINY, write_tokenizer
from wavejax.cli.generate_command import command
from wavejax.cli.serve_command import command as serve_command

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]
GUIDE = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]  # all but the notebook


def examples(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


# The server's asks a server: tests/wavejax/server/test_clients.py runs it.
EXAMPLES = [
    pytest.param(page.name, code, id=f"{page.name}-{number}")
    for page in GUIDE
    if page.name != "server.md"
    for number, code in enumerate(examples(page))
]
# The last line that an example prints.
LAST_LINES = {
    ("python.md", "Generator("): r"Facts\(retrieved_share=.*",
    ("documents.md", "read_document("): r"kept 85 of \d+ tokens",
    ("documents.md", "save_document("): r"36 of 43 tokens were reused",
    ("documents.md", "kept=document"): r"36 of 43 tokens were reused",
    ("documents.md", "DocumentCache("): r"36 tokens reused",
    ("python.md", "CacheShape("): r"\(1, 1, 4, 64\) \[2001\]",
    ("kernels.md", "ops.score_clusters"): r"\(1, 8, 4, 512\) \(1, 8, 4\)",
    ("debugging.md", "generator.force"): r"largest difference of logits: [\d.e-]+",
}


@pytest.mark.parametrize(("page", "code"), EXAMPLES)
def test_examples_run(page, code, tmp_path, monkeypatch):
    # A tiny model in the place of SmolLM2, which takes a minute.
    write_folder(tmp_path, TINY, make_tensors(TINY))
    write_tokenizer(tmp_path, chat_template=TEMPLATE)
    for module in ("models.checkpoints.open", "wavejax.loading"):  # the latter has a name for it
        if importlib.util.find_spec(module):
            found = importlib.import_module(module)
            monkeypatch.setattr(found, "find_default_model", lambda: tmp_path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, page, "exec"), {})
    last = printed.getvalue().strip("\n").splitlines()[-1:]
    for (name, part), expected in LAST_LINES.items():
        if name == page and part in code:
            assert re.fullmatch(expected, last[0])


def test_expected_lines_are_of_examples():
    for name, part in LAST_LINES:
        assert any(name == page and part in code for page, code in (e.values for e in EXAMPLES))


def anchors(page):
    """What the headings of a page are called in links, by GitHub's rule."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for target in targets:
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.is_file(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", GUIDE, ids=lambda page: page.name)
def test_flags_exist(page):
    options = [*command.params, *serve_command.params]
    known = {flag for option in options for flag in [*option.opts, *option.secondary_opts]}
    known.add("--help")
    known |= {"--out", "--methods"}  # of scripts
    assert set(re.findall(r"`(--[a-z-]+)", page.read_text(encoding="utf-8"))) <= known


def test_the_settings_page_has_the_defaults():
    """Of the flags whose default the page states as one number."""
    page = (ROOT / "docs/settings.md").read_text(encoding="utf-8")
    defaults = {option.opts[0]: option.default for option in command.params}
    rows = re.findall(r"^\| (`--.*?) \| .* \| (.*?) \|$", page, re.MULTILINE)
    checked = 0
    for flags, stated in rows:
        names, values = re.findall(r"`(--[a-z-]+)`", flags), stated.split(", ")
        if len(names) == len(values):
            for name, value in zip(names, values, strict=True):
                number = re.match(r"[\d.]+", value)
                if number:
                    assert float(number[0]) == float(defaults[name]), name
                    checked += 1
    assert checked >= 6


def test_commands_have_names_of_their_own():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, where in project["scripts"].items():
        module, function = where.split(":")
        assert callable(getattr(importlib.import_module(module), function))
        assert f"`{name}`" in readme
