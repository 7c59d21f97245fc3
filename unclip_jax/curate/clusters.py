"""Mini-batch k-means on the sphere (Sculley 2010, with centres at unit length), compiled as one scan."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

PER_CLUSTER = 64  # rows of the sample, per cluster
MOST_SAMPLED = 400_000
BATCH, EPOCHS = 4096, 4
ROWS = 2048  # that are assigned at once


def clusters_for(rows: int) -> int:
    """A number of clusters that makes assigning rows and searching inside clusters cost about the same."""
    return max(1, round((rows / 2) ** 0.5))


def sample_rows(rows: Int[np.ndarray, " n"], clusters: int, seed: int) -> Int[np.ndarray, " s"]:
    """Rows that centres are fitted on, ascending."""
    count = min(len(rows), max(PER_CLUSTER * clusters, BATCH), MOST_SAMPLED)
    return np.sort(np.random.default_rng([seed, 3]).choice(rows, count, replace=False))


def fit(sample: Float[np.ndarray, "s z"], clusters: int, seed: int) -> Float[np.ndarray, "k z"]:
    """Centres of unit length of rows of unit length; fewer than asked for where there are fewer rows."""
    clusters, batch = min(clusters, len(sample)), min(BATCH, len(sample))
    rng = np.random.default_rng([seed, 4])
    start = sample[rng.choice(len(sample), clusters, replace=False)]
    steps = EPOCHS * -(-len(sample) // batch)
    order = np.concatenate([rng.permutation(len(sample)) for _ in range(EPOCHS)])
    return np.asarray(_fit(jnp.asarray(start), jnp.asarray(sample), jnp.asarray(np.resize(order, (steps, batch)))))


@jax.jit
def _fit(start: Float[Array, "k z"], sample: Float[Array, "s z"], order: Int[Array, "t b"]) -> Float[Array, "k z"]:
    def step(state: tuple[Array, Array], rows: Array) -> tuple[tuple[Array, Array], None]:
        centres, counts = state
        x = sample[rows]
        nearest = _nearest(x, centres)
        sums = jax.ops.segment_sum(x, nearest, len(centres))
        new = jax.ops.segment_sum(jnp.ones(len(x)), nearest, len(centres))
        total = counts + new
        moved = (centres * counts[:, None] + sums) / jnp.maximum(total, 1)[:, None]
        moved /= jnp.maximum(jnp.linalg.norm(moved, axis=1, keepdims=True), 1e-12)
        return (jnp.where(new[:, None] > 0, moved, centres), total), None

    return jax.lax.scan(step, (start, jnp.ones(len(start))), order)[0][0]


@jax.jit
def _nearest(x: Float[Array, "n z"], centres: Float[Array, "k z"]) -> Int[Array, " n"]:
    return jnp.argmax(jnp.matmul(x, centres.T, precision=jax.lax.Precision.HIGHEST), axis=1).astype(jnp.int32)


def assign(x: Float[np.ndarray, "n z"], centres: Float[np.ndarray, "k z"]) -> Int[np.ndarray, " n"]:
    """The nearest centre of every row, int32, in blocks of one shape."""
    found = np.empty(len(x), np.int32)
    nearest = partial(_nearest, centres=jnp.asarray(centres))
    for first in range(0, len(x), ROWS):
        block = np.zeros((ROWS, x.shape[1]), np.float32)
        part = x[first : first + ROWS]
        block[: len(part)] = part
        found[first : first + len(part)] = np.asarray(nearest(block))[: len(part)]
    return found
