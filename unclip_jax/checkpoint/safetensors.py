"""One network in one safetensors file: parameters, constants, config and the identity of its CLIP."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from unclip_jax.checkpoint.schema import SCHEMA_VERSION, CheckpointError, from_json, to_json
from unclip_jax.checkpoint.sources import open_safetensors
from unclip_jax.checkpoint.writing import Tensor, host, replacing, save_file, write_failure
from unclip_jax.config import ClipConfig, Dtype, TrainConfig
from unclip_jax.types import Params

__all__ = ["Network", "check_tree", "load_network", "save_network", "write_failure"]

MAX_DEPTH = 64  # of the parameter tree: a hostile name must not nest without end
SHOWN = 5  # names listed in an error


class Network(NamedTuple):
    """What a weights file holds.

    config: the run that trained it. params, constants: nested dicts of numpy arrays.
    clip: identity of the CLIP it was trained on (its own digest for a CLIP, None for networks that know no CLIP).
    digest: 12 hexadecimal digits that identify the tensors. extra: whatever JSON the writer added.
    """

    config: TrainConfig
    params: Params
    constants: Params
    clip: str | None
    digest: str
    extra: dict[str, Any]


def save_network(
    path: str | Path,
    config: TrainConfig,
    params: Params,
    *,
    constants: Params | None = None,
    dtype: Dtype | Literal["auto"] = "bfloat16",
    clip: str | None = None,
    extra: dict[str, Any] | None = None,
) -> str:
    """Writes a network and returns its digest; the file appears whole or not at all.

    Floating parameters are cast to `dtype` (`auto` keeps theirs); constants (whitening statistics, tables) keep theirs.
    `clip` is the digest of the CLIP that the network was trained on. One tensor at a time is copied, and each is made
    twice: for the digest, which stands before them all, and for the file. Raises CheckpointError where the file cannot
    be written, and leaves an earlier file as it was.
    """
    path = Path(path)
    tensors = {f"params/{name}": _cast(leaf, dtype) for name, leaf in _leaves(params)}
    tensors |= {f"constants/{name}": _cast(leaf, "auto") for name, leaf in _leaves(constants or {})}
    digest = _digest(tensors)
    metadata = {
        "schema_version": str(SCHEMA_VERSION),
        "config": json.dumps(to_json(config)),
        "clip": clip or "",
        "extra": json.dumps(extra or {}),
        "sha256": digest,
    }
    metadata["seal"] = _seal(metadata)
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
    return digest[:12]


def load_network(path: str | Path, *, expect: type | None = None, verify: bool = True) -> Network:
    """Opens a network and verifies every byte of it, or without `verify` its header alone.

    `expect` is the class of the network's config that the caller can use. Parameters come as read-only numpy arrays in
    the dtype of the file, which is mapped into memory, not copied: replace it by another, as save_network does, but do
    not write into it. Raises CheckpointError for a file that is missing, damaged, no weights file, or of another
    network.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no weights file '{path}': check the path")
    try:
        tensors, metadata = open_safetensors(path)
    except CheckpointError as error:
        reason = str(error).removeprefix(f"'{path}' ").removesuffix(": fetch it again")
        raise CheckpointError(
            f"'{path}' is not a whole safetensors file ({reason}): it is truncated or damaged, fetch it again"
        ) from error
    if missing := {"schema_version", "config", "clip", "extra", "sha256", "seal"} - set(metadata):
        raise CheckpointError(
            f"'{path}' was not written by unclip_jax (its metadata lacks {', '.join(sorted(missing))}): "
            "import foreign weights first"
        )
    if metadata["seal"] != _seal(metadata) or (verify and metadata["sha256"] != _digest(tensors)):
        raise CheckpointError(f"'{path}' is damaged (its bytes differ from those that were saved): fetch it again")
    try:
        config, extra = from_json(json.loads(metadata["config"])), json.loads(metadata["extra"])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"'{path}' cannot be used: {error}") from error
    if not isinstance(config, TrainConfig):
        raise CheckpointError(f"'{path}' carries a {type(config).__name__}, expected a TrainConfig")
    if expect is not None and not isinstance(config.network, expect):
        raise CheckpointError(
            f"'{path}' holds a {type(config.network).__name__} ('{config.name}'), not the {expect.__name__} needed here"
        )
    tree = _nest(tensors, path)
    digest = metadata["sha256"][:12]
    clip = digest if isinstance(config.network, ClipConfig) else metadata["clip"] or None
    return Network(config, tree["params"], tree["constants"], clip, digest, extra)


def check_tree(expected_shapes: Any, tree: Any, name: str = "the checkpoint") -> None:
    """Raises CheckpointError naming every tensor (at most five of a kind) that is missing, extra or mis-shaped.

    `expected_shapes` is, for instance, `jax.eval_shape` of the network's initialiser.
    """
    expected = {path: tuple(leaf.shape) for path, leaf in _leaves(expected_shapes)}
    found = {path: tuple(leaf.shape) for path, leaf in _leaves(tree)}
    shapes = [
        f"{key} {found[key]}, expected {expected[key]}"
        for key in expected
        if found.get(key, expected[key]) != expected[key]
    ]
    problems = {
        "is missing": [key for key in expected if key not in found],
        "has the unknown": [key for key in found if key not in expected],
        "has the mis-shaped": shapes,
    }
    sentences = [f"{verb} {_some(keys)}" for verb, keys in problems.items() if keys]
    if sentences:
        raise CheckpointError(f"{name} {' and '.join(sentences)}: it belongs to another network or version")


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key in sorted(tree):
        value, name = tree[key], prefix + key
        if isinstance(value, Mapping):
            yield from _leaves(value, name + "/")
        else:
            yield name, value


def _nest(tensors: dict[str, np.ndarray], path: Path) -> dict[str, Any]:
    tree: dict[str, Any] = {"params": {}, "constants": {}}
    for name, tensor in tensors.items():
        *folders, leaf = name.split("/")
        node: Any = tree
        if not folders or folders[0] not in tree or len(folders) > MAX_DEPTH:
            raise CheckpointError(f"'{path}' has a tensor of the unusable name '{name[:80]}': fetch it again")
        for folder in folders:
            node = node.setdefault(folder, {})
            if not isinstance(node, dict):
                break
        if not isinstance(node, dict) or leaf in node:
            raise CheckpointError(f"'{path}' has two tensors in the place of '{name[:80]}': fetch it again")
        node[leaf] = tensor
    return tree


def _cast(leaf: Any, dtype: Dtype | Literal["auto"]) -> Tensor:
    found = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    cast = dtype != "auto" and jnp.issubdtype(found.dtype, jnp.floating)
    return Tensor(tuple(found.shape), np.dtype(dtype if cast else found.dtype), lambda: host(found))


def _digest(tensors: Mapping[str, Any]) -> str:
    """sha256 over the sorted names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, tensor.dtype.name, list(tensor.shape)]).encode())
        digest.update(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _seal(metadata: dict[str, str]) -> str:
    rest = {key: value for key, value in metadata.items() if key != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
