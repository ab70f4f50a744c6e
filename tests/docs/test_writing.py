"""README and docs are in short sentences, and README is short."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MOST_WORDS = 25


def sentences(text):
    """The sentences of a page's prose: not of code, tables, headings, pictures and comments."""
    text = re.sub(r"^```.*?^```$", "\n", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"<!--.*?-->", "\n", text, flags=re.DOTALL)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "\n", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    paragraphs = [[]]
    for line in text.splitlines():
        begins_list = re.match(r"\s*([-*]|\d+\.) ", line)
        if begins_list or not line.strip() or re.match(r"#|\||    |:::", line):
            paragraphs.append([])
        is_code = line.startswith("    ") and not begins_list
        if line.strip() and not is_code and not re.match(r"#|\||:::", line):
            paragraphs[-1].append(re.sub(r"^\s*([-*]|\d+\.) ", "", line).strip())
    for paragraph in paragraphs:
        # What stands between backticks is a word, whatever it holds.
        words = re.sub(r"`[^`]*`", "`code`", " ".join(paragraph)).replace("**", "")
        yield from (s for s in re.split(r"(?<=[.!?])\s+(?=[A-Z0-9`*(])", words) if s)


def faults(text):
    """Sentences that are too long, or begin with "What" and are no questions."""
    return [
        f"{len(sentence.split())} words: {sentence}"
        for sentence in sentences(text)
        if len(sentence.split()) > MOST_WORDS or re.match(r"What\b.*[^?]$", sentence)
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_sentences_are_short(page):
    assert not faults(page.read_text(encoding="utf-8"))


def test_what_is_counted():
    long = " ".join(["Word"] * 26) + "."
    assert faults(f"A page. {long}\n") == [f"26 words: {long}"]
    assert faults(f"- an item\n- {long}\n") == [f"26 words: {long}"]
    assert faults("What a sentence. This is one, too.\n") == ["3 words: What a sentence."]
    assert not faults("What is it? It is one.\n")
    assert not faults(f"# {long}\n\n| {long} |\n\n    {long}\n\n```\n{long}\n```\n")
    assert not faults(f"A `{long}` of [words]({'a' * 99}).\n")


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
