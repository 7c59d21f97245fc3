"""The command `unclip bench`."""

import argparse
from pathlib import Path
from typing import Any, get_args

from unclip_jax.config import Remat

STRATEGIES = ("dp", "fsdp", "tp", "spatial")


def add_parser(commands: Any) -> None:
    """Adds the command to `unclip`'s."""
    bench = commands.add_parser(
        "bench",
        help="measure training steps on the devices here: strategies x batch x remat",
        description="Compile and time the real training step of a config, on noise, for every combination of devices, "
        "strategy, batch and remat, each in a process of its own. Rows are appended to --out as they come; what it "
        "holds is not run again. Every field of the config is an option: --network.unet.dtype bfloat16",
    )
    bench.add_argument("what", choices=("sharding",))
    bench.add_argument("--config", required=True, help="a name such as emoji_decoder, or the path of a config file")
    bench.add_argument("--cpu-devices", type=int, metavar="N", help="split the processor into so many devices")
    bench.add_argument("--devices", type=int, nargs="+", metavar="N", help="how many of them (default: 1, and all)")
    bench.add_argument(
        "--strategy",
        nargs="+",
        dest="strategies",
        metavar="STRATEGY",
        default=STRATEGIES,
        help=f"hsdp and sizes such as fsdp=4,tensor=2 too (default: {' '.join(STRATEGIES)})",
    )
    bench.add_argument(
        "--batch", type=int, nargs="+", dest="batches", metavar="N", help="global (default: the config's)"
    )
    bench.add_argument(
        "--remat",
        nargs="+",
        dest="remats",
        choices=get_args(Remat),
        help="what the backward pass recomputes (default: as the config says)",
    )
    bench.add_argument("--steps", type=int, default=20, help="that are timed (20)")
    bench.add_argument("--warmup", type=int, default=3, help="steps before those (3)")
    bench.add_argument("--limit", type=float, default=1800.0, help="seconds that one combination may take (1800)")
    bench.add_argument("--clip", help="config of the frozen CLIP (default: the family's)")
    bench.add_argument("--no-plan", action="store_true", help="leave out what plan predicts for TPUs")
    bench.add_argument(
        "--out", type=Path, help="rows as JSON lines, and a plot beside them as PNG (default: runs/bench/CONFIG.jsonl)"
    )
    bench.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measures and prints; ValueError in one sentence where the options make no sense."""
    from unclip_jax.bench import cases, report, runner
    from unclip_jax.bench.predicted import predictor
    from unclip_jax.overrides import apply, load_config
    from unclip_jax.plan.steps import frozen_clip

    config = apply(load_config(options.config), options.rest)
    for name in ("steps", "warmup", "limit"):
        if vars(options)[name] <= 0:
            raise ValueError(f"--{name} must be positive")
    clip = frozen_clip(config, options.clip)
    here = runner.find(options.cpu_devices)
    chosen = cases.all_cases(
        config,
        here,
        options.devices or (1, here.devices),
        options.strategies,
        options.batches or (config.data.batch_size,),
        options.remats or (cases.remat_of(config),),
    )
    out = options.out or Path("runs/bench") / f"{config.name}.jsonl"
    predict = None if options.no_plan else predictor(config, clip, here)
    rows = runner.bench(
        config, clip, chosen, here, out, steps=options.steps, warmup=options.warmup, limit=options.limit,
        cpu_devices=options.cpu_devices, predict=predict,
    )  # fmt: skip
    print(report.table(rows, here.platform))
    drawn = report.plot(rows, out.with_suffix(".png"))
    print(f"rows are in {out}" + (f", the plot in {out.with_suffix('.png')}" if drawn else ""))
