"""Where the rows of a batch lie: which ones a host must read, and global arrays made of what each host read."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

BATCH_AXES = ("data", "fsdp")  # rows of a batch are split over both; parameters over fsdp alone


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Rows split over the batch axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_ways(mesh: Mesh | AbstractMesh) -> int:
    """Over how many devices the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch_size(rows: int, mesh: Mesh | AbstractMesh, accumulate: int = 1) -> None:
    """Raises ValueError, naming the nearest sizes that work, where `rows` (of all processes) does not fill the mesh.

    accumulate: micro-batches that a batch is cut into, each of which has to fill the mesh.
    """
    ways = batch_ways(mesh) * accumulate
    if rows < 1 or rows % ways:
        below = rows // ways * ways
        nearest = f"{below} or {below + ways}" if below > 0 else str(ways)
        parts = f" in {accumulate} micro-batches" if accumulate > 1 else ""
        raise ValueError(
            f"a batch of {rows} does not divide over {batch_ways(mesh)} devices "
            f"(data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']}){parts}: use {nearest}"
        )


def host_rows(mesh: Mesh, batch: int, process: int | None = None) -> Int[np.ndarray, " r"]:
    """Which rows of a batch of `batch` a process must read, ascending; by default this process.

    With the device orders of real slices they are not contiguous, and where tensor or spatial cross hosts two
    processes read the same rows: loaders ask here, and never divide by the number of hosts.
    """
    process = jax.process_index() if process is None else process
    places = batch_sharding(mesh).devices_indices_map((batch,))
    own = [np.arange(batch)[index] for device, index in places.items() if device.process_index == process]
    return np.unique(np.concatenate(own)) if own else np.zeros((0,), np.int64)


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Global arrays, sharded over the batch axes, from the rows that `host_rows` names (a tree of numpy arrays)."""
    sharding, ways = batch_sharding(mesh), batch_ways(mesh)
    held = len(host_rows(mesh, ways))

    def put(rows: Any) -> jax.Array:
        rows = np.asarray(rows)
        total = len(rows) * ways // held
        check_batch_size(total, mesh)
        own = host_rows(mesh, total)

        def read(index: Any) -> np.ndarray:
            first, last, _ = index[0].indices(total)
            place = int(np.searchsorted(own, first))
            return rows[place : place + last - first]

        return jax.make_array_from_callback((total, *rows.shape[1:]), sharding, read)

    return jax.tree.map(put, batch)
