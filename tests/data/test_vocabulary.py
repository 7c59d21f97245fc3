import itertools
import math

import numpy as np
import pytest

from unclip_jax.data.emoji import Renderer, Scenes
from unclip_jax.data.vocabulary import (
    BACKGROUNDS,
    SHIPPED,
    concept,
    concepts,
    distinct_concepts,
    openmoji_table,
)

REQUIRED = ["cat", "dog", "apple", "banana", "car", "house", "tree", "sun", "star", "heart", "fish", "rocket"]


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer()


def on_white(sprite: np.ndarray) -> np.ndarray:
    alpha = sprite[..., 3:] / 255
    return sprite[..., :3] * alpha + 255 * (1 - alpha)


def test_required_words_are_there():
    assert set(REQUIRED) <= set(SHIPPED) and len(SHIPPED) >= 24
    assert {"blue", "pink", "white", "green", "yellow"} <= set(BACKGROUNDS)
    assert {"apple", "red apple"} <= set(concept("apple").phrases)


def test_shipped_concepts_look_different(renderer):
    """At least 30 levels of 255 apart on average, ten times what antialiasing does."""
    drawn = {c.name: on_white(renderer.sprite(c.hexcode, 28)) for c in concepts()}
    assert len({c.hexcode for c in concepts()}) == len(drawn) == len(SHIPPED)
    for a, b in itertools.combinations(drawn, 2):
        assert np.abs(drawn[a] - drawn[b]).mean() > 30, (a, b)
    phrases = [phrase for c in concepts() for phrase in c.phrases]
    assert len(set(phrases)) == len(phrases)


def test_backgrounds_are_told_apart():
    for a, b in itertools.combinations(BACKGROUNDS.values(), 2):
        assert math.dist(a, b) >= 60


def test_hexcodes_are_those_of_the_table():
    table = openmoji_table()
    assert len(table) == 2465
    for name, (hexcode, *_) in SHIPPED.items():
        assert concept(hexcode).name == table[hexcode], name
    assert concept("unicorn").hexcode == "1F984" == concept("1F984").hexcode


def test_unknown_words_name_their_neighbours():
    with pytest.raises(ValueError, match="'aple'.*apple"):
        concept("aple")


def test_drawings_that_look_alike_count_once():
    flags = ("1F1EB-1F1F7", "1F1F2-1F1EB", "1F1EE-1F1E9", "1F431")  # France, St. Martin, Indonesia, a cat
    assert [c.hexcode for c in distinct_concepts(flags)] == ["1F1EB-1F1F7", "1F1EE-1F1E9", "1F431"]


def test_any_drawing_can_be_in_a_scene(renderer):
    """Every fortieth of OpenMoji's; all of them take half a minute."""
    sample = tuple(openmoji_table())[::40]
    chosen = tuple(c.hexcode for c in distinct_concepts(sample))
    assert len(chosen) > 0.95 * len(sample)
    scenes = Scenes(chosen, single_fraction=0.0)
    for index in range(10):
        scene = scenes[index]
        assert all(item.concept.name in scene.caption for item in scene.items)
        assert renderer.render(scene).std() > 5
    for hexcode in chosen:
        sprite = renderer.sprite(hexcode, 28)
        assert sprite.shape == (28, 28, 4) and sprite[..., 3].max() > 100
