"""The scene scorer: right on true renders, at chance on other pictures' captions, robust to mild noise."""

import numpy as np
import pytest

from unclip_jax.data.emoji import SIDES, Renderer, Scenes
from unclip_jax.data.vocabulary import BACKGROUNDS, concepts
from unclip_jax.evaluate.scenes import border_colour, score, summary, wilson

NAMES = ("cat", "dog", "apple", "banana", "car", "house", "sun", "fish")
VOCABULARY = concepts(NAMES)
RENDERER = Renderer()


def drawn(count: int, single_fraction: float = 0.3) -> tuple[list, np.ndarray]:
    """Scenes and their true pictures."""
    source = Scenes(NAMES, single_fraction=single_fraction)
    scenes = [source[i] for i in range(count)]
    return scenes, np.stack([RENDERER.render(scene) for scene in scenes])


@pytest.fixture(scope="module")
def pairs():
    """Scenes of two objects, many enough for a chance level."""
    return drawn(256, 0.0)


def rates(scores) -> list[float]:
    """Identity, relation, background."""
    found = summary(scores)
    return [found["identity"], found["relation"], found["background"]]


def test_true_renders_are_right():
    scenes, pictures = drawn(128)
    scores = score(pictures, scenes, RENDERER, VOCABULARY)
    assert min(rates(scores)) >= 0.99
    assert scores.asked.sum() == sum(len(scene.items) for scene in scenes)
    assert not scores.identity[~scores.asked].any()


def test_shipped_vocabulary_competes_by_default():
    scenes, pictures = drawn(16)
    scores = score(pictures, scenes, RENDERER)
    assert scores.concepts == len(concepts())
    assert min(rates(scores)) == 1


def test_captions_of_other_pictures_score_at_chance(pairs):
    scenes, pictures = pairs
    found = summary(score(pictures, [*scenes[1:], scenes[0]], RENDERER, VOCABULARY))
    for name, chance in (("identity", 1 / len(NAMES)), ("relation", 1 / 4), ("background", 1 / len(BACKGROUNDS))):
        assert found[f"{name} chance"] == chance
        assert found[f"{name} low"] <= chance <= found[f"{name} high"], found


def test_swapped_objects_lose_identity_and_relation_but_not_background(pairs):
    scenes, pictures = pairs[0][:32], pairs[1][:32]
    swapped = [scene._replace(items=scene.items[::-1]) for scene in scenes]
    identity, relation, background = rates(score(pictures, swapped, RENDERER, VOCABULARY))
    assert identity <= 0.02 and relation <= 0.02 and background == 1


def test_mild_noise_changes_little(pairs):
    scenes, pictures = pairs[0][:64], pairs[1][:64]
    noise = np.random.default_rng(0).normal(0, 12, pictures.shape)
    noisy = np.clip(pictures + noise, 0, 255).astype(np.uint8)
    assert min(rates(score(noisy, scenes, RENDERER, VOCABULARY))) >= 0.97


def test_shifted_objects_are_still_found(pairs):
    scenes, rng = pairs[0][:32], np.random.default_rng(0)
    moved = [
        scene._replace(
            items=tuple(i._replace(x=i.x + dx, y=i.y + dy) for i, (dx, dy) in zip(scene.items, by, strict=True))
        )
        for scene, by in zip(scenes, rng.integers(-2, 3, (32, 2, 2)).tolist(), strict=True)
    ]
    pictures = np.stack([RENDERER.render(scene) for scene in moved])
    assert min(rates(score(pictures, scenes, RENDERER, VOCABULARY))) >= 0.97


def test_costs_are_squared_distances():
    """The identity behind the correlations: cost + sum D^2 is the distance to the composed picture."""
    from unclip_jax.evaluate.scenes import _costs, _templates

    source = Scenes(NAMES, single_fraction=1.0)
    scene = source[0]
    picture = np.random.default_rng(1).integers(0, 256, (1, 64, 64, 3), np.uint8)
    background = np.array([[90.0, 140.0, 20.0]], np.float32)
    hexcodes = [scene.items[0].concept.hexcode]
    for side in SIDES.values():
        sprite = RENDERER.sprite(hexcodes[0], side).astype(np.float64) / 255
        y, x = 64 - side, 3
        composed = np.tile(background.astype(np.float64) / 255, (64, 64, 1))
        alpha = sprite[..., 3:]
        composed[y : y + side, x : x + side] = alpha * sprite[..., :3] + (1 - alpha) * background / 255
        distance = np.square(picture[0] / 255 - composed).sum()
        plain = np.square(picture[0] / 255 - background / 255).sum()
        cost = _costs(picture, background, _templates(RENDERER, hexcodes, side))
        assert cost.shape == (1, 1, 65 - side, 65 - side)
        np.testing.assert_allclose(cost[0, 0, y, x], distance - plain, atol=1e-2)


def test_a_plain_picture_shows_its_background_only():
    scenes, _ = drawn(8, 0.0)
    plain = np.stack([np.full((64, 64, 3), BACKGROUNDS[scene.background], np.uint8) for scene in scenes])
    np.testing.assert_array_equal(border_colour(plain), plain[:, 0, 0])
    assert score(plain, scenes, RENDERER, VOCABULARY).background.all()


def test_scenes_of_one_object_ask_for_no_relation():
    scenes, pictures = drawn(8, 1.0)
    found = summary(score(pictures, scenes, RENDERER, VOCABULARY))
    assert "relation" not in found and found["identity"] == 1


@pytest.mark.parametrize("shape", [(2, 64, 64, 3), (3, 32, 32, 3)])
def test_pictures_that_do_not_belong_are_refused(shape):
    scenes, _ = drawn(3)
    with pytest.raises(ValueError, match="3 scenes need as many pictures of 64 x 64"):
        score(np.zeros(shape, np.uint8), scenes, RENDERER, VOCABULARY)


def test_wilson_interval():
    assert wilson(0, 10) == pytest.approx((0.0, 0.27754), abs=1e-4)
    assert wilson(85, 100) == pytest.approx((0.76717, 0.90693), abs=1e-4)
    assert wilson(10, 10)[1] == 1
