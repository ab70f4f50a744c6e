"""Pace: how long the parts of the work take, by measured time."""

from collections.abc import Hashable

from models.config import ModelConfig

WEIGHT = 0.3  # Of the newest measurement in the mean.
WHOLE_UNKNOWN = 1024  # Tokens up to which a layer is tried whole before anything was measured.


class Pace:
    """Mean seconds of units of work, by key.

    The first run of a program may compile: it stands only until the second one was measured.
    """

    def __init__(self) -> None:
        self._first: dict[Hashable, float] = {}
        self._seconds: dict[Hashable, float] = {}

    def note(self, key: Hashable, units: int, seconds: float) -> None:
        """Take in that `units` of a key's work took so long."""
        program, each = _program(key), seconds / units
        if program not in self._first:
            self._first[program] = each
            return
        old = self._seconds.get(key, each)
        # A slower unit counts at once, or a stream would wait for it again.
        self._seconds[key] = max(each, old + WEIGHT * (each - old))

    def seconds(self, key: Hashable) -> float | None:
        """Return the seconds of one unit; None before its first run.

        Of a section of attention: by the section before it, whose queries see fewer keys.
        """
        own = self._seconds.get(key)
        if own is None and isinstance(key, tuple) and key[0] == "attend" and key[2] > 0:
            before = self.seconds((*key[:2], key[2] - 1))
            return before and before * (key[2] + 1) / key[2]
        return self._first.get(_program(key)) if own is None else own

    def has_run(self, key: Hashable) -> bool:
        """Whether a key's program has run, and so has been compiled."""
        return _program(key) in self._first

    def measured(self, kind: str) -> dict[int, float]:
        """Return, by number, the seconds of all keys (kind, number) that were measured."""
        return {
            key[1]: each
            for key, each in self._seconds.items()
            if isinstance(key, tuple) and key[0] == kind
        }

    def units(self, key: Hashable, seconds: float, most: int) -> int:
        """Count the units that fit the time: at most `most`; 0 where not one fits.

        One, where nothing is known.
        """
        each = self.seconds(key)
        if each is None:
            return min(1, most)
        return max(0, min(most, int(seconds / max(each, 1e-9))))


def _program(key: Hashable) -> Hashable:
    """Return what is compiled for a key: sections of attention share a program."""
    return key[:2] if isinstance(key, tuple) and key[0] == "attend" else key


def layer_work(config: ModelConfig, tokens: int) -> float:
    """Count the multiplications of one layer over a prompt, for comparing lengths."""
    query = config.num_heads * config.head_dim
    weights = config.hidden_size * (
        2 * query + 2 * config.num_kv_heads * config.head_dim + 3 * config.intermediate_size
    )
    return float(tokens) * weights + float(tokens) * tokens * query


def seconds_of_layer(pace: Pace, config: ModelConfig, tokens: int) -> float | None:
    """Return the seconds of a prompt's layer, read whole; None where no layer was measured.

    Of a length that was not, by the one nearest in work: a short prompt's layer has a share that
    does not grow.
    """
    known = pace.measured("layer")
    if tokens in known or not known:
        return known.get(tokens)
    work = {of: layer_work(config, of) for of in (*known, tokens)}
    near = min(known, key=lambda of: abs(work[of] - work[tokens]))
    return known[near] * max(1.0, work[tokens] / work[near])


def reads_whole(pace: Pace, config: ModelConfig, tokens: int, seconds: float) -> bool:
    """Whether a prompt's layers are read whole, and not in parts.

    They are if one takes no longer than it may. Where one way alone has run, and so is compiled,
    that one is taken, whole layers up to twice the time: to compile takes seconds, for which all
    answers would wait.

    Args:
        pace: with what was measured, by ("layer", padded tokens), or by a part's kind.
        config: the model's.
        tokens: the prompt's, padded.
        seconds: that a layer may take.
    """
    whole, parts = pace.has_run(("layer", tokens)), pace.has_run(("write", tokens))
    if parts and not whole:
        return False
    expected = seconds_of_layer(pace, config, tokens)
    if expected is None:
        return whole or tokens <= WHOLE_UNKNOWN
    return expected <= (2 * seconds if whole and not parts else seconds)
