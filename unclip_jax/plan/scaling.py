"""Bytes over the interconnect per training step as chips grow, for each strategy, and where each stops paying.

`python -m unclip_jax.plan.scaling CONFIG [--tpu v5p] [--plot FILE.png]`: arithmetic of rings over the shapes of a
config, no compiler; beside it what the compiler's programs send, where plans of the same config are kept.
"""

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from unclip_jax.config import TrainConfig, with_transformers
from unclip_jax.overrides import load_config
from unclip_jax.plan.slices import GENERATIONS, Generation
from unclip_jax.plan.steps import frozen_clip
from unclip_jax.stages import build

CHIPS = tuple(2**power for power in range(3, 13))
STRATEGIES = ("dp", "fsdp", "hsdp", "tp", "spatial")
WIDTH = 2  # bytes of a weight as it is gathered, of a gradient as it is summed, and of an activation: bf16
INNER = {"hsdp": 16, "tp": 8, "spatial": 8}  # devices of the axis, the rest is data
TOLD = ("key", "value", "context_key", "context_value")
SUMMED = ("project", "mlp_out", "conv_1")  # layers whose inputs tensor splits: every device has a part of their sum


class Step(NamedTuple):
    """A training step: its parameters, batch and FLOPs, and what splitting a picture costs.

    summed: numbers of one picture that tensor sums over devices in a forward pass. halo: numbers of one picture's rows
    that a device hands to its two neighbours in a forward pass when spatial cuts the picture. told: its keys and
    values, which every device then gathers.
    """

    parameters: float
    batch: int
    flops: float
    summed: float
    halo: float
    told: float


class Row(NamedTuple):
    """One strategy on so many chips: bytes on each chip's wire, seconds that they take, and those of computing.

    possible: whether the batch has a picture for every group of devices that shares one.
    """

    strategy: str
    chips: int
    wire: float
    transfer: float
    compute: float
    possible: bool

    @property
    def pays(self) -> bool:
        """Whether computing still takes longer than what it waits for."""
        return self.possible and self.transfer < self.compute


def wire_bytes(strategy: str, step: Step, chips: int) -> float:
    """Bytes that each chip sends in a step.

    dp sums gradients over all chips. fsdp gathers weights twice (forward, backward) and scatters gradients over all.
    hsdp does so among 16 chips and sums its shard of the gradients over the rest. tp sums activations, forward and
    backward, among 8 chips, and its shard of the gradients over the rest. spatial exchanges rows at the edges of 8
    strips of a picture and gathers keys and values, forward and backward, and sums gradients as dp.
    """
    inner = min(INNER.get(strategy, 1), chips)
    copies, size = chips // inner, float(WIDTH * step.parameters)
    pictures = step.batch / copies
    match strategy:
        case "dp":
            return _all_reduce(size, chips)
        case "fsdp":
            return 3 * (chips - 1) / chips * size
        case "hsdp":
            return 3 * (inner - 1) / inner * size + _all_reduce(size / inner, copies)
        case "tp":
            return 2 * pictures * _all_reduce(float(WIDTH * step.summed), inner) + _all_reduce(size / inner, copies)
        case "spatial":
            edges = step.halo + (inner - 1) / inner * step.told if inner > 1 else 0
            return 2 * pictures * WIDTH * edges + _all_reduce(size, chips)
    raise ValueError(f"unknown strategy '{strategy}': there are {', '.join(STRATEGIES)}")


def _all_reduce(size: float, ways: int) -> float:
    return 2 * (ways - 1) / ways * size


def scaling(step: Step, chip: Generation, share: float = 0.6, axes: int = 2) -> list[Row]:
    """Every strategy on 8 to 4,096 chips, at a fixed global batch.

    share: of the peak, in computing. axes: of the torus that a collective runs around, both ways.
    """
    rows = []
    for strategy in STRATEGIES:
        if strategy == "spatial" and not step.halo or strategy == "tp" and not step.summed:
            continue
        for chips in CHIPS:
            wire, inner = wire_bytes(strategy, step, chips), INNER.get(strategy, 1)
            groups = chips // inner if strategy in ("tp", "spatial") else chips
            seconds = wire / (2 * axes * chip.link), step.flops / (chips * chip.peak * share)
            rows.append(Row(strategy, chips, wire, *seconds, groups <= step.batch))
    return rows


def step_of(config: TrainConfig, clip: str | None = None) -> Step:
    """A config's training step at its own batch, three forward passes of FLOPs."""
    from unclip_jax.plan.flops import count
    from unclip_jax.plan.steps import loss_shapes

    config = replace(config, network=with_transformers(config.network, scan=False))  # every layer is to be seen once
    frozen = frozen_clip(config, clip)
    stage = build(config, frozen)
    params, *rest = loss_shapes(config, frozen, rows=1)
    summed, halo, told = 0, 0, 0

    def watch(call: Any, arguments: Any, options: Any, context: Any) -> Any:
        nonlocal summed, halo, told
        result = call(*arguments, **options)
        if context.method_name == "__call__" and isinstance(context.module, nn.Conv | nn.Dense | nn.DenseGeneral):
            summed += result.size if context.module.name in SUMMED else 0
            told += result.size if context.module.name in TOLD else 0
            if isinstance(context.module, nn.Conv) and context.module.kernel_size != (1, 1) and arguments[0].ndim == 4:
                halo += 2 * arguments[0].shape[2] * arguments[0].shape[3]
        return result

    with nn.intercept_methods(watch):
        jaxpr = jax.make_jaxpr(stage.loss)(params, *rest)
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    batch = config.data.batch_size
    return Step(float(parameters), batch, 3 * count(jaxpr).total * batch, float(summed), float(halo), float(told))


def kept_wires(config: str, generation: str) -> dict[tuple[str, int], float]:
    """Bytes on each chip's wire in the kept plans of a config's training, by strategy and chips.

    Those count that recompute every block, where that is asked, so that weights are gathered twice.
    """
    from unclip_jax.plan.kept import rows

    found: dict[tuple[str, int], float] = {}
    for row in rows():
        asked = row["config"] == config and row["what"] == "train" and row["asked_remat"] in (None, "block")
        if asked and row["fits"] and row["slice"].startswith(generation):
            split = tuple(axis for axis, size in row["mesh"].items() if size > 1)
            strategy = {("data",): "dp", ("fsdp",): "fsdp", ("data", "fsdp"): "hsdp"}[split]
            found[strategy, row["chips"]] = sum(1e9 * one["wire_gb"] for one in row["collectives"].values())
    return found


def plot(rows: list[Row], path: Path, title: str) -> None:
    """Bytes per chip against chips, and milliseconds of transfer and computing; needs matplotlib."""
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for strategy in dict.fromkeys(row.strategy for row in rows):
        own = [row for row in rows if row.strategy == strategy and row.possible]
        left.plot([row.chips for row in own], [row.wire / 1e9 for row in own], marker="o", label=strategy)
        right.plot([row.chips for row in own], [1e3 * row.transfer for row in own], marker="o", label=strategy)
    first = [row for row in rows if row.strategy == rows[0].strategy]
    right.plot([row.chips for row in first], [1e3 * row.compute for row in first], "k--", label="computing")
    left.set(xscale="log", yscale="log", xlabel="chips", ylabel="GB sent per chip and step", title=title)
    right.set(xscale="log", yscale="log", xlabel="chips", ylabel="ms per step")
    for axes in (left, right):
        axes.set_xticks(CHIPS, [f"{chips:,}" for chips in CHIPS], rotation=45)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    right.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(str(path), dpi=110)


def main(arguments: list[str] | None = None) -> None:
    """Prints the table; see the module."""
    parser = argparse.ArgumentParser("python -m unclip_jax.plan.scaling", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--tpu", default="v5p", choices=sorted(GENERATIONS))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", type=Path, help="PNG")
    options = parser.parse_args(arguments)
    rows = scaling(step_of(load_config(options.config)), GENERATIONS[options.tpu])
    if options.plot:
        plot(rows, options.plot, f"{options.config}, {options.tpu}")
    if options.json:
        print(json.dumps([dict(row._asdict(), pays=row.pays) for row in rows]))
        return
    kept = kept_wires(options.config, options.tpu)
    print("strategy  chips  GB per chip  compiled  ms of transfer  ms of computing")
    for row in rows:
        mark = "" if row.pays else "  no longer pays" if row.possible else "  fewer pictures than chips"
        times = f"{1e3 * row.transfer:16.1f}{1e3 * row.compute:17.1f}"
        compiled = kept.get((row.strategy, row.chips))
        found = "" if compiled is None else f"{compiled / 1e9:.2f}"
        print(f"{row.strategy:<8}{row.chips:7}{row.wire / 1e9:13.2f}{found:>10}{times}{mark}")


if __name__ == "__main__":
    main()
