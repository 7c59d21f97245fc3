import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.config import ArPriorConfig
from unclip_jax.models.quantiser import LOST, fit, shapes


def low_rank(rows: int = 4000, width: int = 32, seed: int = 0) -> np.ndarray:
    """Unit-length vectors around a common mean, whose variance falls by a quarter from direction to direction."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(np.random.default_rng(9).normal(size=(width, width)))[0]
    spread = 0.75 ** np.arange(width - 1)
    z = 3 * basis[0] + rng.normal(size=(rows, width - 1)) * spread @ basis[1:]
    return (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)


DATA, UNSEEN = low_rank(), low_rank(rows=1000, seed=1)
TEXT = DATA[:3000] + np.random.default_rng(2).normal(0, 0.2, (3000, 32)).astype(np.float32)
BUCKETS, DOTS = 128, 10


def needed() -> int:
    """Principal components that hold 99% of the variance, by singular values."""
    variances = np.linalg.svd(DATA - DATA.mean(0), compute_uv=False) ** 2
    return 1 + int((1 - np.cumsum(variances) / variances.sum() >= LOST).sum())


@pytest.fixture(scope="module")
def quantiser():
    return fit(DATA, TEXT, needed(), BUCKETS, DOTS)


def encode(quantiser, embedding: np.ndarray) -> np.ndarray:
    return np.asarray(quantiser.encode(jnp.asarray(embedding)))


def decode(quantiser, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(quantiser.decode(jnp.asarray(tokens)))


def lost(quantiser) -> float:
    """Share of the variance of embeddings that the fit never saw."""
    decoded = decode(quantiser, encode(quantiser, UNSEEN))
    return float(((decoded - UNSEEN) ** 2).sum() / ((UNSEEN - UNSEEN.mean(0)) ** 2).sum())


def test_components_and_buckets_lose_little(quantiser):
    assert 5 < needed() < 31
    assert LOST / 3 < lost(quantiser) < 0.015
    every = fit(DATA, TEXT, 32, 1024, DOTS)
    assert lost(every) < 1e-3  # what lies outside the range of the fit is cut
    assert lost(fit(DATA, TEXT, 32, 8, DOTS)) > 3 * lost(every)


def test_components_are_orthonormal_by_falling_variance(quantiser):
    product = quantiser.components.T @ quantiser.components
    np.testing.assert_allclose(product, np.eye(len(product)), atol=1e-5)
    variances = ((DATA - quantiser.mean) @ quantiser.components).var(0)
    assert (np.diff(variances) < 0).all()


def test_tokens_are_buckets_whose_centres_are_decoded(quantiser):
    tokens = encode(quantiser, DATA)
    assert tokens.dtype == np.int32 and tokens.min() == 0 and tokens.max() == BUCKETS - 1
    coefficients = (DATA - quantiser.mean) @ quantiser.components
    step = (quantiser.high - quantiser.low) / BUCKETS
    error = coefficients - (quantiser.low + (tokens + 0.5) * step)
    assert np.abs(error / step).max() < 0.501
    decoded = decode(quantiser, tokens[:100])
    np.testing.assert_allclose(np.linalg.norm(decoded, axis=1), 1, rtol=1e-5)
    # Unit length moves an embedding by far less than a bucket.
    assert (np.abs(encode(quantiser, decoded) - tokens[:100]) <= 8).all()


def test_what_lies_outside_falls_into_the_outermost_buckets(quantiser):
    direction = quantiser.components[:, 0]
    far = np.stack([quantiser.mean + 100 * direction, quantiser.mean - 100 * direction]).astype(np.float32)
    assert encode(quantiser, far)[:, 0].tolist() == [BUCKETS - 1, 0]


def test_dot_tokens_are_equally_full_and_ordered(quantiser):
    image, text = jnp.asarray(DATA[:3000]), jnp.asarray(TEXT)
    tokens = np.asarray(quantiser.dot_token(image, text))
    counts = np.bincount(tokens, minlength=DOTS)
    assert counts.min() >= 290 and counts.max() <= 310 and len(counts) == DOTS
    cosine = (DATA[:3000] * TEXT).sum(1) / np.linalg.norm(TEXT, axis=1)
    assert (cosine[tokens >= DOTS // 2].min() >= np.median(cosine) - 1e-6) and cosine[tokens < 5].max() < np.median(
        cosine
    )
    longer = np.asarray(quantiser.dot_token(image, 7 * text))
    assert (longer != tokens).mean() < 1e-2  # only the angle counts, to rounding


def test_too_few_components_name_the_number_needed():
    with pytest.raises(ValueError, match=rf"99% of their variance in {needed()} .*--network.components {needed()}$"):
        fit(DATA, TEXT, needed() - 1, BUCKETS, DOTS)
    with pytest.raises(ValueError, match="the network has 33"):
        fit(DATA, TEXT, 33, BUCKETS, DOTS)


def test_shapes_are_those_of_the_config(quantiser):
    config = ArPriorConfig(32, components=needed(), buckets=BUCKETS, dot_buckets=DOTS)
    assert {name: np.shape(array) for name, array in quantiser._asdict().items()} == shapes(config)
    assert int(quantiser.buckets) == BUCKETS
