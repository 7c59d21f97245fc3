"""Stored pictures as arrays, in bounded memory: whatever a file may be, it is read upright as RGB, or refused."""

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from unclip_jax.data.records import Broken
from unclip_jax.pictures import picture_of_bytes


def decode(
    image: bytes | UInt8[np.ndarray, "h w 3"], least: int | None = None, name: str = "picture"
) -> UInt8[np.ndarray, "h w 3"]:
    """A record's picture, upright, on white, of an animation the first frame; Broken in one sentence where it is none.

    least: a JPEG may be read at 1/2, 1/4 or 1/8 of its size, as long as its sides keep so many pixels.
    """
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise Broken(f"'{name}' is an array of {image.dtype} {list(image.shape)}, not of uint8 [h w 3]")
        return image
    if not image:
        raise Broken(f"'{name}' is empty")
    try:
        return picture_of_bytes(image, name, least).rgb
    except ValueError as error:
        raise Broken(str(error)) from None


def at_size(
    image: bytes | UInt8[np.ndarray, "h w 3"], side: int, name: str = "picture"
) -> UInt8[np.ndarray, "{side} {side} 3"]:
    """The middle of a record's picture at side x side pixels, antialiased; Broken as `decode`.

    As `pictures.square`, but only what is kept is resized.
    """
    picture = decode(image, 2 * side, name)
    height, width, _ = picture.shape
    short = min(height, width)
    left, top = (width - short) / 2, (height - short) / 2
    box = (left, top, left + short, top + short)
    return np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC, box))
