"""Runs text in Triton's intermediate language with NumPy: one program after the other, on a CPU.

An oracle of what `own_triton` writes. It knows the language, and nothing of who wrote the text. It
refuses to load or store where no element is, and to run assembly.
"""

import functools
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.support.ttir_operations import Pointer, operation

Scope = dict[str, Any]
Step = Callable[[Scope], Any]

NAME = r"%[\w#]+"
HEAD = re.compile(r"(?:(%\w+)(?::(\d+))? = )?(.*)$")
BLOCK = re.compile(r"\^bb0\((.*)\):$")


def evaluate(text: str, grid: tuple[int, int, int], arrays: Sequence[np.ndarray]) -> None:
    """Runs a module's only function in place.

    Args:
        text: the module.
        grid: programs along the three axes.
        arrays: C-contiguous, one for each of the function's parameters.
    """
    lines = [line.strip() for line in text.splitlines()]
    start = next(i for i, line in enumerate(lines) if line.startswith("tt.func"))
    names = re.findall(r"(%\w+): !tt.ptr<", lines[start])
    body, _ = _block(lines, start + 1)
    # Integers in the text have no sign, and a bool takes a byte.
    flat = [x.reshape(-1) for x in arrays]
    flat = [x.view(f"i{x.itemsize}") if x.dtype.kind in "bu" else x for x in flat]
    assert all(np.shares_memory(x, y) for x, y in zip(arrays, flat, strict=True) if x.size)
    pointers = [Pointer(x, np.int64(0)) for x in flat]
    for program in itertools.product(*map(range, grid)):
        scope: Scope = dict(zip(names, pointers, strict=True)) | {"program": program}
        with np.errstate(all="ignore"):
            _run(body, scope)


def _run(steps: Sequence[Step], scope: Scope) -> Any:
    """What the block's last line hands out."""
    given = None
    for step in steps:
        given = step(scope)
    return given


def _block(lines: Sequence[str], at: int) -> tuple[list[Step], int]:
    """The steps from a line on to the one that closes the block, and that one's number."""
    steps = []
    while not lines[at].startswith("}"):
        step, at = _step(lines, at)
        steps.append(step)
    return steps, at


def _step(lines: Sequence[str], at: int) -> tuple[Step, int]:
    match = HEAD.match(lines[at])
    assert match is not None
    result, count, rest = match.groups()
    for start, region in REGIONS.items():
        if rest.startswith(start):
            compute, at = region(rest, lines, at)
            return functools.partial(_keep, result, count, compute), at + 1
    word = rest.split()[0].split("(")[0]
    if word in ("scf.yield", "tt.reduce.return", "tt.scan.return", "tt.return", "scf.condition"):
        values = re.findall(NAME, rest.split(" : ")[0])
        return lambda scope: [scope[name] for name in values], at + 1
    return functools.partial(_keep, result, None, operation(word, rest)), at + 1


def _keep(result: str | None, count: str | None, compute: Step, scope: Scope) -> None:
    found = compute(scope)
    if result is not None and count is None:
        scope[result] = found
    elif result is not None:
        scope.update({f"{result}#{i}": x for i, x in enumerate(found)})
        assert len(found) == int(count or 0)


def _inner(scope: Scope, names: Sequence[str], values: Sequence[Any]) -> Scope:
    return scope | dict(zip(names, values, strict=True))


def _if(rest: str, lines: Sequence[str], at: int) -> tuple[Step, int]:
    [which, *_] = re.findall(NAME, rest)
    yes, at = _block(lines, at + 1)
    assert lines[at] == "} else {"
    no, at = _block(lines, at + 1)

    def compute(scope: Scope) -> Any:
        return _run(yes if scope[which] else no, dict(scope)) or []

    return compute, at


def _started(rest: str) -> tuple[list[str], list[str]]:
    """The names that a loop carries, and those that they start as."""
    pairs = re.findall(rf"({NAME}) = ({NAME})", rest)
    return [name for name, _ in pairs], [value for _, value in pairs]


def _for(rest: str, lines: Sequence[str], at: int) -> tuple[Step, int]:
    match = re.match(rf"scf.for ({NAME}) = ({NAME}) to ({NAME}) step ({NAME})(.*)", rest)
    assert match is not None
    number, *bounds, tail = match.groups()
    names, values = _started(tail)
    body, at = _block(lines, at + 1)

    def compute(scope: Scope) -> Any:
        carry = [scope[value] for value in values]
        for i in range(*(int(scope[bound]) for bound in bounds)):
            carry = _run(body, _inner(scope, [number, *names], [np.int32(i), *carry])) or []
        return carry

    return compute, at


def _while(rest: str, lines: Sequence[str], at: int) -> tuple[Step, int]:
    names, values = _started(rest)
    test, at = _block(lines, at + 1)
    assert lines[at] == "} do {"
    match = BLOCK.match(lines[at + 1])
    inside = re.findall(r"(%\w+):", match[1]) if match else []
    body, at = _block(lines, at + 1 + bool(match))

    def compute(scope: Scope) -> Any:
        carry = [scope[value] for value in values]
        while True:
            goes_on, *carry = _run(test, _inner(scope, names, carry))
            if not goes_on:
                return carry
            carry = _run(body, _inner(scope, inside, carry)) or []

    return compute, at


def _joined(rest: str, lines: Sequence[str], at: int) -> tuple[str, int, Any, int]:
    """Of a reduction or a scan: its operand, its axis, how it joins two tensors, its last line."""
    match = re.match(rf'"tt.\w+"\(({NAME})\) <{{axis = (\d+)', rest)
    block = BLOCK.match(lines[at + 1])
    assert match is not None
    assert block is not None
    names = re.findall(r"(%\w+):", block[1])
    body, at = _block(lines, at + 2)

    def join(x: Any, y: Any) -> Any:
        [found] = _run(body, dict(zip(names, (x, y), strict=True)))
        return found

    return match[1], int(match[2]), join, at


def _reduce(rest: str, lines: Sequence[str], at: int) -> tuple[Step, int]:
    name, axis, join, at = _joined(rest, lines, at)

    def compute(scope: Scope) -> Any:
        x = np.moveaxis(scope[name], axis, 0)
        while len(x) > 1:
            x = join(x[: len(x) // 2], x[len(x) // 2 :])
        return x[0]

    return compute, at


def _scan(rest: str, lines: Sequence[str], at: int) -> tuple[Step, int]:
    name, axis, join, at = _joined(rest, lines, at)
    assert "reverse = false" in rest

    def compute(scope: Scope) -> Any:
        x, step = np.moveaxis(scope[name], axis, 0), 1
        while step < len(x):
            x = np.concatenate([x[:step], join(x[:-step], x[step:])])
            step *= 2
        return np.moveaxis(x, 0, axis)

    return compute, at


REGIONS = {
    "scf.if ": _if,
    "scf.for ": _for,
    "scf.while ": _while,
    '"tt.reduce"': _reduce,
    '"tt.scan"': _scan,
}
