"""Inpainting steps against a Gaussian of two dependent halves, of which one is known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.config import DiffusionConfig
from unclip_jax.diffusion.gaussian import denoiser
from unclip_jax.diffusion.inpainting import Known, keep_known, mask_channels, random_masks, resampled
from unclip_jax.diffusion.samplers import ddim, ddpm, dpm_solver_pp_2m, initial_noise, run
from unclip_jax.diffusion.schedule import make_schedule, step_table, strided_timesteps

SCHEDULE = make_schedule(DiffusionConfig())
# Two known values and two that depend on them and on each other.
MIX = np.array([[0.8, 0, 0, 0], [0.3, 0.6, 0, 0], [0.6, -0.3, 0.3, 0], [-0.2, 0.5, 0.2, 0.3]], np.float32)
COVARIANCE = MIX @ MIX.T
MEAN = np.array([0.2, -0.1, 0.3, 0.0], np.float32)
REPAINT = np.array([False, False, True, True])
GIVEN = np.array([0.9, -0.8, 0.0, 0.0], np.float32)
drawn_masks = jax.jit(random_masks, static_argnums=(1, 2))
STEPS = {"ddpm": ddpm(SCHEDULE), "ddim": ddim(SCHEDULE), "dpm": dpm_solver_pp_2m(SCHEDULE)}


def exact(x, t):
    """E[x0 | x_t] of the Gaussian."""
    abar, rest = SCHEDULE.abar(t)[:, None, None], SCHEDULE.one_minus_abar(t)[:, None, None]
    signal = jnp.sqrt(abar[..., 0])
    gain = jnp.sqrt(abar) * COVARIANCE @ jnp.linalg.inv(abar * COVARIANCE + rest * jnp.eye(4))
    return MEAN + jnp.einsum("bij,bj->bi", gain, x - signal * MEAN, precision=jax.lax.Precision.HIGHEST)


DENOISE = denoiser(DiffusionConfig(prediction="x0"), SCHEDULE, exact)


def keys_of(b, seed=0):
    return jax.vmap(jax.random.key)(np.arange(seed, seed + b, dtype=np.uint32))


@functools.cache
def compiled(name):
    def walk(keys, x0, repaint, table):
        step = keep_known(STEPS[name], SCHEDULE, x0, repaint)
        return run(step, DENOISE, keys, initial_noise(keys, (4,)), table)

    return jax.jit(walk)


def paint(name, table, b=4096):
    x0 = jnp.broadcast_to(jnp.asarray(GIVEN), (b, 4))
    return np.asarray(compiled(name)(keys_of(b), x0, jnp.broadcast_to(REPAINT, (b, 4)), table))


def conditional():
    """Mean and covariance of the unknown half given the known one."""
    k, u = slice(0, 2), slice(2, 4)
    gain = COVARIANCE[u, k] @ np.linalg.inv(COVARIANCE[k, k])
    return MEAN[u] + gain @ (GIVEN[k] - MEAN[k]), COVARIANCE[u, u] - gain @ COVARIANCE[k, u]


def errors(x):
    """Largest errors of the unknown half's mean and covariance."""
    mean, covariance = conditional()
    painted = x[:, 2:]
    return np.abs(painted.mean(0) - mean).max(), np.abs(np.cov(painted.T) - covariance).max()


PLAIN = step_table(strided_timesteps(32), 1024)


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_resampling_finds_the_conditional_that_mere_replacement_misses(name):
    plain, walked = (paint(name, table) for table in (PLAIN, resampled(PLAIN, 4, 16, 1024)))
    (plain_mean, _), (mean, covariance) = errors(plain), errors(walked)
    assert plain_mean > 0.3, "replacement alone is right here, so the comparison says nothing"
    assert mean < plain_mean / 4 and mean < 0.1
    assert covariance < 0.045


@pytest.mark.parametrize("name", list(STEPS))
def test_what_is_known_comes_back_exactly(name):
    np.testing.assert_array_equal(paint(name, PLAIN)[:, :2], np.broadcast_to(GIVEN[:2], (4096, 2)))


def test_an_example_is_the_same_alone_and_in_a_batch():
    table = resampled(PLAIN, 4, 2, 1024)
    x0 = jnp.asarray(GIVEN)[None]
    alone = compiled("ddpm")(keys_of(1, 5), x0, jnp.asarray(REPAINT)[None], table)
    np.testing.assert_allclose(alone[0], paint("ddpm", table)[5], atol=1e-5)


@pytest.mark.parametrize(("steps", "jump", "resamples"), [(10, 3, 4), (40, 4, 5), (7, 7, 2), (5, 9, 3), (6, 2, 1)])
def test_every_stretch_is_walked_so_often(steps, jump, resamples):
    plain = step_table(strided_timesteps(steps))
    table = resampled(plain, jump, resamples)
    length = int(table.length)
    t, t_next = table.t[:length], table.t_next[:length]
    assert t[0] == 999 and t_next[-1] == -1
    np.testing.assert_array_equal(t[1:], t_next[:-1])
    down = t_next < t
    assert (~down).sum() == (resamples - 1) * -(-steps // jump)
    pairs, counts = np.unique(np.stack([t, t_next])[:, down], axis=1, return_counts=True)
    assert set(map(tuple, pairs.T.tolist())) == set(
        zip(plain.t[:steps].tolist(), plain.t_next[:steps].tolist(), strict=True)
    )
    assert set(counts.tolist()) == {resamples}


@pytest.mark.parametrize(("jump", "resamples"), [(0, 3), (3, 0)])
def test_a_walk_without_sense_is_refused(jump, resamples):
    with pytest.raises(ValueError, match="of at least 1"):
        resampled(PLAIN, jump, resamples)


def test_stages_see_the_mean_of_a_block_and_repaint_what_is_touched():
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (2, 16, 16, 3), np.uint8)
    repaint = np.zeros((2, 16, 16), bool)
    repaint[0, 3, 12] = repaint[1, 4:8, 4:8] = True
    small = Known(picture, repaint).at(4)
    assert np.argwhere(small.repaint).tolist() == [[0, 0, 3], [1, 1, 1]]
    assert abs(float(small.picture[1, 2, 3, 0]) - picture[1, 8:12, 12:, 0].mean()) <= 0.5
    assert Known(picture, repaint).at(16).picture is picture
    with pytest.raises(ValueError, match="16 x 16 px has no whole blocks at 5 px"):
        Known(picture, repaint).at(5)


def test_a_network_sees_the_mask_and_nothing_behind_it():
    repaint = drawn_masks(jax.random.key(1), 3, 8)
    one, other = np.random.default_rng(2).uniform(0.1, 1, (2, 3, 8, 8, 3)).astype(np.float32)
    mixed = np.where(repaint[..., None], other, one)
    seen = jax.jit(mask_channels)
    np.testing.assert_array_equal(seen(one, repaint), seen(mixed, repaint))
    np.testing.assert_array_equal(np.asarray(seen(one, repaint))[..., 3], repaint)


def test_training_masks_are_of_every_kind():
    masks = np.asarray(drawn_masks(jax.random.key(0), 512, 16))
    full = masks.all(axis=(1, 2))
    bands = (masks == masks[:, :1]).all(axis=(1, 2)) | (masks == masks[:, :, :1]).all(axis=(1, 2))
    holes = ~masks[:, [0, 0, -1, -1], [0, -1, 0, -1]].any(axis=1)
    assert 0.07 < full.mean() < 0.2
    assert 0.15 < (bands & ~full).mean() < 0.4
    assert 0.2 < holes.mean() < 0.7
    assert masks.any(axis=(1, 2)).mean() > 0.95
    assert 0.3 < masks.mean() < 0.7
