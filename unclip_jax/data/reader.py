"""Rows of training from any source: which record, which caption, which part of the picture, each a function of its row.

A broken record is replaced by the one that the order names next for the row (attempts 1, 2, ...), so that what a row
shows does not depend on who reads it.
"""

import multiprocessing
import os
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

import grain
import numpy as np
from absl import flags
from jaxtyping import Float, Int, UInt8

from unclip_jax.config import DataConfig
from unclip_jax.data.decode import at_size
from unclip_jax.data.degrade import degrade
from unclip_jax.data.mixtures import Mixture, Subset, without
from unclip_jax.data.order import Order, make_order
from unclip_jax.data.records import Broken, DataError, Record, Source, open_source
from unclip_jax.data.stored import StoredSource
from unclip_jax.data.tokenizer import TextTokenizer
from unclip_jax.data.weights import read_weights
from unclip_jax.types import Batch

ENDLESS = 2**40  # records; more than any run reads
ATTEMPTS = 16  # records that are tried for one row
FIRST = 1000  # rows before a share of broken ones counts
NAMED = 20  # broken records that are named, the others are counted
MOST_WORKERS = 16
BLANK = np.zeros((1, 1, 3), np.uint8)


class DataWarning(UserWarning):
    """What is wrong with single records, or with many captions."""


class Chosen(NamedTuple):
    """What a config trains on: a source, and the order in which its records come."""

    source: Source
    order: Order


class Row(NamedTuple):
    """One row: `problems` are the broken records that it stands in for, `cut` tells that its caption was too long."""

    image: UInt8[np.ndarray, "h w 3"]
    tokens: Int[np.ndarray, " n"]
    mask: np.ndarray
    low: UInt8[np.ndarray, "k k 3"] | None
    embedding: Float[np.ndarray, " z"] | None
    problems: str
    cut: bool


def choose(config: DataConfig, cache: Path | None = None) -> Chosen:
    """Opens a config's source, less what it skips, with its weights; DataError where that cannot be done."""
    source = open_source(config.source, cache=cache)
    weights = None if config.weights is None else read_weights(config.weights, source)
    if config.skip is not None:
        source, kept = without(source, config.skip)
        weights = None if weights is None else weights[kept]
    if isinstance(source, Mixture):
        sizes = tuple(len(part) for part in source.parts)
        return Chosen(source, make_order(config.seed, sizes, source.shares, weights))
    return Chosen(source, make_order(config.seed, (len(source),), weights=weights))


def _parts(source: Source) -> Iterator[Source]:
    match source:
        case Mixture():
            for part in source.parts:
                yield from _parts(part)
        case Subset():
            yield from _parts(source.source)
        case _:
            yield source


def stores_embeddings(source: Source) -> bool:
    """Whether all of a source's records have embeddings."""
    return all(isinstance(part, StoredSource) for part in _parts(source))


def check_clip(source: Source, clip: str) -> None:
    """Raises DataError where a source's embeddings are not of the CLIP of this digest."""
    for part in _parts(source):
        if isinstance(part, StoredSource) and part.clip != clip:
            raise DataError(
                f"'{part.name}' holds embeddings of another CLIP ({part.clip[:12]}) than the one that this trains on "
                f"({clip[:12]}): embed the source with this one"
            )


class Rows:
    """Some rows of every batch, those of one batch after those of the one before, for grain."""

    def __init__(
        self,
        config: DataConfig,
        chosen: Chosen,
        tokenizer: TextTokenizer,
        rows: Int[np.ndarray, " r"],
        pictures: bool = True,
    ) -> None:
        self.config, self.chosen, self.tokenizer, self.rows, self.pictures = config, chosen, tokenizer, rows, pictures

    def __len__(self) -> int:
        return ENDLESS // self.config.batch_size * len(self.rows)

    def __getitem__(self, index: SupportsIndex) -> Row:
        step, place = divmod(int(index), len(self.rows))
        return self.row(step * self.config.batch_size + int(self.rows[place]))

    def row(self, number: int) -> Row:
        """Row number `number` of the run; DataError where none of ATTEMPTS records can be used."""
        problems: list[str] = []
        for attempt in range(ATTEMPTS):
            index = self.chosen.order(number, attempt)
            try:
                return self._row(number, self.chosen.source[index])._replace(problems="\n".join(problems))
            except Broken as error:
                problems.append(str(error))
        raise DataError(
            f"row {number} found {ATTEMPTS} broken records one after another: {problems[0]}; look at the source with "
            f"unclip data check '{self.config.source}'"
        )

    def _row(self, number: int, record: Record) -> Row:
        config, low = self.config, None
        rng = np.random.default_rng([config.seed, 7, number])
        tokens = self.tokenizer.encode([self._caption(rng, record)])
        image = at_size(record.image, config.size, record.key) if self.pictures else BLANK
        if self.pictures and config.low_size is not None:
            factor = config.size // config.low_size
            if config.crop is not None:
                top, left = (int(rng.integers((config.size - config.crop) // factor + 1)) * factor for _ in range(2))
                image = image[top : top + config.crop, left : left + config.crop]
            low = degrade(config.degradation, image, factor, rng)
        return Row(image, tokens.ids[0], tokens.mask[0], low, record.embedding, "", bool(tokens.cut[0]))

    def _caption(self, rng: np.random.Generator, record: Record) -> str:
        """One of a record's captions, in one of the templates; the empty one where it is dropped."""
        config = self.config
        if not record.captions and config.uncaptioned == "skip":
            raise Broken(f"'{record.key}' has no caption (--data.uncaptioned empty would use it)")
        which, how, dropped = rng.random(3)
        if not record.captions or dropped < config.caption_drop:
            return ""
        caption = record.captions[int(which * len(record.captions))]
        return (
            config.templates[int(how * len(config.templates))].replace("{}", caption) if config.templates else caption
        )


class Stack(NamedTuple):
    """A batch and what its rows said."""

    batch: Batch
    problems: tuple[str, ...]
    cut: int


def stack(rows: Sequence[Row]) -> Stack:
    """Rows as a batch."""
    columns: dict[str, Any] = {}
    for name in Batch._fields:
        column = [getattr(row, name) for row in rows]
        absent = [value is None for value in column]
        if any(absent) and not all(absent):
            raise DataError("some sources of the mixture store embeddings and some do not: embed all of them, or none")
        columns[name] = None if absent[0] else np.stack(column)
    return Stack(Batch(**columns), tuple(row.problems for row in rows if row.problems), sum(row.cut for row in rows))


class Tally:
    """Counts what rows said, warns of it, and stops where it is too much."""

    def __init__(self, config: DataConfig) -> None:
        self.config, self.rows, self.broken, self.cut, self.said = config, 0, 0, 0, False

    def add(self, stack: Stack) -> None:
        """Counts one batch; DataError where more than a share of max_broken of the rows had to be replaced."""
        self.rows += len(stack.batch.tokens)
        self.cut += stack.cut
        for problem in (line for lines in stack.problems for line in lines.split("\n")):
            self.broken += 1
            if self.broken <= NAMED:
                more = "; further ones are only counted" if self.broken == NAMED else ""
                warnings.warn(f"{problem}: another record takes its place{more}", DataWarning, stacklevel=3)
            if self.broken > self.config.max_broken * max(self.rows, FIRST):
                raise DataError(
                    f"{self.broken:,} broken records in {self.rows:,} rows are more than --data.max-broken "
                    f"{self.config.max_broken:g} allows; the last: {problem}; list them with unclip data check "
                    f"'{self.config.source}' --fix LIST, and leave them out with --data.skip LIST"
                )
        if not self.said and self.rows >= FIRST and self.cut > 0.01 * self.rows:
            self.said = True
            warnings.warn(
                f"{self.cut / self.rows:.0%} of the captions are longer than --data.context-length "
                f"{self.config.context_length} tokens, and are cut",
                DataWarning,
                stacklevel=3,
            )


def workers_of(config: DataConfig) -> int:
    """How many processes read."""
    return min(MOST_WORKERS, (os.cpu_count() or 2) // 2) if config.workers is None else config.workers


def read(
    config: DataConfig,
    chosen: Chosen,
    tokenizer: TextTokenizer,
    *,
    start: int = 0,
    threads: int | None = None,
    buffer: int = 2,
    rows: Int[np.ndarray, " r"] | None = None,
    pictures: bool = True,
) -> Iterator[Batch]:
    """Endless batches from step `start` on, as numpy arrays, read ahead by config.workers processes.

    threads: of each process, by default 1, or 2 where there are no processes but this one. buffer: batches that each
    has ready. rows: those of every batch that this host reads. pictures: whether to read them at all. Raises DataError
    where too many records are broken, or a bucket cannot be reached.
    """
    rows = np.arange(config.batch_size) if rows is None else rows
    data = grain.MapDataset.source(Rows(config, chosen, tokenizer, rows, pictures))  # type: ignore[arg-type]
    data = data.batch(len(rows), batch_fn=stack)[start:]
    workers = workers_of(config)
    threads = threads or (1 if workers else 2)
    dataset = data.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(buffer, threads)))
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain asks absl whether to measure its workers
        # Batches that were ready when the iterator was closed are freed at exit, which is nothing to warn of.
        sys.warnoptions.append("ignore::UserWarning:multiprocessing.resource_tracker")
        processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
        dataset = dataset.mp_prefetch(processes, worker_init_fn=_end_with_parent)
    iterator, tally = iter(dataset), Tally(config)
    try:
        for found in iterator:
            tally.add(found)
            batch, found = found.batch, None
            # What comes from a process lies in memory that it shares, and goes back with the last view of it.
            yield Batch(*map(_own, batch)) if workers else batch
    finally:
        if workers:
            iterator.close()  # type: ignore[attr-defined]


def _end_with_parent(*_: int) -> None:
    """Ends this process with the one that started it, which may be killed before it can say so."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch(sentinel: int) -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, args=(parent.sentinel,), daemon=True).start()


def _own(column: Any) -> Any:
    return None if column is None else np.array(column)
