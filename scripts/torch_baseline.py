"""Transformers' Llama over PyTorch's scaled_dot_product_attention: a decode benchmark's outsider.

A process of its own times it, since JAX sets most of a GPU's memory aside as it starts. It runs
before JAX's device starts. The process needs `torch`, `transformers` and a CUDA GPU, nothing else.

    python scripts/torch_baseline.py < request.json

`request_of` returns a request. Each case gives a line of JSON. The model has random weights, and
its cache random keys and values. A step feeds one token a sequence and takes the best next one.
Three ways are timed, and the fastest is the case's figure:

- `dynamic`: transformers' own default. It copies all keys and values at each step to add a token.
- `reserved`: room for all tokens at first, and a view of the used part. Nothing is copied or
  masked. Transformers has no such cache.
- `reserved-flash`: the same, and PyTorch may take its flash kernels alone. Others that it prefers
  on some GPUs may prepare anew for each length.

Steps run eagerly, as `generate` runs them by default: no `torch.compile`, no CUDA graphs.
"""

import contextlib
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

WARM_UPS = 2
# Of the memory that is free beside the weights, what caches may take.
USABLE = 0.95
SPARE = 2 * 2**30
# That a case may take, the first with the imports and the model's weights.
CASE_SECONDS = 300.0
# How errors begin of a baseline that cannot run at all.
MISSING = "missing"
WAYS = ("dynamic", "reserved", "reserved-flash")
# Fields of a model's config that transformers' Llama has no counterpart of.
UNLIKE_LLAMA = ("qkv_bias", "qk_norm", "sliding_window", "rope_scaling", "rope_layers")

Case = tuple[int, int | str]


def request_of(
    model: dict[str, Any], dtype: str, steps: int, calls: int, cases: Sequence[Case]
) -> dict[str, Any]:
    """Describe what to time.

    Args:
        model: a `ModelConfig` as JSON.
        dtype: of weights, keys and values, by PyTorch's name.
        steps: decode steps in a call.
        calls: how many are timed.
        cases: tokens of a sequence, and sequences: a number, or "max".
    """
    return {"model": model, "dtype": dtype, "steps": steps, "calls": calls, "cases": list(cases)}


def time_transformers(
    request: dict[str, Any], python: str = sys.executable, limit: float = CASE_SECONDS
) -> Iterator[dict[str, Any]]:
    """Run a request in a process of its own.

    Args:
        request: of `request_of`.
        python: that has torch.
        limit: seconds that a case may take. The process is ended past them.

    Yields:
        each case's figures, or its `error`, as soon as the process says them.
    """
    left = len(request["cases"])
    with tempfile.TemporaryFile("w+") as asked, tempfile.TemporaryFile("w+") as told:
        asked.write(json.dumps(request))
        asked.seek(0)
        process = subprocess.Popen(
            [python, str(Path(__file__).resolve())],
            stdin=asked,
            stdout=subprocess.PIPE,
            stderr=told,
            text=True,
        )
        lines: SimpleQueue[str | None] = SimpleQueue()
        threading.Thread(target=_read, args=(process, lines), daemon=True).start()
        try:
            how, end = "", time.monotonic() + limit
            while left and not how:
                try:
                    line = lines.get(timeout=max(0.0, end - time.monotonic()))
                except Empty:
                    how = f"the process gave no figures for {limit:g} s"
                    break
                if line is None:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(timeout=10)
                    how = f"the process ended with status {process.returncode}"
                elif line.startswith("{"):
                    yield json.loads(line)
                    left, end = left - 1, time.monotonic() + limit
        finally:
            process.kill()
            process.wait()
        told.seek(0)
        said = (told.read().strip().splitlines() or ["it said nothing"])[-1]
    yield from [{"error": f"{how}: {said}"[:1000]}] * left


def _read(process: subprocess.Popen[str], lines: "SimpleQueue[str | None]") -> None:
    """Pass on what a process says, and None as it ends: a pipe alone knows no time limit."""
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            lines.put(line)
    lines.put(None)


def figures(request: dict[str, Any], device: str = "cuda") -> Iterator[dict[str, Any]]:
    """Time each case of a request on this process's device.

    Args:
        request: of `request_of`.
        device: PyTorch's name of it.

    Yields:
        for each case `batch` and its figures, or `error`.
    """
    cases = request["cases"]
    if missing := _missing(request["model"], device):
        yield from ({"error": missing} for _ in cases)
        return
    import torch
    import transformers
    from torch_llama import random_llama

    facts = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
    }
    dtype = getattr(torch, request["dtype"])
    model = random_llama(request["model"], dtype, device)
    for context, asked in cases:
        batch = 0 if asked == "max" else int(asked)
        try:
            room = context + request["steps"] * (WARM_UPS + request["calls"])
            batch = batch or _largest(model, room)
            if not batch:
                raise MemoryError("not even one sequence fits")
            found = _time_case(model, request, context, batch, room)
            yield {"batch": batch, "outsider": facts} | found
        except Exception as error:  # The other cases are still worth timing.
            yield {"batch": batch, "error": f"{type(error).__name__}: {error}"[:1000]}


def _missing(model: dict[str, Any], device: str) -> str | None:
    """Say what keeps the baseline from running; None if nothing does."""
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        return f"{MISSING}: this baseline needs torch and transformers ({error})"
    if device == "cuda" and not torch.cuda.is_available():
        return f"{MISSING}: torch sees no CUDA GPU"
    if unlike := [name for name in UNLIKE_LLAMA if model.get(name)]:
        return f"{MISSING}: transformers' Llama has no {', '.join(unlike)}"
    return None


def _largest(model: Any, room: int) -> int:
    """Return the most sequences that fit beside the weights."""
    import torch
    from torch_llama import bytes_of_token

    torch.cuda.empty_cache()
    free = USABLE * torch.cuda.mem_get_info()[0] - SPARE
    # A layer of the dynamic cache is held twice while it grows.
    layers = model.config.num_hidden_layers
    return max(0, int(free // (bytes_of_token(model) * room * (layers + 1) / layers)))


def _time_case(
    model: Any, request: dict[str, Any], context: int, batch: int, room: int
) -> dict[str, Any]:
    import torch
    from torch_llama import bytes_of_token, decode, fill_cache

    steps, calls = request["steps"], request["calls"]
    vocab = model.config.vocab_size
    tokens = torch.arange(batch, device=model.device)[:, None] * vocab // batch
    by_way: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    for way in WAYS:
        kind, _, flash = way.partition("-")
        try:
            cache = fill_cache(kind, model, context, batch, room)

            def run(cache: Any = cache, flash: bool = bool(flash)) -> float:
                call = functools.partial(decode, model, cache, tokens, steps, flash=flash)
                return _seconds(call, model.device)

            for _ in range(WARM_UPS):
                run()
            by_way[way] = [run() for _ in range(calls)]
        except Exception as error:  # The other ways are still worth timing.
            failed[way] = f"{type(error).__name__}: {error}"[:300]
        cache = run = None  # type: ignore[assignment]
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
    if not by_way:
        raise RuntimeError(f"every way failed: {failed}")
    best = min(by_way, key=lambda way: statistics.median(by_way[way]))
    step = statistics.median(by_way[best]) / steps
    weights = sum(x.nbytes for x in model.parameters())
    if not model.config.tie_word_embeddings:
        weights -= model.get_input_embeddings().weight.nbytes
    # Of the steps' middle.
    tokens_held = context + steps * (WARM_UPS + calls / 2)
    attention = batch * tokens_held * bytes_of_token(model)
    moved = {"weights": float(weights), "attention": float(attention)}
    return {
        "ms_per_step": 1e3 * step,
        "least_ms": 1e3 * min(by_way[best]) / steps,
        "most_ms": 1e3 * max(by_way[best]) / steps,
        "tokens_per_s": batch / step,
        "way": best,
        "failed_ways": failed,
        "ms_by_way": {k: 1e3 * statistics.median(x) / steps for k, x in by_way.items()},
        "bytes_per_step": moved | {"missed": 0.0, "host": 0.0, "device": sum(moved.values())},
    }


def _seconds(call: Callable[[], Any], device: Any) -> float:
    import torch

    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def main() -> None:
    """Answer the request on the standard input, a line a case."""
    for found in figures(json.load(sys.stdin)):
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
