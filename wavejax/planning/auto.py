"""Which attention is faster: the choice that `attention="auto"` leaves to the plan."""

import dataclasses
from typing import Literal

from wavejax.attention.dense import DenseAttention
from wavejax.config import WaveConfig


@dataclasses.dataclass(frozen=True)
class AutoAttention:
    """Wave or full attention, as a plan finds it faster for its run.

    Attributes:
        config: the settings of wave attention, where it is taken; `row_dtype` is of either.
    """

    config: WaveConfig = dataclasses.field(default_factory=WaveConfig)

    @property
    def full(self) -> DenseAttention:
        """Full attention, where that is taken: its rows are of the same dtype."""
        return DenseAttention(row_dtype=self.config.row_dtype)


@dataclasses.dataclass(frozen=True)
class Crossover:
    """How many tokens wave attention must have to be faster than full attention.

    Attributes:
        tokens: so many.
        of_batch: whether all sequences' count together, or each one's by itself.
    """

    tokens: int
    of_batch: bool


# Measured, by the beginning of the device's kind. On GPUs one batch's rows are read side by side,
# and a step of wave attention takes as long for one sequence as for a few (docs/performance.md). On
# a CPU each sequence takes its own time (docs/lab/2026-11-29-auto.md).
CROSSOVERS = {"NVIDIA": Crossover(45_000, of_batch=True), "cpu": Crossover(60_000, of_batch=False)}


def faster(
    config: WaveConfig, batch: int, tokens: int, device: str
) -> tuple[Literal["wave", "full"], str]:
    """Say which attention should decode faster, and why.

    Args:
        config: the settings of wave attention.
        batch: sequences.
        tokens: of the longest one, prompt and answer.
        device: the kind of JAX's device, as it names it.
    """
    if config.reads_all(tokens):
        return "full", f"by these settings wave attention would read all of {tokens:,} tokens too"
    kind = next((kind for kind in CROSSOVERS if device.startswith(kind)), None)
    if kind is None:
        return "wave", f"no times of full attention are known for {device!r}"
    crossover = CROSSOVERS[kind]
    count = tokens * batch if crossover.of_batch else tokens
    what = "in a batch" if crossover.of_batch else "a sequence"
    measured = f"{crossover.tokens:,} tokens {what}, measured on {_NAMES[kind]}"
    if config.row_dtype != "model":
        measured += " with rows in the model's dtype"
    if count < crossover.tokens:
        return "full", f"{count:,} tokens: it is faster below some {measured}"
    return "wave", f"{count:,} tokens: it is faster from some {measured}"


_NAMES = {"NVIDIA": "an H100 and an H200", "cpu": "a CPU"}
