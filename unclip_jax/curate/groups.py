"""What stays of every group of near-duplicates, and how much of what an exact search finds is thereby resolved."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from unclip_jax.curate import manifest
from unclip_jax.curate.duplicates import LEFT, Pairs, Settings, alike, close_pairs, forest, groups_of, pairs_path
from unclip_jax.data.embeddings import Embeddings, Part

SAMPLE = 1000  # rows that are also searched exactly
ROUNDS = 1000  # rows that may stay of one group before the rest of it stays too
AT_ONCE = 2**16  # pairs that are looked at together


class Removed(NamedTuple):
    """Rows to remove, ascending; the row of each group that stays for it, and their cosine."""

    rows: Int[np.ndarray, " r"]
    kept: Int[np.ndarray, " r"]
    cosine: Float[np.ndarray, " r"]
    groups: int


def merge(embeddings: Embeddings, settings: Settings, out: Path) -> dict[str, Any]:
    """Unites the pairs of all parts, chooses what stays, and writes the step; returns its summary."""
    paths = manifest.parts_of(out)
    pairs = np.zeros((0, 2), np.int64)
    for index in range(len(paths)):
        own = np.load(pairs_path(out, Part(index, len(paths))), allow_pickle=False)
        pairs = forest(np.concatenate([pairs, own]))
    removed = choose(embeddings, settings, pairs)
    gone = np.zeros(len(embeddings), bool)
    gone[removed.rows] = True
    figures = manifest.summed(paths) | {"groups": removed.groups}
    figures |= recall(embeddings, settings, np.load(out / "work" / LEFT, allow_pickle=False), gone)
    return manifest.finish(out, _lines(embeddings, removed), figures)


def choose(embeddings: Embeddings, settings: Settings, pairs: Pairs) -> Removed:
    """What goes: every row that is alike to one that stays, in rounds in which one row of every group stays."""
    rows, groups = groups_of(pairs) if len(pairs) else (np.zeros(0, np.int64), np.zeros(0, np.int32))
    area = embeddings.rows("size", rows).astype(np.int64).prod(1) if len(rows) else rows
    order = np.lexsort((_ranks(embeddings.keys(rows)), -area, groups))
    undecided, group = rows[order], groups[order]
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for _ in range(ROUNDS):
        _, first, inverse = np.unique(group, return_index=True, return_inverse=True)
        kept = undecided[first[inverse]]
        others = kept != undecided
        if not others.any():
            break
        together, cosine = _together(embeddings, settings, np.stack([kept, undecided], axis=1)[others])
        found.append((undecided[others][together], kept[others][together], cosine[together]))
        undecided, group = undecided[others][~together], group[others][~together]
    gone, kept, cosine = (np.concatenate(column) for column in zip(*found, strict=True)) if found else (rows,) * 3
    order = np.argsort(gone, kind="stable")
    return Removed(gone[order], kept[order], cosine[order].astype(np.float32), len(np.unique(kept)))


def _ranks(keys: list[str]) -> Int[np.ndarray, " r"]:
    """The place of every key in their alphabetical order."""
    ranks = np.empty(len(keys), np.int64)
    ranks[sorted(range(len(keys)), key=keys.__getitem__)] = np.arange(len(keys))
    return ranks


def _together(
    embeddings: Embeddings, settings: Settings, pairs: Pairs
) -> tuple[Bool[np.ndarray, " p"], Float[np.ndarray, " p"]]:
    """Whether the rows of each pair are alike, and their greatest cosine, mirrored or not."""
    told, cosines = np.zeros(len(pairs), bool), np.zeros(len(pairs), np.float32)
    for first in range(0, len(pairs), AT_ONCE):
        part = pairs[first : first + AT_ONCE]
        a, b = (embeddings.unit("image", part[:, side]) for side in (0, 1))
        best = (a * b).sum(1)
        yes = _checked(embeddings, settings, part, best, False)
        if settings.mirror:
            ways = ((a, embeddings.unit("mirror", part[:, 1])), (embeddings.unit("mirror", part[:, 0]), b))
            cosine = np.maximum(*((x * y).sum(1) for x, y in ways))
            yes |= _checked(embeddings, settings, part, np.where(yes, -1, cosine), True)
            best = np.maximum(best, cosine)
        told[first : first + len(part)], cosines[first : first + len(part)] = yes, best
    return told, cosines


def _checked(
    embeddings: Embeddings, settings: Settings, pairs: Pairs, cosine: Float[np.ndarray, " p"], mirrored: bool
) -> Bool[np.ndarray, " p"]:
    """Pairs whose cosine suffices and whose pixels agree."""
    found = cosine >= settings.least
    places = np.flatnonzero(found)
    agreed = {tuple(pair) for pair in alike(embeddings, settings, pairs[places], mirrored).tolist()}
    found[places] = [tuple(pair) in agreed for pair in pairs[places].tolist()]
    return found


def _lines(embeddings: Embeddings, removed: Removed) -> Iterator[manifest.Line]:
    """A manifest's lines, so many at a time that keys fit in memory."""
    for first in range(0, len(removed.rows), AT_ONCE):
        part = slice(first, first + AT_ONCE)
        columns = removed.rows[part], removed.kept[part], removed.cosine[part]
        keys, kept_keys = embeddings.keys(columns[0]), embeddings.keys(columns[1])
        for row, _, cosine, key, of in zip(*columns, keys, kept_keys, strict=True):
            yield {"row": int(row), "key": key, "why": "duplicate", "of": of, "cosine": round(float(cosine), 5)}


def recall(
    embeddings: Embeddings, settings: Settings, left: Bool[np.ndarray, " n"], gone: Bool[np.ndarray, " n"]
) -> dict[str, Any]:
    """Of the pairs that exact search finds for a sample of rows, the share of which at most one row stays."""
    rows = np.flatnonzero(left)
    sample = np.random.default_rng([settings.seed, 6]).choice(rows, min(SAMPLE, len(rows)), replace=False)
    found = {
        (min(a, b), max(a, b))
        for name, other, mirrored in _ways(settings)
        for a, b in _exact(embeddings, settings, sample, left, name, other, mirrored).tolist()
    }
    pairs = np.asarray(sorted(found), np.int64).reshape(-1, 2)
    resolved = int(gone[pairs].any(1).sum())
    return {
        "sampled_rows": len(sample),
        "sampled_pairs": len(pairs),
        "sampled_recall": resolved / len(pairs) if len(pairs) else None,
    }


def _ways(settings: Settings) -> list[tuple[str, str, bool]]:
    mirrored = [("mirror", "image", True), ("image", "mirror", True)] if settings.mirror else []
    return [("image", "image", False), *mirrored]


def _exact(
    embeddings: Embeddings,
    settings: Settings,
    sample: Int[np.ndarray, " s"],
    left: Bool[np.ndarray, " n"],
    name: str,
    other: str,
    mirrored: bool,
) -> Pairs:
    """All pairs of a row of the sample and any row that is left."""
    queries, found = embeddings.unit(name, sample), [np.zeros((0, 2), np.int64)]
    for number in range(embeddings.about.shards):
        first = number * embeddings.about.shard_rows
        rows = first + np.flatnonzero(left[first : first + embeddings.about.shard_rows])
        keys = embeddings.unit(other, rows)
        for pairs in close_pairs(queries, keys, sample, rows, settings.least, False):
            found.append(alike(embeddings, settings, pairs, mirrored))
    return np.concatenate(found)
