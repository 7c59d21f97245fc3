"""Retrieval figures on known embeddings, and sets of scenes that are what they claim to be."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from unclip_jax.checkpoint.safetensors import Network
from unclip_jax.config import (
    ClipConfig,
    DataConfig,
    DiffusionConfig,
    PriorConfig,
    SampleConfig,
    TrainConfig,
    TransformerConfig,
)
from unclip_jax.data.emoji import Scenes, is_held_out
from unclip_jax.evaluate import retrieval
from unclip_jax.inputs import Options
from unclip_jax.stages import build

TINY = TransformerConfig(width=16, layers=1, heads=2)
DATA = DataConfig(single_fraction=0.4, context_length=32)


def random_embeddings(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_one_hot_embeddings_are_always_found():
    eye = np.broadcast_to(np.eye(64, dtype=np.float32), (3, 64, 64))
    assert retrieval.top1(eye, eye) == 1
    assert retrieval.top1(eye, np.roll(eye, 1, axis=1)) == 0


def test_random_embeddings_are_found_by_chance():
    found = retrieval.top1(random_embeddings(0, 200, 64, 32), random_embeddings(1, 200, 64, 32))
    sigma = np.sqrt(1 / 64 * 63 / 64 / (200 * 64))
    assert abs(found - 1 / 64) < 4 * sigma


def test_equal_embeddings_are_no_hits():
    assert retrieval.top1(np.ones((2, 8, 4)), np.ones((2, 8, 4))) == 0


def test_top1_counts_each_query():
    keys = np.eye(4, dtype=np.float32)[None]
    queries = keys[:, [0, 1, 3, 3]]
    assert retrieval.top1(queries, keys) == 0.75


def test_mean_cosine_of_known_angles():
    a, b = np.asarray([[2.0, 0], [0, 3.0]]), np.asarray([[1.0, 1.0], [0, -5.0]])
    assert retrieval.mean_cosine(a, b) == pytest.approx((np.sqrt(0.5) - 1) / 2)
    assert retrieval.mean_cosine(np.asarray([1.0, 0]), a) == pytest.approx(0.5)


def test_sets_are_held_out_and_distinct():
    sets = retrieval.distinct_sets(Scenes(split="held_out"), sets=2)
    assert [len(scenes) for scenes in sets] == [64, 64]
    for scenes in sets:
        assert len({retrieval.meaning(scene) for scene in scenes}) == 64
        for scene in scenes:
            assert is_held_out(tuple(item.concept.name for item in scene.items), scene.background)
    assert {scene.caption for scene in sets[0]} != {scene.caption for scene in sets[1]}


def test_too_few_scenes_are_refused():
    with pytest.raises(ValueError, match="fewer than 64"):
        retrieval.distinct_sets(Scenes(("cat", "dog", "apple"), ("blue",), split="held_out"), sets=1)


def test_meaning_ignores_which_object_is_named_first():
    scene = Scenes(split="held_out", single_fraction=0.0)[0]
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[scene.relation]
    turned = scene._replace(items=scene.items[::-1], relation=opposite)
    assert retrieval.meaning(turned) == retrieval.meaning(scene)
    assert retrieval.meaning(turned._replace(relation=scene.relation)) != retrieval.meaning(scene)


@pytest.mark.parametrize(("single", "kinds"), [(0.0, retrieval.PAIR_KINDS), (1.0, retrieval.SINGLE_KINDS)])
def test_hard_sets_differ_in_one_thing(single, kinds):
    sets = retrieval.hard_sets(Scenes(split="held_out", single_fraction=single), kinds, sets=6)
    assert len(sets) == 6
    for base, *variants in sets:
        assert [retrieval.difference(base, variant) for variant in variants] == list(kinds)


def test_difference_of_equal_and_of_unlike_scenes_is_none():
    scene = Scenes(split="held_out", single_fraction=0.0)[0]
    other = scene._replace(background="no colour")
    assert retrieval.difference(scene, scene) is None
    assert retrieval.difference(scene, other) == "background"
    assert retrieval.difference(scene, other._replace(relation=None)) is None


def test_hard_figures_name_what_is_confused():
    """Embeddings that are blind to the relation alone miss every pair of that kind and no other."""
    base = np.eye(4, dtype=np.float32)
    base[2] = base[0]
    sets = np.broadcast_to(base, (5, 4, 4))
    figures = retrieval.hard_figures(sets, sets, "two objects", retrieval.PAIR_KINDS)
    assert figures["two objects, object alone"]["top 1"] == 1
    assert figures["two objects, relation alone"]["top 1"] == 0
    assert figures["two objects, background alone"]["top 1"] == 1
    assert figures["two objects, hard sets"] == {"top 1": 0.5, "chance": 0.25}


def network(config: TrainConfig, constants: dict, clip: ClipConfig | None = None) -> Network:
    params = jax.jit(build(config, clip).init)(jax.random.key(0))
    return Network(config, params, constants, None, "0" * 12, {})


@pytest.fixture(scope="module")
def clip() -> Network:
    """A random CLIP with the whole vocabulary."""
    tower = ClipConfig(8, 64, 32, TINY, replace(TINY, causal=True), context_length=32)
    return network(TrainConfig("clip", tower, data=DATA), {})


def test_random_clip_knows_nothing(clip):
    report = retrieval.clip_report(clip, sets=2, hard=8)
    assert report.figures["caption to picture, 1 of 64"]["top 1"] < 0.1
    assert {row.shape for row in report.rows} == {(6, 64, 64, 3)}
    assert set(report.figures) >= {"one object, size alone", "two objects, relation alone"}


def test_random_prior_knows_nothing_and_the_mean_is_near(clip):
    diffusion, sample = DiffusionConfig(prediction="x0", clip=None), SampleConfig("ddim", 2)
    true = retrieval.embed_pictures(clip, np.zeros((1, 64, 64, 3), np.uint8))[0]
    config = TrainConfig("prior", PriorConfig(8, 16, 32, TINY), diffusion, sample)
    constants = {"whitening": {"mean": true, "std": np.full(8, 0.1, np.float32)}}
    prior = network(config, constants, clip.config.network)
    figures = retrieval.prior_report(clip, prior, sets=1, options=Options(candidates=1)).figures
    assert figures["the prior's embedding"]["top 1"] < 0.1
    assert all(-1 <= row["cosine"] <= 1.0001 for row in figures.values() if "cosine" in row)
