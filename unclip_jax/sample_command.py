"""The options of `unclip sample`, and those that other commands share with it; what it does is in `sample`."""

import argparse
from pathlib import Path
from typing import Any

PRESETS = {"fast": 25, "default": 50}  # decoder steps


def add_parsers(commands: argparse._SubParsersAction) -> None:
    """Adds the command that makes pictures of a prompt."""
    sample = commands.add_parser("sample", help="make pictures of a prompt")
    sample.add_argument("prompt", help="what to draw, in words; unclip vocabulary lists those that it knows")
    sample.add_argument("--n", type=int, default=1, help="number of pictures (default 1)")
    sample.add_argument("--size", type=int, help="side in px (default: the cascade's largest)")
    sample.add_argument("--seed", type=int, default=0, help="picture i of seed s is the picture of seed s + i")
    sampling(sample)
    ranking(sample)
    weights(sample)
    out(sample)
    sample.set_defaults(run=_sample)


def sampling(parser: argparse.ArgumentParser) -> None:
    """How prior and decoder sample."""
    parser.add_argument("--sampler", choices=("ddpm", "ddim", "dpm"), help="of the decoder (default: its config's)")
    parser.add_argument("--steps", type=int, help="of the decoder; fewer are faster")
    parser.add_argument("--guidance", type=float, help="of the decoder; more follows the prompt closer")
    prior(parser)
    parser.add_argument("--prior-steps", type=int, help="of the diffusion prior")
    parser.add_argument("--prior-guidance", type=float, help="of the prior")
    parser.add_argument("--prior-temperature", type=float, help="of the autoregressive prior")
    parser.add_argument("--candidates", type=int, help="what the diffusion prior chooses from (default: its config's)")
    parser.add_argument(
        "--clip-guidance", type=float, default=0.0, help="pull of CLIP's gradient on the decoder (default 0, off)"
    )


def prior(parser: argparse.ArgumentParser, what: str = "what makes image embeddings") -> None:
    """Which prior is drawn from."""
    parser.add_argument("--prior", choices=("diffusion", "ar"), default="diffusion", help=what)


def ranking(parser: argparse.ArgumentParser) -> None:
    """How many pictures are drawn for one that is kept."""
    parser.add_argument("--rank-from", type=int, default=1, help="keep CLIP's favourite of so many (default 1)")


def weights(parser: argparse.ArgumentParser, chosen: bool = True) -> None:
    """Which cascade is used and, where that is `chosen` too, how it computes and what is appended to it."""
    what = "folder of a cascade, or owner/name of one on the hub; parts of one may be given in turn (default: ships)"
    parser.add_argument("--weights", action=_Joined, help=what)
    if not chosen:
        return
    dtype(parser)
    parser.add_argument(
        "--offload",
        choices=("auto", "always", "never"),
        default="auto",
        help="load stages in turn: always, never, or where all would take most of the device's memory (default auto)",
    )
    parser.add_argument("--strategy", help="how devices share the work: dp, fsdp, tp, spatial, fsdp=4,tensor=2 ...")
    parser.add_argument("--upsampler", type=Path, metavar="FILE", help="append an upsampler_<size>.safetensors of ours")
    parser.add_argument("--preset", choices=PRESETS, help="Karlo's: 25 decoder steps, or 50")


def dtype(parser: argparse.ArgumentParser) -> None:
    """What a cascade computes in."""
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of parameters and compute (auto: what the device is fast in for published weights, float32 for ours)",
    )


class _Joined(argparse.Action):
    """What an option says each time, with commas between."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None):
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if before is None else f"{before},{values}")


def out(parser: argparse.ArgumentParser, kinds: str = "a .png path, or a folder") -> None:
    """Where pictures go."""
    parser.add_argument("--out", type=Path, default=Path("unclip.png"), help=f"{kinds} (default unclip.png)")


def _sample(options: argparse.Namespace) -> None:
    from unclip_jax.sample import sample_to_files

    sample_to_files(options)
