"""The table of the batch engine and of kept documents, made of a run record."""

from markdown_tables import Runs, dated, table, times
from run_records import RunRecord

ENGINE = "2026-12-01-appended-h200"
SECOND = "2026-12-01-second-question-h200"  # a later run, of what was made faster after that one


def serving(runs: Runs) -> str:
    """Return what the engine takes, beside what it replaces."""
    run, later = runs[ENGINE], runs[SECOND]
    rows = [
        *(_document(later, *each) for each in (("smollm2", "32,000"), ("qwen-0.5b", "32,000"))),
        _document(run, "llama-3-8b", "122,880"),
        _restart(run),
    ]
    wanted, found = run["stall/max_stall_ms"], run["stall/longest_gap_ms"]
    line = "longest gap in an answer while 61,440 tokens are read"
    rows.append([line, f"{wanted:.0f} ms allowed", f"{found:.0f} ms", f"{found / wanted:.2f}x"])
    alone, engine = run["busy/decode_n"], run["busy/engine"]
    rates = [f"{each:.0f} tokens/s" for each in (alone, engine)]
    rows.append(["8 slots busy at 30,720 tokens", *rates, times(engine, alone)])
    slow, fast = (later[f"unequal/{name}_s"] for name in ("static", "engine"))
    line = "64 answers of 32 to 1024 tokens, 8 at a time"
    rows.append([line, f"{slow:.1f} s in batches", f"{fast:.1f} s", times(slow, fast)])
    head = ["", "without the engine", "with it", "ratio"]
    return table(head, rows) + dated(runs, SECOND, ENGINE)


def _document(run: RunRecord, model: str, tokens: str) -> list[str]:
    read, again = run[f"{model}/read_ms"], run[f"{model}/in_slot_ms"]
    line = f"first token of a second question to {tokens} tokens, `{model}`"
    return [line, f"{read:.0f} ms", f"{again:.1f} ms", times(read, again)]


def _restart(run: RunRecord) -> list[str]:
    read, loaded = run["llama-3-8b/read_ms"] / 1000, run["llama-3-8b/loaded_s"]
    line = "the same after a restart, from the kept document"
    return [line, f"{read:.1f} s", f"{loaded:.2f} s", times(read, loaded)]
