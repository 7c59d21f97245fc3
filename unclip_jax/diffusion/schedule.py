"""Noise schedules as float32 tables, and the tables of timesteps that samplers walk.

Everything here is numpy, made on the host: a Schedule becomes constants of a compiled program, a StepTable its data.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32

from unclip_jax.config import DiffusionConfig
from unclip_jax.types import Timesteps

END = -1  # the timestep of clean data, where abar is 1
SMALLEST_BUCKET = 32


class Schedule(NamedTuple):
    """A noise process x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) epsilon: float32 tables over t = 0 .. T-1.

    Computed as the diffusers library does, and so as published samplers did: betas in float64, cast to float32, and
    from these abar, again as float32, which 1 - abar is taken from. At t = 0, 1 - abar is 5e-4 (relative) from beta;
    pictures of float64 tables differ so much.
    """

    betas: Float32[np.ndarray, " T"]
    alphas_cumprod: Float32[np.ndarray, " T"]
    one_minus_alphas_cumprod: Float32[np.ndarray, " T"]

    @property
    def steps(self) -> int:
        """T, the number of noise levels."""
        return len(self.betas)

    def beta(self, t: Timesteps) -> Float[Array, " b"]:
        """beta_t, 0 at t = -1."""
        return jnp.where(t < 0, 0.0, jnp.asarray(self.betas)[jnp.maximum(t, 0)])

    def abar(self, t: Timesteps) -> Float[Array, " b"]:
        """abar_t, 1 at t = -1."""
        return jnp.where(t < 0, 1.0, jnp.asarray(self.alphas_cumprod)[jnp.maximum(t, 0)])

    def one_minus_abar(self, t: Timesteps) -> Float[Array, " b"]:
        """1 - abar_t, 0 at t = -1."""
        return jnp.where(t < 0, 0.0, jnp.asarray(self.one_minus_alphas_cumprod)[jnp.maximum(t, 0)])


def make_schedule(config: DiffusionConfig) -> Schedule:
    """The config's schedule: cosine (equation 17 of arXiv 2102.09672) or linear (1e-4 to 0.02, scaled by 1000 / T)."""
    if config.steps < 1:
        raise ValueError(f"a noise schedule needs at least one step, not {config.steps}")
    match config.schedule:
        case "cosine":
            u = np.arange(config.steps + 1, dtype=np.float64) / config.steps
            abar = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
            betas = 1 - abar[1:] / abar[:-1]
        case "linear":
            scale = 1000 / config.steps
            betas = np.linspace(scale * 1e-4, scale * 0.02, config.steps, dtype=np.float64)
    betas = np.minimum(betas, 0.999).astype(np.float32)
    # The product in float64, as torch's cumprod on a CPU: every abar is then the library's, bit by bit.
    alphas_cumprod = np.cumprod(np.float32(1) - betas, dtype=np.float64).astype(np.float32)
    return Schedule(betas, alphas_cumprod, np.float32(1) - alphas_cumprod)


def strided_timesteps(n: int, steps: int = 1000) -> Int[np.ndarray, " n"]:
    """n timesteps from T - 1 down to 0, both included, evenly strided and rounded half to even (Karlo's, IDDPM's)."""
    if not 1 <= n <= steps:
        raise ValueError(f"the number of sampling steps must be between 1 and {steps}, not {n}")
    stride = (steps - 1) / max(n - 1, 1)
    ascending = np.round(np.arange(n) * stride).astype(np.int32) if n > 1 else np.array([steps - 1], np.int32)
    return ascending[::-1]


def fast27_timesteps() -> Int[np.ndarray, "27"]:
    """GLIDE's hand-tuned 27 steps of 1000 for the 64 to 256 upsampler: sections 10, 10, 3, 2, 2, with 997 for 999."""
    high = [997, 800, 799, 600, 599, 500, 400, 399, 377, 355, 333, 311, 288, 266]
    low = [244, 222, 200, 199, 177, 155, 133, 111, 88, 66, 44, 22, 0]
    return np.array(high + low, np.int32)


class StepTable(NamedTuple):
    """A walk over noise levels: step i goes from t[i] to t_next[i], where -1 is clean data (abar = 1).

    t, t_next: int32 [N]; only the first length entries are walked. N is a bucket (32, 64, 128, ...), so that another
    number of steps is other data and no other program. length: int32 scalar, the number of steps.
    """

    t: Int32[np.ndarray, " N"]
    t_next: Int32[np.ndarray, " N"]
    length: Int32[np.ndarray, ""]


def pair_table(pairs: Sequence[tuple[int, int]], capacity: int | None = None) -> StepTable:
    """The StepTable of explicit pairs (t, t_next), which may also go up; capacity defaults to the smallest bucket."""
    if capacity is None:
        capacity = max(SMALLEST_BUCKET, 1 << (len(pairs) - 1).bit_length())
    if not 1 <= len(pairs) <= capacity:
        raise ValueError(f"a table of {capacity} steps cannot hold {len(pairs)}")
    if any(t == t_next or min(t, t_next) < END for t, t_next in pairs):
        raise ValueError("each step must lead from one timestep to another, both at least -1")
    table = np.full((2, capacity), END, np.int32)
    table[:, : len(pairs)] = np.array(pairs, np.int32).T
    return StepTable(table[0], table[1], np.array(len(pairs), np.int32))


def step_table(timesteps: Int[np.ndarray, " n"], capacity: int | None = None) -> StepTable:
    """The walk down the given descending timesteps and from the last of them to clean data."""
    return pair_table(_descent(timesteps), capacity)


def reverse_table(timesteps: Int[np.ndarray, " n"], capacity: int | None = None) -> StepTable:
    """The walk of step_table backwards, from clean data up to the first timestep: DDIM inversion."""
    return pair_table([(t_next, t) for t, t_next in reversed(_descent(timesteps))], capacity)


def _descent(timesteps: Int[np.ndarray, " n"]) -> list[tuple[int, int]]:
    pairs = list(pairwise([*timesteps.tolist(), END]))
    if any(t <= t_next for t, t_next in pairs):
        raise ValueError("timesteps must descend and be at least 0")
    return pairs
