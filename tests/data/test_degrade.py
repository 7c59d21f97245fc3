"""Degradations: sizes, determinism, mean colour, and agreement with SciPy."""

import numpy as np
import pytest
from scipy import ndimage

from unclip_jax.data.degrade import area_downsample, bsr, degrade, gaussian_blur

KINDS = ("none", "blur", "bsr")


def picture(side: int = 64) -> np.ndarray:
    """Flat shapes with hard edges on a coloured ground, away from the ends of the range."""
    image = np.full((side, side, 3), (110, 165, 235), np.uint8)
    image[side // 4 : side // 2, side // 8 : side // 2] = (230, 80, 60)
    image[side // 2 :, side // 2 :: 8] = 20
    return image


@pytest.mark.parametrize("kind", KINDS)
def test_shape_dtype_and_determinism(kind):
    image = picture()
    kept = image.copy()
    one, two = (degrade(kind, image, 4, np.random.default_rng(3)) for _ in range(2))
    assert one.shape == (16, 16, 3) and one.dtype == np.uint8
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(image, kept)


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_need_not_be_square(kind):
    assert degrade(kind, picture()[:32], 2, np.random.default_rng(0)).shape == (16, 32, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_that_do_not_divide_are_named(kind):
    with pytest.raises(ValueError, match=r"62 x 64 .* 4"):
        degrade(kind, picture()[:62], 4, np.random.default_rng(0))


def test_area_downsample_is_the_block_mean():
    image = np.random.default_rng(0).integers(0, 256, (2, 24, 16, 3), np.uint8)
    mean = image.reshape(2, 6, 4, 4, 4, 3).astype(np.float64).mean((2, 4))
    np.testing.assert_array_equal(area_downsample(image, 4), np.floor(mean + 0.5))
    np.testing.assert_array_equal(area_downsample(image, 1), image)


@pytest.mark.parametrize(("kernel", "sigma"), [(3, 0.6), (7, 1.3)])
def test_blur_equals_scipy(kernel, sigma):
    image = np.zeros((15, 17, 3), np.uint8)
    image[7, 8] = (255, 200, 100)
    image[0, 0] = 250  # the corner shows how borders are continued
    expected = np.stack(
        [
            ndimage.gaussian_filter(image[..., c].astype(np.float64), sigma, mode="mirror", radius=kernel // 2)
            for c in range(3)
        ],
        -1,
    )
    np.testing.assert_allclose(gaussian_blur(image, kernel, sigma), expected, atol=0.501)


@pytest.mark.parametrize(("kernel", "sigma"), [(2, 0.6), (0, 0.6), (3, 0.0), (31, 0.6)])
def test_impossible_blurs_are_refused(kernel, sigma):
    with pytest.raises(ValueError, match="8 x 8 pixels"):
        gaussian_blur(picture(8), kernel, sigma)


def test_blur_keeps_the_mean_colour():
    image = picture()
    np.testing.assert_allclose(gaussian_blur(image).mean((0, 1)), image.mean((0, 1)), atol=0.5)


def test_bsr_keeps_the_mean_colour_on_average():
    image = picture()
    mean = np.mean([bsr(image, 4, np.random.default_rng(i)).mean((0, 1)) for i in range(64)], 0)
    np.testing.assert_allclose(mean, image.mean((0, 1)), atol=1.5)


def test_bsr_corrupts_but_stays_recognisable():
    image = picture()
    clean = area_downsample(image, 4).astype(np.float64)
    errors = [np.sqrt(np.mean((bsr(image, 4, np.random.default_rng(i)) - clean) ** 2)) for i in range(64)]
    assert min(errors) > 0.5
    assert max(errors) < 0.5 * clean.std()


class Watched(np.random.Generator):
    """A generator that remembers the orders it drew."""

    orders: list[tuple[int, ...]] = []

    def permutation(self, x, axis=0):
        """The order, noted."""
        order = super().permutation(x, axis)
        self.orders.append(tuple(order.tolist()))
        return order


def test_bsr_draws_another_order_for_another_seed():
    for seed in range(20):
        bsr(picture(), 4, Watched(np.random.PCG64(seed)))
    assert len(Watched.orders) == 20
    assert len(set(Watched.orders)) > 10
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in Watched.orders)
