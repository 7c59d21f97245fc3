"""The commands `unclip inpaint`, `outpaint` and `mural`: pictures as PNG files that say how they were made."""

import json
import math
import os
import re
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from unclip_jax import compile_cache
from unclip_jax.cascade import SHIPPED, Cascade, load_cascade
from unclip_jax.checkpoint.safetensors import write_failure
from unclip_jax.generate import check, check_seeds
from unclip_jax.inpaint import inpaint, painter
from unclip_jax.inputs import BUCKETS, Options
from unclip_jax.masks import box_mask, hole_mask, read_mask
from unclip_jax.mural import Canvas, Plan, Region, finished_frames, forget, layout, mural, write_png
from unclip_jax.outpaint import outpaint
from unclip_jax.pictures import UserPicture, open_picture
from unclip_jax.sample import (
    GRID_SIDE,
    MOST_CHARACTERS,
    MOST_PICTURES,
    OutputError,
    Progress,
    check_writable,
    destinations,
    grid,
    save_png,
    settings,
    warnings_of,
)


def inpaint_to_files(options: Namespace) -> list[Path]:
    """`unclip inpaint`: paints, saves and names the pictures; ValueError or OSError in one sentence."""
    prompt, count, seed = _clean(options.prompt), options.n, options.seed
    if not 1 <= count <= MOST_PICTURES:
        raise ValueError(f"--n must lie between 1 and {MOST_PICTURES}, not {count}")
    check_seeds(seed, seed + count - 1)
    paths, grid_path = destinations(options.out, prompt, seed, count)
    check_writable([*paths, grid_path] if count > 1 else paths)
    picture = _read(options.picture)
    size = (picture.rgb.shape[1], picture.rgb.shape[0])
    if options.mask is not None:
        mask = read_mask(options.mask, size)
    else:
        mask = hole_mask(picture, options.picture) if options.box is None else box_mask(size, _numbers(options.box))
    cascade, chosen = _begin(options, [prompt])
    about = _about(cascade, chosen, options, prompt)
    small, side = [], min(check(cascade, chosen), GRID_SIDE // math.ceil(math.sqrt(count)))
    with Progress(_stages(cascade, chosen) * count) as progress:
        for start in range(0, count, BUCKETS[-1]):
            part = paths[start : start + BUCKETS[-1]]
            painted = inpaint(
                cascade, picture.rgb, mask, [prompt] * len(part), seed + start, chosen, options.method, progress
            )
            for number, (path, one) in enumerate(zip(part, painted, strict=True), start):
                save_png(path, one, about | {"seed": str(seed + number)})
                small.append(_reduced(one, side))
    if count > 1:
        paths.append(grid_path)
        save_png(grid_path, grid(np.stack(small)), about | {"seed": f"{seed} to {seed + count - 1}"})
    for path in paths:
        print(path)
    print(f"unclip: {progress.summary()}", file=sys.stderr)
    return paths


def outpaint_to_file(options: Namespace) -> Path:
    """`unclip outpaint`: extends, saves and names the picture; ValueError or OSError in one sentence."""
    prompt = _clean(options.prompt)
    path = _destination(options.out)
    picture = _read(options.picture).rgb
    cascade, chosen = _begin(options, [prompt])
    with Progress(0) as progress:
        grown = outpaint(
            cascade, picture, options.left, options.right, options.top, options.bottom, prompt, options.seed, chosen,
            options.method, progress,
        )  # fmt: skip
    save_png(path, grown, _about(cascade, chosen, options, prompt) | {"seed": str(options.seed)})
    print(path)
    print(f"unclip: {progress.summary()}", file=sys.stderr)
    return path


def mural_to_file(options: Namespace) -> Path:
    """`unclip mural`: paints or goes on, writes the canvas, and removes the state beside it, `<out>.parts`.

    Raises ValueError or OSError in one sentence.
    """
    path = _destination(options.out)
    regions = tuple(_region(text) for text in options.region)
    prompts = [_clean(options.prompt), *(region.prompt for region in regions)]
    cascade, chosen = _begin(options, prompts)
    plan = Plan(options.width, options.height, prompts[0], regions, options.seed, chosen, options.method)
    frames, used = layout(cascade, plan)
    state = path.with_name(path.name + ".parts")
    done = finished_frames(cascade, plan, state)
    if done:
        print(f"unclip: going on after {done} of {len(frames)} frames in '{state}'", file=sys.stderr)
    with Progress(_stages(cascade, used) * (len(frames) - done)) as progress:
        canvas = mural(cascade, plan, state, progress)
    about = _about(cascade, used, options, prompts[0]) | {"seed": f"{plan.seed} to {plan.seed + len(frames) - 1}"}
    about |= {"regions": json.dumps(plan.regions)} if plan.regions else {}
    _save_canvas(path, canvas, about)
    forget(state)
    print(path)
    print(f"unclip: {len(frames)} frames of {frames[0].side} px; {progress.summary()}{_peak()}", file=sys.stderr)
    return path


def _begin(options: Namespace, prompts: list[str]) -> tuple[Cascade, Options]:
    """The cascade and the checked options of a call; warns of words that the cascade never saw."""
    cascade = load_cascade(options.weights or SHIPPED)
    chosen = Options(
        options.size, options.sampler, options.steps, options.guidance, options.prior_steps, options.prior_guidance,
        options.candidates, options.prior, options.prior_temperature, options.resamples, options.rank_from,
        options.clip_guidance,
    )  # fmt: skip
    check(cascade, chosen)
    painter(cascade, chosen, options.method)
    for line in dict.fromkeys(line for prompt in prompts for line in warnings_of(cascade, prompt)):
        print(f"unclip: warning: {line}", file=sys.stderr)
    cache = compile_cache.enable()
    if cache is not None and not any(cache.glob("*")):
        print("unclip: compiling for this machine; later runs start at once", file=sys.stderr)
    return cascade, chosen


def _read(path: Path) -> UserPicture:
    picture = open_picture(path)
    for line in picture.warnings:
        print(f"unclip: warning: {line}", file=sys.stderr)
    return picture


def _clean(prompt: str) -> str:
    return prompt.encode("utf-8", "replace").decode()  # half a character, from a foreign terminal, is "?"


def _destination(out: Path) -> Path:
    """The one path of a picture; OutputError where it is none of a PNG that can be written."""
    if out.suffix.lower() != ".png":
        raise OutputError(f"the picture is saved as PNG: --out '{out}' must end in .png")
    check_writable([out])
    return out


def _numbers(text: str) -> tuple[int, int, int, int]:
    if not re.fullmatch(r"\s*\d{1,9}(\s*,\s*\d{1,9}){3}\s*", text):
        raise ValueError(f"a place is four whole numbers x,y,width,height in px, not '{text[:40]}'")
    x, y, width, height = map(int, text.split(","))
    return x, y, width, height


def _region(text: str) -> Region:
    place, equals, prompt = text.partition("=")
    if not equals:
        raise ValueError(f"a region is x,y,width,height=prompt, not '{text[:40]}'")
    return Region(*_numbers(place), _clean(prompt.strip()))


def _stages(cascade: Cascade, options: Options) -> int:
    """How many stages one picture goes through."""
    return 3 + sum(check(cascade, options) >= size > cascade.sizes[0] for size in cascade.sizes)


def _about(cascade: Cascade, chosen: Options, options: Namespace, prompt: str) -> dict[str, str]:
    cascade, chosen = painter(cascade, chosen, options.method)
    found = settings(cascade, chosen, check(cascade, chosen))
    method = options.method or ("resample" if cascade.inpaint is None else "finetuned")
    return {
        "prompt": prompt[:MOST_CHARACTERS],
        "weights": cascade.digest,
        "settings": json.dumps({"command": options.command, "method": method} | found),
    }


def _reduced(picture: UInt8[np.ndarray, "h w 3"], side: int) -> UInt8[np.ndarray, "s s 3"]:
    return np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BOX))


def _save_canvas(path: Path, canvas: Canvas, about: dict[str, str]) -> None:
    """As save_png, from rows on the disk."""
    temporary = path.with_name(f".{os.getpid()}.tmp")
    try:
        try:
            with temporary.open("wb") as file:
                write_png(file, canvas, about)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(write_failure(path, error)) from error


def _peak() -> str:
    """The most memory that this process has held, where the system tells."""
    try:
        import resource
    except ImportError:
        return ""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"; peak memory {peak / 2**20:.0f} MiB"
