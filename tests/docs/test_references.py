"""Pages that code names are there, and folders that docs name."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("pallas_kernels", "models", "wavejax", "scripts", "tests")
CODE = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_pages_that_code_names_are_there():
    missing = [
        f"{file.relative_to(ROOT)}: {page}"
        for file in CODE
        for page in re.findall(r"(?<!ggml's )\bdocs/[\w/-]+\.md", file.read_text(encoding="utf-8"))
        if not (ROOT / page).is_file()
    ]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_pages_name_are_there(page):
    """Of the paths between backticks those that begin with a folder of this project."""
    text = page.read_text(encoding="utf-8")
    named = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)`", text)
    named += re.findall(r"python (scripts/[\w/]+\.py)", text)
    assert all((ROOT / name).exists() for name in named if "NAME" not in name), named
