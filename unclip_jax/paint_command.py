"""The options of `unclip inpaint`, `unclip outpaint` and `unclip mural`; what they do is in `paint_files`."""

import argparse
from pathlib import Path

from unclip_jax import sample_command


def add_parsers(commands: argparse._SubParsersAction) -> None:
    """Adds the three commands that paint around what is known."""
    inpaint = commands.add_parser(
        "inpaint",
        help="paint something new into a picture",
        description="Paint something new where a mask is white (or transparent); all else comes back bit by bit.",
    )
    inpaint.add_argument("picture", type=Path, help="a square picture; its own transparent part may be the mask")
    inpaint.add_argument("prompt", help="what the whole picture shows when it is done")
    place = inpaint.add_mutually_exclusive_group()
    place.add_argument("--mask", type=Path, help="a picture of the same size, white or transparent where to paint")
    place.add_argument("--box", help="x,y,width,height in px of the picture, instead of a mask")
    inpaint.add_argument("--n", type=int, default=1, help="number of pictures (default 1)")
    _sampling(inpaint)
    inpaint.set_defaults(run=_inpaint)

    outpaint = commands.add_parser(
        "outpaint",
        help="extend a picture beyond its borders",
        description="Extend a picture by px to any side, frame by frame; the picture itself comes back bit by bit.",
    )
    outpaint.add_argument("picture", type=Path, help="the picture to extend, of any shape")
    outpaint.add_argument("prompt", help="what every new frame shows, what is known of it included")
    for side in ("left", "right", "top", "bottom"):
        outpaint.add_argument(f"--{side}", type=int, default=0, help="px to add (default 0)")
    _sampling(outpaint)
    outpaint.set_defaults(run=_outpaint)

    mural = commands.add_parser(
        "mural",
        help="paint a canvas of any size",
        description="Paint a canvas of any size in overlapping frames. Run again after an interruption, it goes on.",
    )
    mural.add_argument("--width", type=int, required=True, help="of the canvas in px")
    mural.add_argument("--height", type=int, required=True, help="of the canvas in px")
    mural.add_argument("--prompt", required=True, help="what a frame shows")
    mural.add_argument(
        "--region", action="append", default=[], metavar="X,Y,W,H=PROMPT", help="a prompt for frames that lie there"
    )
    _sampling(mural)
    mural.set_defaults(run=_mural)


def _sampling(parser: argparse.ArgumentParser) -> None:
    """The options of `unclip sample`, and how a decoder inpaints."""
    parser.add_argument("--method", choices=("resample", "finetuned"), help="default: finetuned if the cascade can")
    parser.add_argument("--resamples", type=int, help="resample: how often every noise level is walked (default 5)")
    parser.add_argument("--size", type=int, help="side in px of what is painted at once (default: the largest)")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture or frame; the next has the next")
    sample_command.sampling(parser)
    sample_command.ranking(parser)
    sample_command.weights(parser)
    sample_command.out(parser, "a .png path")


def _inpaint(options: argparse.Namespace) -> None:
    from unclip_jax.paint_files import inpaint_to_files

    inpaint_to_files(options)


def _outpaint(options: argparse.Namespace) -> None:
    from unclip_jax.paint_files import outpaint_to_file

    outpaint_to_file(options)


def _mural(options: argparse.Namespace) -> None:
    from unclip_jax.paint_files import mural_to_file

    mural_to_file(options)
