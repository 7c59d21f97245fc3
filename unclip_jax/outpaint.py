"""Outpainting: a picture grows beyond its borders, frame by frame, each an inpainting of what is there already.

A frame is a square of the side that the cascade makes, or the canvas's shorter side where that is less. Its prompt is
of the frame alone: a cascade that knows whole scenes paints one into every frame, around what stands in it.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8

from unclip_jax.cascade import Cascade
from unclip_jax.diffusion.inpainting import Known
from unclip_jax.generate import check, check_seeds, generate
from unclip_jax.inpaint import Method, repaint
from unclip_jax.inputs import RECOMMENDED, Options
from unclip_jax.masks import resize_mask, resize_picture

OVERLAP = 0.25  # share of a frame's side that it has in common with the next one, at least
MOST_SIDE = 100_000  # px of a canvas
MOST_PIXELS = 2**27  # of one that is held in memory


class Frame(NamedTuple):
    """A square of a canvas: left, top and side in px."""

    x: int
    y: int
    side: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """Its rows and columns."""
        return slice(self.y, self.y + self.side), slice(self.x, self.x + self.side)


def frames(width: int, height: int, side: int, overlap: float = OVERLAP) -> list[Frame]:
    """Frames that cover a canvas evenly, row by row, each sharing at least `overlap` of its side with the next.

    Raises ValueError for a canvas without size, or larger than any should be.
    """
    if not (1 <= width <= MOST_SIDE and 1 <= height <= MOST_SIDE):
        raise ValueError(f"a canvas measures 1 to {MOST_SIDE} px each way, not {width} x {height}")
    side = min(side, width, height)
    stride = max(1, side - math.ceil(overlap * side))

    def starts(length: int) -> list[int]:
        count = 1 + math.ceil((length - side) / stride)
        return [(length - side) * i // max(count - 1, 1) for i in range(count)]

    return [Frame(x, y, side) for y in starts(height) for x in starts(width)]


def frame_options(cascade: Cascade, options: Options, side: int) -> Options:
    """The options with the size that frames of a side are painted at: the chosen one, else the least that suffices."""
    size = check(cascade, options)
    if options.size is None:
        size = next((size for size in cascade.sizes if size >= side), size)
    return options._replace(size=size)


def paint_frame(
    cascade: Cascade,
    picture: UInt8[np.ndarray, "f f 3"],
    unknown: Bool[np.ndarray, "f f"],
    prompt: str,
    seed: int,
    options: Options,
    method: Method | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> UInt8[np.ndarray, "f f 3"]:
    """The frame with its unknown part painted and the rest as it was; options.size must be set."""
    side, size = len(picture), check(cascade, options)
    if unknown.all():
        return resize_picture(generate(cascade, prompt, seed, options, progress)[0], side)
    known = Known(resize_picture(picture, size)[None], resize_mask(unknown, size)[None])
    painted = repaint(cascade, known, [prompt], [seed], options, method, progress)[0]
    return np.where(unknown[..., None], resize_picture(painted, side), picture)


def outpaint(
    cascade: Cascade,
    picture: UInt8[np.ndarray, "h w 3"],
    left: int = 0,
    right: int = 0,
    top: int = 0,
    bottom: int = 0,
    prompt: str = "",
    seed: int = 0,
    options: Options = RECOMMENDED,
    method: Method | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> UInt8[np.ndarray, "h2 w2 3"]:
    """The picture with so many px more on each side, uint8 [top + h + bottom, left + w + right, 3].

    The picture itself comes back bit by bit. Frames that know most are painted first; frame i has seed + i.
    Raises ValueError in one sentence for what cannot be painted.
    """
    if min(left, right, top, bottom) < 0 or not any((left, right, top, bottom)):
        raise ValueError(f"a picture grows by px on at least one side, not by {left}, {right}, {top} and {bottom}")
    height, width, _ = picture.shape
    whole = left + width + right, top + height + bottom
    waiting = frames(*whole, check(cascade, options))
    if math.prod(whole) > MOST_PIXELS:
        raise ValueError(f"{whole[0]} x {whole[1]} px are more than the {MOST_PIXELS} that are painted in memory")
    canvas = np.full((*whole[::-1], 3), 128, np.uint8)
    unknown = np.ones(canvas.shape[:2], bool)
    canvas[top : top + height, left : left + width] = picture
    unknown[top : top + height, left : left + width] = False
    options = frame_options(cascade, options, waiting[0].side)
    check_seeds(seed, seed + len(waiting))
    while waiting := [frame for frame in waiting if unknown[frame.slices].any()]:
        frame = min(waiting, key=lambda frame: unknown[frame.slices].mean())
        part, gap = canvas[frame.slices], unknown[frame.slices]
        canvas[frame.slices] = paint_frame(cascade, part, gap, prompt, seed, options, method, progress)
        unknown[frame.slices] = False
        seed += 1
    return canvas
