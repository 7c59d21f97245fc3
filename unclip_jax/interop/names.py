"""Tables of names: which tensor of a published checkpoint is which parameter of ours, read both ways.

A table is one ordered list of entries, computed from a config. Importing and exporting walk the same list, so that what
can be read can be written, and a tensor that stands in no entry, or an entry without its tensor, is an error by name.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from unclip_jax.checkpoint.schema import CheckpointError
from unclip_jax.checkpoint.writing import Tensor, host
from unclip_jax.models.stacking import unstack_blocks

Layout = Literal["same", "linear", "conv"]
Path = tuple[str, ...]
SHOWN = 5  # names listed in an error


class Entry(NamedTuple):
    """One tensor: its name and shape in the published file, and the path of our parameter.

    layout: same (the same order of elements; shapes may differ by axes of 1 and by heads), linear (torch's [out, in] is
    our [in, out], with heads split off where ours has them), conv (OIHW is HWIO).
    """

    theirs: str
    shape: tuple[int, ...]
    ours: Path
    layout: Layout = "same"


def linear(theirs: str, ours: Path, inputs: int, outputs: int, bias: bool = True) -> Iterator[Entry]:
    """The entries of a linear map; ours is a Dense or a DenseGeneral."""
    yield Entry(f"{theirs}.weight", (outputs, inputs), (*ours, "kernel"), "linear")
    if bias:
        yield Entry(f"{theirs}.bias", (outputs,), (*ours, "bias"))


def conv(theirs: str, ours: Path, inputs: int, outputs: int, side: int = 3, bias: bool = True) -> Iterator[Entry]:
    """The entries of a convolution."""
    yield Entry(f"{theirs}.weight", (outputs, inputs, side, side), (*ours, "kernel"), "conv")
    if bias:
        yield Entry(f"{theirs}.bias", (outputs,), (*ours, "bias"))


def norm(theirs: str, ours: Path, width: int) -> Iterator[Entry]:
    """The entries of a layer norm or a group norm."""
    yield Entry(f"{theirs}.weight", (width,), (*ours, "scale"))
    yield Entry(f"{theirs}.bias", (width,), (*ours, "bias"))


def to_ours(entry: Entry, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Their array as ours of `shape`: a view where that is possible."""
    match entry.layout:
        case "linear":
            array = array.T
        case "conv":
            array = array.transpose(2, 3, 1, 0)
    return array.reshape(shape)


def to_theirs(entry: Entry, array: np.ndarray) -> np.ndarray:
    """The inverse of to_ours."""
    match entry.layout:
        case "linear":
            return array.reshape(entry.shape[::-1]).T
        case "conv":
            return array.transpose(3, 2, 0, 1)
    return array.reshape(entry.shape)


def check_names(entries: Iterable[Entry], shapes: Mapping[str, tuple[int, ...]], name: str) -> None:
    """CheckpointError naming every tensor (at most five of a kind) that is missing, unknown or mis-shaped.

    shapes: of every tensor in the file that `name` describes.
    """
    wanted = {entry.theirs: entry.shape for entry in entries}
    problems = {
        "lacks": [key for key in wanted if key not in shapes],
        "has the unknown": [key for key in shapes if key not in wanted],
        "has the mis-shaped": [
            f"{key} {tuple(shapes[key])}, expected {shape}"
            for key, shape in wanted.items()
            if tuple(shapes.get(key, shape)) != shape
        ],
    }
    sentences = [f"{verb} {_some(keys)}" for verb, keys in problems.items() if keys]
    if sentences:
        raise CheckpointError(f"{name} {' and '.join(sentences)}: it belongs to another network or version")


def export(entries: Iterable[Entry], tree: Mapping[str, Any]) -> dict[str, Tensor]:
    """A tree of parameters under their names and in their layout, each in the tree's dtype and made when it is used.

    Transformers may be scanned or not: published files know their blocks one by one.
    """
    entries = list(entries)
    if any(key.startswith("block_") for entry in entries for key in entry.ours):
        tree = unstack_blocks(tree)

    def tensor(entry: Entry) -> Tensor:
        found = leaf(tree, entry.ours)
        return Tensor(entry.shape, np.dtype(found.dtype), lambda: to_theirs(entry, host(found)))

    return {entry.theirs: tensor(entry) for entry in entries}


def leaf(tree: Mapping[str, Any], path: Path) -> Any:
    """What a tree holds at a path."""
    node: Any = tree
    for key in path:
        node = node[key]
    return node


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
