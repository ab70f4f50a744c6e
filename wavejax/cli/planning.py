"""The memory plan of a run: when it is asked for, and how it is printed."""

import dataclasses
import json
from collections.abc import Sequence

from models.checkpoints.open import Checkpoint
from models.errors import InputError
from wavejax.cli.flags import in_flags
from wavejax.cli.progress import bytes_text
from wavejax.cli.streams import say
from wavejax.planning.plan import Plan
from wavejax.planning.table import plan_json, plan_text


def check_context(only_plan: bool, context: int | None, prompts: Sequence[str]) -> None:
    """Raise InputError where --context and --batch make no sense."""
    if not only_plan:
        raise InputError("--context and --batch are for --plan; give a prompt to generate from")
    if context is None:
        raise InputError("--batch needs --context; a batch of prompts has its own size")
    if prompts:
        raise InputError("give --context or a prompt, not both: the prompt has a length")


def weights_text(plan: Plan) -> str | None:
    """Say what the weights take, where not all of them are of the run's dtype."""
    if not plan.formats:
        return None
    return f"weights: {bytes_text(plan.need.weights)}, {plan.weight_bits:.1f} bits a number"


def print_plan(plan: Plan, checkpoint: Checkpoint, as_json: bool) -> None:
    """Print the plan; raise InputError if it does not fit."""
    name = str(checkpoint.path)
    shown = dataclasses.replace(plan, notes=tuple(map(in_flags, plan.notes)))
    print(json.dumps(plan_json(shown, name)) if as_json else plan_text(shown, checkpoint.path.name))
    plan.check()


def say_notes(checkpoint: Checkpoint, weight_dtype: str) -> None:
    """Say on stderr what comes of a quantised folder's weights."""
    for note in checkpoint.notes(weight_dtype):
        say(f"note: {in_flags(note)}")
