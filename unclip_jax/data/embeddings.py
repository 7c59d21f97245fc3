"""Stored CLIP embeddings: a folder of safetensors shards of one fixed number of rows, read through the memory map.

Row i of the folder is record i of the source that was embedded. A shard `shard-00003.safetensors` holds

image       [n z]  CLIP's image embeddings, as other networks see them; zeros where the record is broken
text        [m z]  CLIP's embeddings of all captions of all its rows, one after another
captions    [n+1]  int64: row i has the captions captions[i] to captions[i + 1]
mirror      [n z]  embeddings of the mirrored pictures, where they were asked for
thumbnail   [n t t 3]  uint8, small pictures to compare pixels by, where they were asked for
size        [n 2]  int32, height and width of the picture as it is in the source
valid       [n]    bool, false where the record is broken

and in its metadata the keys of its rows, what is broken and why, and the digests of the source and of the CLIP.
"""

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from unclip_jax.checkpoint.schema import CheckpointError
from unclip_jax.checkpoint.sources import open_safetensors

INDEX = "embeddings.json"
VERSION = 1
OPEN = 4096  # shards that are mapped at once


class EmbeddingsError(ValueError):
    """A folder of embeddings that cannot be used; the text is one sentence."""


class Part(NamedTuple):
    """Which share of the shards a process works on: number `index` of `count`, every count-th shard."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Part i of n from "i/n", i counted from 0; ValueError where it is none."""
        index, slash, count = text.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise ValueError(f"--part {text}: give which part of how many, counted from 0, as in 0/4")
        return cls(int(index), int(count))

    def of(self, number: int) -> range:
        """This part of `number` things."""
        return range(self.index, number, self.count)


class About(NamedTuple):
    """What a folder of embeddings holds: of which source, by which CLIP (digests), how many rows, cut how."""

    source: str
    digest: str
    clip: str
    rows: int
    shard_rows: int
    dim: int
    dtype: str = "float16"
    mirror: bool = False
    thumbnail: int = 0
    version: int = VERSION

    @property
    def shards(self) -> int:
        """How many files."""
        return -(-self.rows // self.shard_rows)


class Shard(NamedTuple):
    """Arrays of one file, mapped into memory, as the module describes them; first: its first row in the folder."""

    first: int
    arrays: dict[str, np.ndarray]
    metadata: dict[str, str]

    @property
    def keys(self) -> list[str]:
        """Keys of its rows."""
        return json.loads(self.metadata["keys"])

    @property
    def broken(self) -> list[tuple[str, str]]:
        """Keys of broken records, each with what is wrong."""
        return [(key, why) for key, why in json.loads(self.metadata["broken"])]


@dataclass(frozen=True)
class Embeddings:
    """A folder of embeddings, opened: any rows of it, and nothing in memory until it is used."""

    folder: Path
    about: About
    _open: OrderedDict[int, Shard] = field(default_factory=OrderedDict, repr=False, compare=False)

    def __len__(self) -> int:
        return self.about.rows

    def shard(self, number: int) -> Shard:
        """One file; EmbeddingsError where it is missing, damaged or of another source or CLIP."""
        if number not in self._open:
            shard = read_shard(self.folder, number, self.about)
            if shard is None:
                raise EmbeddingsError(
                    f"'{shard_path(self.folder, number)}' is missing: run unclip data embed again, it makes what lacks"
                )
            self._open[number] = shard
            if len(self._open) > OPEN:
                self._open.popitem(last=False)
        return self._open[number]

    def rows(self, name: str, rows: Int[np.ndarray, " r"]) -> np.ndarray:
        """Some rows of one array, in the order that was asked for; KeyError where the folder does not have it."""
        numbers, order = rows // self.about.shard_rows, np.argsort(rows, kind="stable")
        parts = np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1) if len(rows) else []
        found: np.ndarray | None = None
        for part in parts:
            shard = self.shard(int(numbers[part[0]]))
            values = shard.arrays[name][rows[part] - shard.first]
            if found is None:
                found = np.empty((len(rows), *values.shape[1:]), values.dtype)
            found[part] = values
        return self.shard(0).arrays[name][:0] if found is None else found

    def unit(self, name: str, rows: Int[np.ndarray, " r"]) -> Float[np.ndarray, "r z"]:
        """Some embeddings (image or mirror) at unit length in float32."""
        return unit(self.rows(name, rows))

    def text_mean(self, rows: Int[np.ndarray, " r"]) -> Float[np.ndarray, "r z"]:
        """The mean of each row's caption embeddings, each and the mean at unit length; zeros without captions."""
        found = np.zeros((len(rows), self.about.dim), np.float32)
        for place, row in enumerate(rows):
            shard = self.shard(int(row) // self.about.shard_rows)
            first, last = shard.arrays["captions"][row - shard.first : row - shard.first + 2]
            found[place] = unit(shard.arrays["text"][first:last]).sum(0)
        return unit(found)

    def keys(self, rows: Sequence[int] | Int[np.ndarray, " r"]) -> list[str]:
        """Keys of some rows."""
        numbers = {int(row) // self.about.shard_rows for row in rows}
        known = {number: self.shard(number).keys for number in numbers}
        size = self.about.shard_rows
        return [known[int(row) // size][int(row) % size] for row in rows]

    @cached_property
    def valid(self) -> Bool[np.ndarray, " n"]:
        """Which rows are not broken."""
        return np.concatenate([self.shard(number).arrays["valid"] for number in range(self.about.shards)])

    @property
    def identity(self) -> dict[str, Any]:
        """What a later step has to find unchanged."""
        table = self.about._asdict()
        return {name: table[name] for name in ("source", "digest", "clip", "rows")}


def unit(x: Float[np.ndarray, "*b z"]) -> Float[np.ndarray, "*b z"]:
    """Vectors at unit length in float32; zeros stay zeros."""
    x = np.asarray(x, np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def shard_path(folder: Path, number: int) -> Path:
    """The file of a shard."""
    return folder / f"shard-{number:05d}.safetensors"


def shard_metadata(about: About, number: int) -> dict[str, str]:
    """What tells that a shard belongs to a folder."""
    names = ("digest", "clip", "rows", "shard_rows", "dtype", "mirror", "thumbnail", "version")
    table = about._asdict()
    return {name: str(table[name]) for name in names} | {"shard": str(number)}


def read_shard(folder: Path, number: int, about: About) -> Shard | None:
    """One shard, None where there is no file; EmbeddingsError where it is damaged or belongs to another folder."""
    path = shard_path(folder, number)
    if not path.is_file():
        return None
    try:
        arrays, metadata = open_safetensors(path)
    except CheckpointError as error:
        raise EmbeddingsError(f"{error}, that is: delete it and run unclip data embed again") from error
    expected = shard_metadata(about, number)
    if different := [name for name, value in expected.items() if metadata.get(name) != value]:
        raise EmbeddingsError(
            f"'{path}' is of another {different[0]} ({metadata.get(different[0])}) than its folder "
            f"({expected[different[0]]}): choose a new folder"
        )
    return Shard(number * about.shard_rows, arrays, metadata)


def open_embeddings(folder: str | Path, clip: str | None = None) -> Embeddings:
    """A folder that `unclip data embed` wrote, all of whose shards are there.

    clip: the digest that it must have been made with. Raises EmbeddingsError in one sentence where it cannot be used.
    """
    folder = Path(folder)
    about = read_index(folder)
    if about is None:
        raise EmbeddingsError(f"'{folder}' holds no embeddings (no {INDEX}): make them with unclip data embed")
    if clip is not None and about.clip != clip:
        raise EmbeddingsError(
            f"'{folder}' was made with the CLIP {about.clip}, not with {clip}: embed the source again"
        )
    missing = [number for number in range(about.shards) if not shard_path(folder, number).is_file()]
    if missing or not about.rows:
        raise EmbeddingsError(
            f"'{folder}' lacks {len(missing)} of its {about.shards} shards: run unclip data embed again, it makes them"
            if missing
            else f"'{folder}' holds embeddings of no record at all: its source is empty"
        )
    return Embeddings(folder, about)


def read_index(folder: Path) -> About | None:
    """What a folder says that it holds, None where it says nothing."""
    path = folder / INDEX
    if not path.is_file():
        return None
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        about = About(**table)
        if about.version != VERSION or min(about.shard_rows, about.dim) < 1 or about.rows < 0:
            raise ValueError(f"version {about.version}")
    except (OSError, ValueError, TypeError) as error:
        raise EmbeddingsError(f"'{path}' cannot be read ({error}): embed the source again") from error
    return about
