"""The commands that edit without a mask: pictures and a strip of them as PNG files that say how they were made."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from unclip_jax.cascade import Cascade
from unclip_jax.edit import MOST, STEPS, Basis, embedding_basis, interpolate, probe, text_diff, variations
from unclip_jax.generate import check, check_seeds
from unclip_jax.inputs import Options
from unclip_jax.output import Progress, check_writable, destinations, report, save_png, warn
from unclip_jax.pictures import Fit, open_picture, padded, square
from unclip_jax.sample import MOST_CHARACTERS, announce, enlargements, open_cascade, plain

STRIP_WIDTH = 8192  # px, the most that a strip measures
Pictures = UInt8[np.ndarray, "n s s 3"]


def edit_to_files(options: Namespace) -> list[Path]:
    """Runs one edit, saves its pictures and their strip, prints their paths, and returns them.

    Raises ValueError or OSError in one sentence, before anything is computed unless it is the saving that fails.
    """
    count = _count(options)
    if not 1 <= count <= MOST:
        raise ValueError(f"an edit makes between 1 and {MOST} pictures, not {count}")
    check_seeds(options.seed, options.seed + count - 1)
    sources = _sources(options)
    pictures = [_opened(path, options.fit) for path in sources]
    name = options.command if not sources else f"{sources[0].stem} {options.command}"
    cascade, chosen = open_cascade(options)
    size = check(cascade, chosen)
    announce(cascade, [prompt for prompt in _prompts(options) if prompt])
    basis = embedding_basis(cascade) if options.command == "probe" else None
    if basis is not None and options.components is None:
        options.components = _doubling(basis.components.shape[1])
        count = len(options.components)
    paths, grid_path = destinations(options.out, name, 0, count)
    strip_path = grid_path.with_name(grid_path.name.replace("grid", "strip"))
    check_writable([*paths, strip_path])
    with Progress(2 + enlargements(cascade, size) * count) as progress:
        drawn = _edited(cascade, options, pictures, basis, chosen, progress)
    about = _about(cascade, options, size, sources)
    for number, (path, picture) in enumerate(zip(paths, drawn, strict=True)):
        save_png(path, picture, about | {"picture": f"{number + 1} of {count}"})
    beside = pictures[:1] if options.command in ("variations", "probe") else []
    save_png(strip_path, strip([*beside, *drawn], size), about)
    report([*paths, strip_path], progress.summary())
    return [*paths, strip_path]


def strip(pictures: list[UInt8[np.ndarray, "_ _ 3"]], size: int) -> UInt8[np.ndarray, "h w 3"]:
    """Pictures side by side, each `size` px wide or less where they are many."""
    side = min(size, STRIP_WIDTH // len(pictures))
    return np.concatenate([square(picture, side) for picture in pictures], axis=1)


def _edited(
    cascade: Cascade,
    options: Namespace,
    pictures: list[np.ndarray],
    basis: Basis | None,
    chosen: Options,
    progress: Progress,
) -> Pictures:
    match options.command:
        case "variations":
            n, eta, prompt = options.n, options.eta, plain(options.prompt)
            return variations(cascade, pictures[0], n, eta, prompt, options.seed, chosen, progress)
        case "interpolate":
            ends: Any = pictures or _prompts(options)
            return interpolate(cascade, ends, options.frames, options.seed, chosen, progress)
        case "diff":
            old, new = _prompts(options)
            return text_diff(
                cascade, pictures[0], old, new, options.theta, options.frames, options.seed, chosen, progress
            )
        case _:
            return probe(cascade, pictures[0], options.components, basis, options.seed, chosen, progress)


def _count(options: Namespace) -> int:
    match options.command:
        case "variations":
            return options.n
        case "probe":
            return 1 if options.components is None else len(options.components)
        case _:
            return options.frames


def _sources(options: Namespace) -> list[Path]:
    if options.command != "interpolate":
        return [options.picture]
    return [] if options.prompts else [Path(end) for end in options.ends]


def _prompts(options: Namespace) -> list[str]:
    match options.command:
        case "variations":
            return [plain(options.prompt)]
        case "interpolate":
            return [plain(end) for end in options.ends] if options.prompts else []
        case "diff":
            return [plain(options.old), plain(options.new)]
        case _:
            return []


def _opened(path: Path, fit: Fit) -> UInt8[np.ndarray, "_ _ 3"]:
    found = open_picture(path)
    warn(found.warnings)
    return padded(found.rgb) if fit == "pad" else found.rgb  # every stage cuts it at a size of its own


def _doubling(most: int) -> list[int]:
    """1, 2, 4, 8 and so on below `most`, and `most`."""
    return [*(2**power for power in range(most.bit_length()) if 2**power < most), most]


def _about(cascade: Cascade, options: Namespace, size: int, sources: list[Path]) -> dict[str, str]:
    """What the files say of themselves."""
    names = ("fit", "n", "eta", "frames", "theta", "components", "prior")
    settings = {name: vars(options)[name] for name in names if name in options}
    free = options.command == "variations" and options.eta == 1 and cascade.ancestral
    advice = cascade.decoder.config.sample
    settings |= {"size": size, "steps": options.steps or (advice.steps if free else STEPS)}
    settings |= {"guidance": advice.guidance if free and options.guidance is None else options.guidance}
    said = {"edit": options.command, "seed": str(options.seed), "weights": cascade.digest}
    said |= {"prompt": " | ".join(_prompts(options))[:MOST_CHARACTERS]}
    said |= {"source": " | ".join(plain(path.name) for path in sources)}
    return said | {"settings": json.dumps({name: value for name, value in settings.items() if value is not None})}
