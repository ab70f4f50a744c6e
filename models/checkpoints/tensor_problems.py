"""What is wrong with the tensors of a checkpoint, in one error."""

from models.errors import InputError
from models.parameters import Shape

_NAMED_PROBLEMS = 10


def report_problems(where: str, expected: dict[str, Shape], given: dict[str, Shape]) -> None:
    """Raise one InputError naming what is missing, extra or misshapen in `given`; or nothing."""
    problems = [f"missing {name} {expected[name]}" for name in expected if name not in given]
    problems += [f"extra {name} {given[name]}" for name in given if name not in expected]
    problems += [
        f"misshapen {name}: expected {shape}, given {given[name]}"
        for name, shape in expected.items()
        if name in given and given[name] != shape
    ]
    refuse_problems(where, problems)


def refuse_problems(where: str, problems: list[str]) -> None:
    """Raise one InputError that lists the problems; or nothing, if there are none."""
    if not problems:
        return
    more = len(problems) - _NAMED_PROBLEMS
    listed = "; ".join(problems[:_NAMED_PROBLEMS]) + (f"; and {more} more" if more > 0 else "")
    raise InputError(
        f"{where}: {len(problems)} of its tensors do not fit the model that its config describes: "
        f"{listed}"
    )
