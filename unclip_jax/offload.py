"""Where a cascade's parameters are: on the device from the beginning, or in their files until a stage needs them.

A file is mapped into memory and read leaf by leaf, so that stages in turn need neither the device nor the host to hold
more than one network.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.checkpoint.safetensors import Network
from unclip_jax.checkpoint.writing import Tensor
from unclip_jax.config import Dtype
from unclip_jax.types import Params

Offload = Literal["auto", "always", "never"]
SHARE = 0.6  # of the device's memory that parameters may take; the rest is for what is computed with them


def on_device(params: Params) -> Params:
    """Parameters on the default device, one leaf read at a time; those that are there already are not copied.

    A stage calls this as it begins. What it read goes away with the last reference to it, so none may outlive the
    stage.
    """
    return jax.tree.map(_put, params)


def cast(params: Params, dtype: Dtype) -> Params:
    """Parameters whose floating leaves are of a dtype; those of a file are cast when they are read."""
    return jax.tree.map(lambda leaf: _cast(leaf, jnp.dtype(dtype)), params)


def needs_offload(networks: Iterable[Network], offload: Offload) -> bool:
    """Whether stages must take turns: always, never, or where all networks would take too much of the memory."""
    if offload != "auto":
        return offload == "always"
    memory, leaves = device_memory(), [leaf for network in networks for leaf in jax.tree.leaves(network.params)]
    return memory is not None and sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) > SHARE * memory


def device_memory() -> int | None:
    """Bytes that the default device can hold: on a CPU those that programs can still get; None where nothing tells."""
    device: Any = jax.local_devices()[0]
    if limit := (device.memory_stats() or {}).get("bytes_limit"):
        return limit
    table = Path("/proc/meminfo")
    if device.platform != "cpu" or not table.is_file():
        return None
    available = (line.split()[1] for line in table.read_text().splitlines() if line.startswith("MemAvailable:"))
    return next((1024 * int(kilobytes) for kilobytes in available), None)


def _put(leaf: Any) -> jax.Array:
    """A leaf on the default device; done when it returns, so that no copy of the one before is left."""
    match leaf:
        case jax.Array():
            return leaf
        case Tensor(dtype=dtype, read=read):
            array = np.array(read(), dtype, order="C")
        case _:
            array = np.array(leaf, order="C")
    # Always a copy of ours: on a CPU jax may keep the array that it is given, and the file may change or go away.
    return jax.device_put(array).block_until_ready()


def _cast(leaf: Any, dtype: np.dtype) -> Any:
    if leaf.dtype == dtype or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    if isinstance(leaf, jax.Array):
        return leaf.astype(dtype)
    read = leaf.read if isinstance(leaf, Tensor) else lambda: leaf
    return Tensor(tuple(leaf.shape), dtype, read)
