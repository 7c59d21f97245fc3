"""The inpainting report: its cases, its measures on pictures whose answers are known, and a whole run."""

import numpy as np
import pytest

from unclip_jax.cascade import load_cascade
from unclip_jax.data.emoji import Renderer, Scenes
from unclip_jax.data.vocabulary import concepts
from unclip_jax.evaluate.faithfulness import Judge
from unclip_jax.evaluate.painting import PaintingTask, _found, _plain, case, gradient, known_at, painting_report
from unclip_jax.inputs import Options

VOCABULARY = concepts(("cat", "dog", "apple", "banana", "car", "house", "sun", "fish"))
JUDGE = Judge(Renderer(), VOCABULARY, False)


@pytest.fixture(scope="module")
def cases():
    scenes = Scenes(tuple(concept.name for concept in VOCABULARY), single_fraction=0.0, split="held_out")
    return [case(scenes[number], number, VOCABULARY) for number in range(24)]


def test_a_case_changes_what_its_mask_covers_and_nothing_else(cases):
    known = known_at(cases, JUDGE.renderer, 64)
    for number, one in enumerate(cases):
        outside = ~known.repaint[number]
        target, rest = JUDGE.renderer.render(one.target), JUDGE.renderer.render(one.rest)
        np.testing.assert_array_equal(target[outside], known.picture[number][outside])
        np.testing.assert_array_equal(rest[outside], known.picture[number][outside])
        names = [item.concept.phrases[0] for item in one.target.items]
        assert all(name in one.target.caption for name in names)
        assert names[one.place] not in one.rest.caption and names[1 - one.place] in one.rest.caption


def test_true_renders_of_the_targets_are_found_and_of_the_rest_are_plain(cases):
    known = known_at(cases, JUDGE.renderer, 64)
    targets, rests = [one.target for one in cases], [one.rest for one in cases]
    scenes = [one.scene for one in cases]
    drawn, empty = (np.stack([JUDGE.renderer.render(scene) for scene in drawn]) for drawn in (targets, rests))
    assert _found(drawn, targets, cases, JUDGE).mean() > 0.95
    assert _found(drawn, scenes, cases, JUDGE).mean() < 0.05
    assert _found(known.picture, scenes, cases, JUDGE).mean() > 0.95
    assert _plain(empty, known).mean() > 0.9 and not _plain(drawn, known).any()


def test_gradients_are_taken_across_the_edge_alone():
    picture = np.zeros((1, 8, 8, 3), np.uint8)
    mask = np.zeros((1, 8, 8), bool)
    mask[:, 2:5, 3:6] = True
    picture[mask] = 90
    assert gradient(picture, mask) == 90
    assert gradient(picture, ~mask) == 90
    assert gradient(picture, np.roll(mask, 1, axis=1)) < 90
    assert 0 < gradient(picture) < 20


@pytest.mark.slow
def test_the_report_of_a_cascade(tiny_cascade_folder):
    cascade = load_cascade(tiny_cascade_folder)
    report = painting_report(cascade, PaintingTask(2, options=Options(steps=2, resamples=1)))
    assert report.figures["resample, outside bit by bit"]["share"] == 1
    assert set(report.figures["resample, new object found"]) == {"share", "low", "high"}
    assert "finetuned, new object found" not in report.figures
    assert [row.shape for row in report.rows] == [(2, 64, 64, 3)] * 3
