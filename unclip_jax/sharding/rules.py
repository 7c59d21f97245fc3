"""Where parameters, averages and moments lie: a table for heads and channels, then each leaf's largest axis."""

import math
import re
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

SMALL = 16 * 1024  # elements: below this a gather costs more than the memory it saves
GIANT = 16 * 1024**2  # elements: above this a leaf must not be replicated silently


class Rule(NamedTuple):
    """Which axis of the leaves whose path ends in `pattern` is split over tensor.

    Pairs of layers are split so that only the second one's sum crosses devices: outputs (heads, hidden units, channels)
    of the first, inputs of the second (arXiv 1909.08053 section 3).
    """

    pattern: str
    axis: int


# Of which few rows are read: split over fsdp along their channels too, so that no device has to fetch a whole table.
TABLES = r"(token_embedding|tokens)/embedding"
RULES = (
    Rule(r"(query|key|value|context_key|context_value)/kernel", 1),  # heads, which a U-Net keeps side by side
    Rule(r"(query|key|value|context_key|context_value)/bias", 0),
    Rule(r"project/kernel", 0),
    Rule(r"mlp_in/kernel", 1),
    Rule(r"mlp_in/bias", 0),
    Rule(r"mlp_out/kernel", 0),
    Rule(r"conv_0/kernel", 3),
    Rule(r"conv_0/bias", 0),
    Rule(r"embedding/kernel", 1),  # a residual block's scales and shifts
    Rule(r"embedding/bias", 0),
    Rule(r"(conv_1|skip)/kernel", 2),
    Rule(r"time_0/kernel", 1),
    Rule(r"time_0/bias", 0),
    Rule(r"time_1/kernel", 0),
    Rule(TABLES, 1),
    Rule(r"patches/kernel", 3),
    Rule(r"(states_in|text_in|image_in|image_projection|text_projection)/kernel", 0),
    Rule(r"(image_to_time|text_to_time|text_to_context)/kernel", 0),
    Rule(r"image_to_tokens/kernel", 1),
    Rule(r"out/kernel", -2),
)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def path_name(path: tuple[Any, ...]) -> str:
    """A leaf's path with slashes, as rules read it."""
    return "/".join(str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry)))) for entry in path)


def rule_of(name: str) -> Rule | None:
    """The rule of a leaf, None for one that tensor leaves whole."""
    return next((rule for rule in RULES if _ends_in(name, rule.pattern)), None)


def _ends_in(name: str, pattern: str) -> bool:
    return re.search(rf"(^|/){pattern}$", name) is not None


def _rule_here(name: str) -> Rule | None:
    """The rule of a leaf, its axis counted as the leaf has it: after that of the layers."""
    rule = rule_of(name)
    return rule and rule._replace(axis=rule.axis + (is_stacked(name) and rule.axis >= 0))


def is_stacked(name: str) -> bool:
    """Whether a leaf holds that of every layer of a scanned transformer, along its first axis."""
    return "block" in name.split("/")


def shard_state(shape_tree: Any, mesh: Mesh | AbstractMesh, strict: bool = True) -> Any:
    """Tree of NamedSharding for a tree of shapes, such as `jax.eval_shape` of a TrainState.

    A leaf of SMALL elements or more is split over tensor as RULES say, and over fsdp along the largest other axis that
    fsdp divides (tables of embeddings along their channels); moments and averages lie with their parameters, whose
    names they share. Smaller leaves are replicated.
    Where strict, raises ValueError, naming the nearest that works, where tensor does not divide the axis of a rule,
    where fsdp or tensor splits nothing at all, or where a leaf above GIANT elements would be replicated.
    """
    leaves = [(path_name(path), tuple(leaf.shape)) for path, leaf in jax.tree_util.tree_leaves_with_path(shape_tree)]
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    problem = _problem(leaves, fsdp, tensor) if strict else None
    if problem is not None:
        raise ValueError(f"{problem}: {_advice(leaves, fsdp, tensor)}")
    specs = {name: _spec(name, shape, fsdp, tensor) for name, shape in leaves}

    def shard(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*specs[path_name(path)]))

    return jax.tree_util.tree_map_with_path(shard, shape_tree)


def split_axes(name: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> tuple[str | None, ...]:
    """The mesh axis over which each of a leaf's axes is split; the last names of its path are enough."""
    spec = _spec(name, shape, mesh.shape["fsdp"], mesh.shape["tensor"])
    return (*spec, *[None] * (len(shape) - len(spec)))


def _spec(name: str, shape: tuple[int, ...], fsdp: int, tensor: int) -> list[str | None]:
    """The mesh axis of each of a leaf's axes up to the last that is split."""
    spec: list[str | None] = [None] * len(shape)
    if math.prod(shape[is_stacked(name) :]) < SMALL:
        return []
    rule = _rule_here(name) if tensor > 1 else None
    if rule is not None and shape[rule.axis] % tensor == 0:
        spec[rule.axis] = "tensor"
    first = int(is_stacked(name))  # a scan reads one layer at a time, and no device should have to ask for it
    free = [axis for axis, length in enumerate(shape) if axis >= first and spec[axis] is None and length % fsdp == 0]
    if fsdp > 1 and free:
        spec[free[-1] if _ends_in(name, TABLES) else max(free, key=lambda axis: shape[axis])] = "fsdp"
    while spec and spec[-1] is None:
        spec.pop()
    return spec


def _problem(leaves: list[tuple[str, tuple[int, ...]]], fsdp: int, tensor: int) -> str | None:
    """Why sizes do not suit a tree, None where they do."""
    used: set[str | None] = set()
    for name, shape in leaves:
        size, spec = math.prod(shape[is_stacked(name) :]), _spec(name, shape, fsdp, tensor)
        used.update(spec)
        rule = _rule_here(name)
        if tensor > 1 and rule is not None and size >= SMALL and shape[rule.axis] % tensor:
            return f"tensor={tensor} does not divide axis {rule.axis % len(shape)} of {name}, of shape {shape}"
        if (fsdp > 1 or tensor > 1) and size > GIANT and not any(spec):
            return (
                f"{name} of shape {shape} would lie whole on every device, since fsdp={fsdp} divides none of its axes"
            )
    for axis, ways in (("fsdp", fsdp), ("tensor", tensor)):
        if ways > 1 and axis not in used:
            return f"{axis}={ways} splits no parameter: none with {SMALL} elements or more has an axis that it divides"
    return None


def _advice(leaves: list[tuple[str, tuple[int, ...]]], fsdp: int, tensor: int) -> str:
    """The sizes nearest to those asked, at most as large, that suit a tree."""
    sizes = [(f, t) for f in range(1, fsdp + 1) if fsdp % f == 0 for t in range(1, tensor + 1) if tensor % t == 0]
    fitting = [pair for pair in sizes if pair != (1, 1) and _problem(leaves, *pair) is None]
    if not fitting:
        return "use data for these devices"
    f, t = max(fitting, key=lambda pair: pair[0] * pair[1])
    return f"use fsdp={f},tensor={t} and data for the rest"
