"""Inpainting: a wrapper of a sampler's step that keeps what is known, and walks that go back up to blend the rest in.

After every step what is known is put back, noised to the level that the step led to. The rest then knows it only as
its context, and seams show; RePaint (arXiv 2201.09865) walks every stretch of the noise levels several times, each time
from a renoised whole in which both parts have met.
"""

from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from unclip_jax.diffusion.gaussian import add_noise, renoise
from unclip_jax.diffusion.samplers import SamplerState, Step, step_noise, step_pair
from unclip_jax.diffusion.schedule import END, Schedule, StepTable, pair_table
from unclip_jax.types import Denoise, Keys, PRNGKey

KNOWN = 0x1A7  # what keys are folded with, so that known and painted parts have different noise


class Known(NamedTuple):
    """Pictures of which a part stays.

    picture: uint8 [b h w 3], whatever it shows where it is painted over. repaint: bool [b h w], a mask's white.
    """

    picture: UInt8[Array | np.ndarray, "b h w 3"]
    repaint: Bool[Array | np.ndarray, "b h w"]

    def at(self, side: int) -> "Known":
        """Reduced by area, on the host: a pixel is repainted if any part of it is. ValueError where none fits."""
        b, height, width, _ = self.picture.shape
        if height != width or height % side:
            raise ValueError(f"a picture of {width} x {height} px has no whole blocks at {side} px")
        factor = height // side
        if factor == 1:
            return self
        blocks = np.asarray(self.picture).reshape(b, side, factor, side, factor, 3)
        mean = (blocks.sum(axis=(2, 4), dtype=np.uint32) + factor**2 // 2) // factor**2
        repaint = np.asarray(self.repaint).reshape(b, side, factor, side, factor).max(axis=(2, 4))
        return Known(mean.astype(np.uint8), repaint)

    def rows(self, part: slice) -> "Known":
        """Some of the pictures."""
        return Known(self.picture[part], self.repaint[part])

    def padded(self, count: int) -> "Known":
        """So many pictures, the last one repeated."""
        rows = np.minimum(np.arange(count), len(self.picture) - 1)
        return Known(self.picture[rows], self.repaint[rows])


def keep_known(step: Step, schedule: Schedule, x0: Float[Array, "b *d"], repaint: Bool[Array, "b ..."]) -> Step:
    """The step, after which x is x0 noised to t_next wherever repaint, broadcast to x's shape, is false.

    A walk that ends in clean data ends in x0 itself there. The noise of example i depends on key i and the step alone.
    A pair that goes up renoises x (equation 10 of arXiv 2201.09865) whatever the step, so that DDIM can resample too.
    """

    def kept(denoise: Denoise, state: SamplerState, table: StepTable, keys: Keys) -> SamplerState:
        t, t_next = step_pair(state, table)
        noise = step_noise(jax.vmap(lambda key: jax.random.fold_in(key, KNOWN))(keys), state)

        def down() -> SamplerState:
            after = step(denoise, state, table, keys)
            return after._replace(x=jnp.where(repaint, after.x, add_noise(schedule, x0, noise, t_next)))

        def up() -> SamplerState:
            return SamplerState(renoise(schedule, state.x, noise, t, t_next), state.x0, state.done + 1)

        return jax.lax.cond(t_next[0] > t[0], up, down)

    return kept


def resampled(table: StepTable, jump: int, resamples: int, capacity: int | None = None) -> StepTable:
    """A walk down in stretches of `jump` steps, each walked `resamples` times (RePaint section 4.2).

    One pair leads back up a stretch, which is the same as its steps one by one; networks see resamples times the steps.
    """
    if jump < 1 or resamples < 1:
        raise ValueError(f"resampling needs a jump and a number of walks of at least 1, not {jump} and {resamples}")
    steps = int(table.length)
    levels, pairs = [*table.t[:steps].tolist(), END], []
    for top in range(0, steps, jump):
        stretch = levels[top : top + jump + 1]
        for walk in range(resamples):
            pairs += [(stretch[-1], stretch[0])] if walk else []
            pairs += pairwise(stretch)
    return pair_table(pairs, capacity)


def mask_channels(x0: Float[Array, "b h w 3"], repaint: Bool[Array, "b h w"]) -> Float[Array, "b h w 4"]:
    """What an inpainting network sees beside x_t (GLIDE, arXiv 2112.10741): the picture with grey for what is painted
    over, and the mask, 1 where it is."""
    return jnp.concatenate([jnp.where(repaint[..., None], 0.0, x0), repaint[..., None].astype(jnp.float32)], axis=-1)


def random_masks(key: PRNGKey, b: int, side: int) -> Bool[Array, "b s s"]:
    """Training masks: half rectangles, a quarter half-planes as outpainting has them, an eighth each everything but a
    rectangle, and everything."""
    keys = jax.random.split(key, b)
    return jax.vmap(lambda key: _random_mask(key, side))(keys)


def _random_mask(key: PRNGKey, side: int) -> Bool[Array, "s s"]:
    key_kind, key_centre, key_half, key_edge, key_way = jax.random.split(key, 5)
    y, x = jnp.mgrid[:side, :side] + 0.5
    centre = jax.random.uniform(key_centre, (2,), maxval=side)
    half = side * jax.random.uniform(key_half, (2,), minval=0.1, maxval=0.5)
    inside = (jnp.abs(y - centre[0]) < half[0]) & (jnp.abs(x - centre[1]) < half[1])
    edge = side * jax.random.uniform(key_edge, minval=0.1, maxval=0.9)
    plane = jnp.stack([x < edge, x > edge, y < edge, y > edge])[jax.random.randint(key_way, (), 0, 4)]
    kind = jax.random.randint(key_kind, (), 0, 8)
    return jnp.select([kind < 4, kind < 6, kind < 7], [inside, plane, ~inside], jnp.ones_like(inside))
