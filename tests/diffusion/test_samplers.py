"""Samplers against data whose denoiser is known exactly: a point, a Gaussian and a mixture of two Gaussians."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from unclip_jax.config import DiffusionConfig, PredictionType
from unclip_jax.diffusion.gaussian import denoiser, from_x0
from unclip_jax.diffusion.samplers import (
    ddim,
    ddpm,
    dpm_solver_pp_2m,
    initial_noise,
    initial_state,
    invert,
    run,
)
from unclip_jax.diffusion.schedule import make_schedule, pair_table, reverse_table, step_table, strided_timesteps

KINDS: tuple[PredictionType, ...] = ("epsilon", "x0", "v")
SCHEDULE = make_schedule(DiffusionConfig())
STEPS = {
    "ddpm": ddpm(SCHEDULE),
    "ddpm large": ddpm(SCHEDULE, "large"),
    "ddpm learned": ddpm(SCHEDULE, "learned"),
    "ddim": ddim(SCHEDULE),
    "ddim eta 1": ddim(SCHEDULE, 1.0),
    "dpm": dpm_solver_pp_2m(SCHEDULE),
}
POINT = jnp.array([0.7, -0.3, 1.0, 0.05])
MEAN, DEVIATION = 0.4, 0.5
# Weights, means and deviations of the mixture.
MIXTURE = np.array([0.3, 0.7]), np.array([-1.0, 0.8]), np.array([0.2, 0.3])


def point(x, t):
    return jnp.broadcast_to(POINT, x.shape)


def mixture(x, t, components=MIXTURE):
    """E[x0 | x_t] of a mixture of Gaussians, in every dimension alone."""
    weights, means, deviations = (jnp.asarray(part, jnp.float32) for part in components)
    abar, rest = (part.reshape((-1,) + (1,) * x.ndim) for part in (SCHEDULE.abar(t), SCHEDULE.one_minus_abar(t)))
    signal, x = jnp.sqrt(abar), x[..., None]
    variance = abar * deviations**2 + rest
    log_p = jnp.log(weights) - 0.5 * jnp.log(variance) - 0.5 * (x - signal * means) ** 2 / variance
    each = means + signal * deviations**2 / variance * (x - signal * means)
    return jnp.sum(jax.nn.softmax(log_p, axis=-1) * each, axis=-1)


def gaussian(x, t):
    return mixture(x, t, (np.ones(1), np.array([MEAN]), np.array([DEVIATION])))


def exact_denoiser(data, kind: PredictionType = "x0", learned=False):
    """The exact E[x0 | x_t] as a network of the given kind would say it; a learned variance is betatilde, raw -1."""

    def network(x, t):
        output = from_x0(SCHEDULE, kind, data(x, t), x, t)
        return jnp.concatenate([output, -jnp.ones_like(output)], axis=-1) if learned else output

    return denoiser(DiffusionConfig(prediction=kind, learned_variance=learned), SCHEDULE, network)


@functools.cache
def compiled(name, data, kind):
    """The sampler as one program for every number of steps."""
    denoise = exact_denoiser(data, kind, learned=name == "ddpm learned")
    return jax.jit(lambda keys, x, table: run(STEPS[name], denoise, keys, x, table))


def sample(name, data, keys, x, n, kind="x0"):
    return compiled(name, data, kind)(keys, x, step_table(strided_timesteps(n), 1024))


def keys_of(b, seed=0):
    return jax.random.split(jax.random.key(seed), b)


def quantiles(n):
    """Exactly normal x_T [1 n]: deterministic samplers then have no sampling error, only their own."""
    return jnp.asarray(norm.ppf((np.arange(n) + 0.5) / n), jnp.float32)[None]


# Every kind with each sampler, and the other variants of a sampler with one kind.
@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in ("ddpm learned", "ddim", "dpm") for kind in KINDS]
    + [("ddpm", "v"), ("ddpm large", "v"), ("ddim eta 1", "v")],
)
def test_a_point_mass_is_sampled_exactly(name, kind):
    keys = keys_of(3)
    got = sample(name, point, keys, initial_noise(keys, POINT.shape), 12, kind)
    # The float32 tables of published DDPM samplers scale the last estimate by beta_0 / (1 - abar_0) = 0.99947.
    scale = SCHEDULE.betas[0] / SCHEDULE.one_minus_alphas_cumprod[0] if name.startswith("ddpm") else 1.0
    np.testing.assert_allclose(got, np.tile(scale * POINT, (3, 1)), atol=2e-6)


@pytest.mark.parametrize("kind", ["epsilon", "v"])
@pytest.mark.parametrize(("name", "n"), [("ddim", 500), ("dpm", 60)])
def test_deterministic_samplers_map_a_gaussian_onto_its_data(name, n, kind):
    # Gaussian data makes the flow linear: x_0 = mean + deviation x_T (abar_T is 0 to 5e-5).
    x = quantiles(64)
    got = sample(name, gaussian, keys_of(1), x, n, kind)
    np.testing.assert_allclose(got, MEAN + DEVIATION * x, atol=4e-3)


@pytest.mark.parametrize(
    ("name", "kind"), [("ddpm", "epsilon"), ("ddpm large", "x0"), ("ddpm learned", "v"), ("ddim eta 1", "v")]
)
def test_ancestral_samplers_have_the_moments_of_a_gaussian(name, kind):
    keys, shape = keys_of(4), (4096,)
    got = np.array(sample(name, gaussian, keys, initial_noise(keys, shape), 1000, kind))
    # Four standard errors of 16384 samples, and 5e-4 of the float32 tables (see the point mass).
    assert got.mean() == pytest.approx(MEAN, abs=4 * DEVIATION / np.sqrt(got.size) + 5e-4)
    assert got.std() == pytest.approx(DEVIATION, rel=4 / np.sqrt(2 * got.size) + 5e-4)


def distance(samples):
    """Kolmogorov-Smirnov statistic of samples against the mixture."""
    ordered = np.sort(np.ravel(samples).astype(np.float64))[:, None]
    cdf = np.sum(MIXTURE[0] * norm.cdf((ordered - MIXTURE[1]) / MIXTURE[2]), axis=1)
    grid = np.arange(len(cdf) + 1) / len(cdf)
    return max(np.max(cdf - grid[:-1]), np.max(grid[1:] - cdf))


@pytest.mark.parametrize("kind", KINDS)
def test_samplers_agree_in_distribution_on_a_mixture(kind):
    keys = keys_of(4)
    ancestral = sample("ddpm", mixture, keys, initial_noise(keys, (4096,)), 1000, kind)
    few_ddim = sample("ddim", mixture, keys[:1], quantiles(4096), 50, kind)
    few_dpm = sample("dpm", mixture, keys[:1], quantiles(4096), 20, kind)
    # None can be told from exact samples at the 1% level of 16384 of them; the last two are free of sampling error.
    for samples in (ancestral, few_ddim, few_dpm):
        assert distance(samples) < 1.63 / np.sqrt(16384)


def test_the_distance_sees_a_wrong_sampler():
    # 20 steps of the upper variance spread the data: the threshold above is not vacuous.
    keys = keys_of(4)
    assert distance(sample("ddpm large", mixture, keys, initial_noise(keys, (4096,)), 20)) > 2 * 1.63 / np.sqrt(16384)


def test_discretisation_falls_with_the_order_of_the_solver():
    # First order DDIM halves its error with twice the steps; DPM-Solver++ has a tenth of it.
    def error(name, n):
        x = quantiles(64)
        return float(np.abs(sample(name, gaussian, keys_of(1), x, n, "v") - MEAN - DEVIATION * x).max())

    assert 1.7 < error("ddim", 20) / error("ddim", 40) < 2.5
    assert error("dpm", 10) > 5 * error("dpm", 20)
    for n in (20, 25, 40):
        assert error("dpm", n) < error("ddim", n) / 10


@pytest.mark.parametrize("kind", KINDS)
def test_inverting_and_sampling_returns_the_example(kind):
    denoise, keys = exact_denoiser(mixture, kind), keys_of(1)
    x = jnp.concatenate([jnp.linspace(-1.3, -0.7, 8), jnp.linspace(0.3, 1.4, 8)])[None]
    round_trip = jax.jit(
        lambda up, down: run(ddim(SCHEDULE), denoise, keys, invert(SCHEDULE, denoise, keys, x, up), down)
    )
    errors = []
    for n in (128, 256, 512):
        timesteps = strided_timesteps(n)
        got = round_trip(reverse_table(timesteps, 512), step_table(timesteps, 512))
        errors.append(float(np.abs(got - x).max()))
    assert errors[-1] < 0.02
    assert errors[0] > 1.5 * errors[1] > 1.5 * 1.5 * errors[2]  # first order


def test_inversion_ends_in_the_noise_of_a_gaussian():
    x_T = quantiles(32)
    x = MEAN + DEVIATION * x_T
    table = reverse_table(strided_timesteps(1000))
    got = invert(SCHEDULE, exact_denoiser(gaussian), keys_of(1), x, table)
    np.testing.assert_allclose(got, x_T, atol=5e-3)


@pytest.mark.parametrize("name", ["ddpm", "ddim eta 1", "dpm"])
def test_an_example_is_the_same_alone_and_in_a_batch(name):
    keys = keys_of(4)
    x = initial_noise(keys, (5, 3))
    together = sample(name, mixture, keys, x, 12)
    assert np.abs(np.diff(together, axis=0)).min() > 0
    for i in (0, 3):
        only = keys[i : i + 1]
        np.testing.assert_array_equal(initial_noise(only, (5, 3)), x[i : i + 1])
        np.testing.assert_allclose(sample(name, mixture, only, x[i : i + 1], 12), together[i : i + 1], atol=1e-6)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm"])
def test_step_counts_of_a_bucket_share_one_program(name):
    traces, keys = [], keys_of(2)

    @jax.jit
    def program(keys, x, table):
        traces.append(1)
        return run(STEPS[name], exact_denoiser(gaussian), keys, x, table)

    x = initial_noise(keys, (4,))
    few, many = (program(keys, x, step_table(strided_timesteps(n))) for n in (5, 32))
    assert len(traces) == 1
    assert np.abs(few - many).max() > 1e-3
    program(keys, x, step_table(strided_timesteps(33)))
    assert len(traces) == 2


def test_the_padding_of_a_table_changes_nothing():
    keys, denoise = keys_of(2), exact_denoiser(mixture)
    x, timesteps = initial_noise(keys, (4,)), strided_timesteps(9)
    short, long = (run(STEPS["ddpm"], denoise, keys, x, step_table(timesteps, size)) for size in (9, 256))
    np.testing.assert_array_equal(short, long)


def test_eta_is_data():
    keys, denoise, traces = keys_of(2), exact_denoiser(mixture), []
    x, table = initial_noise(keys, (4,)), step_table(strided_timesteps(10))

    @jax.jit
    def program(eta):
        traces.append(1)
        return run(ddim(SCHEDULE, eta), denoise, keys, x, table)

    still, mixed, moving = program(jnp.zeros(2)), program(jnp.array([0.0, 1.0])), program(jnp.ones(2))
    assert len(traces) == 1
    np.testing.assert_array_equal(mixed[0], still[0])
    np.testing.assert_array_equal(mixed[1], moving[1])
    assert np.abs(still - moving).min() > 0


def test_ddim_of_eta_one_is_ddpm():
    # With betatilde the two are one formula (arXiv 2010.02502 section 4.1); into clean data they differ by 0.99947.
    keys = keys_of(4)
    x = initial_noise(keys, (5, 3))
    pair = [sample(name, mixture, keys, x, 30) for name in ("ddpm", "ddim eta 1")]
    np.testing.assert_allclose(pair[0], pair[1], atol=1.5e-3)


def published_step(t, t_next, x, x0, raw, noise):
    """Checkpoint facts, 'Scheduler arithmetic', in numpy float32: the step of the published UnCLIPScheduler."""
    one = np.float32(1)
    betas, abars, rests = SCHEDULE
    a, rest = abars[t], rests[t]
    p, rest_next = (abars[t_next], rests[t_next]) if t_next >= 0 else (one, np.float32(0))
    beta = betas[t] if t_next == t - 1 else one - a / p
    mean = np.sqrt(p) * beta / rest * x0 + np.sqrt(one - beta) * rest_next / rest * x
    if t == 0:
        return mean
    small = rest_next / rest * beta
    if raw is None:
        return mean + np.exp(np.float32(0.5) * np.log(np.maximum(small, np.float32(1e-20)))) * noise
    fraction = (raw + one) / np.float32(2)
    return mean + np.exp(np.float32(0.5) * (fraction * np.log(beta) + (one - fraction) * np.log(small))) * noise


@pytest.mark.parametrize("learned", [False, True])
def test_ddpm_steps_are_the_published_schedulers(learned, exact_division):
    x, x0, raw = np.array(jax.random.normal(jax.random.key(1), (3, 2, 64)))
    x0, raw = np.clip(x0, -1, 1), np.tanh(raw)
    keys = keys_of(2)
    config = DiffusionConfig(prediction="x0", learned_variance=learned)
    output = np.concatenate([x0, raw], axis=-1) if learned else x0
    denoise = denoiser(config, SCHEDULE, lambda x, t: jnp.asarray(output))
    name = "ddpm learned" if learned else "ddpm"
    step = jax.jit(lambda state, table: STEPS[name](denoise, state, table, keys))
    for n, i in [(count, i) for count in (7, 25, 1000) for i in (0, 1, count // 2, count - 2, count - 1)]:
        table = step_table(strided_timesteps(n), 1024)
        state = initial_state(jnp.asarray(x))._replace(done=jnp.int32(i))
        noise = np.stack([np.array(jax.random.normal(jax.random.fold_in(key, i + 1), (64,))) for key in keys])
        expected = published_step(int(table.t[i]), int(table.t_next[i]), x, x0, raw if learned else None, noise)
        after = step(state, table)
        assert after.done == i + 1
        np.testing.assert_allclose(after.x, expected, atol=2e-6)


def test_a_jump_up_renoises():
    # Down to 0, up to 400 and down again is still a sample of the data.
    down = strided_timesteps(100).tolist()
    again = [t for t in down if t < 400]
    walk = [*down, 400, *again, -1]
    keys = keys_of(4)
    x = initial_noise(keys, (2048,))
    table = pair_table(list(zip(walk, walk[1:], strict=False)))
    got = jax.jit(lambda table: run(STEPS["ddpm"], exact_denoiser(gaussian), keys, x, table))(table)
    assert got.mean() == pytest.approx(MEAN, abs=0.03)
    assert got.std() == pytest.approx(DEVIATION, rel=0.05)


def test_learned_variance_needs_a_network_that_has_one():
    keys = keys_of(1)
    with pytest.raises(ValueError, match="no learned variance"):
        run(STEPS["ddpm learned"], exact_denoiser(point), keys, initial_noise(keys, (4,)), step_table(np.array([9, 0])))


def test_a_network_in_bfloat16_is_sampled_in_float32():
    config, keys = DiffusionConfig(prediction="v"), keys_of(1)
    denoise = denoiser(config, SCHEDULE, lambda x, t: x.astype(jnp.bfloat16))
    got = run(STEPS["dpm"], denoise, keys, initial_noise(keys, (4, 4, 3)), step_table(strided_timesteps(4)))
    assert got.dtype == jnp.float32 and np.all(np.isfinite(got))
