"""What is found out about a source once: its rows as an Arrow file in the cache folder, mapped into memory."""

import errno
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from unclip_jax.compile_cache import user_cache
from unclip_jax.data.records import DataError

VERSION = "2"
BATCH_ROWS, BATCH_BYTES = 4096, 2**24  # of the file's pieces, one of which is in memory while it is written
MOST_PROBLEMS = 10_000  # that are kept by name

Row = dict[str, Any]
Rows = Callable[[list[str]], Iterator[Row]]


def cache_folder(cache: Path | None = None) -> Path:
    """Where listings are kept: `cache`, else UNCLIP_CACHE_DIR, else the user's cache folder."""
    return cache or Path(os.environ.get("UNCLIP_CACHE_DIR") or user_cache()) / "listings"


def digest_of(*facts: object) -> str:
    """Sixteen hexadecimal digits that change with any of some facts."""
    return hashlib.sha256("\0".join(map(str, facts)).encode(errors="surrogateescape")).hexdigest()[:16]


class Listing:
    """Rows of an Arrow file at random; a pickle of one is its path.

    path: the file; beside it a JSON file tells where its pieces end, and what was left out.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        beside = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        self.problems: tuple[str, ...] = tuple(beside["problems"])
        self._ends = np.asarray(beside["ends"], np.int64)
        self._lock = threading.Lock()
        self._reader: Any = None

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return Listing, (self.path,)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def value(self, index: int, name: str) -> Any:
        """One column of one row."""
        batch, row = self._place(index)
        return batch.column(name)[row].as_py()

    def row(self, index: int) -> Row:
        """All columns of one row."""
        batch, row = self._place(index)
        return {name: column[row].as_py() for name, column in zip(batch.schema.names, batch.columns, strict=True)}

    def rows(self) -> Iterator[Row]:
        """All rows."""
        for number in range(len(self._ends)):
            yield from self._piece(number).to_pylist()

    def _place(self, index: int) -> tuple[Any, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"{index} of {len(self)} records")
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self._piece(number), index - (int(self._ends[number - 1]) if number else 0)

    def _piece(self, number: int) -> Any:
        import pyarrow as pa

        with self._lock:
            if self._reader is None:
                self._reader = pa.ipc.open_file(pa.memory_map(str(self.path)))
            return self._reader.get_batch(number)


class ListedSource:
    """The part of a source that its listing knows: how many records there are, and their keys, in one of its columns.

    Whoever inherits from it sets `name` and `digest`, reads records, and says where the keys are.
    """

    key_column = "key"

    def __init__(self, listing: Listing) -> None:
        self.listing = listing
        self.problems = listing.problems

    def __len__(self) -> int:
        return len(self.listing)

    def key(self, index: int) -> str:
        """The key of a record."""
        return self.listing.value(index, self.key_column)


def listed(facts: str, columns: dict[str, str], rows: Rows, cache: Path | None = None) -> Listing:
    """The listing of these facts, made now where the cache has none.

    facts: a digest of everything that the rows depend on. columns: Arrow's type by name. rows: yields rows, and appends
    to its argument a sentence for whatever it leaves out. Raises DataError where the cache cannot be written.
    """
    path = cache_folder(cache) / f"{digest_of(VERSION, facts, columns)}.arrow"
    if not (path.exists() and path.with_suffix(".json").exists()):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, columns, rows)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOTDIR):
                raise
            why = "its disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
            raise DataError(
                f"the list of a source cannot be kept in '{path.parent}': {why}; free space there, or set "
                "UNCLIP_CACHE_DIR to another folder"
            ) from error
    return Listing(path)


def _write(path: Path, columns: dict[str, str], rows: Rows) -> None:
    import pyarrow as pa

    schema = pa.schema([(name, _type(kind)) for name, kind in columns.items()])
    problems: list[str] = []
    ends: list[int] = []
    made = [path.with_name(f".{path.stem}.{os.getpid()}.{threading.get_ident()}{end}") for end in (".arrow", ".json")]
    try:
        with made[0].open("wb") as file, pa.ipc.new_file(file, schema) as writer:
            for piece in _pieces(rows(problems)):
                writer.write_batch(pa.RecordBatch.from_pylist(piece, schema))
                ends.append(len(piece) + (ends[-1] if ends else 0))
        if len(problems) > MOST_PROBLEMS:
            problems[MOST_PROBLEMS:] = [f"and {len(problems) - MOST_PROBLEMS:,} more"]
        made[1].write_text(json.dumps({"ends": ends, "problems": problems}), encoding="utf-8")
        for temporary, last in zip(made, (path, path.with_suffix(".json")), strict=True):
            os.replace(temporary, last)
    finally:
        for temporary in made:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def _type(kind: str) -> Any:
    import pyarrow as pa

    match kind:
        case "text":
            return pa.string()
        case "texts":
            return pa.list_(pa.string())
        case "bytes":
            return pa.binary()
        case "number":
            return pa.int64()
        case _:
            raise TypeError(kind)


def _pieces(rows: Iterator[Row]) -> Iterator[list[Row]]:
    piece: list[Row] = []
    size = 0
    for row in rows:
        piece.append(row)
        size += sum(len(value) for value in row.values() if isinstance(value, bytes))
        if len(piece) == BATCH_ROWS or size >= BATCH_BYTES:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece
