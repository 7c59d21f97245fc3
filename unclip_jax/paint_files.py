"""The commands `unclip inpaint`, `outpaint` and `mural`: pictures as PNG files that say how they were made."""

import json
import re
import sys
from argparse import Namespace
from pathlib import Path

from unclip_jax.cascade import Cascade
from unclip_jax.generate import check
from unclip_jax.inpaint import inpaint, painter
from unclip_jax.inputs import Options
from unclip_jax.masks import box_mask, hole_mask, read_mask
from unclip_jax.mural import Plan, Region, finished_frames, forget, layout, mural, write_png
from unclip_jax.outpaint import outpaint
from unclip_jax.output import (
    OutputError,
    Progress,
    check_writable,
    draw_and_save,
    report,
    save_png,
    warn,
    write_whole,
)
from unclip_jax.pictures import UserPicture, open_picture
from unclip_jax.sample import MOST_CHARACTERS, announce, enlargements, open_cascade, picture_places, plain, settings


def inpaint_to_files(options: Namespace) -> list[Path]:
    """`unclip inpaint`: paints, saves and names the pictures; ValueError or OSError in one sentence."""
    prompt = plain(options.prompt)
    places = picture_places(options, prompt)
    picture = _read(options.picture)
    size = (picture.rgb.shape[1], picture.rgb.shape[0])
    if options.mask is not None:
        mask = read_mask(options.mask, size)
    else:
        mask = hole_mask(picture, options.picture) if options.box is None else box_mask(size, _numbers(options.box))
    cascade, chosen = _begin(options, [prompt])
    progress = Progress(_stages(cascade, chosen) * options.n)

    def draw(number: int, seed: int):
        prompts = [prompt] * number
        return inpaint(cascade, picture.rgb, mask, prompts, seed, chosen, options.method, progress), None

    about = _about(cascade, chosen, options, prompt)
    return draw_and_save(places, options.seed, check(cascade, chosen), about, progress, draw)


def outpaint_to_file(options: Namespace) -> Path:
    """`unclip outpaint`: extends, saves and names the picture; ValueError or OSError in one sentence."""
    prompt = plain(options.prompt)
    path = _destination(options.out)
    picture = _read(options.picture).rgb
    cascade, chosen = _begin(options, [prompt])
    with Progress(0) as progress:
        grown = outpaint(
            cascade, picture, options.left, options.right, options.top, options.bottom, prompt, options.seed, chosen,
            options.method, progress,
        )  # fmt: skip
    save_png(path, grown, _about(cascade, chosen, options, prompt) | {"seed": str(options.seed)})
    report([path], progress.summary())
    return path


def mural_to_file(options: Namespace) -> Path:
    """`unclip mural`: paints or goes on, writes the canvas, and removes the state beside it, `<out>.parts`.

    Raises ValueError or OSError in one sentence.
    """
    path = _destination(options.out)
    regions = tuple(_region(text) for text in options.region)
    prompts = [plain(options.prompt), *(region.prompt for region in regions)]
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
    write_whole(path, lambda file: write_png(file, canvas, about))
    forget(state)
    report([path], f"{len(frames)} frames of {frames[0].side} px; {progress.summary()}{_peak()}")
    return path


def _begin(options: Namespace, prompts: list[str]) -> tuple[Cascade, Options]:
    """The cascade and the checked options of a call; warns of words that the cascade never saw."""
    cascade, chosen = open_cascade(options)
    painter(cascade, chosen, options.method)
    announce(cascade, prompts)
    return cascade, chosen


def _read(path: Path) -> UserPicture:
    picture = open_picture(path)
    warn(picture.warnings)
    return picture


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
    return Region(*_numbers(place), plain(prompt.strip()))


def _stages(cascade: Cascade, options: Options) -> int:
    """How many stages one picture goes through."""
    return 3 + enlargements(cascade, check(cascade, options))


def _about(cascade: Cascade, chosen: Options, options: Namespace, prompt: str) -> dict[str, str]:
    cascade, chosen = painter(cascade, chosen, options.method)
    found = settings(cascade, chosen, check(cascade, chosen))
    method = options.method or ("resample" if cascade.inpaint is None else "finetuned")
    return {
        "prompt": prompt[:MOST_CHARACTERS],
        "weights": cascade.digest,
        "settings": json.dumps({"command": options.command, "method": method} | found),
    }


def _peak() -> str:
    """The most memory that this process has held, where the system tells."""
    try:
        import resource
    except ImportError:
        return ""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"; peak memory {peak / 2**20:.0f} MiB"
