"""The one error that stands for wrong input, as opposed to a fault of the program."""


class InputError(ValueError):
    """What the user gave cannot be used.

    The message is one clear line: what was given, what was expected, and what to do. Commands print
    it after ``error: `` and exit with status 2; no traceback is shown.
    """
