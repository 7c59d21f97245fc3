"""How far one set of pictures is from another, by their features: Fréchet distance, CMMD, precision and recall."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64

SIGMA, SCALE = 10.0, 1000.0  # of CMMD
NEIGHBOURS = 3  # of precision and recall
ROWS = 1024  # of a matrix of distances, which is never whole in memory


class Moments(NamedTuple):
    """Mean and covariance of features in float64, gathered batch by batch.

    count: how many rows. mean: [d]. scatter: sum of (x - mean)(x - mean)^T, [d d].
    """

    count: int
    mean: Float64[np.ndarray, " d"]
    scatter: Float64[np.ndarray, "d d"]

    @staticmethod
    def none(dim: int) -> "Moments":
        """Those of no rows yet."""
        return Moments(0, np.zeros(dim), np.zeros((dim, dim)))

    def add(self, features: Float[np.ndarray, "n d"]) -> "Moments":
        """With further rows, which move the mean (Chan, Golub and LeVeque 1983, equation 2.1)."""
        if not len(features):
            return self
        x = features.astype(np.float64)
        mean, count = x.mean(0), len(x)
        rest, total = x - mean, self.count + count
        apart = mean - self.mean
        scatter = self.scatter + rest.T @ rest + np.outer(apart, apart) * (self.count * count / total)
        return Moments(total, self.mean + apart * (count / total), scatter)

    @property
    def covariance(self) -> Float64[np.ndarray, "d d"]:
        """The unbiased one; ValueError where there are fewer than two rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 pictures, not {self.count}")
        return self.scatter / (self.count - 1)


def moments_of(features: Float[np.ndarray, "n d"]) -> Moments:
    """Mean and covariance of features that are all there."""
    return Moments.none(features.shape[1]).add(features)


def frechet(a: Moments, b: Moments) -> float:
    """Fréchet distance of two Gaussians, |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^1/2) (arXiv 1706.08500 equation 6).

    The last trace is that of (A^1/2 B A^1/2)^1/2, which is symmetric, so that no root of a matrix is taken that may not
    exist. ValueError where dimensions differ or a set has fewer than two pictures.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of {len(a.mean)} and {len(b.mean)} dimensions cannot be compared")
    first, second = a.covariance, b.covariance
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    inner = root @ second @ root
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh((inner + inner.T) / 2), 0)).sum()
    distance = np.square(a.mean - b.mean).sum() + np.trace(first) + np.trace(second) - 2 * shared
    return float(max(distance, 0.0))


def kernel(
    a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"], sigma: float = SIGMA
) -> Float64[np.ndarray, "n m"]:
    """exp(-|a - b|^2 / (2 sigma^2))."""
    return np.exp(-_squares(a, b) / (2 * sigma**2))


def cmmd(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"], sigma: float = SIGMA, scale: float = SCALE) -> float:
    """Maximum mean discrepancy, squared, of a Gaussian kernel, times 1000 (arXiv 2401.09603).

    Features are CLIP's at unit length. The estimate keeps a picture's kernel with itself, as the paper's code does: 0
    for identical sets, never negative, and a little above 0 for two sets of the same kind.
    """
    if not len(a) or not len(b):
        raise ValueError("CMMD needs a picture on either side")
    mean = {"aa": _mean_kernel(a, a, sigma), "bb": _mean_kernel(b, b, sigma), "ab": _mean_kernel(a, b, sigma)}
    return float(scale * max(mean["aa"] + mean["bb"] - 2 * mean["ab"], 0.0))


def precision_recall(
    real: Float[np.ndarray, "n d"], drawn: Float[np.ndarray, "m d"], neighbours: int = NEIGHBOURS
) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991 equation 1).

    Precision: share of drawn pictures that lie nearer to some real one than its k-th real neighbour; recall the other
    way round. ValueError where a set has no more pictures than k.
    """
    if min(len(real), len(drawn)) <= neighbours:
        raise ValueError(
            f"precision and recall need more than {neighbours} pictures of each kind, not {len(real)} and {len(drawn)}"
        )
    return float(_inside(drawn, real, neighbours).mean()), float(_inside(real, drawn, neighbours).mean())


def _inside(queries: Float[np.ndarray, "n d"], points: Float[np.ndarray, "m d"], k: int) -> Bool[np.ndarray, " n"]:
    """Whether each query lies in the ball of any point, which reaches to that point's k-th neighbour."""
    reach = np.concatenate([np.partition(_squares(part, points), k, axis=1)[:, k] for part in _parts(points)])
    return np.concatenate([(_squares(part, points) <= reach).any(1) for part in _parts(queries)])


def _mean_kernel(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"], sigma: float) -> float:
    return float(sum(kernel(part, b, sigma).sum() for part in _parts(a)) / (len(a) * len(b)))


def _squares(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> Float64[np.ndarray, "n m"]:
    """Squared distances of all pairs."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    squares = np.square(x).sum(1)[:, None] + np.square(y).sum(1) - 2 * x @ y.T
    return np.maximum(squares, 0)


def _parts(rows: Float[np.ndarray, "n d"]) -> list[Float[np.ndarray, "m d"]]:
    return [rows[start : start + ROWS] for start in range(0, len(rows), ROWS)]
