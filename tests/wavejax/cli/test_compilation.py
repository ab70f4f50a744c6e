"""Compiled programs are kept for later processes; compilation that takes long is said."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest

from tests.wavejax.cli.conftest import SMALL_ZONES, Result
from wavejax.cli import compilation
from wavejax.cli.compilation import compilation_notices, cpu_kind, keep_compiled_programs


def kept() -> str | None:
    """Where JAX keeps compiled programs."""
    return jax.config.values["jax_compilation_cache_dir"]


@pytest.fixture
def kept_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's cache folder, on a machine with a GPU, of someone who set nothing."""
    names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache")
    before = {name: jax.config.values[name] for name in names}
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", True)
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)


def test_compiled_programs_are_kept_in_the_users_cache(kept_in: Path) -> None:
    keep_compiled_programs()
    assert kept() == str(kept_in / "wavejax" / "compiled")
    assert (kept_in / "wavejax" / "compiled").is_dir()


def test_compiled_programs_are_kept_at_home(
    kept_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    keep_compiled_programs()
    assert kept() == str(tmp_path / ".cache" / "wavejax" / "compiled")


def test_where_the_user_keeps_programs_is_left_alone(kept_in: Path, tmp_path: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    keep_compiled_programs()
    assert kept() == str(tmp_path / "own")


def test_programs_for_a_cpu_are_kept_by_its_kind(
    kept_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    keep_compiled_programs()
    assert kept() == str(kept_in / "wavejax" / "compiled" / f"cpu-{cpu_kind()}")


def test_kinds_of_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """What programs are compiled for counts, and nothing that changes from day to day."""

    def kind(text: str) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_text", lambda *_, **__: text)
            return cpu_kind()

    cpu = "processor\t: 0\nmodel name\t: A\nflags\t: fma avx2\ncpu MHz\t: 2000\n"
    assert kind(cpu) == kind(cpu.replace("2000", "3000"))
    second = cpu.replace(": 0", ": 1")
    assert kind(cpu) == kind(f"{cpu}\n{second}")
    assert kind(cpu) != kind(cpu.replace("avx2", "avx2 avx512f"))
    assert kind(cpu) != kind(cpu.replace(": A", ": B"))


def test_no_program_is_kept_where_none_can_be_or_should(kept_in: Path) -> None:
    jax.config.update("jax_enable_compilation_cache", False)
    keep_compiled_programs()
    assert kept() is None
    assert not (kept_in / "wavejax").exists()
    jax.config.update("jax_enable_compilation_cache", True)
    (kept_in / "wavejax").write_text("a file in the way")
    keep_compiled_programs()
    assert kept() is None


@pytest.mark.slow(40)
@pytest.mark.parametrize("store", ["device", "host"])
def test_kept_programs_give_the_same_answer(tiny: Path, tmp_path: Path, store: str) -> None:
    """On a CPU: read back by another process, they still write into the buffers given to them."""
    prompt = "The quick brown fox jumps over the lazy dog; " * 6
    command = [sys.executable, "-m", "wavejax.generate", "--model", str(tiny), "--raw", "--json"]
    command += ["--prompt", prompt, "--max-new-tokens", "40", "--store", store, *SMALL_ZONES]
    environment = os.environ | {
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "XDG_CACHE_HOME": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
    }
    answers, files = [], []
    for _ in range(2):
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert [line for line in run.stderr.splitlines() if "compiling what" not in line][1:] == []
        answers.append(json.loads(run.stdout)["answers"])
        files.append(sorted(path.name for path in tmp_path.rglob("*-cache")))
    assert answers[0] == answers[1]
    assert any("decode_n" in name for name in files[0])
    assert files[0] == files[1]  # nothing was compiled anew


def compile_for(seconds: float) -> None:
    """As JAX records a program: traced in no time, and then compiled."""
    trace, build = compilation._STEPS[0], compilation._STEPS[-1]
    jax.monitoring.record_scalar(trace, time.time())
    jax.monitoring.record_event_duration_secs(trace, 0.0)
    jax.monitoring.record_scalar(build, time.time())
    time.sleep(seconds)
    jax.monitoring.record_event_duration_secs(build, seconds)


def test_compilation_that_takes_long_is_said_once_a_phase(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compilation, "PATIENCE", 0.4)
    with compilation_notices("reads") as notices:
        compile_for(0.3)
        time.sleep(0.3)  # what is not compilation does not count
        assert capsys.readouterr().err == ""
        compile_for(0.3)
        assert capsys.readouterr().err == "compiling what reads ...\n"
        compile_for(0.6)
        assert capsys.readouterr().err == ""
        notices.enter("generates")
        compile_for(0.3)
        assert capsys.readouterr().err == ""
        compile_for(0.6)
        assert capsys.readouterr().err == "compiling what generates ...\n"
    compile_for(0.6)
    assert capsys.readouterr().err == ""
    assert not [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]


def test_the_notice_comes_while_it_is_compiled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compilation, "PATIENCE", 0.2)
    step = compilation._STEPS[-1]
    with compilation_notices("reads"):
        jax.monitoring.record_scalar(step, time.time())
        time.sleep(0.5)
        assert capsys.readouterr().err == "compiling what reads ...\n"
        jax.monitoring.record_event_duration_secs(step, 0.5)


def test_a_run_says_that_it_compiles(
    generate: Callable[..., Result], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As JAX itself records it, with no patience at all, and no terminal."""
    monkeypatch.setattr(compilation, "PATIENCE", 0.0)
    jax.clear_caches()
    arguments = ("--model", tiny, "--raw", "--prompt", "x", "--max-new-tokens", 2)
    first = generate(*arguments, "--attention", "full")
    assert first.status == 0
    lines = first.err.splitlines()
    assert lines[:2] == ["compiling what reads the prompt ...", "compiling what generates ..."]
    assert len(lines) == 3
