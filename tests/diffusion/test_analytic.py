"""Analytic variances on Gaussian data, whose exact denoiser, Gamma and covariance have closed forms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.config import DiffusionConfig
from unclip_jax.diffusion.analytic import clean_variance, gamma_of, reverse_variance, squared_error
from unclip_jax.diffusion.gaussian import add_noise, epsilon_from_x0
from unclip_jax.diffusion.samplers import ddpm, initial_noise, run
from unclip_jax.diffusion.schedule import make_schedule, step_table, strided_timesteps
from unclip_jax.types import Prediction

SCHEDULE = make_schedule(DiffusionConfig())
ABAR, REST = SCHEDULE.alphas_cumprod.astype(np.float64), SCHEDULE.one_minus_alphas_cumprod.astype(np.float64)
MEAN, DEVIATIONS = 0.4, np.array([0.2, 0.4, 0.6, 0.9, 1.2, 0.5, 0.3, 0.8])  # of each coordinate


def exact(x, t, deviations=DEVIATIONS):
    """E[x0 | x_t] of the Gaussian."""
    abar, rest = SCHEDULE.abar(t)[:, None], SCHEDULE.one_minus_abar(t)[:, None]
    variance = jnp.square(jnp.asarray(deviations, jnp.float32))
    gain = jnp.sqrt(abar) * variance / (abar * variance + rest)
    return Prediction(MEAN + gain * (x - jnp.sqrt(abar) * MEAN))


def left_open(deviations):
    """Cov[x0 | x_t] of each coordinate of the Gaussian, [d T]."""
    variance = deviations[:, None] ** 2
    return variance * REST / (ABAR * variance + REST)


def exact_gamma(deviations):
    return 1 - ABAR / REST * left_open(deviations).mean(axis=0)


GAMMA = exact_gamma(DEVIATIONS)


@partial(jax.jit, static_argnames="visible")
def variance(clean, t, t_next, visible=np.inf):
    return reverse_variance(SCHEDULE, clean, visible)(t, t_next)


@pytest.fixture(scope="module")
def data():
    key_x, key_noise = jax.random.split(jax.random.key(0))
    noise = jax.random.normal(key_noise, (20_000, 8))
    return MEAN + DEVIATIONS.astype(np.float32) * jax.random.normal(key_x, noise.shape), noise


@pytest.fixture(scope="module")
def measured(data):
    """Mean squared error and mean ||epsilon||^2 / d at a timestep, of the exact denoiser."""
    x0, noise = data

    @jax.jit
    def at(t):
        t = jnp.full(len(x0), t)
        x = add_noise(SCHEDULE, x0, noise, t)
        epsilon = epsilon_from_x0(SCHEDULE, exact(x, t).x0, x, t)
        return squared_error(SCHEDULE, exact, x0, noise, t).mean(), jnp.square(epsilon).mean()

    return at


@pytest.mark.parametrize("t", [20, 200, 500, 800])
def test_gamma_of_a_perfect_network_on_a_gaussian_has_its_closed_form(measured, t):
    # ||epsilon||^2 / d is 1 - a V / (1 - a) = mean over coordinates of (1 - a) / (a s^2 + 1 - a), both ways of it.
    closed = (REST[t] / (ABAR[t] * DEVIATIONS**2 + REST[t])).mean()
    assert GAMMA[t] == pytest.approx(closed, abs=1e-12)
    error, squared = map(float, measured(t))
    # Four standard errors of a mean of squares of 20,000 x 8 normal numbers of these variances.
    four = 4 * np.sqrt(2 / 20_000) / 8
    assert squared == pytest.approx(closed, abs=four * np.linalg.norm(REST[t] / (ABAR[t] * DEVIATIONS**2 + REST[t])))
    got = gamma_of(SCHEDULE, np.array([t]), np.array([error]))[t]
    assert got == pytest.approx(closed, abs=four * np.linalg.norm(ABAR[t] / REST[t] * left_open(DEVIATIONS)[:, t]))


def test_statistics_of_some_timesteps_give_all(measured):
    some = np.linspace(0, 999, 41).round().astype(int)
    gamma = gamma_of(SCHEDULE, some, np.array([measured(t)[0] for t in some]))
    got = clean_variance(SCHEDULE, gamma)
    np.testing.assert_allclose(got, left_open(DEVIATIONS).mean(axis=0), atol=0.012)
    # Where nothing but noise is seen, all of the data's variance is open: float32 would lose this.
    assert got[-1] == pytest.approx((DEVIATIONS**2).mean(), rel=0.03)


def test_gamma_and_variance_are_inverse():
    np.testing.assert_allclose(clean_variance(SCHEDULE, GAMMA), left_open(DEVIATIONS).mean(axis=0), rtol=1e-4)


@pytest.mark.parametrize("gamma", [-1000.0, -0.1, 0.0, 0.5, 1.0, 1.3])
def test_variances_lie_within_the_papers_bounds(gamma):
    reach = 0.7
    clean = clean_variance(SCHEDULE, np.full(1000, gamma), reach)
    assert (clean >= 0).all() and (clean <= reach**2 * (1 + 1e-6)).all() and (clean <= REST / ABAR * (1 + 1e-6)).all()
    for n in (8, 50, 1000):
        timesteps = strided_timesteps(n)
        t, t_next = timesteps[:-1], timesteps[1:]
        got = np.asarray(variance(clean, t, t_next))
        kept = ABAR[t] / ABAR[t_next]
        small = REST[t_next] / REST[t] * (1 - kept)
        weight = np.sqrt(ABAR[t_next]) * (1 - kept) / REST[t]
        # Between betatilde and theorem 2's upper ends: Gamma = 0, which is beta / alpha, and data within its reach.
        assert (got >= small * (1 - 1e-3)).all()
        assert (got <= np.minimum((1 - kept) / kept, small + weight**2 * reach**2) * (1 + 1e-3)).all()
        if gamma >= 1:
            np.testing.assert_allclose(got, small, rtol=1e-3)


def test_noise_that_would_be_seen_is_clipped():
    clean = clean_variance(SCHEDULE, np.zeros(1000), 1.0)
    t, t_next = np.array([500, 60, 60]), np.array([300, 0, 1])
    free, clipped = np.asarray(variance(clean, t, t_next)), np.asarray(variance(clean, t, t_next, visible=1 / 127.5))
    np.testing.assert_array_equal(clipped[[0, 2]], free[[0, 2]])
    assert np.sqrt(clipped[1] * 2 / np.pi) == pytest.approx(1 / 127.5, rel=1e-5) and free[1] > 2 * clipped[1]


def test_the_best_variance_of_a_step_is_that_of_the_true_step():
    # One coordinate: q(x_next | x_t) is Gaussian with the variance of regressing x_next on x_t.
    t, t_next = np.array([900, 500, 100]), np.array([700, 300, 40])
    s2 = 0.6**2
    clean = clean_variance(SCHEDULE, exact_gamma(np.array([0.6])))
    got = variance(clean, t, t_next)
    var, var_next = ABAR[t] * s2 + REST[t], ABAR[t_next] * s2 + REST[t_next]
    covariance = np.sqrt(ABAR[t] / ABAR[t_next]) * var_next
    np.testing.assert_allclose(got, var_next - covariance**2 / var, rtol=1e-3)


@pytest.fixture(scope="module")
def chain():
    """Samples of a Gaussian by 8 steps, as one program: the variances are data, and zeros are the small variance."""
    keys, table = jax.random.split(jax.random.key(1), 8192), step_table(strided_timesteps(8))
    x = initial_noise(keys, (8,))

    @jax.jit
    def program(clean, deviations):
        step = ddpm(SCHEDULE, reverse_variance(SCHEDULE, clean))
        return run(step, lambda x, t: exact(x, t, deviations), keys, x, table)

    def small():
        return jax.jit(lambda: run(ddpm(SCHEDULE), exact, keys, x, table))()

    return lambda clean, deviations: np.asarray(program(*(jnp.float32(part) for part in (clean, deviations)))), small


def covariance_error(samples, deviations):
    """Of the trace, relative, and of the worst entry."""
    error = np.cov(samples.T) - np.diag(deviations**2)
    return abs(np.trace(error)) / (deviations**2).sum(), np.abs(error).max()


def test_eight_steps_keep_the_covariance_that_the_small_variance_loses(chain):
    program, _ = chain
    small, best = program(np.zeros(1000), DEVIATIONS), program(clean_variance(SCHEDULE, GAMMA), DEVIATIONS)
    # One variance for all coordinates is still wrong for each: the error falls, but not to 0.
    lost, kept = covariance_error(small, DEVIATIONS), covariance_error(best, DEVIATIONS)
    assert lost[0] > 0.4 and kept[0] < lost[0] / 3 and kept[1] < lost[1] / 1.5
    np.testing.assert_allclose(best.mean(axis=0), MEAN, atol=0.05)


def test_eight_steps_are_exact_where_all_coordinates_are_alike(chain):
    alike = np.full(8, 0.6)
    best = chain[0](clean_variance(SCHEDULE, exact_gamma(alike)), alike)
    trace, worst = covariance_error(best, alike)
    # Four standard errors of 8192 samples (of 8 coordinates), and 1e-3 of the last, noiseless step.
    assert trace < 4 * np.sqrt(2 / 8192 / 8) + 1e-3
    assert worst < 4.5 * 0.36 * np.sqrt(2 / 8192) + 1e-3


def test_zero_is_the_small_variance(chain):
    program, small = chain
    np.testing.assert_allclose(program(np.zeros(1000), DEVIATIONS), small(), atol=1e-5)
