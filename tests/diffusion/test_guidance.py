import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.config import DiffusionConfig
from unclip_jax.diffusion.gaussian import from_x0, to_x0
from unclip_jax.diffusion.guidance import classifier_free, clip_static, dynamic_threshold, score_guided
from unclip_jax.diffusion.samplers import ddim, initial_noise, run
from unclip_jax.diffusion.schedule import make_schedule, step_table, strided_timesteps
from unclip_jax.types import Prediction

B, SHAPE = 3, (3, 4, 4, 3)
UNCOND, COND, X = (jnp.asarray(part, jnp.float32) for part in np.random.default_rng(0).normal(size=(3, *SHAPE)))
T = jnp.array([10, 500, 900])
SCHEDULE = make_schedule(DiffusionConfig())


def doubled(x, t):
    assert x.shape[0] == t.shape[0] == 2 * B
    both = jnp.concatenate([UNCOND, COND])
    return Prediction(both + 0 * x, log_variance=both)


def test_scale_one_is_conditional_and_zero_is_not():
    np.testing.assert_allclose(classifier_free(doubled, 1.0)(X, T).x0, COND, atol=1e-6)
    np.testing.assert_array_equal(classifier_free(doubled, 0.0)(X, T).x0, UNCOND)


def test_each_example_has_its_own_scale():
    got = classifier_free(doubled, jnp.array([0.0, 1.0, 4.0]))(X, T)
    for i, scale in enumerate((0.0, 1.0, 4.0)):
        np.testing.assert_allclose(got.x0[i], UNCOND[i] + scale * (COND[i] - UNCOND[i]), atol=1e-5)
    np.testing.assert_array_equal(got.log_variance, COND)


def test_batches_are_doubled_in_order():
    def spy(x, t):
        np.testing.assert_array_equal(x[:B], x[B:])
        np.testing.assert_array_equal(t, jnp.tile(T, 2))
        return Prediction(x)

    assert classifier_free(spy, 2.0)(X, T).log_variance is None


@pytest.mark.parametrize("kind", ["epsilon", "v"])
def test_guiding_x0_is_guiding_the_output(kind):
    guided = classifier_free(doubled, 3.0)(X, T).x0
    uncond, cond = (from_x0(SCHEDULE, kind, x0, X, T) for x0 in (UNCOND, COND))
    by_output = to_x0(SCHEDULE, kind, uncond + 3.0 * (cond - uncond), X, T)
    np.testing.assert_allclose(guided, by_output, atol=1e-4)


def test_rescaling_gives_the_conditional_deviation():
    plain, full, half = (classifier_free(doubled, 6.0, share)(X, T).x0 for share in (0.0, 1.0, 0.5))
    axes = (1, 2, 3)
    assert np.all(plain.std(axes) > 2 * COND.std(axes))
    np.testing.assert_allclose(full.std(axes), COND.std(axes), rtol=1e-5)
    np.testing.assert_allclose(half, (plain + full) / 2, atol=1e-5)
    each = classifier_free(doubled, 6.0, jnp.array([0.0, 0.5, 1.0]))(X, T).x0
    np.testing.assert_allclose(each, jnp.stack([plain[0], half[1], full[2]]), atol=1e-5)


def test_rescaling_a_constant_stays_finite():
    got = classifier_free(lambda x, t: Prediction(jnp.ones_like(x)), 3.0, 0.7)(X, T).x0
    assert np.all(np.isfinite(got))


def test_a_new_scale_compiles_nothing():
    traces = []

    @jax.jit
    def guided(scale, rescale):
        traces.append(1)
        return classifier_free(doubled, scale, rescale)(X, T).x0

    for scale in (1.0, 3.0, 8.0):
        guided(jnp.full(B, scale), jnp.float32(scale / 10))
    assert len(traces) == 1


def test_clipping():
    got = clip_static(lambda x, t: Prediction(5 * x, x), 2.0)(X, T)
    np.testing.assert_array_equal(got.x0, jnp.clip(5 * X, -2, 2))
    np.testing.assert_array_equal(got.log_variance, X)


def test_dynamic_threshold_bounds_examples_by_their_own_percentile():
    loud = X * jnp.array([0.1, 1.0, 10.0])[:, None, None, None]
    got = dynamic_threshold(lambda x, t: Prediction(loud), 0.9)(X, T).x0
    np.testing.assert_array_equal(got[0], loud[0])  # within the floor: as it is
    assert np.abs(got).max() <= 1 + 1e-6
    for i in (1, 2):
        s = np.quantile(np.abs(loud[i]), 0.9)
        np.testing.assert_allclose(got[i], np.clip(loud[i], -s, s) / s, rtol=1e-5)
        assert np.mean(np.abs(got[i]) > 0.9999) == pytest.approx(0.1, abs=0.03)
    np.testing.assert_allclose(
        got[1], dynamic_threshold(lambda x, t: Prediction(10 * loud), 0.9)(X, T).x0[1], rtol=1e-5
    )


def test_dynamic_threshold_keeps_its_floor():
    got = dynamic_threshold(lambda x, t: Prediction(10 * X), 0.9, floor=2.0)(X, T).x0
    assert np.abs(got).max() == pytest.approx(2.0, rel=1e-6)


@pytest.mark.parametrize("percentile", [0.0, 1.5])
def test_impossible_percentiles_are_refused(percentile):
    with pytest.raises(ValueError, match="percentile"):
        dynamic_threshold(doubled, percentile)


def linear(x0):
    return (x0 * COND[0]).sum((1, 2, 3))


def test_a_linear_score_shifts_by_its_slope_and_the_open_variance():
    guided = score_guided(SCHEDULE, lambda x, t: Prediction(0.5 * x, x), linear, jnp.array([0.0, 1.0, 3.0]))(X, T)
    for i, scale in enumerate((0.0, 1.0, 3.0)):
        expected = 0.5 * X[i] + scale * SCHEDULE.one_minus_alphas_cumprod[T[i]] * COND[0]
        np.testing.assert_allclose(guided.x0[i], expected, atol=1e-5)
    np.testing.assert_array_equal(guided.log_variance, X)


def test_the_gradient_is_taken_at_the_clean_estimate_and_not_through_the_denoiser():
    def square(x0):
        return 0.5 * jnp.square(x0).sum((1, 2, 3))

    # Through the denoiser, the slope of x -> 7 x would come in as a further factor.
    got = score_guided(SCHEDULE, lambda x, t: Prediction(7 * x), square, 1.0)(X, T).x0
    shift = SCHEDULE.one_minus_alphas_cumprod[T][:, None, None, None]
    np.testing.assert_allclose(got, 7 * X * (1 + shift), rtol=1e-5)


def test_guiding_a_standard_gaussian_by_a_linear_score_moves_its_mean():
    # exp(s w.x) N(x; 0, 1) is N(s w, 1): with exact x0 = sqrt(abar) x_t, scale s samples that, at any number of steps.
    w = jnp.array([0.5, -1.0, 2.0, 0.0])
    keys, scale = jax.random.split(jax.random.key(1), 3), jnp.array([0.0, 1.0, 2.0])
    x = initial_noise(keys, (4,))

    def denoise(x, t):
        return Prediction(jnp.sqrt(SCHEDULE.abar(t))[:, None] * x)

    guided = score_guided(SCHEDULE, denoise, lambda x0: x0 @ w, scale)
    table = step_table(strided_timesteps(200))
    plain, moved = (jax.jit(lambda d=d: run(ddim(SCHEDULE), d, keys, x, table))() for d in (denoise, guided))
    np.testing.assert_array_equal(moved[0], plain[0])
    # DDIM of 200 steps carries 0.5% of x_T's scale as its own error.
    np.testing.assert_allclose(moved - plain, scale[:, None] * w, atol=0.03)
