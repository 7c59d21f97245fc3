"""The options of `unclip eval`; what it does is in `evaluate.evaluation`."""

import argparse
from pathlib import Path

from unclip_jax import sample_command

METRICS = (
    "faithfulness", "clip", "retrieval", "prior", "fd", "cmmd", "precision", "fid", "diversity", "reconstruction",
    "memorisation",
)  # fmt: skip


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command that measures a cascade on a captioned source."""
    parser = commands.add_parser(
        "eval",
        help="how good is a cascade, at which settings? an HTML report",
        description="Measure a cascade on any captioned source, at one setting or along a sweep. Leaves report.html, "
        "report.json, rows.jsonl and plots in a folder; the same command goes on where it was interrupted.",
    )
    parser.add_argument("weights", nargs="*", help="folder of a cascade, or owner/name on the hub (default: ships)")
    parser.add_argument("--source", default="held-out", help="held-out scenes (default), or as in unclip data check")
    parser.add_argument("--metrics", nargs="+", choices=METRICS, metavar="NAME", help=f"of {', '.join(METRICS)}")
    parser.add_argument("--n", type=int, default=256, help="captions (default 256)")
    parser.add_argument("--objects", type=int, choices=(1, 2), default=2, help="in each held-out scene (default 2)")
    parser.add_argument("--batch", type=int, default=16, help="pictures drawn at a time (default 16)")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture")
    parser.add_argument("--size", type=int, help="side in px (default: the decoder's)")
    parser.add_argument("--out", type=Path, default=Path("unclip_eval"), help="folder (default unclip_eval)")
    parser.add_argument(
        "--sweep",
        action="append",
        nargs="+",
        metavar="NAME=VALUES",
        help="axes such as guidance=1,2,4 steps=10,25: all combinations; given again, further ones",
    )
    parser.add_argument("--budget", type=float, help="seconds after which no further setting is begun")
    parser.add_argument("--inception", type=Path, help="InceptionV3's weights for FID: pt_inception-2015-12-05-*.pth")
    parser.add_argument("--statistics", type=Path, help="FID: the real pictures' mu and sigma as .npz")
    parser.add_argument("--training", help="memorisation: source of what the cascade was trained on")
    parser.add_argument("--training-count", type=int, default=4096, help="memorisation: of its pictures (default 4096)")
    sample_command.sampling(parser)
    sample_command.ranking(parser)
    sample_command.dtype(parser)
    parser.add_argument("--offload", choices=("auto", "always", "never"), default="auto", help="as of unclip sample")
    parser.add_argument("--strategy", help="how devices share the work: dp, fsdp, tp, fsdp=4,tensor=2 ...")
    usual = {action.dest: action.default for action in parser._actions}
    parser.set_defaults(run=_eval, usual=usual)


def _eval(options: argparse.Namespace) -> None:
    from unclip_jax.evaluate.evaluation import eval_to_folder

    eval_to_folder(options)
