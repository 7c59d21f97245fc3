"""The `unclip` command: parses, builds the mesh, calls one function."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from textwrap import fill

from unclip_jax import __version__, data_command, edit_command, eval_command, paint_command, sample_command
from unclip_jax.bench import command as bench_command
from unclip_jax.interop import commands as interop_command
from unclip_jax.plan import command as plan_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, or 1 after one sentence on standard error."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.run not in (_train, plan_command.run, bench_command.run):
        parser.error(f"unknown option {rest[0]}; see unclip {options.command} --help")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        options.rest = rest
        with _devices(options):
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


def _devices(options: argparse.Namespace) -> AbstractContextManager[None]:
    """What a command that samples with a --strategy runs in; others make their own mesh, or need none."""
    if options.command == "plan" or vars(options).get("strategy") is None:
        return nullcontext()
    from unclip_jax.sharding import make_mesh, on

    return on(make_mesh(options.strategy))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("unclip", description="unCLIP (DALL-E 2) in JAX: train it, sample it, measure it.")
    parser.add_argument("--version", action="version", version=f"unclip_jax {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    sample_command.add_parsers(commands)
    edit_command.add_parsers(commands)
    paint_command.add_parsers(commands)
    interop_command.add_parsers(commands)
    plan_command.add_parser(commands)
    bench_command.add_parser(commands)
    data_command.add_parser(commands)
    eval_command.add_parser(commands)

    doctor = commands.add_parser("doctor", help="say what this machine has, test every stage, and what is wrong")
    sample_command.weights(doctor, chosen=False)
    doctor.add_argument("--no-test", action="store_true", help="leave out the test of every stage, which compiles")
    doctor.add_argument("--json", action="store_true", help="print findings and figures as JSON")
    doctor.set_defaults(run=_doctor)

    vocabulary = commands.add_parser("vocabulary", help="list the words that a cascade was trained on")
    sample_command.weights(vocabulary, chosen=False)
    vocabulary.set_defaults(run=_vocabulary)

    evaluate = commands.add_parser("evaluate", help="measure a cascade on held-out scenes")
    evaluate.add_argument("what", choices=("scenes", "ranking", "edits", "clip", "prior", "upsamplers", "painting"))
    sample_command.weights(evaluate, chosen=False)
    sample_command.dtype(evaluate)
    evaluate.add_argument(
        "--n",
        type=int,
        help="captions (256), edits or masked scenes (64), sets of 64 scenes (clip 8, prior 4), pictures enlarged (32)",
    )
    evaluate.add_argument("--objects", type=int, choices=(1, 2), default=2, help="scenes: in each (default 2)")
    evaluate.add_argument("--large", type=int, default=0, help="scenes, painting: so many at the largest size too")
    evaluate.add_argument("--seed", type=int, default=0, help="of the first picture")
    sample_command.sampling(evaluate)
    evaluate.add_argument("--rank-from", type=int, help="scenes (1), ranking (16): pictures that CLIP chooses from")
    evaluate.add_argument("--resamples", type=int, help="painting: as of unclip inpaint")
    evaluate.add_argument("--method", choices=("resample", "finetuned"), help="painting: this one alone (default both)")
    evaluate.add_argument("--compare", action="store_true", help="prior: small and analytic variance at 8 to 64 steps")
    evaluate.add_argument("--true-embedding", action="store_true", help="scenes: CLIP's embedding, not the prior's")
    evaluate.add_argument("--truth", action="store_true", help="scenes: score true renders, the scorer's own check")
    evaluate.add_argument("--shuffle", action="store_true", help="scenes: also against other captions, which is chance")
    evaluate.add_argument("--out", type=Path, help="figures, command and versions as JSON")
    evaluate.add_argument("--pictures", type=Path, help="a contact sheet as PNG")
    evaluate.set_defaults(run=_evaluate)

    analytic = commands.add_parser("analytic", help="measure a diffusion prior's best variances and store them with it")
    analytic.add_argument("--weights", type=Path, required=True, help="folder of a cascade; its prior is written anew")
    analytic.add_argument("--n", type=int, default=512, help="training pictures (default 512)")
    analytic.add_argument("--timesteps", type=int, default=100, help="noise levels that are measured (default 100)")
    analytic.add_argument("--adopt", action="store_true", help="make the analytic sampler the one that the prior uses")
    analytic.set_defaults(run=_analytic)

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
    train.add_argument("--hosts", type=int, help="processes that train together, each with this command")
    train.add_argument("--host", type=int, help="which of them this is, counted from 0")
    train.add_argument("--coordinator", metavar="ADDRESS[:PORT]", help="of host 0 (port 8482 and the next)")
    train.add_argument(
        "--host-timeout", type=float, default=60.0, help="seconds until a host that is not heard of counts as gone (60)"
    )
    train.set_defaults(run=_train)
    return parser


def _doctor(options: argparse.Namespace) -> int:
    from unclip_jax.doctor import examine

    def say(finding: object) -> None:
        print(finding, flush=True)

    if options.json:
        report = examine(options.weights, test=not options.no_test)
        print(json.dumps(report.to_json(), indent=2))
    else:
        report = examine(options.weights, test=not options.no_test, say=say)
        print(report.summary)
    return int(not report.healthy)


def _vocabulary(options: argparse.Namespace) -> None:
    from unclip_jax.cascade import SHIPPED, load_clip

    clip = load_clip(options.weights or SHIPPED)
    if not clip.extra.get("words"):
        raise ValueError("this cascade does not say which words it was trained on")
    print(fill("things: " + ", ".join(clip.extra.get("concepts", ())), width=100))
    print(fill("words: " + " ".join(clip.extra["words"]), width=100))


def _evaluate(options: argparse.Namespace) -> None:
    from unclip_jax.evaluate.command import evaluate_to_files

    evaluate_to_files(options)


def _analytic(options: argparse.Namespace) -> None:
    from unclip_jax.evaluate.variances import analytic_to_file

    analytic_to_file(options)


def _train(options: argparse.Namespace) -> int | None:
    from unclip_jax.overrides import apply, load_config

    config = apply(load_config(options.config), options.rest)
    if str(options.out).startswith("gs:"):
        raise ValueError("--out is a folder: mount the bucket, as tpu_scripts/setup.sh does, and give its place")
    import jax

    from unclip_jax import compile_cache, hosts
    from unclip_jax.preemption import Preempted
    from unclip_jax.preflight import facts_of

    if options.cpu_devices:
        jax.config.update("jax_num_cpu_devices", options.cpu_devices)
    compile_cache.enable()
    found = hosts.find(options.hosts, options.host, options.coordinator)
    facts = (
        {} if found is None else facts_of(config, {"--out": options.out.absolute(), "--init-from": options.init_from})
    )
    try:
        with hosts.together(found, facts, options.out, options.host_timeout) as watchdog:
            from unclip_jax.run import train
            from unclip_jax.sharding import make_mesh

            resume, mesh = not options.no_resume, make_mesh(config.strategy)
            train(config, options.out, mesh, init_from=options.init_from, resume=resume, watchdog=watchdog)
    except Preempted as stopped:
        print(f"unclip: {stopped}", file=sys.stderr)
        return stopped.code


if __name__ == "__main__":
    sys.exit(main())
