"""Emoji scenes as a source like any other: for mixtures, and to write them out."""

from unclip_jax.data.emoji import Renderer, Scenes
from unclip_jax.data.records import DataError, Record

COUNT = 100_000


class SceneSource:
    """The first `count` training scenes of the shipped vocabulary, drawn at `size` pixels."""

    problems: tuple[str, ...] = ()

    def __init__(self, name: str, size: str = "64", count: str = str(COUNT), seed: str = "0") -> None:
        if not all(text.isdecimal() for text in (size, count, seed)) or int(size) % 64 or not int(size):
            raise DataError(f"'{name}': size is a multiple of 64, count and seed are numbers")
        self.name, self.size, self.count = name, int(size), int(count)
        self.digest = f"scenes-{size}-{count}-{seed}"
        self.scenes = Scenes(seed=int(seed))
        self.renderer = Renderer()

    def __reduce__(self) -> tuple:
        return SceneSource, (self.name, str(self.size), str(self.count), str(self.scenes.seed))

    def __len__(self) -> int:
        return self.count

    def key(self, index: int) -> str:
        """The number of a scene."""
        return f"scene {index}"

    def __getitem__(self, index: int) -> Record:
        scene = self.scenes[index]
        return Record(self.key(index), self.renderer.render(scene, self.size), (scene.caption,))
