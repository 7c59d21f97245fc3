"""Murals: a canvas of any size, painted in overlapping frames, each conditioned on what is there already.

Canvas and finished frames lie in a state folder, so that an interrupted mural goes on where it stopped and memory
holds one frame at a time. A frame repaints a band of what it knows and fades into it, so that its border is nowhere.
"""

import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageFilter

from unclip_jax.cascade import Cascade
from unclip_jax.generate import check_seeds
from unclip_jax.inpaint import Method, painter
from unclip_jax.inputs import RECOMMENDED, Options
from unclip_jax.outpaint import Frame, frame_options, frames, paint_frame
from unclip_jax.output import write_whole

BAND = 1 / 16  # of a frame's side: how far it fades into what it knows
PLAN, CANVAS = "plan.json", "canvas.rgb"


class Region(NamedTuple):
    """A part of the canvas with a prompt of its own: left, top, width and height in px."""

    x: int
    y: int
    width: int
    height: int
    prompt: str

    def shared(self, frame: Frame) -> int:
        """The area that it has in common with a frame, in px."""
        across = min(self.x + self.width, frame.x + frame.side) - max(self.x, frame.x)
        down = min(self.y + self.height, frame.y + frame.side) - max(self.y, frame.y)
        return max(across, 0) * max(down, 0)


class Plan(NamedTuple):
    """What a mural shows: frame i has seed + i; of the regions that hold most of it the last one says what it shows,
    and `prompt` where none holds half of it."""

    width: int
    height: int
    prompt: str
    regions: tuple[Region, ...] = ()
    seed: int = 0
    options: Options = RECOMMENDED
    method: Method | None = None

    def prompt_of(self, frame: Frame) -> str:
        """The prompt of a frame."""
        best = max(reversed(self.regions), key=lambda region: region.shared(frame), default=None)
        return best.prompt if best is not None and 2 * best.shared(frame) >= frame.side**2 else self.prompt


class Canvas(NamedTuple):
    """A picture in a file of plain RGB rows: larger than memory, and errors of a full disk are errors."""

    path: Path
    width: int
    height: int

    def create(self) -> None:
        """An empty canvas of the full length."""
        with self.path.open("wb") as file:
            file.truncate(self.width * self.height * 3)

    def read(self, frame: Frame) -> UInt8[np.ndarray, "f f 3"]:
        """The pixels of a frame."""
        rows = []
        with self.path.open("rb") as file:
            for row in range(frame.side):
                file.seek(self._offset(frame, row))
                rows.append(np.frombuffer(file.read(frame.side * 3), np.uint8))
        return np.stack(rows).reshape(frame.side, frame.side, 3)

    def write(self, frame: Frame, pixels: UInt8[np.ndarray, "f f 3"]) -> None:
        """Replaces the pixels of a frame, on the disk when it returns."""
        with self.path.open("r+b") as file:
            for row, line in enumerate(pixels):
                file.seek(self._offset(frame, row))
                file.write(line.tobytes())
            file.flush()
            os.fsync(file.fileno())

    def rows(self) -> Iterator[bytes]:
        """Its rows from the top, RGB."""
        with self.path.open("rb") as file:
            for _ in range(self.height):
                yield file.read(self.width * 3)

    def _offset(self, frame: Frame, row: int) -> int:
        return ((frame.y + row) * self.width + frame.x) * 3


def mural(
    cascade: Cascade,
    plan: Plan,
    folder: str | Path,
    progress: Callable[[str], None] = lambda stage: None,
) -> Canvas:
    """The finished canvas of a plan, which lies in `folder` as do the frames of an interrupted run, which goes on.

    An interruption changes no pixel. Raises ValueError in one sentence for a plan that cannot be painted, and where the
    folder holds another one's frames.
    """
    folder = Path(folder)
    painter(cascade, plan.options, plan.method)
    todo, options = layout(cascade, plan)
    canvas = Canvas(folder / CANVAS, plan.width, plan.height)
    about = _about(cascade, plan)
    done = finished_frames(cascade, plan, folder)
    if not done:
        folder.mkdir(parents=True, exist_ok=True)
        canvas.create()
    elif (last := _pixels(folder, done - 1)).exists():  # noted, but perhaps not all on the canvas
        frame = todo[done - 1]
        canvas.write(frame, np.fromfile(last, np.uint8).reshape(frame.side, frame.side, 3))
    for number in range(done, len(todo)):
        frame, painted = todo[number], todo[:number]
        picture, unknown = canvas.read(frame), ~_covered(frame, painted)
        share = _fade(unknown)
        prompt, seed = plan.prompt_of(frame), plan.seed + number
        new = paint_frame(cascade, picture, share > 0, prompt, seed, options, plan.method, progress)
        mixed = _mixed(picture, new, share)
        # What the canvas will hold is on the disk before it is noted, and noted before the canvas changes: a frame is
        # never painted over its own pixels, whenever the run ends.
        write_whole(_pixels(folder, number), lambda file, mixed=mixed: file.write(mixed.tobytes()))
        _note(folder, about | {"finished": number + 1})
        canvas.write(frame, mixed)
        _pixels(folder, number - 1).unlink(missing_ok=True)
    return canvas


def layout(cascade: Cascade, plan: Plan) -> tuple[list[Frame], Options]:
    """The frames of a plan in their order, and the options that they are painted with; ValueError where it has none."""
    options = frame_options(cascade, plan.options, min(plan.width, plan.height))
    todo = frames(plan.width, plan.height, options.size or cascade.sizes[-1])
    check_seeds(plan.seed, plan.seed + len(todo) - 1)
    for region in plan.regions:
        inside = region.x < plan.width and region.y < plan.height and min(region.x, region.y) >= 0
        if not inside or min(region.width, region.height) < 1:
            where = f"{region.x},{region.y},{region.width},{region.height}"
            raise ValueError(f"the region {where} does not begin on the canvas of {plan.width} x {plan.height} px")
    return todo, options


def finished_frames(cascade: Cascade, plan: Plan, folder: str | Path) -> int:
    """How many frames of a plan lie finished in a folder; ValueError where they are another plan's, or damaged."""
    folder = Path(folder)
    if not (folder / PLAN).exists():
        return 0
    try:
        found = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        finished = int(found.pop("finished"))
        whole = (folder / CANVAS).stat().st_size == plan.width * plan.height * 3
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        raise ValueError(f"'{folder}' holds no mural that could go on: delete it, or choose another place") from None
    if found != _about(cascade, plan) or not whole or finished < 0:
        raise ValueError(
            f"'{folder}' holds an unfinished mural of other arguments or weights: "
            "finish it with its own, or delete the folder to begin anew"
        )
    return finished


def forget(folder: str | Path) -> None:
    """Removes a mural's state, and its folder unless it holds anything else."""
    folder = Path(folder)
    for path in (folder / PLAN, folder / CANVAS, *folder.glob(_pixels(folder, "*").name)):
        path.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def _about(cascade: Cascade, plan: Plan) -> dict:
    """What the pixels of a mural follow from, as JSON gives it back."""
    return json.loads(json.dumps({"plan": plan, "weights": cascade.digest}))


def _note(folder: Path, state: dict) -> None:
    write_whole(folder / PLAN, lambda file: file.write(json.dumps(state, indent=1).encode()))


def _pixels(folder: Path, number: int | str) -> Path:
    """Where a frame's pixels lie until the next one's do."""
    return folder / f"frame_{number}.rgb"


def _covered(frame: Frame, painted: list[Frame]) -> Bool[np.ndarray, "f f"]:
    """Which pixels of a frame others have painted."""
    covered = np.zeros((frame.side, frame.side), bool)
    for other in painted:
        x, y = other.x - frame.x, other.y - frame.y
        covered[max(y, 0) : max(y + other.side, 0), max(x, 0) : max(x + other.side, 0)] = True
    return covered


def _fade(unknown: Bool[np.ndarray, "f f"]) -> Float[np.ndarray, "f f"]:
    """Share of the new picture: 1 where nothing was known, falling to 0 over a band of the known."""
    band = max(1, round(BAND * len(unknown)))
    blurred = Image.fromarray(np.where(unknown, 255, 0).astype(np.uint8)).filter(ImageFilter.BoxBlur(band))
    return np.where(unknown, 1.0, np.minimum(2 * np.asarray(blurred, np.float32) / 255, 1.0)).astype(np.float32)


def _mixed(
    old: UInt8[np.ndarray, "f f 3"], new: UInt8[np.ndarray, "f f 3"], share: Float[np.ndarray, "f f"]
) -> UInt8[np.ndarray, "f f 3"]:
    weight = share[..., None]
    return np.round(weight * new + (1 - weight) * old).astype(np.uint8)


def write_png(file, canvas: Canvas, about: dict[str, str]) -> None:
    """Writes a canvas as a PNG into a binary file row by row, with text chunks in any script."""

    def chunk(kind: bytes, data: bytes) -> None:
        file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))

    file.write(b"\x89PNG\r\n\x1a\n")
    chunk(b"IHDR", struct.pack(">IIBBBBB", canvas.width, canvas.height, 8, 2, 0, 0, 0))
    for name, text in {"Software": "unclip_jax", **about}.items():
        chunk(b"iTXt", name.encode("latin-1") + b"\0\0\0\0\0" + text.encode())
    packer, above = zlib.compressobj(6), np.zeros(canvas.width * 3, np.uint8)
    for line in canvas.rows():
        row = np.frombuffer(line, np.uint8)
        # Filter 2: every byte less the one above it, modulo 256.
        if packed := packer.compress(b"\2" + (row - above).tobytes()):
            chunk(b"IDAT", packed)
        above = row
    chunk(b"IDAT", packer.flush())
    chunk(b"IEND", b"")
