"""The command `unclip sample`: pictures of a prompt as PNG files that say how they were made."""

import argparse
import difflib
import json
import math
import os
import re
import sys
import tempfile
import time
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from unclip_jax import compile_cache
from unclip_jax.cascade import SHIPPED, Cascade, load_cascade
from unclip_jax.checkpoint.safetensors import write_failure
from unclip_jax.generate import check, check_seeds, generate_ranked
from unclip_jax.inputs import BUCKETS, Options

MOST_PICTURES = 10_000
MOST_CHARACTERS = 10_000  # of a prompt; the tokenizer reads no further
NAMED = 8  # unknown words that a warning lists
GRID_SIDE = 4096  # px, the most that a grid measures
OTHER_IMAGES = {".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}


class OutputError(ValueError):
    """Pictures that cannot be saved where they should be; the text is one sentence."""


def sample_to_files(options: argparse.Namespace) -> list[Path]:
    """Draws and saves pictures, prints their paths, and returns them.

    Every picture is saved as soon as its batch is done. Raises ValueError or OSError in one sentence, before anything
    is computed unless it is the saving itself that fails.
    """
    prompt = options.prompt.encode("utf-8", "replace").decode()  # half a character, from a foreign terminal, is "?"
    count, seed = options.n, options.seed
    if not 1 <= count <= MOST_PICTURES:
        raise ValueError(f"--n must lie between 1 and {MOST_PICTURES}, not {count}")
    check_seeds(seed, seed + count - 1)
    paths, grid_path = destinations(options.out, prompt, seed, count)
    check_writable([*paths, grid_path] if count > 1 else paths)
    cascade = load_cascade(options.weights or SHIPPED)
    chosen = Options(
        options.size, options.sampler, options.steps, options.guidance, options.prior_steps, options.prior_guidance,
        options.candidates, options.prior, options.prior_temperature, rank_from=options.rank_from,
        clip_guidance=options.clip_guidance,
    )  # fmt: skip
    size = check(cascade, chosen)
    for line in warnings_of(cascade, prompt):
        print(f"unclip: warning: {line}", file=sys.stderr)
    cache = compile_cache.enable()
    if cache is not None and not any(cache.glob("*")):
        print("unclip: compiling for this machine; later runs start at once", file=sys.stderr)

    about = {"prompt": prompt[:MOST_CHARACTERS], "weights": cascade.digest}
    about["settings"] = json.dumps(settings(cascade, chosen, size))
    small, side = [], min(size, GRID_SIDE // math.ceil(math.sqrt(count)))
    enlarging = sum(size >= stage > cascade.sizes[0] for stage in cascade.sizes)
    parts = [min(BUCKETS[-1], count - start) for start in range(0, count, BUCKETS[-1])]
    batches = sum(math.ceil(part * chosen.rank_from / BUCKETS[-1]) for part in parts)
    with Progress(3 * batches + enlarging * count) as progress:
        for start in range(0, count, BUCKETS[-1]):
            part = paths[start : start + BUCKETS[-1]]
            pictures, scores = generate_ranked(cascade, [prompt] * len(part), seed + start, chosen, progress)
            for number, (path, picture) in enumerate(zip(part, pictures, strict=True), start):
                found = {} if scores is None else ranking(scores[number - start])
                save_png(path, picture, about | {"seed": str(seed + number)} | found)
                small.append(np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BOX)))
    if count > 1:
        paths.append(grid_path)
        save_png(grid_path, grid(np.stack(small)), about | {"seed": f"{seed} to {seed + count - 1}"})
    for path in paths:
        print(path)
    print(f"unclip: {progress.summary()}", file=sys.stderr)
    return paths


def settings(cascade: Cascade, options: Options, size: int) -> dict[str, str | int | float]:
    """What the pictures were made with: the options, and the configs' advice where they are None."""
    prior, decoder = cascade.chosen_prior(options.prior).config.sample, cascade.decoder.config.sample
    advised = Options(size, decoder.sampler, decoder.steps, decoder.guidance, prior.steps, prior.guidance)
    if options.prior == "ar":
        advised = advised._replace(prior_steps=None, prior_temperature=prior.temperature)
    given = {name: value for name, value in options._asdict().items() if value is not None}
    return {name: value for name, value in (advised._asdict() | given).items() if value is not None}


def ranking(scores: Float[np.ndarray, " n"]) -> dict[str, str]:
    """Which candidate a picture is, and CLIP's cosines of all candidates with the prompt."""
    return {"candidate": str(int(np.argmax(scores))), "clip_scores": json.dumps([round(float(s), 4) for s in scores])}


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


def warnings_of(cascade: Cascade, prompt: str) -> list[str]:
    """One sentence for each thing about a prompt by which the pictures will not be what it says."""
    if not prompt.strip():
        return ["the prompt is empty: the pictures show anything"]
    found = []
    if bool(cascade.tokenizer.encode([prompt]).cut[0]):
        room = cascade.tokenizer.context_length - 2
        found.append(f"the prompt is too long: only its first {room} word pieces are read")
    known = {*cascade.words, ",", "."}
    pieces = dict.fromkeys(re.findall(r"[^\W_]+|[^\w\s]+|_", prompt[:MOST_CHARACTERS].lower()))
    if cascade.words and (unknown := [piece for piece in pieces if piece not in known]):
        listed = ", ".join(_beside_nearest(piece, cascade.words) for piece in unknown[:NAMED])
        more = f" and {len(unknown) - NAMED} more" if len(unknown) > NAMED else ""
        found.append(f"the cascade never saw {listed}{more}; unclip vocabulary lists what it knows")
    return found


def _beside_nearest(piece: str, words: Iterable[str]) -> str:
    shown = piece if len(piece) <= 30 else piece[:30] + "..."
    near = difflib.get_close_matches(piece[:30], [word for word in words if len(word) > 2], n=1, cutoff=0.3)
    return f'"{shown}"' + (f' (nearest: "{near[0]}")' if near else "")


def grid(pictures: UInt8[np.ndarray, "n s s 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """Pictures in rows, as square as their number allows, white where there are none."""
    columns = math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    side = pictures.shape[1]
    cells = np.full((rows * columns, side, side, 3), 255, np.uint8)
    cells[: len(pictures)] = pictures
    return cells.reshape(rows, columns, side, side, 3).swapaxes(1, 2).reshape(rows * side, columns * side, 3)


def save_png(path: Path, picture: UInt8[np.ndarray, "h w 3"], about: dict[str, str]) -> None:
    """Writes a picture with text chunks in any script; the file appears whole or not at all, its folder with it.

    Raises OutputError in one sentence where that fails.
    """
    chunks = PngInfo()
    for name, text in {"Software": "unclip_jax", **about}.items():
        chunks.add_text(name, text)
    temporary = path.with_name(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                Image.fromarray(picture).save(file, "PNG", pnginfo=chunks)
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
