"""What a network, a loss or a training step says of the mesh that it runs on, without naming an axis.

`on(mesh)` surrounds the call (or `.lower`) of a jitted function; without it every function here leaves its argument as
it is, so that one program text runs on one device and on many. jax knows the mesh as part of a program's identity: what
was traced on one mesh is never taken for another's.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from unclip_jax.sharding.batches import BATCH_AXES, batch_ways
from unclip_jax.sharding.rules import shard_state, split_axes
from unclip_jax.sharding.strategy import AXES

_MESH: ContextVar[Mesh | None] = ContextVar("mesh", default=None)
_MAPPED: ContextVar[AbstractMesh | None] = ContextVar("mapped", default=None)  # while a mapped function is traced


@contextmanager
def on(mesh: Mesh) -> Iterator[None]:
    """While this is open, jitted functions that are called or lowered see the mesh."""
    enter: Any = jax.set_mesh if hasattr(jax, "set_mesh") else jax.sharding.use_mesh  # type: ignore[attr-defined]
    token = _MESH.set(mesh)
    try:
        with enter(mesh):
            yield
    finally:
        _MESH.reset(token)


def platform() -> str:
    """What the program is for: cpu, gpu or tpu; the mesh's devices may be of another platform than this machine's."""
    mesh = _MESH.get()
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def place(params: Any) -> Any:
    """Parameters for sampling where shard_state puts them on the mesh of `on`, leaves that nothing divides whole."""
    mesh = _MESH.get()
    if mesh is None:
        return params
    shardings = shard_state(params, mesh, strict=False)
    return jax.tree.map(lambda leaf, there: jax.device_put(np.asarray(leaf), there), params, shardings)


def current() -> AbstractMesh | None:
    """The mesh of `on`, None without one, where it has a single device, or inside a function mapped over it."""
    mesh = jax.sharding.get_abstract_mesh()
    if _MAPPED.get() is not None or mesh is None or mesh.empty or mesh.axis_names != AXES or mesh.size == 1:
        return None
    return mesh


def row_ways() -> int:
    """Over how many devices the rows of a batch are split."""
    mesh = current()
    return 1 if mesh is None else batch_ways(mesh)


def rows(x: Any) -> Any:
    """Pictures [b h w c], tokens [b n d] or vectors [b d] between two layers: rows over the batch axes, h or n over
    spatial, channels whole. An axis that the mesh does not divide stays whole."""
    mesh = current()
    return x if mesh is None else jax.tree.map(lambda leaf: _constrained(leaf, mesh), x)


def _constrained(x: jax.Array, mesh: AbstractMesh) -> jax.Array:
    spec: list[Any] = [None] * x.ndim
    if x.ndim and x.shape[0] % batch_ways(mesh) == 0:
        spec[0] = BATCH_AXES
    if x.ndim >= 3 and x.shape[1] % mesh.shape["spatial"] == 0:
        spec[1] = "spatial"
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))


def check_height(height: int) -> None:
    """Raises ValueError, naming what works, where spatial does not divide so many rows of pixels."""
    mesh = current()
    ways = 1 if mesh is None else mesh.shape["spatial"]
    if height % ways:
        nearest = max(size for size in range(1, ways) if ways % size == 0 and height % size == 0)
        raise ValueError(
            f"spatial={ways} does not divide the {height} rows of these pictures: use spatial={nearest} and data for "
            "the other devices"
        )


def as_state(tree: Any) -> Any:
    """Parameters, gradients or a training state, each leaf where shard_state puts it; gradients are summed to there."""
    mesh = current()
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, shard_state(tree, mesh))


def as_leaf(x: jax.Array, name: str, shape: tuple[int, ...], axes: int) -> jax.Array:
    """A parameter whose first `axes` axes were joined to one, and the others too, where the leaf of this name lies.

    Its gradient is then scattered as a matrix, before it takes the leaf's shape again: XLA's TPU compiler would sum it
    in full. Only where the first of joined axes is the split one; else x stays as it is.
    """
    mesh = current()
    if mesh is None:
        return x
    split = split_axes(name, shape, mesh)
    joined = split[:axes], split[axes:]
    if any(any(part[1:]) for part in joined):
        return x
    spec = PartitionSpec(*(part[0] for part in joined))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def over_rows(function: Callable[..., Any], *, out: Any) -> Callable[..., Any]:
    """function mapped over the batch axes: of arguments of rank 1 or more it sees its device's rows, scalars whole.

    out: a tree like its result, or the top of one, of True (rows) and False (the same on all devices). Inside, the
    collectives below work.
    """
    mesh = current()
    if mesh is None:
        return function

    def call(*arguments: Any) -> Any:
        given = jax.tree.map(lambda x: PartitionSpec(BATCH_AXES) if jax.numpy.ndim(x) else PartitionSpec(), arguments)
        result = jax.tree.map(lambda split: PartitionSpec(BATCH_AXES) if split else PartitionSpec(), out)
        return mapped(function, mesh, given, result)(*arguments)

    return call


def over_heads(function: Callable[..., Any], heads: int, whole: bool) -> Callable[..., Any]:
    """An attention of query, key, value [b n hd] and visible [b 1 1 k] mapped over rows, heads and rows of pixels.

    Every device attends with its own queries and heads; an axis that the mesh does not divide stays whole.
    whole: so do the queries, whose places tell what they may see.
    """
    mesh = current()
    if mesh is None:
        return function

    def call(query: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array) -> jax.Array:
        b, n, _ = query.shape
        row = BATCH_AXES if b % batch_ways(mesh) == 0 else None
        head = "tensor" if heads % mesh.shape["tensor"] == 0 else None
        place = "spatial" if n % mesh.shape["spatial"] == 0 and not whole else None
        asked, told = PartitionSpec(row, place, head), PartitionSpec(row, None, head)
        specs = (asked, told, told, PartitionSpec(row))
        return mapped(function, mesh, specs, asked)(query, key, value, visible)

    return call


def mapped(function: Callable[..., Any], mesh: AbstractMesh, given: Any, result: Any) -> Callable[..., Any]:
    """function run by every device on its part of the arguments, whose layouts and the result's are given."""

    def inside(*arguments: Any) -> Any:
        token = _MAPPED.set(mesh)
        try:
            return function(*arguments)
        finally:
            _MAPPED.reset(token)

    if hasattr(jax, "shard_map"):
        return jax.shard_map(inside, mesh=mesh, in_specs=given, out_specs=result, check_vma=False)
    from jax.experimental.shard_map import shard_map  # jax 0.6.0

    return shard_map(inside, mesh, given, result, check_rep=False)


def shards() -> int:
    """Inside over_rows: how many devices share the rows."""
    mesh = _MAPPED.get()
    return 1 if mesh is None else batch_ways(mesh)


def shard_number() -> Any:
    """Inside over_rows: which of the shards this device has."""
    return 0 if _MAPPED.get() is None else jax.lax.axis_index(BATCH_AXES)


def shift(tree: Any) -> Any:
    """Inside over_rows: what the device before this one holds; the devices stand in a ring."""
    if _MAPPED.get() is None:
        return tree
    count = shards()
    return jax.tree.map(
        partial(jax.lax.ppermute, axis_name=BATCH_AXES, perm=[(i, (i + 1) % count) for i in range(count)]), tree
    )


def total(tree: Any) -> Any:
    """Inside over_rows: sums over all shards."""
    return tree if _MAPPED.get() is None else jax.lax.psum(tree, BATCH_AXES)
