"""Several sources as one, each with its share of the rows that training sees; and a source less what is skipped."""

import re
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from unclip_jax.data.listing import digest_of
from unclip_jax.data.records import Broken, DataError, Record, Source, open_source
from unclip_jax.data.remote import whole

MOST_LIST = 2**32  # bytes of a list of keys


class Mixture:
    """Sources one after another. shares: of the rows that training sees, one per source, summing to one."""

    def __init__(self, name: str, parts: tuple[Source, ...], shares: tuple[float, ...]) -> None:
        self.name, self.parts, self.shares = name, parts, shares
        self.ends = np.cumsum([len(part) for part in parts])
        self.digest = digest_of("mix", shares, *(part.digest for part in parts))
        self.problems = tuple(problem for part in parts for problem in part.problems)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def _place(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"{index} of {len(self)} records")
        number = int(np.searchsorted(self.ends, index, side="right"))
        return number, index - (int(self.ends[number - 1]) if number else 0)

    def key(self, index: int) -> str:
        """The key of a record, after the number of its source."""
        number, place = self._place(index)
        return f"{number}:{self.parts[number].key(place)}"

    def __getitem__(self, index: int) -> Record:
        number, place = self._place(index)
        record = self.parts[number][place]
        return record._replace(key=f"{number}:{record.key}")


def open_mixture(spec: str, cache: Path | None = None) -> Mixture:
    """The mixture of a spec such as mix:0.7*folder:A,0.3*tar:B; DataError where its shares cannot be read."""
    shares, specs = [], []
    # A comma may be part of a path: only one that a share follows separates.
    for piece in re.split(r",(?=\s*[\d.]+(?:[eE][-+]?\d+)?\*)", spec.removeprefix("mix:")):
        share, star, inner = piece.strip().partition("*")
        try:
            shares.append(float(share))
        except ValueError:
            star = ""
        if not star or not 0 < shares[-1] < float("inf") or inner.startswith("mix:"):
            raise DataError(f"'{piece}' is no part of a mixture: write mix:0.7*folder:A,0.3*tar:B")
        specs.append(inner)
    parts = tuple(open_source(inner, cache=cache) for inner in specs)
    return Mixture(spec, parts, tuple(share / sum(shares) for share in shares))


class Subset:
    """A source without some of its records. skipped: their numbers, ascending."""

    def __init__(self, source: Source, skipped: np.ndarray) -> None:
        self.source, self.skipped = source, np.asarray(skipped, np.int64)
        self.name, self.problems = source.name, source.problems
        self.digest = digest_of("less", source.digest, self.skipped.tobytes().hex())
        # How many records before a skipped one are kept.
        self._before = self.skipped - np.arange(len(self.skipped))

    def __len__(self) -> int:
        return len(self.source) - len(self.skipped)

    def place(self, index: int) -> int:
        """The number in the whole source of record `index` of this one."""
        if not 0 <= index < len(self):
            raise IndexError(f"{index} of {len(self)} records")
        return index + int(np.searchsorted(self._before, index, side="right"))

    def key(self, index: int) -> str:
        """The key of a record."""
        return self.source.key(self.place(index))

    def __getitem__(self, index: int) -> Record:
        return self.source[self.place(index)]


def without(source: Source, path: str) -> tuple[Source, Bool[np.ndarray, " n"]]:
    """The source less the records that a list names, one key a line, and which of its records are kept.

    What follows a tab in a line is a reason; lines that start with # and a blank are notes. Raises DataError where
    there is no such list, or nothing remains.
    """
    try:
        lines = whole(path, MOST_LIST).decode("utf-8", "replace").split("\n")
    except Broken as error:
        raise DataError(str(error)) from None
    keys = {line.rstrip("\r").split("\t")[0] for line in lines if line.strip() and not line.startswith("# ")}
    kept = np.asarray([source.key(index) not in keys for index in range(len(source))])
    if kept.all():
        return source, kept
    if not kept.any():
        raise DataError(f"'{path}' skips all {len(source):,} records of '{source.name}'")
    if not isinstance(source, Mixture):
        return Subset(source, np.flatnonzero(~kept)), kept
    parts = zip(source.parts, np.split(kept, source.ends[:-1]), strict=True)
    less = tuple(Subset(part, np.flatnonzero(~own)) for part, own in parts)
    if empty := [part.name for part in less if not len(part)]:
        raise DataError(f"'{path}' skips all records of '{empty[0]}'")
    return Mixture(source.name, less, source.shares), kept
