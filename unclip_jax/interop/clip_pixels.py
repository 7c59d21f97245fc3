"""A published CLIP's pixels: pictures of any size as its image tower wants them, equal to CLIPImageProcessor's."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from unclip_jax.checkpoint.schema import CheckpointError
from unclip_jax.config import ClipConfig
from unclip_jax.models.clip import preprocess
from unclip_jax.pictures import square


def clip_pixels(
    config: ClipConfig, pictures: Sequence[Image.Image | UInt8[np.ndarray, "_ _ 3"]]
) -> Float[Array, "b s s 3"]:
    """Pictures for `encode_image`, float32: RGB on white, the short side brought to image_size, the middle, normalised.

    Resizing is Pillow's bicubic with antialiasing. Raises ValueError for an empty picture and for one so long and thin
    that it would not fit in memory.
    """
    return preprocess(config, jnp.asarray(np.stack([_middle(picture, config.image_size) for picture in pictures])))


def _middle(picture: Image.Image | np.ndarray, side: int) -> UInt8[np.ndarray, "{side} {side} 3"]:
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return square(np.asarray(image.convert("RGB")), side)


def preprocessor(config: ClipConfig) -> dict[str, Any]:
    """The `preprocessor_config.json` with which transformers makes the same pixels."""
    side = config.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": int(Image.Resampling.BICUBIC),
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
    }


def channel_statistics(data: dict[str, Any], side: int | None = None) -> dict[str, Any]:
    """ClipConfig's image_mean and image_std from a `preprocessor_config.json`.

    side: the tower's image_size. CheckpointError naming a step that `clip_pixels` does not do as the file says.
    """
    expected = preprocessor(ClipConfig())
    for key in ("do_resize", "resample", "do_center_crop", "do_rescale", "rescale_factor", "do_normalize"):
        if data.get(key, expected[key]) != expected[key]:
            raise CheckpointError(f"the preprocessor's {key} is {data[key]!r}: only {expected[key]!r} exists here")
    for key in ("size", "crop_size") if side else ():
        value = data.get(key, side)
        if any(edge != side for edge in (value.values() if isinstance(value, dict) else [value])):
            raise CheckpointError(f"the preprocessor's {key} is {value!r}, and the image tower takes {side} pixels")
    found = {}
    for key in ("image_mean", "image_std"):
        values = data.get(key, expected[key])
        if not isinstance(values, list) or [type(value) for value in values] != [float] * 3 or 0.0 in values:
            raise CheckpointError(f"the preprocessor's {key} is {values!r}, expected three numbers other than 0")
        found[key] = tuple(values)
    return found
