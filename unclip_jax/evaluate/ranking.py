"""What re-ranking by CLIP is worth: faithfulness of the best of 1, 2, 4, ... candidates, from one run."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8
from tqdm import tqdm

from unclip_jax.cascade import Cascade
from unclip_jax.data.emoji import Scene
from unclip_jax.evaluate.faithfulness import BATCH, Faithfulness, Judge, held_out, judge_of, rates, sheet_rows
from unclip_jax.evaluate.report import Figures, Report
from unclip_jax.evaluate.scenes import SceneScores
from unclip_jax.generate import check, draw_candidates
from unclip_jax.rank import best_of

DRAWS = 4000  # of the bootstrap


def ranking_curve(
    judge: Judge,
    scenes: Sequence[Scene],
    pictures: UInt8[np.ndarray, "b n h w 3"],
    scores: Float[np.ndarray, "b n"],
) -> Figures:
    """Faithfulness and mean score of the highest-scored of the first 1, 2, 4, ... n candidates of every scene.

    The best of k is the picture that `--rank-from k` draws. Rows for several k share pictures: their intervals are not
    independent of each other, so `best of k, gain` compares pairs: objects found by the best of k less those found by
    the mean candidate of the same scene, over all n // k disjoint groups of k candidates, with a 95% interval over
    scenes.
    """
    figures: Figures = {}
    parts = [judge.score(pictures[:, i], scenes) for i in range(scores.shape[1])]
    asked = parts[0].asked.sum(axis=1)
    found = np.stack([part.identity.sum(axis=1) / asked for part in parts], axis=1)
    rows, count = np.arange(len(scenes)), 1
    while count <= scores.shape[1]:
        place = best_of(scores, count)
        figures |= rates(_chosen(parts, place), f"best of {count}")
        figures |= judge.chance(pictures[rows, place], scenes, f"best of {count}")
        figures[f"best of {count}, CLIP"] = {"cosine": float(scores[rows, place].mean())}
        if count > 1:
            figures[f"best of {count}, gain"] = _gain(found, scores, count)
        count *= 2
    return figures


def _chosen(parts: Sequence[SceneScores], place: Int[np.ndarray, " b"]) -> SceneScores:
    """The scores of candidate place[i] of every scene i."""
    rows = np.arange(len(place))
    identity, asked, relation, background = (
        np.stack(field)[place, rows] for field in list(zip(*parts, strict=True))[:4]
    )
    return SceneScores(identity, asked, relation, background, parts[0].concepts)


def _gain(found: Float[np.ndarray, "b n"], scores: Float[np.ndarray, "b n"], count: int) -> dict[str, float]:
    """Mean and bootstrap interval over scenes of the best of `count` less the mean candidate."""
    groups = scores.shape[1] // count
    cut = scores[:, : groups * count].reshape(-1, count)
    best = np.take_along_axis(found[:, : groups * count].reshape(-1, count), cut.argmax(1)[:, None], 1)
    gain = best.reshape(-1, groups).mean(1) - found.mean(1)
    draws = np.random.default_rng(0).integers(0, len(gain), (DRAWS, len(gain)))
    low, high = np.quantile(gain[draws].mean(1), [0.025, 0.975])
    return {"gain": float(gain.mean()), "low": float(low), "high": float(high)}


def ranking_report(cascade: Cascade, task: Faithfulness) -> Report:
    """The curve on held-out captions of two objects, options.rank_from candidates each; pairs of truth and best."""
    check(cascade, task.options)
    if task.options.rank_from < 2:
        raise ValueError(f"ranking compares at least 2 candidates, not {task.options.rank_from}: raise --rank-from")
    judge = judge_of(cascade, task.shuffle)
    scenes = held_out(task.captions, judge.concepts, task.objects)
    pictures, scores = [], []
    for start in tqdm(range(0, len(scenes), BATCH), desc="drawing", unit="batch", dynamic_ncols=True):
        part = scenes[start : start + BATCH]
        seeds = range(task.seed + start, task.seed + start + len(part))
        drawn = draw_candidates(cascade, [scene.caption for scene in part], seeds, task.options)
        pictures.append(drawn.pictures)
        scores.append(drawn.scores)
    pictures, scores = np.concatenate(pictures), np.concatenate(scores)
    best = pictures[np.arange(len(scenes)), best_of(scores, scores.shape[1])]
    true = np.stack([judge.renderer.render(scene) for scene in scenes])
    return Report(ranking_curve(judge, scenes, pictures, scores), sheet_rows(true, best))
