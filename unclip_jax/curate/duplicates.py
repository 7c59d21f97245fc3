"""Near-duplicates, as DALL-E 2's training set lost them: pairs inside the clusters of several clusterings, united.

Two alike pictures may lie on both sides of a cluster's border; with another seed the border runs elsewhere. A picture
is also looked for by the embedding of its mirror image. Rows whose embeddings are equal bit by bit are found first, by
a hash, so that a hundred thousand copies of one picture make no pairs among themselves.

Of a group, the largest picture stays (of equals that of the lowest key), and with it every other that is not itself
alike to one that stays: a chain of small differences removes nothing that differs much from what is kept.

Parts search different clusters. What all of them need (centres, the cluster of every row) is one file per shard: who
comes first makes it, nobody waits, and a run that was killed goes on.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from tqdm import tqdm

from unclip_jax.curate import manifest, pixels
from unclip_jax.curate.clusters import assign, clusters_for, fit, sample_rows
from unclip_jax.curate.manifest import CurationError
from unclip_jax.data.embeddings import Embeddings, Part

BLOCK = 512  # rows by rows that are compared at once
AT_ONCE = 2**14  # pairs whose small pictures are in memory
LEFT = "left.npy"  # which rows were looked at
MOST_PAIRS = 2**22  # that are held before they are looked at and reduced to a forest
FOUND, MIRRORED, SURE = 0, 1, 2  # how a candidate came about: by the picture, by its mirror image, or looked at already


class Settings(NamedTuple):
    """What counts as alike, and where it is looked for.

    threshold: least cosine. clusterings: with seeds of their own. clusters: of each, 0: as many as balance the work.
    mirror: also against the mirrored picture. pixels: the most that the small pictures may differ (see pixels), None:
    they are not looked at.
    """

    threshold: float = 0.95
    clusterings: int = 5
    clusters: int = 0
    mirror: bool = False
    pixels: float | None = None
    seed: int = 0

    @property
    def least(self) -> float:
        """The threshold, as far as rounding lets equal rows reach it."""
        return min(self.threshold, 1 - 1e-5)


Pairs = Int[np.ndarray, "_ 2"]
Candidates = Int[np.ndarray, "_ 3"]  # two rows, and FOUND, MIRRORED or SURE


def search(
    embeddings: Embeddings,
    settings: Settings,
    out: Path,
    after: Sequence[Path] = (),
    part: Part = Part(),  # noqa: B008
) -> None:
    """Searches this part's clusters of every clustering, and writes the pairs that it finds."""
    _check(embeddings, settings)
    manifest.begin(out, "duplicates", embeddings, settings._asdict(), after)
    left = manifest.alive(embeddings, after)
    hashes = _shared(embeddings, out, part, "hash", lambda number: _hashes(embeddings, number))
    firsts, equal = _equal(hashes, left)
    rows = np.flatnonzero(firsts)
    if not len(rows):
        raise CurationError("no record is left to look at: the steps before removed all")
    manifest.save_array(out / "work" / LEFT, left)
    clusters = settings.clusters or clusters_for(len(rows))
    candidates = [_marked(equal, FOUND)] if part.index == 0 else []
    for clustering in range(settings.clusterings):
        path = out / "work" / f"found-{clustering}-{part.index}-of-{part.count}.npy"
        if not path.is_file():
            manifest.save_array(path, _search_clustering(embeddings, settings, out, part, clustering, clusters, rows))
        candidates.append(np.load(path, allow_pickle=False))
    manifest.save_array(pairs_path(out, part), sure(embeddings, settings, candidates)[:, :2])
    manifest.write_part(out, part, (), {"looked_at": int(left.sum()) if part.index == 0 else 0})


def _check(embeddings: Embeddings, settings: Settings) -> None:
    if settings.mirror and not embeddings.about.mirror:
        raise CurationError(f"'{embeddings.folder}' holds no mirrored pictures: embed the source with --mirror")
    if settings.pixels is not None and not embeddings.about.thumbnail:
        raise CurationError(f"'{embeddings.folder}' holds no small pictures: embed the source with --thumbnails 32")
    if not 0 < settings.threshold <= 1 or settings.clusterings < 1:
        raise CurationError("the threshold is a cosine above 0, and there is at least one clustering")


def pairs_path(out: Path, part: Part) -> Path:
    """The file of the pairs that a part found."""
    return out / "work" / f"pairs-{part.index}-of-{part.count}.npy"


def _shared(
    embeddings: Embeddings, out: Path, part: Part, name: str, make: Callable[[int], np.ndarray]
) -> Int[np.ndarray, " n"]:
    """One number per row, from one file per shard: this part's shards first, then what nobody has made yet."""
    shards, found = embeddings.about.shards, {}
    for number in dict.fromkeys([*part.of(shards), *range(shards)]):
        path = out / "work" / f"{name}-{number:05d}.npy"
        if not path.is_file():
            manifest.save_array(path, make(number))
        found[number] = np.load(path, allow_pickle=False)
    return np.concatenate([found[number] for number in range(shards)])


def _rows_of(embeddings: Embeddings, number: int) -> Int[np.ndarray, " r"]:
    size = embeddings.about.shard_rows
    return np.arange(number * size, min(len(embeddings), (number + 1) * size))


def _hashes(embeddings: Embeddings, number: int) -> Int[np.ndarray, " r"]:
    """64 bits of every row's stored image embedding."""
    rows = np.ascontiguousarray(embeddings.shard(number).arrays["image"])
    words = rows.view(np.uint16).reshape(len(rows), -1).astype(np.uint64)
    odd = np.random.default_rng(5).integers(0, 2**63, words.shape[1], np.uint64) * np.uint64(2) + np.uint64(1)
    return (words * odd).sum(1, dtype=np.uint64).view(np.int64)


def _equal(hashes: Int[np.ndarray, " n"], left: Bool[np.ndarray, " n"]) -> tuple[Bool[np.ndarray, " n"], Pairs]:
    """The first row of every embedding among those that are left, and the pairs of it and its equals."""
    rows = np.flatnonzero(left)
    _, first, inverse = np.unique(hashes[rows], return_index=True, return_inverse=True)
    own = rows[first[inverse]]
    firsts = np.zeros(len(left), bool)
    firsts[own] = True
    return firsts, np.stack([own, rows], axis=1)[own != rows]


def _search_clustering(
    embeddings: Embeddings,
    settings: Settings,
    out: Path,
    part: Part,
    clustering: int,
    clusters: int,
    rows: Int[np.ndarray, " r"],
) -> Candidates:
    """Candidates inside this part's clusters of one clustering."""
    seed = settings.seed * 1000 + clustering
    path = out / "work" / f"centres-{clustering}.npy"
    if not path.is_file():
        manifest.save_array(path, fit(embeddings.unit("image", sample_rows(rows, clusters, seed)), clusters, seed))
    centres = np.load(path, allow_pickle=False)

    def members(name: str) -> list[np.ndarray]:
        def of_shard(number: int) -> np.ndarray:
            return assign(embeddings.unit(name, _rows_of(embeddings, number)), centres)

        places = _shared(embeddings, out, part, f"{name}-{clustering}", of_shard)[rows]
        order = np.argsort(places, kind="stable")
        return np.split(rows[order], np.searchsorted(places[order], np.arange(1, len(centres))))

    images = members("image")
    mirrors = members("mirror") if settings.mirror else []
    found: list[np.ndarray] = []
    mine = part.of(len(centres))
    for cluster in tqdm(mine, desc=f"clustering {clustering + 1}/{settings.clusterings}", unit="cluster", leave=False):
        keys = images[cluster]
        x = embeddings.unit("image", keys)
        found += [_marked(pairs, FOUND) for pairs in close_pairs(x, x, keys, keys, settings.least, True)]
        if settings.mirror and len(keys):
            queries = mirrors[cluster]
            close = close_pairs(embeddings.unit("mirror", queries), x, queries, keys, settings.least, False)
            found += [_marked(np.sort(pairs, axis=1), MIRRORED) for pairs in close]
        if sum(map(len, found)) > MOST_PAIRS:
            found = [_distinct(found)]
            if len(found[0]) > MOST_PAIRS // 2:
                found = [sure(embeddings, settings, found)]
    return sure(embeddings, settings, found) if settings.pixels is None else _distinct(found)


def _marked(pairs: Pairs, how: int) -> Candidates:
    return np.concatenate([pairs, np.full((len(pairs), 1), how)], axis=1)


def _distinct(candidates: Sequence[Candidates]) -> Candidates:
    return np.unique(np.concatenate([np.zeros((0, 3), np.int64), *candidates]), axis=0)


def sure(embeddings: Embeddings, settings: Settings, candidates: Sequence[Candidates]) -> Candidates:
    """Candidates whose small pictures agree, as few as keep the groups."""
    pairs = _distinct(candidates)
    kinds = [pairs[pairs[:, 2] == how][:, :2] for how in (FOUND, MIRRORED, SURE)]
    looked_at = [alike(embeddings, settings, kinds[how], how == MIRRORED) for how in (FOUND, MIRRORED)]
    return _marked(forest(np.concatenate([*looked_at, kinds[SURE]])), SURE)


@jax.jit
def _above(x: Float[Array, "b z"], y: Float[Array, "b z"], least: Array) -> tuple[Bool[Array, "b b"], Bool[Array, ""]]:
    mask = jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST) >= least
    return mask, mask.any()


def close_pairs(
    x: Float[np.ndarray, "n z"],
    y: Float[np.ndarray, "m z"],
    rows_x: Int[np.ndarray, " n"],
    rows_y: Int[np.ndarray, " m"],
    threshold: float,
    same: bool,
) -> Iterator[Pairs]:
    """Pairs of different rows whose cosine reaches the threshold, block by block; same: each pair once."""
    blocks_x = _blocks(x)
    blocks_y = blocks_x if same else _blocks(y)
    for i, block_x in enumerate(blocks_x):
        for j, block_y in enumerate(blocks_y):
            if same and j < i:
                continue
            mask, some = _above(block_x, block_y, threshold)
            if some:
                a, b = np.nonzero(np.asarray(mask))
                a, b = a + i * BLOCK, b + j * BLOCK
                inside = (a < len(x)) & (b < len(y))
                pairs = np.stack([rows_x[a[inside]], rows_y[b[inside]]], axis=1)
                yield pairs[pairs[:, 0] < pairs[:, 1]] if same else pairs[pairs[:, 0] != pairs[:, 1]]


def _blocks(x: Float[np.ndarray, "n z"]) -> list[Array]:
    count = -(-len(x) // BLOCK)
    filled = np.zeros((count * BLOCK, x.shape[1]), np.float32)
    filled[: len(x)] = x
    return [jnp.asarray(block) for block in np.split(filled, count)] if count else []


def alike(embeddings: Embeddings, settings: Settings, pairs: Pairs, mirrored: bool) -> Pairs:
    """Those of close pairs whose small pictures agree; all of them where pixels are not looked at."""
    if settings.pixels is None or not len(pairs):
        return pairs
    found = []
    for first in range(0, len(pairs), AT_ONCE):
        part = pairs[first : first + AT_ONCE]
        a, b = (embeddings.rows("thumbnail", part[:, side]) for side in (0, 1))
        found.append(part[pixels.same(a, b, settings.pixels, mirrored)])
    return np.concatenate(found)


def groups_of(pairs: Pairs) -> tuple[Int[np.ndarray, " r"], Int[np.ndarray, " r"]]:
    """Rows that occur in pairs, ascending, and the number of the group of each."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    rows, places = np.unique(pairs, return_inverse=True)
    places = places.reshape(-1, 2)
    ones = np.ones(len(pairs), bool)
    graph = coo_array((ones, (places[:, 0], places[:, 1])), shape=(len(rows), len(rows)))
    return rows, connected_components(graph, directed=False)[1]


def forest(pairs: Pairs) -> Pairs:
    """As few pairs as keep the groups: every row with the first of its group."""
    if not len(pairs):
        return pairs
    rows, groups = groups_of(pairs)
    _, first = np.unique(groups, return_index=True)
    own = rows[first[groups]]
    return np.stack([own, rows], axis=1)[own != rows]
