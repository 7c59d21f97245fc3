"""What edits keep and what they change: held-out renders, edited without a mask, and scored by `scenes`."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8

from unclip_jax.cascade import Cascade
from unclip_jax.data.emoji import PHRASES, SIDES, Scene, article
from unclip_jax.data.vocabulary import BACKGROUNDS, Concept
from unclip_jax.edit import Latent, difference, draw, interpolate, invert_pictures, move
from unclip_jax.evaluate.faithfulness import Judge, held_out, judge_of
from unclip_jax.evaluate.report import Figures, Report
from unclip_jax.evaluate.scenes import score, wilson
from unclip_jax.evaluate.similarity import psnr
from unclip_jax.generate import check, encode_prompts, generate
from unclip_jax.inputs import RECOMMENDED, Options, picture_keys

STEPS = (25, 50, 100, 250)
THETAS = (0.25, 0.375, 0.5, 0.75)
DROPPED = (0.25, 0.5)  # thetas at which the decoder reads no caption, for comparison
SHOWN = 16  # columns of the sheet


class EditTask(NamedTuple):
    """What is measured: so many held-out scenes of two objects, at the decoder's size. seed: of the first picture."""

    pictures: int = 64
    seed: int = 0
    options: Options = RECOMMENDED
    steps: Sequence[int] = STEPS
    thetas: Sequence[float] = THETAS


class Change(NamedTuple):
    """A scene and the same scene after one word has changed, as plain captions and as a target.

    place: of the object that changed, None: the background did.
    """

    old: str
    new: str
    target: Scene
    place: int | None


def edits_report(cascade: Cascade, task: EditTask) -> Report:
    """PSNR of reconstructions by step count, what variations keep, interpolation's ends, and text diffs.

    A text diff is scored by the share of pictures in which the one word changed, in which the rest stayed, and in which
    both hold, and by its PSNR to a render of the changed scene; beside it the same of sampling the new caption afresh.
    """
    options = task.options._replace(size=cascade.sizes[0])
    check(cascade, options)
    judge = judge_of(cascade)
    scenes = held_out(task.pictures, judge.concepts)
    true = np.stack([judge.renderer.render(scene) for scene in scenes])
    keys = picture_keys(task.seed, len(true))
    figures: Figures = {}
    for steps in task.steps:
        some = options._replace(steps=steps)
        figures[f"reconstruction, {steps} steps"] = psnr_figures(
            draw(cascade, keys, _latents(cascade, true, some), some), true
        )
    latent = _latents(cascade, true, options)
    rebuilt = draw(cascade, keys, latent, options)
    rows = [true, rebuilt]
    for eta in (0.0, 1.0):
        varied = draw(cascade, keys, latent, options, eta=eta)
        rows += [varied] if eta else []
        name = f"variations, eta {eta:g}"
        figures |= judge.figures(varied, scenes, name)
        figures[f"{name}, levels of 255"] = {"difference": _difference(varied, true)}
    if len(true) > 1:
        ends = interpolate(cascade, list(true[:2]), 2, task.seed, options)
        figures["interpolation's ends, levels of 255"] = {"difference": _difference(ends, rebuilt[:2])}
    diffs = diff_report(cascade, task._replace(options=options), judge, scenes, true, latent)
    shown = tuple(row[:SHOWN] for row in rows)
    return Report(figures | diffs.figures, (*shown, *diffs.rows))


def diff_report(
    cascade: Cascade,
    task: EditTask,
    judge: Judge,
    scenes: Sequence[Scene],
    true: UInt8[np.ndarray, "b h w 3"],
    dropped: Latent,
) -> Report:
    """Text diffs that change the background of every other scene and one object of the rest, theta by theta.

    dropped: the latents of the true pictures without captions.
    """
    changes = [changed(scene, number, judge.concepts) for number, scene in enumerate(scenes)]
    keys, targets = picture_keys(task.seed, len(scenes)), [change.target for change in changes]
    aims = np.stack([judge.renderer.render(target) for target in targets])
    direction = np.stack([difference(cascade, change.old, change.new) for change in changes])
    figures, rows = {}, [aims]
    told = invert_pictures(cascade, list(true), [change.old for change in changes], task.options)
    new, all_the_way = encode_prompts(cascade, [change.new for change in changes]), np.ones(len(scenes))
    for name, source, thetas in (("text diff", told, task.thetas), ("text diff, captions dropped", dropped, DROPPED)):
        for theta in thetas:
            drawn = draw(cascade, keys, move(source, direction, new, theta * all_the_way, all_the_way), task.options)
            figures |= _change_figures(drawn, aims, changes, judge, f"{name}, theta {theta:g}")
            rows.append(drawn)
    fresh = generate(cascade, [change.new for change in changes], task.seed, task.options)
    figures |= _change_figures(fresh, aims, changes, judge, "sampled afresh")
    return Report(figures, tuple(row[:SHOWN] for row in (*rows, fresh)))


def changed(scene: Scene, number: int, known: Sequence[Concept]) -> Change:
    """Scene `number` with another background if the number is even, else with another object: always the same."""
    rng = np.random.default_rng([number, 3])
    if number % 2 == 0:
        others = [name for name in BACKGROUNDS if name != scene.background]
        target, place = scene._replace(background=others[int(rng.integers(len(others)))]), None
    else:
        place = int(rng.integers(len(scene.items)))
        target = with_other_object(rng, scene, place, known)
    return Change(plain_caption(scene), plain_caption(target), target._replace(caption=plain_caption(target)), place)


def with_other_object(rng: np.random.Generator, scene: Scene, place: int, known: Sequence[Concept]) -> Scene:
    """The scene with an object that it does not hold in place of one of its own, and the caption that it had."""
    there = {item.concept for item in scene.items}
    others = [concept for concept in known if concept not in there]
    items = list(scene.items)
    items[place] = items[place]._replace(concept=others[int(rng.integers(len(others)))])
    return scene._replace(items=tuple(items))


def plain_caption(scene: Scene) -> str:
    """A scene's caption in its plainest words, so that those of two scenes differ in what the scenes differ in."""
    words = {side: word for word, side in SIDES.items()}
    nouns = [article(f"{words[item.side]} {item.concept.phrases[0]}".strip()) for item in scene.items]
    between = "" if scene.relation is None else f" {PHRASES[scene.relation][0]} "
    return f"{between.join(nouns)} on {article(scene.background)} background"


def psnr_figures(a: UInt8[np.ndarray, "b h w 3"], b: UInt8[np.ndarray, "b h w 3"]) -> dict[str, float]:
    """Mean and smallest PSNR of pairs of pictures, in dB."""
    found = psnr(a, b)
    return {"PSNR": float(found.mean()), "least": float(found.min())}


def _latents(cascade: Cascade, pictures: UInt8[np.ndarray, "b h w 3"], options: Options) -> Latent:
    return invert_pictures(cascade, list(pictures), [""] * len(pictures), options)


def _difference(a: UInt8[np.ndarray, "b h w 3"], b: UInt8[np.ndarray, "b h w 3"]) -> float:
    return float(np.abs(a.astype(np.float32) - b).mean())


def _change_figures(
    drawn: UInt8[np.ndarray, "b h w 3"],
    aims: UInt8[np.ndarray, "b h w 3"],
    changes: Sequence[Change],
    judge: Judge,
    name: str,
) -> Figures:
    """Rows for both kinds of change together and for each."""
    scores = score(drawn, [change.target for change in changes], judge.renderer, judge.concepts)
    right = np.concatenate([scores.identity, scores.relation[:, None], scores.background[:, None]], axis=1)
    word = np.array([-1 if change.place is None else change.place for change in changes])
    is_word = np.zeros_like(right)
    is_word[np.arange(len(right)), word] = True
    happened, stayed = np.any(right & is_word, axis=1), np.all(right | is_word, axis=1)
    likeness = psnr(drawn, aims)
    kinds = {"": np.ones(len(word), bool), ", background": word < 0, ", object": word >= 0}
    return {
        f"{name}{kind}": _rates(happened[part], stayed[part]) | {"PSNR": float(likeness[part].mean())}
        for kind, part in kinds.items()
        if part.any()
    }


def _rates(happened: Bool[np.ndarray, " n"], stayed: Bool[np.ndarray, " n"]) -> dict[str, float]:
    both = happened & stayed
    low, high = wilson(int(both.sum()), len(both))
    return {
        "changed": float(happened.mean()), "rest stayed": float(stayed.mean()),
        "right": float(both.mean()), "low": low, "high": high,
    }  # fmt: skip
