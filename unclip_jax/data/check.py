"""What training will see of a source: sizes, captions and their tokens, duplicates, and what is broken, by name."""

import hashlib
import io
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from unclip_jax.checkpoint.writing import replacing
from unclip_jax.data.decode import at_size, decode
from unclip_jax.data.order import permuted
from unclip_jax.data.records import LONGEST_CAPTION, Broken, Source
from unclip_jax.data.tokenizer import TextTokenizer
from unclip_jax.pictures import FORMATS

SHOWN = 10  # names of each kind in a report
AHEAD = 64  # records that are being read at once
SHEET = 24  # pictures on a sheet


class Found(NamedTuple):
    """One record as it was read.

    size: height and width in px. tokens: of every caption. cut: captions that are too long. picture, whole: digests of
    the picture as stored, and of it with its captions.
    """

    index: int
    key: str
    problem: str | None
    size: tuple[int, int] = (0, 0)
    format: str = ""
    captions: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()
    cut: int = 0
    picture: bytes = b""
    whole: bytes = b""


@dataclass
class Survey:
    """What was found in a source; lists hold (key, sentence), counters count captions or pictures."""

    name: str
    records: int
    read: int = 0
    size: int = 64
    context_length: int = 77
    problems: tuple[str, ...] = ()
    broken: list[tuple[str, str]] = field(default_factory=list)
    copies: list[tuple[str, str]] = field(default_factory=list)  # of picture and captions
    same_picture: int = 0
    sides: Counter[int] = field(default_factory=Counter)  # px of the shorter side
    formats: Counter[str] = field(default_factory=Counter)
    captions: Counter[int] = field(default_factory=Counter)  # per picture
    characters: Counter[int] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)
    scripts: Counter[str] = field(default_factory=Counter)
    cut: int = 0
    shown: list[int] = field(default_factory=list)


def survey(
    source: Source, tokenizer: TextTokenizer, size: int = 64, sample: int | None = None, empty: bool = False
) -> Survey:
    """Reads and decodes a source, or `sample` of its records spread over it.

    size: side in px that training would have. empty: whether pictures without a caption are fine.
    """
    number = len(source) if sample is None else min(sample, len(source))
    chosen = range(number) if number == len(source) else sorted(permuted(i, len(source), 1) for i in range(number))
    result = Survey(source.name, len(source), 0, size, tokenizer.context_length, source.problems)
    first: dict[bytes, str] = {}
    every = max(1, number // SHEET)
    for found in _ahead(source, tokenizer, iter(chosen), empty):
        result.read += 1
        if found.problem is not None:
            result.broken.append((found.key, found.problem))
            continue
        if found.whole in first:
            result.copies.append((found.key, f"the same picture and captions as '{first[found.whole]}'"))
        result.same_picture += found.picture in first
        first.setdefault(found.whole, found.key)
        first.setdefault(found.picture, found.key)
        result.sides[min(found.size)] += 1
        result.formats[found.format] += 1
        result.captions[len(found.captions)] += 1
        result.cut += found.cut
        result.tokens.update(found.tokens)
        result.characters.update(map(len, found.captions))
        result.scripts.update(map(script_of, found.captions))
        if (result.read - 1) % every == 0 and len(result.shown) < SHEET:
            result.shown.append(found.index)
    return result


def _ahead(source: Source, tokenizer: TextTokenizer, chosen: Iterator[int], empty: bool) -> Iterator[Found]:
    """Records in order, some of which are being read while one is used."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting: list[Future[Found]] = []
        while True:
            waiting += [pool.submit(look, source, tokenizer, i, empty) for i in islice(chosen, AHEAD - len(waiting))]
            if not waiting:
                return
            yield waiting.pop(0).result()


def look(source: Source, tokenizer: TextTokenizer, index: int, empty: bool = False) -> Found:
    """One record, read and decoded as a whole."""
    key = source.key(index)
    try:
        record = source[index]
        if not record.captions and not empty:
            raise Broken(f"'{key}' has no caption")
        height, width, _ = decode(record.image, name=key).shape
    except Broken as error:
        return Found(index, key, str(error))
    kind = "array" if isinstance(record.image, np.ndarray) else _format(record.image)
    tokens = tokenizer.encode(list(record.captions)) if record.captions else None
    data = record.image.tobytes() if isinstance(record.image, np.ndarray) else record.image
    picture = hashlib.sha256(data).digest()[:16]
    whole = hashlib.sha256(picture + "\n".join(record.captions).encode()).digest()[:16]
    lengths = () if tokens is None else tuple(int(row.sum()) for row in tokens.mask)
    cut = 0 if tokens is None else int(tokens.cut.sum())
    return Found(index, key, None, (height, width), kind, record.captions, lengths, cut, picture, whole)


def _format(data: bytes) -> str:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        return image.format or "?"


def script_of(text: str) -> str:
    """The script that most letters of a text are in, such as Latin, CJK or Cyrillic; "none" without letters."""
    letters = Counter(unicodedata.name(c, "?").split()[0] for c in text[:1000] if c.isalpha())
    return letters.most_common(1)[0][0].capitalize().replace("Cjk", "CJK") if letters else "none"


def report(found: Survey) -> list[str]:
    """A survey as lines of text."""
    fine = found.read - len(found.broken)
    part = "all read" if found.read == found.records else f"{found.read:,} of them read"
    lines = [f"{found.name}: {found.records:,} records, {part}, {fine:,} fine"]
    if fine:
        small = sum(n for side, n in found.sides.items() if side < found.size)
        kinds = ", ".join(f"{kind} {n:,}" for kind, n in found.formats.most_common())
        lines += [
            f"pictures    {kinds}; shorter side {_spread(found.sides)} px; {small:,} below {found.size} px",
            f"captions    {_spread(found.captions)} per picture; {_spread(found.characters)} characters; "
            f"{_spread(found.tokens)} tokens; {found.cut:,} longer than {found.context_length} tokens, and cut",
        ]
        if long := sum(n for length, n in found.characters.items() if length > LONGEST_CAPTION):
            lines.append(
                f"            {long:,} longer than {LONGEST_CAPTION:,} characters, of which the rest is not read"
            )
        total = sum(found.scripts.values())
        lines.append("scripts     " + ", ".join(f"{k} {n / total:.1%}" for k, n in found.scripts.most_common(6)))
        lines.append(
            f"duplicates  {found.same_picture:,} pictures are copies, {len(found.copies):,} with their captions"
        )
        lines += [f"            '{key}' has {why}" for key, why in found.copies[:SHOWN]] + _rest(found.copies)
    if found.problems:
        lines.append(f"left out    {len(found.problems):,}, before any record is read")
        lines += [f"            {problem}" for problem in found.problems[:SHOWN]] + _rest(found.problems)
    lines.append(f"broken      {len(found.broken):,} ({len(found.broken) / max(found.read, 1):.2%})")
    return lines + [f"            {why}" for _, why in found.broken[:SHOWN]] + _rest(found.broken)


def _rest(things: list[tuple[str, str]] | tuple[str, ...]) -> list[str]:
    return [f"            and {len(things) - SHOWN:,} more"] if len(things) > SHOWN else []


def _spread(counts: Counter[int]) -> str:
    """Smallest, middle and largest of some counted numbers."""
    if not counts:
        return "no"
    values, middle, seen = sorted(counts), sum(counts.values()) / 2, 0
    for value in values:
        seen += counts[value]
        if seen >= middle:
            break
    return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,} to {values[-1]:,} (median {value:,})"


def write_list(found: Survey, path: Path) -> int:
    """Writes the keys of broken records and of copies, each with the reason; returns how many."""
    lines = [f"{key}\t{why}" for key, why in [*found.broken, *found.copies]]
    with replacing(path) as temporary:
        head = f"# what training on {found.name} leaves out with --data.skip; {found.read:,} records were read\n"
        temporary.write_text(head + "".join(" ".join(line.split("\n")) + "\n" for line in lines), encoding="utf-8")
    return len(lines)


def sheet(source: Source, tokenizer: TextTokenizer, found: Survey, path: Path) -> None:
    """Writes a PNG of pictures as training has them, each above its first caption as decoded from its tokens."""
    from unclip_jax.data.sheets import contact_sheet

    pictures, captions = [], []
    for index in found.shown:
        record = source[index]
        pictures.append(at_size(record.image, found.size, record.key))
        text = record.captions[0] if record.captions else ""
        captions.append(tokenizer.encode([text]).ids[0])
    with replacing(path) as temporary:
        Image.fromarray(contact_sheet(pictures, captions)).save(temporary, "PNG")
