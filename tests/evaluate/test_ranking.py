"""The re-ranking curve on candidates whose quality is known."""

import numpy as np
import pytest

from unclip_jax.data.emoji import Renderer
from unclip_jax.data.vocabulary import concepts
from unclip_jax.evaluate.faithfulness import Judge, held_out
from unclip_jax.evaluate.ranking import ranking_curve

NAMES = ("cat", "dog", "apple", "star", "sun", "car")


@pytest.fixture(scope="module")
def candidates():
    """Six scenes, four candidates each: candidate 2 is the true render, the others are blank."""
    judge = Judge(Renderer(), concepts(NAMES), shuffle=False)
    scenes = held_out(6, judge.concepts)
    pictures = np.full((6, 4, 64, 64, 3), 128, np.uint8)
    pictures[:, 2] = [judge.renderer.render(scene) for scene in scenes]
    return judge, scenes, pictures


def test_a_score_that_knows_the_truth_finds_it_as_soon_as_it_is_there(candidates):
    scores = np.broadcast_to(np.array([0.3, 0.2, 0.9, 0.1]), (6, 4))
    figures = ranking_curve(*candidates, scores)
    right = [figures[f"best of {count}, identity"]["right"] for count in (1, 2, 4)]
    assert right[:2] == [right[0]] * 2 and right[0] < 0.5 and right[2] == 1
    assert [figures[f"best of {count}, CLIP"]["cosine"] for count in (1, 2, 4)] == [0.3, 0.3, 0.9]
    assert not any(name.startswith("best of 8") for name in figures)
    judge, scenes, pictures = candidates
    assert judge.figures(pictures[:, 2], scenes, "best of 4").items() <= figures.items()
    gain = figures["best of 4, gain"]
    assert gain["gain"] == pytest.approx(0.75 * (1 - right[0])) and 0 < gain["low"] <= gain["gain"] <= gain["high"]
    # Of two disjoint pairs one holds the true render, and its score finds it: a quarter above the mean candidate.
    assert figures["best of 2, gain"]["gain"] == pytest.approx(0.25 * (1 - right[0]))


def test_a_score_that_knows_nothing_gains_nothing(candidates):
    figures = ranking_curve(*candidates, np.broadcast_to(np.array([0.3, 0.2, 0.1, 0.0]), (6, 4)))
    assert figures["best of 4, identity"]["right"] == figures["best of 1, identity"]["right"]
    assert figures["best of 4, gain"]["gain"] < 0
