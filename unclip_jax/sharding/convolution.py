"""Convolutions on a mesh, cut by hand: XLA's partitioner (jaxlib 0.6 to 0.10) gives wrong numbers for some of those
whose pictures and kernels are both split, and for gradients of some kernels."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from unclip_jax.sharding.batches import BATCH_AXES, batch_ways
from unclip_jax.sharding.inside import current, mapped
from unclip_jax.sharding.rules import split_axes


def convolution(name: str) -> Callable[..., jax.Array]:
    """`jax.lax.conv_general_dilated` for the nn.Conv of that name, NHWC, without groups.

    Every device convolves its rows of the batch and, where height is kept, its rows of pixels and those that neighbours
    lend; the kernel is gathered over fsdp and its gradient scattered back; channels are split as the rule of the name
    says, and summed where it splits what comes in.
    """
    return partial(_convolve, f"{name}/kernel")


def _convolve(
    name: str, x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Any, **options: Any
) -> jax.Array:
    mesh = current()
    if mesh is None:
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
    split = split_axes(name, kernel.shape, mesh)
    reach, ways = kernel.shape[0] // 2, mesh.shape["spatial"]
    keeps = tuple(strides) == (1, 1) and not isinstance(padding, str) and tuple(padding[0]) == (reach, reach)
    # A single row of devices has no neighbours to borrow pixels of: the convolution's own padding copies nothing.
    high = "spatial" if ways > 1 and keeps and x.shape[1] % ways == 0 and x.shape[1] >= reach * ways else None
    row = BATCH_AXES if x.shape[0] % batch_ways(mesh) == 0 else None
    comes, goes = ("tensor" if axis == "tensor" else None for axis in split[2:])

    def own(x: jax.Array, kernel: jax.Array) -> jax.Array:
        if "fsdp" in split:
            kernel = jax.lax.all_gather(kernel, "fsdp", axis=split.index("fsdp"), tiled=True)
        pad: Any = padding
        if high is not None and reach:
            x, pad = _with_neighbours(x, reach, ways), ((0, 0), padding[1])
        y = jax.lax.conv_general_dilated(x, kernel, strides, pad, **options)
        return y if comes is None else jax.lax.psum(y, "tensor")

    given = PartitionSpec(row, high, None, comes), PartitionSpec(*split)
    return mapped(own, mesh, given, PartitionSpec(row, high, None, goes))(x, kernel)


def _with_neighbours(x: jax.Array, reach: int, ways: int) -> jax.Array:
    """A device's rows of pixels between the nearest of the devices above and below, zeros at the picture's edges."""
    above = jax.lax.ppermute(x[:, -reach:], "spatial", [(i, i + 1) for i in range(ways - 1)])
    below = jax.lax.ppermute(x[:, :reach], "spatial", [(i + 1, i) for i in range(ways - 1)])
    return jnp.concatenate([above, x, below], axis=1)
