"""Compilation: its programs are kept for later processes, and it is said where it takes long."""

import contextlib
import hashlib
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
from tqdm import tqdm

PATIENCE = 2.0  # Seconds of compilation that nobody has to be told of.
# JAX records each of these as a number when it begins, and as a duration when it ends.
_STEPS = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)
_CPU_FACTS = ("model name", "flags", "CPU implementer", "CPU part", "Features")


def keep_compiled_programs() -> None:
    """Has JAX keep what it compiles, for later processes to read.

    In the user's cache folder, `wavejax/compiled`; where JAX's own JAX_COMPILATION_CACHE_DIR says
    another, there; nowhere where JAX_ENABLE_COMPILATION_CACHE is false. What is compiled for a CPU
    is for one kind of CPU alone: each has a folder of its own, for homes that machines share.
    Comes before anything is compiled; starts JAX's device.
    """
    settings = jax.config.values
    set_already = settings["jax_compilation_cache_dir"] is not None
    if set_already or not settings["jax_enable_compilation_cache"]:
        return
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = caches / "wavejax" / "compiled"
        if jax.default_backend() == "cpu":
            folder /= f"cpu-{cpu_kind()}"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # a read-only folder, or a user without one
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))


def cpu_kind() -> str:
    """Return a short name of this machine's kind of CPU: equal where the same programs run."""
    facts = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        first = first.strip().partition("\n\n")[0]
        facts += [line for line in first.splitlines() if line.startswith(_CPU_FACTS)]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]


class CompilationNotices:
    """Says on stderr that a phase of the run compiles, once it has taken more than PATIENCE.

    For a person who waits, and for a log: where there is no terminal too, once a phase.
    """

    def __init__(self, phase: str):
        self._lock = threading.Lock()
        self._enter(phase)

    def enter(self, phase: str) -> None:
        """Begins another phase, with time of its own."""
        with self._lock:
            self._stop()
            self._enter(phase)

    def _enter(self, phase: str) -> None:
        self._phase, self._said = phase, False
        self._spent = 0.0  # seconds of compilation in this phase
        self._depth = 0  # steps under way: tracing may compile, and trace
        self._timer: threading.Timer | None = None

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _say(self) -> None:
        with self._lock:
            if self._said or not self._depth:
                return
            self._said = True
            # Above a bar, where there is one.
            tqdm.write(f"compiling what {self._phase} ...", file=sys.stderr)

    def _on_begin(self, event: str, value: float | int, **_: str | int) -> None:
        if event not in _STEPS:
            return
        with self._lock:
            self._depth += 1
            if self._depth > 1 or self._said:
                return
            self._began = time.monotonic()
            self._timer = threading.Timer(max(0.0, PATIENCE - self._spent), self._say)
            self._timer.daemon = True
            self._timer.start()

    def _on_end(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event not in _STEPS:
            return
        with self._lock:
            if self._depth == 0:
                return  # begun in the phase before
            self._depth -= 1
            if self._depth == 0 and not self._said:
                self._spent += time.monotonic() - self._began
                self._stop()


@contextlib.contextmanager
def compilation_notices(phase: str) -> Iterator[CompilationNotices]:
    """Has long compilation said while the block runs, as "compiling what PHASE ..."."""
    notices = CompilationNotices(phase)
    jax.monitoring.register_scalar_listener(notices._on_begin)
    jax.monitoring.register_event_duration_secs_listener(notices._on_end)
    try:
        yield notices
    finally:
        notices._stop()
        jax.monitoring.unregister_scalar_listener(notices._on_begin)
        jax.monitoring.unregister_event_duration_listener(notices._on_end)
