"""The options of `unclip variations`, `interpolate`, `diff` and `probe`; what they do is in `edit_files`."""

import argparse
from pathlib import Path

from unclip_jax import sample_command


def add_parsers(commands: argparse._SubParsersAction) -> None:
    """Adds the four commands that edit without a mask."""
    variations = commands.add_parser(
        "variations",
        help="draw further pictures that mean what a picture means",
        description="Draw further pictures that mean what a picture means.",
    )
    _picture(variations)
    variations.add_argument("--prompt", default="", help="the picture's caption, if it should count too")
    variations.add_argument("--n", type=int, default=4, help="number of pictures (default 4)")
    variations.add_argument("--eta", type=float, default=1.0, help="0 draws the picture itself, 1 is freest (default)")
    _drawing(variations)

    interpolate = commands.add_parser(
        "interpolate",
        help="draw the way from one picture, or prompt, to another",
        description="Draw the way through two or more pictures, or prompts: frames, and all of them as a strip.",
    )
    interpolate.add_argument("ends", nargs="+", help="picture files, or with --prompts captions; two or more")
    interpolate.add_argument("--prompts", action="store_true", help="the ends are captions")
    sample_command.prior(interpolate, "for --prompts")
    _frames(interpolate)
    _drawing(interpolate)

    diff = commands.add_parser(
        "diff",
        help="change a picture by two captions",
        description="Change a picture as one caption becomes another: frames, from the picture itself to --theta.",
    )
    _picture(diff)
    diff.add_argument("old", help="what the picture shows, or an empty caption")
    diff.add_argument("new", help="what it should show")
    diff.add_argument("--theta", type=float, default=0.5, help="how far to go, 0 to 1 (default 0.5)")
    _frames(diff)
    _drawing(diff)

    probe = commands.add_parser(
        "probe",
        help="draw what the first components of an embedding hold",
        description="Draw a picture's CLIP embedding from its first principal components, ever more of them.",
    )
    _picture(probe)
    probe.add_argument("--components", type=int, nargs="+", help="how many (default: 1 2 4 8 ... and all)")
    _drawing(probe)


def _picture(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("picture", type=Path, help="any PNG, JPEG, WebP, GIF, BMP or TIFF file")


def _frames(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--frames", type=int, default=8, help="number of pictures, both ends included (default 8)")


def _drawing(parser: argparse.ArgumentParser) -> None:
    """The options of `unclip sample` that edits share."""
    parser.add_argument("--fit", choices=("crop", "pad"), default="crop", help="how pictures become square (crop)")
    parser.add_argument("--size", type=int, help="side in px (default: the cascade's largest)")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture; variation i has seed s + i")
    parser.add_argument("--steps", type=int, help="of the decoder, up and down again (default 50)")
    parser.add_argument("--guidance", type=float, help="of the decoder (default 1 for what starts from a picture)")
    sample_command.weights(parser)
    sample_command.out(parser)
    parser.set_defaults(run=_edit)


def _edit(options: argparse.Namespace) -> None:
    from unclip_jax.edit_files import edit_to_files

    edit_to_files(options)
