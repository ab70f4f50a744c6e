"""The memory plan of a run, and what of its options makes no sense."""

import json
from collections.abc import Sequence

import jax

from models.checkpoints.open import Checkpoint
from models.errors import InputError
from wavejax.attention.dense import DenseAttention
from wavejax.config import WaveConfig
from wavejax.engine.generator import Generator
from wavejax.planning.memory import set_memory_limits
from wavejax.planning.plan import FetchChoice, Plan, StoreChoice, make_plan, pinned_need
from wavejax.planning.table import plan_json, plan_text


def check_placement(attention: str, store: StoreChoice, fetch: FetchChoice) -> None:
    """Raises InputError where --store and --fetch ask for what would not be done."""
    if attention == "full" and store == "host":
        raise InputError(
            "--store host is for wave attention, full attention keeps all on the device: leave it "
            "out, or give --attention wave"
        )
    if attention == "full" and fetch != "auto":
        raise InputError(
            "--fetch is for wave attention with rows on the host: leave it out, or give "
            "--attention wave"
        )
    if store == "device" and fetch != "auto":
        raise InputError("--fetch is for rows on the host: leave it out, or give --store host")


def check_context(only_plan: bool, context: int | None, prompts: Sequence[str]) -> None:
    """Raises InputError where --context and --batch make no sense."""
    if not only_plan:
        raise InputError("--context and --batch are for --plan; give a prompt to generate from")
    if context is None:
        raise InputError("--batch needs --context; a batch of prompts has its own size")
    if prompts:
        raise InputError("give --context or a prompt, not both: the prompt has a length")


def plan_run(
    checkpoint: Checkpoint,
    attention: WaveConfig | DenseAttention,
    lengths: Sequence[int],
    new_tokens: int,
    dtype: str,
    store: StoreChoice,
    fetch: FetchChoice,
) -> Plan:
    """Plans the run, and sets XLA's limits before anything starts JAX's device."""
    shape = checkpoint.config, attention, len(lengths), max(lengths), new_tokens
    # Where there is memory to pin, auto is bfloat16.
    set_memory_limits(pinned_need(*shape, "bfloat16" if dtype == "auto" else dtype, fetch))
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return make_plan(*shape, dtype, store=store, fetch=fetch)


def print_plan(plan: Plan, checkpoint: Checkpoint, as_json: bool) -> None:
    """Prints the plan; raises InputError if it does not fit."""
    name = str(checkpoint.path)
    print(json.dumps(plan_json(plan, name)) if as_json else plan_text(plan, checkpoint.path.name))
    plan.check()


def unstacks(generator: Generator, plan: Plan) -> bool:
    """Whether each layer gets arrays of its own: where that is faster, if there is room."""
    # While it is done there is one stack twice: with a short prompt, the most that the run takes.
    room = plan.free.device
    fits = room is None or plan.need.weights + plan.need.loading <= room
    return generator.unrolls and fits
