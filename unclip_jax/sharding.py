"""Mesh axes and the shardings of a training state and of a batch; the only file that says PartitionSpec."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # rows of a batch are split over both; parameters over fsdp alone
SMALL = 16 * 1024  # elements: below this a gather costs more than the memory it saves
GIANT = 16 * 1024**2  # elements: above this a leaf must not be replicated silently


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh of the axes data, fsdp and tensor; one of the three may be -1, which takes the devices that are left.

    Raises ValueError where the product is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [data, fsdp, tensor]
    asked = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"mesh {asked}: sizes are positive, and at most one is -1 (the devices that are left)")
    known = math.prod(size for size in sizes if size != -1)
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        raise ValueError(f"mesh {asked} does not fit {len(devices)} devices: choose sizes whose product is that number")
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Rows split over the batch axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def shard_state(shape_tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Tree of NamedSharding for a tree of shapes, such as `jax.eval_shape` of a TrainState.

    Every leaf is split over fsdp along its largest axis that fsdp divides, so that moments and averages lie with their
    parameters; leaves under SMALL elements are replicated.
    Raises ValueError naming a leaf above GIANT elements that no axis can split.
    """
    size = mesh.shape["fsdp"]

    def shard(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        shape = tuple(leaf.shape)
        if size == 1 or math.prod(shape) < SMALL:
            return replicated(mesh)
        axes = [axis for axis, length in enumerate(shape) if length % size == 0]
        if not axes:
            if math.prod(shape) > GIANT:
                name = jax.tree_util.keystr(path)
                raise ValueError(f"{name} of shape {shape} has no axis that fsdp={size} divides: choose another fsdp")
            return replicated(mesh)
        largest = max(axes, key=lambda axis: shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * largest, "fsdp"))

    return jax.tree_util.tree_map_with_path(shard, shape_tree)


def check_batch_size(rows: int, mesh: Mesh | AbstractMesh) -> None:
    """Raises ValueError, naming the nearest sizes that work, where `rows` (of all processes) does not fill the mesh."""
    ways = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if rows < 1 or rows % ways:
        below = rows // ways * ways
        nearest = f"{below} or {below + ways}" if below > 0 else str(ways)
        raise ValueError(
            f"a batch of {rows} does not divide over {ways} devices "
            f"(data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']}): use {nearest}"
        )


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Global arrays, sharded over the batch axes, from this process's host rows (a tree of numpy arrays)."""
    sharding = batch_sharding(mesh)
    for leaf in jax.tree.leaves(batch):
        check_batch_size(len(leaf) * jax.process_count(), mesh)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, np.asarray(rows)), batch)
