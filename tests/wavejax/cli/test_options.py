"""Options made of a dataclass, and the groups that --help shows."""

import dataclasses

import click
import pytest

from wavejax.cli.generate_command import command as generate_command
from wavejax.cli.guard import main_guard
from wavejax.cli.options import GroupedCommand, fields_of, option, options_from
from wavejax.cli.progress import bytes_text


@dataclasses.dataclass(frozen=True)
class Settings:
    row_size: int = dataclasses.field(default=4, metadata={"help": "rows"})
    share: float = dataclasses.field(default=0.5, metadata={"help": "share"})
    exact: bool = dataclasses.field(default=True, metadata={"help": "exact"})


def test_options_from_a_dataclass(capsys: pytest.CaptureFixture[str]) -> None:
    @click.command()
    @options_from(Settings)
    def command(**options: object) -> None:
        print(fields_of(Settings, options))

    main = main_guard(command)
    assert main([]) == 0
    assert capsys.readouterr().out == f"{Settings()}\n"
    assert main(["--row-size", "8", "--share", "1", "--no-exact"]) == 0
    assert capsys.readouterr().out == f"{Settings(8, 1.0, False)}\n"


def test_options_are_shown_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    @click.command(cls=GroupedCommand)
    @option("Fruit", "--apple", help="red")
    @option("Trees", "--oak", help="old")
    @option("Fruit", "--pear", help="green")
    @options_from(Settings, "Rows", share="Fruit")
    def command(**_: object) -> None:
        pass

    assert main_guard(command)(["--help"]) == 0
    sections: dict[str, list[str]] = {}
    for line in capsys.readouterr().out.splitlines():
        if line.endswith(":") and not line.startswith(" "):
            sections[line[:-1]] = []
        elif line.startswith("  --"):
            sections[list(sections)[-1]].append(line.split()[0])
    assert sections["Fruit"] == ["--apple", "--pear", "--share"]
    assert sections["Trees"] == ["--oak"]
    assert sections["Rows"] == ["--row-size", "--exact"]


def test_every_option_of_generate_is_in_a_group() -> None:
    groups = {getattr(parameter, "group", None) for parameter in generate_command.params}
    names = {str(group).partition(":")[0] for group in groups}
    assert names == {"Input", "Sampling", "Output", "Memory", "Research"}


@pytest.mark.parametrize(
    "count, text",
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1234567, "1.2 MB"), (99_960_000, "100 MB"),
     (999_600_000, "1.0 GB"), (10**13, "10.0 TB"), (10**16, "10000 TB")],
)  # fmt: skip
def test_bytes_for_reading(count: int, text: str) -> None:
    assert bytes_text(count) == text
