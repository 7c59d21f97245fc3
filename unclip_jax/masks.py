"""Masks, and the one convention for them: what is marked is painted over, all else comes back untouched.

In Python a mask is bool [h w], true where something new is painted. In a file WHITE is painted over (a level of 128 or
more). A file with transparent pixels is read by its alpha channel instead: TRANSPARENT is painted over (alpha below
128), whatever its colours, as OpenAI's image API has it; so a picture with a hole in it is its own mask.
"""

from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from unclip_jax.pictures import UserPicture, open_picture

HALF = 128
Size = tuple[int, int]  # width and height, in px


def read_mask(path: str | Path, size: Size) -> Bool[np.ndarray, "h w"]:
    """The mask of a file, for a picture of `size` (width, height).

    Raises ValueError in one sentence where the file is no picture (see `pictures.open_picture`), is of another size, or
    marks nothing or everything.
    """
    found = open_picture(path)
    hole = _hole(found)
    white = np.asarray(Image.fromarray(found.rgb).convert("L")) >= HALF
    return checked(white if hole is None else hole, size, f"the mask '{path}'")


def hole_mask(picture: UserPicture, path: str | Path) -> Bool[np.ndarray, "h w"]:
    """The transparent part of a picture as its own mask; ValueError where it has none, or is nothing else."""
    hole = _hole(picture)
    if hole is None:
        raise ValueError(f"'{path}' has no transparent part to paint: say where with --mask or --box")
    return checked(hole, (hole.shape[1], hole.shape[0]), f"the alpha channel of '{path}'")


def box_mask(size: Size, box: tuple[int, int, int, int]) -> Bool[np.ndarray, "h w"]:
    """The mask of a box x, y, width, height in pixels of a picture of `size` (width, height); it must lie inside.

    Raises ValueError.
    """
    x, y, width, height = box
    if min(width, height) < 1 or min(x, y) < 0 or x + width > size[0] or y + height > size[1]:
        raise ValueError(f"the box {x},{y},{width},{height} does not lie in the picture of {size[0]} x {size[1]} px")
    mask = np.zeros((size[1], size[0]), bool)
    mask[y : y + height, x : x + width] = True
    return checked(mask, size, "the box")


def checked(mask: Bool[np.ndarray, "h w"], size: Size, name: str = "the mask") -> Bool[np.ndarray, "h w"]:
    """The mask itself; ValueError where it is of another size (width, height), or marks nothing or everything."""
    if mask.shape != (size[1], size[0]):
        raise ValueError(f"{name} has {mask.shape[1]} x {mask.shape[0]} px, its picture {size[0]} x {size[1]}")
    if not mask.any():
        raise ValueError(f"{name} marks nothing to paint: white, or transparent, is what is painted over")
    if mask.all():
        raise ValueError(f"{name} marks the whole picture and so keeps none of it: use unclip sample")
    return mask


def resize_mask(mask: Bool[np.ndarray, "h w"], side: int) -> Bool[np.ndarray, "s s"]:
    """The mask at another size: a pixel is marked if any part of its area was."""
    if mask.shape == (side, side):
        return mask
    share = Image.fromarray(mask.astype(np.float32)).resize((side, side), Image.Resampling.BOX)
    return np.asarray(share) > 1e-6


def resize_picture(picture: UInt8[np.ndarray, "h w 3"], side: int) -> UInt8[np.ndarray, "s s 3"]:
    """The picture at another size; at its own, the same bytes."""
    if picture.shape[:2] == (side, side):
        return picture
    return np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS))


def _hole(found: UserPicture) -> Bool[np.ndarray, "h w"] | None:
    """Where a file is transparent; None where it nowhere is."""
    if found.alpha is None or found.alpha.min() >= HALF:
        return None
    return found.alpha < HALF
