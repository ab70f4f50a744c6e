"""The memory plan for reading: what `--plan` prints."""

import dataclasses
import io

from rich.console import Console
from rich.table import Table

from wavejax.attention.protocol import AnyAttention
from wavejax.planning.plan import Plan, gib, shortage

_WIDTH = 100  # columns


def plan_text(plan: Plan, model: str) -> str:
    """Return a table of what the run takes and what there is, and what was chosen and why."""
    need, free = plan.need, plan.free
    unified = free.device is None
    table = Table()
    table.add_column("")
    table.add_column(f"{free.name} memory" if unified else free.name, justify="right")
    if not unified:
        table.add_column("host memory", justify="right")

    def add(name: str, device: int | None, host: int | None = None) -> None:
        # A memory that is both shows what either would hold.
        cells = [device, host] if not unified else [device if host is None else host]
        table.add_row(name, *("" if cell is None else gib(cell) for cell in cells))

    in_bits = f"weights, {plan.weight_bits:.1f} bits a number" if plan.formats else "weights"
    add(in_bits, need.weights)
    scaled = plan.attention.row_dtype == "int8"
    if not plan.attention.has_index:
        add("keys and values", need.rows)
        if scaled:
            add("scales", need.steady)
    else:
        add("wave index", need.index)
        if need.slots:
            slots = "1 slot" if need.slots == 1 else f"{need.slots:,} slots"
            add(f"row cache, {slots} a head", need.cache)
        add("steady zone, scales" if scaled else "steady zone", need.steady)
        on_device = need.rows_on == "device"
        add("row store", *((need.rows,) if on_device else (None, need.rows)))
    add("workspace", need.workspace)
    if not unified:
        add("reading the weights (for a while)", None, need.loading)
    table.add_section()
    if unified:
        add("needed", need.device + need.host)
        add("free", free.host)
    else:
        add("needed", need.device, max(need.host, need.loading))
        add("free", free.device, free.host)

    buffer = io.StringIO()
    Console(file=buffer, width=_WIDTH, highlight=False).print(table)
    return f"Memory for {model}: {_run(plan)}\n{buffer.getvalue()}" + "\n".join(_notes(plan))


def _run(plan: Plan) -> str:
    sequences = "1 prompt" if plan.batch == 1 else f"{plan.batch} prompts"
    tokens = f"{plan.prompt_tokens:,} + {plan.new_tokens:,} tokens"
    return f"{sequences}, {tokens}, {plan.dtype}"


def _notes(plan: Plan) -> list[str]:
    """Return what was chosen and why, and how far the same run could go."""
    notes = list(plan.notes)
    name = attention_name(plan.attention)
    if plan.chosen is not None:
        notes.append(f"attention: {name}; {plan.chosen}")
    if not plan.attention.has_index:
        notes.append(f"{'store' if plan.chosen else f'attention: {name}'}; {plan.reason}")
    else:
        notes.append(f"store: {plan.need.rows_on}; {plan.reason}")
        if plan.shrunk is not None:
            share = plan.attention.cache_fraction
            notes.append(f"row cache: {share:.2%} of the tokens, not {plan.shrunk:.2%}: see above")
    if plan.need.staged:
        notes.append("fetch: staged; the rows' memory is not pinned")
    if plan.need.pinned and plan.free.device is not None:
        notes.append(f"XLA may pin {gib(plan.free.pinned)} of the host's memory")
    known = plan.model.max_context
    if plan.longest:
        text = f"longest prompt that would fit: {plan.longest:,} tokens"
        notes.append(f"{text}; the model's context is {known:,}")
    short = shortage(plan.need, plan.free)
    if short is None:
        notes.append("it fits")
    else:
        notes.append(f"it does not fit: {gib(short[1])} of {short[0]} needed, {gib(short[2])} free")
    return notes


def attention_name(attention: AnyAttention) -> str:
    """Name an attention as `--attention` does; one of another kind by its class."""
    name = type(attention).__name__
    return {"DenseAttention": "full", "WaveAttention": "wave"}.get(name, name)


def plan_json(plan: Plan, model: str) -> dict[str, object]:
    """Return what `--plan --json` prints: all of it, in bytes and tokens."""
    return {
        "model": model,
        "prompts": plan.batch,
        "prompt_tokens": plan.prompt_tokens,
        "new_tokens": plan.new_tokens,
        "dtype": plan.dtype,
        "weight_bits": plan.weight_bits,
        "notes": plan.notes,
        "attention": attention_name(plan.attention),
        "attention_reason": plan.chosen,
        "store": plan.need.rows_on,
        "reason": plan.reason,
        "cache_fraction": plan.attention.cache_fraction if plan.attention.has_index else None,
        "need": dataclasses.asdict(plan.need)
        | {"device": plan.need.device, "host": plan.need.host, "pinned": plan.need.pinned},
        "free": dataclasses.asdict(plan.free),
        "longest_prompt_tokens": plan.longest,
        "fits": shortage(plan.need, plan.free) is None,
    }
