"""Many plans of one config: every strategy, remat and slice that could fit, ranked; the cheapest named; a plot."""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from unclip_jax.config import TrainConfig
from unclip_jax.plan.command import REMATS, request_of
from unclip_jax.plan.report import Plan, make_plan, row
from unclip_jax.plan.slices import GENERATIONS, Slice, all_slices
from unclip_jax.plan.steps import frozen_clip
from unclip_jax.sharding import abstract_mesh, resolve, shard_state
from unclip_jax.stages import build

STATE_BYTES = 16  # per parameter: itself, its average and two moments, float32


def sweep(config: TrainConfig, slices: Sequence[Slice | None], options: argparse.Namespace) -> list[Plan]:
    """Plans of every candidate, best first; those whose state alone is too large are skipped by arithmetic.

    Each is cached as soon as it is known, so that a sweep may be stopped and started again. A candidate that makes no
    sense, such as a mesh that does not divide the batch, is named on standard error and left out.
    """
    plans = []
    params = jax.eval_shape(build(config, frozen_clip(config, options.clip)).init, jax.random.key(0))
    for place, strategy, remat in _candidates(config, slices, options):
        try:
            request = request_of(options, config, place, strategy, remat)
            if place is not None and options.what == "train" and too_large(params, place, strategy):
                continue
            plan = make_plan(request, options.cache)
        except (ValueError, TimeoutError) as error:
            print(f"  left out {place.name if place else 'here'} {strategy} {remat}: {error}", file=sys.stderr)
            continue
        plans.append(plan)
        print(f"  {_line(plan)}", file=sys.stderr, flush=True)
    return sorted(plans, key=_rank)


def _candidates(
    config: TrainConfig, slices: Sequence[Slice | None], options: argparse.Namespace
) -> Iterator[tuple[Slice | None, str, str | None]]:
    places: list[Slice | None] = list(slices)
    if slices == [None]:
        places = [one for g in GENERATIONS.values() for one in all_slices(g) if 8 <= one.chips <= 256]
    remats = [options.remat] if options.remat else list(REMATS) if options.what == "train" else [None]
    for place in places:
        chips = place.chips if place else 1
        mixtures = ["dp", *(f"data={chips // n},fsdp={n}" for n in (8, 16, 32, 64) if chips % n == 0)]
        for strategy in [options.strategy] if options.strategy else mixtures:
            for remat in remats:
                yield place, strategy, remat


def too_large(params: Any, place: Slice, strategy: str) -> bool:
    """Whether a training state of these shapes alone exceeds a chip."""
    mesh = abstract_mesh(resolve(strategy, place.chips, place.count, place.sides))
    shardings = jax.tree.leaves(shard_state(params, mesh))
    held = sum(math.prod(s.shard_shape(leaf.shape)) for leaf, s in zip(jax.tree.leaves(params), shardings, strict=True))
    return STATE_BYTES * held > place.generation.usable


def _rank(plan: Plan) -> tuple[Any, ...]:
    line = plan.roofline
    cost = plan.chip_hours if plan.chip_hours is not None else line.step * plan.compiled.facts["chips"] if line else 0.0
    return (plan.fits is False, cost)


def _line(plan: Plan) -> str:
    values = row(plan)
    verdict = {True: "fits", False: "does not fit", None: ""}[plan.fits]
    memory = f"{values['hbm_gib']:7.2f} GiB" if values["hbm_gib"] else "      ? GiB"
    start = f"{values['slice']:<10} {values['strategy']:<18} {values['remat']:<9} {memory} {verdict:<13}"
    if plan.roofline is None:
        return start
    hours = (
        "" if values["chip_hours"] is None else f"{values['days']:8.1f} days {values['chip_hours']:12,.0f} chip-hours"
    )
    return f"{start}{values['images_per_second']:9.4g} images/s {100 * values['share_of_peak']:4.0f}% of peak{hours}"


def table(plans: Sequence[Plan]) -> str:
    """The ranking as text, and the cheapest that fits: the fewest chip-hours of each generation."""
    lines = [_line(plan) for plan in plans]
    best: dict[str, Plan] = {}
    for plan in plans:
        if plan.fits and plan.request.slice is not None:
            best.setdefault(plan.request.slice.generation.name, plan)
    lines += [f"cheapest {name} that fits: {_line(plan)}" for name, plan in best.items()]
    return "\n".join(lines if best else [*lines, "nothing fits: try more chips, --remat block or a smaller --batch"])


def save(plans: Sequence[Plan], path: Path) -> None:
    """Rows as JSON lines, and, where matplotlib is installed, a plot of chip-hours against days beside them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row(plan)) + "\n" for plan in plans), encoding="utf-8")
    try:
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        print("  no plot: pip install matplotlib", file=sys.stderr)
        return
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name in GENERATIONS:
        for fits, marker in ((True, "o"), (False, "x")):
            rows = [
                row(plan) for plan in plans if plan.fits is fits and row(plan)["slice"].split("x")[-1].startswith(name)
            ]
            rows = [values for values in rows if values.get("hbm_gib") and "images_per_second" in values]
            label = name if fits else f"{name}, does not fit"
            if rows:
                x, y = [r["hbm_gib"] for r in rows], [r["images_per_second"] / r["chips"] for r in rows]
                axes.scatter(x, y, marker=marker, label=label)
    axes.set(xlabel="HBM per chip, GiB", ylabel="images/s per chip", xscale="log")
    axes.legend()
    figure.savefig(str(path.with_suffix(".png")), dpi=120)
