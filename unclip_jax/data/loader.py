"""Batches by step number: record i of step s is a pure function of (config, s, i), so a position is one integer."""

from collections.abc import Callable, Iterator, Sequence
from typing import SupportsIndex

import grain
import numpy as np
from jaxtyping import Int, UInt8

from unclip_jax.config import DataConfig
from unclip_jax.data import reader
from unclip_jax.data.degrade import degrade
from unclip_jax.data.emoji import Renderer, Scene, Scenes, Split, Window, caption_words
from unclip_jax.data.reader import ENDLESS, Chosen
from unclip_jax.data.records import DataError
from unclip_jax.data.tokenizer import ClipTokenizer, kept_ids
from unclip_jax.types import Batch


def scenes_of(config: DataConfig, split: Split = "train") -> Scenes:
    """The scenes that a config describes; DataError where its source is another."""
    if config.source != "emoji":
        raise DataError(f"only emoji scenes are known before they are drawn, and the source is '{config.source}'")
    return Scenes(config.concepts, config.backgrounds, config.single_fraction, config.seed, split, config.group)


def tokenizer_of(config: DataConfig) -> ClipTokenizer:
    """The tokenizer cut down to the words of a config's scenes; the whole one for any other source."""
    if config.source != "emoji":
        return ClipTokenizer(config.context_length)
    return ClipTokenizer(config.context_length, kept_ids(caption_words(scenes_of(config))))


class EmojiSource:
    """A random-access source of training records for grain.

    A record is a dict: image uint8 [s s 3] (a random crop where the config says so), tokens int32 [n], mask bool [n],
    and for upsamplers low uint8 [k k 3], the same part of the picture, reduced and corrupted.
    redrawn: the first pictures at config.low_size as a decoder draws them; every other record is about these.
    """

    def __init__(
        self,
        config: DataConfig,
        split: Split = "train",
        tokenizer: ClipTokenizer | None = None,
        redrawn: UInt8[np.ndarray, "r k k 3"] | None = None,
    ) -> None:
        self.config = config
        self.redrawn = redrawn
        self.scenes = scenes_of(config, split)
        self.tokenizer = tokenizer or tokenizer_of(config)
        self.renderer = Renderer()

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: SupportsIndex) -> dict[str, np.ndarray]:
        index, low = int(index), None
        scene = self.scenes[index]
        if self.redrawn is not None and index % 2:
            number = index // 2 % len(self.redrawn)
            scene, low = self.scenes[number], self.redrawn[number]

        def draw(window: Window | None) -> UInt8[np.ndarray, "h w 3"]:
            return self.renderer.render(scene, self.config.size, window)

        return record(self.config, self.tokenizer, index, scene, draw, low)


def record(
    config: DataConfig,
    tokenizer: ClipTokenizer,
    index: int,
    scene: Scene,
    draw: Callable[[Window | None], UInt8[np.ndarray, "h w 3"]],
    low: UInt8[np.ndarray, "k k 3"] | None = None,
) -> dict[str, np.ndarray]:
    """The training record number `index`; `draw` gives the scene's picture, or a window of it, at config.size.

    low: the small picture to go with it, None: the large one, degraded as the config says.
    """
    tokens = tokenizer.encode([scene.caption])
    row = {"tokens": tokens.ids[0], "mask": tokens.mask[0]}
    if config.low_size is None:
        return row | {"image": draw(None)}
    rng = np.random.default_rng([config.seed, 7, index])
    factor = config.size // config.low_size
    window = None
    if config.crop is not None:
        window = _crop(rng, scene.items[int(rng.integers(len(scene.items)))], config.size, config.crop, factor)
    image = draw(window)
    if low is not None:
        x, y, side = (length // factor for length in window or Window(0, 0, config.size))
        return row | {"image": image, "low": low[y : y + side, x : x + side]}
    return row | {"image": image, "low": degrade(config.degradation, image, factor, rng)}


def _crop(rng: np.random.Generator, item: tuple, size: int, side: int, factor: int) -> Window:
    """A random crop that touches an object, aligned with the low-resolution grid."""
    _, extent, x, y = item
    scale = size // 64
    corner = []
    for start in (x, y):
        centre = start * scale + int(rng.integers(extent * scale))
        corner.append(int(np.clip(centre - side // 2, 0, size - side)) // factor * factor)
    return Window(corner[0], corner[1], side)


class _Rows:
    """Some rows of every batch of a source, those of one batch after those of the one before."""

    def __init__(self, source: EmojiSource, batch: int, rows: Int[np.ndarray, " r"]) -> None:
        self.source, self.batch, self.rows = source, batch, rows

    def __len__(self) -> int:
        return len(self.source) // self.batch * len(self.rows)

    def __getitem__(self, index: SupportsIndex) -> dict[str, np.ndarray]:
        step, place = divmod(int(index), len(self.rows))
        return self.source[step * self.batch + int(self.rows[place])]


def _stack(records: Sequence[dict[str, np.ndarray]]) -> Batch:
    columns = {name: np.stack([record[name] for record in records]) for name in records[0]}
    return Batch(columns["image"], columns["tokens"], columns["mask"], columns.get("low"))  # type: ignore[arg-type]


def batches(
    config: DataConfig,
    *,
    start: int = 0,
    split: Split = "train",
    tokenizer: ClipTokenizer | None = None,
    threads: int = 1,
    buffer: int = 4,
    rows: Int[np.ndarray, " r"] | None = None,
    redrawn: UInt8[np.ndarray, "r k k 3"] | None = None,
    chosen: Chosen | None = None,
    pictures: bool = True,
) -> Iterator[Batch]:
    """Batches of a config from step `start` on, as numpy arrays, read ahead by threads, and by processes from files.

    rows: those of every batch that this host reads (`sharding.host_rows`), None: all of them. redrawn: see EmojiSource.
    chosen, pictures: of sources other than emoji, what `reader.choose` gave, and whether to read the pictures.
    """
    if config.source != "emoji":
        tokenizer, chosen = tokenizer or tokenizer_of(config), chosen or reader.choose(config)
        return reader.read(config, chosen, tokenizer, start=start, rows=rows, pictures=pictures)
    rows = np.arange(config.batch_size) if rows is None else rows
    data = grain.MapDataset.source(_Rows(EmojiSource(config, split, tokenizer, redrawn), config.batch_size, rows))
    data = data.batch(len(rows), batch_fn=_stack)[start:]
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffer)
    return iter(data.to_iter_dataset(options))
