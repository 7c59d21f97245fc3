"""A table of pictures and captions: CSV, JSONL or Parquet, with the pictures' paths, or (Parquet) with their bytes."""

import csv
import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from unclip_jax.data.folders import MOST_PICTURE
from unclip_jax.data.listing import ListedSource, Row, digest_of, listed
from unclip_jax.data.records import Broken, DataError, Record
from unclip_jax.data.remote import whole
from unclip_jax.data.texts import texts_of

IMAGES = ("image", "file_name", "filename", "image_path", "path", "file", "jpg", "png")
CAPTIONS = ("caption", "captions", "text", "texts", "TEXT", "prompt")
KEYS = ("key", "__key__", "id")
USUAL = {"image": IMAGES, "caption": CAPTIONS, "key": KEYS}
COLUMNS = {"key": "text", "path": "text", "bytes": "bytes", "captions": "texts", "problem": "text"}
MOST_LINE = 2**26  # bytes of one row of a CSV or JSONL file


class TableSource(ListedSource):
    """The rows of a table; keys are those of its key column, else the pictures' paths, else row numbers.

    place: a .csv, .tsv, .jsonl or .parquet file; paths in it start from its folder. columns: names of the columns
    `image`, `caption` and `key`, where they are not the USUAL ones.
    """

    def __init__(self, name: str, place: str, columns: Mapping[str, str], cache: Path | None = None) -> None:
        self.name, self.path, self.columns = name, os.path.abspath(os.path.expanduser(place)), columns
        if not os.path.isfile(self.path):
            raise DataError(f"there is no table '{place}'")
        status = os.stat(self.path)
        self.digest = digest_of("table", self.path, status.st_size, status.st_mtime_ns, sorted(columns.items()))
        super().__init__(listed(self.digest, COLUMNS, self._rows, cache))

    def __getitem__(self, index: int) -> Record:
        row = self.listing.row(index)
        if row["problem"]:
            raise Broken(row["problem"])
        image = row["bytes"]
        if image is None:
            image = whole(os.path.join(os.path.dirname(self.path), row["path"]), MOST_PICTURE)
        return Record(row["key"], image, tuple(row["captions"]))

    def _rows(self, problems: list[str]) -> Iterator[Row]:
        seen: set[int] = set()
        names, columns, own_columns = dict(self.columns), dict[str, None](), _rows_have_own_columns(self.path)
        for number, cells in enumerate(_cells(self.path, problems)):
            if number == 0 or own_columns and not cells.keys() <= columns.keys():
                columns |= dict.fromkeys(cells)
                usual = {part: next((name for name in some if name in columns), "") for part, some in USUAL.items()}
                names = {part: name for part, name in usual.items() if name} | names
            if number == 0 and not own_columns:
                self._check(names, columns)
            image = cells.get(names.get("image", ""))
            if isinstance(image, Mapping):  # as the hub stores pictures: {"bytes": ..., "path": ...}
                image = image.get("bytes") or image.get("path")
            path = image if isinstance(image, str) else None
            if path is not None and _text(path) != path:
                problems.append(
                    f"the path in row {number} is not UTF-8, and the row is left out: save the file as UTF-8"
                )
                continue
            own = cells.get(names.get("key", ""))
            key = _text(own) if own is not None else path or f"row {number}"
            if hash(key) in seen:
                problems.append(f"row {number} has the key '{key}' of a row before it, and is left out")
                continue
            seen.add(hash(key))
            yield _row(key, path, image, cells.get(names.get("caption", "")))
        if own_columns and columns:
            self._check(names, columns)

    def _check(self, names: Mapping[str, str], columns: Collection[str]) -> None:
        """DataError where the table has no column of pictures, or none of a name that was given."""
        for name in names.values():
            if name not in columns:
                raise DataError(f"'{self.path}' has no column '{name}'; it has {', '.join(columns)}")
        if "image" not in names:
            raise DataError(
                f"'{self.path}' has the columns {', '.join(columns)}: say which holds the pictures, as in "
                f"'{self.name}?image={next(iter(columns), 'NAME')}&caption=NAME'"
            )


def _rows_have_own_columns(path: str) -> bool:
    """Whether the first row does not tell which columns there are."""
    return os.path.splitext(path)[1].lower() in (".jsonl", ".ndjson")


def _row(key: str, path: str | None, image: Any, captions: Any) -> Row:
    problem, texts = None, ()
    try:
        texts = texts_of(captions, key)
        if path is not None and "://" in path:
            problem = f"the picture of '{key}' is an address: download it first, for example with img2dataset"
        elif not isinstance(image, str | bytes) or not image:
            problem = f"'{key}' names no picture"
    except Broken as error:
        problem = str(error)
    data = image if isinstance(image, bytes) else None
    return {"key": key, "path": path, "bytes": data, "captions": list(texts), "problem": problem}


def _text(value: Any) -> str:
    return str(value).encode("utf-8", "replace").decode()


def _cells(path: str, problems: list[str]) -> Iterator[Mapping[str, Any]]:
    match os.path.splitext(path)[1].lower():
        case ".csv" | ".tsv" as ending:
            yield from _csv(path, "," if ending == ".csv" else "\t")
        case ".jsonl" | ".ndjson":
            yield from _jsonl(path, problems)
        case ".parquet":
            yield from _parquet(path)
        case ending:
            raise DataError(f"'{path}' is a table of an unknown kind '{ending}': use .csv, .jsonl or .parquet")


def _csv(path: str, delimiter: str) -> Iterator[Mapping[str, Any]]:
    limit = csv.field_size_limit(MOST_LINE)
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            yield from csv.DictReader(file, delimiter=delimiter)
    except csv.Error as error:
        raise DataError(f"'{path}' is no CSV table: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _jsonl(path: str, problems: list[str]) -> Iterator[Mapping[str, Any]]:
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(MOST_LINE):
            number += 1
            if not line.strip():
                continue
            try:
                cells = json.loads(line.decode("utf-8-sig", "surrogateescape"))
            except (ValueError, RecursionError):
                cells = None
            if isinstance(cells, dict):
                yield cells
            else:
                problems.append(f"line {number} of '{path}' is no JSON object")


def _parquet(path: str) -> Iterator[Mapping[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as table:
            wanted = [name for name in table.schema_arrow.names]
            for batch in table.iter_batches(batch_size=64, columns=wanted):
                yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise DataError(f"'{path}' is no Parquet table, or damaged: {str(error)[:200]}") from error
