"""Published weights files as names and lazily read arrays: safetensors, sharded indices and torch's pickles."""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from unclip_jax.checkpoint.mapped import map_file, view
from unclip_jax.checkpoint.pickles import open_pickle
from unclip_jax.checkpoint.schema import CheckpointError

MAX_HEADER = 100 * 1000**2  # bytes, as the safetensors library has it
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".th")
PICKLED_STEMS = {"model": "pytorch_model"}  # transformers names its two formats differently

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


class TensorSource(NamedTuple):
    """Tensors of one or several files, of which nothing is in memory until it is used.

    path: the file that was opened. arrays: read-only views of the mapped files, in the files' dtypes and layouts.
    """

    path: Path
    arrays: Mapping[str, np.ndarray]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return {name: array.shape for name, array in self.arrays.items()}

    @property
    def dtypes(self) -> dict[str, np.dtype]:
        """Dtype of every tensor; bfloat16 and 8-bit floats are those of ml_dtypes."""
        return {name: array.dtype for name, array in self.arrays.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor, read from the file when it is used; CheckpointError where there is none of that name."""
        if name not in self.arrays:
            raise CheckpointError(f"'{self.path}' has no tensor '{name}': it belongs to another network or version")
        return self.arrays[name]


def open_source(path: str | Path) -> TensorSource:
    """The tensors of a weights file, by its name's ending.

    `.safetensors`; `.bin`, `.ckpt`, `.pt`, `.pth` and `.th`, which are pickles (names as in `open_pickle`); and
    `.index.json`, whose shards lie beside it. Raises CheckpointError for files that are missing, damaged or hostile.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return TensorSource(path, open_safetensors(path)[0])
    if path.suffix in PICKLES:
        return TensorSource(path, open_pickle(path))
    if path.suffix == ".json" and ".index." in path.name:
        return TensorSource(path, _open_index(path))
    raise CheckpointError(
        f"'{path}' is no weights file by its name: give a .safetensors, .index.json or {', '.join(PICKLES)} file"
    )


def find_weights(folder: str | Path, stem: str = "diffusion_pytorch_model", variant: str | None = None) -> Path:
    """The weights file in a component's folder, safetensors before pickles and whole files before indices.

    `stem` is the name before the ending, `model` for transformers (whose pickles are `pytorch_model`). Without a
    `variant` the plain files come first and then those of fp16; with one, only its files are looked for.
    Raises CheckpointError where there is none.
    """
    folder = Path(folder)
    middles = [f".{variant}"] if variant else ["", ".fp16"]
    pickled = PICKLED_STEMS.get(stem, stem)
    names = [
        name
        for base, ending in ((stem, "safetensors"), (pickled, "bin"))
        for middle in middles
        for name in (f"{base}{middle}.{ending}", f"{base}.{ending}.index{middle}.json")
    ]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    asked = f" of the variant {variant}" if variant else ""
    raise CheckpointError(
        f"'{folder}' has no weights{asked} ({names[0]}, its index or {pickled}.bin): fetch the whole component"
    )


def read_table(path: Path, remedy: str = "fetch it again") -> dict[str, Any]:
    """The table that a JSON file holds; CheckpointError, which ends in `remedy`, where it holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0][:120]
        raise CheckpointError(f"'{path}' cannot be read as JSON ({reason}): {remedy}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"'{path}' is no table of settings: {remedy}")
    return found


def locate(folder: Path, name: str, said_by: Path) -> Path:
    """A file that an untrusted file names, which must lie in `folder`.

    Symlinks may lead to files within the folder and to the blobs of the same repository in a hub's cache
    (`models--owner--name/snapshots/revision/file` to `models--owner--name/blobs/hash`).
    Raises CheckpointError for paths, for links that lead elsewhere and for absent files.
    """
    if name in ("", ".", "..") or not (PurePosixPath(name).name == name == PureWindowsPath(name).name):
        raise CheckpointError(f"'{said_by}' names the file '{name[:80]}' outside of its folder: do not trust it")
    try:
        real = (folder / name).resolve()
        allowed = [folder.resolve(), *_blobs(folder.resolve())]
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"'{said_by}' names '{name[:80]}', which is no usable file name: fetch it again"
        ) from error
    if not any(real.is_relative_to(place) for place in allowed):
        raise CheckpointError(
            f"'{folder / name}' is a link out of its folder: put the file itself there, or a link within the folder"
        )
    if not real.is_file():
        raise CheckpointError(f"'{said_by}' names '{name[:80]}', and there is no such file beside it: fetch that too")
    return folder / name


def _blobs(folder: Path) -> list[Path]:
    """The blobs of the hub's cache that a folder is part of."""
    return [
        place.parent / "blobs"
        for place in folder.parents
        if place.name == "snapshots" and place.parent.name.startswith("models--")
    ]


def _open_index(path: Path) -> dict[str, np.ndarray]:
    mapping = map_file(path)
    if len(mapping) > MAX_HEADER:
        raise CheckpointError(f"'{path}' is larger than an index of tensors can be: fetch it again")
    index = _parse(mapping[:], path)
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise CheckpointError(f"'{path}' has no weight_map of names to files: fetch it again")
    arrays: dict[str, np.ndarray] = {}
    for name in sorted(set(files.values())):
        if name.endswith(".json"):
            raise CheckpointError(f"'{path}' names the index '{name[:80]}' as a shard: fetch it again")
        shard = open_source(locate(path.parent, name, path)).arrays
        listed = {key for key, file in files.items() if file == name}
        if differing := sorted(listed ^ set(shard)):
            verb = "lacks" if differing[0] in listed else "has, but the index does not list,"
            raise CheckpointError(
                f"'{path.parent / name}' {verb} '{differing[0][:80]}' and disagrees with its index: fetch both again"
            )
        arrays |= shard
    return arrays


def open_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Views of every tensor, and the metadata; the header is checked before anything of its size is believed."""
    mapping = map_file(path)
    if len(mapping) < 8:
        raise CheckpointError(f"'{path}' is truncated (it has {len(mapping)} bytes): fetch it again")
    (length,) = struct.unpack("<Q", mapping[:8])
    start = 8 + length
    if length > MAX_HEADER:
        raise CheckpointError(f"'{path}' claims a header of {length} bytes, so it is no safetensors file: check it")
    if start > len(mapping):
        raise CheckpointError(f"'{path}' is truncated (its header has {length} bytes): fetch it again")
    header = _parse(mapping[8:start], path)
    if not isinstance(header, dict):
        raise CheckpointError(f"'{path}' has a header that is no table of tensors: fetch it again")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"'{path}' has metadata that is no table of texts: fetch it again")
    parsed = {name: _described(entry, name, path) for name, entry in header.items()}
    end = 0
    for name, (_, _, first, last) in sorted(parsed.items(), key=lambda item: item[1][2:]):
        if first != end:
            problem = "overlaps another" if first < end else "leaves a gap before it"
            raise CheckpointError(f"'{path}' has a tensor '{name[:80]}' that {problem}: it is damaged, fetch it again")
        end = last
    if start + end != len(mapping):
        problem = "truncated" if start + end > len(mapping) else "damaged"
        raise CheckpointError(
            f"'{path}' is {problem} (its header claims {end} bytes of tensors and it has {len(mapping) - start}): "
            "fetch it again"
        )
    try:
        views = {name: view(mapping, dtype, shape, start + first) for name, (dtype, shape, first, _) in parsed.items()}
    except (ValueError, OverflowError) as error:
        raise CheckpointError(f"'{path}' has a tensor of an impossible shape ({error}): fetch it again") from error
    return views, metadata


def _described(entry: Any, name: str, path: Path) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """Dtype, shape and the two offsets of a header's entry."""
    match entry:
        case {"dtype": str(kind), "shape": list(shape), "data_offsets": [first, last]}:
            numbers = (*shape, first, last)
            if kind not in DTYPES:
                raise CheckpointError(
                    f"'{path}' has '{name[:80]}' in the unknown dtype {kind[:20]}: convert it to F32, F16 or BF16"
                )
            dtype = DTYPES[kind]
            # Python's integers do not overflow, so that no product of claims wraps round to a small number.
            if all(type(number) is int and number >= 0 for number in numbers) and (
                math.prod(shape) * dtype.itemsize == last - first
            ):
                return dtype, tuple(shape), first, last
    raise CheckpointError(
        f"'{path}' describes '{name[:80]}' with a dtype, shape and offsets that contradict one another: fetch it again"
    )


def _parse(text: bytes, path: Path) -> Any:
    """JSON in which no name comes twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for name, value in pairs:
            if name in table:
                raise CheckpointError(f"'{path}' has two tensors or fields of the name '{name[:80]}': fetch it again")
            table[name] = value
        return table

    try:
        return json.loads(text, object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"'{path}' has a header that is no JSON ({str(error)[:120]}): it is damaged, fetch it again"
        ) from error
