"""Sources of captioned pictures: what a record is, and which source a spec such as `folder:PATH` names."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable
from urllib.parse import parse_qsl

import numpy as np

LONGEST_CAPTION = 10_000  # characters; the tokenizer reads no more

SPECS = """folder:PATH, table:PATH.csv|.jsonl|.parquet, tar:PATH/*.tar, tfds:NAME:SPLIT, hf:PATH, stored:PATH, emoji,
or mix:0.7*SPEC,0.3*SPEC"""

OPTIONS: dict[str, tuple[str, ...]] = {
    "folder": (),
    "table": ("image", "caption", "key"),
    "tar": (),
    "tfds": ("image", "caption", "data_dir"),
    "hf": ("image", "caption", "split"),
    "stored": ("pictures",),
    "mix": (),
    "emoji": ("size", "count", "seed"),
}


class DataError(RuntimeError):
    """A source that cannot be used; its text is one sentence that says what is wrong and what to do."""


class Broken(ValueError):
    """A record that cannot be used, where others can; its text names the record."""


class Record(NamedTuple):
    """One picture of a source.

    key: its name, unique in the source. image: the file's bytes as they are stored, or uint8 [h w 3]. captions: none
    where there is none. embedding: float32 [z], CLIP's, where the source stores it.
    """

    key: str
    image: bytes | np.ndarray
    captions: tuple[str, ...]
    embedding: np.ndarray | None = None


@runtime_checkable
class Source(Protocol):
    """A random-access sequence of records, which worker processes get as a pickle of a few hundred bytes.

    name: the spec. digest: changes with the list of records. problems: sentences on what the source's files hold and
    the sequence leaves out.
    """

    name: str
    digest: str
    problems: tuple[str, ...]

    def __len__(self) -> int:
        """Number of records."""
        ...

    def __getitem__(self, index: int) -> Record:
        """Record number `index`; raises Broken where it cannot be read."""
        ...

    def key(self, index: int) -> str:
        """The key of a record, without reading it."""
        ...


class Spec(NamedTuple):
    """A spec in parts, such as `tfds:NAME:SPLIT?image=picture`: kind, what follows the colon, and options."""

    kind: str
    place: str
    options: Mapping[str, str]


def parse(spec: str) -> Spec:
    """The parts of a spec; DataError where it has none."""
    kind, colon, place = spec.partition(":")
    options: dict[str, str] = {}
    if found := re.search(r"\?(\w+=[^?]*)$", spec if kind != "mix" else ""):
        options = dict(parse_qsl(found[1]))
        kind, colon, place = spec[: found.start()].partition(":")
    if kind != "emoji" and not (colon and place):
        raise DataError(f"'{spec}' is no source of pictures: there are {' '.join(SPECS.split())}")
    return Spec(kind, place, options)


def open_source(spec: str, *, cache: Path | None = None) -> Source:
    """The source that a spec names.

    cache: folder of what is found out once per source (lists of files, offsets in tars); by default the user's.
    Raises DataError where there is no such source.
    """
    from unclip_jax.data import datasets, folders, mixtures, scenes, stored, tables, tars

    kind, place, options = parse(spec)
    if kind not in OPTIONS:
        raise DataError(f"no source is called '{kind}': there are {' '.join(SPECS.split())}")
    if unknown := sorted(set(options) - set(OPTIONS[kind])):
        raise DataError(f"'{kind}:' has no option '{unknown[0]}'; it has {', '.join(OPTIONS[kind]) or 'none'}")
    match kind:
        case "folder":
            source = folders.FolderSource(spec, place, cache)
        case "table":
            source = tables.TableSource(spec, place, options, cache)
        case "tar":
            source = tars.TarSource(spec, place, cache)
        case "tfds":
            source = datasets.TfdsSource(spec, place, **options)
        case "hf":
            source = datasets.HubSource(spec, place, **options)
        case "stored":
            source = stored.StoredSource(spec, place, options.get("pictures", ""), cache)
        case "mix":
            source = mixtures.open_mixture(spec, cache)
        case _:
            source = scenes.SceneSource(spec, **options)
    if not len(source):
        raise DataError(f"'{spec}' holds no pictures{'; ' + source.problems[0] if source.problems else ''}")
    return source
