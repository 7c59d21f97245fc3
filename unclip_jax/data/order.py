"""Which record every row of training shows: a map from (seed, row) that needs no table and no state.

Row r of a run is row r % batch of its step r // batch, whatever reads it. A source's records come in epochs, each a
pseudo-random permutation of them all. Weights bend the permutation: record i comes floor or ceil of n * w_i times an
epoch. A mixture deals out rows in blocks of BLOCK, in which every source has its exact share.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from unclip_jax.data.records import DataError

BLOCK = 10_000  # rows; the smallest share of a mixture is one of them
ROUNDS = 4
MASK = 2**64 - 1
GOLDEN, ODD = 0x9E3779B97F4A7C15, 0xD1342543DE82EF95


def scramble(*numbers: int) -> int:
    """64 bits that look random, of any integers."""
    state = 0
    for number in numbers:
        state = _mixed((state ^ number & MASK) + GOLDEN)
    return state


def _mixed(x: int) -> int:
    """The finaliser of SplitMix64 (Steele et al., Fast Splittable Pseudorandom Number Generators, 2014)."""
    x &= MASK
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def permuted(place: int, size: int, key: int) -> int:
    """The image of a place in 0 .. size - 1 under the permutation of a key.

    A Feistel network on a grid of a x b >= size places; what falls outside is sent through it again (Black and
    Rogaway, Ciphers with Arbitrary Finite Domains, 2002).
    """
    if size < 2:
        return 0
    a = int(np.sqrt(size - 1)) + 1
    b = -(-size // a)
    while True:
        left, right = divmod(place, b)
        for number in range(0, 2 * ROUNDS, 2):
            left = (left + _mixed(key + number * GOLDEN + right * ODD)) % a
            right = (right + _mixed(key + (number + 1) * GOLDEN + left * ODD)) % b
        place = left * b + right
        if place < size:
            return place


class Part(NamedTuple):
    """One source of a mixture: its first record, its number of records, and its rows of a block."""

    first: int
    size: int
    start: int
    rows: int


@dataclass(frozen=True)
class Order:
    """The record of every row.

    parts: of the mixture, or one. cumulative: per part the running sums of its records' weights, ending at 1, or None.
    """

    seed: int
    parts: tuple[Part, ...]
    cumulative: tuple[np.ndarray | None, ...]

    def __call__(self, row: int, attempt: int = 0) -> int:
        """The record of a row; attempts 1, 2, ... name the ones that replace it where it is broken."""
        number, place = 0, row
        if len(self.parts) > 1:
            block, within = divmod(row, BLOCK)
            dealt = permuted(within, BLOCK, scramble(self.seed, 1, block))
            number = next(n for n, part in enumerate(self.parts) if dealt < part.start + part.rows)
            place = block * self.parts[number].rows + dealt - self.parts[number].start
        part, cumulative = self.parts[number], self.cumulative[number]
        epoch, place = divmod(place, part.size)
        key = scramble(self.seed, 2, number, attempt, epoch)
        found = permuted(place, part.size, key)
        if cumulative is not None:
            # Systematic sampling: one offset for the whole epoch keeps the counts exact.
            offset = (scramble(key, 3) >> 12) / 2**52
            found = int(np.searchsorted(cumulative, (found + offset) / part.size, side="right"))
            found = min(found, int(np.searchsorted(cumulative, cumulative[-1])))
        return part.first + found


def make_order(
    seed: int,
    sizes: tuple[int, ...],
    shares: tuple[float, ...] = (1.0,),
    weights: Float[np.ndarray, " n"] | None = None,
) -> Order:
    """The order of sources of these sizes, each with its share of the rows.

    weights: of all records, sources one after another; within a source they count relative to each other. Raises
    DataError where they do not fit, or a source has none.
    """
    ends = np.cumsum(sizes)
    if weights is not None and (weights.shape != (ends[-1],) or not np.isfinite(weights).all() or weights.min() < 0):
        raise DataError(
            f"weights are {ends[-1]:,} finite numbers of at least 0, one per record; these are {weights.shape[0]:,}, "
            f"the smallest {weights.min() if weights.size else 'none'}"
        )
    borders = np.round(np.cumsum(shares) / sum(shares) * BLOCK).astype(int)
    starts = np.concatenate([[0], borders[:-1]])
    parts, cumulative = [], []
    for size, end, start, border in zip(sizes, ends, starts, borders, strict=True):
        if border == start:
            raise DataError(f"a share of a mixture has to be at least 1 in {BLOCK:,}")
        parts.append(Part(int(end - size), int(size), int(start), int(border - start)))
        own = None if weights is None else np.cumsum(weights[end - size : end], dtype=np.float64)
        if own is not None and own[-1] <= 0:
            raise DataError("all weights of a source are 0: nothing of it would be seen")
        cumulative.append(None if own is None else own / own[-1])
    return Order(seed, tuple(parts), tuple(cumulative))
