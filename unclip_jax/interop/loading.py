"""Parameters from a weights file onto devices, one leaf at a time and of each leaf only what a device holds."""

import math
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from unclip_jax.checkpoint.schema import CheckpointError
from unclip_jax.checkpoint.sources import TensorSource
from unclip_jax.checkpoint.writing import Tensor
from unclip_jax.config import Dtype
from unclip_jax.interop.names import Entry, Path, check_names, to_ours
from unclip_jax.types import Params

Place = Callable[[Path, tuple[int, ...]], Sharding] | Literal["file"]


def load_params(
    entries: Iterable[Entry],
    source: TensorSource,
    expected: Any,
    dtype: Dtype | Literal["auto"] = "auto",
    place: Place | None = None,
    ignore: Iterable[str] = (),
) -> Params:
    """Parameters on devices, as nested dicts of the structure of `expected`.

    expected: nested dicts of shapes, such as `jax.eval_shape` of the network's initialiser. dtype: of floating
    parameters; `auto` keeps the file's (64 bits become 32 where jax is set so). place: the sharding of the parameter of
    a path and shape; None is the default device, and with `file` nothing is read: the leaves are Tensors, which are
    read and cast whenever they are used. ignore: patterns such as `*.position_ids` of tensors in the file that are no
    parameters.
    Raises CheckpointError before anything is read where a tensor is missing, unknown or mis-shaped, and where the
    entries do not fill every leaf of `expected` exactly once.
    """
    entries = list(entries)
    name = f"'{source.path}'"
    wanted, ignored = {entry.theirs for entry in entries}, tuple(ignore)
    shapes = {
        key: shape
        for key, shape in source.shapes.items()
        if key in wanted or not any(fnmatchcase(key, pattern) for pattern in ignored)
    }
    check_names(entries, shapes, name)
    leaves = dict(_leaves(expected))
    _check_filled(entries, leaves, source)
    default = jax.device_put(np.float32(0)).sharding
    tree: dict[str, Any] = {}
    for entry in entries:
        shape = tuple(leaves[entry.ours].shape)
        read = partial(_read, source, entry, shape)
        node = tree
        for key in entry.ours[:-1]:
            node = node.setdefault(key, {})
        if place == "file":
            node[entry.ours[-1]] = Tensor(shape, _target(source.dtypes[entry.theirs], dtype), read)
        else:
            node[entry.ours[-1]] = _put(read(), dtype, place(entry.ours, shape) if place else default)
    return tree


def _read(source: TensorSource, entry: Entry, shape: tuple[int, ...]) -> np.ndarray:
    return to_ours(entry, source.read(entry.theirs), shape)


def _target(found: np.dtype, dtype: Dtype | Literal["auto"]) -> np.dtype:
    return found if dtype == "auto" or not jnp.issubdtype(found, jnp.floating) else jnp.dtype(dtype)


def _put(array: np.ndarray, dtype: Dtype | Literal["auto"], sharding: Sharding) -> jax.Array:
    """A mapped array on devices; done when it returns, so that no copy of the one before is left."""
    target = jax.dtypes.canonicalize_dtype(_target(array.dtype, dtype))
    # Always a copy: on a CPU jax may keep the array that it is given, and the file may change or go away.
    return jax.make_array_from_callback(
        array.shape, sharding, lambda index: np.array(array[index], target, order="C")
    ).block_until_ready()


def _check_filled(entries: list[Entry], leaves: Mapping[Path, Any], source: TensorSource) -> None:
    filled: set[Path] = set()
    for entry in entries:
        place = "/".join(entry.ours)
        if entry.ours not in leaves or entry.ours in filled:
            problem = "has two tensors for" if entry.ours in filled else "holds what the network has no place for,"
            raise CheckpointError(f"'{source.path}' {problem} {place}: it belongs to another network or version")
        filled.add(entry.ours)
        leaf, dtype = leaves[entry.ours], source.dtypes[entry.theirs]
        if math.prod(leaf.shape) != math.prod(entry.shape):
            raise CheckpointError(
                f"'{source.path}' has {entry.theirs} of shape {entry.shape}, and {place} is {tuple(leaf.shape)}: "
                "it belongs to another network or version"
            )
        if jnp.issubdtype(leaf.dtype, jnp.floating) != jnp.issubdtype(dtype, jnp.floating):
            raise CheckpointError(
                f"'{source.path}' has {entry.theirs} in {dtype}, and {place} is {leaf.dtype}: "
                "convert it, quantised weights are not read"
            )
    if missing := ["/".join(path) for path in leaves if path not in filled]:
        raise CheckpointError(
            f"'{source.path}' leaves {len(missing)} parameters without a tensor, among them {missing[0]}: "
            "it belongs to another network or version"
        )


def _leaves(tree: Any, path: Path = ()) -> Iterable[tuple[Path, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value
