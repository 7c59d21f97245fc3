"""The `unclip` command: parses, builds the mesh, calls one function."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from unclip_jax import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, or 1 after one sentence on standard error."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.run is not _train:
        parser.error(f"unknown option {rest[0]}; see unclip {options.command} --help")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        options.rest = rest
        return options.run(options) or 0
    except KeyboardInterrupt:
        print("\nunclip: stopped", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError, ModuleNotFoundError) as error:
        if options.debug:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"unclip: {message}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("unclip", description="unCLIP (DALL-E 2) in JAX: train it, sample it, measure it.")
    parser.add_argument("--version", action="version", version=f"unclip_jax {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    sample = commands.add_parser("sample", help="make pictures of a prompt")
    sample.add_argument("prompt", help="what to draw, in words")
    sample.add_argument("--n", type=int, default=1, help="number of pictures (default 1)")
    sample.add_argument("--size", type=int, help="side in px; default: the cascade's largest")
    sample.add_argument("--seed", type=int, default=0, help="picture i of seed s is the picture of seed s + i")
    sample.add_argument("--sampler", choices=("ddpm", "ddim", "dpm"), help="of the decoder")
    sample.add_argument("--steps", type=int, help="of the decoder")
    sample.add_argument("--guidance", type=float, help="of the decoder")
    sample.add_argument("--prior-steps", type=int)
    sample.add_argument("--prior-guidance", type=float)
    sample.add_argument("--candidates", type=int, default=2, help="image embeddings that the prior chooses from")
    sample.add_argument("--weights", type=Path, help="folder of a cascade; default: the one that ships")
    sample.add_argument("--out", type=Path, default=Path("unclip.png"), help="a .png path, or a folder")
    sample.set_defaults(run=_sample)

    vocabulary = commands.add_parser("vocabulary", help="list the words that a cascade was trained on")
    vocabulary.add_argument("--weights", type=Path)
    vocabulary.set_defaults(run=_vocabulary)

    train = commands.add_parser(
        "train",
        help="train one network",
        description="Train one network. Every field of its config is an option: --optim.learning-rate 1e-4",
    )
    train.add_argument("--config", required=True, help="a name such as emoji_decoder, or the path of a config file")
    train.add_argument("--out", type=Path, default=Path("runs/cascade"), help="folder of the cascade")
    train.add_argument("--init-from", type=Path, help="start from the parameters of a weights file")
    train.add_argument("--no-resume", action="store_true", help="refuse to go on from a checkpoint in --out")
    train.add_argument("--cpu-devices", type=int, help="split the processor into so many devices")
    train.set_defaults(run=_train)
    return parser


def _sample(options: argparse.Namespace) -> None:
    from unclip_jax.sample import sample_to_files

    sample_to_files(options)


def _vocabulary(options: argparse.Namespace) -> None:
    from unclip_jax.cascade import SHIPPED, load_cascade

    cascade = load_cascade(options.weights or SHIPPED)
    print("things:", ", ".join(cascade.clip.extra.get("concepts", ())))
    print("words: ", " ".join(cascade.words))


def _train(options: argparse.Namespace) -> None:
    from unclip_jax.overrides import apply, load_config

    config = apply(load_config(options.config), options.rest)
    import jax

    if options.cpu_devices:
        jax.config.update("jax_num_cpu_devices", options.cpu_devices)
    from unclip_jax.run import train
    from unclip_jax.sharding import make_mesh

    train(config, options.out, make_mesh(), init_from=options.init_from, resume=not options.no_resume)


if __name__ == "__main__":
    sys.exit(main())
