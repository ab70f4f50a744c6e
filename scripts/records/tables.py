"""The tables of README and docs that hold figures, made of run records."""

from collections.abc import Callable

from markdown_tables import Runs, dated, interval, plain, table, times
from run_records import RunRecord
from serving_tables import serving

OPS = {"H200": "2026-11-27-ops-h200", "H100": "2026-11-27-ops-h100"}
STEPS = {"H200": "2026-11-29-steps-h200", "H100": "2026-11-27-steps-h100"}
INT8 = "2026-11-29-int8-rows-h200"
MISSED = "2026-11-27-missed-rows-h200"
RULER, ONE_BUDGET, FWE = "2026-11-26-ruler", "2026-11-26-one-budget", "2026-11-29-fwe-1.5b"
BUDGET, ADMISSION = "2026-11-25-budget", "2026-11-26-admission"
WEIGHTS = "2026-11-30-weights-cpu"
JOINED, MILLION = "2026-11-30-joined-steps-h200", "2026-11-30-million-h200"
TWO_ROWS = "2026-12-01-two-rows-h200"  # after that one, and not of `int4`
ROUNDED = "2026-11-30-full-int8-cpu"
SHAPES = ("batch8-128k", "batch1-128k", "batch1-1m")
# What records of before 2026-11-29 call them.
_LETTERS = {"batch8-128k": "A", "batch1-128k": "A1", "batch1-1m": "1M"}
PLACES = {"full": "full attention", "device": "wave, device", "host": "wave, host"}


def speed(runs: Runs) -> str:
    """README's table: times of one step by workload and method, on an H200."""
    ops, steps, joined, int8 = (runs[name] for name in (OPS["H200"], STEPS["H200"], JOINED, INT8))
    two_rows = runs[TWO_ROWS]
    rows = []
    for run, tokens, words in (
        (steps, "122880", "122,880 tokens, the largest batches"),
        (int8, "122880", "the same, wave attention's rows in int8"),
        (steps, "30720", "30,720 tokens, the largest batches"),
    ):
        full, wave = (run[f"{tokens}/largest/{name}"] for name in ("full", "device"))
        line = f"{words} ({full['batch']} and {wave['batch']})"
        rate = [f"{each['tokens_per_s']} tokens/s" for each in (full, wave)]
        rows.append([line, *rate, times(wave["tokens_per_s"], full["tokens_per_s"])])
    for run, path, method, words in (
        (two_rows, "bfloat16", "wave", "batch 1, 122,880 tokens"),
        (two_rows, "int8", "wave", "the same, weights of both in int8"),
        (joined, "int4", "wave", "the same, weights of both in int4"),
        (steps, "122880/batch_1", "host", "batch 1, 122,880 tokens, rows in host memory"),
        (steps, "30720/batch_1", "device", "batch 1, 30,720 tokens"),
    ):
        full, wave = (run[f"{path}/{name}/ms"] for name in ("full", method))
        rows.append([words, f"{full:.2f} ms", f"{wave:.2f} ms", times(full, wave)])
    million = runs[MILLION]["wave/ms"]
    rows.append(["batch 1, 1,048,576 tokens, rows in int8", "not measured", f"{million} ms", ""])
    full, wave = (at_shape(ops, "batch8-128k")[op] for op in ("full_attention", "step"))
    line = "attention of one layer alone, batch 8, 131,072 tokens"
    rows.append([line, f"{full} us", f"{wave} us", times(full, wave)])
    head = ["a decode step", "full attention", "wave attention", "times as fast"]
    return table(head, rows) + dated(
        runs, STEPS["H200"], INT8, TWO_ROWS, JOINED, MILLION, OPS["H200"]
    )


def accuracy(runs: Runs) -> str:
    """README's table: RULER's scores by workload and method."""
    model, budget, fwe = runs[RULER]["Qwen2.5-Coder-0.5B"], runs[ONE_BUDGET], runs[FWE]
    rows = []
    for tokens, words in (("32768", "32,768 tokens"), ("8192", "8,192 tokens")):
        at = model[tokens]
        line = f"0.5B model, {words}, by default"
        rows.append([line, f"{at['full']}", f"{at['wave']} ({interval(at)})", "", "", ""])
    names = ("full", "wave", "paper", "quest", "streaming_llm")
    scores = [str(budget[f"{name}/score"]) for name in names]
    rows.append(["0.5B model, 8,192 tokens, 1.8 % retrieved by each", *scores])
    line, wave = "1.5B model, 32,768 tokens, by default, `fwe` alone", fwe["wave"]
    rows.append(
        [line, str(fwe["full/score"]), f"{wave['score']} ({interval(wave, 1)})", "", "", ""]
    )
    head = ["RULER, score of 100", "full attention", "wave attention"]
    head += ["RetroInfer's settings", "Quest", "StreamingLLM"]
    return table(head, rows) + dated(runs, RULER, ONE_BUDGET, FWE)


def at_shape(run: RunRecord, shape: str) -> dict[str, float]:
    """Return a record's figures at a shape, by op.

    The record may call the shape by a letter.
    """
    return run.figures[shape if shape in run.figures else _LETTERS[shape]]


def ops(runs: Runs) -> str:
    """Return times of each op, us."""
    head = ["us"] + [f"{device}: {shape}" for device in OPS for shape in SHAPES]
    rows = []
    for op in at_shape(runs[OPS["H200"]], "batch8-128k"):
        name = {"step": "all, in one program", "full_attention": "full attention"}.get(
            op, f"`{op}`"
        )
        rows.append(
            [name]
            + [str(at_shape(runs[run], shape)[op]) for run in OPS.values() for shape in SHAPES]
        )
    cells = []
    for run in OPS.values():
        for shape in SHAPES:
            at = at_shape(runs[run], shape)
            cells.append(times(at["full_attention"], at["step"]))
    return table(head, [*rows, ["times as fast", *cells]]) + dated(runs, *OPS.values())


def steps(name: str) -> Callable[[Runs], str]:
    """Return the table of a record's whole steps, by context."""

    def make(runs: Runs) -> str:
        head = ["tokens", "method", "batch 1: ms a step", "times as fast"]
        head += ["largest batch", "tokens/s", "times as fast"]
        rows = []
        for tokens, at in runs[name].figures.items():
            alone, largest = at.get("batch_1", {}), at["largest"]
            for place, words in PLACES.items():
                if place not in largest:
                    continue
                row = [f"{int(tokens):,}" if place == "full" else "", words]
                ms = [alone[each]["ms"] for each in ("full", place)] if alone else []
                row += [f"{ms[1]:.2f}", times(*ms)] if ms else ["-", "-"]
                batch, rate = largest[place]["batch"], largest[place]["tokens_per_s"]
                slower = largest["full"]["tokens_per_s"]
                rows.append([*row, str(batch), str(rate), times(rate, slower)])
        return table(head, rows) + dated(runs, name)

    return make


def missed(runs: Runs) -> str:
    """Return times of `attend_zones` by the share of rows that it reads from host memory."""
    run = runs[MISSED]
    rows = [
        [f"{share} %", str(at["us"]), str(at.get("gb_per_s", "-"))]
        for share, at in run.figures.items()
    ]
    return table(["rows missed", "us", "GB/s from host memory"], rows) + dated(runs, MISSED)


def ruler(runs: Runs) -> str:
    """RULER by model and length, by default."""
    head = ["model, tokens", "full attention", "wave", "difference", "worst task"]
    head += ["KL, nats", "strings kept"]
    rows = []
    for model, lengths in runs[RULER].figures.items():
        for tokens, at in lengths.items():
            row = [f"{model}, {int(tokens):,}", str(at["full"]), str(at["wave"]), interval(at)]
            kl, kept = f"{at['kl_nats']:g}", f"{at['kept_percent']} %"
            rows.append([*row, str(at["worst_task"]), plain(kl), kept])
    return table(head, rows) + dated(runs, RULER)


def one_budget(runs: Runs) -> str:
    """Eight methods at one budget."""
    names = {
        "full": "full attention",
        "oracle": "oracle: the best tokens by true mass, no estimate",
        "wave": "wave attention",
        "wave_no_estimation": "wave without the estimate",
        "wave_no_codes": "wave without codes",
        "paper": "RetroInfer's settings",
        "quest": "Quest",
        "streaming_llm": "StreamingLLM",
    }
    run = runs[ONE_BUDGET]
    rows = [
        [
            words,
            *(
                plain(str(run[f"{name}/{figure}"]))
                for figure in ("score", "kl_nats", "kept_percent")
            ),
        ]
        for name, words in names.items()
    ]
    return table(["method", "score", "KL, nats", "strings kept, %"], rows) + dated(runs, ONE_BUDGET)


def fwe(runs: Runs) -> str:
    """Return the table of counting words with a 1.5B model."""
    names = {
        "full": "full attention",
        "wave": "wave, by default",
        "wave_8192": "wave, 8192 retrieved",
        "oracle": "oracle, 4096 retrieved, no estimate",
    }
    run = runs[FWE]
    rows = []
    for name, words in names.items():
        at = run[name]
        rows.append([words, str(at["score"]), interval(at, 1) if "interval" in at else ""])
    return table(["`fwe`, 1.5B model", "score", "to full attention"], rows) + dated(runs, FWE)


def budget(runs: Runs) -> str:
    """Return the error by tokens retrieved."""
    rows = [
        [f"{int(tokens):,}", *(plain(str(value)) for value in at.values())]
        for tokens, at in runs[BUDGET].figures.items()
    ]
    head = ["tokens retrieved", "KL, nats", "KL of `fwe`, nats", "`fwe`: strings kept, %"]
    return table(head, rows) + dated(runs, BUDGET)


def rounded(runs: Runs) -> str:
    """Return the error of full attention with keys and values in int8, by task."""
    rows = [
        [f"`{task}`", plain(str(at["kl_nats"])), str(at["same_percent"]), str(at["kept_percent"])]
        for task, at in runs[ROUNDED].figures.items()
    ]
    head = ["task", "KL, nats", "same token, %", "strings kept, %"]
    return table(head, rows) + dated(runs, ROUNDED)


def admission(runs: Runs) -> str:
    """Return the error, and the rows missed, by admission ratio."""
    rows = [
        [f"`{ratio}`", str(at["kl_nats"]), str(at["missed"])]
        for ratio, at in runs[ADMISSION].figures.items()
    ]
    head = ["`--admission-ratio`", "KL, nats", "rows missed a step and head"]
    return table(head, rows) + dated(runs, ADMISSION)


def by_weights(runs: Runs) -> str:
    """Return times of a step at batch 1, by the weights of both sides."""
    rows = []
    for run, name in ((TWO_ROWS, "bfloat16"), (TWO_ROWS, "int8"), (JOINED, "int4")):
        words = name if name == "bfloat16" else f"`{name}`"
        full, wave = (runs[run][f"{name}/{method}/ms"] for method in ("full", "wave"))
        rows.append([words, f"{full:.2f}", f"{wave:.2f}", times(full, wave)])
    head = ["weights", "full attention, ms", "wave, ms", "times as fast"]
    return table(head, rows) + dated(runs, TWO_ROWS, JOINED)


def weights(runs: Runs) -> str:
    """Return the error by how weights are kept."""
    names = {
        "model": "`model`: the file's numbers in float32",
        "packed": "`packed`: the file's own levels",
        "int8": "`int8`",
        "int4": "`int4`",
        "int4_groups_of_64": "`int4` if groups had 64 numbers",
        "int4_embedding_too": "`int4` if the embedding were in 4 bits too",
    }
    figures = ("bits", "kl_nats", "perplexity", "same_percent", "ms_per_step")
    rows = [
        [words, *(plain(str(runs[WEIGHTS][f"{name}/{figure}"])) for figure in figures)]
        for name, words in names.items()
    ]
    head = ["`--weight-dtype`", "bits a number", "KL, nats", "perplexity", "same token, %"]
    return table([*head, "ms a step, this CPU"], rows) + dated(runs, WEIGHTS)


TABLES: dict[str, Callable[[Runs], str]] = {
    "speed": speed,
    "accuracy": accuracy,
    "ops": ops,
    "steps on an H200": steps(STEPS["H200"]),
    "steps on an H100": steps(STEPS["H100"]),
    "steps, rows in int8": steps(INT8),
    "steps by weights": by_weights,
    "missed rows": missed,
    "ruler": ruler,
    "one budget": one_budget,
    "fwe": fwe,
    "budget": budget,
    "full attention in int8": rounded,
    "admission": admission,
    "weights": weights,
    "serving": serving,
}
