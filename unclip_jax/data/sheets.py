"""Contact sheets: pictures in rows, each above the caption that its tokens say."""

from collections.abc import Sequence
from contextlib import suppress
from textwrap import wrap
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image, ImageDraw, ImageFont
from tokenizers import decoders

from unclip_jax.data.tokenizer import clip_encoding

CELL, COLUMNS, LINES, MARGIN = 160, 6, 4, 8  # px, pictures, lines of text, px
LETTERS = 26  # of a line


def said(ids: Int[np.ndarray, " n"]) -> str:
    """The text that OpenAI's tokens say, without start, end and padding."""
    end = int(np.argmax(ids)) if len(ids) else 0
    pieces = "".join(clip_encoding().id_to_token(int(index)) or "" for index in ids[1:end])
    return " ".join(decoders.ByteLevel().decode([word]) for word in pieces.split("</w>") if word)


def contact_sheet(
    pictures: Sequence[UInt8[np.ndarray, "s s 3"]], captions: Sequence[Int[np.ndarray, " n"]]
) -> UInt8[np.ndarray, "h w 3"]:
    """Square pictures above their captions, COLUMNS to a row; captions of OpenAI's tokens."""
    rows, below = max(1, -(-len(pictures) // COLUMNS)), 14 * LINES + 4
    width, height = COLUMNS * (CELL + MARGIN) + MARGIN, rows * (CELL + below + MARGIN) + MARGIN
    whole = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(whole), _font()
    for number, (picture, ids) in enumerate(zip(pictures, captions, strict=True)):
        row, column = divmod(number, COLUMNS)
        x, y = MARGIN + column * (CELL + MARGIN), MARGIN + row * (CELL + below + MARGIN)
        whole.paste(Image.fromarray(picture).resize((CELL, CELL), Image.Resampling.BICUBIC), (x, y))
        lines = wrap(said(ids), LETTERS) or ["(no caption)"]
        if len(lines) > LINES:
            lines = [*lines[: LINES - 1], lines[LINES - 1][: LETTERS - 1] + "\N{HORIZONTAL ELLIPSIS}"]
        draw.multiline_text((x, y + CELL + 2), "\n".join(lines), "black", font, spacing=2)
    return np.asarray(whole)


def _font() -> Any:
    """A font of the system with more than Latin letters, else Pillow's own."""
    for name in ("NotoSansCJK-Regular.ttc", "DejaVuSans.ttf"):
        with suppress(OSError):
            return ImageFont.truetype(name, 10)
    return ImageFont.load_default(11)
