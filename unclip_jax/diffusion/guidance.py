"""Wrappers of a denoiser, which samplers know nothing of: guidance by a classifier-free pair or a score, and limits.

Usually clip_static(classifier_free(...), 1.0): limits apply to the guided estimate.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from unclip_jax.diffusion.gaussian import epsilon_from_x0, over
from unclip_jax.diffusion.schedule import Schedule
from unclip_jax.sharding import rows
from unclip_jax.types import Denoise, Prediction, Timesteps

PerExample = float | Float[Array, ""] | Float[Array, " b"]
Score = Callable[[Float[Array, "b ..."]], Float[Array, " b"]]


def classifier_free(denoise_doubled: Denoise, scale: PerExample, rescale: PerExample = 0.0) -> Denoise:
    """Classifier-free guidance, out = uncond + scale (cond - uncond), in one call on a doubled batch.

    denoise_doubled: denoiser of [2b ...], whose condition is [uncond, cond] in this order. scale: number or [b];
    it is data, so a new one compiles nothing. At fixed x and t, epsilon and v are affine in x0 and the weights add up
    to 1, so that guiding x0 is guiding the network's output, whatever its kind. The variance is the conditional one.
    rescale: share, number or [b], of the guided estimate that gets the conditional one's standard deviation
    (equations 15 and 16 of arXiv 2305.08891, here on x0); 0 is off.
    """

    def denoise(x: Float[Array, "b *d"], t: Timesteps) -> Prediction:
        b, x = x.shape[0], rows(x)
        both = denoise_doubled(jnp.concatenate([x, x]), jnp.concatenate([t, t]))
        uncond, cond = rows((both.x0[:b], both.x0[b:]))
        guided = uncond + _broadcast(scale, x) * (cond - uncond)
        if not (isinstance(rescale, float) and rescale == 0):
            axes = tuple(range(1, x.ndim))
            deviation = jnp.std(cond, axes, keepdims=True), jnp.std(guided, axes, keepdims=True)
            ratio = deviation[0] / jnp.maximum(deviation[1], 1e-12)
            share = _broadcast(rescale, x)
            guided = share * ratio * guided + (1 - share) * guided
        return Prediction(guided, None if both.log_variance is None else both.log_variance[b:])

    return denoise


def score_guided(schedule: Schedule, denoise: Denoise, score: Score, scale: PerExample) -> Denoise:
    """Guidance by any score of clean examples, such as CLIP's: out = x0 + scale (1 - abar_t) grad score(x0).

    To first order E[x0 | x_t, y] = x0hat + Cov[x0 | x_t] grad log p(y | x0), and of data with unit variance the
    covariance is 1 - abar_t: with a log-probability for score, scale 1 is Bayes' rule, exact for a standard Gaussian
    and a linear score. The gradient is that at the clean estimate and does not run through the denoiser, which would
    cost a backward pass of it; the score needs no noisy training (as GLIDE's noised CLIP, arXiv 2112.10741 section
    2.4, does). scale: number or [b], data.
    """

    def guided(x: Float[Array, "b *d"], t: Timesteps) -> Prediction:
        prediction = denoise(x, t)
        # One example's score depends on that example alone, so that the gradient of the sum is each one's own.
        gradient = jax.grad(lambda x0: score(x0).sum())(prediction.x0)
        shift = _broadcast(scale, x) * over(schedule.one_minus_abar(t), x) * gradient
        return prediction._replace(x0=prediction.x0 + shift)

    return guided


def clip_static(denoise: Denoise, limit: float) -> Denoise:
    """Clips the clean estimate to [-limit, limit]: 1 for pictures, 5 or 10 for embeddings."""

    def clipped(x: Float[Array, "b *d"], t: Timesteps) -> Prediction:
        prediction = denoise(x, t)
        return prediction._replace(x0=jnp.clip(prediction.x0, -limit, limit))

    return clipped


def limit_noise(schedule: Schedule, denoise: Denoise, share: PerExample = 1.0) -> Denoise:
    """Limits the noise that a clean estimate implies to the unit deviation that noise has; the rest stays in x0.

    Near clean data a network misses more of a picture than there is noise, and inversion would take what it missed
    for noise of many deviations, tenfold at every step up. A function of x and t alone: sampling with it undoes
    inverting with it. share: how much of the limit counts, number or [b]; 0 is off. Where a sampler adds noise of its
    own the whole limit would keep some of that.
    """

    def limited(x: Float[Array, "b *d"], t: Timesteps) -> Prediction:
        prediction = denoise(x, t)
        noise = epsilon_from_x0(schedule, prediction.x0, x, t)
        deviation = jnp.sqrt(jnp.mean(jnp.square(noise), tuple(range(1, x.ndim)), keepdims=True))
        signal, sigma = (over(jnp.sqrt(f(t)), x) for f in (schedule.abar, schedule.one_minus_abar))
        trusted = (x - sigma * noise / jnp.maximum(deviation, 1)) / signal
        kept = jnp.where(deviation > 1, _broadcast(share, x), 0)
        return prediction._replace(x0=prediction.x0 + kept * (trusted - prediction.x0))

    return limited


def dynamic_threshold(denoise: Denoise, percentile: float, floor: float = 1.0) -> Denoise:
    """Dynamic thresholding (arXiv 2205.11487 section 2.3): clips each example to a percentile and scales it back.

    s = max(quantile of |x0|, floor) per example; x0 becomes clip(x0, -s, s) floor / s, so within [-floor, floor].
    percentile: in (0, 1], such as 0.995.
    """
    if not 0 < percentile <= 1:
        raise ValueError(f"the percentile of dynamic thresholding must be in (0, 1], not {percentile}")

    def thresholded(x: Float[Array, "b *d"], t: Timesteps) -> Prediction:
        prediction = denoise(x, t)
        sizes = jnp.abs(prediction.x0).reshape(x.shape[0], -1)
        s = _broadcast(jnp.maximum(jnp.quantile(sizes, percentile, axis=1), floor), x)
        return prediction._replace(x0=jnp.clip(prediction.x0, -s, s) * (floor / s))

    return thresholded


def _broadcast(values: PerExample, x: Float[Array, "b *d"]) -> Float[Array, "..."]:
    values = jnp.asarray(values, jnp.float32)
    return over(values, x) if values.ndim else values
