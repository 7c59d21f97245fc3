"""Embedding a whole source once: shards of fixed size in a fixed order, each written whole or not at all.

A shard that is there is never computed again, so a run that was killed goes on where it was, and any number of
processes share the shards out by `Part` without talking to one another.
"""

import io
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from tqdm import tqdm

from unclip_jax.checkpoint.writing import replacing, save_file
from unclip_jax.data.decode import decode
from unclip_jax.data.embeddings import (
    INDEX,
    About,
    EmbeddingsError,
    Part,
    read_index,
    read_shard,
    shard_metadata,
    shard_path,
)
from unclip_jax.data.records import Source
from unclip_jax.pictures import FORMATS, square

MOST_NAMED = 3  # broken records in an error


class Encoders(NamedTuple):
    """A CLIP as two functions of whole batches, always of one size, and what has to be known of it.

    image: uint8 [b s s 3] -> float32 [b z], text: captions -> float32 [b z]. size: s in px. digest: identifies it.
    """

    image: Callable[[UInt8[np.ndarray, "b s s 3"]], Float[np.ndarray, "b z"]]
    text: Callable[[list[str]], Float[np.ndarray, "b z"]]
    size: int
    dim: int
    digest: str


class Cut(NamedTuple):
    """How a folder is laid out, the same in all its shards."""

    shard_rows: int = 8192
    dtype: str = "float16"
    mirror: bool = False
    thumbnail: int = 0


class Picture(NamedTuple):
    """A record as the encoders read it; `why` says what is wrong with a broken one."""

    key: str
    pixels: UInt8[np.ndarray, "s s 3"]
    captions: tuple[str, ...]
    size: tuple[int, int]
    why: str | None = None


class Done(NamedTuple):
    """What a run did: shards that it made and that it found, and the keys of broken records, each with the reason."""

    made: int
    found: int
    broken: list[tuple[str, str]]


def embed(
    source: Source,
    encoders: Encoders,
    out: Path,
    *,
    cut: Cut = Cut(),  # noqa: B008 - a NamedTuple never changes
    part: Part = Part(),  # noqa: B008
    batch: int = 256,
    threads: int = 8,
    most_broken: float = 0.1,
) -> Done:
    """Embeds a part of a source's shards into a folder; those that are there are left as they are.

    batch: pictures and captions that an encoder is given at once. threads: that read and decode. Raises EmbeddingsError
    where `out` holds embeddings of another source, CLIP or layout, where the source is empty, and where more than a
    share of `most_broken` of the records are broken, naming the first.
    """
    about = About(source.name, source.digest, encoders.digest, len(source), cut.shard_rows, encoders.dim, *cut[1:])
    if not about.rows:
        raise EmbeddingsError(f"'{source.name}' has no records to embed: check its path")
    _claim(out, about)
    mine, made, found, rows = part.of(about.shards), 0, 0, 0
    broken: list[tuple[str, str]] = []
    bar = tqdm(total=sum(_length(about, number) for number in mine), desc="embedding", unit=" pictures", smoothing=0.05)
    with bar, ThreadPoolExecutor(threads) as pool:
        for number in mine:
            if (shard := read_shard(out, number, about)) is not None:
                found, names = found + 1, shard.broken
            else:
                made, names = made + 1, _embed_shard(source, encoders, out, about, number, batch, pool, bar)
            broken += names
            rows += _length(about, number)
            bar.update(rows - bar.n)
            if len(broken) > most_broken * rows:
                named = "; ".join(f"{key}: {why}" for key, why in broken[:MOST_NAMED])
                raise EmbeddingsError(
                    f"{len(broken)} of {rows} records are broken, more than a share of {most_broken:g}: {named}"
                )
    return Done(made, found, broken)


def _length(about: About, number: int) -> int:
    return min(about.shard_rows, about.rows - number * about.shard_rows)


def _claim(out: Path, about: About) -> None:
    """Says in a folder what it is for, or checks that it says so; processes that do so at once write the same."""
    known = read_index(out)
    if known is None:
        with replacing(out / INDEX) as temporary:
            temporary.write_text(json.dumps(about._asdict(), indent=2) + "\n", encoding="utf-8")
        return
    before, now = known._asdict(), about._asdict()
    if different := [name for name in now if name != "source" and before[name] != now[name]]:
        name = different[0]
        raise EmbeddingsError(
            f"'{out}' was begun with another {name} ({before[name]}, now {now[name]}): choose a new folder"
        )


def _embed_shard(
    source: Source,
    encoders: Encoders,
    out: Path,
    about: About,
    number: int,
    batch: int,
    pool: ThreadPoolExecutor,
    bar: tqdm,
) -> list[tuple[str, str]]:
    """Computes and writes one shard; returns its broken records."""
    first, length = number * about.shard_rows, _length(about, number)

    def read(row: int) -> Picture:
        return _read(source, row, encoders.size)

    columns: dict[str, list[np.ndarray]] = {"image": [], "mirror": [], "thumbnail": []}
    read_so_far: list[Picture] = []
    for pictures in _ahead(pool, read, range(first, first + length), batch):
        pixels = _filled(np.stack([picture.pixels for picture in pictures]), batch)
        columns["image"].append(encoders.image(pixels)[: len(pictures)])
        if about.mirror:
            columns["mirror"].append(encoders.image(np.ascontiguousarray(pixels[:, :, ::-1]))[: len(pictures)])
        if about.thumbnail:
            columns["thumbnail"].append(np.stack([_small(picture.pixels, about.thumbnail) for picture in pictures]))
        read_so_far += [picture._replace(pixels=_NOTHING) for picture in pictures]
        bar.update(len(pictures))
    valid = np.asarray([picture.why is None for picture in read_so_far])
    arrays = {name: np.concatenate(parts) for name, parts in columns.items() if parts}
    for name in ("image", "mirror"):
        if name in arrays:
            arrays[name] = (arrays[name] * valid[:, None]).astype(about.dtype)
    captions = [caption for picture in read_so_far for caption in picture.captions]
    arrays["text"] = _embed_texts(encoders, captions, batch).astype(about.dtype)
    arrays["captions"] = np.cumsum([0, *(len(picture.captions) for picture in read_so_far)], dtype=np.int64)
    arrays["size"] = np.asarray([picture.size for picture in read_so_far], np.int32)
    arrays["valid"] = valid
    broken = [(picture.key, picture.why) for picture in read_so_far if picture.why is not None]
    metadata = shard_metadata(about, number) | {
        "keys": json.dumps([picture.key for picture in read_so_far], ensure_ascii=False),
        "broken": json.dumps(broken, ensure_ascii=False),
    }
    with replacing(shard_path(out, number)) as temporary:
        save_file(arrays, temporary, metadata)
    return broken


_NOTHING = np.zeros((0, 0, 3), np.uint8)


def _read(source: Source, row: int, size: int) -> Picture:
    """A record's picture at the encoder's size; a broken one is black and says why."""
    key, captions = source.key(row), ()
    try:
        record = source[row]
        captions = tuple(record.captions)
        picture = decode(record.image, 2 * size, key)
        return Picture(key, square(picture, size), captions, _size(record.image))
    except (ValueError, OSError) as error:
        return Picture(key, np.zeros((size, size, 3), np.uint8), captions, (0, 0), " ".join(str(error).split()))


def _size(image: bytes | np.ndarray) -> tuple[int, int]:
    """Height and width as stored; a JPEG may have been decoded at less."""
    if isinstance(image, np.ndarray):
        return image.shape[0], image.shape[1]
    with Image.open(io.BytesIO(image), formats=FORMATS) as header:
        return header.height, header.width


def _ahead(
    pool: ThreadPoolExecutor, read: Callable[[int], Picture], rows: range, batch: int
) -> Iterator[list[Picture]]:
    """Batches of pictures, the next of which are read while one is used."""
    starts = [*range(rows.start, rows.stop, batch), rows.stop]
    waiting: list[list[Future[Picture]]] = []
    for first, last in pairwise(starts):
        waiting.append([pool.submit(read, row) for row in range(first, last)])
        if len(waiting) > 1:
            yield [future.result() for future in waiting.pop(0)]
    for futures in waiting:
        yield [future.result() for future in futures]


def _embed_texts(encoders: Encoders, captions: Sequence[str], batch: int) -> Float[np.ndarray, "m z"]:
    parts = []
    for start in range(0, len(captions), batch):
        texts = list(captions[start : start + batch])
        parts.append(encoders.text(texts + [""] * (batch - len(texts)))[: len(texts)])
    return np.concatenate(parts) if parts else np.zeros((0, encoders.dim), np.float32)


def _filled(rows: np.ndarray, count: int) -> np.ndarray:
    """Rows, and so many zeros that there are `count`: one shape, one program."""
    return np.concatenate([rows, np.zeros((count - len(rows), *rows.shape[1:]), rows.dtype)])


def _small(pixels: UInt8[np.ndarray, "s s 3"], side: int) -> UInt8[np.ndarray, "t t 3"]:
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BOX))
