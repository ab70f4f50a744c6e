"""Options: in groups for --help, and made of the fields of a dataclass."""

import dataclasses
from collections.abc import Callable
from typing import Any

import click


class GroupedOption(click.Option):
    """An option that --help shows under a heading.

    Args:
        group: the heading.
    """

    def __init__(self, *arguments: Any, group: str = "Options", **settings: Any):
        super().__init__(*arguments, **settings)
        self.group = group


class GroupedCommand(click.Command):
    """A command whose --help shows its options by group, in the order in which groups appear."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write each group as a section of its own."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                groups.setdefault(getattr(parameter, "group", "Other"), []).append(record)
        for group, records in groups.items():
            with formatter.section(group):
                formatter.write_dl(records)


def option(group: str, *flags: str, **settings: Any) -> Callable[[Callable], Callable]:
    """`click.option`, shown in a group."""
    return click.option(*flags, cls=GroupedOption, group=group, **settings)


def options_from(
    settings: type, group: str = "Options", **groups: str
) -> Callable[[Callable], Callable]:
    """One option for each field of a dataclass: `row_size: int = 4` becomes `--row-size INTEGER`.

    A bool becomes a pair of flags, `--x/--no-x`. Every field needs a default, which also gives its
    type, and `metadata["help"]`.

    Args:
        settings: the dataclass.
        group: the options' heading in --help.
        groups: the headings of single fields, by their names, where they are others.
    """

    def decorate(function: Callable) -> Callable:
        for field in reversed(dataclasses.fields(settings)):
            flag = "--" + field.name.replace("_", "-")
            kind = type(field.default)
            function = option(
                groups.get(field.name, group),
                f"{flag}/--no-{flag[2:]}" if kind is bool else flag,
                type=kind,
                default=field.default,
                show_default=True,
                help=field.metadata["help"],
            )(function)
        return function

    return decorate


def fields_of(settings: type, options: dict[str, Any]) -> Any:
    """Return an instance of the dataclass from the options that `options_from` made.

    Raise InputError.
    """
    return settings(**{field.name: options[field.name] for field in dataclasses.fields(settings)})
