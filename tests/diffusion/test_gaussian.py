import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from unclip_jax.config import DiffusionConfig, PredictionType
from unclip_jax.diffusion import gaussian
from unclip_jax.diffusion.gaussian import denoiser, loss_weight, sample_timesteps
from unclip_jax.diffusion.schedule import make_schedule

KINDS: tuple[PredictionType, ...] = ("epsilon", "x0", "v")
SCHEDULES = {name: make_schedule(DiffusionConfig(schedule=name)) for name in ("cosine", "linear")}
EXTREMES = jnp.array([0, 1, 500, 998, 999])
SHAPES = [(5, 4, 4, 3), (5, 8)]  # pictures and embeddings


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    return SCHEDULES[request.param]


# Each is one program for both schedules.
add_noise, renoise, epsilon_from_x0 = map(jax.jit, (gaussian.add_noise, gaussian.renoise, gaussian.epsilon_from_x0))
to_x0, from_x0, training_target = (
    jax.jit(function, static_argnums=1) for function in (gaussian.to_x0, gaussian.from_x0, gaussian.training_target)
)
posterior_mean, posterior_log_variance = map(jax.jit, (gaussian.posterior_mean, gaussian.posterior_log_variance))
forward_log_variance, learned_log_variance = map(
    jax.jit, (gaussian.forward_log_variance, gaussian.learned_log_variance)
)
compiled_loss = jax.jit(gaussian.diffusion_loss, static_argnums=0)
training_noise = jax.jit(gaussian.training_noise, static_argnums=(1, 2))


def batch(shape, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(part, jnp.float32) for part in (rng.uniform(-1, 1, shape), rng.normal(size=shape)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_network_means_the_clean_example(schedule, kind, shape):
    x0, noise = batch(shape)
    x = add_noise(schedule, x0, noise, EXTREMES)
    target = training_target(schedule, kind, x0, noise, EXTREMES)
    estimate = to_x0(schedule, kind, target, x, EXTREMES)
    # An epsilon is divided by sqrt(abar): float32 rounding (of x and of sigma epsilon, up to 4) grows by as much.
    amplified = 1 / np.sqrt(schedule.alphas_cumprod[np.array(EXTREMES)]) if kind == "epsilon" else np.ones(5)
    error = np.abs(estimate - x0).reshape(5, -1).max(axis=1)
    assert np.all(error < 1e-6 * amplified)


@pytest.mark.parametrize("start", KINDS)
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_turn_into_one_another_and_back(schedule, start, kind):
    t = jnp.array([5, 100, 400, 700, 900])
    output, x = batch((5, 16))
    x0 = to_x0(schedule, start, output, x, t)
    there = from_x0(schedule, kind, x0, x, t)
    back = from_x0(schedule, start, to_x0(schedule, kind, there, x, t), x, t)
    # Rounding grows by 1 / sqrt(abar) on the way to x0 and by 1 / sqrt(1 - abar) on the way back.
    rows = np.array(t)
    growth = 1 / np.sqrt(schedule.alphas_cumprod[rows] * schedule.one_minus_alphas_cumprod[rows])
    assert np.all(np.abs(back - output).max(axis=1) < 2e-6 * growth)


def test_targets_agree_with_their_conversion(schedule):
    t = jnp.array([20, 100, 400, 700, 900])
    x0, noise = batch((5, 16))
    x = add_noise(schedule, x0, noise, t)
    for kind in KINDS:
        np.testing.assert_allclose(
            from_x0(schedule, kind, x0, x, t), training_target(schedule, kind, x0, noise, t), atol=2e-5
        )
    np.testing.assert_allclose(epsilon_from_x0(schedule, x0, x, t), noise, atol=2e-5)


def test_posterior_of_consecutive_steps_is_the_textbooks(schedule):
    t = jnp.arange(1, 1000)
    beta = schedule.betas.astype(np.float64)[1:]
    abar = schedule.alphas_cumprod.astype(np.float64)
    tilde = beta * (1 - abar[:-1]) / (1 - abar[1:])
    # 1 - abar is a float32 table: 3e-8 of rounding on the smallest entry, 4e-5 (cosine), at both ends of the ratio.
    np.testing.assert_allclose(np.exp(posterior_log_variance(schedule, t, t - 1)), tilde, rtol=5e-6)
    np.testing.assert_allclose(np.exp(forward_log_variance(schedule, t, t - 1)), beta, rtol=5e-6)
    x0, x = batch((999, 1))
    mean = np.sqrt(abar[:-1]) * beta / (1 - abar[1:]) * x0[:, 0]
    mean = mean + np.sqrt(1 - beta) * (1 - abar[:-1]) / (1 - abar[1:]) * x[:, 0]
    np.testing.assert_allclose(posterior_mean(schedule, x0, x, t, t - 1)[:, 0], mean, atol=2e-6)


@pytest.mark.parametrize("t_next", [998, 800, 300, 0])
def test_posterior_is_consistent_with_the_forward_process(schedule, t_next):
    # E[x_next] and Var[x_next] over x_t | x0 are those of the forward process to t_next, for any pair.
    t, t_next = jnp.array([999]), jnp.array([t_next])
    one, zero = jnp.ones((1, 1)), jnp.zeros((1, 1))
    of_x0, of_x = (posterior_mean(schedule, *args, t, t_next).item() for args in ((one, zero), (zero, one)))
    abar, rest = schedule.alphas_cumprod, schedule.one_minus_alphas_cumprod
    assert of_x0 + of_x * np.sqrt(abar[999]) == pytest.approx(np.sqrt(abar[t_next.item()]), rel=1e-4)
    variance = np.exp(posterior_log_variance(schedule, t, t_next).item())
    assert of_x**2 * rest[999] + variance == pytest.approx(rest[t_next.item()], rel=1e-4)


def test_the_step_into_clean_data_has_a_finite_variance(schedule):
    first, second = posterior_log_variance(schedule, jnp.array([0, 1]), jnp.array([-1, 0]))
    assert first == second and np.isfinite(first)


def test_learned_variance_lies_between_its_ends(schedule):
    t, t_next = jnp.array([999, 500, 42]), jnp.array([957, 499, 0])
    small, large = posterior_log_variance(schedule, t, t_next), forward_log_variance(schedule, t, t_next)
    for raw, expected in ((-1.0, small), (1.0, large), (0.0, (small + large) / 2)):
        got = learned_log_variance(schedule, jnp.full((3, 2), raw), t, t_next)
        np.testing.assert_allclose(got, np.repeat(expected[:, None], 2, axis=1), rtol=1e-6)


def test_renoising_composes_to_the_forward_process(schedule):
    # Noise 0 to 300 to 700 has the moments of noise 0 to 700.
    x0, zero = jnp.ones((1, 1)), jnp.zeros((1, 1))
    t, t_next = jnp.array([300]), jnp.array([700])
    signal = renoise(schedule, add_noise(schedule, x0, zero, t), zero, t, t_next).item()
    first = renoise(schedule, add_noise(schedule, zero, x0, t), zero, t, t_next).item()
    second = renoise(schedule, zero, x0, t, t_next).item()
    assert signal == pytest.approx(np.sqrt(schedule.alphas_cumprod[700]), rel=1e-5)
    assert first**2 + second**2 == pytest.approx(schedule.one_minus_alphas_cumprod[700], rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_min_snr_weights_are_one_weight_on_x0(schedule, kind):
    # Of all kinds, weight x squared error is the same min(snr, gamma) x squared error of x0.
    config = DiffusionConfig(prediction=kind, min_snr_gamma=5.0)
    t = jnp.array([10, 200, 500, 800, 990])
    output, x = batch((5, 1))
    x0, error = to_x0(schedule, kind, output, x, t), 0.25
    of_x0 = to_x0(schedule, kind, output + error, x, t) - x0
    snr = schedule.alphas_cumprod / schedule.one_minus_alphas_cumprod
    expected = np.minimum(snr[np.array(t)], 5.0) * np.square(of_x0[:, 0])
    np.testing.assert_allclose(loss_weight(config, schedule, t) * error**2, expected, rtol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_loss_is_the_mean_squared_error_of_the_kind(schedule, kind):
    config = DiffusionConfig(prediction=kind)
    x0, noise = batch((5, 4, 4, 3))
    x = add_noise(schedule, x0, noise, EXTREMES)
    target = training_target(schedule, kind, x0, noise, EXTREMES)
    loss = compiled_loss(config, schedule, (target + 0.5).astype(jnp.bfloat16), x0, x, noise, EXTREMES)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, 0.25, rtol=5e-3)  # bfloat16 has 8 bits
    np.testing.assert_allclose(compiled_loss(config, schedule, target, x0, x, noise, EXTREMES), 0, atol=1e-13)


def numpy_hybrid_loss(schedule, kind, output, x0, x_t, noise, t, vlb_weight):
    """Equations (2) and (7) per example in float64, on the same float32 tables."""
    betas, abars, rests = (np.asarray(table, np.float64) for table in schedule)
    arrays, losses = [np.asarray(array, np.float64) for array in (output, x0, x_t, noise)], []
    for out, clean, noisy, eps, step in zip(*arrays, np.asarray(t), strict=True):
        mean_out, raw = np.split(out, 2, axis=-1)
        a, rest, beta = abars[step], rests[step], betas[step]
        p, rest_next = (abars[step - 1], rests[step - 1]) if step else (1.0, 0.0)
        target = {"epsilon": eps, "x0": clean, "v": np.sqrt(a) * eps - np.sqrt(rest) * clean}[kind]
        estimate = {
            "epsilon": (noisy - np.sqrt(rest) * mean_out) / np.sqrt(a),
            "x0": mean_out,
            "v": np.sqrt(a) * noisy - np.sqrt(rest) * mean_out,
        }[kind]
        tilde = betas[1] * rests[0] / rests[1] if step == 0 else beta * rest_next / rest
        from_clean, from_noisy = np.sqrt(p) * beta / rest, np.sqrt(1 - beta) * rest_next / rest
        mean, true = from_clean * estimate + from_noisy * noisy, from_clean * clean + from_noisy * noisy
        fraction = (raw + 1) / 2
        variance = np.exp(fraction * np.log(beta) + (1 - fraction) * np.log(tilde))
        if step:
            nats = 0.5 * (np.log(variance / tilde) + tilde / variance + (true - mean) ** 2 / variance - 1)
        else:
            sd = np.sqrt(variance)
            upper = np.where(clean > 0.999, 1.0, norm.cdf((clean + 1 / 255 - mean) / sd))
            lower = np.where(clean < -0.999, 0.0, norm.cdf((clean - 1 / 255 - mean) / sd))
            nats = -np.log(upper - lower)
        mse = np.mean((mean_out - target) ** 2)
        losses.append(mse + vlb_weight * len(betas) * np.mean(nats) / np.log(2))
    return np.array(losses)


@pytest.mark.parametrize("kind", KINDS)
def test_hybrid_loss_is_that_of_a_float64_transcription(schedule, kind):
    config = DiffusionConfig(prediction=kind, learned_variance=True)
    t = jnp.array([0, 0, 1, 2, 300, 700, 998, 999])
    x0, noise = batch((8, 4, 4, 3))
    x0 = np.array(x0)
    x0[0, 0, :2] = [[-1.0], [1.0]]  # the open bins
    x = add_noise(schedule, x0, noise, t)
    # At t = 0 a small error of the clean estimate, so that the float64 masses do not underflow.
    shift = to_x0(schedule, kind, jnp.ones_like(x), x, t) - to_x0(schedule, kind, jnp.zeros_like(x), x, t)
    size = np.where(np.array(t)[:, None, None, None] == 0, 0.01 / np.abs(shift), 0.3)
    target, rng = training_target(schedule, kind, x0, noise, t), np.random.default_rng(5)
    prediction = target + size * rng.normal(size=x.shape).clip(-2, 2)
    raw = rng.uniform(-1.2, 1.2, x.shape)
    output = np.concatenate([prediction, raw], axis=-1).astype(np.float32)
    got = compiled_loss(config, schedule, output, x0, x, noise, t)
    expected = numpy_hybrid_loss(schedule, kind, output, x0, x, noise, t, config.vlb_weight)
    np.testing.assert_allclose(got, expected, rtol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_trains_variances_only_and_stays_finite(kind):
    schedule = SCHEDULES["cosine"]
    x0, noise = batch((5, 4, 4, 3))
    x = add_noise(schedule, x0, noise, EXTREMES)
    output = jnp.zeros((5, 4, 4, 6))  # a network as initialised

    config = DiffusionConfig(prediction=kind, learned_variance=True)
    gradient = jax.jit(jax.grad(lambda out: compiled_loss(config, schedule, out, x0, x, noise, EXTREMES).sum()))(output)
    assert np.all(np.isfinite(gradient))
    of_mse = -2 * training_target(schedule, kind, x0, noise, EXTREMES) / x0[0].size
    np.testing.assert_allclose(gradient[..., :3], of_mse, rtol=1e-5, atol=1e-8)
    assert np.all(np.abs(gradient[..., 3:]).max(axis=(1, 2, 3))[:3] > 0)


def test_the_bound_falls_when_the_variance_is_right():
    # A perfect mean leaves KL(betatilde, variance), which is zero at raw = -1.
    schedule, t = SCHEDULES["cosine"], jnp.array([2, 20, 200])
    config = DiffusionConfig(learned_variance=True)
    x0, noise = batch((3, 4, 4, 3))
    x = add_noise(schedule, x0, noise, t)
    losses = [
        compiled_loss(config, schedule, jnp.concatenate([noise, jnp.full_like(x, raw)], -1), x0, x, noise, t)
        for raw in (-1.0, 0.0, 1.0)
    ]
    assert np.all(losses[0] < 1e-5)
    assert losses[0][0] < losses[1][0] < losses[2][0]


def test_a_denoiser_splits_channels_and_computes_in_float32():
    schedule = SCHEDULES["cosine"]
    config = DiffusionConfig(prediction="v", learned_variance=True)
    x, output = batch((5, 8))

    def network(x, t):
        return jnp.concatenate([output, output / 2], axis=-1).astype(jnp.bfloat16)

    prediction = denoiser(config, schedule, network)(x, EXTREMES)
    assert prediction.x0.dtype == jnp.float32
    assert prediction.log_variance is not None and prediction.log_variance.dtype == jnp.float32
    np.testing.assert_allclose(prediction.log_variance, output / 2, rtol=1e-2)
    np.testing.assert_allclose(prediction.x0, to_x0(schedule, "v", output, x, EXTREMES), atol=2e-2)
    assert denoiser(DiffusionConfig(), schedule, lambda x, t: output)(x, EXTREMES).log_variance is None
    with pytest.raises(ValueError, match="expects"):
        denoiser(DiffusionConfig(), schedule, network)(x, EXTREMES)


def test_training_timesteps_are_uniform_or_logit_normal():
    key, n = jax.random.key(0), 20_000
    uniform = np.array(sample_timesteps(key, n, DiffusionConfig()))
    assert uniform.min() >= 0 and uniform.max() == 999 and len(np.unique(uniform)) == 1000
    assert uniform.mean() == pytest.approx(499.5, abs=4 * 289 / np.sqrt(n))
    drawn = np.array(sample_timesteps(key, n, DiffusionConfig(timestep_mean=0.2, timestep_scale=1.2)))
    logits = np.log((drawn + 0.5) / (999.5 - drawn))
    assert logits.mean() == pytest.approx(0.2, abs=4 * 1.2 / np.sqrt(n))
    assert logits.std() == pytest.approx(1.2, rel=0.03)
    wide = np.array(sample_timesteps(key, n, DiffusionConfig(timestep_mean=9.0, timestep_scale=9.0)))
    assert wide.min() >= 0 and wide.max() == 999


def test_offset_noise_is_constant_per_channel():
    key, shape = jax.random.key(0), (64, 8, 8, 3)
    plain, offset = training_noise(key, shape), training_noise(key, shape, 0.5)
    added = offset - plain
    np.testing.assert_allclose(added, np.broadcast_to(added[:, :1, :1], shape), atol=1e-6)
    assert added[:, 0, 0].std() == pytest.approx(0.5, rel=0.2)
    assert plain.std() == pytest.approx(1, rel=0.02)
