"""The library names parameters, the commands flags: where the one becomes the other."""

import ast
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from models.errors import InputError
from wavejax.cli.flags import in_flags
from wavejax.cli.generate_command import command
from wavejax.cli.guard import main_guard

ROOT = Path(__file__).parents[3]
LIBRARY = [
    file
    for folder in ("models", "pallas_kernels", "wavejax")
    for file in sorted((ROOT / folder).rglob("*.py"))
    if "cli" not in file.parts
]


@pytest.mark.parametrize(
    "message, expected",
    [
        ("give `max_context=600`", "give --max-context 600"),
        ("or `store='host'`, or `dtype='bfloat16'`", "or --store host, or --dtype bfloat16"),
        ("as it is (`raw=True`)", "as it is (--raw)"),
        ("give `plots=False`", "give --no-plots"),
        ("name a model by `path`", "name a model by --model"),
        ("`fetch` is for rows, `start` is a method", "--fetch is for rows, `start` is a method"),
    ],
)
def test_parameters_become_flags(message: str, expected: str) -> None:
    assert in_flags(message) == expected


def test_every_command_names_flags(capsys: pytest.CaptureFixture[str]) -> None:
    @click.command()
    def failing() -> None:
        raise InputError("lower `max_new_tokens`")

    assert main_guard(failing)([]) == 2
    assert capsys.readouterr().err == "error: lower --max-new-tokens\n"


def texts(file: Path) -> Iterator[str]:
    """The file's strings that are no docstrings."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    alone = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
            yield node.value


def test_the_library_names_no_flags() -> None:
    flags = {flag for option in command.params for flag in (*option.opts, *option.secondary_opts)}
    flags = {flag for flag in flags if flag.startswith("--")} | {"--out", "--haystack"}
    assert "--store" in flags
    found = [
        f"{file.relative_to(ROOT)}: {text}"
        for file in LIBRARY
        for text in texts(file)
        if flags & {word.strip("(),.:;'") for word in text.split()}
    ]
    assert not found
