"""The command `unclip plan`."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

REMATS = ("none", "products", "block")


def add_parser(commands: Any) -> None:
    """Adds the command to `unclip`'s."""
    plan = commands.add_parser(
        "plan",
        help="memory, FLOPs, collectives and time of a step on TPUs that are not here",
        description="Compile a training or sampling step with the real TPU compiler, without a TPU, and say what it "
        "needs. Every field of the config is an option: --network.unet.dtype bfloat16",
    )
    plan.add_argument("--config", required=True, help="a name such as dalle2_decoder, or the path of a config file")
    plan.add_argument(
        "--tpu", help="slices such as v5p-128, v5e-64, 2xv4-256, several by commas (default: devices here)"
    )
    plan.add_argument(
        "--strategy", help="dp, fsdp, tp, hsdp, spatial or sizes such as data=4,fsdp=16 (default: config's)"
    )
    plan.add_argument("--batch", type=int, help="global batch (default: the config's; sampling: one per device)")
    plan.add_argument("--what", choices=("train", "sample"), default="train", help="(default train)")
    plan.add_argument("--remat", help=f"what the backward pass recomputes: {', '.join(REMATS)} (default: the config's)")
    plan.add_argument("--clip", help="config of the frozen CLIP (default: the family's)")
    plan.add_argument(
        "--depth", choices=("memory", "full"), default="memory", help="full: to the executable, much longer"
    )
    plan.add_argument("--executable", type=Path, help="with --depth full: keep the program, for the slice to load")
    plan.add_argument("--sweep", action="store_true", help="rank strategies, remat and slices; see --out")
    plan.add_argument("--out", type=Path, help="with --sweep: rows as JSON lines, and a plot beside them as PNG")
    plan.add_argument("--json", action="store_true", help="print JSON, one plan a line")
    plan.add_argument("--cache", type=Path, help="folder of finished plans (default: the user's cache)")
    plan.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Plans and prints; ValueError in one sentence where the options make no sense."""
    from unclip_jax.overrides import apply, load_config
    from unclip_jax.plan import report, sweep
    from unclip_jax.plan.slices import parse_slice

    config = apply(load_config(options.config), options.rest)
    slices = [parse_slice(name) for name in options.tpu.split(",")] if options.tpu else [None]
    if options.executable and not (options.tpu and options.depth == "full"):
        raise ValueError("an executable comes only of a full compilation for a slice: add --tpu and --depth full")
    if options.sweep:
        plans = sweep.sweep(config, slices, options)
        if options.out:
            sweep.save(plans, options.out)
        print("\n".join(json.dumps(report.row(plan)) for plan in plans) if options.json else sweep.table(plans))
        return
    for place in slices:
        request = request_of(options, config, place, options.strategy, options.remat)
        plan = report.make_plan(request, options.cache, options.executable)
        print(json.dumps(report.row(plan)) if options.json else report.text(plan), flush=True)
        if plan.fits is False and not options.json:
            print("  try --sweep: other strategies, remat and slices", file=sys.stderr)


def request_of(options: argparse.Namespace, config: Any, place: Any, strategy: str | None, remat: str | None) -> Any:
    """The request of a command's options for one slice, checked without compiling; ValueError in one sentence."""
    from unclip_jax.config import with_remat
    from unclip_jax.plan.request import Request
    from unclip_jax.plan.steps import frozen_clip
    from unclip_jax.sharding import abstract_mesh, check_batch_size, resolve

    if remat is not None:
        if remat not in REMATS:
            raise ValueError(f"unknown remat '{remat}': there are {', '.join(REMATS)}")
        config = replace(config, remat=remat, network=with_remat(config.network, remat))  # type: ignore[arg-type]
    strategy = str(strategy or (config.strategy if options.what == "train" else "dp"))
    batch = options.batch or (config.data.batch_size if options.what == "train" else place.chips if place else 0)
    if place is not None:
        sizes = resolve(strategy, place.chips, place.count, place.sides)
        check_batch_size(batch, abstract_mesh(sizes), config.optim.accumulate if options.what == "train" else 1)
    return Request(config, frozen_clip(config, options.clip), options.what, place, strategy, batch, options.depth)
