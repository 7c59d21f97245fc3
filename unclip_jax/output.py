"""Pictures as files: where they go, how they are written, and what a command says while it makes them."""

import json
import math
import os
import re
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from unclip_jax.checkpoint.safetensors import write_failure
from unclip_jax.inputs import BUCKETS

GRID_SIDE = 4096  # px, the most that a grid measures
OTHER_IMAGES = {".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}


class OutputError(ValueError):
    """Pictures that cannot be saved where they should be; the text is one sentence."""


def destinations(out: Path, prompt: str, seed: int, count: int) -> tuple[list[Path], Path]:
    """Paths of the pictures and of their grid, for a .png path or a folder; nothing is created.

    Raises OutputError for a file type other than PNG.
    """
    if out.suffix.lower() == ".png" and not out.is_dir():
        further = [out.with_name(f"{out.stem}-{number}{out.suffix}") for number in range(1, count)]
        return [out, *further], out.with_name(f"{out.stem}-grid{out.suffix}")
    if out.suffix.lower() in OTHER_IMAGES and not out.is_dir():
        raise OutputError(f"pictures are saved as PNG: --out '{out}' must end in .png, or be a folder")
    plain = unicodedata.normalize("NFKD", prompt[:200]).encode("ascii", "ignore").decode().lower()
    slug = "-".join(re.findall(r"[a-z0-9]+", plain))[:60].strip("-") or "picture"
    return [out / f"{slug}-{seed + number}.png" for number in range(count)], out / "grid.png"


def check_writable(paths: list[Path]) -> None:
    """OutputError where a file of these could not be written; leaves nothing behind."""
    folder = paths[0].parent
    existing = next(parent for parent in (folder, *folder.absolute().parents) if os.path.lexists(parent))
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
        if occupied := [path for path in paths if path.is_dir()]:
            raise OutputError(f"cannot save '{occupied[0]}': it is a folder; choose another --out")
    except OSError as error:
        raise OutputError(f"cannot save '{paths[0]}': {error.strerror}; choose another --out") from error


Drawn = tuple[UInt8[np.ndarray, "b s s 3"], Float[np.ndarray, "b n"] | None]  # pictures, CLIP's scores


def draw_and_save(
    places: tuple[list[Path], Path],
    seed: int,
    size: int,
    about: dict[str, str],
    progress: "Progress",
    draw: Callable[[int, int], Drawn],
) -> list[Path]:
    """Draws pictures a bucket at a time, saves each as soon as its batch is done, and their grid where they are many.

    places: of the pictures and of the grid. draw: from their number and their first seed to so many pictures of `size`.
    """
    paths, grid_path = places
    count = len(paths)
    small, side = [], min(size, GRID_SIDE // math.ceil(math.sqrt(count)))
    with progress:
        for start in range(0, count, BUCKETS[-1]):
            part = paths[start : start + BUCKETS[-1]]
            pictures, scores = draw(len(part), seed + start)
            for number, (path, picture) in enumerate(zip(part, pictures, strict=True)):
                found = {} if scores is None else ranking(scores[number])
                save_png(path, picture, about | {"seed": str(seed + start + number)} | found)
                small.append(np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BOX)))
    if count > 1:
        paths = [*paths, grid_path]
        save_png(grid_path, grid(np.stack(small)), about | {"seed": f"{seed} to {seed + count - 1}"})
    report(paths, progress.summary())
    return paths


def report(paths: Iterable[Path], summary: str) -> None:
    """Names the files on standard output, and on standard error what they took."""
    for path in paths:
        print(path)
    print(f"unclip: {summary}", file=sys.stderr)


def warn(lines: Iterable[str]) -> None:
    """Warnings on standard error, each once."""
    for line in dict.fromkeys(lines):
        print(f"unclip: warning: {line}", file=sys.stderr)


def ranking(scores: Float[np.ndarray, " n"]) -> dict[str, str]:
    """Which candidate a picture is, and CLIP's cosines of all candidates with the prompt."""
    return {"candidate": str(int(np.argmax(scores))), "clip_scores": json.dumps([round(float(s), 4) for s in scores])}


def grid(pictures: UInt8[np.ndarray, "n s s 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """Pictures in rows, as square as their number allows, white where there are none."""
    columns = math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    side = pictures.shape[1]
    cells = np.full((rows * columns, side, side, 3), 255, np.uint8)
    cells[: len(pictures)] = pictures
    return cells.reshape(rows, columns, side, side, 3).swapaxes(1, 2).reshape(rows * side, columns * side, 3)


def save_png(path: Path, picture: UInt8[np.ndarray, "h w 3"], about: dict[str, str]) -> None:
    """Writes a picture with text chunks in any script; raises as `write_whole` does."""
    chunks = PngInfo()
    for name, text in {"Software": "unclip_jax", **about}.items():
        chunks.add_text(name, text)
    write_whole(path, lambda file: Image.fromarray(picture).save(file, "PNG", pnginfo=chunks))


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file that appears whole or not at all, its folder with it.

    Raises OutputError in one sentence where that fails.
    """
    temporary = path.with_name(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(write_failure(path, error)) from error


class Progress:
    """A bar over the stages on a terminal, a line per stage elsewhere; adds up each stage's seconds."""

    def __init__(self, total: int) -> None:
        self.seconds: dict[str, float] = {}
        self._stage: str | None = None
        self._since = 0.0
        shape = "{desc:<20} |{bar}| {n_fmt}/{total_fmt} [{elapsed}]"
        self._bar = tqdm(total=total, bar_format=shape, disable=not sys.stderr.isatty(), leave=False)

    def __call__(self, stage: str) -> None:
        """Notes that a stage begins, and so that the one before has ended."""
        last = self._stage
        self._end_stage()
        self._stage, self._since = stage, time.monotonic()
        self._bar.set_description_str(stage)
        if self._bar.disable and stage != last:
            print(f"unclip: {stage} ...", file=sys.stderr, flush=True)

    def summary(self) -> str:
        """The seconds of each stage, in the order in which they ran."""
        return ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in self.seconds.items())

    def _end_stage(self) -> None:
        if self._stage is not None:
            self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + time.monotonic() - self._since
            self._bar.update()
        self._stage = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end_stage()
        self._bar.close()
