"""Levels: which fields a batch's sampling has, of a few sets, so that few programs serve all."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from wavejax.engine import penalties
from wavejax.engine.sampling import Sampler, SamplingSettings, settings_of
from wavejax.engine.state import DecodeState, commit

NARROW = 64  # Ranks of a program for samplers that need few: sorting a vocabulary takes long.


@dataclasses.dataclass(frozen=True)
class Level:
    """Fields of a batch's sampling settings; each level is a program of its own.

    Attributes:
        draws: whether any sequence draws at random.
        ranks: how many tokens are ranked at most: 0, `NARROW` or the vocabulary.
        penalises: whether any sequence has a penalty.
    """

    draws: bool = False
    ranks: int = 0
    penalises: bool = False

    def settings(self, samplers: Sequence[Sampler], vocab: int) -> SamplingSettings:
        """Make the settings of a batch: a sampler for each slot, none above this level."""
        also = [Sampler(1.0)] if self.draws else []
        if self.ranks:
            also.append(Sampler(1.0, top_k=self.ranks))
        if self.penalises:
            also.append(Sampler(presence_penalty=1.0))
        return commit(settings_of(samplers, vocab, also))

    def changes(
        self, state: DecodeState, samplers: Sequence[Sampler], vocab: int
    ) -> dict[str, Any]:
        """Make the fields of a batch's state that differ with its samplers, a slot's each."""
        changes: dict[str, Any] = {"sampling": self.settings(samplers, vocab)}
        if self.penalises != (state.counts is not None):
            counts = penalties.no_counts(len(samplers), vocab) if self.penalises else None
            changes["counts"] = commit(counts)
        return changes


def level_of(samplers: Sequence[Sampler], vocab: int) -> Level:
    """Return the lowest level that has the fields for all samplers."""
    widths = [one.width(vocab) for one in samplers if one.ranks_tokens]
    ranks = 0
    if widths:
        ranks = vocab if max(widths) > min(NARROW, vocab) else min(NARROW, vocab)
    return Level(
        draws=any(not one.greedy for one in samplers),
        ranks=ranks,
        penalises=any(one.penalises for one in samplers),
    )


def all_levels(vocab: int) -> list[Level]:
    """List every level that there can be, the lowest first."""
    widths = [0, *sorted({min(NARROW, vocab), vocab})]
    drawing = [Level(True, ranks) for ranks in widths]
    levels = [Level(), *drawing]
    return levels + [dataclasses.replace(one, penalises=True) for one in levels]
