"""Seams: what is painted goes on from what is around it (Poisson image editing, Perez et al. 2003, as a membrane).

A network's estimate of the painted part misses the tone of what is known by a few levels, and a new object may run
into a mask's edge, where it is cut. Here the pixels along the edge are told to equal what lies beyond it, and the
correction that this takes spreads inwards, falling off as a membrane does that is held at its rim. Done at every step
of a walk it leads an object away from the edge while there is time.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from unclip_jax.types import Denoise, Prediction, Timesteps


def seamless(
    x0: Float[Array, "b h w c"], known: Float[Array, "b h w c"], repaint: Bool[Array, "b h w"], reach: int
) -> Float[Array, "b h w c"]:
    """x0 where repaint is false; elsewhere x0 plus a membrane that makes it go on from `known` across the mask's edge.

    reach: iterations of Laplace's equation, and so the pixels that the correction can reach inwards.
    """
    inside = repaint[..., None]
    beyond = _around(jnp.where(inside, 0.0, 1.0))
    rim = inside & (beyond > 0)
    goal = _around(jnp.where(inside, 0.0, known)) / jnp.maximum(beyond, 1.0)
    start = jnp.where(rim, goal - x0, 0.0)
    there = _around(jnp.ones_like(x0[:1, ..., :1]))

    def relax(_: Array, membrane: Array) -> Array:
        return jnp.where(inside & ~rim, _around(membrane) / there, start)

    return x0 + jax.lax.fori_loop(0, reach, relax, start)


def seamless_denoiser(
    denoise: Denoise, known: Float[Array, "b h w c"], repaint: Bool[Array, "b h w"], reach: int
) -> Denoise:
    """The denoiser, whose clean estimates go on from `known`, in [-1, 1], across the edge of a mask."""

    def joined(x: Float[Array, "b h w c"], t: Timesteps) -> Prediction:
        prediction = denoise(x, t)
        return prediction._replace(x0=jnp.clip(seamless(prediction.x0, known, repaint, reach), -1, 1))

    return joined


def _around(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Sum of the pixels above, below, left and right, those outside the picture being 0."""
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1] + padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:]
