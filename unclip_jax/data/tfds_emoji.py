"""Emoji scenes as a tensorflow-datasets builder: files of array_record, written and read without TensorFlow."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8
from PIL import Image

from unclip_jax.config import DataConfig
from unclip_jax.data.emoji import Item, Renderer, Scene, Scenes, Split, Window
from unclip_jax.data.loader import record, tokenizer_of
from unclip_jax.data.tokenizer import ClipTokenizer
from unclip_jax.data.vocabulary import SHIPPED, Concept, concept

LICENSE = "CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/)"
CITATION = (
    "All emojis designed by OpenMoji – the open-source emoji and icon project. License: CC BY-SA 4.0. "
    "Pictures rendered from its artwork are adaptations under the same licence."
)


@dataclass(eq=False, kw_only=True)
class EmojiScenesConfig(tfds.core.BuilderConfig):
    """Which scenes are written: pictures of `size` px, so many examples per split, and what Scenes draws from.

    A config is stored under its name, so another choice of scenes needs another name.
    """

    size: int = 64
    train: int = 10_000
    held_out: int = 1_000
    concepts: tuple[str, ...] = ()
    backgrounds: tuple[str, ...] = ()
    single_fraction: float = 0.4
    seed: int = 0


def _config(size: int) -> EmojiScenesConfig:
    return EmojiScenesConfig(name=f"{size}px", description=f"Scenes at {size} x {size} pixels.", size=size)


class EmojiScenes(tfds.core.GeneratorBasedBuilder):
    """Captioned pictures composed from OpenMoji's artwork; example i of a split is scene i of that split.

    Splits: train, and held_out, of which every scene holds a combination that train never shows. Features: index,
    image uint8 [size size 3], caption, background, relation ("" with one item), and items, whose lengths are in 64ths
    of the picture (see Item).
    """

    VERSION = tfds.core.Version("1.0.0")
    # The inherited one needs `importlib_resources`, which tensorflow-datasets does not install.
    code_path = tfds.core.Path(__file__)
    BUILDER_CONFIGS = [_config(64), _config(256), _config(1024)]

    def __init__(self, *, file_format: str = "array_record", **options: Any) -> None:
        super().__init__(file_format=file_format, **options)

    @property
    def settings(self) -> EmojiScenesConfig:
        """The builder's config, which is one of this file's."""
        assert isinstance(self.builder_config, EmojiScenesConfig)
        return self.builder_config

    def _info(self) -> tfds.core.DatasetInfo:
        text, number, size = tfds.features.Text(), np.int32, self.settings.size
        features = tfds.features.FeaturesDict(
            {
                "index": np.int64,
                "image": tfds.features.Image(shape=(size, size, 3), encoding_format="png"),
                "caption": text,
                "background": text,
                "relation": text,
                "items": tfds.features.Sequence(
                    {"name": text, "hexcode": text, "side": number, "x": number, "y": number}
                ),
            }
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description="Captioned scenes of one or two emojis on a coloured background, exact at 64, 256 and 1024 px.",
            features=features,
            homepage="https://openmoji.org",
            citation=CITATION,
            license=LICENSE,
            disable_shuffling=True,  # example i stays scene i
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        config = self.settings
        splits: dict[Split, int] = {"train": config.train, "held_out": config.held_out}
        return {split: self._generate_examples(split, examples) for split, examples in splits.items()}

    def _generate_examples(self, split: Split, examples: int) -> Iterator[tuple[int, dict[str, Any]]]:
        config = self.settings
        scenes = Scenes(config.concepts, config.backgrounds, config.single_fraction, config.seed, split)
        renderer = Renderer()
        for index in range(examples):
            scene = scenes[index]
            yield (
                index,
                {
                    "index": index,
                    "image": _png(renderer.render(scene, config.size)),
                    "caption": scene.caption,
                    "background": scene.background,
                    "relation": scene.relation or "",
                    "items": [
                        {
                            "name": item.concept.name,
                            "hexcode": item.concept.hexcode,
                            "side": item.side,
                            "x": item.x,
                            "y": item.y,
                        }
                        for item in scene.items
                    ],
                },
            )


def _png(picture: UInt8[np.ndarray, "h w 3"]) -> io.BytesIO:
    """An encoded picture: given an array, tensorflow-datasets would encode it with TensorFlow."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    buffer.seek(0)
    return buffer


def read_example(example: dict[str, Any]) -> tuple[Scene, UInt8[np.ndarray, "h w 3"]]:
    """The scene and the picture of a stored example."""
    items = example["items"]
    columns = zip(items["name"], items["hexcode"], items["side"], items["x"], items["y"], strict=True)
    placed = tuple(
        Item(_concept(name.decode(), hexcode.decode()), int(side), int(x), int(y))
        for name, hexcode, side, x, y in columns
    )
    background, relation, caption = (example[name].decode() for name in ("background", "relation", "caption"))
    return Scene(placed, background, relation or None, caption), example["image"]


def _concept(name: str, hexcode: str) -> Concept:
    """The shipped concept of a name where that draws this hexcode, else OpenMoji's own."""
    return concept(name) if name in SHIPPED and SHIPPED[name][0] == hexcode else concept(hexcode)


class StoredScenes:
    """A random-access source of training records for grain, like EmojiSource, from the files of one split.

    examples: what `as_data_source` gives. Record i equals EmojiSource's bit for bit where the configs agree.
    Raises ValueError where the stored pictures are of another size than the config's.
    """

    def __init__(self, examples: Any, config: DataConfig, tokenizer: ClipTokenizer) -> None:
        self.examples, self.config, self.tokenizer = examples, config, tokenizer
        stored = len(examples[0]["image"])
        if stored != config.size:
            raise ValueError(f"these files hold pictures of {stored} px, the config reads {config.size} px")

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: SupportsIndex) -> dict[str, np.ndarray]:
        scene, picture = read_example(self.examples[int(index)])

        def draw(window: Window | None) -> UInt8[np.ndarray, "h w 3"]:
            left, top, side = window or Window(0, 0, self.config.size)
            return picture[top : top + side, left : left + side]

        return record(self.config, self.tokenizer, int(index), scene, draw)


def data_source(
    folder: str | Path, config: DataConfig, split: Split = "train", tokenizer: ClipTokenizer | None = None
) -> StoredScenes:
    """The training records of a prepared dataset, for `grain.MapDataset.source`.

    folder: the builder's `data_dir`. tokenizer: by default that of the config's captions.
    """
    builder: Any = tfds.builder_from_directory(str(folder))
    return StoredScenes(builder.as_data_source(split), config, tokenizer or tokenizer_of(config))
