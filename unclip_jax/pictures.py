"""A user's picture files as arrays: any common format, colour model, depth and orientation, in bounded memory.

Transparent parts show white. Of an animation the first frame is read. What cannot be used is refused as a ValueError
of one sentence, and pictures of more than MOST_PIXELS before they are decoded.
"""

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

Fit = Literal["crop", "pad"]
# Only these parsers see untrusted bytes; EPS, for one, would hand them to another program.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MOST_PIXELS = 2**26  # 67 million, such as 8192 x 8192: at most 1 GB while it is decoded
LONGEST = 2048  # px, of a picture that is to be padded


class UserPicture(NamedTuple):
    """rgb: on white. alpha: 255 opaque, None where the file has none. warnings: what was left out, in sentences."""

    rgb: UInt8[np.ndarray, "h w 3"]
    alpha: UInt8[np.ndarray, "h w"] | None
    warnings: tuple[str, ...] = ()


def read_picture(path: str | Path) -> UInt8[np.ndarray, "h w 3"]:
    """The picture of a file, upright, transparent parts white; raises as `open_picture` does."""
    return open_picture(path).rgb


def open_picture(path: str | Path) -> UserPicture:
    """The picture of a PNG, JPEG, WebP, GIF, BMP or TIFF file, upright; ValueError in one sentence where it is none."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"there is no picture '{path}'")
    if not path.is_file():
        raise ValueError(f"'{path}' is not a file, so no picture")
    # The limit below is stricter than the one that Pillow warns of.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _checked(str(path), lambda: path.open("rb"))


def picture_of_bytes(data: bytes, name: str, least: int | None = None) -> UserPicture:
    """The picture of a file's bytes, as `open_picture`; `name` is what errors call it. Threads may share it.

    least: a JPEG may be read at 1/2, 1/4 or 1/8 of its size, as long as its sides keep so many pixels.
    """
    return _checked(name, lambda: io.BytesIO(data), least)


def _checked(name: str, opened: Callable[[], Any], least: int | None = None) -> UserPicture:
    try:
        with opened() as file:
            return _decoded(name, file, least)
    except Image.DecompressionBombError:
        raise ValueError(f"'{name}' {TOO_LARGE}") from None
    except Image.UnidentifiedImageError:
        raise ValueError(f"'{name}' is not a picture that can be read: save it as PNG or JPEG") from None
    except PermissionError as error:
        raise ValueError(f"cannot read '{name}': {error.strerror}") from None
    except _Refused as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # damaged bytes raise whatever they meet first in a parser
        raise ValueError(f"'{name}' is truncated or damaged, or no picture: {_sentence(error)}") from error


TOO_LARGE = f"has more than {MOST_PIXELS / 1e6:.0f} million pixels: reduce it first"


class _Refused(Exception):
    """A sentence of ours, as opposed to a parser's."""


def _decoded(name: str, file: Any, least: int | None = None) -> UserPicture:
    with Image.open(file, formats=FORMATS) as image:
        if image.width * image.height > MOST_PIXELS:
            raise _Refused(f"'{name}' {TOO_LARGE}")
        several = image.format != "MPO" and getattr(image, "is_animated", False)  # many phones' JPEGs are MPO
        said = (f"'{name}' holds several pictures: only the first is read",) if several else ()
        image.seek(0) if several else None
        if least is not None and image.format == "JPEG":
            image.draft(None, (least, least))  # type: ignore[arg-type]
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        upright: Image.Image = image
        if upright.mode in ("I", "F") or upright.mode.startswith("I;16"):
            upright = Image.fromarray(_levels(np.asarray(upright)))
        if not upright.has_transparency_data:
            return UserPicture(np.asarray(upright if upright.mode == "RGB" else upright.convert("RGB")), None, said)
        rgba = upright.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return UserPicture(
            np.asarray(Image.alpha_composite(white, rgba).convert("RGB")), np.asarray(rgba.getchannel("A")), said
        )


def _levels(values: np.ndarray) -> UInt8[np.ndarray, "h w"]:
    """Deep grey values as bytes: of 1 where none exceeds it, else of 255, else of 65,535."""
    values = np.nan_to_num(values.astype(np.float32))
    top = float(values.max(initial=0))
    whole = 65535 if top > 255 else 255 if top > 1 else 1
    return np.round(np.clip(values / whole, 0, 1) * 255).astype(np.uint8)


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def square(picture: UInt8[np.ndarray, "h w 3"], side: int) -> UInt8[np.ndarray, "{side} {side} 3"]:
    """The middle of a picture at side x side pixels, antialiased; unchanged where it has that size.

    As a published CLIP's preprocessing: the short side is brought to `side`, and what is left is cut. Raises ValueError
    for an empty picture and for one so long and thin that it would not fit in memory.
    """
    height, width, _ = picture.shape
    if not picture.size:
        raise ValueError(f"a picture of {width} x {height} pixels shows nothing")
    long = int(side * max(height, width) / min(height, width))
    if side * long > MOST_PIXELS:
        raise ValueError(f"a picture of {width} x {height} pixels is too thin: cut it to what matters first")
    size = (side, long) if width <= height else (long, side)
    image = Image.fromarray(picture)
    resized = np.asarray(image if image.size == size else image.resize(size, Image.Resampling.BICUBIC))
    top, left = (size[1] - side) // 2, (size[0] - side) // 2
    return np.ascontiguousarray(resized[top : top + side, left : left + side])


def padded(picture: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "s s 3"]:
    """A picture made square on the median colour of its border, its longer side reduced to LONGEST pixels before."""
    image = Image.fromarray(picture)
    image.thumbnail((LONGEST, LONGEST), Image.Resampling.BICUBIC)
    border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    colour = tuple(int(level) for level in np.median(border, axis=0))
    side = max(image.size)
    whole = Image.new("RGB", (side, side), colour)
    whole.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(whole)
