"""The command `unclip sample`: pictures of a prompt as PNG files that say how they were made."""

import argparse
import difflib
import json
import math
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from unclip_jax import compile_cache
from unclip_jax.cascade import SHIPPED, Cascade, load_cascade
from unclip_jax.generate import check, check_seeds, generate_ranked
from unclip_jax.inputs import BUCKETS, Options, options_of
from unclip_jax.output import Progress, check_writable, destinations, draw_and_save, warn
from unclip_jax.sample_command import PRESETS
from unclip_jax.sharding import place

MOST_PICTURES = 10_000
MOST_CHARACTERS = 10_000  # of a prompt; the tokenizer reads no further
NAMED = 8  # unknown words that a warning lists


def sample_to_files(options: argparse.Namespace) -> list[Path]:
    """Draws and saves pictures, prints their paths, and returns them.

    Every picture is saved as soon as its batch is done. Raises ValueError or OSError in one sentence, before anything
    is computed unless it is the saving itself that fails.
    """
    prompt = plain(options.prompt)
    places = picture_places(options, prompt)
    cascade, chosen = open_cascade(options)
    size, count = check(cascade, chosen), options.n
    announce(cascade, [prompt])
    about = {"prompt": prompt[:MOST_CHARACTERS], "weights": cascade.digest}
    about["settings"] = json.dumps(settings(cascade, chosen, size))
    parts = [min(BUCKETS[-1], count - start) for start in range(0, count, BUCKETS[-1])]
    batches = sum(math.ceil(part * chosen.rank_from / BUCKETS[-1]) for part in parts)
    progress = Progress(3 * batches + enlargements(cascade, size) * count)
    return draw_and_save(
        places, options.seed, size, about, progress,
        lambda number, seed: generate_ranked(cascade, [prompt] * number, seed, chosen, progress),
    )  # fmt: skip


def plain(prompt: str) -> str:
    """A prompt whose half characters, from a foreign terminal, are "?"."""
    return prompt.encode("utf-8", "replace").decode()


def picture_places(options: argparse.Namespace, prompt: str) -> tuple[list[Path], Path]:
    """Where the --n pictures of a prompt and their grid go; ValueError where number, seed or place cannot be used."""
    count, seed = options.n, options.seed
    if not 1 <= count <= MOST_PICTURES:
        raise ValueError(f"--n must lie between 1 and {MOST_PICTURES}, not {count}")
    check_seeds(seed, seed + count - 1)
    paths, grid_path = destinations(options.out, prompt, seed, count)
    check_writable([*paths, grid_path] if count > 1 else paths)
    return paths, grid_path


def open_cascade(options: argparse.Namespace) -> tuple[Cascade, Options]:
    """The cascade and the checked options of a call."""
    if options.preset and options.steps is not None:
        raise ValueError("--preset chooses the steps of the decoder: leave out --steps, or the preset")
    offload = options.offload if options.strategy is None else "always"  # a mesh reads its parts from the files
    cascade = load_cascade(options.weights or SHIPPED, options.dtype, options.upsampler, offload)
    if options.strategy is not None:
        cascade = cascade.change(lambda network: network._replace(params=place(network.params)))
    if options.preset:
        if not cascade.decoder.config.network.empty_null_text:  # type: ignore[union-attr]
            raise ValueError("presets are of cascades like Karlo: choose --steps for this one")
        options.steps = PRESETS[options.preset]
    chosen = options_of(vars(options))
    check(cascade, chosen)
    return cascade, chosen


def announce(cascade: Cascade, prompts: Sequence[str]) -> None:
    """Warns of words that the cascade never saw, and of the compilation that a first run needs."""
    warn(line for prompt in prompts for line in warnings_of(cascade, prompt))
    cache = compile_cache.enable()
    if cache is not None and not any(cache.glob("*")):
        print("unclip: compiling for this machine; later runs start at once", file=sys.stderr)


def enlargements(cascade: Cascade, size: int) -> int:
    """How many upsamplers a picture of a size goes through."""
    return sum(size >= side > cascade.sizes[0] for side in cascade.sizes)


def settings(cascade: Cascade, options: Options, size: int) -> dict[str, str | int | float]:
    """What the pictures were made with: the options, and the configs' advice where they are None."""
    prior, decoder = cascade.chosen_prior(options.prior).config.sample, cascade.decoder.config.sample
    advised = Options(size, decoder.sampler, decoder.steps, decoder.guidance, prior.steps, prior.guidance)
    if options.prior == "ar":
        advised = advised._replace(prior_steps=None, prior_temperature=prior.temperature)
    given = {name: value for name, value in options._asdict().items() if value is not None}
    return {name: value for name, value in (advised._asdict() | given).items() if value is not None}


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
