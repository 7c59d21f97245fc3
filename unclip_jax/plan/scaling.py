"""Bytes over the interconnect per training step as chips grow, for each strategy, and where each stops paying.

`python -m unclip_jax.plan.scaling CONFIG [--tpu v5p]`: arithmetic of rings over the shapes of a config, no compiler.
"""

import argparse
import json
import math
from typing import NamedTuple

import jax

from unclip_jax.config import TrainConfig
from unclip_jax.overrides import load_config
from unclip_jax.plan.slices import GENERATIONS, Generation
from unclip_jax.plan.steps import frozen_clip
from unclip_jax.stages import build

CHIPS = tuple(2**power for power in range(3, 13))
WIDTH = 2  # bytes of a weight as it is gathered and of a gradient as it is summed: bf16


class Row(NamedTuple):
    """One strategy on so many chips: bytes on each chip's wire, seconds that they take, and those of computing."""

    strategy: str
    chips: int
    wire: float
    transfer: float
    compute: float

    @property
    def pays(self) -> bool:
        """Whether computing still takes longer than what it waits for."""
        return self.transfer < self.compute


def wire_bytes(strategy: str, parameters: float, chips: int, inner: int = 16) -> float:
    """Bytes that each chip sends in a step.

    dp sums gradients over all chips. fsdp gathers weights twice (forward, backward) and scatters gradients over all.
    hsdp does so among `inner` chips and sums its shard of the gradients over the rest.
    """
    size = WIDTH * parameters
    match strategy:
        case "dp":
            return 2 * (chips - 1) / chips * size
        case "fsdp":
            return 3 * (chips - 1) / chips * size
        case "hsdp":
            shards, copies = min(inner, chips), max(chips // inner, 1)
            return 3 * (shards - 1) / shards * size + 2 * (copies - 1) / copies * size / shards
    raise ValueError(f"unknown strategy '{strategy}': there are dp, fsdp, hsdp")


def scaling(parameters: float, flops: float, chip: Generation, share: float = 0.6, axes: int = 2) -> list[Row]:
    """Every strategy on 8 to 4,096 chips, at a fixed global batch of so many FLOPs.

    share: of the peak, in computing. axes: of the torus that a collective runs around, both ways.
    """
    rows = []
    for strategy in ("dp", "fsdp", "hsdp"):
        for chips in CHIPS:
            wire = wire_bytes(strategy, parameters, chips)
            rows.append(Row(strategy, chips, wire, wire / (2 * axes * chip.link), flops / (chips * chip.peak * share)))
    return rows


def of_config(config: TrainConfig, chip: Generation, clip: str | None = None) -> list[Row]:
    """The rows of a config's training step at its own batch, three forward passes of FLOPs."""
    from unclip_jax.plan.flops import count
    from unclip_jax.plan.steps import loss_shapes

    frozen = frozen_clip(config, clip)
    stage = build(config, frozen)
    params, *rest = loss_shapes(config, frozen, rows=1)
    work = count(jax.make_jaxpr(stage.loss)(params, *rest))
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    return scaling(parameters, 3 * work.total * config.data.batch_size, chip)


def main(arguments: list[str] | None = None) -> None:
    """Prints the table; see the module."""
    parser = argparse.ArgumentParser("python -m unclip_jax.plan.scaling", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--tpu", default="v5p", choices=sorted(GENERATIONS))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    rows = of_config(load_config(options.config), GENERATIONS[options.tpu])
    if options.json:
        print(json.dumps([dict(row._asdict(), pays=row.pays) for row in rows]))
        return
    print("strategy  chips  GB per chip  ms of transfer  ms of computing")
    for row in rows:
        mark = "" if row.pays else "  no longer pays"
        times = f"{1e3 * row.transfer:16.1f}{1e3 * row.compute:17.1f}"
        print(f"{row.strategy:<8}{row.chips:7}{row.wire / 1e9:13.2f}{times}{mark}")


if __name__ == "__main__":
    main()
