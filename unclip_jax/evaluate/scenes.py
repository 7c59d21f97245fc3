"""Scores pictures of emoji scenes by template matching: it knows the exact drawings and no trained network.

A picture is compared with every drawing of the vocabulary, at every size and whole-pixel place, on the background
colour that its border shows. With D the picture less that colour b, and T = alpha (colour - b) the drawing less it,

    sum (picture - (b + T))^2 = sum D^2 + sum (T^2 - 2 D T)                                                      (1)

over the whole picture, so that everything beside the drawing is compared with plain background, and larger drawings
have no advantage. Only the last sum depends on the drawing; its cross term is a correlation, taken by FFT.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Complex, Float, Int, UInt8

from unclip_jax.data.emoji import OPPOSITE, RELATIONS, SIDES, UNIT, Relation, Renderer, Scene
from unclip_jax.data.vocabulary import BACKGROUNDS, Concept, concepts

CHUNK = 32  # pictures at a time, for memory's sake
BORDER = 2  # pixels
SLACK = 2  # pixels by which a drawing may cross the middle and still count as lying in its half


class SceneScores(NamedTuple):
    """What pictures got right. objects is the largest number in a scene; rows of smaller scenes end in false.

    identity: the best match where the caption puts an object is that object. asked: whether there is such an object.
    relation: placed together, in opposite halves, where they match best, both objects stand to each other as the
        caption says, whatever identity has found; false for one object.
    background: the border's median is nearest to the right colour. concepts: how many drawings were compared.
    """

    identity: Bool[np.ndarray, "n objects"]
    asked: Bool[np.ndarray, "n objects"]
    relation: Bool[np.ndarray, " n"]
    background: Bool[np.ndarray, " n"]
    concepts: int


class _Templates(NamedTuple):
    """One size of every drawing.

    spectra: of alpha * RGB and alpha, conjugate. squares: sums of alpha^2 times RGB^2 (over channels), R, G, B and 1.
    """

    side: int
    spectra: Complex[np.ndarray, "c 4 h w"]
    squares: Float[np.ndarray, "c 5"]


class _Match(NamedTuple):
    """The best place of every drawing in every picture: equation (1) less sum D^2, and the centre (y, x) in pixels."""

    cost: Float[np.ndarray, "n c"]
    centre: Float[np.ndarray, "n c 2"]


def score(
    pictures: UInt8[np.ndarray, "n h w 3"],
    scenes: Sequence[Scene],
    renderer: Renderer,
    vocabulary: Sequence[Concept] = (),
) -> SceneScores:
    """Compares each 64 px picture with its scene.

    vocabulary: the drawings that compete, () for the shipped ones; the scenes' own always take part.
    Raises ValueError where the pictures are not one of 64 x 64 pixels per scene.
    """
    if not scenes or pictures.shape != (len(scenes), UNIT, UNIT, 3):
        raise ValueError(f"{len(scenes)} scenes need as many pictures of {UNIT} x {UNIT} pixels, not {pictures.shape}")
    named = [item.concept for scene in scenes for item in scene.items]
    hexcodes = list(dict.fromkeys(concept.hexcode for concept in [*(vocabulary or concepts()), *named]))
    templates = [_templates(renderer, hexcodes, side) for side in SIDES.values()]
    parts = [slice(start, start + CHUNK) for start in range(0, len(scenes), CHUNK)]
    scored = [_score_chunk(pictures[part], scenes[part], hexcodes, templates) for part in parts]
    objects = max(len(scene.items) for scene in scenes)
    asked = np.array([[i < len(scene.items) for i in range(objects)] for scene in scenes])
    identity = np.zeros_like(asked)
    identity[asked] = [right for part, _, _ in scored for row in part for right in row]
    relation, background = (np.concatenate([part[i] for part in scored]) for i in (1, 2))
    return SceneScores(identity, asked, relation, background, len(hexcodes))


def summary(scores: SceneScores) -> dict[str, float]:
    """Rates of identity (per object), relation (of two objects) and background, each with the ends of its 95% interval
    and its chance level: one in the vocabulary, in four, in the palette. What no scene asks for is left out."""
    pairs = scores.asked[:, 1:].any(axis=1)
    parts = {
        "identity": (scores.identity[scores.asked], scores.concepts),
        "relation": (scores.relation[pairs], len(RELATIONS)),
        "background": (scores.background, len(BACKGROUNDS)),
    }
    found = {}
    for name, (right, choices) in parts.items():
        if right.size:
            low, high = wilson(int(right.sum()), right.size)
            found |= {
                name: float(right.mean()),
                f"{name} low": low,
                f"{name} high": high,
                f"{name} chance": 1 / choices,
            }
    return found


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a rate; z = 1.96 is 95%, for independent trials."""
    rate, weight = successes / trials, z * z / trials
    centre = (rate + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(rate * (1 - rate) / trials + weight / (4 * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def border_colour(pictures: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n 3"]:
    """Median of the outermost pixels, per channel, in levels of 255."""
    ring = np.ones(pictures.shape[1:3], bool)
    ring[BORDER:-BORDER, BORDER:-BORDER] = False
    return np.median(pictures[:, ring], axis=1).astype(np.float32)


def _score_chunk(
    pictures: UInt8[np.ndarray, "n h w 3"],
    scenes: Sequence[Scene],
    hexcodes: list[str],
    templates: list[_Templates],
) -> tuple[list[list[bool]], Bool[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Whether every object, every relation and every background is right."""
    colour = border_colour(pictures)
    costs = [_costs(pictures, colour, template) for template in templates]
    matches: dict[Relation | None, _Match] = {None: _best(costs, None)}
    matches |= {half: _best(costs, half) for half in RELATIONS}
    identity, relation = [], []
    for row, scene in enumerate(scenes):
        named = [hexcodes.index(item.concept.hexcode) for item in scene.items]
        halves = (scene.relation, scene.relation and OPPOSITE[scene.relation])
        best = [int(matches[half].cost[row].argmin()) for half in halves[: len(named)]]
        identity.append([found == name for found, name in zip(best, named, strict=True)])
        relation.append(scene.relation is not None and _seen_relation(matches, row, *named) == scene.relation)
    palette = np.asarray(list(BACKGROUNDS.values()), np.float32)
    nearest = np.square(colour[:, None] - palette).sum(axis=-1).argmin(axis=-1)
    names = list(BACKGROUNDS)
    right = [names[i] == scene.background for i, scene in zip(nearest, scenes, strict=True)]
    return identity, np.array(relation), np.array(right)


def _templates(renderer: Renderer, hexcodes: list[str], side: int) -> _Templates:
    sprites = np.stack([renderer.sprite(hexcode, side) for hexcode in hexcodes]).astype(np.float32) / 255
    colour, alpha = np.moveaxis(sprites[..., :3], -1, 1), sprites[:, None, ..., 3]
    kernels = np.concatenate([alpha * colour, alpha], axis=1)
    spectra = np.fft.rfft2(kernels, s=(UNIT, UNIT)).conj().astype(np.complex64)
    terms = np.concatenate([np.square(colour).sum(axis=1, keepdims=True), colour, np.ones_like(alpha)], axis=1)
    return _Templates(side, spectra, (np.square(alpha) * terms).sum(axis=(-1, -2)))


def _costs(
    pictures: UInt8[np.ndarray, "n h w 3"], colour: Float[np.ndarray, "n 3"], template: _Templates
) -> Float[np.ndarray, "n c p p"]:
    """Sum (T^2 - 2 D T) of equation (1), for every place where the drawing fits."""
    b = colour / 255
    rest = np.moveaxis(pictures.astype(np.float32) / 255 - b[:, None, None], -1, 1)
    # sum D T = sum D (alpha RGB) - sum (D . b) alpha: a correlation of four channels.
    channels = np.concatenate([rest, -np.einsum("nkhw,nk->nhw", rest, b)[:, None]], axis=1)
    spectra = np.fft.rfft2(channels).astype(np.complex64)
    places = UNIT - template.side + 1
    cross = np.fft.irfft2(np.einsum("nkhw,ckhw->nchw", spectra, template.spectra), s=(UNIT, UNIT))
    weights = np.concatenate([np.ones_like(b[:, :1]), -2 * b, np.square(b).sum(axis=1, keepdims=True)], axis=1)
    squares = weights @ template.squares.T
    return (squares[..., None, None] - 2 * cross[..., :places, :places]).astype(np.float32)


def _best(costs: list[Float[np.ndarray, "n c _ _"]], place: Relation | None) -> _Match:
    """The best place over all sizes, in the half of the picture that `place` names."""
    found: list[_Match] = []
    for cost in costs:
        rows, columns = _half(place, cost.shape[-1])
        part = cost[..., rows, columns]
        if not part.size:
            continue  # too large for a half
        flat = part.reshape(*part.shape[:2], -1)
        index = flat.argmin(axis=-1)
        corner = np.stack(np.divmod(index, part.shape[-1]), axis=-1) + (rows.start, columns.start)
        side = UNIT - cost.shape[-1] + 1
        found.append(_Match(np.take_along_axis(flat, index[..., None], -1)[..., 0], corner + side / 2))
    size: Int[np.ndarray, "n c"] = np.stack([match.cost for match in found]).argmin(axis=0)
    cost = np.stack([match.cost for match in found]).min(axis=0)
    centre = np.take_along_axis(np.stack([match.centre for match in found]), size[None, ..., None], 0)[0]
    return _Match(cost, centre)


def _half(place: Relation | None, places: int) -> tuple[slice, slice]:
    """Rows and columns of a square of places: of those whose drawings lie in a half of the picture."""
    every = slice(0, places)
    near = slice(0, max(0, places - UNIT // 2 + SLACK))
    far = slice(min(places, UNIT // 2 - SLACK), places)
    match place:
        case None:
            return every, every
        case "left of":
            return every, near
        case "right of":
            return every, far
        case "above":
            return near, every
        case "below":
            return far, every


def _seen_relation(matches: Mapping[Relation | None, _Match], row: int, first: int, second: int) -> Relation | None:
    """Where the first of two drawings is as seen from the second, along the longer axis; None where neither is longer.

    They are placed together, in opposite halves, since alone either could rather cover what the other explains.
    """
    pairs = [(matches[place], matches[OPPOSITE[place]]) for place in RELATIONS]
    one, other = min(pairs, key=lambda pair: pair[0].cost[row, first] + pair[1].cost[row, second])
    dy, dx = one.centre[row, first] - other.centre[row, second]
    if abs(dx) == abs(dy):
        return None
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"
