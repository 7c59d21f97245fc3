import numpy as np
import pytest

from unclip_jax.evaluate.distances import Moments, cmmd, frechet, moments_of, precision_recall
from unclip_jax.evaluate.features import Eye, Seen, check_comparable, load_seen, look, look_once, save_seen
from unclip_jax.evaluate.quality import check_rank


def gaussian(rng, count, mean, covariance):
    return rng.multivariate_normal(mean, covariance, count)


def test_frechet_is_the_formula_of_gaussians():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(5, 5)), rng.normal(size=(5, 5))
    a, b, mean = a @ a.T, b @ b.T, rng.normal(size=5)
    import scipy.linalg

    exact = mean @ mean + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    given = frechet(Moments(11, np.zeros(5), 10 * a), Moments(11, mean, 10 * b))
    assert given == pytest.approx(exact, rel=1e-9)
    assert frechet(Moments(11, np.zeros(5), 10 * a), Moments(11, np.zeros(5), 10 * a)) == pytest.approx(0, abs=1e-9)


def test_moments_of_a_stream_are_those_of_the_whole():
    rows = 1e4 + np.random.default_rng(0).normal(size=(100, 3))
    streamed = Moments.none(3)
    for part in np.split(rows, [1, 40, 40]):
        streamed = streamed.add(part)
    np.testing.assert_allclose(streamed.mean, rows.mean(0), rtol=1e-14)
    np.testing.assert_allclose(streamed.covariance, np.cov(rows, rowvar=False), rtol=1e-9)


def test_cmmd_is_the_formula_of_gaussians():
    rng, dim, sigma = np.random.default_rng(0), 3, 2.0
    mean = np.array([1.0, 0.5, 0.0])
    a, b = rng.normal(size=(3000, dim)), 0.5 * rng.normal(size=(3000, dim)) + mean

    def expected(variance, apart):
        """Mean of the kernel of a difference that is normal with this variance."""
        return (sigma**2 / (sigma**2 + variance)) ** (dim / 2) * np.exp(-apart @ apart / (2 * (sigma**2 + variance)))

    exact = expected(2, 0 * mean) + expected(0.5, 0 * mean) - 2 * expected(1.25, mean)
    assert cmmd(a, b, sigma, 1.0) == pytest.approx(exact, rel=0.03)
    assert cmmd(a, a) == pytest.approx(0, abs=1e-9)
    few = rng.normal(size=(4, dim)), rng.normal(size=(5, dim))
    k = [[np.exp(-((x - y) ** 2).sum() / 200) for y in np.concatenate(few)] for x in np.concatenate(few)]
    k = np.array(k)
    assert cmmd(*few) == pytest.approx(1000 * (k[:4, :4].mean() + k[4:, 4:].mean() - 2 * k[:4, 4:].mean()), rel=1e-6)


def test_precision_falls_with_what_is_odd_and_recall_with_what_is_missing():
    rng = np.random.default_rng(0)
    centres = np.array([[0.0, 0.0], [100.0, 0.0]])
    real = (centres[:, None] + rng.normal(size=(2, 50, 2))).reshape(-1, 2)
    again = (centres[:, None] + rng.normal(size=(2, 50, 2))).reshape(-1, 2)
    odd = again.copy()
    odd[50:] += 500
    assert min(precision_recall(real, again)) > 0.9
    precision, recall = precision_recall(real, odd)
    assert 0.45 <= precision <= 0.5 and 0.45 <= recall <= 0.5
    with pytest.raises(ValueError, match="more than 3 pictures of each kind, not 3"):
        precision_recall(real[:3], again)


def eye_of(ways=1):
    mix = np.random.default_rng(1).normal(size=(3 * 16 * 16, 8)) / 30

    def see(pictures):
        assert len(pictures) % ways == 0
        return (pictures.reshape(len(pictures), -1) / 255 @ mix).astype(np.float32)

    return Eye("mixed", 8, see, ways)


def test_distances_rise_with_noise_and_blur():
    rng = np.random.default_rng(0)
    real = rng.integers(0, 256, (64, 16, 16, 3)).astype(np.uint8)
    seen = look(eye_of(), real)
    last = frechet(seen.moments, seen.moments), cmmd(seen.features, seen.features)
    assert last == pytest.approx((0, 0), abs=1e-6)
    for mixed in (0.25, 0.5, 1.0):
        flat = mixed * real.mean((1, 2), keepdims=True) + (1 - mixed) * real
        other = look(eye_of(), flat.astype(np.uint8))
        now = frechet(seen.moments, other.moments), cmmd(seen.features, other.features)
        assert now[0] > last[0] and now[1] > last[1]
        last = now


def test_looking_does_not_depend_on_batches_and_is_kept(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (13, 16, 16, 3)).astype(np.uint8)
    one, several = look(eye_of(), pictures, 13), look(eye_of(4), pictures, 6)
    np.testing.assert_allclose(one.features, several.features, atol=1e-6)
    np.testing.assert_allclose(one.moments.scatter, several.moments.scatter, rtol=1e-6)
    kept = look_once(eye_of(), pictures, "abc", cache=tmp_path)
    blind = eye_of()._replace(see=lambda pictures: 1 / 0)
    again = look_once(blind, pictures, "abc", cache=tmp_path)
    np.testing.assert_array_equal(again.features, kept.features)
    np.testing.assert_allclose(again.moments.covariance, kept.moments.covariance, rtol=1e-12)
    with pytest.raises(ZeroDivisionError):
        look_once(blind, pictures, "another", cache=tmp_path)
    next(tmp_path.glob("*.npz")).write_bytes(b"torn")
    assert look_once(eye_of(), pictures, "abc", cache=tmp_path).moments.count == 13


def test_statistics_that_do_not_fit_are_refused(tmp_path):
    seen = look(eye_of(), np.zeros((4, 16, 16, 3), np.uint8))
    save_seen(seen, tmp_path / "a.npz")
    small = load_seen(tmp_path / "a.npz")
    with pytest.raises(ValueError, match="of 16 px cannot be compared with pictures of 32 px"):
        check_comparable(small, seen._replace(size=32))
    with pytest.raises(ValueError, match="features of another"):
        check_comparable(small, seen._replace(eye="another"))
    np.savez(tmp_path / "theirs.npz", mu=np.zeros(8), sigma=np.eye(8))
    check_comparable(load_seen(tmp_path / "theirs.npz"), seen)
    np.savez(tmp_path / "odd.npz", mu=np.zeros(8))
    with pytest.raises(ValueError, match="holds no statistics"):
        load_seen(tmp_path / "odd.npz")
    with pytest.raises(ValueError, match="more than 8 pictures for the covariance of its features, not 4"):
        check_rank(seen.moments, "FD")
    with pytest.raises(ValueError, match="at least 2 pictures, not 1"):
        frechet(moments_of(seen.features[:1]), seen.moments)
    with pytest.raises(ValueError, match="the source is empty"):
        look(eye_of(), np.zeros((0, 16, 16, 3), np.uint8))
    assert isinstance(small, Seen)
