"""Captions as they are found, in files and tables, made into texts, or refused by the record's name."""

import unicodedata
from collections.abc import Iterable
from typing import Any

from unclip_jax.data.records import LONGEST_CAPTION, Broken

MOST_BYTES = 4 * LONGEST_CAPTION  # of a caption, in UTF-8


def text_of(value: Any, key: str) -> str:
    """One caption from a text, or from bytes in UTF-8, cut to LONGEST_CAPTION; Broken where the bytes are not UTF-8."""
    if isinstance(value, bytes):
        cut = value[:MOST_BYTES]
        try:
            value = cut.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            # A character may be torn where the caption was cut.
            if len(cut) == len(value) or error.start < len(cut) - 3:
                raise Broken(f"the caption of '{key}' is not UTF-8 (byte {error.start})") from None
            value = cut[: error.start].decode("utf-8-sig")
    text = str(value)[: LONGEST_CAPTION + 1]
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise Broken(f"the caption of '{key}' is not UTF-8")
    return " ".join("".join(" " if unicodedata.category(c) == "Cc" else c for c in text).split())


def lines_of(data: bytes, key: str) -> tuple[str, ...]:
    """The captions of a text file, one a line; a line beyond the file's first MOST_BYTES is not read."""
    if len(data) > MOST_BYTES:
        head = data[:MOST_BYTES]
        data = head[: head.rindex(b"\n")] if b"\n" in head else data
    return texts_of(data.removeprefix(b"\xef\xbb\xbf").splitlines(), key)


def texts_of(value: Any, key: str) -> tuple[str, ...]:
    """The captions of a table's cell: a text, a list of texts, or nothing."""
    if value is None or isinstance(value, float) and value != value:
        return ()
    several = value if isinstance(value, Iterable) and not isinstance(value, str | bytes) else (value,)
    found = (text_of(item, key) for item in several if item is not None)
    return tuple(text for text in found if text)
