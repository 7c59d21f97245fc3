"""The command `unclip data`: what is done to a source before anything is trained on it."""

import argparse
from pathlib import Path
from typing import Any

from unclip_jax import check_command
from unclip_jax.curate import command as curate_command


def add_parser(commands: Any) -> None:
    """Adds the command, and those below it, to `unclip`'s."""
    data = commands.add_parser("data", help="check, embed and curate a source of pictures").add_subparsers(
        dest="data_command", required=True, metavar="WHAT"
    )
    check_command.add_parser(data)
    _add_embed(data)
    curate_command.add_parser(data)


def _add_embed(commands: Any) -> None:
    parser = commands.add_parser("embed", help="CLIP embeddings of a whole source, once and for all")
    parser.add_argument("source", help="such as folder:PATH, tar:'PATH/*.tar', table:PATH.csv")
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards; goes on with what is there")
    parser.add_argument("--clip", type=Path, help="weights file of the CLIP, or a cascade's folder (default: ships)")
    parser.add_argument("--mirror", action="store_true", help="embed the mirrored pictures too: finds mirrored copies")
    parser.add_argument("--thumbnails", type=int, default=0, metavar="PX", help="keep small pictures: 32 suffices")
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="as stored (float16)")
    parser.add_argument("--shard-rows", type=int, default=8192, help="records of a file (default 8192)")
    parser.add_argument("--batch", type=int, default=256, help="pictures that CLIP sees at once (default 256)")
    parser.add_argument("--threads", type=int, default=8, help="that read and decode (default 8)")
    parser.add_argument("--part", metavar="I/N", help="of N processes the I-th, from 0 (default: as jax counts them)")
    parser.add_argument("--most-broken", type=float, default=0.1, help="share of broken records that stops it (0.1)")
    parser.set_defaults(run=_embed)


def _embed(options: argparse.Namespace) -> None:
    from unclip_jax.embed_command import run

    run(options)
