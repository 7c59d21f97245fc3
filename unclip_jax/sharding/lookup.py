"""Tables of token embeddings on a mesh: devices exchange the rows that were looked up instead of the table."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from unclip_jax.sharding.batches import BATCH_AXES, batch_ways
from unclip_jax.sharding.inside import current, mapped
from unclip_jax.sharding.rules import split_axes


def lookup(name: str, dtype: Any) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """table[ids] in `dtype` for the nn.Embed of that name: table [words d], ids [b ...].

    The table keeps its own type, in which the gradients of a word's many places are summed; rows travel in `dtype`.

    Where fsdp splits the table's channels, every device looks up its channels for the rows of all, and they exchange
    what they found; of the gradient, only what data sums has the size of a device's part of the table. XLA's
    partitioner would gather the whole table and sum a gradient of its size on every device.
    """
    return partial(_look_up, f"{name}/embedding", dtype)


def _look_up(name: str, dtype: Any, table: jax.Array, ids: jax.Array) -> jax.Array:
    mesh = current()
    if mesh is None or split_axes(name, table.shape, mesh) != (None, "fsdp") or ids.shape[0] % batch_ways(mesh):
        return jnp.take(table, ids, axis=0).astype(dtype)

    def own(table: jax.Array, ids: jax.Array) -> jax.Array:
        every = jax.lax.all_gather(ids, "fsdp", axis=0, tiled=True)
        found = jnp.take(table, every, axis=0).astype(dtype)
        return jax.lax.all_to_all(found, "fsdp", split_axis=0, concat_axis=ids.ndim, tiled=True)

    row = PartitionSpec(BATCH_AXES)
    return mapped(own, mesh, (PartitionSpec(None, "fsdp"), row), row)(table, ids)
