"""What is painted goes on from what is around it, and nothing else of it changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.diffusion.seams import seamless, seamless_denoiser
from unclip_jax.types import Prediction

SIDE = 16
joined = jax.jit(seamless, static_argnums=3)


@pytest.fixture(scope="module")
def scene():
    """A smooth known picture, a mask that touches the picture's border, and noise to paint with."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    known = np.stack([y, x, x - y], axis=-1)[None].astype(np.float32) * 0.5
    mask = np.zeros((1, SIDE, SIDE), bool)
    mask[:, 4:11, 9:] = True
    return known, mask, np.random.default_rng(0).normal(size=known.shape).astype(np.float32)


def rim_and_goal(known, mask):
    for y, x in zip(*np.nonzero(mask[0]), strict=True):
        around = [(y + dy, x + dx) for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0))]
        beyond = [known[0, i, j] for i, j in around if 0 <= i < SIDE and 0 <= j < SIDE and not mask[0, i, j]]
        if beyond:
            yield (y, x), np.mean(beyond, axis=0)


def test_the_rim_continues_what_is_beyond_it_and_the_outside_stays(scene):
    known, mask, painted = scene
    after = np.asarray(joined(painted, known, mask, 20))
    np.testing.assert_array_equal(after[~mask], painted[~mask])
    rim = list(rim_and_goal(known, mask))
    assert len(rim) == 19
    for place, goal in rim:
        np.testing.assert_allclose(after[0][place], goal, atol=1e-6)


def test_a_wrong_tone_is_taken_off_everywhere(scene):
    known, mask, _ = scene
    flat = np.full_like(known, 0.25)
    off = np.where(mask[..., None], flat + 0.1, flat)
    np.testing.assert_allclose(joined(off, flat, mask, 400), flat, atol=1e-4)


def test_what_goes_on_already_is_left_alone(scene):
    known, mask, _ = scene
    flat = np.full_like(known, -0.5)
    object_inside = flat.copy()
    object_inside[0, 6:9, 12:15] = 0.9
    np.testing.assert_array_equal(joined(object_inside, flat, mask, 50), object_inside)


def test_without_an_edge_there_is_no_seam(scene):
    known, _, painted = scene
    for mask in (np.zeros((1, SIDE, SIDE), bool), np.ones((1, SIDE, SIDE), bool)):
        np.testing.assert_array_equal(joined(painted, known, mask, 5), painted)


def test_the_wrapped_denoiser_stays_within_limits_and_keeps_the_variance(scene):
    known, mask, painted = map(jnp.asarray, scene)
    variance = jnp.ones_like(painted)
    denoise = seamless_denoiser(lambda x, t: Prediction(2 * x, variance), known, mask, 5)
    after = denoise(painted, jnp.zeros((1,), jnp.int32))
    assert float(jnp.abs(after.x0).max()) <= 1
    np.testing.assert_array_equal(after.log_variance, variance)
