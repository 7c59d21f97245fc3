"""What re-ranking by CLIP is worth: faithfulness of the best of 1, 2, 4, ... candidates, from one run."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from tqdm import tqdm

from unclip_jax.cascade import Cascade
from unclip_jax.data.emoji import Scene
from unclip_jax.evaluate.faithfulness import BATCH, Faithfulness, Judge, held_out, judge_of, sheet_rows
from unclip_jax.evaluate.report import Figures, Report
from unclip_jax.generate import check, draw_candidates
from unclip_jax.rank import best_of


def ranking_curve(
    judge: Judge,
    scenes: Sequence[Scene],
    pictures: UInt8[np.ndarray, "b n h w 3"],
    scores: Float[np.ndarray, "b n"],
) -> Figures:
    """Faithfulness and mean score of the highest-scored of the first 1, 2, 4, ... n candidates of every scene.

    The best of k is the picture that `--rank-from k` draws. Rows for several k share pictures: their intervals are not
    independent of each other.
    """
    figures: Figures = {}
    rows, count = np.arange(len(scenes)), 1
    while count <= scores.shape[1]:
        place = best_of(scores, count)
        figures |= judge.figures(pictures[rows, place], scenes, f"best of {count}")
        figures[f"best of {count}, CLIP"] = {"cosine": float(scores[rows, place].mean())}
        count *= 2
    return figures


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
