"""Traces of load on a server: when requests come, and how long their parts are."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from models.errors import InputError
from wavejax.evaluation.files import write_text

Range = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Arrival:
    """A request of a trace.

    Attributes:
        arrival_s: when it comes, in seconds from the trace's beginning.
        document_tokens: tokens that its prompt begins with; 0 for none.
        question_tokens: tokens after them.
        answer_tokens: that are generated.
        document: which one: requests of one number begin alike. None: of its own.
    """

    arrival_s: float
    document_tokens: int
    question_tokens: int
    answer_tokens: int
    document: int | None = None


def read_trace(path: Path) -> list[Arrival]:
    """Read a trace: JSON lines with the fields of `Arrival`.

    Raises:
        InputError: it cannot be read, is empty, or a line is none; the message has its number.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text in UTF-8"
        raise InputError(f"cannot read {path}: {reason}") from None
    found = [_arrival(f"{path}, line {i}", line) for i, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise InputError(f"{path} has no request")
    return sorted(found, key=lambda one: one.arrival_s)


def write_trace(path: Path, trace: Sequence[Arrival]) -> None:
    """Write a trace for `read_trace`; raises InputError where it cannot be written."""
    write_text(path, "".join(f"{json.dumps(dataclasses.asdict(one))}\n" for one in trace))


def make_trace(
    requests: int,
    rate: float,
    documents: int,
    *,
    document_tokens: Range,
    question_tokens: Range,
    answer_tokens: Range,
    seed: int,
) -> list[Arrival]:
    """Make a trace: requests come independently of each other, each about any of the documents.

    Args:
        requests: how many.
        rate: of them a second, on average.
        documents: how many; 0 for none.
        document_tokens: the least and the most of each, evenly by their logarithm.
        question_tokens, answer_tokens: the least and the most, evenly.
        seed: of all of it.
    """
    rng = np.random.default_rng(seed)
    low, high = np.log(document_tokens)
    lengths = np.rint(np.exp(rng.uniform(low, high, documents))).astype(int)
    times = np.cumsum(rng.exponential(1 / rate, requests))
    trace = []
    for time in times:
        document = int(rng.integers(documents)) if documents else None
        question, answer = (
            int(rng.integers(least, most + 1)) for least, most in (question_tokens, answer_tokens)
        )
        size = 0 if document is None else int(lengths[document])
        trace.append(Arrival(round(float(time), 6), size, question, answer, document))
    return trace


def prompt_of(trace: Sequence[Arrival], number: int, words: np.ndarray, seed: int) -> list[int]:
    """Make the token ids of a request's prompt: those of one document always begin alike.

    Args:
        trace: all requests.
        number: which.
        words: token ids to draw from.
        seed: of all prompts.
    """
    one = trace[number]
    # A document that is a request's own has a number that no other has.
    document = (1, number) if one.document is None else (0, one.document)
    parts = (((*document, 0), one.document_tokens), ((2, number, 0), one.question_tokens))
    drawn = [np.random.default_rng([seed, *key]).choice(words, size) for key, size in parts]
    return np.concatenate(drawn).tolist()


def _arrival(where: str, line: str) -> Arrival:
    try:
        one = Arrival(**json.loads(line))
    except (ValueError, TypeError, RecursionError):
        names = ", ".join(field.name for field in dataclasses.fields(Arrival))
        raise InputError(f"{where} is no request: give a JSON object with {names}") from None
    counts = (one.document_tokens, one.question_tokens, one.answer_tokens)
    if not all(type(count) is int and count >= 0 for count in counts):
        raise InputError(f"{where}: numbers of tokens must be whole, and 0 or more")
    if one.document_tokens + one.question_tokens < 1 or one.answer_tokens < 1:
        raise InputError(f"{where}: a prompt and an answer have at least one token each")
    if type(one.arrival_s) not in (int, float) or not 0 <= one.arrival_s < float("inf"):
        raise InputError(f"{where}: arrival_s is {one.arrival_s!r}; give seconds from 0 up")
    if not (one.document is None or (type(one.document) is int and one.document >= 0)):
        raise InputError(f"{where}: document is {one.document!r}; give a number from 0 up, or null")
    return one
