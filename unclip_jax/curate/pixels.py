"""Whether two small pictures show the same: a second look at pairs whose embeddings are close.

A CLIP forgets what it was never taught to tell apart; pixels do not. A copy that was re-encoded, resized, mirrored or
cut by a few percent differs little once the two are laid over one another, and alike everywhere; another picture
differs much somewhere. So what counts is the largest mean difference over the cells of a grid; and a pixel differs by
as much as it lies outside of the levels that the other picture has there and one pixel around, because small pictures
never meet pixel by pixel.
"""

from collections.abc import Callable
from functools import cache, reduce

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

CROP = 0.95  # side of the part that a copy may show
PLACES = 5  # of that part along each side
CELLS = 4  # of the grid, along each side
PAIRS = 256  # that are compared at once
FAR, NEAR = 2, 1  # px around, where pictures are compared as they are, and laid over one another
LOOSER = 1.75  # limit of the second look, in units of the last one's
COARSE = 10.0  # limit of the first look, in levels of the mean colours of cells


def same(
    a: UInt8[np.ndarray, "p s s 3"], b: UInt8[np.ndarray, "p s s 3"], most: float, mirrored: bool
) -> Bool[np.ndarray, " p"]:
    """Whether pictures differ by at most `most`; mirrored: the second ones are mirrored first.

    Most pairs that are none are told by their mean colours, most others by a look that shifts nothing. ValueError where
    s does not divide by CELLS.
    """
    if a.shape[1] % CELLS:
        raise ValueError(f"small pictures are compared at sides that divide by {CELLS}, not at {a.shape[1]} px")
    b = b[:, :, ::-1] if mirrored else b
    found = np.abs(_cells(a) - _cells(b)).mean((1, 2, 3)) <= COARSE
    for compare, limit in ((_as_they_are, LOOSER * most), (_laid_over, most)):
        places = np.flatnonzero(found)
        found[places] = _in_blocks(compare, a[places], b[places]) <= limit
    return found


def _cells(x: UInt8[np.ndarray, "p s s 3"]) -> Float[np.ndarray, "p c c 3"]:
    """The mean colours of the grid's cells."""
    side = x.shape[1] // CELLS
    return x.reshape(len(x), CELLS, side, CELLS, side, 3).mean((2, 4), dtype=np.float32)


def difference(a: UInt8[np.ndarray, "p s s 3"], b: UInt8[np.ndarray, "p s s 3"]) -> Float[np.ndarray, " p"]:
    """How much small pictures differ where they differ most, in levels of 255, laid over one another as well as can be.

    Either may be a part of the other.
    """
    return _in_blocks(_laid_over, a, b)


def _in_blocks(
    compare: Callable[..., Array], a: UInt8[np.ndarray, "p s s 3"], b: UInt8[np.ndarray, "p s s 3"]
) -> Float[np.ndarray, " p"]:
    """A comparison of many pairs, in blocks of one shape."""
    found = np.empty(len(a), np.float32)
    for first in range(0, len(a), PAIRS):
        blocks = []
        for pictures in (a, b):
            part = pictures[first : first + PAIRS]
            block = np.zeros((PAIRS, *part.shape[1:]), np.uint8)
            block[: len(part)] = part
            blocks.append(block)
        found[first : first + PAIRS] = np.asarray(compare(*blocks))[: len(a) - first]
    return found


@jax.jit
def _as_they_are(a: UInt8[Array, "p s s 3"], b: UInt8[Array, "p s s 3"]) -> Float[Array, " p"]:
    return _worst_cell(_soft(a), _soft(b), FAR)


@jax.jit
def _laid_over(a: UInt8[Array, "p s s 3"], b: UInt8[Array, "p s s 3"]) -> Float[Array, " p"]:
    first, second = _soft(a), _soft(b)

    def of_window(least: Array, window: tuple[Array, Array]) -> tuple[Array, None]:
        one = _worst_cell(_resampled(first, *window), second, NEAR)
        other = _worst_cell(first, _resampled(second, *window), NEAR)
        return jnp.minimum(least, jnp.minimum(one, other)), None

    rows, columns = _windows(a.shape[1])
    return jax.lax.scan(of_window, jnp.full((len(a),), jnp.inf), (jnp.asarray(rows), jnp.asarray(columns)))[0]


@cache
def _windows(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Matrices [w s s] that resample rows, and columns, to the whole picture and to its parts of side CROP."""
    pixels, rows, columns = np.arange(side), [], []
    for share, places in ((1.0, 1), (CROP, PLACES)):
        starts = np.linspace(0, (1 - share) * side, places)
        at = [np.clip(start + (pixels + 0.5) * share - 0.5, 0, side - 1) for start in starts]
        matrices = [np.maximum(0, 1 - np.abs(place[:, None] - pixels)) for place in at]
        rows += [y for y in matrices for _ in matrices]
        columns += [x for _ in matrices for x in matrices]
    return np.asarray(rows, np.float32), np.asarray(columns, np.float32)


# Inside, pairs come last: neighbours in memory are then always treated alike, which is what processors are fast at.


def _resampled(x: Float[Array, "s s 3 p"], rows: Float[Array, "s s"], columns: Float[Array, "s s"]) -> Array:
    highest = jax.lax.Precision.HIGHEST
    whole = jnp.einsum("ij,jlcp->ilcp", rows, x, precision=highest)
    return jnp.einsum("kl,ilcp->ikcp", columns, whole, precision=highest)


def _soft(x: UInt8[Array, "p s s 3"]) -> Float[Array, "s s 3 p"]:
    """Pictures blurred by the taps 1 2 1."""
    soft = jnp.moveaxis(x, 0, -1).astype(jnp.float32)
    for axis in (0, 1):
        left, middle, right = _shifted(soft, axis, 1)
        soft = jax.lax.optimization_barrier((left + 2 * middle + right) / 4)
    return soft


def _worst_cell(x: Float[Array, "s s 3 p"], y: Float[Array, "s s 3 p"], reach: int) -> Float[Array, " p"]:
    """The greatest mean over a cell of how far pixels lie outside of the other picture's levels around them."""
    outside = jnp.maximum(_outside(x, y, reach).mean(2), _outside(y, x, reach).mean(2))
    side = len(x) // CELLS
    return outside.reshape(CELLS, side, CELLS, side, -1).mean((1, 3)).max((0, 1))


def _outside(x: Float[Array, "s s 3 p"], y: Float[Array, "s s 3 p"], reach: int) -> Float[Array, "s s 3 p"]:
    low = high = y
    for axis in (0, 1):
        ends = reduce(jnp.minimum, _shifted(low, axis, reach)), reduce(jnp.maximum, _shifted(high, axis, reach))
        low, high = jax.lax.optimization_barrier(ends)  # fused with what follows, it would be done over and over
    return jnp.maximum(0, jnp.maximum(x - high, low - x))


def _shifted(x: Float[Array, "s s 3 p"], axis: int, reach: int) -> list[Array]:
    """The array moved by -reach to reach along an axis, its border repeated."""
    padded = jnp.pad(x, [(reach, reach) if place == axis else (0, 0) for place in range(4)], mode="edge")
    return [jax.lax.slice_in_dim(padded, i, i + x.shape[axis], axis=axis) for i in range(2 * reach + 1)]
