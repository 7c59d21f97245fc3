"""TPU slices by name: chips, torus, memory, peak and bandwidths, and how the compiler is asked for them.

v4 and v5p names count cores, of which a chip has two; v5e and v6e names count chips. Figures are Google's published
ones, except `usable`, what the compiler leaves to a program, from its own out-of-memory texts (v5p's is its memory).
"""

import difflib
import math
import re
from typing import Any, NamedTuple

GIB = 1024.0**3


class Generation(NamedTuple):
    """One kind of chip.

    peak: bf16 FLOP/s. memory, usable: bytes of HBM, and those that a program may fill. bandwidth: HBM bytes/s. link:
    bytes/s of one link of the interconnect in one direction. network: bytes/s per chip between slices. clock: Hz of the
    matrix units, which the compiler's cycles count.
    """

    name: str
    peak: float
    memory: float
    usable: float
    bandwidth: float
    link: float
    network: float
    clock: float
    cores: int  # that a slice's name counts per chip
    sides: tuple[tuple[int, ...], ...]  # of the slices that can be had, smallest first


def _cubes(*sides: str) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(map(int, side.split("x"))) for side in sides)


_SQUARES = _cubes("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = _cubes(
    "1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16"
)  # fmt: skip
GENERATIONS = {
    g.name: g
    for g in (
        Generation("v4", 275e12, 32 * GIB, 30.75 * GIB, 1228e9, 45e9, 6.25e9, 1.05e9, 2, _CUBES),
        Generation("v5p", 459e12, 95 * GIB, 95 * GIB, 2765e9, 90e9, 6.25e9, 1.75e9, 2, _CUBES),
        Generation("v5e", 197e12, 16 * GIB, 15.75 * GIB, 819e9, 45e9, 3.125e9, 1.5e9, 1, _SQUARES),
        Generation("v6e", 918e12, 32 * GIB, 31.25 * GIB, 1640e9, 90e9, 12.5e9, 1.75e9, 1, _SQUARES),
    )
}


class Slice(NamedTuple):
    """Some chips of one generation in a torus of these sides, or `count` such slices joined by a network."""

    generation: Generation
    sides: tuple[int, ...]
    count: int = 1

    @property
    def chips(self) -> int:
        """Of all its slices."""
        return self.count * math.prod(self.sides)

    @property
    def name(self) -> str:
        """As Google names it, v5p-128; several slices as 2xv5p-128. One chip of v4 or v5p is not to be had alone."""
        one = f"{self.generation.name}-{math.prod(self.sides) * self.generation.cores}"
        return one if self.count == 1 else f"{self.count}x{one}"

    def wraps(self, axis: int) -> bool:
        """Whether a side closes to a ring: multiples of 4 of a cube's sides, and the 16 of a square's."""
        side = self.sides[axis]
        return side >= 4 and side % 4 == 0 if len(self.sides) == 3 else side == 16

    def request(self) -> dict[str, Any]:
        """Arguments of `jax.experimental.topologies.get_topology_desc`."""
        options: dict[str, Any] = {"platform": "tpu", "num_slices": self.count}
        options["topology_name"] = f"{self.generation.name}:{'x'.join(map(str, self.sides))}"
        if self.generation.name == "v4":
            options["chip_config_name"] = "megacore"  # both cores as one device, as on Cloud
        if math.prod(self.sides) == 1:
            options["chips_per_host_bounds"] = (1, 1, 1)
        return options


def all_slices(generation: Generation) -> list[Slice]:
    """Every slice of a generation, smallest first."""
    return [Slice(generation, sides) for sides in generation.sides]


def parse_slice(name: str) -> Slice:
    """The slice of a name such as v4-256, v5p-128, v5e-64, v5litepod-64, v6e-8, or 2xv5e-256 for two of them.

    Raises ValueError listing the nearest names where there is none.
    """
    match = re.fullmatch(r"(?:(\d+)x)?(v\d+[a-z]*)-(\d+)", name.strip().lower().replace("v5litepod", "v5e"))
    if match is not None and match[2] in GENERATIONS:
        count, generation, size = int(match[1] or 1), GENERATIONS[match[2]], int(match[3])
        for one in all_slices(generation):
            if size == math.prod(one.sides) * generation.cores and count > 0:
                return one._replace(count=count)
        names = sorted(
            all_slices(generation), key=lambda one: abs(math.log(one.chips * generation.cores / max(size, 1)))
        )
        nearest = ", ".join(one.name for one in names[:3])
        counts = "cores, two per chip" if generation.cores == 2 else "chips"
        raise ValueError(
            f"there is no slice '{name}': {generation.name} names count {counts}; the nearest are {nearest}"
        )
    known = [one.name for generation in GENERATIONS.values() for one in all_slices(generation)]
    nearest = ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.0))
    raise ValueError(f"unknown slice '{name}': the nearest are {nearest}; there are {', '.join(GENERATIONS)}")


class Processor(NamedTuple):
    """A GPU or processor that is here: as much as is published of it. peak in FLOP/s, memory in bytes."""

    peak: float | None
    memory: float | None
    bandwidth: float | None


def processor(kind: str) -> Processor:
    """What is known of a device by its device_kind, such as NVIDIA H100 80GB HBM3; nothing of a CPU."""
    match kind:
        case _ if "H200" in kind:
            return Processor(989e12, 141e9, 4.8e12)
        case _ if "H100" in kind:
            return Processor(989e12, 80e9, 3.35e12)
        case _ if "A100" in kind:
            return Processor(312e12, 80e9 if "80GB" in kind else 40e9, 2.0e12)
        case _:
            return Processor(None, None, None)
