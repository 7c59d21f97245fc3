"""A folder of pictures, each with its captions in a .txt file of the same name, one a line."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from unclip_jax.data.listing import ListedSource, Row, listed
from unclip_jax.data.records import DataError, Record
from unclip_jax.data.remote import whole
from unclip_jax.data.texts import MOST_BYTES, lines_of

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MOST_PICTURE = 2**28  # bytes of a picture's file
MOST_TEXT = 256 * MOST_BYTES  # bytes of a file of captions; more of them are no captions


class FolderSource(ListedSource):
    """The pictures in a folder and its subfolders, in the order of their paths, which are their keys."""

    key_column = "path"

    def __init__(self, name: str, place: str, cache: Path | None = None) -> None:
        self.name, self.folder = name, os.path.abspath(os.path.expanduser(place))
        if not os.path.isdir(self.folder):
            raise DataError(f"there is no folder '{place}'")
        if not any(True for _ in _walk(self.folder)):
            raise DataError(f"'{place}' holds no pictures ({', '.join(ENDINGS)})")
        facts = hashlib.sha256(self.folder.encode(errors="surrogateescape"))
        for path, text, status in _walk(self.folder):
            facts.update(f"{path}\0{text}\0{status}\n".encode(errors="surrogateescape"))
        self.digest = facts.hexdigest()[:16]
        super().__init__(listed(self.digest, {"path": "text", "text": "text"}, self._rows, cache))

    def _rows(self, problems: list[str]) -> Iterator[Row]:
        for path, text, _ in _walk(self.folder):
            try:
                (path + text).encode()
            except UnicodeEncodeError:
                problems.append(f"the name of {path!r} is not UTF-8: rename it")
                continue
            yield {"path": path, "text": text or None}

    def __getitem__(self, index: int) -> Record:
        row = self.listing.row(index)
        path, captions = row["path"], ()
        if row["text"] is not None:
            captions = lines_of(whole(os.path.join(self.folder, row["text"]), MOST_TEXT), path)
        return Record(path, whole(os.path.join(self.folder, path), MOST_PICTURE), captions)


def _walk(folder: str) -> Iterator[tuple[str, str, str]]:
    """Every picture's path from `folder`, that of its captions or "", and sizes and times of both, in one order."""
    for place, subfolders, names in os.walk(folder):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        known = set(names)
        prefix = os.path.relpath(place, folder).replace(os.sep, "/")
        prefix = "" if prefix == "." else prefix + "/"
        for name in sorted(names):
            stem, ending = os.path.splitext(name)
            if ending.lower() not in ENDINGS or name.startswith("."):
                continue
            text = stem + ".txt" if stem + ".txt" in known else ""
            yield prefix + name, prefix + text if text else "", _status(place, name) + (_status(place, text))


def _status(place: str, name: str) -> str:
    try:
        found = os.stat(os.path.join(place, name)) if name else None
    except OSError:
        found = None  # a link to nowhere is found broken when it is read
    return f"{found.st_size} {found.st_mtime_ns} " if found else "- "
