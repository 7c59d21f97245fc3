"""The real pictures and captions that a cascade is measured on: held-out emoji scenes, or any captioned source."""

from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from unclip_jax.cascade import Cascade
from unclip_jax.data.decode import at_size
from unclip_jax.data.degrade import area_downsample
from unclip_jax.data.emoji import UNIT, Renderer, Scene, Scenes
from unclip_jax.data.listing import digest_of
from unclip_jax.data.records import Broken, open_source
from unclip_jax.data.vocabulary import concepts

HELD_OUT, TRAINED = "held-out", "training"  # sources: scenes of what the cascade was trained on


class Pairs(NamedTuple):
    """Captioned pictures. digest: of the source and of which of its records. scenes: of emoji sources alone."""

    name: str
    digest: str
    captions: tuple[str, ...]
    pictures: UInt8[np.ndarray, "n h w 3"]
    scenes: tuple[Scene, ...] = ()

    @property
    def size(self) -> int:
        """Side of the pictures in px."""
        return self.pictures.shape[1]

    def part(self, rows: slice) -> "Pairs":
        """Some of them."""
        digest = digest_of(self.digest, rows)
        return Pairs(self.name, digest, self.captions[rows], self.pictures[rows], self.scenes[rows])


def read_pairs(cascade: Cascade, spec: str, count: int, size: int, first: int = 0, objects: int = 2) -> Pairs:
    """The first `count` captioned pictures of a source at size x size px, after `first` of them.

    spec: held-out, training, or that of any source. Of other sources broken records, and those without a caption, are
    left out. objects: in the scenes. Raises ValueError or DataError where there is no such source, or nothing in it.
    """
    if spec in (HELD_OUT, TRAINED):
        return _scenes(cascade, spec, count, size, first, objects)
    source, captions, pictures = open_source(spec), [], []
    bar = tqdm(total=count, desc=f"reading {spec}", unit="picture", dynamic_ncols=True, disable=None)
    left = first
    with bar:
        for index in range(len(source)):
            try:
                record = source[index]
                caption = next((text for text in record.captions if text.strip()), "")
                if not caption:
                    continue
                picture = at_size(record.image, size, record.key)
            except Broken:
                continue
            if left:
                left -= 1
                continue
            captions.append(caption)
            pictures.append(picture)
            bar.update()
            if len(pictures) == count:
                break
    if not pictures:
        raise ValueError(
            f"'{spec}' holds no {'further ' if first else ''}picture with a caption: there is nothing to measure"
        )
    digest = digest_of(source.digest, first, count, size)
    return Pairs(spec, digest, tuple(captions), np.stack(pictures))


def _scenes(cascade: Cascade, spec: str, count: int, size: int, first: int, objects: int) -> Pairs:
    known = tuple(concept.name for concept in concepts(tuple(cascade.clip.extra.get("concepts", ()))))
    split = "held_out" if spec == HELD_OUT else "train"
    single = 2.0 - objects if spec == HELD_OUT else Scenes.single_fraction
    source, renderer = Scenes(known, single_fraction=single, split=split), Renderer()
    scenes = tuple(source[index] for index in range(first, first + count))
    side = max(size // UNIT, 1) * UNIT
    pictures = np.stack([renderer.render(scene, side) for scene in scenes])
    if size != side:
        pictures = np.stack([at_size(picture, size) for picture in pictures])
    digest = digest_of(spec, known, single, first, count, size, objects)
    return Pairs(spec, digest, tuple(scene.caption for scene in scenes), pictures, scenes)


def reduced(pictures: UInt8[np.ndarray, "n h w 3"], side: int = UNIT) -> UInt8[np.ndarray, "n s s 3"]:
    """Pictures reduced by area to `side` px, or to a little more where that does not divide them."""
    factor = max(size for size in range(1, max(pictures.shape[1] // side, 1) + 1) if pictures.shape[1] % size == 0)
    return area_downsample(pictures, factor)
