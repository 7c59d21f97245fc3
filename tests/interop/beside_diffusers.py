"""Karlo's pipeline here and in diffusers side by side: seconds of every stage, cold and warm, as a table of ratios.

python tests/interop/beside_diffusers.py [--sizes 14M 147M] [--batch 1] [--threads 2] [--repeats 3] [--out FILE.json]

Random weights are written once to a temporary folder, which both sides load. Steps and guidance are diffusers' defaults
(25, 25 and 7 steps, guidance 4 and 8). Cold is the first call of each, compiling included; warm is the median of the
calls that follow, in alternating order. Everything runs on so many processors as there are threads. Run it with nothing
else running. No part of the tests: pytest does not collect it.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

STAGES = ("text encoder", "prior", "decoder", "super-resolution")
Seconds = dict[str, float]
SIZES = {  # CLIP's width and layers, the prior's, and channels and depth of the decoder and of the upsamplers
    "tiny": ((32, 1), (64, 1), (32, 1), (32, 1)),
    "14M": ((32, 2), (64, 2), (32, 1), (32, 1)),
    "147M": ((256, 6), (512, 8), (96, 2), (64, 2)),
}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["14M", "147M"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=25, help="of prior and decoder")
    parser.add_argument("--out", type=Path, help="all seconds as JSON")
    return parser.parse_args()


def written(size: str, folder: Path) -> int:
    """Writes a folder in diffusers' layout and gives the number of its parameters."""
    import jax
    from full_size_karlo import configs, random_cascade

    from unclip_jax.config import TransformerConfig
    from unclip_jax.interop.exporting import export_cascade

    (text, layers), (prior, prior_layers), decoder, upsampler = SIZES[size]
    runs = configs(tiny=False)
    networks: dict[str, Any] = {name: run.network for name, run in runs.items()}
    tower = TransformerConfig(text, layers, text // 32, activation="quick_gelu", causal=True)
    networks["clip"] = replace(networks["clip"], text=tower, embedding_dim=text)
    blocks = TransformerConfig(prior, prior_layers, prior // 64, causal=True)
    networks["prior"] = replace(networks["prior"], embedding_dim=text, text_dim=text, transformer=blocks)
    for name, (channels, depth) in (("decoder", decoder), ("up256", upsampler)):
        unet = replace(networks[name].unet, channels=channels, depth=depth, head_channels=32)
        networks[name] = replace(networks[name], unet=unet)
    unet = replace(networks["decoder"].unet, context_dim=text)
    networks["decoder"] = replace(networks["decoder"], unet=unet, image_embedding_dim=text, text_dim=text)
    cascade = random_cascade({name: replace(run, network=networks[name]) for name, run in runs.items()})
    export_cascade(cascade, folder)
    return sum(leaf.size for network in cascade.networks for leaf in jax.tree.leaves(network.params))


class Clock:
    """Seconds of the stages of one call: `next` is called as each begins."""

    def __init__(self) -> None:
        self.marks: dict[str, float] = {}

    def next(self, stage: str) -> None:
        self.marks.setdefault(stage, time.perf_counter())

    def seconds(self) -> Seconds:
        ends = [*self.marks.values(), time.perf_counter()]
        assert tuple(self.marks) == STAGES, self.marks
        parts = {stage: ends[i + 1] - ends[i] for i, stage in enumerate(STAGES)}
        return parts | {"whole": ends[-1] - ends[0]}


def theirs(folder: Path, prompts: list[str], steps: int, threads: int) -> Callable[[], Seconds]:
    """diffusers' pipeline, loaded."""
    import diffusers.pipelines
    import torch
    from diffusers.pipelines.deprecated import unclip

    torch.set_num_threads(threads)
    diffusers.pipelines.unclip = unclip  # without which no published folder loads (diffusers 0.42)
    pipeline = unclip.UnCLIPPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    clock = Clock()

    def marking(begins: str, function: Any) -> Any:
        def marked(*given: Any, **named: Any) -> Any:
            clock.next(begins)
            return function(*given, **named)

        return marked

    schedulers = pipeline.prior_scheduler, pipeline.super_res_scheduler
    for stage, scheduler in zip(("prior", "super-resolution"), schedulers, strict=True):
        scheduler.set_timesteps = marking(stage, scheduler.set_timesteps)
    pipeline.text_proj.forward = marking("decoder", pipeline.text_proj.forward)

    def call() -> Seconds:
        clock.marks.clear()
        clock.next("text encoder")
        given = {"prior_num_inference_steps": steps, "decoder_num_inference_steps": steps, "output_type": "np"}
        pipeline(prompts, generator=torch.Generator().manual_seed(0), **given)
        return clock.seconds()

    return call


def ours(folder: Path, prompts: list[str], steps: int) -> Callable[[], Seconds]:
    """Our cascade, loaded."""
    from unclip_jax.cascade import load_cascade
    from unclip_jax.generate import generate
    from unclip_jax.inputs import Options

    cascade, options = load_cascade(folder, "float32", offload="never"), Options(steps=steps, prior_steps=steps)
    names = {"text": STAGES[0], "prior": STAGES[1], "decoder": STAGES[2], "upsampler": STAGES[3]}

    def call() -> Seconds:
        clock = Clock()
        generate(cascade, prompts, 0, options, lambda stage: clock.next(names[stage.split()[0]]))
        return clock.seconds()

    return call


def measured(size: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of both sides at one size: cold, and the median of the warm calls."""
    prompts = ["a red house by the sea at night"] * options.batch
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / size
        numbers = written(size, folder)
        sides = {
            "diffusers": theirs(folder, prompts, options.steps, options.threads),
            "ours": ours(folder, prompts, options.steps),
        }
        cold = {name: call() for name, call in sides.items()}
        calls: dict[str, list[Seconds]] = {name: [] for name in sides}
        for repeat in range(options.repeats):
            for name in sorted(sides, reverse=repeat % 2 == 1):
                calls[name].append(sides[name]())
    warm = {
        name: {stage: statistics.median(one[stage] for one in found) for stage in found[0]}
        for name, found in calls.items()
    }
    return {"size": size, "parameters": numbers, "cold": cold, "warm": warm, "calls": calls}


def table(results: list[dict[str, Any]]) -> str:
    """Seconds and how many times faster we are, as Markdown."""
    lines = [
        "| Parameters | Stage | diffusers cold, s | ours cold, s | ratio | diffusers warm, s | ours warm, s | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        for stage in (*STAGES, "whole"):
            cells = [f"{result['parameters'] / 1e6:.0f} M", stage]
            for how in ("cold", "warm"):
                other, own = (result[how][side][stage] for side in ("diffusers", "ours"))
                cells += [f"{other:.3f}", f"{own:.3f}", f"{other / own:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    options = parsed()
    if hasattr(os, "sched_setaffinity"):  # XLA takes every processor that it may
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)  # cold is cold
    here = Path(__file__).parent
    sys.path[:0] = [str(here.parents[1]), str(here)]  # the checkout that the script is part of
    results = []
    for size in options.sizes:
        results.append(measured(size, options))
        print(f"{size} done", file=sys.stderr)
    packages = ("diffusers", "torch", "transformers", "jax", "jaxlib", "flax")
    versions = {"python": sys.version.split()[0]} | {name: version(name) for name in packages}
    command = " ".join(["python", "tests/interop/beside_diffusers.py", *sys.argv[1:]])
    print(table(results))
    print(f"\nRatio: diffusers' seconds over ours, above 1 we are ahead. `{command}`, on {options.threads} processors, "
          f"batch {options.batch}; {', '.join(f'{name} {number}' for name, number in versions.items())}.")  # fmt: skip
    if options.out:
        facts = {"command": command, "versions": versions, "results": results}
        options.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
