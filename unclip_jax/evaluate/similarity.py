"""How alike two pictures are that should be the same: PSNR, SSIM, and a distance of CLIP's inner features."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, UInt8

from unclip_jax.config import ClipConfig
from unclip_jax.evaluate import upsampling
from unclip_jax.models.clip import ImageTower, preprocess
from unclip_jax.models.transformer import Block, Transformer
from unclip_jax.models.upsampler import resize_low
from unclip_jax.sharding import rows
from unclip_jax.stages import to_model, to_pixels
from unclip_jax.types import Params

WINDOW, SIGMA = 11, 1.5  # px, of SSIM's Gaussian
K1, K2 = 0.01, 0.03
MOST_PSNR = 99.0  # dB, of equal pictures

Pictures = UInt8[np.ndarray, "b h w 3"]


def psnr(a: Pictures, b: Pictures) -> Float64[np.ndarray, " b"]:
    """Peak signal-to-noise ratio of each pair in dB; 99 at most."""
    return np.minimum(upsampling.psnr(a, b), MOST_PSNR).astype(np.float64)


def ssim(a: Pictures, b: Pictures) -> Float64[np.ndarray, " b"]:
    """Structural similarity of each pair (Wang et al. 2004, equation 13), mean over channels and places.

    An 11 x 11 Gaussian of 1.5 px, constants 0.01 and 0.03, no place whose window leaves the picture. ValueError where
    pictures are smaller than the window.
    """
    if min(a.shape[1:3]) < WINDOW:
        raise ValueError(f"SSIM needs pictures of at least {WINDOW} px, not {a.shape[2]} x {a.shape[1]}")
    x, y = a.astype(np.float64), b.astype(np.float64)
    mean_x, mean_y = _blurred(x), _blurred(y)
    variance_x, variance_y = _blurred(x * x) - mean_x**2, _blurred(y * y) - mean_y**2
    covariance = _blurred(x * y) - mean_x * mean_y
    c1, c2 = (K1 * 255) ** 2, (K2 * 255) ** 2
    alike = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (alike / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))).mean((1, 2, 3))


def _blurred(x: Float64[np.ndarray, "b h w c"]) -> Float64[np.ndarray, "b p q c"]:
    offsets = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-(offsets**2) / (2 * SIGMA**2))
    weights /= weights.sum()
    for axis in (1, 2):
        x = np.lib.stride_tricks.sliding_window_view(x, WINDOW, axis) @ weights
    return x


@partial(jax.jit, static_argnums=0)
def patch_distance(
    config: ClipConfig, params: Params, a: UInt8[Array, "b h w 3"], b: UInt8[Array, "b h w 3"]
) -> Float[Array, " b"]:
    """Distance of each pair in CLIP's image tower, made as LPIPS is (arXiv 1801.03924 equation 1), without its weights.

    The patches after the stem and after every block are brought to unit length; squared differences are averaged over
    places and layers. 0: the same; 2: orthogonal everywhere. It is not comparable with LPIPS' own numbers, nor between
    two CLIPs. A tower whose layers are scanned gives its stem and its last layer alone.
    """
    pairs = zip(_patches(config, params, a), _patches(config, params, b), strict=True)
    return jnp.stack([jnp.square(_unit(x) - _unit(y)).sum(-1).mean(1) for x, y in pairs]).mean(0)


def _patches(config: ClipConfig, params: Params, pictures: UInt8[Array, "b h w 3"]) -> list[Float[Array, "b n d"]]:
    """What every layer makes of every patch."""
    if pictures.shape[1] != config.image_size:
        pictures = to_pixels(resize_low(to_model(pictures), config.image_size))

    def kept(module: Any, method: str) -> bool:
        return method == "__call__" and (isinstance(module, Block | Transformer) or module.name == "patches")

    pixels = rows(preprocess(config, pictures))
    tower = ImageTower(config)
    encoded: Any = tower.apply({"params": params}, pixels, method="encode_image", capture_intermediates=kept)
    seen: Any = encoded[1]["intermediates"]
    stem, blocks = seen["patches"]["__call__"][0], seen["image_transformer"]
    later = [block["__call__"][0][0] for name, block in sorted(blocks.items()) if name.startswith("block")]
    later = later or [blocks["__call__"][0]]
    return [stem.reshape(len(stem), -1, stem.shape[-1]), *(x[:, 1:] for x in later)]


def _unit(x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-8)
