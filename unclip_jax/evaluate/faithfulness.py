"""Does a cascade draw what held-out captions of one or two objects say? Pictures drawn here, scored by `scenes`."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from unclip_jax.cascade import Cascade
from unclip_jax.data.degrade import area_downsample
from unclip_jax.data.emoji import UNIT, Renderer, Scene, Scenes
from unclip_jax.data.vocabulary import Concept, concepts
from unclip_jax.evaluate.report import Figures, Report
from unclip_jax.evaluate.retrieval import embed_pictures
from unclip_jax.evaluate.scenes import SceneScores, score, summary
from unclip_jax.generate import check, decode_embeddings, encode_prompts, finish, generate
from unclip_jax.inputs import RECOMMENDED, Options, picture_keys
from unclip_jax.stages import to_pixels

BATCH = 16
THINGS, COLUMNS = ("identity", "relation", "background"), ("low", "high", "chance")  # of the scorer's summary
PAIRS = 8  # pairs of true and drawn picture in a row of the sheet
SHOWN = 64


class Faithfulness(NamedTuple):
    """What is measured: so many captions, the first `large` of them at the cascade's largest size too.

    shuffle: also against another scene's caption, which is chance. true_embedding: the decoder is given CLIP's
    embedding of the true render instead of the prior's. seed: of the first picture; picture i has seed + i.
    objects: in every scene, 1 or 2.
    """

    captions: int = 256
    large: int = 0
    shuffle: bool = False
    true_embedding: bool = False
    seed: int = 0
    options: Options = RECOMMENDED
    objects: int = 2


def held_out(count: int, concepts: Sequence[Concept], objects: int = 2) -> list[Scene]:
    """The first held-out scenes of one or two of these concepts."""
    names = tuple(concept.name for concept in concepts)
    scenes = Scenes(names, single_fraction=2.0 - objects, split="held_out")
    return [scenes[index] for index in range(count)]


class Judge(NamedTuple):
    """Scores 64 px pictures among these concepts; with `shuffle` beside them against the next picture's scene."""

    renderer: Renderer
    concepts: Sequence[Concept]
    shuffle: bool

    def figures(self, pictures: UInt8[np.ndarray, "b h w 3"], scenes: Sequence[Scene], name: str) -> Figures:
        """Rows `name, identity`, `name, relation` and `name, background`, with 95% intervals and chance levels."""
        return rates(self.score(pictures, scenes), name) | self.chance(pictures, scenes, name)

    def score(self, pictures: UInt8[np.ndarray, "b h w 3"], scenes: Sequence[Scene]) -> SceneScores:
        """What each picture got right of its scene."""
        return score(pictures, scenes, self.renderer, self.concepts)

    def chance(self, pictures: UInt8[np.ndarray, "b h w 3"], scenes: Sequence[Scene], name: str) -> Figures:
        """The rows against the next picture's scene; {} without `shuffle`."""
        if not self.shuffle:
            return {}
        return rates(self.score(pictures, [*scenes[1:], scenes[0]]), f"{name}, shuffled captions")


def rates(scores: SceneScores, name: str) -> Figures:
    """A row for each thing that scenes ask for."""
    found = summary(scores)
    return {
        f"{name}, {thing}": {"right": found[thing]} | {column: found[f"{thing} {column}"] for column in COLUMNS}
        for thing in THINGS
        if thing in found
    }


def judge_of(cascade: Cascade, shuffle: bool = False) -> Judge:
    """The judge among the concepts that a cascade was trained on, the shipped ones where it does not say."""
    return Judge(Renderer(), concepts(tuple(cascade.clip.extra.get("concepts", ()))), shuffle)


def truth_report(count: int, shuffle: bool = False, names: Sequence[str] = (), objects: int = 2) -> Report:
    """The scorer's own check: true renders, which should score 1. names: concepts, () for the shipped vocabulary."""
    judge = Judge(Renderer(), concepts(tuple(names)), shuffle)
    scenes = held_out(count, judge.concepts, objects)
    true = np.stack([judge.renderer.render(scene) for scene in scenes])
    return Report(judge.figures(true, scenes, "true renders"), sheet_rows(true, true))


def faithfulness_report(cascade: Cascade, task: Faithfulness) -> Report:
    """Scores of one picture per caption, drawn as `unclip sample` does; large ones are reduced by area to 64 px."""
    check(cascade, task.options)
    judge = judge_of(cascade, task.shuffle)
    scenes = held_out(task.captions, judge.concepts, task.objects)
    true = np.stack([judge.renderer.render(scene) for scene in scenes])
    parts = tqdm(_parts(task.captions, BATCH), desc="drawing", unit="batch", dynamic_ncols=True)
    drawn = np.concatenate([_draw(cascade, task, scenes[part], true[part], part) for part in parts])
    small = _reduced(drawn)
    figures = judge.figures(small, scenes, f"{drawn.shape[1]} px")
    if task.large:
        size, some = cascade.sizes[-1], _parts(min(task.large, task.captions), 1)
        parts = tqdm(some, desc=f"enlarging to {size} px", unit="picture", dynamic_ncols=True)
        large = np.concatenate([_reduced(_enlarge(cascade, task, drawn[part], part)) for part in parts])
        few = slice(len(large))
        figures |= judge.figures(small[few], scenes[few], f"{drawn.shape[1]} px, first {len(large)}")
        figures |= judge.figures(large, scenes[few], f"{size} px, first {len(large)}")
    return Report(figures, sheet_rows(true, small))


def _parts(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _draw(
    cascade: Cascade, task: Faithfulness, scenes: Sequence[Scene], true: UInt8[np.ndarray, "b h w 3"], part: slice
) -> UInt8[np.ndarray, "b h w 3"]:
    captions, seed = [scene.caption for scene in scenes], task.seed + part.start
    options = task.options._replace(size=cascade.sizes[0])
    if not task.true_embedding:
        return generate(cascade, captions, seed, options)
    keys = picture_keys(seed, len(captions))
    text = encode_prompts(cascade, captions)
    embedding = jnp.asarray(embed_pictures(cascade.clip, true))
    return np.asarray(to_pixels(decode_embeddings(cascade, keys, embedding, text, options)))


def _enlarge(
    cascade: Cascade, task: Faithfulness, drawn: UInt8[np.ndarray, "b h w 3"], part: slice
) -> UInt8[np.ndarray, "b k k 3"]:
    keys = picture_keys(task.seed + part.start, len(drawn))
    return finish(cascade, keys, drawn, cascade.sizes[-1])


def _reduced(pictures: UInt8[np.ndarray, "b h w 3"]) -> UInt8[np.ndarray, "b k k 3"]:
    return area_downsample(pictures, pictures.shape[1] // UNIT)


def sheet_rows(
    true: UInt8[np.ndarray, "b h w 3"], drawn: UInt8[np.ndarray, "b h w 3"]
) -> tuple[UInt8[np.ndarray, "c h w 3"], ...]:
    """Rows of pairs: what was asked for, what was drawn."""
    pairs = np.stack([true, drawn], axis=1)[:SHOWN]
    return tuple(pair.reshape(-1, *pair.shape[2:]) for pair in (pairs[p] for p in _parts(len(pairs), PAIRS)))
