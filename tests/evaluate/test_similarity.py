import numpy as np
import pytest

from unclip_jax.evaluate.memorisation import copy_figures, copy_report, nearest
from unclip_jax.evaluate.quality import diversity, retrieved
from unclip_jax.evaluate.similarity import psnr, ssim


def test_ssim_is_the_formula_at_every_place():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (2, 13, 14, 3)).astype(np.uint8)
    b = np.clip(a + rng.normal(0, 30, a.shape), 0, 255).astype(np.uint8)
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    window /= window.sum()
    values = np.zeros((2, 3, 4, 3))
    for picture, y, x, c in np.ndindex(values.shape):
        p, q = (array[picture, y : y + 11, x : x + 11, c].astype(float) for array in (a, b))
        m, n = (window * p).sum(), (window * q).sum()
        v, w, s = (window * (p - m) ** 2).sum(), (window * (q - n) ** 2).sum(), (window * (p - m) * (q - n)).sum()
        c1, c2 = 6.5025, 58.5225
        values[picture, y, x, c] = (2 * m * n + c1) * (2 * s + c2) / ((m * m + n * n + c1) * (v + w + c2))
    np.testing.assert_allclose(ssim(a, b), values.mean((1, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(ssim(a, a), 1)
    assert (psnr(a, a) == 99).all() and (psnr(a, b) < 25).all()
    with pytest.raises(ValueError, match="at least 11 px"):
        ssim(a[:, :8, :8], b[:, :8, :8])


def test_a_planted_copy_is_found():
    rng = np.random.default_rng(0)
    training = rng.integers(0, 256, (40, 16, 16, 3)).astype(np.uint8)
    fresh = rng.integers(0, 256, (20, 16, 16, 3)).astype(np.uint8)
    drawn = fresh.copy()
    drawn[7] = np.clip(training[31].astype(int) + rng.integers(-3, 4, training[31].shape), 0, 255)

    def features(pictures):
        flat = pictures.reshape(len(pictures), -1) / 127.5 - 1
        return (flat / np.linalg.norm(flat, axis=1, keepdims=True)).astype(np.float32)

    held_out = nearest(fresh, features(fresh), training, features(training))
    found = nearest(drawn, features(drawn), training, features(training))
    assert found.pixel[7] == found.clip[7] == 31
    assert found.levels[7] < 4 and (np.delete(found.levels, 7) > 50).all()
    apart = np.sqrt(np.square(drawn[3].astype(float) - training[found.pixel[3]]).mean())
    assert found.levels[3] == pytest.approx(apart, rel=1e-4)
    figures = copy_figures(found, held_out)
    rates = {name: row["copies"] for name, row in figures.items()}
    assert rates == {
        "nearest training picture of samples": 0.05,
        "nearest training picture of held-out pictures": 0.0,
    }
    sheet = copy_report(drawn, found, held_out, training).rows
    np.testing.assert_array_equal(sheet[0], [drawn[7], training[31], training[31]])
    with pytest.raises(ValueError, match="no training pictures"):
        nearest(drawn, features(drawn), training[:0], features(training)[:0])


def test_diversity_and_retrieval():
    same, different = np.eye(4)[[0, 0]], np.eye(4)[[1, 2]]
    np.testing.assert_allclose(diversity(np.concatenate([same, different]).astype(np.float32), 2), [0, 1])
    text = np.eye(4, dtype=np.float32)
    np.testing.assert_array_equal(retrieved(text, text[[0, 1, 3, 2]]), [1, 1, 0, 0])
