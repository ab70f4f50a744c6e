"""Shows a docstring's "Example:" as code on the site.

Griffe knows "Examples:" as a section of code. It takes "Example:" for prose, in which
`[True, True]` would be a link to nowhere.
"""

import re
from typing import Any

import griffe

HEADING = re.compile(r"^Example:$", re.MULTILINE)


class ExampleSections(griffe.Extension):
    """Reads "Example:" as "Examples:"."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Read an object that is collected."""
        if obj.docstring is not None:
            obj.docstring.value = HEADING.sub("Examples:", obj.docstring.value)
