"""What a file holds as levels of its own, and which of a model's matrices can stay so."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from models.checkpoints.levels import Arrays
from models.formats import WeightFormat, common_format
from models.parameters import Path


@dataclass(frozen=True)
class PackedTensors:
    """Tensors that a file holds as levels of its own.

    Attributes:
      formats: by the tensor's name, a format that holds it exactly; others are floats.
      read: gives a tensor in a format: its own, or one that it has in common with others.
      said: what the levels are, for people, where only the config tells the file from one of
        floats; else None.
      others: tensors that are levels too, and that no format holds.
    """

    formats: Mapping[str, WeightFormat]
    read: Callable[[str, WeightFormat], Arrays]
    said: str | None = None
    others: frozenset[str] = field(default=frozenset())

    def formats_of(
        self, names: Mapping[Path, Iterable[str]], columns: Mapping[Path, int]
    ) -> dict[Path, WeightFormat]:
        """Give the formats of the matrices, or stacks of them, that can stay levels.

        Args:
          names: of the tensors of each.
          columns: of each.
        """
        found = {}
        for path, tensors in names.items():
            own = [self.formats.get(name) for name in tensors]
            known = [one for one in own if one is not None]
            if len(known) == len(own) and _may_be_one(known, columns[path]):
                found[path] = common_format(known)
        return found

    def note(
        self, weight_dtype: str, names: Mapping[Path, Iterable[str]], kept: Iterable[Path]
    ) -> str:
        """Say what comes of the levels, in one line.

        Args:
          weight_dtype: how matrices are loaded.
          names: as of `formats_of`.
          kept: the matrices that can stay levels.
        """
        held = {*self.formats, *self.others}
        lost = [
            path for path, own in names.items() if held.intersection(own) and path not in {*kept}
        ]
        what = f"weights: {self.said}, "
        if weight_dtype == "model":
            more = "; `weight_dtype='packed'` keeps its levels" if [*kept] else ""
            return f"{what}dequantised to floats{more}"
        if weight_dtype != "packed":
            return f"{what}dequantised, then rounded to {weight_dtype}"
        if not lost:
            return f"{what}kept as the folder has them"
        if not [*kept]:
            return f"{what}dequantised to floats: no product takes them as they are"
        floats = ", ".join(path[-1] for path in lost)
        return f"{what}kept as the folder has them, but for {floats}: no product takes these"


def _may_be_one(formats: list[WeightFormat], columns: int) -> bool:
    """Whether matrices of these formats may be one stack: alike, or all of whole groups."""
    whole = all(one.group is not None and columns % one.group == 0 for one in formats)
    return whole or len({*formats}) == 1
