"""The memory plan of a run: when it is asked for, and how it is printed."""

import json
from collections.abc import Sequence

from models.checkpoints.open import Checkpoint
from models.errors import InputError
from wavejax.cli.progress import bytes_text
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
    print(json.dumps(plan_json(plan, name)) if as_json else plan_text(plan, checkpoint.path.name))
    plan.check()
