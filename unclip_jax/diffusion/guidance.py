"""Wrappers of a denoiser: classifier-free guidance, clipping and thresholding; samplers know none of them.

Usually clip_static(classifier_free(...), 1.0): limits apply to the guided estimate.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from unclip_jax.diffusion.gaussian import over
from unclip_jax.types import Denoise, Prediction, Timesteps

PerExample = float | Float[Array, ""] | Float[Array, " b"]


def classifier_free(denoise_doubled: Denoise, scale: PerExample, rescale: PerExample = 0.0) -> Denoise:
    """Classifier-free guidance, out = uncond + scale (cond - uncond), in one call on a doubled batch.

    denoise_doubled: denoiser of [2b ...], whose condition is [uncond, cond] in this order. scale: number or [b];
    it is data, so a new one compiles nothing. At fixed x and t, epsilon and v are affine in x0 and the weights add up
    to 1, so that guiding x0 is guiding the network's output, whatever its kind. The variance is the conditional one.
    rescale: share, number or [b], of the guided estimate that gets the conditional one's standard deviation
    (equations 15 and 16 of arXiv 2305.08891, here on x0); 0 is off.
    """

    def denoise(x: Float[Array, "b *d"], t: Timesteps) -> Prediction:
        b = x.shape[0]
        both = denoise_doubled(jnp.concatenate([x, x]), jnp.concatenate([t, t]))
        uncond, cond = both.x0[:b], both.x0[b:]
        guided = uncond + _broadcast(scale, x) * (cond - uncond)
        if not (isinstance(rescale, float) and rescale == 0):
            axes = tuple(range(1, x.ndim))
            deviation = jnp.std(cond, axes, keepdims=True), jnp.std(guided, axes, keepdims=True)
            ratio = deviation[0] / jnp.maximum(deviation[1], 1e-12)
            share = _broadcast(rescale, x)
            guided = share * ratio * guided + (1 - share) * guided
        return Prediction(guided, None if both.log_variance is None else both.log_variance[b:])

    return denoise


def clip_static(denoise: Denoise, limit: float) -> Denoise:
    """Clips the clean estimate to [-limit, limit]: 1 for pictures, 5 or 10 for embeddings."""

    def clipped(x: Float[Array, "b *d"], t: Timesteps) -> Prediction:
        prediction = denoise(x, t)
        return prediction._replace(x0=jnp.clip(prediction.x0, -limit, limit))

    return clipped


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
