"""The tasks by name."""

from models.errors import InputError
from wavejax.evaluation.key_value import KeyValueRetrieval
from wavejax.evaluation.niah import NeedleTask
from wavejax.evaluation.samples import Task
from wavejax.evaluation.text_tasks import Prose
from wavejax.evaluation.variable_tracking import VariableTracking
from wavejax.evaluation.word_counting import CommonWords, FrequentWords

# RULER's, but for its two of question answering, whose data sets are not to be had by its rules.
RULER: dict[str, Task] = {
    "niah_single_1": NeedleTask("noise"),
    "niah_single_2": NeedleTask("prose"),
    "niah_single_3": NeedleTask("prose", value_kind="uuids"),
    "niah_multikey_1": NeedleTask("prose", keys=4),
    "niah_multikey_2": NeedleTask("needles"),
    "niah_multikey_3": NeedleTask("needles", key_kind="uuids", value_kind="uuids"),
    "niah_multivalue": NeedleTask("prose", values=4),
    "niah_multiquery": NeedleTask("prose", keys=4, queries=4),
    "vt": VariableTracking(),
    "cwe": CommonWords(),
    "fwe": FrequentWords(),
}
TASKS: dict[str, Task] = {
    **RULER,
    "key_value": KeyValueRetrieval(),
    "many_needles": NeedleTask("prose", values=16, new_tokens=256),
    "drift": Prose(new_tokens=2048, sampled=True),
    "perplexity": Prose(new_tokens=512, sampled=False),
}


def parse_tasks(text: str) -> dict[str, Task]:
    """Return the tasks of these names, separated by commas; `ruler` names all of RULER's.

    Raises:
        InputError: there is no task of a name.
    """
    found: dict[str, Task] = {}
    for name in filter(None, (part.strip() for part in text.split(","))):
        if name == "ruler":
            found |= RULER
        elif name in TASKS:
            found[name] = TASKS[name]
        else:
            raise InputError(f"no task {name!r}; there are: ruler, {', '.join(TASKS)}")
    if not found:
        raise InputError(f"no task in {text!r}; there are: ruler, {', '.join(TASKS)}")
    return found
