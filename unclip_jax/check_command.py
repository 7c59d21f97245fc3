"""`unclip data check`: what training will see of a source, as text and picture, and a list of what to leave out."""

import argparse
from pathlib import Path
from typing import Any

BROKEN = 3  # exit code


def add_parser(commands: Any) -> None:
    """Adds the command to those of `unclip data`."""
    parser = commands.add_parser(
        "check",
        help="say what training will see of a source",
        description=f"Read a source as training will. Exit code 0: every record read is fine; {BROKEN}: some are not.",
    )
    parser.add_argument("source", help="such as folder:PATH, tar:'PATH/*.tar', table:PATH.csv, tfds:NAME:SPLIT")
    parser.add_argument("--sample", type=int, metavar="N", help="read so many records, spread over the source")
    parser.add_argument("--size", type=int, default=64, help="side in px that training will have (default 64)")
    parser.add_argument("--context-length", type=int, default=77, help="tokens of a caption (default 77)")
    parser.add_argument("--uncaptioned", choices=("skip", "empty"), default="skip", help="as of --data.uncaptioned")
    parser.add_argument("--skip", metavar="LIST", help="leave out what a list names, as --data.skip does")
    parser.add_argument("--fix", type=Path, metavar="LIST", help="write what is broken or double to a list for --skip")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="write pictures and captions as training has them")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prints a survey and returns the exit code."""
    from unclip_jax.data import check
    from unclip_jax.data.mixtures import without
    from unclip_jax.data.records import open_source
    from unclip_jax.data.tokenizer import ClipTokenizer

    if min(options.size, options.context_length - 2, 1 if options.sample is None else options.sample) < 1:
        raise ValueError("--size and --sample are positive numbers, and --context-length is at least 3")
    source, tokenizer = open_source(options.source), ClipTokenizer(options.context_length)
    if options.skip is not None:
        source, _ = without(source, options.skip)
    found = check.survey(source, tokenizer, options.size, options.sample, options.uncaptioned == "empty")
    print("\n".join(check.report(found)))
    if options.fix is not None:
        count = check.write_list(found, options.fix)
        print(f"{options.fix}   {count:,} records; train with --data.skip {options.fix}")
    if options.sheet is not None:
        check.sheet(source, tokenizer, found, options.sheet)
        print(f"{options.sheet}   {len(found.shown)} pictures")
    return BROKEN if found.broken else 0
