"""Tars as img2dataset and webdataset write them, read at random: an index of byte ranges, built once per tar.

Consecutive members of one name up to its first dot are a record: NAME.jpg, NAME.txt, NAME.json. Names are keys and are
never written anywhere; a member whose name is absolute or has a part `..` is left out and reported.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from unclip_jax.data import remote
from unclip_jax.data.folders import ENDINGS, MOST_PICTURE
from unclip_jax.data.listing import ListedSource, Listing, Row, digest_of, listed
from unclip_jax.data.records import Broken, DataError, Record
from unclip_jax.data.remote import File
from unclip_jax.data.texts import MOST_BYTES, lines_of, texts_of

BLOCK = 512
AHEAD = 2**20  # bytes that are read at once while a tar in a bucket is listed
MOST_NAME = 2**16  # bytes of a long name
TEXTS = (".txt", ".caption", ".text")
RANGES = {f"{part}_{what}": "number" for part in ("image", "text", "json") for what in ("at", "size")}


class Member(NamedTuple):
    """A regular file of a tar: its name, where its bytes start, and how many there are."""

    name: str
    start: int
    size: int


class TarSource(ListedSource):
    """The records of all tars of a pattern, in the order of the tars' paths; keys are TAR/NAME."""

    def __init__(self, name: str, pattern: str, cache: Path | None = None) -> None:
        self.name, self.cache = name, cache
        self.files = remote.find(pattern)
        self.digest = digest_of("tars 2", *self.files)
        super().__init__(listed(self.digest, {"key": "text", "file": "number"} | RANGES, self._rows, cache))

    def __getitem__(self, index: int) -> Record:
        row = self.listing.row(index)
        path, key = self.files[row["file"]].path, row["key"]
        ranges = {part: (row[f"{part}_at"], row[f"{part}_size"]) for part in ("image", "text", "json")}
        wanted = {part: spot for part, spot in ranges.items() if spot[0] is not None}
        if "text" in wanted:
            wanted.pop("json", None)
        # Members of a record lie side by side, so that one request gets them all.
        first = min(start for start, _ in wanted.values())
        last = max(start + size for start, size in wanted.values())
        if last - first > MOST_PICTURE:
            raise Broken(f"'{key}' has more than {MOST_PICTURE / 1e6:.0f} MB")
        data = remote.read(path, first, last - first)
        parts = {part: data[start - first : start - first + size] for part, (start, size) in wanted.items()}
        captions = lines_of(parts["text"], key) if "text" in parts else _captions(parts.get("json", b"{}"), key)
        return Record(key, parts["image"], captions)

    def _rows(self, problems: list[str]) -> Iterator[Row]:
        # img2dataset numbers its tars anew in every folder.
        names = [Path(file.path).stem for file in self.files]
        if len(set(names)) < len(names):
            names = [file.path.removesuffix(".tar") for file in self.files]
        with ThreadPoolExecutor(4) as pool:  # buckets answer late
            for number, found in enumerate(pool.map(self._listed, self.files)):
                problems += found.problems
                for row in found.rows():
                    yield row | {"key": f"{names[number]}/{row['key']}", "file": number}

    def _listed(self, file: File) -> Listing:
        return listed(digest_of("tar", *file), {"key": "text"} | RANGES, partial(_records, file), self.cache)


def _captions(data: bytes, key: str) -> tuple[str, ...]:
    """The captions of an img2dataset table beside a picture."""
    import json

    try:
        table = json.loads(data[:MOST_BYTES])
        return texts_of(table.get("caption") or table.get("text"), key)
    except (ValueError, AttributeError, RecursionError):
        raise Broken(f"the JSON of '{key}' cannot be read") from None


def _records(file: File, problems: list[str]) -> Iterator[Row]:
    """A tar's records: of every group of members the first picture, text and table."""
    where = Path(file.path).name
    seen: set[int] = set()
    row: Row = {}

    def finished() -> Iterator[Row]:
        if not row:
            return
        if hash(row["key"]) in seen:
            problems.append(f"'{row['key']}' is in '{where}' twice: the second is left out")
        elif row.get("image_at") is None:
            problems.append(f"'{row['key']}' in '{where}' has no picture, and is left out")
        else:
            yield dict.fromkeys(RANGES) | row
        seen.add(hash(row["key"]))

    for member in members(file, problems):
        folder, slash, last = member.name.rpartition("/")
        stem, dot, ending = last.partition(".")
        key, ending = f"{folder}{slash}{stem}", f".{ending.lower().rpartition('.')[2]}"
        if row.get("key") != key:
            yield from finished()
            row = {"key": key}
        part = "image" if ending in ENDINGS else "text" if ending in TEXTS else "json" if ending == ".json" else None
        if part and f"{part}_at" in row:
            problems.append(f"'{key}' in '{where}' has a second {part}: '{member.name}' is left out")
        elif part:
            row |= {f"{part}_at": member.start, f"{part}_size": member.size}
    yield from finished()


def members(file: File, problems: list[str]) -> Iterator[Member]:
    """The regular files of a tar that can be trusted to be whole; what cannot be, and why, goes to `problems`.

    Raises DataError where it is no tar at all.
    """
    where, window = Path(file.path).name, _Window(file)
    at, long_name, any_header = 0, None, False
    while at + BLOCK <= file.size:
        header = window.read(at, BLOCK)
        if not header.strip(b"\0"):
            return  # the end mark
        if not _is_header(header):
            if not any_header:
                packed = header[:2] == b"\x1f\x8b" or header[:4] in (b"\x28\xb5\x2f\xfd", b"BZh9")
                remedy = "unpack it first: what is compressed cannot be read at random" if packed else "it is damaged"
                raise DataError(f"'{file.path}' is no tar: {remedy}")
            problems.append(f"'{where}' is damaged after byte {at:,}: what follows is left out")
            return
        any_header = True
        size, kind = _number(header[124:136]), header[156:157]
        start, at = at + BLOCK, at + BLOCK + -(-size // BLOCK) * BLOCK
        name = long_name or _name(header)
        if start + size > file.size:
            problems.append(f"'{where}' is cut at byte {file.size:,}, within '{name}', which is left out")
            return
        if kind in (b"L", b"x", b"X"):
            told = window.read(start, min(size, MOST_NAME))
            long_name = _text(told.rstrip(b"\0")) if kind == b"L" else _pax_path(told) or long_name
            continue
        long_name = None
        if kind not in (b"0", b"\0", b"7"):
            continue
        if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or name[1:2] == ":":
            problems.append(f"'{name}' in '{where}' points out of its tar, and is left out")
            continue
        yield Member(name.removeprefix("./"), start, size)
    problems.append(f"'{where}' is cut at byte {file.size:,}, without the mark of its end")


class _Window:
    """Small reads of a file, one after another; from a bucket they are cut out of larger ones."""

    def __init__(self, file: File) -> None:
        self.file, self.start, self.data = file, 0, b""

    def read(self, start: int, size: int) -> bytes:
        offset = start - self.start
        if offset < 0 or offset + size > len(self.data):
            ahead = AHEAD if remote.is_remote(self.file.path) else max(size, 8192)
            self.start, offset = start, 0
            self.data = remote.read(self.file.path, start, min(max(ahead, size), self.file.size - start))
        return self.data[offset : offset + size]


def _is_header(header: bytes) -> bool:
    try:
        told = int(header[148:156].strip(b"\0 ") or b"0", 8)
        _number(header[124:136])
    except ValueError:
        return False
    return told == sum(header) - sum(header[148:156]) + 8 * ord(" ")


def _number(field: bytes) -> int:
    """A size, octal, or in base 256 where that is too short."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    number = int(field.strip(b"\0 ") or b"0", 8)
    if number < 0:
        raise ValueError(field)
    return number


def _name(header: bytes) -> str:
    name = _text(header[:100].split(b"\0")[0])
    prefix = _text(header[345:500].split(b"\0")[0]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _pax_path(data: bytes) -> str | None:
    """The path in a pax header: lines of "LENGTH path=NAME"."""
    while data:
        length, space, _ = data.partition(b" ")
        if not (space and len(length) < 10 and length.isdigit() and 0 < int(length) <= len(data)):
            return None
        name, equals, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        if name == b"path" and equals:
            return _text(value)
        data = data[int(length) :]
    return None
