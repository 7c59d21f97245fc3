"""Does inpainting paint what it should where it should? Objects of held-out renders, masked and replaced or removed."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8
from tqdm import tqdm

from unclip_jax.cascade import Cascade
from unclip_jax.data.degrade import area_downsample
from unclip_jax.data.emoji import UNIT, Renderer, Scene
from unclip_jax.data.vocabulary import Concept
from unclip_jax.diffusion.inpainting import Known
from unclip_jax.evaluate.edits import plain_caption, with_other_object
from unclip_jax.evaluate.faithfulness import Judge, held_out, judge_of
from unclip_jax.evaluate.report import Figures, Report
from unclip_jax.evaluate.scenes import border_colour, score, wilson
from unclip_jax.generate import check, generate
from unclip_jax.inpaint import Method, repaint
from unclip_jax.inputs import RECOMMENDED, Options

BATCH = 16
MARGIN = 2  # px of 64 by which a mask is wider than its object's square on every side
PLAIN = 8.0  # levels of 255: a place whose pixels are this near to the background on average shows nothing
SHOWN = 16  # columns of the sheet


class PaintingTask(NamedTuple):
    """What is measured: so many held-out scenes of two objects, the first `large` at the largest size too.

    seed: of the first picture. method: the only one to measure, None: every one that the cascade has.
    """

    pictures: int = 64
    large: int = 0
    seed: int = 0
    options: Options = RECOMMENDED
    method: Method | None = None


class Case(NamedTuple):
    """A scene with one object's place masked; the target has another object there, the rest none."""

    scene: Scene
    target: Scene
    rest: Scene
    place: int
    mask: Bool[np.ndarray, "h w"]


def case(scene: Scene, number: int, known: Sequence[Concept]) -> Case:
    """Case `number`: its first and its second object by turns, for one drawn at random, always the same."""
    rng, place = np.random.default_rng([number, 4]), number % 2
    old, target = scene.items[place], with_other_object(rng, scene, place, known)
    rest = scene._replace(items=(scene.items[1 - place],), relation=None)
    mask = np.zeros((UNIT, UNIT), bool)
    top, left = max(old.y - MARGIN, 0), max(old.x - MARGIN, 0)
    mask[top : old.y + old.side + MARGIN, left : old.x + old.side + MARGIN] = True
    target, rest = (found._replace(caption=plain_caption(found)) for found in (target, rest))
    return Case(scene, target, rest, place, mask)


def painting_report(cascade: Cascade, task: PaintingTask) -> Report:
    """Rates with 95% intervals: new object found (beside the cascade's own rate on whole scenes), old one gone, nothing
    but background left, outside bit by bit the same; and mean gradients across the mask's edge beside true renders'."""
    small = task.options._replace(size=cascade.sizes[0])
    check(cascade, small)
    judge = judge_of(cascade)
    scenes = held_out(task.pictures, judge.concepts)
    cases = [case(scene, number, judge.concepts) for number, scene in enumerate(scenes)]
    known = known_at(cases, judge.renderer, UNIT)
    targets = np.stack([judge.renderer.render(case.target) for case in cases])
    fresh = generate(cascade, [case.target.caption for case in cases], task.seed, small)
    figures: Figures = {
        "whole scenes, same object found": _rate(_found(fresh, [case.target for case in cases], cases, judge)),
        "whole scenes, gradient across the edge": _edges(fresh, known),
        "true renders, gradient across the edge": _edges(targets, known),
        "true renders, gradient everywhere": {"levels": gradient(targets)},
    }
    rows = [np.where(known.repaint[..., None], np.uint8(128), known.picture)]
    methods: list[Method] = ["resample"] if cascade.inpaint is None else ["resample", "finetuned"]
    methods = methods if task.method is None else [task.method]
    for method in methods:
        added = _paint(cascade, known, [case.target.caption for case in cases], task.seed, small, method)
        removed = _paint(cascade, known, [case.rest.caption for case in cases], task.seed, small, method)
        figures |= _rows(added, known, cases, judge, method)
        # Where nothing is left, whichever drawing is smallest is the best match.
        plain = _plain(removed, known)
        figures[f"{method}, old object gone"] = _rate(plain | ~_found(removed, scenes, cases, judge))
        figures[f"{method}, nothing but background there"] = _rate(plain)
        rows += [added, removed]
    if task.large:
        cases, size = cases[: task.large], cascade.sizes[-1]
        large = known_at(cases, judge.renderer, size)
        options, captions = task.options._replace(size=size), [case.target.caption for case in cases]
        for method in methods:
            added = _paint(cascade, large, captions, task.seed, options, method, batch=1)
            figures |= _rows(added, large, cases, judge, f"{method}, {size} px")
        true = np.stack([judge.renderer.render(case.target, size) for case in cases])
        figures[f"true renders, {size} px, gradient across the edge"] = _edges(true, large)
    return Report(figures, tuple(row[:SHOWN] for row in rows))


def known_at(cases: Sequence[Case], renderer: Renderer, size: int) -> Known:
    """The scenes drawn at a size, each with its mask."""
    factor = size // UNIT
    return Known(
        np.stack([renderer.render(case.scene, size) for case in cases]),
        np.stack([case.mask.repeat(factor, 0).repeat(factor, 1) for case in cases]),
    )


def gradient(pictures: UInt8[np.ndarray, "b h w 3"], masks: Bool[np.ndarray, "b h w"] | None = None) -> float:
    """Mean difference of neighbouring pixels, in levels of 255: of those on either side of a mask's edge, or of all."""
    total, count = 0.0, 0
    for axis in (1, 2):
        steps = np.abs(np.diff(pictures.astype(np.int16), axis=axis)).mean(axis=-1)
        chosen = np.ones(steps.shape, bool) if masks is None else np.diff(masks, axis=axis)
        total, count = total + float(steps[chosen].sum()), count + int(chosen.sum())
    return total / max(count, 1)


def _paint(
    cascade: Cascade,
    known: Known,
    captions: Sequence[str],
    seed: int,
    options: Options,
    method: Method,
    batch: int = BATCH,
) -> UInt8[np.ndarray, "b h w 3"]:
    parts = [slice(start, start + batch) for start in range(0, len(captions), batch)]
    shown = tqdm(parts, desc=f"{method} at {options.size} px", unit="batch", dynamic_ncols=True)
    return np.concatenate(
        [repaint(cascade, known.rows(part), captions[part], seed + part.start, options, method) for part in shown]
    )


def _rows(added: UInt8[np.ndarray, "b h w 3"], known: Known, cases: Sequence[Case], judge: Judge, name: str) -> Figures:
    same = (added == known.picture).all(axis=-1) | known.repaint
    reduced = area_downsample(added, added.shape[1] // UNIT)
    return {
        f"{name}, new object found": _rate(_found(reduced, [case.target for case in cases], cases, judge)),
        f"{name}, outside bit by bit": _rate(same.all(axis=(1, 2))),
        f"{name}, gradient across the edge": _edges(added, known),
    }


def _edges(pictures: UInt8[np.ndarray, "b h w 3"], known: Known) -> dict[str, float]:
    return {"levels": gradient(pictures, np.asarray(known.repaint))}


def _found(
    pictures: UInt8[np.ndarray, "b h w 3"], scenes: Sequence[Scene], cases: Sequence[Case], judge: Judge
) -> Bool[np.ndarray, " b"]:
    """Whether the object that a scene puts into the mask is the best match there."""
    identity = score(pictures, scenes, judge.renderer, judge.concepts).identity
    return identity[np.arange(len(cases)), [case.place for case in cases]]


def _plain(pictures: UInt8[np.ndarray, "b h w 3"], known: Known) -> Bool[np.ndarray, " b"]:
    away = np.abs(pictures - border_colour(np.asarray(known.picture))[:, None, None]).mean(axis=-1)
    masks = np.asarray(known.repaint)
    return (away * masks).sum(axis=(1, 2)) / masks.sum(axis=(1, 2)) < PLAIN


def _rate(right: Bool[np.ndarray, " b"]) -> dict[str, float]:
    low, high = wilson(int(right.sum()), len(right))
    return {"share": float(right.mean()), "low": low, "high": high}
