"""Long English prose that every Python holds: its own manual."""

import re
from pydoc_data.topics import topics


def paragraphs() -> list[str]:
    """The manual's paragraphs of plain English: no headings, lists, grammar or code."""
    found = []
    for _, text in sorted(topics.items()):
        for paragraph in text.split("\n\n"):
            if re.match(r"[A-Z]", paragraph) and paragraph.endswith("."):
                line = re.sub(r"[*`]|\[\d+\]", "", " ".join(paragraph.split()))
                if len(line) > 200:
                    found.append(line)
    return found


def sentences() -> list[str]:
    """The paragraphs, sentence by sentence."""
    return [
        sentence
        for paragraph in paragraphs()
        for sentence in re.split(r"(?<=[a-z)]\.) (?=[A-Z])", paragraph)
    ]
