"""CLIP image embeddings as the tokens of the autoregressive prior: PCA, then buckets (paper section 2.2)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from unclip_jax.config import ArPriorConfig
from unclip_jax.models.clip import normalise

LOST = 0.01  # share of the variance that the components left out may hold (the paper's "less than 1%")


class Quantiser(NamedTuple):
    """Constants beside the parameters, never trained.

    mean: [z]. components: [z k], orthonormal columns, by falling variance. low, high: [k], the range that each
    coefficient's buckets divide evenly. buckets: their number, int32. dot_edges: [d - 1], inner edges of the d buckets
    of z_i . z_t, which are equally full.
    """

    mean: Float[Array, " z"]
    components: Float[Array, "z k"]
    low: Float[Array, " k"]
    high: Float[Array, " k"]
    buckets: Int[Array, ""]
    dot_edges: Float[Array, " e"]

    def encode(self, embedding: Float[Array, "b z"]) -> Int[Array, "b k"]:
        """Each coefficient's bucket, int32; coefficients outside the range fall into its first or last."""
        coefficients = jnp.matmul(embedding - self.mean, self.components, precision=jax.lax.Precision.HIGHEST)
        place = jnp.floor((coefficients - self.low) * self.buckets / (self.high - self.low))
        return jnp.clip(place, 0, self.buckets - 1).astype(jnp.int32)

    def decode(self, tokens: Int[Array, "b k"]) -> Float[Array, "b z"]:
        """Unit-length embeddings from the buckets' centres."""
        coefficients = self.low + (tokens + 0.5) * (self.high - self.low) / self.buckets
        product = jnp.matmul(coefficients, self.components.T, precision=jax.lax.Precision.HIGHEST)
        return normalise(self.mean + product)

    def dot_token(self, embedding: Float[Array, "b z"], text_embedding: Float[Array, "b z"]) -> Int[Array, " b"]:
        """The bucket of the cosine between image and text embedding, int32; the upper half lies above the median."""
        cosine = (normalise(embedding) * normalise(text_embedding)).sum(-1)
        return jnp.searchsorted(self.dot_edges, cosine, side="right").astype(jnp.int32)


def shapes(config: ArPriorConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of a prior's quantiser, by name."""
    z, k = config.embedding_dim, config.components
    return Quantiser((z,), (z, k), (k,), (k,), (), (config.dot_buckets - 1,))._asdict()  # type: ignore[arg-type]


def fit(
    embedding: Float[np.ndarray, "n z"],
    text_embedding: Float[np.ndarray, "m z"],
    components: int,
    buckets: int,
    dot_buckets: int,
) -> Quantiser:
    """A quantiser of CLIP's unit-length image embeddings and of their cosines with the captions' embeddings.

    text_embedding: of the first m pictures' captions. Buckets are uniform over the range of the data: with 64 to 1,024
    of them a quarter to a half is lost of what equally full ones lose, whose outermost are wide (measured on emoji
    scenes).
    Raises ValueError where `components` leave LOST of the variance or more to the others, naming the number needed.
    """
    data = np.asarray(embedding, np.float64)
    mean = data.mean(0)
    variances, vectors = np.linalg.eigh(np.cov(data - mean, rowvar=False))
    variances, vectors = variances[::-1], vectors[:, ::-1]
    lost = 1 - np.cumsum(variances) / variances.sum()
    needed = 1 + int((lost >= LOST).sum())
    if not needed <= components <= data.shape[1]:
        raise ValueError(
            f"these embeddings keep {1 - LOST:.0%} of their variance in {needed} components of {data.shape[1]} and the "
            f"network has {components}: set --network.components {needed}"
        )
    # The sign of an eigenvector is arbitrary: its largest entry is positive here, whatever the library.
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], 0)
    kept = (vectors * np.sign(largest))[:, :components]
    coefficients = (data - mean) @ kept
    low, high = coefficients.min(0), coefficients.max(0)
    image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (data[: len(text_embedding)], text_embedding))
    cosine = (image * text).sum(1)
    edges = np.quantile(cosine, np.arange(1, dot_buckets) / dot_buckets)
    arrays = (np.asarray(x, np.float32) for x in (mean, kept, low, np.maximum(high, low + 1e-6)))
    return Quantiser(*arrays, np.asarray(buckets, np.int32), np.asarray(edges, np.float32))  # type: ignore[arg-type]
