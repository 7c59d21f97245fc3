"""A plan: a compiled step, its roofline, and both as text, JSON or a row of a table."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from unclip_jax.plan.blocks import known
from unclip_jax.plan.compiler import Compiled, compile_request
from unclip_jax.plan.request import Request
from unclip_jax.plan.roofline import SECONDS_PER_DAY, Roofline, by_block, roofline, transfer_seconds
from unclip_jax.plan.slices import GIB, Slice, processor
from unclip_jax.plan.steps import compute_dtype

FLOAT32_PASSES = 6  # bf16 products that precision=HIGHEST takes on a TPU
_NAMES = {"params": "parameters", "ema": "EMA", "opt_state": "optimiser", "context": "frozen CLIP", "batch": "batch"}


class Plan(NamedTuple):
    """What was asked, what the compiler says, and the roofline (None where nothing is known of the chip)."""

    request: Request
    compiled: Compiled
    roofline: Roofline | None

    @property
    def limit(self) -> float | None:
        """Bytes of HBM that a program may fill, None where that is not known."""
        place = self.request.slice
        return place.generation.usable if place else processor(self.compiled.facts["kind"]).memory

    @property
    def fits(self) -> bool | None:
        """Whether the step fits a chip, None where its memory is not known."""
        if self.compiled.memory is None:
            return False
        return None if self.limit is None else self.compiled.memory.total <= self.limit

    @property
    def remat(self) -> str:
        """What is recomputed in the backward pass, as the config says it."""
        return getattr(self.request.config, "remat", None) or "as the network says"

    @property
    def days(self) -> float | None:
        """Of the config's iterations, None for sampling."""
        if self.roofline is None or self.request.what != "train":
            return None
        return self.roofline.step * self.request.config.steps / SECONDS_PER_DAY

    @property
    def chip_hours(self) -> float | None:
        """Of the config's iterations, None for sampling."""
        return None if self.days is None else 24 * self.days * self.compiled.facts["chips"]


def make_plan(request: Request, cache: Path | None = None, executable: Path | None = None) -> Plan:
    """Compiles a request, or takes it from the cache, and adds the roofline; errors as compile_request."""
    compiled = compile_request(request, cache, executable)
    return Plan(request, compiled, _roofline(request, compiled))


def _roofline(request: Request, compiled: Compiled) -> Roofline | None:
    place, facts, program = request.slice, compiled.facts, compiled.program
    if place is None:
        return None
    if program is None:
        return estimate(request, place, facts, 0.0, 0.0, 0.0)
    asynchronous = [one for one in program.collectives if one.asynchronous]
    interconnect = transfer_seconds(program.collectives, place, facts["places"], facts["slices"])
    hidden = transfer_seconds(asynchronous, place, facts["places"], facts["slices"])
    return estimate(request, place, facts, interconnect, hidden, program.traffic)


def estimate(
    request: Request, place: Slice, facts: Mapping[str, Any], interconnect: float, hidden: float, traffic: float
) -> Roofline:
    """The roofline of a step whose facts are known, whose collectives take `interconnect` seconds, asynchronous ones
    `hidden` of them; traffic: bytes."""
    both = {
        path: facts["model"].get(path, 0) + facts["again"].get(path, 0) for path in {*facts["model"], *facts["again"]}
    }
    training = request.what == "train"
    return roofline(
        by_block(both, request.config, request.clip, request.what), sum(facts["model"].values()),
        known(place.generation.name), place, facts["images"],
        state_bytes=facts["state_bytes"] if training else 0.0,
        weight_bytes=0.0 if training else facts["state_bytes"] * facts["trips"],
        interconnect=interconnect, hidden=hidden, traffic=traffic,
        passes=FLOAT32_PASSES if compute_dtype(request.config) == "float32" else 1,
    )  # fmt: skip


def row(plan: Plan) -> dict[str, Any]:
    """A plan as flat JSON values: bytes in GiB, times in seconds, FLOPs of all chips."""
    facts, memory, program, line = plan.compiled.facts, plan.compiled.memory, plan.compiled.program, plan.roofline
    place = plan.request.slice
    model, again = sum(facts["model"].values()), sum(facts["again"].values())
    values: dict[str, Any] = {
        "config": plan.request.config.name, "what": plan.request.what, "slice": place.name if place else facts["kind"],
        "chips": facts["chips"], "strategy": plan.request.strategy, "mesh": facts["mesh"], "batch": facts["images"],
        "remat": plan.remat, "parameters": facts["parameters"], "fits": plan.fits,
        "limit_gib": plan.limit and plan.limit / GIB, "model_flops": model, "recomputed_flops": again,
    }  # fmt: skip
    if values["what"] == "train":
        values["state_gib"] = facts["state_bytes"] / GIB
    if memory is not None:
        arguments = {_NAMES.get(name, "other"): 0.0 for name in memory.arguments}
        for name, size in memory.arguments.items():
            arguments[_NAMES.get(name, "other")] += size / GIB
        rest = memory.total / GIB - sum(arguments.values())
        saved = rest * memory.saved
        values |= {"hbm_gib": memory.total / GIB, "arguments_gib": arguments}
        values |= {"activations_gib": saved, "temporaries_gib": rest - saved, "largest": list(memory.largest[:4])}
    else:
        values |= {"refused": plan.compiled.refused, "hbm_gib": plan.compiled.needs and plan.compiled.needs / GIB}
    if program is not None:
        if facts.get("platform") != "gpu":  # whose compiler hides products in calls of libraries
            values["compiled_flops"] = program.flops * facts["chips"]
        kinds: dict[str, dict[str, float]] = {}
        for one in program.collectives:
            kind = kinds.setdefault(one.kind, {"count": 0.0, "gb": 0.0, "wire_gb": 0.0})
            for key, value in (("count", one.count), ("gb", one.bytes / 1e9), ("wire_gb", one.wire / 1e9)):
                kind[key] += value
        values["collectives"] = kinds
    if line is not None:
        values |= {
            "parts": line.parts, "step": line.step, "at_peak": line.at_peak, "hbm_traffic": line.traffic,
            "interconnect": line.interconnect, "hidden": line.hidden,
            "images_per_second": line.images_per_second, "share_of_peak": line.share, "assumed": line.assumed,
            "days": plan.days, "chip_hours": plan.chip_hours,
        }  # fmt: skip
    values |= {"planned_in": plan.compiled.seconds, "planner_gib": plan.compiled.peak_memory / GIB}
    return _rounded(values)


def _rounded(value: Any) -> Any:
    match value:
        case dict():
            return {key: _rounded(inner) for key, inner in value.items()}
        case float():
            return float(f"{value:.5g}")
    return value


def _scaled(value: float | int) -> str:
    """A number with a prefix of its size: 3.568G."""
    power = min(int(math.log10(value)) // 3, 5) if value >= 1 else 0
    return f"{value / 1000**power:.4g}{'KMGTP'[power - 1] if power else ''}"


def text(plan: Plan) -> str:
    """A plan for people."""
    values = row(plan)
    facts, chips = plan.compiled.facts, values["chips"]
    sizes = ",".join(f"{axis}={size}" for axis, size in values["mesh"].items() if size > 1) or "one device"
    doing = "one training step" if values["what"] == "train" else f"sampling, {facts['trips']} steps"
    recompute = f", recompute {values['remat']}" if values["what"] == "train" else ""
    place = plan.request.slice
    devices = f"{chips} chips of {'x'.join(map(str, place.sides))}" if place else f"{chips} of them" * (chips > 1)
    lines = [
        f"{values['config']}: {doing} of {values['batch']} images on {values['slice']}{devices and f' ({devices})'}",
        f"  {_scaled(values['parameters'])} parameters; {values['strategy']}: {sizes}{recompute}",
        "",
        *_memory_lines(plan, values),
        "",
        *_work_lines(values),
    ]
    lines += ["", *(_time_lines(plan, values) if plan.roofline else [] if place else _unknown_lines(values))]
    asked = "no device asked" if place else "by the compiler of the devices here"
    lines += ["", f"  planned in {values['planned_in']:.0f} s with {values['planner_gib']:.1f} GiB, {asked}"]
    return "\n".join(lines)


def _memory_lines(plan: Plan, values: dict[str, Any]) -> list[str]:
    limit = values["limit_gib"]
    if plan.compiled.memory is None:
        needs = f"{values['hbm_gib']:.2f} GiB" if values["hbm_gib"] else "more"
        return [f"  does NOT fit: the compiler needs {needs}, and a chip has {limit:.2f} GiB", f"  {values['refused']}"]
    total = values["hbm_gib"]
    unit, scale = ("GiB", 1) if total >= 1 else ("MiB", 1024)
    lines = [f"  memory per {'chip' if plan.request.slice else 'device'}, {unit}"]
    parts = {
        **values["arguments_gib"],
        "activations": values["activations_gib"],
        "temporaries": values["temporaries_gib"],
    }
    lines += [f"    {name:<14}{scale * size:8.2f}" for name, size in parts.items() if scale * size >= 0.005]
    lines.append(f"    {'total':<14}{scale * total:8.2f}")
    if limit is None:
        return lines
    verdict = "fits" if plan.fits else "does NOT fit"
    lines[-1] += f" of {scale * limit:.2f}: {verdict} ({100 * total / limit:.0f}%)"
    return lines + [f"    largest: {buffer}" for buffer in values["largest"][:2]]


def _work_lines(values: dict[str, Any]) -> list[str]:
    analytic = values["model_flops"] + values["recomputed_flops"]
    lines = [
        f"  FLOPs          {_scaled(values['model_flops'])} of the model, "
        f"{_scaled(values['recomputed_flops'])} recomputed: {_scaled(analytic)} counted"
    ]
    if "compiled_flops" in values:
        compiled = values["compiled_flops"]
        lines.append(f"                 {_scaled(compiled)} in the compiled program ({compiled / analytic - 1:+.1%})")
    for kind, found in values.get("collectives", {}).items():
        lines.append(
            f"  {kind:<19}{found['count']:6.0f} of {found['gb']:.3g} GB in all, {found['wire_gb']:.3g} GB on each wire"
        )
    return lines


def _unknown_lines(values: dict[str, Any]) -> list[str]:
    """What a plan for the devices that are here leaves open."""
    peak, kind = processor(values["slice"]).peak, values["slice"]
    if peak is None:
        return [
            f"  neither speed nor memory of '{kind}' is known: whether it fits and how long it takes, running tells"
        ]
    least = 1e3 * (values["model_flops"] + values["recomputed_flops"]) / (peak * values["chips"])
    return [f"  {least:,.3g} ms at the bf16 peak of {kind}, which no step reaches: how near it comes, running tells"]


def _time_lines(plan: Plan, values: dict[str, Any]) -> list[str]:
    lines = ["  roofline, ms per step" if plan.request.what == "train" else "  roofline, ms per batch"]
    lines += [f"    {name:<20}{1e3 * seconds:10.1f}" for name, seconds in values["parts"].items()]
    lines.append(
        f"    {'total':<20}{1e3 * values['step']:10.1f}   (computing at peak {1e3 * values['at_peak']:.1f}, HBM "
        f"traffic at most {1e3 * values['hbm_traffic']:.1f}, interconnect {1e3 * values['interconnect']:.1f}, "
        f"{1e3 * values['hidden']:.1f} of it while computing)"
    )
    lines.append(
        f"  {values['images_per_second']:,.4g} images/s, {100 * values['share_of_peak']:.0f}% of peak"
        + (
            f"; {100 * values['assumed']:.0f}% of the FLOPs at assumed efficiencies"
            if values["assumed"] > 0.005
            else ""
        )
    )
    if compute_dtype(plan.request.config) == "float32":
        lines.append(
            f"  float32 takes {FLOAT32_PASSES} bf16 products: a dtype of bfloat16 is up to as many times as fast"
        )
    if values["days"] is not None:
        steps = plan.request.config.steps
        lines.append(f"  {steps:,} iterations: {values['days']:,.1f} days, {values['chip_hours']:,.0f} chip-hours")
    return lines
