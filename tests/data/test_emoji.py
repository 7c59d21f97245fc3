import re

import numpy as np
import pytest

from unclip_jax.data.degrade import area_downsample
from unclip_jax.data.emoji import (
    OPPOSITE,
    PHRASES,
    PLACES,
    SIDES,
    UNIT,
    Item,
    Renderer,
    Scene,
    Scenes,
    Window,
    held_out_background,
    held_out_pair,
    is_held_out,
)
from unclip_jax.data.vocabulary import BACKGROUNDS, concept, concepts

MANY = 5000


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer()


@pytest.fixture(scope="module")
def train() -> list[Scene]:
    scenes = Scenes(seed=1)
    return [scenes[i] for i in range(MANY)]


@pytest.fixture(scope="module")
def held_out() -> list[Scene]:
    scenes = Scenes(seed=1, split="held_out")
    return [scenes[i] for i in range(1000)]


def names(scene: Scene) -> tuple[str, ...]:
    return tuple(item.concept.name for item in scene.items)


def test_a_scene_is_a_pure_function_of_seed_split_and_index(train, renderer):
    again = Scenes(seed=1)
    assert [again[i] for i in (999, 3, 0)] == [train[i] for i in (999, 3, 0)]
    assert len(set(train)) > 0.9 * MANY
    assert again[5] != Scenes(seed=2)[5] != Scenes(seed=1, split="held_out")[5]
    assert np.array_equal(renderer.render(train[7]), Renderer().render(train[7]))


def test_held_out_combinations_never_occur_in_training(train, held_out):
    for scene in train:
        assert not any(held_out_background(name, scene.background) for name in names(scene))
        assert len(scene.items) == 1 or not held_out_pair(*names(scene))
    for scene in held_out:
        assert is_held_out(names(scene), scene.background)
    # Every object and every background is trained on all the same.
    assert {name for scene in train for name in names(scene)} == {c.name for c in concepts()}
    assert {scene.background for scene in train} == set(BACKGROUNDS)
    assert {len(scene.items) for scene in held_out} == {1, 2}


def test_objects_neither_overlap_nor_leave_the_canvas(train, held_out):
    for scene in train + held_out:
        for item in scene.items:
            assert item.x >= 0 and item.y >= 0 and max(item.x, item.y) + item.side <= UNIT
        if len(scene.items) == 2:
            a, b = scene.items
            beside = a.x + a.side <= b.x or b.x + b.side <= a.x
            assert beside or a.y + a.side <= b.y or b.y + b.side <= a.y


def test_relations_are_true_of_the_places(train):
    for scene in train:
        if scene.relation is None:
            assert len(scene.items) == 1
            continue
        (ax, ay), (bx, by) = ((item.x + item.side / 2, item.y + item.side / 2) for item in scene.items)
        along, across = (bx - ax, by - ay) if scene.relation in ("left of", "right of") else (by - ay, bx - ax)
        assert (along if scene.relation in ("left of", "above") else -along) > 2 * abs(across)


NOUNS = {phrase: c.name for c in concepts() for phrase in c.phrases}
RELATION_OF = {phrase: relation for relation, phrases in PHRASES.items() for phrase in phrases}
COLOUR = "|".join(BACKGROUNDS)
FRAMES = (
    rf"an openmoji drawing of (?P<x>.+) on an? (?P<b>{COLOUR}) background",
    rf"a picture of (?P<x>.+) on (?P<b>{COLOUR})",
    rf"(?P<b>{COLOUR}) background with (?P<x>.+)",
    rf"(?P<x>.+), (?P<b>{COLOUR}) background",
    rf"(?P<x>.+) on an? (?P<b>{COLOUR}) background",
)


def parse(caption: str) -> tuple[list[tuple[str, str]], str | None, str]:
    """Sizes and names in the order of the words, the relation, and the background that a caption states."""
    found = next(match for frame in FRAMES if (match := re.fullmatch(frame, caption)))
    phrases = "|".join(sorted(RELATION_OF, key=len, reverse=True))
    places = "|".join(PLACES.values())
    if placed := re.fullmatch(rf"(.+) ({places}) and (.+) ({places})", found["x"]):
        here, there = (next(relation for relation, words in PLACES.items() if words == placed[i]) for i in (2, 4))
        assert there == OPPOSITE[here]
        parts = [placed[1], PHRASES[here][0], placed[3]]
    else:
        parts = re.split(rf" ({phrases}) ", found["x"])
    things = []
    for part in parts[::2]:
        size, noun = re.fullmatch(r"(?:an? )?(?:(small|big) )?(.+)", part).groups()  # type: ignore[union-attr]
        things.append((size or "", NOUNS[noun]))
    return things, RELATION_OF[parts[1]] if len(parts) == 3 else None, found["b"]


def test_captions_agree_with_what_is_drawn(train, held_out):
    swapped = 0
    for scene in train + held_out:
        things, relation, background = parse(scene.caption)
        drawn = [(next(word for word, side in SIDES.items() if side == i.side), i.concept.name) for i in scene.items]
        assert background == scene.background
        if relation == scene.relation:
            assert things == drawn, scene.caption
        else:
            assert (things[::-1], OPPOSITE[relation]) == (drawn, scene.relation), scene.caption
            swapped += 1
    assert 0.2 * MANY < swapped < 0.4 * MANY
    said = " ".join(scene.caption for scene in train)
    assert " red apple" in said and re.search(r"(?<!red) apple", said)
    assert not re.search(r"\ba [aeiou]|\ban [^aeiou ]", said)
    assert len({re.sub(rf"{COLOUR}|{'|'.join(NOUNS)}", "", scene.caption) for scene in train}) > 20


def test_pictures_agree_between_sizes(renderer):
    """Reduced by area, larger pictures are the small one up to the antialiasing of outlines.

    A rasteriser's coverage of an outline thinner than a pixel is approximate (single pixels differ by up to 200 of
    255), so agreement is measured on the mean, and against the picture moved by the smallest step there is.
    """
    scenes = Scenes(seed=3)
    for index in range(12):
        small = renderer.render(scenes[index]).astype(int)
        for size in (256, 1024) if index < 2 else (256,):
            large = renderer.render(scenes[index], size)
            assert large.shape == (size, size, 3) and large.dtype == np.uint8
            reduced = area_downsample(large, size // 64).astype(int)
            error = np.abs(reduced - small).mean()
            moved = min(np.abs(np.roll(reduced, 1, axis) - small).mean() for axis in (0, 1))
            assert error < 3 and error < moved / 2, (index, size, error, moved)


def test_windows_are_cut_from_the_whole_picture(renderer):
    scene = Scenes(seed=4)[0]
    whole = renderer.render(scene, 256)
    for x, y, side in ((0, 0, 64), (97, 31, 64), (192, 192, 64), (0, 0, 256)):
        assert np.array_equal(renderer.render(scene, 256, Window(x, y, side)), whole[y : y + side, x : x + side])


def test_pictures_hold_the_background_and_the_drawing(renderer):
    item = Item(concept("heart"), 28, 18, 18)
    picture = renderer.render(Scene((item,), "blue", None, "a heart"))
    outside = np.ones((64, 64), bool)
    outside[18:46, 18:46] = False
    assert (picture[outside] == BACKGROUNDS["blue"]).all()
    red = (picture[..., 0] > 200) & (picture[..., 2] < 100)
    assert red.sum() > 150 and not red[outside].any()
    ink = (picture != np.array(BACKGROUNDS["blue"])).any(-1)
    rows, columns = np.nonzero(ink)
    assert max(np.ptp(rows), np.ptp(columns)) + 1 == 28  # drawings fill their square


@pytest.mark.parametrize("size", [0, 100, -64])
def test_other_sizes_are_refused(renderer, size):
    with pytest.raises(ValueError, match="multiples of 64"):
        renderer.render(Scenes()[0], size)


def changes(a: Scene, b: Scene) -> int:
    """How many things differ between two scenes."""
    objects = sum(x != y for x, y in zip(names(a), names(b), strict=True))
    sizes = sum(x.side != y.side for x, y in zip(a.items, b.items, strict=True))
    return objects + sizes + (a.background != b.background) + (a.relation != b.relation)


def test_members_of_a_group_differ_from_their_first_in_one_thing():
    grouped, plain = Scenes(seed=5, group=4), Scenes(seed=5)
    kinds = set()
    for number in range(200):
        first, *others = (grouped[4 * number + member] for member in range(4))
        assert first == plain[number]
        for other in others:
            assert changes(first, other) == 1
            assert not is_held_out(names(other), other.background)
            kinds.add((names(first) != names(other), first.background != other.background))
    assert kinds == {(True, False), (False, True), (False, False)}


def test_impossible_sources_are_refused():
    with pytest.raises(ValueError, match="no background is called 'tartan'"):
        Scenes(backgrounds=("tartan",))
    with pytest.raises(ValueError, match="no held_out combination exists"):
        open_to_all = next(name for name in BACKGROUNDS if not held_out_background("cat", name))
        _ = Scenes(names=("cat",), backgrounds=(open_to_all,), split="held_out")[0]
    with pytest.raises(ValueError, match="three concepts and two backgrounds"):
        Scenes(backgrounds=("blue",), group=4)
