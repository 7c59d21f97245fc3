"""The Gaussian diffusion process: how clean data, noise, velocity and variance turn into one another.

With a = abar_t of the schedule, p = abar at t_next (1 at the end, t_next = -1), for any pair of timesteps:

    (1)  x_t = sqrt(a) x0 + sqrt(1 - a) epsilon                                    forward, arXiv 2006.11239 eq. 4
    (2)  v = sqrt(a) epsilon - sqrt(1 - a) x0                                      velocity, arXiv 2202.00512 section 4
         x0 = (x_t - sqrt(1 - a) epsilon) / sqrt(a) = sqrt(a) x_t - sqrt(1 - a) v
    (3)  beta = 1 - a / p, beta_t itself when t_next = t - 1                       of the chain that is walked
    (4)  mean = sqrt(p) beta / (1 - a) x0 + sqrt(1 - beta) (1 - p) / (1 - a) x_t   posterior, arXiv 2006.11239 eq. 7
    (5)  betatilde = (1 - p) / (1 - a) beta                                        its variance
    (6)  log variance = f log beta + (1 - f) log betatilde, f = (raw + 1) / 2      learned, arXiv 2102.09672 eq. 15
    (7)  L = L_simple + lambda T L_vlb at the drawn t, in bits per dimension       hybrid loss, arXiv 2102.09672 eq. 16
    (8)  weight = min(snr, gamma) x {1, 1 / snr, 1 / (snr + 1)}, snr = a / (1-a)   of x0, epsilon, v: arXiv 2303.09556
    (9)  x_next = sqrt(p / a) x_t + sqrt(1 - p / a) epsilon                        renoising, t_next > t

Networks emit raw output; only this file knows an epsilon from an x0 or a v. Every function takes examples of any rank
[b ...] with timesteps [b], and computes in float32 whatever the network's dtype.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr
from jaxtyping import Array, Float, Num

from unclip_jax.config import DiffusionConfig, PredictionType
from unclip_jax.diffusion.schedule import Schedule
from unclip_jax.types import Denoise, Prediction, PRNGKey, Timesteps

Network = Callable[[Float[Array, "b ..."], Timesteps], Float[Array, "b ..."]]

LOG_2 = float(np.log(2.0))
SMALLEST_VARIANCE = 1e-20


def over(values: Num[Array, " b"], x: Float[Array, "b ..."]) -> Num[Array, "b ..."]:
    """One value per example, shaped [b 1 ...] to broadcast over x."""
    return values.reshape(values.shape + (1,) * (x.ndim - 1))


def _signal_and_noise(
    schedule: Schedule, t: Timesteps, x: Float[Array, "b ..."]
) -> tuple[Float[Array, "b ..."], Float[Array, "b ..."]]:
    return over(jnp.sqrt(schedule.abar(t)), x), over(jnp.sqrt(schedule.one_minus_abar(t)), x)


def _mean_per_example(x: Float[Array, "b ..."]) -> Float[Array, " b"]:
    return x.reshape(x.shape[0], -1).mean(axis=1)


def add_noise(
    schedule: Schedule, x0: Float[Array, "b *d"], noise: Float[Array, "b *d"], t: Timesteps
) -> Float[Array, "b *d"]:
    """Noisy x_t of clean x0, equation (1)."""
    signal, sigma = _signal_and_noise(schedule, t, x0)
    return signal * x0.astype(jnp.float32) + sigma * noise.astype(jnp.float32)


def renoise(
    schedule: Schedule, x: Float[Array, "b *d"], noise: Float[Array, "b *d"], t: Timesteps, t_next: Timesteps
) -> Float[Array, "b *d"]:
    """Noisier x at t_next > t of x at t, equation (9): the forward process between two levels."""
    kept = schedule.abar(t_next) / schedule.abar(t)
    return over(jnp.sqrt(kept), x) * x.astype(jnp.float32) + over(jnp.sqrt(1 - kept), x) * noise


def to_x0(
    schedule: Schedule, kind: PredictionType, output: Float[Array, "b *d"], x: Float[Array, "b *d"], t: Timesteps
) -> Float[Array, "b *d"]:
    """Clean estimate, float32, that a network output of the given kind means at x_t, equation (2)."""
    output, x = output.astype(jnp.float32), x.astype(jnp.float32)
    signal, sigma = _signal_and_noise(schedule, t, x)
    match kind:
        case "epsilon":
            return (x - sigma * output) / signal
        case "x0":
            return output
        case "v":
            return signal * x - sigma * output


def epsilon_from_x0(
    schedule: Schedule, x0: Float[Array, "b *d"], x: Float[Array, "b *d"], t: Timesteps
) -> Float[Array, "b *d"]:
    """Noise that x_t holds beside x0, equation (1); t >= 0."""
    signal, sigma = _signal_and_noise(schedule, t, x)
    return (x.astype(jnp.float32) - signal * x0.astype(jnp.float32)) / sigma


def from_x0(
    schedule: Schedule, kind: PredictionType, x0: Float[Array, "b *d"], x: Float[Array, "b *d"], t: Timesteps
) -> Float[Array, "b *d"]:
    """Network output of the given kind that means x0 at x_t: the inverse of to_x0."""
    x0, x = x0.astype(jnp.float32), x.astype(jnp.float32)
    signal, sigma = _signal_and_noise(schedule, t, x)
    match kind:
        case "epsilon":
            return epsilon_from_x0(schedule, x0, x, t)
        case "x0":
            return x0
        case "v":
            return (signal * x - x0) / sigma


def training_target(
    schedule: Schedule, kind: PredictionType, x0: Float[Array, "b *d"], noise: Float[Array, "b *d"], t: Timesteps
) -> Float[Array, "b *d"]:
    """What a network of the given kind learns to emit at x_t = add_noise(x0, noise), float32."""
    x0, noise = x0.astype(jnp.float32), noise.astype(jnp.float32)
    signal, sigma = _signal_and_noise(schedule, t, x0)
    match kind:
        case "epsilon":
            return noise
        case "x0":
            return x0
        case "v":
            return signal * noise - sigma * x0


def _step_beta(schedule: Schedule, t: Timesteps, t_next: Timesteps) -> Float[Array, " b"]:
    return jnp.where(t_next == t - 1, schedule.beta(t), 1 - schedule.abar(t) / schedule.abar(t_next))


def posterior_mean(
    schedule: Schedule, x0: Float[Array, "b *d"], x: Float[Array, "b *d"], t: Timesteps, t_next: Timesteps
) -> Float[Array, "b *d"]:
    """Mean of x at t_next < t given x0 and x_t, equation (4)."""
    beta, rest = _step_beta(schedule, t, t_next), schedule.one_minus_abar(t)
    of_x0 = jnp.sqrt(schedule.abar(t_next)) * beta / rest
    of_x = jnp.sqrt(1 - beta) * schedule.one_minus_abar(t_next) / rest
    return over(of_x0, x) * x0.astype(jnp.float32) + over(of_x, x) * x.astype(jnp.float32)


def posterior_log_variance(schedule: Schedule, t: Timesteps, t_next: Timesteps) -> Float[Array, " b"]:
    """Log of betatilde, equation (5); into clean data it is 0, and the step 1 to 0 of the full chain stands in."""
    end = t_next < 0
    t, t_next = jnp.where(end, min(1, schedule.steps - 1), t), jnp.where(end, 0, t_next)
    variance = schedule.one_minus_abar(t_next) / schedule.one_minus_abar(t) * _step_beta(schedule, t, t_next)
    return jnp.log(jnp.maximum(variance, SMALLEST_VARIANCE))


def forward_log_variance(schedule: Schedule, t: Timesteps, t_next: Timesteps) -> Float[Array, " b"]:
    """Log of beta, equation (3): the upper end of the reverse step's variance."""
    return jnp.log(jnp.maximum(_step_beta(schedule, t, t_next), SMALLEST_VARIANCE))


def learned_log_variance(
    schedule: Schedule, raw: Float[Array, "b *d"], t: Timesteps, t_next: Timesteps
) -> Float[Array, "b *d"]:
    """Log variance that raw network output in [-1, 1] chooses between betatilde and beta, equation (6)."""
    fraction = (raw.astype(jnp.float32) + 1) / 2
    large = over(forward_log_variance(schedule, t, t_next), raw)
    small = over(posterior_log_variance(schedule, t, t_next), raw)
    return fraction * large + (1 - fraction) * small


def denoiser(config: DiffusionConfig, schedule: Schedule, apply: Network) -> Denoise:
    """The denoiser of a raw network apply(x, t) -> output in the config's parametrisation.

    output has x's shape, or twice its channels (last axis: prediction, then variance) when the config learns variances.
    """

    def denoise(x: Float[Array, "b *d"], t: Timesteps) -> Prediction:
        output, raw = _split(config, apply(x, t), x.shape)
        return Prediction(to_x0(schedule, config.prediction, output, x, t), raw)

    return denoise


def _split(
    config: DiffusionConfig, output: Float[Array, "b ..."], shape: tuple[int, ...]
) -> tuple[Float[Array, "b ..."], Float[Array, "b ..."] | None]:
    expected = (*shape[:-1], 2 * shape[-1]) if config.learned_variance else shape
    if output.shape != expected:
        raise ValueError(f"the network's output has shape {output.shape}, its diffusion config expects {expected}")
    if not config.learned_variance:
        return output, None
    mean, raw = jnp.split(output, 2, axis=-1)
    return mean, raw.astype(jnp.float32)


def sample_timesteps(key: PRNGKey, b: int, config: DiffusionConfig) -> Timesteps:
    """Training timesteps, int32 in [0, T): uniform, or with a normal logit of t / T (arXiv 2403.03206 section 3.1)."""
    if config.timestep_mean is None:
        return jax.random.randint(key, (b,), 0, config.steps)
    u = jax.nn.sigmoid(config.timestep_mean + config.timestep_scale * jax.random.normal(key, (b,)))
    return jnp.minimum((u * config.steps).astype(jnp.int32), config.steps - 1)


def training_noise(key: PRNGKey, shape: tuple[int, ...], offset: float = 0.0) -> Float[Array, "b ..."]:
    """Standard noise [b ... c], plus offset times a normal constant per example and channel."""
    key, key_offset = jax.random.split(key)
    noise = jax.random.normal(key, shape)
    if not offset:
        return noise
    return noise + offset * jax.random.normal(key_offset, (shape[0], *(1 for _ in shape[1:-1]), shape[-1]))


def loss_weight(config: DiffusionConfig, schedule: Schedule, t: Timesteps) -> Float[Array, " b"]:
    """Weight of the parametrisation's own squared error: 1, or min-SNR, equation (8)."""
    gamma, signal, noise = config.min_snr_gamma, schedule.abar(t), schedule.one_minus_abar(t)
    if gamma is None:
        return jnp.ones(t.shape, jnp.float32)
    match config.prediction:
        case "epsilon":
            return jnp.minimum(1.0, gamma * noise / signal)
        case "x0":
            return jnp.minimum(signal / noise, gamma)
        case "v":
            return jnp.minimum(signal, gamma * noise)


def diffusion_loss(
    config: DiffusionConfig,
    schedule: Schedule,
    output: Float[Array, "b *e"],
    x0: Float[Array, "b *d"],
    x_t: Float[Array, "b *d"],
    noise: Float[Array, "b *d"],
    t: Timesteps,
) -> Float[Array, " b"]:
    """Loss per example, float32: weighted MSE, plus the variational bound of learned variances, equation (7).

    output: raw network output at (x_t, t), with twice x0's channels when the config learns variances. The bound
    trains the variances alone: no gradient of it reaches the prediction.
    """
    output, raw = _split(config, output, x0.shape)
    error = output.astype(jnp.float32) - training_target(schedule, config.prediction, x0, noise, t)
    loss = loss_weight(config, schedule, t) * _mean_per_example(jnp.square(error))
    if raw is None:
        return loss
    estimate = to_x0(schedule, config.prediction, jax.lax.stop_gradient(output), x_t, t)
    return loss + config.vlb_weight * schedule.steps * _bound(schedule, estimate, raw, x0, x_t, t)


def _bound(
    schedule: Schedule,
    estimate: Float[Array, "b *d"],
    raw: Float[Array, "b *d"],
    x0: Float[Array, "b *d"],
    x_t: Float[Array, "b *d"],
    t: Timesteps,
) -> Float[Array, " b"]:
    # One term of the variational bound in bits per dimension: a KL divergence, at t = 0 a likelihood of 8-bit data.
    mean = posterior_mean(schedule, estimate, x_t, t, t - 1)
    log_variance = learned_log_variance(schedule, raw, t, t - 1)
    true_mean = posterior_mean(schedule, x0, x_t, t, t - 1)
    ratio = over(posterior_log_variance(schedule, t, t - 1), x0) - log_variance
    kl = 0.5 * (jnp.exp(ratio) - 1 - ratio + jnp.square(true_mean - mean) * jnp.exp(-log_variance))
    likelihood = _log_likelihood(x0.astype(jnp.float32), mean, log_variance)
    return _mean_per_example(jnp.where(over(t, x0) == 0, -likelihood, kl)) / LOG_2


def _log_likelihood(
    x0: Float[Array, "b *d"], mean: Float[Array, "b *d"], log_variance: Float[Array, "b *d"]
) -> Float[Array, "b *d"]:
    # Mass of a Gaussian in x0's bin of width 2/255, the outermost bins being open (arXiv 2006.11239 eq. 13).
    scale, half = jnp.exp(-0.5 * log_variance), 1 / 255
    # By symmetry a bin is moved into the left tail, where float32 log-probabilities keep their precision.
    distance = jnp.abs(x0 - mean)
    upper, lower = log_ndtr((half - distance) * scale), log_ndtr((-half - distance) * scale)
    inner = upper + jnp.log(-jnp.expm1(lower - upper))
    left, right = log_ndtr((x0 - mean + half) * scale), log_ndtr((mean - x0 + half) * scale)
    return jnp.where(x0 < -0.999, left, jnp.where(x0 > 0.999, right, inner))
