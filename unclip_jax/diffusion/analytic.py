"""Analytic-DPM (arXiv 2201.06503): the reverse variance that is best for a network, measured once and for any stride.

With a, p, beta, betatilde of gaussian.py, c = sqrt(p) beta / (1 - a) the weight of x0 in the posterior mean there, and
d the number of dimensions:

    (1)  Gamma_t = E ||epsilon(x_t, t)||^2 / d                  of the network's epsilon on noised data
    (2)  V_t = (1 - a) / a (1 - Gamma_t)                        E tr Cov[x0 | x_t] / d: what x_t leaves open of x0
    (3)  sigma^2 = betatilde + c^2 V_t                          theorem 1, for the lambda^2 = betatilde of DDPM
    (4)  0 <= V_t <= min((1 - a) / a, r^2)                      theorem 2, data lying within r of the middle
    (5)  sigma sqrt(2 / pi) <= visible                          section 4.1, into the last noisy level: E |sigma noise|

The optimal epsilon is E[noise | x_t], hence orthogonal to noise - epsilon, so that

    (6)  Gamma_t = 1 - E ||noise - epsilon(x_t, t)||^2 / d      and V_t = E ||x0 - x0hat||^2 / d

say the same of it. They are what is measured here: for a trained network they give the best variance around the means
that it really has (arXiv 2206.07309), and they do not divide a small difference of two estimates by a, which goes to 0.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Float64, Int

from unclip_jax.diffusion.gaussian import add_noise, posterior_log_variance, posterior_mean
from unclip_jax.diffusion.samplers import PairVariance
from unclip_jax.diffusion.schedule import Schedule
from unclip_jax.types import Denoise, Timesteps


def squared_error(
    schedule: Schedule, denoise: Denoise, x0: Float[Array, "b *d"], noise: Float[Array, "b *d"], t: Timesteps
) -> Float[Array, " b"]:
    """||x0 - x0hat||^2 / d of each example: equation (6) is its mean over data and noise."""
    error = x0 - denoise(add_noise(schedule, x0, noise, t), t).x0
    return jnp.square(error).reshape(len(x0), -1).mean(axis=1)


def gamma_of(
    schedule: Schedule, timesteps: Int[np.ndarray, " n"], errors: Float[np.ndarray, " n"]
) -> Float64[np.ndarray, " T"]:
    """Gamma_t at every timestep, equation (6), from mean squared errors at some ascending ones, linear in between.

    float64: 1 - Gamma_t falls to 1e-10. Errors of networks that do not become exact as noise vanishes give values
    below 0, which clean_variance bounds.
    """
    errors_everywhere = np.interp(np.arange(schedule.steps), timesteps, errors)
    return 1 - _signal_to_noise(schedule) * errors_everywhere


def clean_variance(
    schedule: Schedule, gamma: Float64[np.ndarray, " T"], reach: float = np.inf
) -> Float32[np.ndarray, " T"]:
    """V_t of Gamma_t, equation (2) within the bounds (4); reach: r, such as 1 for pictures in [-1, 1]."""
    ratio = _signal_to_noise(schedule)
    return np.clip((1 - gamma) / ratio, 0, np.minimum(1 / ratio, reach**2)).astype(np.float32)


def reverse_variance(schedule: Schedule, clean: Float[Array, " T"], visible: float = np.inf) -> PairVariance:
    """The variance of a step from t to t_next, equation (3), for samplers.ddpm; clean: V_t, data.

    visible: the mean size of the noise that may be left in the result, (5); 1 / 127.5 is one level of a picture's 255.
    """

    def variance(t: Timesteps, t_next: Timesteps) -> Float[Array, " b"]:
        one = jnp.ones((*t.shape, 1))
        weight = posterior_mean(schedule, one, 0 * one, t, t_next)[:, 0]
        small = jnp.where(t_next < 0, 0.0, jnp.exp(posterior_log_variance(schedule, t, t_next)))
        best = small + jnp.square(weight) * jnp.asarray(clean)[t]
        return jnp.where(t_next == 0, jnp.minimum(best, visible**2 * np.pi / 2), best)

    return variance


def _signal_to_noise(schedule: Schedule) -> Float64[np.ndarray, " T"]:
    return schedule.alphas_cumprod.astype(np.float64) / schedule.one_minus_alphas_cumprod
