"""What goes wrong while a run is under way: one clear line, a status, and the next run is fine."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

from models.checkpoints.open import Checkpoint, open_checkpoint, write_orbax
from models.text.tokenizer import load_tokenizer
from tests.wavejax.cli.conftest import SMALL_ZONES, Result
from wavejax import convert
from wavejax.planning.free_memory import FreeMemory
from wavejax.store import rows

Generate = Callable[..., Result]
PROMPT = ("--raw", "--prompt", "The quick brown fox jumps over the lazy dog; " * 6, *SMALL_ZONES)


def one_line(result: Result, *said: str) -> None:
    assert result.status == 2
    assert result.out == ""
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    for words in said:
        assert words in result.err


def live_bytes() -> int:
    return sum(array.nbytes for array in jax.live_arrays())


@pytest.fixture
def next_run_is_fine(generate: Generate, tiny: Path) -> Callable[[], None]:
    """Runs now and, when called, again: the same text, and no more memory held than before."""
    arguments = ("--model", tiny, *PROMPT, "--max-new-tokens", 4)
    before = generate(*arguments)
    assert before.status == 0
    held = live_bytes()

    def check() -> None:
        assert live_bytes() <= held
        again = generate(*arguments)
        assert (again.status, again.out) == (0, before.out)

    return check


@pytest.fixture
def plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planner sees no end of memory: what it would refuse goes past it."""
    from wavejax.planning import plan

    monkeypatch.setattr(plan, "free_memory", lambda: FreeMemory(None, 2**80))


def test_memory_refused_past_the_planner(
    generate: Generate, tiny: Path, plenty: None, next_run_is_fine: Callable[[], None]
) -> None:
    """Absurdly much really asked for: XLA's own allocator refuses."""
    arguments = ("--max-new-tokens", 2 * 10**9, "--max-context", 3 * 10**9)
    result = generate("--model", tiny, *PROMPT, *arguments)
    one_line(result, "out of device memory (Out of memory allocating ", "--plan")
    next_run_is_fine()


PINNED = jax.errors.JaxRuntimeError(
    "RESOURCE_EXHAUSTED: Out of host memory while trying to allocate 99 bytes with allocator "
    "xla_gpu_host_bfc on device 0."
)
PAGEABLE = MemoryError("Unable to allocate 9.00 TiB for an array")


@pytest.mark.parametrize(
    "where, name, error, said",
    [
        # As XLA refuses on a GPU, where its limit of pinned memory is reached.
        (rows.jax, "device_put", PINNED, ("out of pinned host memory", "99 bytes")),
        (rows.np, "zeros", PAGEABLE, ("out of host memory", "9.00 TiB")),
    ],
    ids=["pinned", "pageable"],
)
def test_host_memory_refused(
    generate: Generate,
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    next_run_is_fine: Callable[[], None],
    where: object,
    name: str,
    error: Exception,
    said: tuple[str, str],
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise type(error)(*error.args)  # a new one: an error keeps the frames it went through

    with monkeypatch.context() as patch:
        load = Checkpoint.load_params

        def load_and_fill(self: Checkpoint, *arguments: object) -> object:
            params = load(self, *arguments)
            patch.setattr(where, name, refuse)  # once the weights have been read
            return params

        patch.setattr(Checkpoint, "load_params", load_and_fill)
        result = generate("--model", tiny, *PROMPT, "--store", "host", "--max-new-tokens", 9)
    one_line(result, *said, "--plan")
    next_run_is_fine()


def interrupted(tiny: Path, tmp_path: Path, wait_for: bytes, stream: str) -> tuple[int, str, float]:
    """Starts a long generation and interrupts it once `wait_for` is printed on `stream`.

    Returns its status, what it said on stderr, and how long it took to end.
    """
    file = tmp_path / "prompt.txt"
    file.write_text("The quick brown fox jumps over the lazy dog; " * 40)
    command = [
        sys.executable, "-m", "wavejax.generate", "--model", tiny, "--raw", "--prompt-file", file,
        "--max-context", "1000000", "--max-new-tokens", "100000", "--progress",
        *SMALL_ZONES,
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    said = {"stdout": b"", "stderr": b""}
    seen = threading.Event()

    def read(name: str) -> None:
        pipe = getattr(process, name)
        while piece := os.read(pipe.fileno(), 4096):
            said[name] += piece
            if name == stream and wait_for in said[name]:
                seen.set()
        seen.set()

    readers = [threading.Thread(target=read, args=(name,)) for name in said]
    for reader in readers:
        reader.start()
    assert seen.wait(300), said
    assert process.poll() is None, said
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    status = process.wait(60)
    took = time.monotonic() - started
    for reader in readers:
        reader.join()
    return status, said["stderr"].decode(), took


@pytest.mark.parametrize(
    "wait_for, stream",
    [(b"reading the prompt", "stderr"), (b"", "stdout")],
    ids=["prefill", "decode"],
)
def test_interrupt(
    generate: Generate, tiny: Path, tmp_path: Path, wait_for: bytes, stream: str
) -> None:
    status, err, took = interrupted(tiny, tmp_path, wait_for, stream)
    assert status == 130
    assert "Traceback" not in err
    # After the bars, which end without a line of their own.
    assert err.replace("\r", "\n").rstrip("\n").splitlines()[-1] == "interrupted"
    assert took < 30
    assert generate("--model", tiny, *PROMPT, "--max-new-tokens", 2).status == 0


def gguf_of(tiny: Path, tmp_path: Path) -> Path:
    from models.checkpoints.open import find_default_model

    path = tmp_path / "model.gguf"
    shutil.copyfile(find_default_model(), path)
    return path


def folder_of(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def orbax_of(tiny: Path, tmp_path: Path) -> Path:
    path = tmp_path / "converted"
    write_orbax(open_checkpoint(tiny), path, "float32", add_files=load_tokenizer(tiny).save)
    return path


@pytest.mark.parametrize(
    "make", [pytest.param(gguf_of, marks=pytest.mark.slow), orbax_of, folder_of]
)
def test_a_model_that_vanishes_before_it_is_read(
    generate: Generate, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable
) -> None:
    model = make(tiny, tmp_path)
    load = Checkpoint.load_params

    def vanish_and_load(self: Checkpoint, *arguments: object) -> object:
        shutil.rmtree(model) if model.is_dir() else model.unlink()
        return load(self, *arguments)

    monkeypatch.setattr(Checkpoint, "load_params", vanish_and_load)
    result = generate("--model", model, "--prompt", "x", "--max-new-tokens", 1)
    if make is folder_of:
        # Its files are open already, and stay until they are closed.
        assert result.status == 0
    else:
        one_line(result, str(model))

    # And in a conversion: nothing half-written.
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "cwd")
    for left in tmp_path.iterdir():
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    model = make(tiny, tmp_path)
    monkeypatch.setattr(Checkpoint, "load_params", vanish_and_load)
    status = convert.main([str(model), str(tmp_path / "new" / "model")])
    assert status == (0 if make is folder_of else 2)
    assert ((tmp_path / "new" / "model").exists()) == (status == 0)
    written = {path.name for path in tmp_path.rglob("*") if "unfinished" in path.name}
    assert written == set()


def test_interrupt_while_the_weights_are_read(
    generate: Generate,
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    next_run_is_fine: Callable[[], None],
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "load_params", interrupt)
        result = generate("--model", tiny, *PROMPT, "--max-new-tokens", 9)
    assert (result.status, result.out) == (130, "")
    assert result.err.split() == ["interrupted"]
    next_run_is_fine()
