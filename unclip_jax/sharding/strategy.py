"""How devices are shared out: strategies by name or by axis sizes, and the mesh that one makes of them."""

import difflib
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

AXES = ("data", "fsdp", "tensor", "spatial")
NAMES = ("dp", "fsdp", "tp", "hsdp", "spatial")
MOST_FSDP = 32  # devices: beyond two torus axes a TPU gathers weights by all-reducing padded copies, at twice the bytes
MOST_INNER = 8  # devices of tp and spatial, which talk in every layer


class Strategy(NamedTuple):
    """Sizes of a mesh's axes, whose product is the number of devices.

    data: copies of the model. fsdp: devices over which parameters, EMA and moments are split; they read other rows of
    the batch too. tensor: over attention heads and channels. spatial: over the rows of pixels of a picture (of tokens
    of a sequence). slices: of a pod or cluster; data runs across them, the other axes inside.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    spatial: int = 1
    slices: int = 1

    @property
    def devices(self) -> int:
        """How many devices it takes."""
        return math.prod(self[:4])

    def __str__(self) -> str:
        """As `resolve` reads it, without the axes of size 1."""
        sizes = zip(self._fields, self, strict=True)
        return ",".join(f"{axis}={size}" for axis, size in sizes if size > 1) or "data=1"


def resolve(name: str, devices: int, slices: int = 1, torus: Sequence[int] | None = None) -> Strategy:
    """The strategy of a name or mixture for so many devices.

    name: dp, fsdp, tp, hsdp, spatial, or sizes such as "fsdp=4,tensor=2"; data takes the devices that a mixture leaves.
    torus: sides of a slice's torus, as `torus_of`; fsdp takes at most two of them. Raises ValueError, naming the
    nearest that works, where the name is unknown or the sizes do not fit.
    """
    if devices < 1 or slices < 1 or devices % slices:
        raise ValueError(f"{devices} devices do not divide into {slices} slices")
    inside = devices // slices
    match name.strip().lower():
        case "dp":
            return Strategy(data=devices, slices=slices)
        case "hsdp" if slices == 1:
            halves = Strategy(data=_least_factor(devices), fsdp=devices // _least_factor(devices))
            raise ValueError(
                f"hsdp splits parameters inside slices and copies them across, and these {devices} devices are one "
                f"slice: use fsdp, or sizes such as {halves}"
            )
        case "fsdp" | "hsdp":
            fsdp = _most_fsdp(inside, torus)
            return Strategy(data=devices // fsdp, fsdp=fsdp, slices=slices)
        case "tp":
            tensor = _largest_divisor(inside, MOST_INNER)
            return Strategy(data=devices // tensor, tensor=tensor, slices=slices)
        case "spatial":
            spatial = _largest_divisor(inside, MOST_INNER)
            return Strategy(data=devices // spatial, spatial=spatial, slices=slices)
        case mixture:
            return _mixture(mixture, devices, slices)


def _mixture(text: str, devices: int, slices: int) -> Strategy:
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, equals, size = (word.strip() for word in part.partition("="))
        if not equals or axis not in Strategy._fields:
            known = [*NAMES, *(f"{axis}=N" for axis in Strategy._fields)]
            near = difflib.get_close_matches(part if equals else axis, known, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown strategy '{text}': did you mean {near}? there are {', '.join(known)}")
        if not size.isdecimal() or int(size) < 1 or axis in sizes:
            raise ValueError(f"strategy '{text}': every axis has one size, a positive number")
        sizes[axis] = int(size)
    across = sizes.pop("slices", slices)
    known = math.prod(sizes.values())
    if "data" not in sizes and devices % known == 0:
        sizes["data"] = devices // known
    strategy = Strategy(**sizes, slices=across)
    if strategy.devices != devices:
        nearest = _nearest(sizes, devices)
        raise ValueError(
            f"the mesh {strategy} takes {strategy.devices} devices and there are {devices}: use {nearest}, the nearest"
        )
    if strategy.data % across:
        raise ValueError(f"data={strategy.data} does not divide over {across} slices: use a multiple of {across}")
    return strategy


def _nearest(asked: dict[str, int], devices: int) -> Strategy:
    """The strategy along the same axes, and data, whose sizes are, as ratios, closest to what was asked."""
    axes = tuple({"data": 1} | asked)
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    fitting = [
        Strategy(**dict(zip(axes, sizes, strict=True)))
        for sizes in itertools.product(divisors, repeat=len(axes))
        if math.prod(sizes) == devices
    ]

    def distance(strategy: Strategy) -> float:
        return sum(abs(math.log(getattr(strategy, axis) / size)) for axis, size in asked.items())

    return min(fitting, key=distance)


def _most_fsdp(devices: int, torus: Sequence[int] | None) -> int:
    """The most devices up to MOST_FSDP on one side of the torus and a part of another; without one the largest divisor.

    Half of it where it would be all of 16 devices or more: without a data axis beside it the TPU compiler passes
    weights around in rings, and computes a fifth more.
    """
    if torus is None or math.prod(torus) != devices:
        return _largest_divisor(devices, MOST_FSDP)
    planes = [(side, other) for side, other in itertools.permutations((*torus, 1), 2) if side <= MOST_FSDP]
    most = max((side * _largest_divisor(other, MOST_FSDP // side) for side, other in planes), default=1)
    return most // _least_factor(most) if most == devices >= 16 else most


def _largest_divisor(number: int, most: int) -> int:
    return max(size for size in range(1, min(number, most) + 1) if number % size == 0)


def _least_factor(number: int) -> int:
    return next((size for size in range(2, number + 1) if number % size == 0), 1)


def slices_of(devices: Sequence[Any]) -> int:
    """How many slices of a pod the devices lie in; 1 for devices that do not say."""
    return len({getattr(device, "slice_index", None) for device in devices})


def torus_of(devices: Sequence[Any]) -> tuple[int, ...] | None:
    """Sides of the torus of one slice, as counted in coordinates; None for devices without coordinates."""
    coordinates = np.asarray([c for c in (getattr(device, "coords", None) for device in devices) if c is not None])
    if len(coordinates) != len(devices):
        return None
    return tuple(int(side) for side in np.ptp(coordinates, axis=0) + 1)


def make_mesh(strategy: Strategy | str = "dp", devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of the axes data, fsdp, tensor and spatial over the devices, all of them by default.

    Devices of a torus are laid so that neighbours on an axis are neighbours in the machine. Raises ValueError, naming
    the nearest that works, where the strategy does not fit the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    if isinstance(strategy, str):
        strategy = resolve(strategy, len(devices), slices_of(devices), torus_of(devices))
    if strategy.devices != len(devices):
        resolve(str(strategy), len(devices))  # says what is wrong
    data, *inner = strategy[:4]
    slices = slices_of(devices)
    if slices > 1:
        if data % slices:
            raise ValueError(f"data={data} does not divide over the {slices} slices: use a multiple of {slices}")
        grid = mesh_utils.create_hybrid_device_mesh(
            (data // slices, *inner), (slices, 1, 1, 1), devices, allow_split_physical_axes=True
        )
    else:
        grid = mesh_utils.create_device_mesh((data, *inner), devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def abstract_mesh(strategy: Strategy) -> AbstractMesh:
    """The mesh of a strategy without devices, for arithmetic on shapes."""
    return AbstractMesh(strategy[:4], AXES, axis_types=(AxisType.Auto,) * len(AXES))
