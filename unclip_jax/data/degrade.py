"""Degradations that upsamplers are trained to undo: pure functions of a uint8 picture and a numpy generator.

The paper's upsamplers (arXiv 2204.06125, section 2.1) see a corrupted low-resolution picture, so that they forgive what
the stage before them does: a Gaussian blur for 64 -> 256, and for 256 -> 1024 the more diverse BSR degradation
(arXiv 2103.14006), here at the light strength that latent diffusion (arXiv 2112.10752) trains its upsampler with.
"""

import io
from collections.abc import Callable
from typing import Literal

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageFilter

Degradation = Literal["none", "blur", "bsr"]
Step = Callable[[UInt8[np.ndarray, "h w 3"]], UInt8[np.ndarray, "p q 3"]]

BSR_SIGMA = (0.3, 1.4)  # standard deviations of the blur, in pixels of the grid it meets
BSR_MIDDLE = (1.0, 2.0)  # side of the intermediate grid, in units of the low side
BSR_NOISE = (1.0, 6.0)  # standard deviation of both noises, in levels of 255
BSR_QUALITY = (60, 95)  # JPEG
RESIZES = (Image.Resampling.NEAREST, Image.Resampling.BOX, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)


def area_downsample(image: UInt8[np.ndarray, "*b h w 3"], factor: int) -> UInt8[np.ndarray, "*b p q 3"]:
    """Mean over blocks of factor x factor pixels, rounded to a level; ValueError where the sides do not divide."""
    *lead, height, width, channels = image.shape
    if factor < 1 or height % factor or width % factor:
        raise ValueError(f"a picture of {height} x {width} pixels cannot be reduced by a factor of {factor}")
    if factor == 1:
        return image.copy()
    rows = image.reshape(*lead, height // factor, factor, width, channels).sum(-3, dtype=np.uint32)
    blocks = rows.reshape(*lead, height // factor, width // factor, factor, channels).sum(-2, dtype=np.uint32)
    area = factor * factor
    return ((blocks + area // 2) // area).astype(np.uint8)


def gaussian_blur(image: UInt8[np.ndarray, "h w 3"], kernel: int = 3, sigma: float = 0.6) -> UInt8[np.ndarray, "h w 3"]:
    """Separable Gaussian of kernel x kernel taps that sum to one, with reflected borders.

    The defaults are the paper's for 64 -> 256; sigma is in pixels. ValueError where the kernel is even or does not fit.
    """
    if kernel < 1 or kernel % 2 == 0 or min(image.shape[:2]) <= kernel // 2 or sigma <= 0:
        raise ValueError(
            f"no Gaussian of {kernel} taps and sigma {sigma} on {image.shape[0]} x {image.shape[1]} pixels"
        )
    reach, (height, width, _) = kernel // 2, image.shape
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2).astype(np.float32)
    taps /= taps.sum()
    x = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="reflect").astype(np.float32)
    x = np.add.reduce([tap * x[i : i + height] for i, tap in enumerate(taps)])
    x = np.add.reduce([tap * x[:, i : i + width] for i, tap in enumerate(taps)])
    return _to_uint8(x)


def bsr(image: UInt8[np.ndarray, "h w 3"], factor: int, rng: np.random.Generator) -> UInt8[np.ndarray, "p q 3"]:
    """BSR-style corruption, then the low size: the paper's conditioning for 256 -> 1024.

    A blur (isotropic or not), a resize by a random kernel, Gaussian noise, speckle noise and JPEG act in random order.
    Returns uint8 [h/factor w/factor 3]; ValueError where the sides do not divide.
    """
    height, width, _ = image.shape
    if factor < 1 or height % factor or width % factor:
        raise ValueError(f"a picture of {height} x {width} pixels cannot be reduced by a factor of {factor}")
    scale = min(1.0, rng.uniform(*BSR_MIDDLE) / factor)
    middle = round(height * scale), round(width * scale)
    steps: tuple[Step, ...] = (
        lambda x: _blur(x, rng),
        lambda x: _resize(x, middle, RESIZES[rng.integers(len(RESIZES))]),
        lambda x: _to_uint8(x + _noise(x, int(rng.choice((1, 3))), rng)),
        lambda x: _to_uint8(x * (1 + _noise(x, 1, rng) / 255)),
        lambda x: _jpeg(x, int(rng.integers(*BSR_QUALITY, endpoint=True))),
    )
    for i in rng.permutation(len(steps)):
        image = steps[i](image)
    return _resize(image, (height // factor, width // factor), RESIZES[rng.integers(1, len(RESIZES))])


def degrade(
    kind: Degradation, image: UInt8[np.ndarray, "h w 3"], factor: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "p q 3"]:
    """The low-resolution picture that an upsampler by `factor` is given, corrupted as `kind` says."""
    match kind:
        case "none":
            return area_downsample(image, factor)
        case "blur":
            return gaussian_blur(area_downsample(image, factor))
        case "bsr":
            return bsr(image, factor, rng)


def _to_uint8(x: Float[np.ndarray, "*s"]) -> UInt8[np.ndarray, "*s"]:
    return np.clip(np.rint(x), 0, 255).astype(np.uint8)


def _noise(x: UInt8[np.ndarray, "h w 3"], channels: int, rng: np.random.Generator) -> Float[np.ndarray, "h w c"]:
    return np.float32(rng.uniform(*BSR_NOISE)) * rng.standard_normal((*x.shape[:2], channels), np.float32)


def _blur(x: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator) -> UInt8[np.ndarray, "h w 3"]:
    along = rng.uniform(*BSR_SIGMA)
    isotropic = rng.random() < 0.5
    across, angle = (along, 0.0) if isotropic else (rng.uniform(*BSR_SIGMA), rng.uniform(0, np.pi))
    dy, dx = np.mgrid[-2:3, -2:3]
    u, v = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
    weights = np.exp(-0.5 * ((u / along) ** 2 + (v / across) ** 2))
    # Pillow leaves a border of two pixels unfiltered, which the padding takes up.
    padded = Image.fromarray(np.pad(x, ((2, 2), (2, 2), (0, 0)), mode="reflect"))
    blurred = padded.filter(ImageFilter.Kernel((5, 5), (weights / weights.sum()).ravel().tolist(), scale=1))
    return np.asarray(blurred)[2:-2, 2:-2]


def _resize(
    x: UInt8[np.ndarray, "h w 3"], size: tuple[int, int], kernel: Image.Resampling
) -> UInt8[np.ndarray, "p q 3"]:
    height, width = size
    return np.asarray(Image.fromarray(x).resize((width, height), kernel))


def _jpeg(x: UInt8[np.ndarray, "h w 3"], quality: int) -> UInt8[np.ndarray, "h w 3"]:
    buffer = io.BytesIO()
    Image.fromarray(x).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))
