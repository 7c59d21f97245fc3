"""The commands `unclip data curate filter|duplicates|reweight|score|merge`."""

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Adds the commands to `unclip data`'s."""
    parser = commands.add_parser(
        "curate",
        help="filter, de-duplicate and re-weight a source by its embeddings; writes manifests, copies nothing",
    )
    steps = parser.add_subparsers(dest="step", required=True, metavar="STEP")
    _add_filter(_step(steps, "filter", "remove what a probe of a few labels finds"))
    _add_duplicates(_step(steps, "duplicates", "keep one of every group of near-duplicates"))
    _add_reweight(_step(steps, "reweight", "weights that undo what the steps of --after did to frequencies"))
    _add_score(_step(steps, "score", "cut by CLIP score or by an aesthetic head"))
    merge = steps.add_parser("merge", help="join a step's parts; with --out, several steps as a skip list and weights")
    merge.add_argument("embeddings", type=Path, help="folder that unclip data embed wrote")
    merge.add_argument("steps", type=Path, nargs="+", help="folders of steps, in any order")
    merge.add_argument("--out", type=Path, help="folder of skip.txt and weights.safetensors, for --data.skip, .weights")
    merge.set_defaults(run=_run)


def _step(steps: Any, name: str, what: str) -> argparse.ArgumentParser:
    parser = steps.add_parser(name, help=what)
    parser.add_argument("embeddings", type=Path, help="folder that unclip data embed wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder of this step's manifest")
    parser.add_argument("--after", type=Path, action="append", default=[], help="a finished step; may be repeated")
    parser.add_argument("--part", default="0/1", metavar="I/N", help="of N processes the I-th, from 0; then merge")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=_run)
    return parser


def _add_filter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--labels", type=Path, required=True, help="CSV of key, label: 1 to remove, 0 to keep")
    parser.add_argument("--recall", type=float, default=0.95, help="share of what is unwanted that has to go (0.95)")
    _add_features(parser)
    parser.add_argument("--hidden", type=int, default=0, help="width of the probe's hidden layer (default 0: linear)")
    parser.add_argument("--propose", type=int, default=0, metavar="N", help="write N records to label next")
    parser.add_argument("--source", help="where their pictures are, for a contact sheet")


def _add_duplicates(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threshold", type=float, default=0.95, help="least cosine of two alike pictures (0.95)")
    parser.add_argument("--clusterings", type=int, default=5, help="each with a seed of its own (default 5)")
    parser.add_argument("--clusters", type=int, default=0, help="of each clustering (default: by the number of rows)")
    parser.add_argument("--no-mirror", action="store_true", help="even where mirrored pictures were embedded")
    parser.add_argument("--pixels", type=float, help="most that small pictures may differ, of 255 (default: not seen)")


def _add_reweight(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", type=Path, action="append", default=[], help="a step whose effect is to stay")
    _add_features(parser)
    parser.add_argument("--hidden", type=int, default=32, help="width of the probe's hidden layer (32; 0: linear)")
    parser.add_argument("--most", type=float, default=10.0, help="largest weight before they are normalised (10)")


def _add_features(parser: argparse.ArgumentParser) -> None:
    which = "embeddings that the probe reads: of pictures, of captions, or both (default)"
    parser.add_argument("--features", choices=("image", "text", "both"), default="both", help=which)


def _add_score(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--head", type=Path, help="a probe or linear head as safetensors (default: CLIP's own score)")
    parser.add_argument("--least", type=float, help="score below which a record goes")
    parser.add_argument("--keep", type=float, help="or the share of records that stays")


def _run(options: argparse.Namespace) -> None:
    from unclip_jax.curate.steps import run  # a command line is parsed before anything heavy is imported

    run(options)
